"""Which classes there are is said by somebody, in one of several ways, and weights are theirs."""

import json

import numpy as np
import pytest

from model.labels import label_set
from pipeline.classes import beside, class_weights, find_classes, read_labels
from pipeline.config import ConfigurationError, StorageSettings
from pipeline.examples import Checked, held_out, share, shared_out

KNOWN = label_set(["sky", "car"], [(1, 2, 3), (4, 5, 6)])
LABELS = label_set(["sky", "land", "sea = water"])
STORAGE = StorageSettings()


@pytest.mark.parametrize(
    "text",
    [
        '{"0": "sky", "1": "land"}',
        '{"id2label": {"0": "sky", "1": "land"}, "model_type": "segformer"}',
        '["sky", "land"]',
        '[{"id": 1, "name": "land"}, {"id": 0, "name": "sky"}]',
        "sky\nland\n",
        "\ufeffsky\r\nland",
    ],
)
def test_names_are_read_in_every_form(text):
    assert read_labels(text.encode(), "here").names == ("sky", "land")


def test_colours_and_gaps_are_kept():
    coloured = [{"id": 0, "name": "sky", "color": [1, 2, 3]}, {"id": 1, "name": "land", "color": [4, 5, 6]}]
    assert read_labels(json.dumps(coloured).encode(), "here").palette == ((1, 2, 3), (4, 5, 6))
    assert read_labels(b'{"0": "sky", "2": "land"}', "here").names == ("sky", "class 1", "land")


@pytest.mark.parametrize("data", [b"", b"\xff\xfe\xfa", b"{", b'{"sky": 0}', b"[1.5, {}]", b'{"-1": "sky"}'])
def test_what_is_no_list_of_labels_is_refused(data):
    with pytest.raises(ConfigurationError, match="here: no list of labels"):
        read_labels(data, "here")


def test_whoever_says_most_plainly_which_classes_there_are_is_believed(tmp_path):
    masks = tmp_path / "data/masks"
    masks.mkdir(parents=True)
    (tmp_path / "named.txt").write_text("a\nb\n")

    def names(labels: str | None = None, **truth_map: str) -> tuple[str, ...]:
        return find_classes(labels, str(masks), truth_map, KNOWN, STORAGE).names

    assert names() == ()
    assert names(**{"#ff0000": "roof", "#00ff00": "tree", "#0000ff": "roof", "*": "ignore"}) == ("roof", "tree")
    assert names(**{"7": "0", "9": "1"}) == ()
    (tmp_path / "data/labels.json").write_text('["above"]')
    assert names(**{"#ff0000": "roof"}) == ("above",)
    (masks / "id2label.json").write_text('["within"]')
    assert names() == ("within",)
    assert names(str(tmp_path / "named.txt")) == ("a", "b")
    assert names("checkpoint") == ("sky", "car")
    with pytest.raises(ConfigurationError, match=r"labels: .*absent.*cannot be read"):
        names(str(tmp_path / "absent"))


def test_weights_are_none_balanced_from_a_file_or_one_by_one(tmp_path):
    pixels = np.array([900, 100, 0])
    assert class_weights((), LABELS, pixels) == (1, 1, 1)
    sky, land, _ = class_weights(("balanced",), LABELS, pixels)
    assert land / sky == pytest.approx(3)
    assert 0.9 * sky + 0.1 * land == pytest.approx(1)
    assert class_weights(("balanced", "none", "land=2.5", "sea = water=0"), LABELS, pixels) == (1, 2.5, 0)
    file = tmp_path / "weights.yaml"
    file.write_text("sky: 2\n")
    assert class_weights((str(file), "land=3"), LABELS, pixels) == (2, 3, 1)
    file.write_text("[1, 2, 3]")
    assert class_weights((str(file),), LABELS, pixels) == (1, 2, 3)


@pytest.mark.parametrize("given", ["moon=1", "land=-1", "land=nan", "land=much", "/absent.yaml", "sky"])
def test_a_weight_that_means_nothing_is_refused(given):
    with pytest.raises(ConfigurationError, match="class_weights"):
        class_weights((given,), LABELS, np.ones(3, int))


def test_what_is_held_out_stays_so_when_more_comes():
    names = [f"image {number}" for number in range(1000)]
    chosen = {names[at] for at in held_out(names, 0.1, 500)}
    assert 60 < len(chosen) < 140
    some = names[::3]
    assert {some[at] for at in held_out(some, 0.1, 500)} == chosen & set(some)
    assert len(held_out(["a", "b"], 0.001, 500)) == 1
    assert len(held_out(["a", "b"], 0.999, 500)) == 1
    assert held_out(["a"], 0.5, 500) == set()
    assert held_out(names, 0, 500) == set()
    assert held_out(names, 0.1, 5) < held_out(names, 0.1, 6)
    assert 0 <= share("a") < 1


def test_what_is_held_out_beyond_the_limit_is_learned_from():
    examples = [{"name": str(number)} for number in range(100)]
    learned, validation = shared_out([Checked(examples=examples)], 0.5, 10)
    assert len(validation) == 10
    assert sorted(int(one["name"]) for one in learned + validation) == list(range(100))


def test_a_weight_of_nothing_at_all_is_refused():
    with pytest.raises(ConfigurationError, match="counts 0"):
        class_weights(("land=0",), LABELS, np.array([0, 7, 0]))


def test_a_bucket_has_no_folder_above():
    assert beside("s3://bucket") == ["s3://bucket"]
    assert beside("s3://bucket/masks") == ["s3://bucket/masks", "s3://bucket"]
    assert beside("/masks") == ["/masks"]
    assert beside("/data/masks/*.png") == ["/data/masks", "/data"]
