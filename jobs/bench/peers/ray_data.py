"""Ray Data: read_images, a class in map_batches, write_parquet."""

import sys
from typing import Any

import pyarrow.fs
import ray

from jobs.bench.peers.transformers_ import BATCH, Segmenter, endpoint


class Predict:
    def __init__(self, checkpoint: str, threads: int):
        self.segment = Segmenter(checkpoint, threads)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        batch["mask"] = self.segment(batch.pop("image"))
        return batch


def main(source: str, output: str, checkpoint: str, threads: int) -> None:
    ray.init(num_cpus=threads + 1, include_dashboard=False)  # one for reading, as the actor takes all others
    filesystem = pyarrow.fs.S3FileSystem(endpoint_override=endpoint()) if source.startswith("s3://") else None
    dataset = ray.data.read_images(source, filesystem=filesystem, include_paths=True, mode="RGB")
    dataset = dataset.map_batches(
        Predict,
        fn_constructor_args=(checkpoint, threads),
        batch_size=BATCH,
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=threads,
    )
    dataset.write_parquet(output)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
