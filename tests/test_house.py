"""The folders are the architecture: who may import whom, and what lies at the top."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [path for package in ("model", "pipeline", "jobs") for path in sorted((ROOT / package).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    """The top-level packages that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_folder_knows_only_those_below_it(path):
    package = path.relative_to(ROOT).parts[0]
    forbidden = {"model": {"pipeline", "jobs", "ray", "pyarrow"}, "pipeline": {"jobs"}, "jobs": {"ray"}}[package]
    if path.parent.name == "peers" or path.name == "scale.py":  # how others do the same; clusters that are simulated
        forbidden -= {"ray"}
    rays = ("segment.py", "decoders.py", "metrics.py", "cluster.py", "run.py", "submission.py", "teach.py")
    if package == "pipeline" and path.name not in rays:
        forbidden |= {"ray"}
    assert not imports(path) & (forbidden | {"tests", "infra"})


def test_the_top_level_holds_what_the_project_fixed_and_nothing_else():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    top = {name.partition("/")[0] for name in tracked.splitlines()}
    allowed = {"pipeline", "model", "jobs", "infra", "tests", "pyproject.toml", "Makefile", "README.md", "LICENSE"}
    assert {name for name in top if not name.startswith(".")} <= allowed | {"constraints.txt"}
