"""Dockerfile, compose file and Kubernetes manifests, as far as that can be seen without an engine or a cluster."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from compose_spec import PyCompose

from workers.settings import PREFIX, Section, Settings

DEPLOY = Path(__file__).parents[2] / "deploy"
ROLES = ("worker", "trainer", "indexer", "serve")
KUBERNETES = "1.31"
FILES = sorted(path for path in (DEPLOY / "kubernetes/base").glob("*.yaml") if path.stem != "kustomization")
OBJECTS = [object_ for path in FILES for object_ in yaml.safe_load_all(path.read_text())]
(CONFIG_MAP,) = yaml.safe_load((DEPLOY / "kubernetes/base/kustomization.yaml").read_text())["configMapGenerator"]
CONFIG = dict(literal.split("=", 1) for literal in CONFIG_MAP["literals"])
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
KUBECTL = Path(sys.executable).parent / "kubectl"


def named(kind: str, name: str) -> Any:
    (found,) = [each for each in OBJECTS if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found


@pytest.mark.parametrize("manifest", OBJECTS, ids=lambda each: f"{each['kind']}-{each['metadata']['name']}")
def test_manifests_are_valid_kubernetes(manifest: Any) -> None:
    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def test_a_misspelt_key_is_no_valid_kubernetes() -> None:
    manifest = named("Deployment", "worker")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest | {"spec": manifest["spec"] | {"replica": 2}}, KUBERNETES, strict=True)


@pytest.mark.parametrize("role", ROLES)
def test_every_role_is_guarded_probed_and_found(role: str) -> None:
    spec = named("Deployment", role)["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert container["args"] == [role]
    assert {"secretRef": {"name": "upwell-kafka", "optional": True}} in container["envFrom"]  # a Kafka without login
    assert pod["enableServiceLinks"] is False  # else the Service upwell's variables are refused as unknown settings
    assert pod["securityContext"]["runAsNonRoot"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert {"startupProbe", "livenessProbe"} <= container.keys()
    assert container["resources"]["requests"].keys() == {"cpu", "memory"}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    labels = spec["template"]["metadata"]["labels"]
    assert spec["selector"]["matchLabels"].items() <= labels.items()
    service = named("Service", role)["spec"]
    assert service["selector"].items() <= labels.items()
    scraped = {
        job["job_name"]: job
        for job in yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())["scrape_configs"]
    }
    (found,) = scraped[f"upwell-{role}"]["dns_sd_configs"]
    assert found["names"] == [role]
    assert found["port"] == service["ports"][0]["port"] == container["ports"][0]["containerPort"]


@pytest.mark.parametrize("role", ROLES)
def test_topics_are_there_before_a_role_starts(role: str) -> None:
    pod = named("Deployment", role)["spec"]["template"]["spec"]
    (container,), (topics,) = pod["containers"], pod["initContainers"]
    assert topics["args"] == ["topics"]
    for key in ("image", "envFrom", "securityContext"):  # the same Kafka, the same guard
        assert topics[key] == container[key]
    assert [mount for mount in container["volumeMounts"] if mount["name"] == "kafka-ca"] == topics["volumeMounts"]


def test_workers_are_not_more_than_partitions() -> None:
    partitions = int(CONFIG["UPWELL_KAFKA__PARTITIONS"])
    assert named("HorizontalPodAutoscaler", "worker")["spec"]["maxReplicas"] == partitions


def test_what_is_scaled_by_itself_is_not_set_back_at_each_apply() -> None:
    scaled = {each["spec"]["scaleTargetRef"]["name"] for each in OBJECTS if each["kind"] == "HorizontalPodAutoscaler"}
    assert scaled == {"worker", "serve"}
    assert {role for role in ROLES if "replicas" not in named("Deployment", role)["spec"]} == scaled


def test_a_pod_that_clients_reach_waits_until_they_know_that_it_goes() -> None:
    """SIGTERM comes while the proxies still send requests to it."""
    reached = [
        each["spec"]["selector"]["app"]
        for each in OBJECTS
        if each["kind"] == "Service" and each["spec"].get("clusterIP") != "None"
    ]
    assert reached == ["serve"]
    for role in reached:
        pod = named("Deployment", role)["spec"]["template"]["spec"]
        command, seconds = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert command == "sleep" and 5 <= int(seconds) <= pod["terminationGracePeriodSeconds"] / 2


def test_a_pod_counts_as_there_when_it_has_stayed() -> None:
    """Else one that ends after its start takes the place of a good one."""
    for role in ROLES:
        spec = named("Deployment", role)["spec"]
        if spec["strategy"].get("type") != "Recreate":
            assert spec["minReadySeconds"] >= 30, role
            (container,) = spec["template"]["spec"]["containers"]
            assert container["readinessProbe"]["httpGet"]["path"] == "/readyz", role  # a restore takes longer


def test_variables_are_settings() -> None:
    """A misspelt variable ends a role at its start."""
    given = set(CONFIG) | set(COMPOSE["x-upwell"]["environment"])
    given |= set(re.findall(r"\bUPWELL_\w+", (DEPLOY / "Dockerfile").read_text()))
    for name in given:
        section, _, key = name.removeprefix(PREFIX).lower().partition("__")
        field = Settings.model_fields[section]
        assert not key or (isinstance(field.default, Section) and key in type(field.default).model_fields), name


def test_the_compose_file_is_of_its_specification_and_one_with_a_misspelt_key_is_not() -> None:
    """As JSON: the parser knows no merge keys."""
    parse, text = PyCompose.from_json, json.dumps(COMPOSE)
    parse(text)
    with pytest.raises(ValueError, match="start_intervall"):
        parse(text.replace("start_interval", "start_intervall"))


def test_compose_has_every_role_and_what_they_name() -> None:
    services = COMPOSE["services"]
    for name in (*ROLES, "topics"):  # topics made otherwise than the roles are told end these
        assert services[name]["environment"] == COMPOSE["x-upwell"]["environment"], name
    assert services.keys() >= {*ROLES, "kafka", "topics", "prometheus", "grafana"}
    for name, service in services.items():
        assert set(service.get("depends_on", {})) <= services.keys(), name
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if not source.startswith("/"):  # a volume without a name
                assert (DEPLOY / source).exists() if source.startswith(".") else source in COMPOSE["volumes"], volume
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name} is open to the network"


def test_the_image_is_not_root_and_copies_what_is_there() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    final = text[text.rindex("FROM ") :]
    assert re.search(r"^USER 10001$", final, re.MULTILINE)
    assert "HNSWLIB_NO_NATIVE=1" in text
    for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        for source in sources.split():
            assert (DEPLOY.parent / source).exists(), source


@pytest.mark.parametrize("uv", ["exit 2", "exit 0"])
def test_a_lock_that_uv_did_not_cut_is_an_error_and_no_empty_lock(uv: str, tmp_path: Path) -> None:
    """The image would be built without what Upwell needs."""
    fake = tmp_path / "uv"
    fake.write_text(f"#!/bin/sh\n{uv}\n")
    fake.chmod(0o755)
    command = ["sh", str(DEPLOY / "image-lock.sh"), "cuda"]
    done = subprocess.run(command, cwd=DEPLOY.parent, env=os.environ | {"UV": str(fake)}, stdout=subprocess.PIPE)
    assert done.returncode != 0 and not done.stdout


def rendered(overlay: str | Path) -> list[Any]:
    command = [str(KUBECTL), "kustomize", str(DEPLOY / "kubernetes" / overlay)]
    manifests = list(yaml.safe_load_all(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    for manifest in manifests:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    return manifests


def test_kustomize_needs_no_shared_volume_with_a_bucket() -> None:
    manifests = rendered("s3")
    assert len(manifests) == len(OBJECTS)  # the ConfigMap in the volume's place
    kinds = {manifest["kind"]: manifest for manifest in manifests}
    assert "PersistentVolumeClaim" not in kinds
    assert kinds["ConfigMap"]["data"] == CONFIG | {"UPWELL_ARTIFACTS": "s3://my-bucket/upwell"}
    pods = {m["metadata"]["name"]: m["spec"]["template"]["spec"] for m in manifests if m["kind"] == "Deployment"}
    assert pods.keys() == set(ROLES)
    for pod in pods.values():
        (container,) = pod["containers"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]} and "artifacts" not in mounted
        assert {"secretRef": {"name": "upwell-store", "optional": True}} in container["envFrom"]


def test_kustomize_puts_the_indexer_and_the_trainer_on_a_gpu_each() -> None:
    manifests = rendered("gpu")
    assert len(manifests) == len(OBJECTS) + 1
    with_gpu = {}
    for manifest in manifests:
        if manifest["kind"] == "Deployment":
            (container,) = manifest["spec"]["template"]["spec"]["containers"]
            if "nvidia.com/gpu" in container["resources"]["limits"]:
                assert manifest["spec"]["template"]["spec"]["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
                with_gpu[manifest["metadata"]["name"]] = container.get("env", [])
    assert with_gpu == {"indexer": [], "trainer": [{"name": "UPWELL_TRAINER__DEVICE", "value": "cuda"}]}


def test_a_changed_setting_starts_every_role_anew(tmp_path: Path) -> None:
    """Else it holds for the pods that happen to be started later, and for them alone."""
    base = shutil.copytree(DEPLOY / "kubernetes/base", tmp_path / "base")
    for path in base.iterdir():
        path.write_text(path.read_text().replace("/data/cache", "/data/other"))
    old, new = (
        {m["metadata"]["name"]: m["spec"]["template"] for m in rendered(folder) if m["kind"] == "Deployment"}
        for folder in ("base", base)
    )
    assert old.keys() == set(ROLES) and all(old[role] != new[role] for role in ROLES)
