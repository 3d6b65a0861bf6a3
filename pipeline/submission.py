"""A job of Ray's own job server: submitted, followed, and what its driver said at the end.

What is sent is only what the job needs: the code and one file of settings. A file, as a command line is shown to
everyone who may look at the cluster, and a shell reads it.
"""

import asyncio
import contextlib
import json
import logging
import os
import re
import shlex
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.attempts import ERRORS, reason
from pipeline.config import ConfigurationError

ROOT = Path(__file__).parent.parent
PACKAGES = ("pipeline", "model", "jobs")
SENT = (
    ".py",
    ".so",  # the kernels where they are built: nodes are machines of the same kind
    ".html",
    ".css",
    ".js",
)
NOT_SENT = ("bench",)
SETTINGS = "settings.yaml"
EXIT_CODE = "swath: exit code"  # how the last line of a job's log begins
BEYOND_GRACE = 60  # seconds that a stopped job has to write what it has done, on top of its grace
CONNECTED_WITHIN = 10  # seconds
ENDED_WITHIN = 5.0  # seconds from the end of a job's log to its status; later the log goes on
LOOKED_EVERY = 0.5  # seconds
LOST_AFTER = 300.0  # seconds without an answer of the job server: a head that has gone does not come back


@dataclass(frozen=True)
class Work:
    """What a job is to do: `swath NAME` with these settings."""

    name: str
    settings: Mapping[str, Any]
    grace: float  # seconds that it takes to stop
    is_installed: bool  # the nodes have the code


def submission_id() -> str | None:
    """The id under which this process was submitted, where it is the driver of a Ray job."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    return job.get("metadata", {}).get("job_submission_id")


def connect(address: str | None) -> Any:
    """Ray's client of the job server at `address`. Raises `ConfigurationError` within seconds."""
    import requests  # noqa: PLC0415  (these take a second, for which help and a wrong option need not wait)
    from ray.exceptions import AuthenticationError  # noqa: PLC0415
    from ray.job_submission import JobSubmissionClient  # noqa: PLC0415

    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or ""
    if not re.match(r"https?://[^/]", address):
        raise ConfigurationError(
            f"ray_address: expected the address of the cluster's dashboard (http://HEAD:8265) (got {address!r})"
        )
    address = address.rstrip("/")
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # else Ray prefers RAY_ADDRESS to the one that it is given
    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(logging.ERROR)  # else it says of each step that it is one
    try:
        requests.get(f"{address}/api/version", timeout=CONNECTED_WITHIN)  # Ray itself waits for minutes
        return JobSubmissionClient(address)
    except AuthenticationError:
        raise ConfigurationError(
            f"the Ray cluster at {address} wants a token, or another one; "
            "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        ) from None
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise ConfigurationError(f"no Ray job server at {address} ({reason(error)}); see --ray-address") from None


def submit(client: Any, work: Work, name: str | None, variables: Mapping[str, str], metadata: Mapping[str, str]) -> str:
    """Send the code and the settings, and begin the job; its submission id."""
    # `exec`, so that there is no shell between Ray and the driver when the job is stopped
    entrypoint = f"exec python -m jobs {shlex.quote(work.name)} --config {SETTINGS}"
    patience = {"RAY_JOB_STOP_WAIT_TIME_S": str(round(work.grace) + BEYOND_GRACE)}
    with tempfile.TemporaryDirectory() as folder:
        pack(work, Path(folder))
        try:
            return client.submit_job(
                entrypoint=entrypoint,
                submission_id=name,
                runtime_env={"working_dir": folder, "env_vars": patience | dict(variables)},
                metadata=dict(metadata),
            )
        except (OSError, RuntimeError, ValueError) as error:
            why = next((line for line in reversed(str(error).strip().splitlines()) if "Error: " in line), reason(error))
            raise ConfigurationError(f"the Ray cluster has refused the job ({why.strip()})") from None


def pack(work: Work, folder: Path) -> None:
    """Put into an empty folder what the nodes are to have."""
    (folder / SETTINGS).write_text(yaml.safe_dump(dict(work.settings), sort_keys=False))
    if work.is_installed:
        return
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*")):
            name = path.relative_to(ROOT)
            if path.suffix in SENT and not set(NOT_SENT) & set(name.parts):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, folder / name)


def follow(client: Any, job: str, show: Callable[[str], None]) -> int:
    """Show the job's log as it grows, to its end; the exit code of its driver.

    A connection that breaks is made anew, and what was shown before is not shown again. Raises `ConnectionError` when
    the job server has not answered for `LOST_AFTER`, or knows the job no more.
    """
    shown, last = 0, ""
    silent_since: float | None = None  # by the monotonic clock

    def show_new(text: str, before: int) -> None:
        """Of a part of the log, which begins so many characters after the log's own beginning."""
        nonlocal shown, last
        if new := text[max(0, shown - before) :]:
            shown, last = before + len(text), (last + new)[-1000:]
            show(new)

    async def tail() -> None:
        seen = 0
        async for text in client.tail_job_logs(job):
            show_new(text, seen)
            seen += len(text)

    while True:
        with contextlib.suppress(*ERRORS, RuntimeError):
            asyncio.run(tail())
        deadline = time.monotonic() + ENDED_WITHIN
        while True:
            try:
                info = client.get_job_info(job)
                silent_since = None
                if info.status.is_terminal():
                    show_new(client.get_job_logs(job), 0)  # for the connection may have broken before its end
                    return exit_code(info, last)
            except (*ERRORS, RuntimeError) as error:
                if "status code 404" in str(error):  # a head that is another one by now
                    raise ConnectionError(f"the job server knows no job {job}") from None
                silent_since = silent_since or time.monotonic()
                if time.monotonic() - silent_since > LOST_AFTER:
                    silence = f"the job server has not answered for {LOST_AFTER:g} s ({reason(error)})"
                    raise ConnectionError(f"{silence}; the job {job} may go on") from None
            if time.monotonic() > deadline:
                break
            time.sleep(LOOKED_EVERY)


def exit_code(info: Any, log: str) -> int:
    """What the driver has returned. Of a job that was stopped Ray does not know it, but the log says it, unless the
    driver had not begun to listen, or did not end in time."""
    said = re.findall(rf"^{EXIT_CODE} (\d+)$", log, re.MULTILINE)
    code = info.driver_exit_code
    if code is None and said:
        return int(said[-1])
    if code is None:
        return 128 + signal.SIGTERM if info.status == "STOPPED" else 1
    return code if code >= 0 else 128 - code  # as a shell counts signals
