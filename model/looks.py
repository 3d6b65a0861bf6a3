"""Several looks at an image, and what they say on average: test-time augmentation.

A network that sees an image mirrored, or larger, errs elsewhere, so the mean of its probabilities is right more often
than any of them. They are averaged where the logits are, a quarter of the bucket's size, and the logarithm of the mean
goes on as logits: the softmax of log p is p, so masks and statistics are made of it as of any others.

Where a look's cells lie: every look is the whole image, so all grids share its edges, and a resized cell (bilinear,
`align_corners=False`) lands on what it has seen. Sides are multiples of 32, so a mirrored look has cell W/4 - 1 - i
exactly where the plain one has i. The first convolution centres cell i on pixel 4 i, and mirrored on 4 i + 3: together
they are centred on 4 i + 1.5, the middle of the pixels that the cell stands for.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from model.fused import resize_nhwc
from model.windows import CELL

LEAST = torch.finfo(torch.float32).tiny  # of a probability: its logarithm is finite, and interpolated as any other


def averaged(
    network: Callable[[np.ndarray], Tensor], views: Sequence[np.ndarray], flip: bool, bucket: tuple[int, int]
) -> Tensor:
    """Logits, float32 (N, h, w, K), of what the network says on average of `views`, and of them mirrored with `flip`.

    `views` are the same N images at one or more sizes, uint8 (N, H, W, 3); `network` gives float32 logits
    (N, H / `CELL`, W / `CELL`, K) of each. h and w are the bucket's sides by `CELL`. One look alone gives the network's
    own logits as they are, at its own size.
    """
    if len(views) == 1 and not flip:
        return network(views[0])
    rows, columns = (side // CELL for side in bucket)
    total: Tensor | None = None
    for view in views:
        seen = F.softmax(network(view), dim=3)
        if flip:
            seen += F.softmax(network(np.ascontiguousarray(view[:, :, ::-1])), dim=3).flip(2)
        if seen.shape[1:3] != (rows, columns):
            seen = resize_nhwc(seen, rows, columns)
        total = seen if total is None else total.add_(seen)
    assert total is not None
    return total.div_((1 + flip) * len(views)).clamp_min_(LEAST).log_()
