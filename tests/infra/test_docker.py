"""The image is made by what `make` runs, from what it copies, for nobody's root; nothing in it is secret."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "infra/docker/Dockerfile"
STEPS = [(step["instruction"], step["value"]) for step in DockerfileParser(str(DOCKERFILE)).structure]
KNOWN = {"FROM", "ARG", "RUN", "COPY", "WORKDIR", "ENV", "USER", "HEALTHCHECK", "CMD", "COMMENT"}


def values(instruction: str) -> list[str]:
    return [value for name, value in STEPS if name == instruction]


def test_it_has_two_stages_of_one_base_and_ends_as_somebody_without_rights():
    assert {name for name, _ in STEPS} <= KNOWN
    assert values("ARG") == ["BASE=debian:bookworm-slim"]
    assert values("FROM") == ["${BASE} AS build", "${BASE}"]
    assert values("USER") == ["10001"]
    assert any("useradd --uid 10001" in step for step in values("RUN"))
    assert len(values("HEALTHCHECK")) == 1


def test_what_apt_installs_is_least_and_its_lists_are_removed():
    installs = [step for step in values("RUN") if "apt-get" in step]
    assert len(installs) == 2
    for step in installs:
        assert "apt-get update && apt-get install -y --no-install-recommends" in re.sub(r"\s+", " ", step)
        assert "rm -rf /var/lib/apt/lists/*" in step


def test_nothing_secret_is_built_in():
    said = "\n".join(values("ENV") + values("ARG"))
    assert not re.search("secret|token|password|access_key", said, re.IGNORECASE)
    ignored = (ROOT / ".dockerignore").read_text().split("\n")
    assert ignored[1] == "*", "what is not named does not go to the builder"


def copied(folder: Path) -> Path:
    """What the first stage copies from here, as the builder has it."""
    for step in values("COPY"):
        if step.startswith("--from"):
            continue
        *sources, target = step.split()
        for source in sources:
            place = folder / target / (source if target == "./" else "")
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__", "*.so", "bench"))
            else:
                shutil.copy(ROOT / source, place)
    return folder


def test_its_steps_are_those_of_make_and_find_all_that_they_need(tmp_path):
    (target,) = (step.removeprefix("make ") for step in values("RUN") if step.startswith("make "))
    folder = copied(tmp_path)
    command = ["make", "--no-print-directory", "-n", target]  # which says where it is when `make test` has started it
    steps = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
    assert steps.split("\n")[0] == "python3 -m venv .venv"
    assert "pip --disable-pip-version-check install --quiet -c constraints.txt -e '.[cluster]'" in steps
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path / "made"), "."]
    subprocess.run(wheel, cwd=folder, check=True)
    (made,) = (tmp_path / "made").iterdir()
    names = zipfile.ZipFile(made).namelist()
    for needed in ("pipeline/run.py", "jobs/submit.py", "jobs/scenes/weights/model.safetensors"):
        assert needed in names
    assert any(re.fullmatch(r"model/native/avx2.*\.so", name) for name in names)
