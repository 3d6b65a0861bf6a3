"""The manifests are valid, a misspelt field in any of them is found, and what they name is there."""

import copy
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from jobs.cli import read_command
from tests.infra.manifests import KUBERAY, ROOT, documents, faults

DOCUMENTS = dict(documents())
FREE = ("labels", "matchLabels", "nodeSelector")
Place = tuple[str | int, ...]


def fields(node: Any, place: Place = ()) -> Iterator[Place]:
    """Where each field of a document is, but names that anyone may choose."""
    if isinstance(node, list):
        for number, one in enumerate(node):
            yield from fields(one, (*place, number))
    if isinstance(node, dict) and (not place or place[-1] not in FREE):
        for name, one in node.items():
            yield (*place, name)
            yield from fields(one, (*place, name))


def misspelt(document: dict[str, Any], place: Place) -> dict[str, Any]:
    made = copy.deepcopy(document)
    node: Any = made
    for step in place[:-1]:
        node = node[step]
    name = str(place[-1])
    node[name[:-1] + name[-1] * 2] = node.pop(place[-1])
    return made


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_manifest_is_valid_and_each_misspelt_field_is_found(name):
    document = DOCUMENTS[name]
    assert faults(document) == []
    places = list(fields(document))
    assert len(places) >= 3
    assert [place for place in places if not faults(misspelt(document, place))] == []
    nameless = copy.deepcopy(document)
    if nameless.pop("metadata", None):  # a Kustomization has none
        assert faults(nameless)


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if ":Ray" in name])
def test_a_value_of_the_wrong_kind_is_found(name):
    document = copy.deepcopy(DOCUMENTS[name])
    spec = document["spec"].get("jobTemplate", document["spec"])
    spec["activeDeadlineSeconds" if "entrypoint" in spec else "enableInTreeAutoscaling"] = "yes"
    assert faults(document)


def test_no_job_on_the_standing_cluster_is_tried_again_by_kuberay():
    for job in found("RayJob") + found("RayCronJob"):
        assert faults(job) == []
        again = copy.deepcopy(job)
        again["spec"].get("jobTemplate", again["spec"])["backoffLimit"] = 3
        assert faults(again) == ["backoffLimit is incompatible with clusterSelector"]


def found(kind: str) -> list[dict[str, Any]]:
    return [document for document in DOCUMENTS.values() if document["kind"] == kind]


def jobs() -> list[dict[str, Any]]:
    """The specs of all Ray jobs."""
    return [job["spec"] for job in found("RayJob")] + [job["spec"]["jobTemplate"] for job in found("RayCronJob")]


def groups() -> list[dict[str, Any]]:
    (cluster,) = found("RayCluster")
    return [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]


def test_kustomizations_name_every_file_beside_them():
    for path in KUBERAY.glob("*/kustomization.yaml"):
        made = yaml.safe_load(path.read_text())
        named = {*made["resources"], *(file for one in made.get("configMapGenerator", ()) for file in one["files"])}
        assert named == {file.name for file in path.parent.iterdir()} - {path.name}


def test_commands_are_such_as_the_command_line_takes():
    assert len(jobs()) == 3
    for job in jobs():
        *start, module = shlex.split(job["entrypoint"])[:4]
        assert (start, module) == (["exec", "python", "-m"], "jobs")
        _, _, settings = read_command(shlex.split(job["entrypoint"])[4:])
        _, gpu = groups()
        share = gpu["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert settings.gpus_per_worker == int(share["nvidia.com/gpu"]), "said, as there is none to be seen at first"
        assert settings.cpus_per_worker == int(share["cpu"]) - 1, "one is left for Ray"
        head = {port["containerPort"] for port in groups()[0]["template"]["spec"]["containers"][0]["ports"]}
        assert settings.metrics_port in head
        patience = yaml.safe_load(job["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]
        for group in groups():
            assert settings.grace < int(patience) < group["template"]["spec"]["terminationGracePeriodSeconds"]


def test_what_manifests_name_is_there():
    (cluster,), accounts = found("RayCluster"), {one["metadata"]["name"] for one in found("ServiceAccount")}
    assert all(job["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]} for job in jobs())
    assert f"ray=={cluster['spec']['rayVersion']}" in (ROOT / "constraints.txt").read_text().split()
    (cron,), (binding,), (role,) = found("CronJob"), found("RoleBinding"), found("Role")
    pod = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert {pod["serviceAccountName"], groups()[1]["template"]["spec"]["serviceAccountName"]} == accounts
    assert binding["subjects"][0]["name"] == pod["serviceAccountName"]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert role["rules"] == [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create"]}]
    made = yaml.safe_load((KUBERAY / "nightly/kustomization.yaml").read_text())["configMapGenerator"][0]
    assert pod["volumes"][0]["configMap"]["name"] == made["name"]
    mount = pod["containers"][0]["volumeMounts"][0]["mountPath"]
    assert pod["containers"][0]["args"][-1] == f"{mount}/{made['files'][0]}"


def test_metrics_are_scraped_where_pods_serve_them():
    (monitor,) = found("PodMonitor")
    ports = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
    served = set()
    for group in groups():
        assert group["template"]["metadata"]["labels"].items() >= monitor["spec"]["selector"]["matchLabels"].items()
        served |= {port["name"] for port in group["template"]["spec"]["containers"][0]["ports"]}
    assert ports <= served
    (interval,) = {endpoint["interval"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
    for job in jobs():
        _, _, settings = read_command(shlex.split(job["entrypoint"])[4:])
        assert settings.metrics_linger >= 2 * int(interval.removesuffix("s")), "or the totals are not seen"


def test_the_operator_has_the_rules_of_every_prometheus():
    (rule,) = found("PrometheusRule")
    rules = yaml.safe_load((ROOT / "infra/monitoring/rules.yaml").read_text())
    assert rule["spec"] == rules, "copy infra/monitoring/rules.yaml to prometheus-rule.yaml, below spec"


def test_gpu_workers_come_from_zero_and_nobody_is_root_or_carries_a_secret():
    (cluster,) = found("RayCluster")
    assert cluster["spec"]["enableInTreeAutoscaling"]
    assert cluster["spec"]["authOptions"]["mode"] == "token"
    _, gpu = groups()
    assert (gpu["replicas"], gpu["minReplicas"]) == (0, 0)
    for group in groups():
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        for container in pod["containers"]:
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert not container["securityContext"]["allowPrivilegeEscalation"]
            assert {*container["envFrom"][0]} == {"secretRef"}
            assert not [one for one in container.get("env", ()) if "KEY" in one["name"] or "TOKEN" in one["name"]]
