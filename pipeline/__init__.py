"""The road of the data, from a collection of images to a Parquet table. README.md lists its files in the order in which
they are read.

For other programs, an output as samples of image, mask and row: `from pipeline import SegmentedImages`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config import StorageSettings
    from pipeline.dataset import Sample, SegmentedImages, ShuffledShards
    from pipeline.originals import ImageError

__all__ = ["ImageError", "Sample", "SegmentedImages", "ShuffledShards", "StorageSettings"]
MODULES = {"ImageError": "originals", "StorageSettings": "config"}  # where they are, if not in `dataset`


def __getattr__(name: str) -> Any:
    """Import what other programs use when they ask for it, and no more: by itself this package costs nothing."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{MODULES.get(name, 'dataset')}"), name)
