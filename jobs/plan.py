"""Show what a run would do: shards, buckets, how full its batches are, how large its output. A dry run.

Batches are those of a CPU, unless --batch-pixels says how large they are on the GPU to come.
It brings the index in OUTPUT up to date and writes nothing else.

  swath plan s3://bucket/photos s3://bucket/masks --checkpoint s3://bucket/models/b2
"""

from rich.console import Console
from rich.table import Table

from jobs.display import Display, size
from pipeline.config import PlanSettings

SETTINGS = PlanSettings


def run(settings: PlanSettings) -> int:
    from model.checkpoint import model_version
    from model.predictor import CPU_BATCH_PIXELS
    from pipeline.plan import summarise
    from pipeline.run import index_and_plan, origin_of, read_checkpoint
    from pipeline.storage import Store
    from pipeline.tables import workspace

    version = model_version(read_checkpoint(settings).digest, settings.mask_settings())
    output = Store(settings.output, settings)
    output.check_writable()
    with Display() as display, workspace() as space:
        plan = index_and_plan(settings, output, origin_of(settings, version), space, display)
    buckets = summarise(plan.shards, settings.batch_pixels or CPU_BATCH_PIXELS, settings.looks)
    table = Table(
        "bucket", "images", "shards", "batch", "fill", "masks (est.)", box=None, header_style="bold", pad_edge=False
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for bucket in buckets:
        counts = (f"{bucket.images:,}", f"{bucket.shards:,}", f"{bucket.batch:,}")
        table.add_row(bucket.name, *counts, f"{bucket.fill:.0%}", size(bucket.mask_bytes))
    Console(soft_wrap=True, highlight=False).print(table)
    places = sum(bucket.batches * bucket.batch for bucket in buckets)
    masks = size(sum(bucket.mask_bytes for bucket in buckets))
    print(
        f"\n{plan.images:,} images to do in {len(plan.shards):,} shards of {len(buckets)} buckets; "
        f"batches {sum(bucket.windows for bucket in buckets) / max(places, 1):.0%} full; about {masks} of masks"
    )
    print(f"model  {version}")
    return 0
