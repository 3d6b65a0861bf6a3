"""Export masks for other programs: a folder of PNG files, a COCO file, or a dataset for Hugging Face's datasets.

Of each image the newest mask is taken, or with --run-id those of one run. DEST must be empty, or have an earlier export
of the same, which is then repeated: so one that was killed goes on with the same command. With --format huggingface the
images come along, from where they were segmented; those that have gone or changed since are counted, listed in
DEST/left_out and left out. Exit code 0 when there is an export, 1 when every image of it has gone.

  swath export s3://bucket/masks /data/png --format png
  swath export s3://bucket/masks s3://bucket/sure --format coco --where 'confidence > 0.9'
  swath export s3://bucket/masks /data/dataset --format huggingface --run-id night-1
"""

from rich.console import Console
from rich.markup import escape

from jobs.display import Display
from pipeline.config import ExportSettings

SETTINGS = ExportSettings


def run(settings: ExportSettings) -> int:
    from pipeline.export import export
    from pipeline.export_coco import write_coco
    from pipeline.export_huggingface import write_huggingface
    from pipeline.export_png import write_png

    write = {"png": write_png, "coco": write_coco, "huggingface": write_huggingface}[settings.format]
    with Display() as display:
        done = export(settings, write, display)
    console = Console(soft_wrap=True, highlight=False)
    before = ", which was there already" if done.was_there else ""
    console.print(f"exported {done.images:,} images{before}: {escape(settings.dest)}")
    for status, count in sorted(done.left_out.items()):
        console.print(f"left out {count:,} {status} since they were segmented; see left_out")
    return 0 if done.images else 1
