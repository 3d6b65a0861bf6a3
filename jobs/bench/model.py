"""How fast the network is, rung by rung, beside its peers: normalised image to full-size mask.

Every contender lives in a process of its own, with the same threads and the same allocator settings, and takes turns
with the first: so what disturbs this machine disturbs both. Medians are compared, never times of different runs. Beside
each speed stands its agreement with the reference implementation in float32: share of equal mask pixels and greatest
difference of a logit, with random weights of 150 classes and with the demo's trained ones (B0).

  make bench-model
  .venv/bin/python -m jobs.bench.model --variant b2 --size 512x512 --batch 1 --only 'transformers SDPA' --only kernels
"""

import argparse
import itertools
import json
import multiprocessing as mp
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from jobs.bench.contenders import Case, contenders
from jobs.demo import WEIGHTS
from jobs.scenes.street import draw_scene
from model.checkpoint import save_huggingface
from model.labels import label_set
from model.segformer import VARIANTS, Segformer, SegformerConfig, variant

TURN = 0.5  # seconds that a contender runs, once and more, before the next one
HELD_OUT = 2_000_000  # seeds of scenes that no training has seen
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2147483647"}  # freed memory stays in the process
PACKAGES = ("torch", "transformers", "onnxruntime", "openvino", "triton")


def main() -> None:
    options = read_options()
    os.environ |= ALLOCATOR
    print(heading(options))
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        save_random_network(options.variant, folder)
        config = variant(options.variant, labels=150)
        floor = Floor(config, options.size, options.threads, options.device)
        print(floor, "\n", flush=True)
        trained: dict[str, Any] = {}  # agreement with trained weights, by contender
        for batch in options.batch:
            scenes = [draw_scene(HELD_OUT + i, options.size[1], options.size[0]).image for i in range(batch)]
            images = np.stack(scenes)
            rows = list(compete(options, Case(folder, images, options.threads, options.device)))
            if options.variant == "b0" and batch == options.batch[0]:  # the demo's network is a B0
                trained = agree(rows, Case(str(WEIGHTS), images, options.threads, options.device))
            print(table(rows, trained, batch, floor), flush=True)
            cases.append({"batch": batch, "floor_ms": floor.milliseconds, "rows": rows, "trained": trained})
    setting = {"variant": options.variant, "size": options.size, "threads": options.threads}
    print(json.dumps(setting | {"hardware": processor(options.device), "cases": cases}))


