"""Ray's own side of a run: joining a cluster or starting a local Ray, and how many workers fit into it."""

import contextlib
import logging
import os
import signal
import socket
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
import ray.exceptions

from pipeline import stopping
from pipeline.attempts import reason
from pipeline.config import ClusterSettings, ConfigurationError, WorkerSettings, worker_range

CPUS = 4  # of a worker without a GPU: more of them in one process get into each other's way in Python
IMAGE_MEMORY = (256 << 20, 4 << 30)  # bytes: the least and the most by default
# Of work whose worker dies; Ray's own default is for ever. A shard may die twice of itself before it is done apart, and
# then of the two shards beside it, each of which ends the worker twice before it is done apart too; while one waits for
# that, no new one begins (`quarantine.Turns`). That makes six, and two more are for nodes that go.
TASK_RETRIES = 8
CHUNKS_AHEAD = 2  # for each CPU
# Of the shards that workers may have at once, the share that they have. As many as are handed out ahead are taken for
# work, so the pool grows while shards wait, and gives workers and their GPUs back when none do. Ray Data's own
# bound for growing, 1.75, is never reached by workers that have a thread for each shard.
GROWING, SHRINKING = 0.5, 0.25
FAILED_SHARDS = 8  # after so many the store is down or the job is wrong, and going on helps nobody

T = TypeVar("T")
R = TypeVar("R")


class ClusterError(Exception):
    """Ray itself has failed; what is written stays."""


def check_network(settings: WorkerSettings) -> None:
    """Raise `ConfigurationError` at once for what would fail later: Ray itself looks for a cluster for minutes."""
    address = ray_address(settings) or ""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if port.isdigit():
            socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ConfigurationError(f"no Ray cluster at {address} ({error}); see --ray-address") from None
    try:
        socket.create_server((settings.metrics_host, settings.metrics_port)).close()
    except OSError as error:
        endpoint = f"{settings.metrics_host}:{settings.metrics_port}"
        raise ConfigurationError(
            f"metrics cannot be served at {endpoint} ({error.strerror}); see --metrics-host and --metrics-port"
        ) from None


def ray_address(settings: ClusterSettings) -> str | None:
    return settings.ray_address or os.environ.get("RAY_ADDRESS")


