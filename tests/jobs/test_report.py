"""The page of `swath report` as a reader's browser shows it: of a real run, and of outputs of every kind."""

import io
import json
import os
import re
import shutil
import tarfile
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime
from fnmatch import fnmatch
from html import unescape
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from jobs import demo
from jobs.bench.outputs import write_output
from jobs.cli import main
from jobs.display import Display
from jobs.page import make
from jobs.page.figures import Histogram
from jobs.page.gallery import IMAGE_BYTES, MASK_BYTES, SIDE, palette_of, small_image, small_mask
from jobs.page.render import FOLDER, NONE, amount, dollars, duration, name, percent, place
from jobs.page.runs import FinishedRun
from jobs.scenes.street import CLASSES, PALETTE, draw_scene
from model.labels import label_set
from pipeline.changes import DELETIONS
from pipeline.commit import Contents
from pipeline.config import ConfigurationError, ReportSettings, SegmentSettings
from pipeline.masks import decode_mask, encode_mask, overlay
from pipeline.plan import Origin
from pipeline.query import connect
from pipeline.run import segment
from pipeline.schema import encode_shard
from pipeline.storage import Store
from pipeline.submission import SENT
from tests.conftest import Quiet, installed

LABELS = label_set(list(CLASSES), list(PALETTE))
LOOKS = [(1280, "light"), (1280, "dark"), (360, "light"), (390, "dark")]
ODD = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    'it\'s "quoted" & <b>bold</b> {{ 7 * 7 }} ${x}',
    "gpj.\u202eexe.sneaky\u2066",
    "x" * 300,
    "tab\tand\nline\x00end",
]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """Debian's Chromium. Installed where it is missing."""
    installed({"chromium": "chromium"})
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        yield browser
        browser.close()


