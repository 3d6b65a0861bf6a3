"""Makes decoding slow, or deadly for some images, in every process that has this folder on its PYTHONPATH.

CHAOS_DECODER is a file with JSON: "seconds" that each image takes longer, and the SHA-256 of images that end the
process, by an exit code ("exit") or by a fault ("signal").
"""

import ctypes
import hashlib
import importlib.abc
import importlib.machinery
import json
import os
import sys
import time
from collections.abc import Sequence
from types import ModuleType
from typing import Any

EXIT_CODE = 7


class Sabotage(importlib.abc.MetaPathFinder):
    """Finds our decoder as everyone does, and replaces its function once it is loaded."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if name != "pipeline.decode":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec
        assert spec.loader
        load = spec.loader.exec_module

        def load_and_spoil(module: ModuleType) -> None:
            load(module)
            with open(os.environ["CHAOS_DECODER"], encoding="ascii") as file:
                spoil(module, json.load(file))

        spec.loader.exec_module = load_and_spoil  # type: ignore[method-assign]
        return spec


def spoil(module: Any, wanted: dict[str, Any]) -> None:
    decode = module.decode

    def spoiled(data: bytes, *arguments: Any, **options: Any) -> Any:
        time.sleep(wanted.get("seconds", 0))
        digest = hashlib.sha256(data).hexdigest()
        if digest in wanted.get("exit", ()):
            os._exit(EXIT_CODE)
        if digest in wanted.get("signal", ()):
            ctypes.string_at(0)  # a true fault: unlike one that is sent, it stops this very thread
        return decode(data, *arguments, **options)

    module.decode = spoiled


if "CHAOS_DECODER" in os.environ:
    sys.meta_path.insert(0, Sabotage())