@contextlib.contextmanager
def ray_session(settings: ClusterSettings) -> Iterator[None]:
    """Connect to the cluster, or start a local Ray that ends with the block; quiet, as the listener speaks."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    before = [signal.getsignal(number) for number in stopping.NUMBERS]
    import ray.data  # noqa: PLC0415  (takes a second, for which a run that finds nothing to do need not wait)

    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else it warns of its own way to start pools of actors
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address := ray_address(settings):
        try:
            with silence():
                ray.init(address=address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigurationError(f"no Ray cluster at {address} ({reason(error)}); see --ray-address") from None
    else:  # one CPU more than there are, so that Ray's own tasks have a place beside the workers
        with silence():
            ray.init(address="local", num_cpus=(os.cpu_count() or 1) + 1, include_dashboard=False, **quiet)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = None
    context.max_errored_blocks = FAILED_SHARDS
    context.autoscaling_config.actor_pool_util_upscaling_threshold = GROWING
    context.autoscaling_config.actor_pool_util_downscaling_threshold = SHRINKING
    leave_cpus(1)
    stopping.install()  # here, as ray.init installs its own
    try:
        with contextlib.redirect_stdout(sys.stderr):  # where Ray says on stdout that a worker has died
            yield
    except ray.exceptions.RayError as error:
        last = " ".join(str(error).strip().split("\n")[-1].split())[:300]
        raise ClusterError(f"Ray failed ({type(error).__name__}: {last}); run the same command again") from error
    finally:
        for number, handler in zip(stopping.NUMBERS, before, strict=True):
            signal.signal(number, handler)
        with silence():
            ray.shutdown()


def leave_cpus(count: int) -> None:
    """Have pools leave so many CPUs to others, one of them for Ray itself, also of nodes that join."""
    with warnings.catch_warnings():  # labels, which are to be used instead, do not count CPUs
        warnings.filterwarnings("ignore", message="`ExecutionOptions.exclude_resources` is deprecated")
        resources = ray.data.ExecutionResources(cpu=count)
        ray.data.DataContext.get_current().execution_options.exclude_resources = resources


def spread(settings: ClusterSettings, work: Callable[[T], R], chunks: Iterator[T]) -> Iterator[R]:
    """`work` done to every chunk by the CPUs of the cluster, a few chunks ahead; the results in order."""
    with ray_session(settings):
        task: Any = ray.remote(num_cpus=1, max_retries=TASK_RETRIES)(do)
        shared = ray.put(work)
        ahead: deque[Any] = deque()
        for chunk in chunks:
            ahead.append(task.remote(shared, chunk))
            if len(ahead) > CHUNKS_AHEAD * ray.cluster_resources().get("CPU", 1):
                yield result(ahead.popleft())
        while ahead:
            yield result(ahead.popleft())


def result(task: Any) -> Any:
    """What a task gives, or the error that it had, as if it had been here."""
    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


def do(work: Callable[[T], R], chunk: T) -> R:
    return work(chunk)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Drop what Ray itself writes, past Python: that it was told to be quiet, and that its tasks ended when it did."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = {stream: os.dup(stream) for stream in (1, 2)}
    with open(os.devnull, "wb") as nowhere:
        for stream in kept:
            os.dup2(nowhere.fileno(), stream)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, copy in kept.items():
            os.dup2(copy, stream)
            os.close(copy)


@dataclass(frozen=True)
class Workers:
    """The pool: how many workers, and what each of them holds."""

    least: int
    first: int  # to begin with: those that there is room for now
    most: int
    cpus: int
    gpus: float
    memory: int  # bytes of images that it holds

    def __str__(self) -> str:
        count = f"{self.first}" if self.least == self.most else f"{self.first} ({self.least} to {self.most})"
        kind = f"{self.gpus:g} GPU" if self.gpus else f"{self.cpus} CPU thread{'s' * (self.cpus > 1)}"
        return f"{count} worker{'s' * (self.most > 1)} with {kind}"


def size_workers(settings: WorkerSettings, shards: int) -> Workers:
    """The pool for this cluster and `shards` of work: what the settings say, else on this machine all that
    there is room for, and on a cluster as many as it has room for from time to time.
    """
    resources = ray.cluster_resources()
    cluster_cpus, cluster_gpus = int(resources.get("CPU", 1)), resources.get("GPU", 0)
    gpus = settings.gpus_per_worker
    if gpus is None:
        gpus = float(cluster_gpus > 0 and settings.engine != "native")
    free = max(1, cluster_cpus - 1 - settings.decoders)  # one CPU is left for Ray itself
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = [node for node in alive if node.get("CPU", 0)] or alive  # a head often has none, and so no worker either
    if gpus:
        cpus = min((gpu_share(node, gpus) for node in nodes if node.get("GPU", 0) >= gpus), default=1)
    else:
        cpus = min(CPUS, free, *(int(node.get("CPU", 1)) for node in nodes))
    if not ray_address(settings):
        cpus = min(cpus, free)
    cpus = settings.cpus_per_worker or max(1, cpus)
    room = max(1, sum(fitting(node.get("GPU", 0), gpus) for node in nodes) if gpus else free // cpus)
    if not ray_address(settings) and not any(
        node.get("CPU", 0) - settings.decoders >= cpus and node.get("GPU", 0) >= gpus for node in nodes
    ):
        have = f"{cluster_cpus - 1} CPUs and {cluster_gpus:g} GPUs"
        have += f" and is to have {settings.decoders} decoders" * (settings.decoders > 0)
        raise ConfigurationError(
            f"no worker with {cpus} CPUs and {gpus:g} GPUs fits this machine, which has {have}; "
            "see --cpus-per-worker, --gpus-per-worker, --decoders and --ray-address"
        )
    if ray_address(settings):  # it may grow, and has others to serve once shards run out
        least, most = worker_range(settings.workers) or (1, shards)
    else:
        least, most = (min(count, room) for count in worker_range(settings.workers) or (room, room))
    least, most = min(least, shards), min(most, shards)
    memory = settings.memory or image_memory(nodes, cpus)
    return Workers(least, min(max(least, room), most), most, cpus, gpus, memory)


def gpu_share(node: dict[str, float], gpus: float) -> int:
    """CPUs of a node, but for one that is left to Ray, for each worker with so many GPUs that fits on it."""
    return int(node.get("CPU", 1) - 1) // max(1, fitting(node["GPU"], gpus))


def fitting(there: float, gpus: float) -> int:
    """How many workers of so many GPUs, or such a part of one, a node has place for; none has parts of two."""
    return int(there) * int(1 / gpus) if gpus < 1 else int(there / gpus)


def image_memory(nodes: list[dict[str, float]], cpus: int) -> int:
    """Bytes of images for a worker of so many CPUs: a part of what they stand for on the node that has least."""
    share = min(node.get("memory", 0) * min(1, cpus / node.get("CPU", 1)) for node in nodes)
    least, most = IMAGE_MEMORY
    return int(min(max(least, share / 8), most))
