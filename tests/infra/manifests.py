"""Every manifest of infra/, and what is wrong with one: against KubeRay's own CRDs and Kubernetes' schemas, strictly.

A field that a schema does not name is an error everywhere but where names are for us to choose (labels). Where schemas
take any name and whoever reads it later does not (resources, the options of `ray start`), the names are known here.
"""

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.scripts.scripts import start

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "infra" / "kuberay"
CRDS = Path(os.environ.get("KUBERAY_CRDS", ROOT.parent / "shared" / "kuberay-crds"))
ANNOTATIONS = ("description", "default", "format")
LABELS = {"type": "object", "additionalProperties": {"type": "string"}}
METADATA = {
    "type": "object",
    "additionalProperties": False,
    "properties": {"name": {"type": "string"}, "generateName": {"type": "string"}, "labels": LABELS},
    "oneOf": [{"required": ["name"]}, {"required": ["generateName"]}],
}
RESOURCES = {"cpu", "memory", "ephemeral-storage", "nvidia.com/gpu"}
START_OPTIONS = {name.lstrip("-") for option in start.params for name in option.opts}
KNOWN = {
    "requests": RESOURCES,
    "limits": RESOURCES,
    "rayStartParams": START_OPTIONS,
    "clusterSelector": {"ray.io/cluster"},
}
WITH_A_NAME = {"type": "object", "required": ["metadata"], "properties": {"metadata": METADATA}}


def closed(**properties: Any) -> dict[str, Any]:
    """A schema of an object with just these fields, all of which it must have."""
    return {"type": "object", "additionalProperties": False, "properties": properties, "required": list(properties)}


NAMES = {"type": "array", "items": {"type": "string"}, "minItems": 1}
TEXT = {"type": "string"}
ALERT = {  # of a PrometheusRule; what promtool says of its expressions, the tests of infra/monitoring ask
    "type": "object",
    "additionalProperties": False,
    "required": ["alert", "expr", "labels", "annotations"],
    "properties": {
        "alert": TEXT,
        "expr": TEXT,
        "for": {"type": "string", "pattern": r"^\d+m$"},
        "labels": LABELS,
        "annotations": closed(summary=TEXT, description=TEXT),
    },
}
RULES = {"type": "array", "items": {"anyOf": [closed(record=TEXT, expr=TEXT), ALERT]}}
OTHERS = {  # of what is no part of Kubernetes, what we use; from the documentation of each
    ("monitoring.coreos.com/v1", "PodMonitor"): closed(
        selector=closed(matchLabels=LABELS),
        podMetricsEndpoints={"type": "array", "items": closed(port={"type": "string"}, interval={"type": "string"})},
    ),
    ("monitoring.coreos.com/v1", "PrometheusRule"): closed(
        groups={"type": "array", "items": closed(name=TEXT, rules=RULES)},
    ),
}
KUSTOMIZATION = {
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "kind", "resources"],
    "properties": {
        "apiVersion": {"const": "kustomize.config.k8s.io/v1beta1"},
        "kind": {"const": "Kustomization"},
        "resources": NAMES,
        "configMapGenerator": {"type": "array", "items": closed(name={"type": "string"}, files=NAMES)},
        "generatorOptions": closed(disableNameSuffixHash={"type": "boolean"}),
    },
}


def documents() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each document of each file, and a name for it."""
    for path in sorted(KUBERAY.rglob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            yield f"{path.relative_to(KUBERAY)}:{document['kind']}", document


def faults(document: dict[str, Any]) -> list[str]:
    """What is wrong with a manifest."""
    return [*schema_faults(document), *misnamed(document), *refused(document)]


def schema_faults(document: dict[str, Any]) -> list[str]:
    """What is wrong with it by the schema of its kind."""
    kind = (document.get("apiVersion"), document.get("kind"))
    if kind[1] == "Kustomization":
        return said_by(jsonschema.Draft7Validator(KUSTOMIZATION), document)
    if kind in OTHERS:
        strings = {"apiVersion": {"type": "string"}, "kind": {"type": "string"}}
        return said_by(jsonschema.Draft7Validator(closed(**strings, metadata=METADATA, spec=OTHERS[kind])), document)
    if kind in custom_kinds():
        return said_by(custom_kinds()[kind], document)
    if str(kind[0]).partition("/")[0].endswith("ray.io"):
        return [f"KubeRay has no {kind[1]} of {kind[0]}"]
    try:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    except (
        kubernetes_validate.ValidationError,
        kubernetes_validate.SchemaNotFoundError,
        kubernetes_validate.InvalidSchemaError,
    ) as error:
        return [str(error)[:300]]
    except KeyError as error:  # of a document without a kind
        return [f"{error} is missing"]
    return said_by(jsonschema.Draft7Validator(WITH_A_NAME), document)  # Kubernetes' schemas ask for no name


def misnamed(node: Any, place: str = "$") -> Iterator[str]:
    """Names in maps that schemas leave open, of which nobody knows."""
    if isinstance(node, list):
        for number, one in enumerate(node):
            yield from misnamed(one, f"{place}[{number}]")
    if isinstance(node, dict):
        for name, one in node.items():
            yield from misnamed(one, f"{place}.{name}")
            if name in KNOWN and isinstance(one, dict):
                yield from (f"{place}.{name}: no {other} is known" for other in one if other not in KNOWN[name])


def refused(document: dict[str, Any]) -> list[str]:
    """What KubeRay's operator does not do though its schema has it, as it says when it sees the job."""
    spec = document.get("spec") or {}
    job = spec.get("jobTemplate", spec) if document.get("kind") in ("RayJob", "RayCronJob") else {}
    if "clusterSelector" in job and job.get("backoffLimit"):  # older ones delete that cluster, to try on another
        return ["backoffLimit is incompatible with clusterSelector"]
    return []


def said_by(validator: jsonschema.Draft7Validator, document: dict[str, Any]) -> list[str]:
    return [f"{error.json_path}: {error.message}"[:300] for error in validator.iter_errors(document)]


@functools.cache
def custom_kinds() -> dict[tuple[str, str], jsonschema.Draft7Validator]:
    """KubeRay's kinds, by version and name."""
    if not CRDS.is_dir():
        why = "KubeRay's CRDs are not here; KUBERAY_CRDS says where"
        pytest.fail(why) if os.environ.get("CI") else pytest.skip(why)
    found = {}
    for path in sorted(CRDS.glob("*.yaml")):
        crd = yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        for version in crd["spec"]["versions"]:
            schema = strict(version["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = METADATA
            schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
            key = f"{crd['spec']['group']}/{version['name']}", crd["spec"]["names"]["kind"]
            found[key] = jsonschema.Draft7Validator(schema)
    return found


def strict(schema: Any) -> Any:
    """A CRD's schema as JSON Schema, in which a field that it does not name is an error."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {
        key: {name: strict(one) for name, one in value.items()} if key == "properties" else strict(value)
        for key, value in schema.items()
        if key not in ANNOTATIONS and not key.startswith("x-kubernetes-")
    }
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    if isinstance(schema.get("properties"), dict):
        made.setdefault("additionalProperties", False)
        defaulted = [name for name, one in schema["properties"].items() if isinstance(one, dict) and "default" in one]
        made["required"] = [name for name in schema.get("required", ()) if name not in defaulted]
    return made
