"""Draw a small collection of street scenes, segment it here, and show what came out.

Needs no cluster, no bucket and no download: the scenes are drawn, their ground truth is therefore known, and the
network is one that this project ships, trained on other scenes (make weights). A few files are broken on
purpose. FOLDER is made anew each time.

  swath demo
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pydantic import Field

from jobs import evaluate, query, report
from jobs.display import EXAMPLE, Display, print_record
from jobs.scenes.draw import TRAINING_SEEDS, fresh_folder
from jobs.scenes.street import CLASSES, PALETTE, draw_scene
from model.labels import label_set
from pipeline.config import ConfigurationError, MetricsSettings, QuerySettings, ReportSettings, SegmentSettings, option
from pipeline.config_truth import EvaluateSettings
from pipeline.masks import decode_mask, encode_mask, overlay

WEIGHTS = Path(__file__).parent / "scenes" / "weights"
SHAPES = (
    (640, 480),
    (480, 640),
    (800, 600),
    (960, 540),
    (512, 512),
    (600, 800),
    (720, 405),
    (375, 500),
)  # width, height
SUFFIXES = ("jpg", "png", "webp")
LABELS = label_set(list(CLASSES), list(PALETTE))
MARKER = ".swath-demo"  # in a folder that the demo made, and may therefore remove


class DemoSettings(MetricsSettings):
    """What `swath demo` needs."""

    folder: str = Field("swath-demo", description="where images, masks and the picture go (default: swath-demo)")
    images: int = option(48, "scenes to draw", "Demo", "N")


SETTINGS = DemoSettings


def run(settings: DemoSettings) -> int:
    import pyarrow.dataset

    from pipeline.run import segment

    if not 1 <= settings.images <= TRAINING_SEEDS:
        raise ConfigurationError(f"images: must be from 1 to {TRAINING_SEEDS:,} (got {settings.images})")
    folder = fresh_folder(Path(settings.folder), MARKER)
    draw_collection(folder / "images", folder / "truth", settings.images)
    job = SegmentSettings(
        input=(str(folder / "images"),),
        output=str(folder / "masks"),
        checkpoint=str(WEIGHTS),
        metrics_host=settings.metrics_host,
        metrics_port=settings.metrics_port,
        metrics_linger=settings.metrics_linger,
    )
    with Display() as display:
        display.say(f"{settings.images} scenes and 5 files that are none in {folder / 'images'}")
        result = segment(job, display)
    assert result.record
    record = result.record
    print_record(record, job.output)
    print()
    query.run(QuerySettings(output=job.output, sql=EXAMPLE))
    print("\nagainst the ground truth of these scenes, none of which the network was taught:\n", flush=True)
    evaluate.run(EvaluateSettings(output=job.output, truth=str(folder / "truth")))
    picture = folder / "overview.png"
    draw_overview(pyarrow.dataset.dataset(f"{job.output}/segments").to_table().to_pylist(), picture)
    print()
    print(f"masks take {record['output_bytes'] / record['pixels']:.4f} bytes a pixel")
    print(f"picture  {picture}")
    return report.run(ReportSettings(output=job.output, to=str(folder / "report.html")))


def draw_collection(folder: Path, truth: Path, images: int) -> None:
    """Draw `images` scenes and their ground truth, and among the scenes five files that are none."""
    folder.mkdir()
    truth.mkdir()
    for seed in range(images):
        (width, height), suffix = SHAPES[seed % len(SHAPES)], SUFFIXES[seed % len(SUFFIXES)]
        scene, name = draw_scene(seed, width, height), f"scene-{seed:04d}"
        Image.fromarray(scene.image).save(folder / f"{name}.{suffix}", quality=92)
        (truth / f"{name}.png").write_bytes(encode_mask(scene.mask, LABELS))
    whole = (folder / "scene-0000.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 3])
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("This is no picture.\n")
    (folder / "notes.txt").write_text("Neither is this, and its name says so.\n")
    (folder / "folder.png").mkdir()


def draw_overview(rows: list[dict], path: Path, cells: int = 8, width: int = 320) -> None:
    """A sheet of images beside their masks, with a legend."""
    margin = 8
    good = sorted((row for row in rows if row["status"] == "ok"), key=lambda row: row["uri"])[:cells]
    tiles = []
    for row in good:
        image = np.array(Image.open(row["uri"].removeprefix("file://")).convert("RGB"))
        overlaid = overlay(image, decode_mask(row["mask"]), LABELS, opacity=0.8)
        tile = Image.fromarray(np.concatenate([image, overlaid], axis=1))
        tile.thumbnail((2 * width, width))
        tiles.append(tile)
    rows_of_tiles = [tiles[start : start + 2] for start in range(0, len(tiles), 2)]
    heights = [max(tile.height for tile in pair) + margin for pair in rows_of_tiles]
    legend = 40
    sheet = Image.new("RGB", (4 * width + 3 * margin, sum(heights) + margin + legend), "white")
    for number, pair in enumerate(rows_of_tiles):
        for column, tile in enumerate(pair):
            left = margin + column * (2 * width + margin) + (2 * width - tile.width) // 2
            sheet.paste(tile, (left, margin + sum(heights[:number])))
    draw, font, x = ImageDraw.Draw(sheet), ImageFont.load_default(16), margin
    for name, colour in zip(LABELS.names, LABELS.palette, strict=True):
        y = sheet.height - legend + 8
        draw.rectangle((x, y, x + 20, y + 20), fill=colour)
        draw.text((x + 26, y), name, fill="black", font=font)
        x += 46 + round(font.getlength(name))
    sheet.save(path)
