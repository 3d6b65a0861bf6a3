"""The command line: `swath JOB ...`. Options, YAML keys and checks all come from the settings in `pipeline.config`."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from jobs import (
    demo,
    evaluate,
    export,
    finetune,
    index,
    nightly,
    plan,
    query,
    report,
    retry,
    segment,
    status,
    submit,
    verify,
    views,
)
from pipeline import stopping
from pipeline.config import GROUPS, ConfigurationError, build, read_yaml

JOBS = {
    "segment": segment,
    "nightly": nightly,
    "index": index,
    "plan": plan,
    "status": status,
    "retry": retry,
    "verify": verify,
    "query": query,
    "views": views,
    "report": report,
    "export": export,
    "evaluate": evaluate,
    "finetune": finetune,
    "submit": submit,
    "demo": demo,
}
EPILOGUE = """\
Exit codes: 0 done, 1 the store or some shards failed (run again to go on), or status found a run that is not complete,
or verify something wrong, 2 a setting, the input or the checkpoint cannot be used, 3 another process does this run,
130 stopped by Ctrl-C, 143 by SIGTERM (run again to go on).
"""


class Parser(argparse.ArgumentParser):
    """argparse, but what is wrong is one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job that `arguments` (default: the process's own) name; the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)

    def work() -> int:
        name, _, settings = read_command(given)
        return JOBS[name].run(settings)

    code = guarded(work)
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:  # of a job that was stopped Ray keeps no exit code
        print(f"swath: exit code {code}", file=sys.stderr)
    return code


def read_command(given: Sequence[str]) -> tuple[str, dict[str, Any], Any]:
    """The job that is named, its settings as they were given in all, and the same checked.

    Ends the process for help and for what is no command; raises `ConfigurationError`.
    """
    parser = Parser(
        prog="swath",
        allow_abbrev=False,
        description="Segment image collections of any size into a Parquet table.",
        epilog=EPILOGUE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    jobs = parser.add_subparsers(title="jobs", dest="job", metavar="JOB", required=True)
    parsers = {name: add_job(jobs, name, job) for name, job in JOBS.items()}
    if not given or given[0] not in JOBS:
        parser.parse_args(given)  # help, or what is wrong
    name, own, inner = given[0], list(given[1:]), []
    if name == "submit" and "--" in own:
        own, inner = own[: own.index("--")], own[own.index("--") + 1 :]
    parsed = vars(parsers[name].parse_intermixed_args(own))  # INPUT --checkpoint C OUTPUT is fine too
    if inner:
        parsed["command"] = [*parsed.get("command", ()), *inner]
    return name, *read_settings(JOBS[name].SETTINGS, parsed)


def guarded(work: Callable[[], int]) -> int:
    """The exit code of `work`, with everything a person can act on said in one line."""
    stopping.install()  # so that what is done is kept
    try:
        return work()
    except ConfigurationError as error:
        print(f"swath: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("swath: interrupted; run the same command again to go on", file=sys.stderr)
        return 128 + stopping.last
    except Exception as error:
        if not (explained := explain(error)):
            raise
        code, message = explained
        print(f"swath: {message}", file=sys.stderr)
        return code


def explain(error: Exception) -> tuple[int, str] | None:
    """Exit code and words for what a job is known to raise; the classes come with what the job has imported."""
    import duckdb
    import pyarrow as pa

    from model.checkpoint import CheckpointError
    from pipeline.attempts import ERRORS, reason
    from pipeline.cluster import ClusterError
    from pipeline.course import UnfinishedError
    from pipeline.lease import HeldError
    from pipeline.run import IncompleteRunError
    from pipeline.stopping import StoppedError

    if isinstance(error, StoppedError):
        return 128 + error.number, str(error)
    if isinstance(error, (IncompleteRunError, UnfinishedError, ClusterError)):
        return 1, str(error)
    if isinstance(error, (CheckpointError, HeldError)):
        return 2 if isinstance(error, CheckpointError) else 3, f"error: {error}"
    if isinstance(error, (*ERRORS, pa.ArrowException, duckdb.Error)):  # a full disk, a store or a file of ours gone bad
        *_, last = str(error).strip().splitlines() or [""]
        said = last if "Traceback" in str(error) else reason(error)  # DuckDB quotes our own
        return 1, f"error: {type(error).__name__}: {said}"
    return None


def add_job(jobs: Any, name: str, job: Any) -> Parser:
    """One subcommand, its options grouped as the settings are."""
    summary, _, rest = job.__doc__.partition("\n")
    parser = jobs.add_parser(
        name,
        allow_abbrev=False,
        help=summary.rstrip("."),
        description=f"{summary}\n{rest}",
        epilog=EPILOGUE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    used = {info.json_schema_extra["group"] for info in job.SETTINGS.model_fields.values() if info.json_schema_extra}
    groups = {title: parser.add_argument_group(title) for title in GROUPS if title in used}
    for field, info in job.SETTINGS.model_fields.items():
        extra = info.json_schema_extra
        if extra is None:  # a positional argument, which may come from the file instead
            number, meaning = "?" if info.annotation is str else "*", info.description
            parser.add_argument(field, nargs=number, metavar=field.upper(), default=argparse.SUPPRESS, help=meaning)
            continue
        groups[extra["group"]].add_argument(f"--{(info.alias or field).replace('_', '-')}", **how_to_parse(info))
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these settings; options win over it")
    return parser


def how_to_parse(info: Any) -> dict[str, Any]:
    """argparse's arguments for one setting; the values stay text, and the settings check them."""
    default = info.default
    shown = (
        default is not PydanticUndefined and default not in (None, False, (), {}) and "(default" not in info.description
    )
    options: dict[str, Any] = {"default": argparse.SUPPRESS}
    options["help"] = (info.description + (f" (default: {default})" if shown else "")).replace("%", "%%")
    if info.annotation is bool:
        return options | {"action": "store_true"}
    if default in ((), {}):
        options["action"] = "append"
    return options | {"metavar": info.json_schema_extra["metavar"]}


def read_settings(kind: type[BaseModel], given: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Settings from the YAML file and the options, as they are and checked. Raises `ConfigurationError`."""
    if len(given.get("input", ())) > 1 and "output" not in given:
        *given["input"], given["output"] = given["input"]  # INPUT INPUT ... OUTPUT
    path = given.pop("config", None)
    file = read_yaml(path) if path else {}
    return file | given, build(kind, file | given, dict.fromkeys(set(file) - set(given), path))