def read_options() -> Any:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.bench.model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variant", choices=VARIANTS, default="b0", help="network (default: b0)")
    parser.add_argument(
        "--size", type=numbers("x", 2), default="512x512", metavar="HEIGHTxWIDTH", help="of images (default: 512x512)"
    )
    parser.add_argument(
        "--batch",
        type=numbers(","),
        default="1,8",
        metavar="N,N",
        help="batch sizes, with commas between (default: 1,8)",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each contender (default: all CPUs)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender (default: 7)")
    parser.add_argument("--only", action="append", metavar="TEXT", help="contenders whose name has TEXT; repeatable")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    return parser.parse_args()


def numbers(separator: str, count: int | None = None) -> Callable[[str], tuple[int, ...]]:
    """What reads so many positive numbers, as argparse wants it."""

    def read(text: str) -> tuple[int, ...]:
        found = tuple(int(part) for part in text.split(separator))
        if min(found) < 1 or len(found) != (count or len(found)):
            raise ValueError
        return found

    read.__name__ = "size" if count else "list of numbers"  # argparse says "invalid size value: ..."
    return read


def compete(options: Any, case: Case) -> Iterator[dict[str, Any]]:
    """A row for each contender: milliseconds an image, speed and agreement beside the first, in alternating turns."""
    reference, *others = contenders(options.device)
    first = Contender(reference, case)
    expected = first.ask("masks")
    for name in [reference, *(one for one in others if not options.only or any(text in one for text in options.only))]:
        other = Contender(name, case)  # two at a time: all at once would not fit the memory
        found = other.ask("masks")
        turns = [(first.ask("times"), other.ask("times")) for _ in range(options.rounds)]
        other.stop()
        firsts, times = (statistics.median(itertools.chain(*column)) for column in zip(*turns, strict=True))
        yield {
            "contender": name,
            "ms": round(1000 * times / len(case.images), 1),
            "times_faster": round(firsts / times, 2),
            "agreement": agreement(found, expected),
        }
    first.stop()


def agree(rows: list[dict[str, Any]], case: Case) -> dict[str, dict[str, float]]:
    """The agreement of each contender with the first, on another case."""
    expected: Any = None
    agreed = {}
    for row in rows:
        process = Contender(row["contender"], case)
        found = process.ask("masks")
        process.stop()
        expected = expected or found
        agreed[row["contender"]] = agreement(found, expected)
    return agreed


class Contender:
    """A process that builds one contender, then does what it is asked."""

    def __init__(self, name: str, case: Case):
        spawn = mp.get_context("spawn")  # a fresh allocator, and no threads of the others
        self.name, (self.here, there) = name, spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(name, case, there), daemon=True)
        self.process.start()
        there.close()

    def ask(self, question: str) -> Any:
        try:
            self.here.send(question)
            return self.here.recv()
        except (EOFError, OSError):
            sys.exit(f"{self.name} failed; its error is above")

    def stop(self) -> None:
        self.here.close()
        self.process.join()


def serve(name: str, case: Case, questions: Any) -> None:
    """Answer "times" with the seconds of the runs of a turn, "masks" with masks (N, H, W) and logits (N, K, h, w)."""
    torch.set_num_threads(case.threads)
    with torch.inference_mode():
        run = contenders(case.device)[name](case)
        run()
        while True:
            try:
                question = questions.recv()
            except EOFError:
                return
            masks, logits = run()  # not timed: the turn of the others has emptied the caches
            if question == "masks":
                questions.send((as_array(masks).astype(np.int16), as_array(logits)))
                continue
            times: list[float] = []
            while sum(times) < TURN:
                times.append(timed(run, case.device))
            questions.send(times)


def as_array(values: Any) -> np.ndarray:
    return values.float().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def agreement(found: Any, expected: Any) -> dict[str, float]:
    """Share of equal mask pixels, and the greatest difference of a logit."""
    same, error = (found[0] == expected[0]).mean(), np.abs(found[1] - expected[1]).max()
    return {"equal_pixels": round(float(same), 6), "logit_error": float(f"{error:.1e}")}


class Floor:
    """What no implementation of the folded network can beat here: operations over measured speed.

    In float32 on a CPU, in bfloat16 on a GPU.
    """

    def __init__(self, config: SegformerConfig, size: tuple[int, int], threads: int, device: str):
        self.operations = operations(config, size)
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        torch.set_num_threads(threads)
        self.speed = matrix_product_speed(device, dtype)
        self.bandwidth = copy_bandwidth(device)
        pixels = size[0] * size[1]
        self.bytes = pixels * 4 + 2 * pixels // 16 * config.labels * dtype.itemsize  # pixels, logits twice, mask
        self.milliseconds = round(1000 * max(self.operations / self.speed, self.bytes / self.bandwidth), 2)

    def __str__(self) -> str:
        return (
            f"Floor: {self.milliseconds} ms an image. The folded network has {self.operations / 1e9:.1f} GFLOP, matrix "
            f"products run at {self.speed / 1e9:.0f} GFLOP/s here (PyTorch's best of several shapes); the least that "
            f"must be moved, {self.bytes / 1e6:.0f} MB at {self.bandwidth / 1e9:.1f} GB/s, takes "
            f"{1000 * self.bytes / self.bandwidth:.1f} ms."
        )