class Opened:
    """A page in a browser, and whatever it did that no report should."""

    def __init__(self, browser: Browser, path: Path, width: int = 1280, scheme: str = "light"):
        self.page: Page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.deeds: list[str] = []
        self.page.on("console", lambda message: self.deeds.append(f"console: {message.text}"))
        self.page.on("pageerror", lambda error: self.deeds.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: (self.deeds.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        self.page.on("request", lambda request: self.deeds.append(f"request: {request.url}"))
        self.page.goto(path.as_uri())
        self.deeds = [deed for deed in self.deeds if not re.match(rf"request: ({path.as_uri()}|data:)", deed)]

    def __enter__(self) -> "Opened":
        return self

    def __exit__(self, *_: object) -> None:
        self.page.close()


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, shared_ray: str) -> tuple[Path, Path]:
    """The demo's scenes, two of them in a tar and a Parquet file, segmented by its network: the folder, the page."""
    folder = tmp_path_factory.mktemp("real")
    images = folder / "images"
    demo.draw_collection(images, folder / "truth", 6)
    with tarfile.open(images / "some.tar", "w") as tar:
        tar.add(images / "scene-0001.png", "in/a tar.png")
    pq.write_table(pa.table({"image": [(images / "scene-0002.webp").read_bytes()]}), images / "some.parquet")
    for taken in ("scene-0001.png", "scene-0002.webp"):
        (images / taken).unlink()
    given = {"input": str(images), "output": str(folder / "out"), "checkpoint": str(demo.WEIGHTS)}
    segment(SegmentSettings(**given, run_id="it-is-real", ray_address=shared_ray), Quiet())
    assert main(["report", str(folder / "out"), "--to", str(folder / "page.html"), "--price", "3.5"]) == 0
    return folder, folder / "page.html"


def page_of(output: Path | str, folder: Path, **settings: object) -> Path:
    """The page of an output, in a file."""
    with Display() as display:
        html = make(ReportSettings(output=str(output), **settings), display)
    path = folder / "report.html"
    path.write_text(html, encoding="utf-8")
    return path


def words(path: Path) -> str:
    """What a page says, without its elements."""
    text = re.sub(r"<(style|script)>.*?</\1>|<[^>]*>", " ", path.read_text(), flags=re.DOTALL)
    return re.sub(r" (?=[.,])", "", " ".join(unescape(text).split()))


READABLE = """() => {
    for (const one of document.querySelectorAll("details")) one.open = true;
    const parts = text => text.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = element => {
        for (let one = element; one; one = one.parentElement) {
            const found = parts(getComputedStyle(one).backgroundColor);
            if (found.length < 4 || found[3] === 1) return found;
        }
        return [255, 255, 255];
    };
    const seen = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const element = walker.currentNode.parentElement, text = walker.currentNode.data.trim();
        if (!text || element.closest("script, style, svg")) continue;
        const style = getComputedStyle(element), ink = light(parts(style.color)), paper = light(behind(element));
        const contrast = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
        seen.push({text, size: parseFloat(style.fontSize), contrast});
    }
    return seen;
}"""


@pytest.mark.parametrize(("width", "scheme"), LOOKS)
def test_a_report_is_readable_at_any_width_and_in_any_light(chromium, real, width, scheme):
    with Opened(chromium, real[1], width, scheme) as opened:
        page = opened.page
        seen = page.evaluate(READABLE)
        assert len(seen) > 200
        assert [one for one in seen if one["size"] < 12 or one["contrast"] < 4.5] == []
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate("[...document.images].every(image => image.naturalWidth && image.alt)")
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", paper))) > 600) == (scheme == "light")
        assert opened.deeds == []


def test_a_report_says_what_is_in_the_output(chromium, real):
    folder, path = real
    with Opened(chromium, path) as opened, connect(Store(str(folder / "out"), ReportSettings(output="/"))) as tables:
        page = opened.page
        text = page.inner_text("body")
        rows = tables.sql("SELECT name, sum(pixels), count(*) FROM class_stats GROUP BY 1 ORDER BY 2 DESC").fetchall()
        pixels = tables.sql("SELECT sum(width * height) FROM current WHERE status = 'ok'").fetchall()[0][0]
        shown = page.locator("#classes tbody tr")
        for number, (label, of_it, images) in enumerate(rows):
            found = [text.strip() for text in shown.nth(number).locator("th, td.n").all_inner_texts()]
            assert found[:3] == [label, percent(of_it / pixels), percent(images / 6)]
        assert shown.count() == len(rows)
        assert "6 of 9 images have a mask, 3 have a reason why not." in text
        record = json.loads((folder / "out/runs/it-is-real/run.json").read_text())
        cost = dollars(record["seconds"] / 3600 * 3.5)
        assert all(part in text for part in ("it-is-real", record["model_version"], cost, "short=512"))
        assert "Premature end of JPEG file" in text


def test_the_picture_is_the_image_with_its_mask_laid_over_it(chromium, real):
    folder, path = real
    with connect(Store(str(folder / "out"), ReportSettings(output="/"))) as tables:
        rows = tables.sql("SELECT uri, mask FROM segments WHERE status = 'ok'").fetchall()
    masks = {uri.rpartition("/")[2]: decode_mask(mask) for uri, mask in rows}
    seeds = {"some.tar#in/a tar.png": 1, "some.parquet#000000000": 2}
    with Opened(chromium, path, 390) as opened:
        cards = opened.page.locator(".card")
        tried = set()
        for number in range(cards.count()):
            card = cards.nth(number)
            uri = card.locator(".path").first.text_content().rpartition("/images/")[2]
            if uri in tried:
                continue
            tried.add(uri)
            seed = seeds.get(uri) or int(uri.removeprefix("scene-")[:4])
            image = draw_scene(seed, *demo.SHAPES[seed]).image
            mask = masks[uri.rpartition("/")[2]]
            together = overlay(image, mask, LABELS)
            alone = np.array(PALETTE, np.uint8)[mask]
            slider, frame = card.locator("input"), card.locator(".frame")
            for key, view, expected, most in [  # what compression and scaling make of each
                ("Home", "Overlay", together, 3.5),
                ("End", "Overlay", image, 5),
                ("Home", "Mask", alone, 2.5),
                ("Home", "Image", image, 5),
            ][: 4 if len(tried) == 1 else 1]:
                opened.page.get_by_role("button", name=view, exact=True).click()
                slider.focus()
                slider.press(key)
                slider.evaluate("slider => slider.blur()")
                shown = inside(Image.open(io.BytesIO(frame.screenshot())), mask.shape)
                same, other = distance(shown, expected), distance(shown, expected[:, ::-1])
                assert same < most, (uri, key, view, same)
                assert same < other / 3
            fills = card.locator(".legend li rect").evaluate_all("all => all.map(one => one.getAttribute('fill'))")
            labels = card.locator(".legend li bdi").all_inner_texts()
            assert fills == [f"rgb{PALETTE[CLASSES.index(label)]}" for label in labels]
        assert len(tried) == 6
        assert opened.deeds == []


def inside(screenshot: Image.Image, shape: tuple[int, ...]) -> np.ndarray:
    """The picture in its frame, without the margins that its aspect leaves and a line's breadth at the sides."""
    scale = min(screenshot.width / shape[1], screenshot.height / shape[0])
    width, height = shape[1] * scale, shape[0] * scale
    left, top = (screenshot.width - width) / 2, (screenshot.height - height) / 2
    box = tuple(round(side) for side in (left, top, left + width, top + height))
    return np.asarray(screenshot.convert("RGB").crop(box))


def distance(shown: np.ndarray, expected: np.ndarray) -> float:
    """Mean difference of two pictures, 0 to 255, at the size of the first, but for its borders."""
    scaled = Image.fromarray(expected).resize(shown.shape[1::-1], Image.Resampling.BOX)
    return float(np.abs(shown.astype(float) - np.asarray(scaled))[20:-20, 20:-20].mean())


def test_a_report_is_used_with_the_keyboard_alone(chromium, real):
    with Opened(chromium, real[1]) as opened:
        page = opened.page

        def tab_to(selector: str) -> None:
            for _ in range(60):
                page.keyboard.press("Tab")
                if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
                    return
            raise AssertionError(f"Tab does not reach {selector}")

        tab_to("#theme")
        for expected in ("dark", "light"):
            page.keyboard.press("Enter")
            assert page.evaluate("document.documentElement.dataset.theme") == expected
        tab_to(".reasons summary")
        page.keyboard.press("Enter")
        assert page.locator(".reasons details").first.get_attribute("open") is not None
        tab_to("[data-shows=mask]")
        page.keyboard.press("Space")
        assert page.locator("#gallery").get_attribute("data-view") == "mask"
        assert page.locator("[data-shows=mask]").get_attribute("aria-pressed") == "true"
        tab_to(".frame input")
        page.keyboard.press("ArrowRight")
        assert page.evaluate("document.activeElement.parentElement.style.getPropertyValue('--cut')") == "51%"
        frame = page.locator(".frame.both").nth(1)
        frame.scroll_into_view_if_needed()
        box = frame.bounding_box()
        page.mouse.click(box["x"] + box["width"] / 4, box["y"] + 20)  # and with a pointer, wherever on the picture
        assert 23 <= float(frame.evaluate("frame => frame.style.getPropertyValue('--cut')").strip("%")) <= 27
        assert opened.deeds == []


def test_an_image_that_is_gone_or_another_leaves_its_mask_and_a_word(chromium, real, tmp_path):
    folder, _ = real
    gone, changed = (folder / "images" / name for name in ("scene-0000.jpg", "scene-0003.jpg"))
    kept = {path: (path.read_bytes(), path.stat()) for path in (gone, changed)}
    gone.unlink()
    changed.write_bytes(b"something else")
    try:
        path = page_of(folder / "out", tmp_path)
    finally:
        for file, (data, found) in kept.items():
            file.write_bytes(data)
            os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))
    with Opened(chromium, path) as opened:
        for file, word in ((gone, "The image is gone"), (changed, "The image is another one by now")):
            card = opened.page.locator(".card", has_text=file.name).first
            assert word in card.inner_text()
            assert card.locator("img").count() == 1
            assert card.locator("input").count() == 0
        assert opened.deeds == []


