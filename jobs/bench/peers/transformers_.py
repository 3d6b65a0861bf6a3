"""What all peers share: transformers' SegFormer behind its image processor, and a mask as PNG."""

import io
import os
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, SegformerForSemanticSegmentation

BATCH = 8


class Segmenter:
    """RGB images of any size to masks of the same size."""

    def __init__(self, checkpoint: str, threads: int):
        torch.set_num_threads(threads)
        self.processor = AutoImageProcessor.from_pretrained(checkpoint)
        self.model = SegformerForSemanticSegmentation.from_pretrained(checkpoint, dtype=torch.float32).eval()

    def __call__(self, images: Sequence[np.ndarray]) -> list[bytes]:
        inputs = self.processor(images=list(images), return_tensors="pt")
        with torch.inference_mode():
            outputs = self.model(**inputs)
        sizes = [image.shape[:2] for image in images]
        masks = self.processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
        return [png(mask.numpy().astype(np.uint8)) for mask in masks]


def png(mask: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG")
    return file.getvalue()


def endpoint() -> str | None:
    """The S3 server's address, as every S3 client reads it."""
    return os.environ.get("AWS_ENDPOINT_URL")
