"""Daft: list, download and decode as expressions, a class for the network, write_parquet."""

import sys
from typing import Any

import daft
from daft import DataType, Series, col
from daft.io import IOConfig, S3Config

from jobs.bench.peers.transformers_ import BATCH, Segmenter, endpoint


@daft.cls(max_concurrency=1)
class Predict:
    def __init__(self, checkpoint: str, threads: int):
        self.segment = Segmenter(checkpoint, threads)

    @daft.method.batch(return_dtype=DataType.binary(), batch_size=BATCH)
    def masks(self, images: Series) -> list[bytes]:
        return self.segment(images.to_pylist())


def main(source: str, output: str, checkpoint: str, threads: int) -> None:
    s3 = IOConfig(s3=S3Config(endpoint_url=endpoint())) if source.startswith("s3://") else None
    frame = daft.from_glob_path(f"{source}/**", io_config=s3)
    frame = frame.with_column("image", col("path").download(io_config=s3).decode_image(mode="RGB"))
    predict: Any = Predict(checkpoint, threads)  # whose methods Daft makes into expressions
    frame = frame.with_column("mask", predict.masks(col("image")))
    frame.select("path", "mask").write_parquet(output)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
