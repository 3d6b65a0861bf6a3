"""Segment every image of a collection into a Parquet table.

INPUT is a folder, bucket, prefix or glob, a tar or Parquet file with images in it, a manifest of URIs or an S3
Inventory, or several of these; OUTPUT gets one row an image: a PNG mask, the share of each class, how sure the
network was, or why there is no mask. Images that OUTPUT holds from the same model already are left alone, and an
interrupted run goes on where it stopped when the same command is given again.

  swath segment /data/photos /data/masks --checkpoint hf://nvidia/segformer-b0-finetuned-ade-512-512
  swath segment s3://bucket/photos s3://bucket/masks --checkpoint s3://bucket/models/b2 --workers 1:8
  swath segment 's3://bucket/shards/*.tar' s3://bucket/more.parquet s3://bucket/masks --checkpoint s3://bucket/models/b2
  swath segment --config nightly.yaml
"""

from jobs.display import Display, print_record
from pipeline.config import SegmentSettings

SETTINGS = SegmentSettings


def run(settings: SegmentSettings) -> int:
    from pipeline.run import segment

    with Display() as display:
        result = segment(settings, display)
    if result.record and result.is_new:
        print_record(result.record, settings.output)
    return 0