def write_rows(output: Path, rows: list[dict], run_id: str = "one", **record: object) -> None:
    """An output of one shard; with a record its run is finished."""
    defaults = {"etag": "1", "bytes": 10, "format": "jpeg", "model_version": "model", "run_id": run_id}
    defaults |= {"width": 64, "height": 48, "bucket": "512x672", "status": "ok", "confidence": 0.9, "entropy": 0.1}
    (output / f"segments/run={run_id}").mkdir(parents=True)
    shard = encode_shard([defaults | row for row in rows], {})
    (output / f"segments/run={run_id}/shard-000000.parquet").write_bytes(shard)
    folder = output / f"runs/{run_id}"
    folder.mkdir(parents=True)
    origin = Origin(("s3://in",), (), (), "short=512", "model")
    (folder / "plan.json").write_text(json.dumps(vars(Contents(origin, [], [len(rows)] * 2, [1, 1])), default=vars))
    if record:
        whole = {"run_id": run_id, "model_version": "model", "images": len(rows), "statuses": {"ok": len(rows)}}
        whole |= {"input_bytes": 1, "output_bytes": 1, "pixels": 1, "seconds": 2.0, "input": ["s3://in"]}
        whole |= {"shards_done_before": 0}
        whole |= {"started": "2026-01-01T00:00:00+00:00", "finished": "2026-01-01T00:00:02+00:00"}
        (folder / "run.json").write_text(json.dumps(whole | record))


