"""PyTorch: a Dataset that reads images, a DataLoader with worker processes, a loop over its batches."""

import sys

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from jobs.bench.peers.transformers_ import BATCH, Segmenter


class Images(Dataset):
    def __init__(self, source: str):
        self.filesystem, root = fsspec.url_to_fs(source)
        self.paths = sorted(self.filesystem.find(root))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> tuple[str, np.ndarray]:
        with self.filesystem.open(self.paths[number]) as file:
            return self.paths[number], np.asarray(Image.open(file).convert("RGB"))


def main(source: str, output: str, checkpoint: str, threads: int) -> None:
    segment = Segmenter(checkpoint, threads)
    context = "forkserver" if source.startswith("s3://") else None  # s3fs has threads, which a fork would lose
    loader = DataLoader(
        Images(source), batch_size=BATCH, num_workers=threads, collate_fn=list, multiprocessing_context=context
    )
    paths: list[str] = []
    masks: list[bytes] = []
    for batch in loader:
        paths += [path for path, _ in batch]
        masks += segment([image for _, image in batch])
    fsspec.filesystem("file").makedirs(output)
    pq.write_table(pa.table({"path": paths, "mask": masks}), f"{output}/masks.parquet")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
