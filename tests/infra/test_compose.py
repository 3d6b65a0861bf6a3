"""compose.yaml asks for every password, is reached from its own machine alone, and a misspelt field in it is found."""

import copy
import re
from typing import Any

import jsonschema
import yaml

from tests.infra.manifests import ROOT, closed
from tests.infra.test_kuberay import Place, fields, misspelt

COMPOSE = yaml.safe_load((ROOT / "infra/compose.yaml").read_text())
TEXT = {"type": "string"}
TEXTS = {"type": "array", "items": TEXT}
DURATION = {"type": "string", "pattern": r"^\d+(s|m)$"}
VARIABLES = {  # a misspelt one would leave Ray without its token, or Grafana with a password that everyone knows
    "AWS_ACCESS_KEY_ID",
    "AWS_ENDPOINT_URL",
    "AWS_REGION",
    "AWS_SECRET_ACCESS_KEY",
    "GF_ANALYTICS_REPORTING_ENABLED",
    "GF_SECURITY_ADMIN_PASSWORD",
    "RAY_ADDRESS",
    "RAY_AUTH_MODE",
    "RAY_AUTH_TOKEN",
}
ENVIRONMENT = {"type": "object", "additionalProperties": False, "properties": dict.fromkeys(VARIABLES, TEXT)}
HEALTH = closed(test=TEXTS, interval=DURATION, timeout=DURATION, retries={"type": "integer"})
CONDITIONS = {"type": "object", "additionalProperties": closed(condition={"enum": ["service_healthy"]})}
SERVICE = {  # of the Compose specification, what we use
    "type": "object",
    "additionalProperties": False,
    "required": ["image", "restart"],
    "properties": {
        "build": closed(context=TEXT, dockerfile=TEXT, args=closed(BASE=TEXT)),
        "command": TEXTS,
        "depends_on": {"anyOf": [TEXTS, CONDITIONS]},
        "environment": ENVIRONMENT,
        "healthcheck": HEALTH,
        "image": TEXT,
        "ports": TEXTS,
        "restart": {"enum": ["unless-stopped"]},
        "shm_size": TEXT,
        "stop_grace_period": DURATION,
        "volumes": TEXTS,
    },
}
SCHEMA = jsonschema.Draft7Validator(
    closed(
        name=TEXT,
        services={"type": "object", "additionalProperties": SERVICE},
        volumes={"type": "object", "additionalProperties": {"type": "object", "maxProperties": 0}},
    )
)


def is_named_freely(place: Place) -> bool:
    """Whether a field's name is for us to choose."""
    return len(place) == 2 or place[-2:-1] == ("depends_on",)


def test_it_is_valid_and_each_misspelt_field_is_found():
    assert list(SCHEMA.iter_errors(COMPOSE)) == []
    places = [place for place in fields(COMPOSE) if not is_named_freely(place)]
    assert len(places) > 20
    assert [place for place in places if not list(SCHEMA.iter_errors(misspelt(COMPOSE, place)))] == []
    wrong: dict[str, Any] = copy.deepcopy(COMPOSE)
    wrong["services"]["ray"]["healthcheck"] = {"test": "true"}
    assert list(SCHEMA.iter_errors(wrong))


def test_every_port_is_on_loopback_and_every_password_is_asked_for():
    for name, service in COMPOSE["services"].items():
        assert all(re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port) for port in service["ports"]), name
        for key, value in service.get("environment", {}).items():
            if re.search("SECRET|PASSWORD|TOKEN", key):
                assert re.fullmatch(r"\$\{(\w+):\?set \1\}", value), key


def test_what_it_names_is_there():
    services = COMPOSE["services"]
    assert (ROOT / services["ray"]["build"]["dockerfile"]).is_file()
    named = [volume.split(":")[0] for service in services.values() for volume in service.get("volumes", ())]
    files = [name for name in named if name.startswith("./")]
    assert set(named) - set(files) == set(COMPOSE["volumes"])
    assert all((ROOT / "infra" / name).is_file() for name in files)
    for service in services.values():
        assert set(service.get("depends_on", ())) <= set(services)
    config = yaml.safe_load((ROOT / "infra/monitoring/prometheus.yaml").read_text())
    (target,) = config["scrape_configs"][0]["static_configs"][0]["targets"]
    assert target.split(":")[0] in services