def masked(uri: str, label: str = "sky", class_id: int = 0, **values: object) -> dict:
    """A row whose mask has one class."""
    found = {"class_id": class_id, "name": label, "pixels": 64 * 48, "fraction": 1.0, "confidence": 0.9}
    mask = encode_mask(np.full((48, 64), class_id, np.uint8), LABELS)
    return {"uri": uri, "mask": mask, "classes": [found]} | values


def test_names_that_are_code_are_text(chromium, tmp_path):
    rows = [masked(f"s3://b/{odd}", odd, number) for number, odd in enumerate(ODD)]
    rows += [{"uri": f"s3://b/{odd}.jpg", "status": "failed", "error": odd} for odd in ODD]
    written = {"checkpoint": ODD[0], "settings": {ODD[1]: ODD[0], "policy": ODD[1]}, "versions": {ODD[0]: ODD[1]}}
    write_rows(tmp_path / "out", rows, model_version=ODD[1], input=ODD, statuses={ODD[0]: 3}, **written)
    with Opened(chromium, page_of(tmp_path / "out", tmp_path)) as opened:
        page = opened.page
        page.wait_for_timeout(100)
        assert opened.deeds == []
        assert page.locator("script").count() == 1
        assert page.locator("img[src=x], [onerror], main b").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth") == 1280
        text = page.locator("main").evaluate("main => main.textContent")
        for odd in ODD:
            assert name(odd) in text
        assert not re.search("[\u202e\u2066\x00]", text)
    with Opened(chromium, tmp_path / "report.html", 360) as opened:
        assert opened.page.evaluate("document.documentElement.scrollWidth") == 360


def test_a_hole_in_the_escaping_would_run_nothing(chromium, real, tmp_path):
    hole = "<script>document.title = 'x'</script><img src='http://127.0.0.1:9/x' onerror='document.title = 1'>"
    path = tmp_path / "holed.html"
    path.write_text(real[1].read_text().replace("<main>", f"<main>{hole}<style>body {{ display: none }}</style>"))
    with Opened(chromium, path) as opened:
        opened.page.wait_for_timeout(100)
        assert opened.page.title().startswith("Swath report: ")
        assert opened.page.evaluate("getComputedStyle(document.body).display") == "block"
        assert any("Content Security Policy" in deed for deed in opened.deeds)


