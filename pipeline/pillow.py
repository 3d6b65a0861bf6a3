"""Pillow's `Image` without its guard against large images, which has one limit for a whole process.

Here the limit is a setting of each run, compared with an image's header before it is decoded; a mask is as large as its
image, whose size had that limit. To set it is a side effect of the import, so it is done here alone: whoever opens
images imports `Image` from here.
"""

from PIL import Image

__all__ = ["Image"]

Image.MAX_IMAGE_PIXELS = None
