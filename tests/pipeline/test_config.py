"""A setting that cannot be is one readable line with the value and the remedy."""

import pytest

from model.checkpoint import model_version
from pipeline.config import ConfigurationError, NightlySettings, SegmentSettings, build, read_yaml, worker_range

GOOD = {"input": "in", "output": "out", "checkpoint": "c"}


def complaint(**values: object) -> str:
    with pytest.raises(ConfigurationError) as caught:
        build(SegmentSettings, GOOD | values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_good_settings_pass_and_defaults_are_sensible():
    settings = build(SegmentSettings, GOOD)
    assert settings.policy == "short=512"
    assert settings.metrics_host == "127.0.0.1"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"shard_images": "many"}, "shard_images: input should be a valid integer"),
        ({"shard_images": 0}, "1 or more (got 0)"),
        ({"policy": "big"}, "short=512"),
        ({"polcy": "short=512"}, "did you mean 'policy'?"),
        ({"scales": "0.75,x"}, "scales: input should be a valid number"),
        ({"scales": ()}, "scales: expected factors"),
        ({"scales": "1,1.01"}, "1 and 1.01 times the side of --policy short=512 are both 512 pixels"),
        ({"scales": "nan"}, "from 32 to 8192 pixels (got 'nan')"),
        ({"scales": "1,0.05"}, "0.05 times the side of --policy short=512 is not from 32 to 8192"),
        ({"scales": "1.5", "policy": "exact=32x8192"}, "1.5 times the side"),
        ({"scales": "0.75,1", "policy": "native"}, "with --policy native no pixel is scaled; use --flip alone"),
        ({"zzz": 1}, "unknown setting 'zzz'; see --help"),
        ({"workers": "8:1"}, "MIN:MAX"),
        ({"run_id": "../evil"}, "letters, digits"),
        ({"input": "s3:/bucket/x"}, "two slashes"),
        ({"metrics_port": 70000}, "65535"),
        ({"storage_option": ["nodot=1"]}, "PROTOCOL.KEY=VALUE"),
        ({"input": ""}, "must not be empty"),
        ({"gpus_per_worker": -1}, "0 or more"),
        ({"gpus_per_worker": "1.5"}, "whole above 1"),
        ({"gpus_per_worker": "nan"}, "0 or more"),
        ({"gpus_per_worker": "inf"}, "whole above 1"),
        ({"include": 3}, "include"),
    ],
)
def test_bad_settings_are_refused_with_the_value_and_the_remedy(values, expected):
    assert expected in complaint(**values)


def test_a_missing_setting_is_named():
    with pytest.raises(ConfigurationError, match="checkpoint is missing"):
        build(SegmentSettings, {"input": "in", "output": "out"})


def test_nothing_that_may_be_secret_is_repeated():
    assert "TOPSECRET" not in complaint(storage_option=["s3.secret=TOPSECRET", "oops"])
    assert "TOPSECRET" not in complaint(input="http://me:TOPSECRET@host/photos")


def test_local_paths_are_absolute_and_urls_stay_as_they_are(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    settings = build(SegmentSettings, GOOD | {"input": "photos", "output": "s3://b/./x"})
    assert settings.input == (str(tmp_path / "photos"),)
    monkeypatch.setenv("HOME", "/somewhere")
    assert build(SegmentSettings, GOOD | {"input": "~/photos"}).input == ("/somewhere/photos",)
    assert settings.output == "s3://b/./x"


@pytest.mark.parametrize("gpus", [0, 0.25, 1, 2])
def test_a_worker_has_a_part_of_a_gpu_or_whole_ones(gpus):
    assert build(SegmentSettings, GOOD | {"gpus_per_worker": str(gpus)}).gpus_per_worker == gpus


def test_worker_ranges():
    assert worker_range("3") == (3, 3)
    assert worker_range("1:8") == (1, 8)
    assert worker_range("auto") is None


@pytest.mark.parametrize(("text", "expected"), [("a: [", "not valid YAML"), ("- 1", "list"), (b"\xff\xfe\x00", "YAML")])
def test_a_file_that_is_no_settings_is_refused(tmp_path, text, expected):
    path = tmp_path / "settings.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigurationError, match=expected):
        read_yaml(str(path))
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_yaml(str(tmp_path / "nowhere.yaml"))


def test_yaml_keys_may_be_written_as_options_are(tmp_path):
    path = tmp_path / "settings.yaml"
    options = "storage_option: {gs.token: anon, s3.anon: false}\n"
    path.write_text(f"shard-images: 7\nworkers: 1:8\nanonymous: true\nrun_id: null\n{options}")
    settings = build(SegmentSettings, GOOD | read_yaml(str(path)))
    assert (settings.shard_images, settings.workers, settings.anonymous) == (7, "1:8", True)
    assert settings.run_id is None
    assert settings.storage_option == {"gs.token": "anon", "s3.anon": False}
    typed = build(SegmentSettings, GOOD | {"storage_option": ["s3.anon=false", "s3.default_block_size=5242880"]})
    assert typed.storage_option == {"s3.anon": False, "s3.default_block_size": 5242880}


def test_how_often_the_network_looks_is_a_part_of_the_model_version_only_where_it_is_asked_for(tmp_path):
    """An output of before --flip and --scales would be done all over again by another version of what it has."""
    path = tmp_path / "settings.yaml"
    path.write_text("scales: [1.25, 0.75]\nflip: true\n")
    listed = build(NightlySettings, GOOD | read_yaml(str(path)))
    given = [{}, {"scales": "1"}, {"flip": True}, {"scales": "0.75,1.25"}, {"scales": " 1.25,0.75 ", "flip": "true"}]
    found = [build(SegmentSettings, GOOD | values) for values in given] + [build(SegmentSettings, listed.model_dump())]
    versions = [model_version("0" * 64, settings.mask_settings()) for settings in found]
    assert versions[:2] == ["1603d3de2516"] * 2  # as it was before there were looks
    assert len(set(versions)) == 4
    assert versions[4] == versions[5]
    assert found[4].mask_settings() == found[0].mask_settings() | {"flip": True, "scales": [0.75, 1.25]}
    assert found[4].looks == found[5].looks
