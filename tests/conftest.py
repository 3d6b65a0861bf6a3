"""Real parts for the tests: a real S3 server, networks that transformers made, collections of images."""

import os
import secrets
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: its kernels run in Python, on the CPU
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # for each Ray that is started here

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from infra.local.debian import install_missing
from infra.local.s3_server import PROGRAMS, S3Server, s3_server
from model.checkpoint import save_huggingface
from model.labels import label_set
from model.segformer import Segformer, variant
from pipeline.config import SegmentSettings
from pipeline.run import segment
from tests.ray_here import ray_here

LONG = {
    "chaos",
    "test_run",
    "test_cli",
    "test_submit",
    "test_monitoring",
    "test_nightly",
    "test_report",
    "test_decoders",
}
NAMES = ["sky", "land", "water", "it's <b>odd</b>", "life"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share what is dear to make run in one process: those of a file, and all of chaos.

    The files that take longest begin first, so that no process is left with one of them at the end.
    """
    for item in items:
        folder, name = item.path.parent.name, str(item.path)
        item.add_marker(pytest.mark.xdist_group(folder if folder == "chaos" else name))
    items.sort(key=lambda item: not any(part in LONG for part in (item.path.stem, item.path.parent.name)))


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server, whose address and keys are in the environment. Installed where it is missing."""
    installed(PROGRAMS)
    with s3_server(tmp_path_factory.mktemp("s3")) as server, pytest.MonkeyPatch.context() as patch:
        patch.delenv("AWS_SESSION_TOKEN", raising=False)
        for name, value in server.environment().items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(autouse=True)
def a_ray_of_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test ever runs on the cluster of whoever runs it."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture(scope="session")
def shared_ray() -> Iterator[str]:
    """The address of a Ray for runs that need none of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        with ray_here() as address:
            yield address


@pytest.fixture
def on_shared_ray(shared_ray: str, a_ray_of_our_own: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the test's runs there. It knows nothing of a store that was started after it."""
    monkeypatch.setenv("RAY_ADDRESS", shared_ray)


def installed(programs: Mapping[str, str]) -> None:
    """See that programs are there, whose packages are given; a test may be skipped for want of one, but not in CI."""
    try:
        install_missing(programs)
    except RuntimeError as error:
        pytest.fail(str(error)) if os.environ.get("CI") else pytest.skip(str(error))


@pytest.fixture
def bucket(s3: S3Server) -> str:
    """The URL of a new bucket."""
    name = f"test-{uuid.uuid4().hex}"
    fsspec.filesystem("s3").mkdir(name)
    return f"s3://{name}"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a B0 of random weights and five classes: its masks mean nothing, but have every class."""
    torch.manual_seed(7)
    model = Segformer(variant("b0", labels=len(NAMES)))
    torch.nn.init.normal_(model.decoder.classifier.weight, std=1.0)
    folder = tmp_path_factory.mktemp("checkpoint")
    save_huggingface(model, label_set(NAMES), str(folder))
    return str(folder)


def draw_image(path: Path, width: int, height: int, seed: int = 0) -> Path:
    """Write an image of coloured blocks and noise in the format that the suffix of `path` names."""
    rng = np.random.default_rng(seed)
    blocks = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height))
    noise = rng.integers(-20, 20, (height, width, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((np.asarray(blocks) + noise).clip(0, 255).astype(np.uint8)).save(path)
    return path


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    """Twelve images of five sizes and four formats, and what a real folder has beside images."""
    sizes = [(64, 48), (48, 64), (101, 37), (128, 128), (33, 90)]
    suffixes = ["jpg", "png", "webp", "bmp"]
    folder = tmp_path / "collection"
    for number in range(12):
        width, height = sizes[number % len(sizes)]
        name = f"part {number % 3}/image-{number:02d}.{suffixes[number % len(suffixes)]}"
        draw_image(folder / name, width, height, seed=number)
    return folder


class Quiet:
    """Nobody watches."""

    def say(self, text: str) -> None:
        pass

    def listing(self, found: int) -> None:
        pass

    def indexing(self, done: int, total: int) -> None:
        pass

    def segmenting(self, done: int, total: int, failures: int) -> None:
        pass

    def counting(self, done: int, total: int) -> None:
        pass

    def verifying(self, done: int, total: int) -> None:
        pass


@dataclass(frozen=True)
class Finished:
    """An output whose run "first" is finished; a test may copy it, and damages only its copy."""

    output: Path
    collection: Path
    checkpoint: str
    missing: Path  # an image that went when it was indexed

    def bring_back(self) -> None:
        """Put the missing image where it was, as it was."""
        kept = self.missing.with_suffix(".kept")
        shutil.copy2(kept, self.missing)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, checkpoint: str, shared_ray: str) -> Finished:
    """Eleven masks, three images that cannot be read, and one that is missing."""
    folder = tmp_path_factory.mktemp("finished")
    collection = folder / "collection"
    for number in range(12):
        suffix = ["jpg", "png", "webp", "bmp"][number % 4]
        draw_image(collection / f"image-{number:02d}.{suffix}", *[(64, 48), (48, 64), (101, 37)][number % 3], number)
    spoil(collection)
    missing = collection / "image-04.jpg"

    class Thief(Quiet):
        def say(self, text: str) -> None:
            if "headers read" in text:
                missing.rename(missing.with_suffix(".kept"))

    settings = {"input": str(collection), "output": str(folder / "out"), "checkpoint": checkpoint, "run_id": "first"}
    settings |= {"ray_address": shared_ray}
    segment(SegmentSettings(**settings, policy="short=64", shard_images=4), Thief())
    return Finished(folder / "out", collection, checkpoint, missing)


def spoil(folder: Path) -> None:
    """Add what must not stop a run: broken images, no images, and a folder with an image's name."""
    whole = draw_image(folder / "whole.jpg", 120, 90).read_bytes()
    (folder / "whole.jpg").unlink()
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("This is no picture.")
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "notes.txt").write_text("Neither is this.")
    (folder / "x.png").mkdir()
