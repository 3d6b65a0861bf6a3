"""Vector kernels for a CPU, in C++: the network's layers, and logits to masks.

They are built when the package is installed, once for each instruction set; where no compiler was there, `library`
has none and `fused` and `upsample` do the same in plain PyTorch.

Why our own: the matrix products of so narrow a network (32 to 256 channels) are small, and between them a general
library writes and reads maps that are larger than the cache. Here each layer is one pass over blocks that stay in it.
"""

import ctypes
import sysconfig
from functools import cache
from pathlib import Path

import torch

BITS, POINTER, COUNT = ctypes.c_int, ctypes.c_void_p, ctypes.c_int64
ARGUMENTS = {  # as in kernels.cpp
    "panel_bytes": [BITS, COUNT, COUNT],
    "pack_panels": [BITS, POINTER, COUNT, COUNT, POINTER],
    "embed_pixels": [BITS, BITS, POINTER, POINTER, COUNT, COUNT, COUNT, POINTER],
    "embed_map": [BITS, BITS, POINTER, POINTER, COUNT, COUNT, COUNT, POINTER],
    "attend_to_all": [BITS, BITS, POINTER, POINTER, COUNT, COUNT, COUNT],
    "mix": [BITS, BITS, POINTER, POINTER, COUNT, COUNT, COUNT, POINTER],
    "layer_norm": [BITS, POINTER, POINTER, COUNT, COUNT],
    "project": [BITS, BITS, POINTER, POINTER, COUNT, BITS, POINTER],
    "decode_maps": [BITS, BITS, POINTER, POINTER, COUNT, COUNT, COUNT, POINTER, COUNT, POINTER],
    "argmax_8bit": [BITS, POINTER, COUNT, COUNT, COUNT, COUNT, COUNT, POINTER, POINTER],
    "argmax_16bit": [BITS, POINTER, COUNT, COUNT, COUNT, COUNT, COUNT, POINTER, POINTER],
    "softmax_statistics": [BITS, POINTER, COUNT, COUNT, POINTER, POINTER, POINTER],
}


@cache
def library() -> ctypes.CDLL | None:
    """The kernels for this CPU, or None."""
    capability = torch.backends.cpu.get_cpu_capability()
    names = {"AVX2": ["avx2"], "AVX512": ["avx512", "avx2"]}.get(capability, [])
    if torch.cpu._is_avx512_bf16_supported():
        names.insert(0, "avx512_bf16")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    found = [path for name in names if (path := Path(__file__).with_name(f"{name}{suffix}")).exists()]
    if not found:
        return None
    try:
        kernels = ctypes.CDLL(str(found[0]))
    except OSError:  # their OpenMP is PyTorch's, and this PyTorch has brought none that they know
        return None
    for name, arguments in ARGUMENTS.items():
        function = getattr(kernels, name)
        function.argtypes, function.restype = arguments, COUNT if name == "panel_bytes" else None
    return kernels
