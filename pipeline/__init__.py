"""The road of the data, from a collection of images to a Parquet table; its files read in this order:

config, policy, storage, index, plan, decode, stages, road, segment, masks, schema, totals, commit, metrics, cluster,
run.

For other programs, an output as samples of image, mask and row: `from pipeline import SegmentedImages`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config import StorageSettings
    from pipeline.dataset import Sample, SegmentedImages, ShuffledShards
    from pipeline.originals import ImageError

__all__ = ["ImageError", "Sample", "SegmentedImages", "ShuffledShards", "StorageSettings"]


def __getattr__(name: str) -> Any:
    """Import what other programs use when they ask for it: to import this package costs nothing."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pipeline import config, dataset, originals  # noqa: PLC0415

    return getattr({"StorageSettings": config, "ImageError": originals}.get(name, dataset), name)
