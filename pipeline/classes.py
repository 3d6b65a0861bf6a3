"""Which classes there are to learn, what they are called and drawn in, and how much each of them counts.

Whoever says so most plainly is believed: a file of labels that is named, one that lies beside the masks, the names in
a truth map. Where nobody does, the classes are the ids that the masks have, from 0 to the greatest.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from model.labels import Colour, LabelSet, label_set
from pipeline.attempts import ERRORS, reason
from pipeline.config import ConfigurationError, StorageSettings
from pipeline.filesystems import public_url
from pipeline.inputs import is_glob, root_of
from pipeline.manifests import SUFFIXES
from pipeline.reader import Reader
from pipeline.storage import Store

BESIDE = ("labels.json", "id2label.json")  # looked for in the folder of the masks, and in the one above
OF_CHECKPOINT = "checkpoint"  # as labels: the classes that the network has already
MOST = 1 << 16  # classes, while nobody has said how many there are
MOST_UNNAMED = 1000  # more are not believed: a greater id is more likely a mark of what is to be ignored
NAMED = 5  # in a message
PLAIN_WEIGHTS = NONE, BALANCED = ("none", "balanced")


@dataclass(frozen=True)
class Classes:
    """What a truth may hold. Without names they are the ids that are found there."""

    names: tuple[str, ...] = ()
    palette: tuple[Colour, ...] = ()
    source: str = "the ids in the masks"  # for people
    least: int = 0  # how many there are at least, without names

    def for_rules(self) -> Sequence[str]:
        return self.names or [str(one) for one in range(MOST)]

    def label_set(self, pixels: np.ndarray, palette: list[Colour]) -> LabelSet:
        """Names and colours, once it is known how many pixels each has and which palette the masks have.

        Raises `ConfigurationError` where there are too few or, without names, too many to be meant.
        """
        count = len(self.names) or max(self.least, int(np.flatnonzero(pixels).max()) + 1)
        if count < 2:
            raise ConfigurationError("the masks have one class only, so there is nothing to tell apart; see --labels")
        if not self.names and count > MOST_UNNAMED:
            raise ConfigurationError(
                f"masks: the greatest id is {count - 1:,}, and nobody says that there are so many classes; leave it "
                f"out with --ignore-id {count - 1}, or name the classes with --labels"
            )
        names = self.names or tuple(f"class {one}" for one in range(count))
        colours = list(self.palette or palette[: len(names)])
        return label_set(list(names), colours if len(colours) == len(names) else None)


def find_classes(
    labels: str | None, masks: str, truth_map: Mapping[str, str], known: LabelSet, storage: StorageSettings
) -> Classes:
    """What is said of the classes; `known` are those of the checkpoint. Raises `ConfigurationError`."""
    if labels == OF_CHECKPOINT:
        return Classes(known.names, known.palette, "the checkpoint")
    if labels:
        try:
            data = Reader(storage).fetch(Store(labels, storage).uri(""))
        except ERRORS as error:
            raise ConfigurationError(f"labels: {public_url(labels)} cannot be read ({reason(error)})") from None
        return read_labels(data, public_url(labels))
    for folder in beside(masks):
        store = Store(folder, storage)
        for name in BESIDE:
            try:
                return read_labels(store.read(name), public_url(store.uri(name)))
            except (FileNotFoundError, NotADirectoryError, PermissionError):
                continue
    names = tuple(dict.fromkeys(text for text in truth_map.values() if text != "ignore"))
    if names and not all(name.isdigit() for name in names):
        return Classes(names, (), "the truth map")
    return Classes(least=max(map(int, names), default=-1) + 1)


def beside(masks: str) -> list[str]:
    """The folder in which masks lie, and the one above."""
    root = root_of(masks).rstrip("/")
    folder = root if is_glob(masks) or not root.lower().endswith((*SUFFIXES, ".parquet", ".tar")) else parent(root)
    above = parent(folder)
    is_place = above.strip("/") and not above.rstrip("/").endswith(":")
    return [folder, above] if is_place else [folder]


def parent(url: str) -> str:
    return url.rpartition("/")[0]


def read_labels(data: bytes, source: str) -> Classes:
    """Names by id, in JSON or a line each: {"0": "sky"}, ["sky"], [{"id": 0, "name": "sky", "color": [...]}], or a
    configuration with `id2label`. Raises `ConfigurationError`.
    """
    complaint = f'{source}: no list of labels; expected names, one a line, or JSON: {{"0": "sky"}} or ["sky"]'
    try:
        text = data.decode("utf-8-sig")
        found: Any = json.loads(text) if text.lstrip()[:1] in ("{", "[") else text.split("\n")
    except ValueError:
        raise ConfigurationError(complaint) from None
    if isinstance(found, dict):
        found = found.get("id2label", found)
    colours: dict[int, Colour] = {}
    try:
        if isinstance(found, dict):
            named = {int(key): str(value) for key, value in found.items()}
        elif found and all(isinstance(one, dict) for one in found):
            named = {int(one["id"]): str(one["name"]) for one in found}
            colours = {int(one["id"]): tuple(map(int, one["color"])) for one in found if one.get("color")}  # type: ignore[misc]
        else:
            if not all(isinstance(one, str) for one in found):
                raise TypeError
            lines = [one.strip() for one in found]
            while lines and not lines[-1]:
                lines.pop()
            named = dict(enumerate(lines))
    except (KeyError, TypeError, ValueError):
        raise ConfigurationError(complaint) from None
    if not named or min(named) < 0 or max(named) >= MOST or "" in named.values():
        raise ConfigurationError(complaint)
    names = [named.get(one, f"class {one}") for one in range(max(named) + 1)]
    palette = tuple(colours[one] for one in range(len(names))) if len(colours) == len(names) == len(named) else ()
    return Classes(label_set(names).names, palette, source)


def class_weights(given: Sequence[str], labels: LabelSet, pixels: np.ndarray) -> tuple[float, ...]:
    """How much each class counts in the loss. `given` has `none`, `balanced`, a YAML or JSON file or NAME=WEIGHT each,
    of which a later one wins. Raises `ConfigurationError`.

    Balanced is the inverse of the square root of a class's share, scaled so that a pixel counts 1 on average: the
    inverse itself would have a class of a thousandth of all pixels count for more than any gradient can bear.
    """
    weights = np.ones(len(labels))
    for one in given:
        name, is_pair, text = one.rpartition("=")
        if one == NONE:
            weights[:] = 1
        elif one == BALANCED:
            share = pixels[: len(labels)] / pixels.sum()
            weights = np.where(share > 0, 1 / np.sqrt(np.where(share > 0, share, 1)), 1)
            weights = weights / (weights * share).sum()
        elif is_pair:
            set_weight(weights, labels, name, text)
        else:
            for key, value in read_weights(one, labels).items():
                set_weight(weights, labels, key, value)
    if not weights[: len(pixels)][pixels[: len(labels)] > 0].any():
        raise ConfigurationError("class_weights: every class that the masks have counts 0; one of them must count")
    return tuple(weights.astype(float).tolist())


def read_weight_files(given: Sequence[str]) -> bytes:
    """All that the files have which are named among weights, one after the other."""
    paths = (Path(one) for one in given if one not in PLAIN_WEIGHTS and "=" not in one)
    return b"".join(path.read_bytes() for path in paths if path.is_file())


def read_weights(path: str, labels: LabelSet) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            found = yaml.safe_load(file)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not valid YAML"
        raise ConfigurationError(
            f"class_weights: {path!r} is not none, balanced or NAME=WEIGHT, and as a file cannot be read ({why})"
        ) from None
    if isinstance(found, list) and len(found) == len(labels):
        return dict(zip(labels.names, found, strict=True))
    if not isinstance(found, dict):
        raise ConfigurationError(f"class_weights: {path} has no mapping of names to weights, nor {len(labels)} weights")
    return {str(key): value for key, value in found.items()}


def set_weight(weights: np.ndarray, labels: LabelSet, name: str, value: Any) -> None:
    if name not in labels.names:
        some = ", ".join(labels.names[:NAMED])
        raise ConfigurationError(f"class_weights: no class is called {name!r}; there are {len(labels)}, such as {some}")
    try:
        weight = float(value)
    except (TypeError, ValueError):
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise ConfigurationError(f"class_weights: the weight of {name!r} must be a number of 0 or more (got {value!r})")
    weights[labels.names.index(name)] = weight