def test_a_page_does_not_grow_with_the_rows(chromium, tmp_path):
    sizes = [(width, height) for width in (640, 800, 1024) for height in (480, 600, 768)]
    masks = {size: encode_mask(draw_scene(7, *size).mask, LABELS) for size in sizes}
    pages = {}
    for images in (1_000, 10_000):
        write_output(tmp_path / f"{images}", images, runs=3, prefix=f"file://{tmp_path}/gone", masks=masks)
        pages[images] = page_of(tmp_path / f"{images}", tmp_path, price=1).read_text()
    assert len(pages[10_000]) < 5_000_000
    assert abs(len(pages[10_000]) - len(pages[1_000])) < 10_000
    with Opened(chromium, tmp_path / "report.html") as opened:
        page = opened.page
        assert "9,950 of 10,000 images have a mask" in page.inner_text("header")
        assert page.locator("#sizes th", has_text="jpeg").count() == 1, "as decoders write it"
        assert page.locator("#runs tbody").first.locator("tr").count() == 3
        assert [
            cell.split() for cell in page.locator("#outcome table").nth(1).locator("tbody tr").all_inner_texts()
        ] == [
            ["model-1", "9,900", "99.0", "%"],
            ["model-3", "100", "1.0", "%"],
        ]
        course = page.locator("details.run").nth(2)
        course.locator("summary").click()
        assert "over the time of the run" in course.inner_text()
        assert opened.deeds == []


