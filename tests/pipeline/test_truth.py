"""Mask files become ids by value, index or colour, never by luminance, and what cannot be told is said."""

import io
import zlib

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from model.labels import label_set
from model.scores import IGNORED
from pipeline.config import ConfigurationError, build
from pipeline.config_truth import TruthSettings
from pipeline.truth import Rules, TruthError, read_truth, truth_rules

NAMES = ["sky", "land", "water", "it's <b>odd</b>", "life"]
LABELS = label_set(NAMES)
COLOURS = np.array(LABELS.palette, np.uint8)
IDS = np.array([[0, 1, 2, 3], [4, 0, 1, 2], [3, 4, 0, 255]], np.uint8)
CLASSES = np.where(IDS == 255, IGNORED, IDS.astype(int))
PLAIN = truth_rules(NAMES, LABELS.palette)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def palette_image(ids: np.ndarray, colours: np.ndarray) -> Image.Image:
    image = Image.fromarray(ids, "P")
    image.putpalette(colours.tobytes())
    return image


def tiff_file(samples: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, samples, **options)
    return file.getvalue()


def png_of_bits(ids: np.ndarray, bits: int) -> bytes:
    """A grey PNG of 2 or 4 bits, which Pillow does not write."""
    image = encoded(Image.fromarray(ids * 0))
    height, width = ids.shape
    padded = np.zeros((height, -(-width * bits // 8) * 8 // bits), np.uint8)
    padded[:, :width] = ids
    parts = padded.reshape(height, -1, 8 // bits)
    rows = sum(parts[..., one].astype(int) << (8 - bits * (one + 1)) for one in range(8 // bits)).astype(np.uint8)
    chunks = io.BytesIO()
    chunks.write(image[:8])
    PngImagePlugin.putchunk(
        chunks, b"IHDR", *(number.to_bytes(4, "big") for number in (width, height)), bytes([bits, 0, 0, 0, 0])
    )
    PngImagePlugin.putchunk(chunks, b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)))
    PngImagePlugin.putchunk(chunks, b"IEND", b"")
    return chunks.getvalue()


WITHOUT_255 = np.where(IDS == 255, 0, IDS)
WAYS = {
    "grey PNG": encoded(Image.fromarray(WITHOUT_255)),
    "grey PNG of 16 bits": encoded(Image.fromarray(WITHOUT_255.astype(np.uint16))),
    "grey PNG of 4 bits": png_of_bits(WITHOUT_255, 4),
    "grey PNG with alpha": encoded(Image.merge("LA", [Image.fromarray(one) for one in (WITHOUT_255, IDS)])),
    "palette PNG": encoded(palette_image(WITHOUT_255, COLOURS[::-1])),
    "palette PNG of 4 bits": encoded(palette_image(WITHOUT_255, COLOURS[::-1]), bits=4),
    "RGB PNG": encoded(Image.fromarray(COLOURS[WITHOUT_255])),
    "RGBA PNG": encoded(Image.fromarray(np.dstack([COLOURS[WITHOUT_255], IDS]))),
    "grey BMP": encoded(Image.fromarray(WITHOUT_255), "BMP"),
    "palette BMP": encoded(palette_image(WITHOUT_255, COLOURS), "BMP"),
    "RGB BMP": encoded(Image.fromarray(COLOURS[WITHOUT_255]), "BMP"),
    "palette GIF": encoded(palette_image(WITHOUT_255, COLOURS[::-1]), "GIF", optimize=False),
    "lossless WebP": encoded(Image.fromarray(COLOURS[WITHOUT_255]), "WEBP", lossless=True),
    "TIFF of 8 bits": tiff_file(WITHOUT_255, compression="lzw"),
    "TIFF of 16 bits, big-endian": tiff_file(WITHOUT_255.astype(">u2"), byteorder=">"),
    "TIFF of 32 bits, signed": tiff_file(WITHOUT_255.astype(np.int32), compression="zlib", tile=(16, 16)),
    "TIFF, white is zero": tiff_file(WITHOUT_255, photometric="miniswhite"),
    "RGB TIFF": tiff_file(COLOURS[WITHOUT_255], photometric="rgb", planarconfig="contig"),
    "palette TIFF": tiff_file(
        WITHOUT_255, photometric="palette", colormap=np.arange(768, dtype=np.uint16).reshape(3, 256)
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_store_ids_or_colours_gives_the_same_classes(way):
    found = read_truth(WAYS[way], PLAIN, (3, 4))
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, WITHOUT_255)


def test_one_bit_is_two_ids():
    found = read_truth(encoded(Image.fromarray(IDS % 2 == 1)), PLAIN)
    np.testing.assert_array_equal(found, IDS % 2)


def test_255_is_ignored_unless_a_class_has_it_or_other_ids_are_named():
    grey = encoded(Image.fromarray(IDS))
    np.testing.assert_array_equal(read_truth(grey, PLAIN), CLASSES)
    many = [str(one) for one in range(300)]
    deep = encoded(Image.fromarray(np.array([[255, 299]], np.uint16)))
    assert read_truth(deep, truth_rules(many)).tolist() == [[255, 299]]
    assert read_truth(deep, truth_rules(many, ignore_ids=[299, 7])).tolist() == [[255, IGNORED]]
    with pytest.raises(TruthError, match=r"ids of no class: 255 \(1 pixel\)"):
        read_truth(grey, truth_rules(NAMES, ignore_ids=[4]))


def test_reduced_labels_are_those_of_ade20k():
    grey = encoded(Image.fromarray(np.array([[0, 1, 5, 255]], np.uint8)))
    assert read_truth(grey, truth_rules(NAMES, reduce_labels=True)).tolist() == [[IGNORED, 0, 4, IGNORED]]


def test_a_map_says_what_ids_mean_and_only_those_are_known():
    grey = encoded(Image.fromarray(np.array([[7, 8, 1000, 1]], np.uint16)))
    named = {"7": "water", "8": "0", "1000": "ignore"}
    assert read_truth(grey, truth_rules(NAMES, truth_map=named | {"1": "it's <b>odd</b>"})).tolist() == [[2, 0, -1, 3]]
    assert read_truth(grey, truth_rules(NAMES, truth_map=named | {"*": "ignore"})).tolist() == [[2, 0, -1, -1]]
    with pytest.raises(TruthError, match=r"ids of no class: 1 \(1 pixel\); --truth-map='1=ignore'") as raised:
        read_truth(grey, truth_rules(NAMES, truth_map=named))
    assert raised.value.status == "unknown"


def test_a_map_that_only_ignores_leaves_all_else_as_it_was():
    grey = encoded(Image.fromarray(np.array([[0, 4, 9]], np.uint8)))
    assert read_truth(grey, truth_rules(NAMES, truth_map={"9": "ignore"})).tolist() == [[0, 4, IGNORED]]
    reduced = truth_rules(NAMES, reduce_labels=True, truth_map={"9": "ignore"})
    assert read_truth(grey, reduced).tolist() == [[IGNORED, 3, IGNORED]]
    ids, colours = np.array([[0, 1, 2]], np.uint8), np.array([*COLOURS[:2], [224, 224, 192]], np.uint8)
    rules = truth_rules(NAMES, LABELS.palette, truth_map={"#e0e0c0": "ignore"})
    assert read_truth(encoded(Image.fromarray(colours[ids])), rules).tolist() == [[0, 1, IGNORED]]
    assert read_truth(encoded(palette_image(ids, colours[::-1])), rules).tolist() == [[0, 1, 2]]


def test_the_remedy_that_an_error_names_is_one():
    for odd, rules in ((encoded(Image.fromarray(np.array([[0, 4, 9]], np.uint8))), PLAIN),):
        with pytest.raises(TruthError) as raised:
            read_truth(odd, rules)
        key, _, meant = str(raised.value).partition("--truth-map='")[2].partition("'")[0].rpartition("=")
        assert read_truth(odd, truth_rules(NAMES, LABELS.palette, truth_map={key: meant})).tolist() == [[0, 4, IGNORED]]


def test_what_is_said_to_mean_two_things_is_refused():
    for twice in ({"7": "sky", "07": "land"}, {"#FFFFFF": "sky", "#ffffff": "land"}):
        with pytest.raises(ConfigurationError, match="different things"):
            truth_rules(NAMES, truth_map=twice)
    with pytest.raises(ConfigurationError, match="ignore_id 3: is said to mean different things"):
        truth_rules(NAMES, ignore_ids=[3], truth_map={"3": "sky"})
    with pytest.raises(ConfigurationError, match="7 is given twice"):
        build(TruthSettings, {"truth_map": ["7=sky", "7=land"]})


def test_negative_ids_of_8_bits_are_themselves():
    small = tiff_file(np.array([[-1, 2]], np.int8))
    assert read_truth(small, truth_rules(NAMES, ignore_ids=[-1])).tolist() == [[IGNORED, 2]]
    with pytest.raises(TruthError, match="ids of no class: -1"):
        read_truth(small, truth_rules(NAMES, ignore_ids=[65535]))


def test_ids_beyond_16_bits_are_known_by_a_map():
    deep = tiff_file(np.array([[-1, 70_000, 2]], np.int32))
    named = {"-1": "ignore", "70000": "life", "2": "sky"}
    assert read_truth(deep, truth_rules(NAMES, truth_map=named)).tolist() == [[IGNORED, 4, 0]]
    with pytest.raises(TruthError, match=r"-1 \(1 pixel\), 70000 \(1 pixel\)"):
        read_truth(deep, PLAIN)


def test_colours_of_a_map_hold_for_palette_images_where_it_has_no_ids():
    coloured = {"#0000ff": "water", "#00FF00": "land", "#000000": "ignore"}
    colours = np.array([[0, 255, 0], [0, 0, 0], [0, 0, 255]], np.uint8)
    ids = np.array([[0, 1, 2]], np.uint8)
    for data in (encoded(palette_image(ids, colours)), encoded(Image.fromarray(colours[ids]))):
        assert read_truth(data, truth_rules(NAMES, LABELS.palette, truth_map=coloured)).tolist() == [[1, IGNORED, 2]]
    both = truth_rules(NAMES, truth_map=coloured | {"0": "life", "1": "life", "2": "sky"})
    assert read_truth(encoded(palette_image(ids, colours)), both).tolist() == [[4, 4, 0]]


def test_unknown_colours_are_named_and_never_guessed():
    picture = np.array([[[10, 20, 30]] * 3 + [[9, 9, 9]]], np.uint8)
    with pytest.raises(TruthError) as raised:
        read_truth(encoded(Image.fromarray(picture)), PLAIN)
    assert str(raised.value).startswith("colours of no class: #0a141e (3 pixels), #090909 (1 pixel); --truth-map='#0a1")
    same = truth_rules(["a", "b"], [(9, 9, 9), (9, 9, 9)])
    with pytest.raises(TruthError, match="colours of several classes: #090909"):
        read_truth(encoded(Image.fromarray(picture[:, 3:])), same)


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_colours_are_looked_up_exactly(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    classes = data.draw(st.integers(1, 300))
    codes = rng.choice(1 << 24, classes, replace=False)
    mapped = {f"#{code:06x}": str(one) for one, code in enumerate(codes)}
    ids = rng.integers(0, classes, (5, 7))
    colours = np.stack([codes >> 16, codes >> 8 & 255, codes & 255], -1).astype(np.uint8)
    rules = truth_rules([f"class {one}" for one in range(classes)], truth_map=mapped)
    np.testing.assert_array_equal(read_truth(encoded(Image.fromarray(colours[ids])), rules), ids)


NOISE = np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8)
REFUSED = {
    "JPEG": (encoded(Image.fromarray(IDS), "JPEG"), "unsupported", "a JPEG, whose compression may change"),
    "lossy WebP": (encoded(Image.fromarray(NOISE), "WEBP"), "unsupported", "a WEBP, whose compression"),
    "JPEG in TIFF": (tiff_file(NOISE[..., 0], compression="jpeg"), "unsupported", "may change"),
    "JPEG 2000": (encoded(Image.fromarray(IDS), "JPEG2000"), "unsupported", "may change"),
    "animation": (
        encoded(Image.fromarray(IDS), "GIF", save_all=True, append_images=[Image.fromarray(IDS[::-1])]),
        "unsupported",
        "an animation of 2 images",
    ),
    "pages": (tiff_file(np.stack([IDS, IDS]), photometric="minisblack"), "unsupported", "2 pages"),
    "floats": (tiff_file(IDS.astype(np.float32)), "unsupported", "samples of float32"),
    "deep colours": (tiff_file(NOISE.astype(np.uint16), photometric="rgb"), "unsupported", "uint16"),
    "CMYK": (encoded(Image.fromarray(NOISE).convert("CMYK"), "TIFF"), "unsupported", "neither ids nor colours"),
    "nothing": (b"", "unreadable", "the file is empty"),
    "text": (b"This is no picture.", "unreadable", "not an image in a known format"),
    "half a PNG": (WAYS["RGB PNG"][:60], "unreadable", "damaged"),
    "half a TIFF": (WAYS["TIFF of 8 bits"][:-20], "unreadable", "damaged"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_ids_says_why(kind):
    data, status, why = REFUSED[kind]
    with pytest.raises(TruthError, match=why) as raised:
        read_truth(data, PLAIN)
    assert raised.value.status == status
    assert "\n" not in str(raised.value)


def test_a_mask_of_another_size_is_not_resized():
    with pytest.raises(TruthError, match="it is 4x3, its image 3x4") as raised:
        read_truth(WAYS["grey PNG"], PLAIN, (4, 3))
    assert raised.value.status == "size"


def test_an_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = read_truth(encoded(Image.fromarray(WITHOUT_255), exif=exif), PLAIN, (4, 3))
    np.testing.assert_array_equal(turned, np.rot90(WITHOUT_255, -1))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"truth_map": {"7": "watr"}}, "7=watr: no class has this name or id; did you mean 'water'"),
        ({"truth_map": {"7": "5"}}, "no class has this name or id"),
        ({"truth_map": {"red": "sky"}}, "'red' is no id, no colour"),
        ({"truth_map": {"#12345": "sky"}}, "'#12345' is no id"),
        ({"truth_map": {"*": "sky"}}, "can only be ignored"),
        ({"truth_map": {"7": "sky"}, "reduce_labels": True}, "leave one of them out"),
    ],
)
def test_rules_that_mean_nothing_are_refused(options, why):
    with pytest.raises(ConfigurationError, match=why):
        truth_rules(NAMES, **options)


def test_rules_are_values():
    assert isinstance(PLAIN, Rules)
    assert truth_rules(NAMES, LABELS.palette) == PLAIN
    assert len({PLAIN, truth_rules(NAMES, LABELS.palette)}) == 1
