"""Ray Train's workers, driven from one process: they are started, heard, stopped, and started again where one dies.

Ray Train starts the workers, connects them, and starts them again; states, logs and networks are this project's own, as
they go where everything goes here, through `Store`. The driver hears from the first worker through one small actor,
which is also where a worker hears that it is to stop: Train's own callbacks run in Train's process, not in this one.
"""

import os
import tempfile
import threading
import time
from typing import Any, Protocol

import ray
import ray.train
import ray.train.torch
import torch

from model.checkpoint import Checkpoint
from model.predictor import EngineError
from model.training import with_classes
from pipeline.cluster import image_memory, ray_address, ray_session
from pipeline.config import ConfigurationError
from pipeline.config_truth import FinetuneSettings
from pipeline.course import Course, UnfinishedError, read_result, states
from pipeline.crops import LostExampleError
from pipeline.learner import DivergedError, Place, learn
from pipeline.lease import Lease
from pipeline.stopping import Request, StoppedError, until_asked_to_end
from pipeline.storage import Store
from pipeline.wire import Wire

LOOKED_EVERY = 0.5  # seconds
FAILURES = 3  # times that workers are started again
HOPELESS = (DivergedError, ConfigurationError, LostExampleError, EngineError, torch.OutOfMemoryError)  # for any worker


class Listener(Protocol):
    """Whoever watches."""

    def say(self, text: str) -> None:
        """One line about what happens next."""

    def learning(self, step: int, steps: int, images: int, loss: float, best: float | None) -> None:
        """Steps that are done, of all; images in one, its loss, and the best mean IoU so far."""


def teach(
    settings: FinetuneSettings, course: Course, checkpoint: Checkpoint, out: Store, lease: Lease, listener: Listener
) -> None:
    """Have workers learn until there is a result. Raises `ConfigurationError`, `StoppedError`, `UnfinishedError`."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait in loops take the CPU from those that load
    again = f"run the same command again{', without --overwrite,' if settings.overwrite else ''} to go on"
    network = with_classes(checkpoint, course.labels, course.recipe.seed)
    with ray_session(settings), until_asked_to_end() as request, tempfile.TemporaryDirectory() as scratch:
        wire: Any = ray.remote(num_cpus=0)(Wire).remote()
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        scaling, threads, memory = size(settings, nodes, listener)
        job = ray.put((settings, course, network))
        trainer = ray.train.torch.TorchTrainer(
            work,
            train_loop_config={"wire": wire, "job": job, "threads": threads, "memory": memory},
            scaling_config=scaling,
            run_config=ray.train.RunConfig(
                name="swath", storage_path=scratch, failure_config=ray.train.FailureConfig(max_failures=FAILURES)
            ),
        )
        before = states(out)
        goes_on = f"from step {before[-1]:,}" if before else "from the beginning"
        listener.say(
            f"learning {course.recipe.steps:,} steps of {course.recipe.batch} crops from {course.examples:,} images, "
            f"{goes_on}; {course.validation:,} for validation; {told(scaling, threads)}"
        )
        error = watch(trainer, wire, course, request, lease, settings.grace, listener)
        _, failure = ray.get(wire.look.remote())
    lease.check()
    if read_result(out):
        return
    if request.number:
        done = states(out)
        kept = f"step {done[-1] if done else 0:,} of {course.recipe.steps:,}"
        raise StoppedError(request.number, f"stopped: {kept} is kept; {again}")
    raise UnfinishedError(failure or f"the workers failed {FAILURES + 1} times ({error}); {again}")


def work(config: dict[str, Any]) -> None:
    """What Ray Train has each worker do."""
    wire, (settings, course, checkpoint) = config["wire"], ray.get(config["job"])
    if ray.get(wire.look.remote())[1]:  # what cannot succeed is not tried again
        return
    context, device = ray.train.get_context(), ray.train.torch.get_device()
    place = Place(context.get_world_rank(), context.get_world_size(), str(device), config["threads"], config["memory"])
    try:
        learn(settings, course, checkpoint, place, lambda report: ray.get(wire.report.remote(report)))
    except HOPELESS as error:
        ray.get(wire.fail.remote(complaint(error)))
        raise


def complaint(error: Exception) -> str:
    """One line about what no other try would mend."""
    if isinstance(error, DivergedError):
        return f"{error}; give a lower --learning-rate, or a longer --warm-up, and --overwrite to begin anew"
    if isinstance(error, torch.OutOfMemoryError):
        return "the device's memory is too small; give a smaller --batch or --crop, and --overwrite to begin anew"
    return str(error)


def watch(
    trainer: Any, wire: Any, course: Course, request: Request, lease: Lease, grace: float, listener: Listener
) -> str:
    """Wait for the end, tell how far it is, and pass on that an end was asked for; what went wrong, if anything."""
    errors: list[str] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:  # whatever Ray Train makes of what workers raise
            errors.append(cause(error))

    def tell() -> None:
        report, _ = ray.get(wire.look.remote())
        if report:
            listener.learning(report.step, course.recipe.steps, course.recipe.batch, report.loss, report.best)

    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    asked = 0.0
    while thread.is_alive():
        thread.join(LOOKED_EVERY)
        tell()
        if request.number and not asked:
            asked = time.monotonic()
            listener.say(f"stopping: the step under way has {grace:g} s to end; once more to stop at once")
            ray.get(wire.stop.remote())
        if lease.lost or (asked and time.monotonic() - asked > grace):
            break
    tell()
    return errors[0] if errors else ""


def cause(error: Exception) -> str:
    """The last line of an error's text, where Ray has the cause."""
    return " ".join(str(error).strip().split("\n")[-1].split())[:300]


def size(
    settings: FinetuneSettings, nodes: list[dict[str, float]], listener: Listener
) -> tuple["ray.train.ScalingConfig", int, int]:
    """How many workers there are and what each has; its threads, and the bytes of images that it may keep. `nodes` are
    Ray's, as what each has of CPU, GPU and memory.

    Raises `ConfigurationError` for workers that this machine has no room for. A cluster may grow, so there they wait.
    """
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    workers = int(settings.workers) if settings.workers != "auto" else max(1, gpus)
    if settings.workers == "auto":
        workers = next(count for count in range(workers, 0, -1) if settings.batch % count == 0)
    if gpus:  # a CPU of each node is left to Ray
        cpus = int(min((node["CPU"] - 1) // node["GPU"] for node in nodes if node.get("GPU")))
        room = gpus
    else:
        beside = -(-workers // len(nodes))
        cpus = int(min(node["CPU"] - 1 for node in nodes) // beside)
        room = int(sum(node["CPU"] - 1 for node in nodes))
    cpus = max(1, cpus)
    if workers > room:
        what = f"{room} GPU{'s' * (room > 1)}" if gpus else f"{room} CPU{'s' * (room > 1)}"
        if not ray_address(settings):
            raise ConfigurationError(f"workers: {workers} are too many for this machine, which has {what}; give {room}")
        listener.say(f"waiting for room: {workers} workers, and the cluster has {what} now")
    needed = {"CPU": cpus} | ({"GPU": 1} if gpus else {})
    scaling = ray.train.ScalingConfig(num_workers=workers, use_gpu=bool(gpus), resources_per_worker=needed)
    return scaling, cpus, image_memory(nodes, cpus)


def told(scaling: "ray.train.ScalingConfig", threads: int) -> str:
    kind = "a GPU" if scaling.use_gpu else f"{threads} CPU thread{'s' * (threads > 1)}"
    return f"{scaling.num_workers} worker{'s' * (scaling.num_workers != 1)} with {kind}"
