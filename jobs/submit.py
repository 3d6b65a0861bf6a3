"""Run a job on a Ray cluster, from anywhere that reaches its dashboard.

COMMAND is any other job with its arguments, after --. What is wrong with them is said here, before anything is sent;
then the code and the settings go to the cluster, the job's log is shown here, and the exit code is the job's own.
Ctrl-C only leaves the log: the job goes on, and what stops it is said. A cluster that wants a token gets the one that
Ray's own tools would send: RAY_AUTH_MODE=token with RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.

  swath submit --ray-address http://head:8265 -- segment s3://in s3://out --checkpoint s3://models/b2 --workers 1:8
  swath submit --env AWS_ACCESS_KEY_ID --env AWS_SECRET_ACCESS_KEY -- retry s3://out
"""

import os
import sys

from pipeline import stopping
from pipeline.config import ConfigurationError, SubmitSettings, absolute

SETTINGS = SubmitSettings
PLACES = ("input", "output", "run")  # settings that are absolute when they are checked
LOCAL = ("demo", "submit")  # jobs that are not for a cluster


def run(settings: SubmitSettings) -> int:
    from jobs.cli import read_command
    from pipeline.filesystems import public_url
    from pipeline.submission import Work, connect, follow, submit

    name, values, checked = read_command(settings.command)
    if name in LOCAL:
        raise ConfigurationError(f"command: swath {name} is not for a cluster; run it here")
    if getattr(checked, "ray_address", None):
        raise ConfigurationError("--ray-address stands before --, as a job runs on the cluster that it is sent to")
    values |= {place: getattr(checked, place) for place in PLACES if place in values}
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    if "://" not in values.get("checkpoint", "://"):
        values["checkpoint"] = absolute(values["checkpoint"])
    variables = dict(map(variable, settings.env))
    places = {
        key: ", ".join(map(public_url, [value] if isinstance(value, str) else value))
        for key, value in values.items()
        if key in PLACES
    }
    client = connect(settings.ray_address)
    work = Work(name, values, getattr(checked, "grace", 0), settings.installed)
    job = submit(client, work, settings.submission_id, variables, {"command": f"swath {name}"} | places)
    say(f"submitted {job}")
    address = os.environ["RAY_API_SERVER_ADDRESS"]
    later = (
        f"to follow it:  ray job logs --follow --address {address} {job}\n"
        f"to stop it:    ray job stop --address {address} {job}"
    )
    if settings.no_wait:
        say(later)
        return 0
    try:
        return follow(client, job, lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        say(f"\nthe job goes on\n{later}")
        return 128 + stopping.last


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def variable(text: str) -> tuple[str, str]:
    """NAME=VALUE as it is, NAME with the value that it has here."""
    name, is_given, value = text.partition("=")
    if not is_given and name not in os.environ:
        raise ConfigurationError(f"env: {name} is not set here; set it, or give --env {name}=VALUE")
    return name, value if is_given else os.environ[name]