def test_copies_of_any_image_and_mask_are_small():
    rng = np.random.default_rng(0)
    noise = small_image(rng.integers(0, 256, (1500, 2000, 3), dtype=np.uint8), SIDE, SIDE * 3 // 4)
    assert len(noise) <= IMAGE_BYTES
    for most, kind in ((256, np.uint8), (1000, np.uint16)):
        mask = rng.integers(0, most, (900, 1200)).astype(kind)
        png = encode_mask(mask, LABELS)
        assert len(small_mask(png, palette_of(png), SIDE, SIDE * 3 // 4)) <= MASK_BYTES
    narrow = encode_mask(np.arange(3000, dtype=np.uint8).reshape(1, -1) % 8, LABELS)
    with Image.open(io.BytesIO(small_mask(narrow, palette_of(narrow), SIDE, 1))) as image:
        assert image.size == (SIDE, 1)


def test_a_run_that_is_not_finished_is_shown_by_the_rows_that_are_there(chromium, tmp_path):
    write_rows(
        tmp_path / "out", [masked("s3://b/1.jpg"), {"uri": "s3://b/2.jpg", "status": "missing", "error": "gone"}]
    )
    with Opened(chromium, page_of(tmp_path / "out", tmp_path)) as opened:
        text = opened.page.inner_text("body")
        assert "No run is finished yet" in text
        assert "Not finished: one" in text
        assert "2 of 4 images are done (50.0 %), 1 of 2 shards." in text
        assert "swath segment s3://in" in text
        assert opened.deeds == []
    write_rows(tmp_path / "out", [masked("s3://b/3.jpg")], run_id="two", statuses={"ok": 1})
    with Opened(chromium, page_of(tmp_path / "out", tmp_path)) as opened:
        text = opened.page.inner_text("body")
        assert "One image, with a mask." in text
        assert "1 of 2 shards. They are not counted above." in text


def test_an_output_without_any_mask_has_a_page_too(chromium, tmp_path):
    rows = [{"uri": f"s3://b/{n}", "status": "unreadable", "error": f"bad byte {n}"} for n in range(3)]
    nothing = {"width": None, "height": None, "format": None, "bucket": None, "confidence": None, "entropy": None}
    write_rows(tmp_path / "out", [nothing | row for row in rows], statuses={"unreadable": 3})
    with Opened(chromium, page_of(tmp_path / "out", tmp_path)) as opened:
        text = opened.page.inner_text("body")
        assert "None of 3 images has a mask." in text
        assert "bad byte N" in text
        assert opened.page.locator("#classes, #gallery, #certainty").count() == 0
        assert opened.deeds == []


def test_of_a_collection_that_has_gone_it_says_so(chromium, tmp_path):
    write_rows(tmp_path / "out", [masked("s3://b/1.jpg")], statuses={"ok": 1})
    (tmp_path / "out/deletions").mkdir()
    gone = {"uri": "s3://b/1.jpg", "is_gone": True, "noticed": datetime(2026, 1, 2, tzinfo=UTC)}
    pq.write_table(pa.Table.from_pylist([gone], DELETIONS), tmp_path / "out/deletions/part-00000.parquet")
    with Opened(chromium, page_of(tmp_path / "out", tmp_path)) as opened:
        text = opened.page.inner_text("body")
        assert "None of its images is in the collection any more." in text
        assert "have a mask" not in text
        assert "With a mask".upper() not in text.upper()
        assert opened.page.locator("#outcome table, #classes, #gallery").count() == 0
        assert "Finished run" in text
        assert opened.deeds == []


def test_what_an_image_cost_is_told_of_runs_that_were_not_interrupted_alone(tmp_path):
    hour = {"seconds": 3600.0, "statuses": {"ok": 2}, "images": 2_000}
    write_rows(tmp_path / "out", [masked("s3://b/1.jpg")], **hour | {"images": 4_000})
    text = words(page_of(tmp_path / "out", tmp_path, price=12))
    assert "$3.00 for 1,000 images." in text
    assert "at least" not in text
    write_rows(tmp_path / "out", [masked("s3://b/1.jpg")], run_id="two", **hour, shards_done_before=1)
    text = words(page_of(tmp_path / "out", tmp_path, price=12))
    assert "$3.00 for 1,000 images of the runs that were not interrupted" in text
    assert "Time of 2 runs, at least 2 h" in text
    assert "Cost, at least $24.00" in text
    shutil.rmtree(tmp_path / "out")
    write_rows(tmp_path / "out", [masked("s3://b/1.jpg")], **hour, shards_done_before=1)
    text = words(page_of(tmp_path / "out", tmp_path, price=12))
    assert "for 1,000 images" not in text
    assert "Cost, at least $12.00" in text


def test_nothing_that_may_be_secret_is_on_a_page(tmp_path):
    address = "https://me:SECRET@127.0.0.1:9/list?token=SECRET"
    rows = [masked(f"{address}&n={n}", error=None) for n in range(2)]
    rows.append({"uri": address, "status": "failed", "error": f"404, message='no', url='{address}' for {address}"})
    write_rows(tmp_path / "out", rows, input=[address], checkpoint=address, settings={"policy": address})
    write_rows(tmp_path / "out", rows, run_id="two")
    plan = tmp_path / "out/runs/two/plan.json"
    plan.write_text(plan.read_text().replace("s3://in", address))
    path = page_of(tmp_path / "out", tmp_path, retry_seconds=0)
    assert "swath segment https://127.0.0.1:9/list " in words(path)
    assert "SECRET" not in path.read_text()


def test_settings_of_nought_are_shown_and_those_that_are_not_set_are_not():
    settings = {"policy": "short=512", "overlap": 0, "share": 0.0, "image_column": None, "allow_truncated": False}
    found = FinishedRun("one", {"settings": settings | {"scaled_decoding": True}}, "").settings
    assert found == [("policy", "short=512"), ("overlap", 0), ("share", 0.0), ("scaled_decoding", True)]


def test_an_image_whose_entropy_is_not_known_is_shown_all_the_same(tmp_path):
    write_rows(tmp_path / "out", [masked("s3://b/1.jpg", entropy=None)], statuses={"ok": 1}, settings={"overlap": 0.25})
    text = words(page_of(tmp_path / "out", tmp_path))
    assert f"Entropy {NONE} nat" in text
    assert "Overlap 0.25" in text


def test_runs_that_are_not_finished_are_told_newest_first(tmp_path):
    for number, run_id in enumerate(("m", "a", "z")):
        write_rows(tmp_path / "out", [masked("s3://b/1.jpg")], run_id=run_id)
        os.utime(tmp_path / "out/runs" / run_id / "plan.json", (1e9 + number, 1e9 + number))
    (tmp_path / "out/runs/begun").mkdir()
    text = words(page_of(tmp_path / "out", tmp_path))
    assert re.findall(r"Not finished: (\w+)", text) == ["z", "a", "m", "begun"]


def test_numbers_that_are_none_are_left_out(chromium, tmp_path):
    broken = masked("s3://b/nan.jpg", confidence=float("nan"), entropy=float("nan"))
    write_rows(tmp_path / "out", [broken, masked("s3://b/fine.jpg")], statuses={"ok": 2})
    path = page_of(tmp_path / "out", tmp_path)
    with Opened(chromium, path) as opened:
        assert opened.page.locator("#certainty td").last.inner_text() == "0.100"
        assert opened.deeds == []
    assert not re.search(r"\bnan\b(?!\.jpg)", path.read_text())


def test_an_output_in_a_bucket_gives_the_same_page(bucket, tmp_path):
    write_output(tmp_path / "out", 300, runs=2, prefix=f"file://{tmp_path}/gone")
    store = Store(bucket, ReportSettings(output=bucket))
    store.filesystem.put(f"{tmp_path}/out", f"{bucket.removeprefix('s3://')}/masks", recursive=True)
    assert main(["report", f"{bucket}/masks", "--to", f"{bucket}/pages/report.html", "--images", "1"]) == 0
    there = store.read("pages/report.html").decode()
    here = page_of(tmp_path / "out", tmp_path, images=1).read_text()

    def plain(html: str) -> str:
        html = re.sub(r"<p class=\"hint\">Course: .*?</p>|Made on .*? UTC", "", html)
        return html.replace(f"{bucket}/masks", "OUTPUT").replace(f"{tmp_path}/out", "OUTPUT")

    assert plain(there) == plain(here)
    assert "as its files have other times than the run, as copies have" in there


def test_what_cannot_be_reported_is_said_in_one_line(tmp_path, capfd):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for arguments, expected in [
        ([tmp_path / "empty"], "no segments are here; give the OUTPUT of swath segment"),
        ([tmp_path / "empty", "--to", "page.pdf"], "to: must end in .html (got 'page.pdf')"),
        ([tmp_path / "empty", "--price", "-1"], "price: must be 0 or more (got '-1')"),
        ([tmp_path / "empty", "--images", "99"], "images: must be from 0 to 50 (got '99')"),
        ([tmp_path / "empty", "--to", tmp_path / "file/page.html"], "cannot be written"),
    ]:
        given = list(map(str, arguments))
        if "--to" not in given:
            given += ["--to", str(tmp_path / "page.html")]
        assert main(["report", *given]) == 2
        said = capfd.readouterr().err
        assert expected in said
        assert said.startswith("swath: error: ")
        assert said.count("\n") == 1
    with pytest.raises(ConfigurationError, match="no segments are here"):
        page_of(tmp_path / "empty", tmp_path)


def test_whatever_the_page_is_made_of_goes_where_its_code_goes():
    files = [path for path in FOLDER.iterdir() if path.suffix not in (".py", "") and path.is_file()]
    project = tomllib.loads((FOLDER.parents[1] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["jobs.page"]
    assert len(files) == 4
    assert all(any(fnmatch(path.name, pattern) for pattern in patterns) for path in files)
    assert all(path.suffix in SENT for path in files)


def test_numbers_read_well():
    assert [percent(share) for share in (0, 0.0001, 0.1234, 0.9999, 1)] == [
        "0 %",
        "< 0.1 %",
        "12.3 %",
        "> 99.9 %",
        "100 %",
    ]
    assert [duration(seconds) for seconds in (0.41, 59.7, 312, 12000, 90000)] == [
        *("0.4 s", "1 min", "5 min 12 s", "3 h 20 min", "1 d 1 h")
    ]
    assert [amount(count) for count in (3072, 8.5e6, 503.6e9)] == ["3,072", "8.5 million", "503.6 billion"]
    assert [dollars(amount) for amount in (0, 0.0042, 1234.5)] == ["$0.00", "$0.0042", "$1,234.50"]
    assert name("a\u202eb\n" + "x" * 1000) == "a\\u202eb\\u000a" + "x" * 186 + "…" + "x" * 200
    assert place("https://user:word@host/a.jpg?token=1") == "https://host/a.jpg"


def test_quantiles_of_bins_are_those_of_the_values():
    values = np.random.default_rng(0).beta(2, 5, 10_000)
    bins, counts = np.unique((values / 0.001).astype(int), return_counts=True)
    found = Histogram(dict(zip(bins.tolist(), counts.tolist(), strict=True)))
    for share in (0.05, 0.5, 0.95):
        assert abs(found.quantile(share) - np.quantile(values, share)) < 0.001
    assert sum(found.bars(0.2, 0.5, 7)) == 10_000
    assert Histogram({}).quantile(0.5) == 0
