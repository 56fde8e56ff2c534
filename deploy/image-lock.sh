#!/bin/sh
# deploy/requirements.lock without what only developers need, hashes and all; with "cpu" also without torch and CUDA,
# which come from another index then: its torch, with hashes, is added where TORCH_INDEX names that index. Needs uv.
# Usage: image-lock.sh cuda|cpu
set -eu
names=$(mktemp)
trap 'rm -f "$names"' EXIT
# Not by a pipe, which would hide that uv failed: a lock with nothing in it, and an image without dependencies.
"${UV:-uv}" pip compile -q pyproject.toml --extra tracing --universal --python-version 3.11 --constraint deploy/requirements.lock \
  --no-header --no-annotate -o "$names" >/dev/null
test -s "$names"
awk -v device="$1" '
  NR == FNR { sub(/==.*/, ""); wanted[$1]; next }
  /^[a-z0-9]/ { split($0, part, "=="); keep = part[1] in wanted && !(device == "cpu" && part[1] ~ /^(torch|triton|nvidia-.*|cuda-.*)$/) }
  keep' "$names" deploy/requirements.lock
if [ "$1" = cpu ] && [ -n "${TORCH_INDEX:-}" ]; then
  grep -o '^torch==[0-9.]*' deploy/requirements.lock | "${UV:-uv}" pip compile -q - --no-deps --universal \
    --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate --index-url "$TORCH_INDEX"
fi
