"""What classes mean on both sides: which ones are evaluated, what ids and colours in the truth stand for, and which
class of a network counts as which.

The classes are the network's, unless others are named. A class of the network that is none of those is wrong wherever
the truth has one: it takes pixels from that, and has no number of its own.
"""

import difflib
from collections.abc import Sequence

from model.labels import LabelSet
from pipeline.config import ConfigurationError
from pipeline.config_truth import EvaluateSettings
from pipeline.truth import OTHERS, Rules, truth_rules

MOST = 4_096  # classes: a confusion matrix is as large as their square


def evaluated_classes(settings: EvaluateSettings, labels: LabelSet) -> tuple[str, ...]:
    """The classes that are evaluated, by id. Raises `ConfigurationError`."""
    names = settings.classes or labels.names
    if twice := next((name for at, name in enumerate(names) if name in names[:at]), None):
        raise ConfigurationError(f"class: {twice!r} is named twice")
    if len(names) > MOST:
        raise ConfigurationError(f"{len(names):,} classes are more than the {MOST:,} that can be compared; see --class")
    return names


def rules_for(settings: EvaluateSettings, labels: LabelSet, names: tuple[str, ...]) -> Rules:
    """The rules for masks of ground truth; classes have the colours that they have in the output's masks."""
    colours = [labels.palette[labels.names.index(name)] for name in names if name in labels.names]
    palette = colours if len(colours) == len(names) else []
    return truth_rules(names, palette, settings.ignore_id or None, settings.reduce_labels, settings.truth_map)


def counted_as(settings: EvaluateSettings, labels: LabelSet, names: tuple[str, ...]) -> tuple[int, ...]:
    """Of each class of the network the one that it counts as, len(names) for none. Raises `ConfigurationError`."""
    given = {key: place_of(f"{key}={text}", text, names) for key, text in settings.mask_map.items()}
    others = given.pop(OTHERS, len(names))
    found = [names.index(name) if name in names else others for name in labels.names]
    for key, meant in given.items():
        found[place_of(f"{key}={settings.mask_map[key]}", key, labels.names)] = meant
    if set(found) == {len(names)}:
        raise ConfigurationError(
            f"no class of the network ({shown(labels.names)}) is one that is evaluated ({shown(names)}); see --mask-map"
        )
    return tuple(found)


def place_of(given: str, text: str, names: Sequence[str]) -> int:
    """The id of a class that is named, or given as an id, on one side of `given`. Raises `ConfigurationError`."""
    if text in names:
        return list(names).index(text)
    if text.isascii() and text.isdigit() and int(text) < len(names):
        return int(text)
    near = difflib.get_close_matches(text, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {shown(names)}"
    raise ConfigurationError(f"mask_map: {given}: no class is called {text!r}; {hint}")


def shown(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")