def operations(config: SegformerConfig, size: tuple[int, int]) -> float:
    """Floating-point operations (two a multiply-add) of the folded network's products for one image."""
    height, width = size
    total, channels = 0.0, 3
    first = (0, 0)
    for stage, (hidden, kernel, stride) in enumerate(
        zip(config.hidden_sizes, config.kernels, config.strides, strict=True)
    ):
        height, width = -(-height // stride), -(-width // stride)
        first = first if stage else (height, width)
        tokens, reduction = height * width, config.reductions[stage]
        keys = max(1, height // reduction) * max(1, width // reduction)
        total += tokens * hidden * kernel**2 * channels
        block = tokens * hidden * hidden * 2 + keys * hidden * hidden * 2  # query and output; key and value
        block += keys * hidden * hidden * reduction**2 * (reduction > 1)
        block += 2 * tokens * keys * hidden  # scores, and their sums of values
        block += tokens * hidden * config.mlp_ratios[stage] * (2 * hidden + 9)
        total += config.depths[stage] * block
        total += tokens * hidden * config.decoder_size
        channels = hidden
    return 2 * (total + first[0] * first[1] * config.decoder_size * config.labels)


def matrix_product_speed(device: str, dtype: torch.dtype) -> float:
    """Operations a second of the fastest of a few matrix products."""
    speeds = []
    for m, k, n in ((1024, 1024, 1024), (4096, 256, 256), (1024, 160, 640), (16384, 256, 160)):
        a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
        seconds = min(timed(lambda a=a, b=b: a @ b, device) for _ in range(30))
        speeds.append(2 * m * k * n / seconds)
    return max(speeds)


def copy_bandwidth(device: str) -> float:
    """Bytes a second, read and written, of a large copy."""
    source = torch.ones(64 << 20, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(timed(lambda: target.copy_(source), device) for _ in range(5))


def timed(work: Any, device: str) -> float:
    started = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def save_random_network(size: str, folder: str) -> None:
    """A network of 150 classes in which no weight or statistic is trivial."""
    torch.manual_seed(0)
    model = Segformer(variant(size, labels=150))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        for name, statistic in model.named_buffers():
            if name.endswith("running_mean"):
                statistic.normal_()
            elif name.endswith("running_var"):
                statistic.uniform_(0.5, 2)
    save_huggingface(model, label_set([f"class {i}" for i in range(150)]), folder)


def heading(options: Any) -> str:
    """What this run is: hardware, versions, command."""
    sizes = f"SegFormer {options.variant.upper()}, {options.size[0]}x{options.size[1]}, 150 classes"
    versions = ", ".join(f"{name} {installed(name)}" for name in PACKAGES if installed(name))
    return (
        f"# {sizes}: image to full-size mask\n\n{processor(options.device)}, {options.threads} threads; "
        f"Python {platform.python_version()}, {versions}.\n\n"
        f"`python -m jobs.bench.model {shlex.join(sys.argv[1:])}`, medians of {options.rounds} turns, each of them "
        "behind one of the first.\n"
    )


def table(rows: list[dict[str, Any]], trained: dict[str, Any], batch: int, floor: Floor) -> str:
    lines = [
        f"## Batch {batch}\n",
        "| | ms an image | times the first's speed | times the floor | equal pixels, logit error: random weights "
        "| trained weights |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        random_weights, trained_weights = (
            f"{100 * share['equal_pixels']:.3f} %, {share['logit_error']:.0e}" if share else "-"
            for share in (row["agreement"], trained.get(row["contender"]))
        )
        times = f"{row['ms']} | {row['times_faster']} | {row['ms'] / floor.milliseconds:.1f}"
        lines.append(f"| {row['contender']} | {times} | {random_weights} | {trained_weights} |")
    return "\n".join(lines) + "\n"


def processor(device: str) -> str:
    """The name of what computes."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} ({torch.backends.cpu.get_cpu_capability()})"


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


if __name__ == "__main__":
    main()
