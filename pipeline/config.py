"""Every setting there is: its type, default, meaning, and the check that it passes before any work is done.

The same fields are the command line's options and a YAML file's keys. Each class is what one job needs; `jobs`
turns them into `--help`.
"""

import difflib
import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from pipeline.policy import Looks, checked_scales, parse_policy


class ConfigurationError(Exception):
    """A setting, input or output that cannot be used; the message is one line with the value and the remedy."""


GROUPS = (
    "Cluster",
    "Query",
    "Input",
    "Model",
    "Run",
    "Workers",
    "Storage",
    "Metrics",
    "Evaluation",
    "Ground truth",
    "Training",
    "Validation",
    "Report",
    "Export",
    "Demo",
)  # as help shows them


def option(default: Any, help: str, group: str, metavar: str | None = None) -> Any:
    """A setting that the command line shows under `group`, one of `GROUPS`."""
    return Field(default, description=help, json_schema_extra={"group": group, "metavar": metavar})


class StorageSettings(BaseModel):
    """How object stores are reached. Credentials come from the environment, as for every S3 client."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    endpoint_url: str | None = option(
        None, "S3 endpoint, for servers other than AWS (else AWS_ENDPOINT_URL)", "Storage", "URL"
    )
    region: str | None = option(
        None, "S3 region (else AWS_REGION, AWS_DEFAULT_REGION or the profile's)", "Storage", "NAME"
    )
    anonymous: bool = option(False, "use no credentials, for public buckets", "Storage")
    storage_option: Annotated[dict[str, str | int | float | bool], Field(repr=False)] = option(  # it may be secret
        {}, "any other fsspec option, as PROTOCOL.KEY=VALUE (gs.token=anon); repeatable", "Storage", "OPTION"
    )

    retry_seconds: float = option(
        120,
        "how long what the store fails to do is tried again, with growing pauses, before it is given up",
        "Storage",
        "N",
    )

    @field_validator("retry_seconds")
    @classmethod
    def _retry_seconds(cls, value: float) -> float:
        return seconds(value)

    @field_validator("storage_option", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        """From the command line a list of KEY=VALUE, from a file a mapping; values are typed as YAML types them."""
        pairs = dict(str(item).partition("=")[::2] for item in value) if isinstance(value, list) else value
        if not isinstance(pairs, dict):
            return pairs
        return {key: yaml.safe_load(text) if isinstance(text, str) else text for key, text in pairs.items()}

    @field_validator("storage_option")
    @classmethod
    def _dotted(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key in value:
            protocol, _, name = key.partition(".")
            if not protocol or not name:
                raise ValueError(f"expected PROTOCOL.KEY=VALUE, got the key {key!r}")
        return value


class ClusterSettings(StorageSettings):
    """Which machines work together."""

    ray_address: str | None = option(
        None, "Ray cluster to run on (default: RAY_ADDRESS, else a local Ray for this run)", "Workers", "ADDRESS"
    )


class ReadingSettings(ClusterSettings):
    """How a collection is read by them."""

    requests: int | None = option(
        None,
        "requests in flight to the object store, in each process (default: 32 for headers; for images 8, and up to "
        "128 as the store's latency wants)",
        "Input",
        "N",
    )

    @field_validator("requests")
    @classmethod
    def _at_least_one(cls, value: int | None) -> int | None:
        return value if value is None else positive(value)


class IndexSettings(ReadingSettings):
    """What `swath index` needs: a collection, and where its index goes."""

    input: tuple[str, ...] = Field(
        description="the collection, one or several: a folder, bucket or prefix (s3://bucket/photos), a glob "
        "('s3://bucket/2026-*/*.jpg'), a tar or Parquet file with images in it, a manifest (CSV, JSON Lines or Parquet "
        "with URIs), the manifest.json of an S3 Inventory",
    )
    output: str = Field(description="where everything is written: any fsspec URL (/data/masks, s3://bucket/masks)")
    include: tuple[str, ...] = option(
        (),
        "only names below INPUT that match this pattern ('2026/*.jpg'; default: by image extension); an image in a tar "
        "is called FILE.tar#NAME, one in a manifest by its URI",
        "Input",
        "GLOB",
    )
    exclude: tuple[str, ...] = option((), "leave out names that match this pattern", "Input", "GLOB")
    uri_column: str | None = option(
        None, "column of a manifest that has the URIs (default: uri, url, path, file or image)", "Input", "NAME"
    )
    image_column: str | None = option(
        None,
        "column of Parquet files that has encoded images (default: image, bytes, jpg or the like)",
        "Input",
        "NAME",
    )

    @field_validator("input", "include", "exclude", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("input")
    @classmethod
    def _inputs(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("must not be empty")
        return tuple(map(absolute, value))

    @field_validator("output")
    @classmethod
    def _output(cls, value: str) -> str:
        return absolute(value)


class PlanSettings(IndexSettings):
    """What `swath plan` needs on top: the network, and how images become batches and shards."""

    checkpoint: str = option(
        ...,
        "SegFormer weights: a Hugging Face folder, a .safetensors, .bin or .pth file, or hf://OWNER/NAME",
        "Model",
        "URL",
    )
    policy: str = option(
        "short=512",
        "network input size: short=N keeps the aspect, exact=HEIGHTxWIDTH does not, native scales nothing and sees "
        "large images through windows (native=WINDOW+OVERLAP)",
        "Model",
        "POLICY",
    )
    flip: bool = option(
        False,
        "have the network see each image mirrored too, and average what it says: twice the work, and on the demo's "
        "scenes a mean IoU of 0.922, not 0.920 (python -m jobs.bench.looks)",
        "Model",
    )
    scales: tuple[float, ...] = option(
        (1.0,),
        "have it see each image at all of these factors on the size of --policy, and average; the work is the sum of "
        "their squares: 0.75,1,1.25 is 3.1 times as much and reaches 0.926, with --flip 6.3 times and 0.928; sizes "
        "beyond those of its training do harm (default: 1)",
        "Model",
        "FACTORS",
    )
    max_pixels: int = option(
        100_000_000, "an image with more pixels gets a row with status too_large and is not decoded", "Model", "N"
    )
    allow_truncated: bool = option(
        False, "make a mask of what can be read of a damaged image (default: a row with status unreadable)", "Model"
    )
    scaled_decoding: bool = option(
        False,
        "decode JPEGs that the policy shrinks to half or less at a half, a quarter or an eighth of their size, which "
        "is faster and changes a few pixels of a mask in a thousand",
        "Model",
    )
    precision: Literal["float32", "bfloat16"] = option(
        "float32",
        "of the matrix products: float32, or bfloat16, which is much faster on GPUs and CPUs that have it and changes "
        "a few pixels of a mask in a thousand",
        "Model",
        "NAME",
    )
    batch_pixels: int | None = option(
        None,
        "network input pixels in one batch (default: 512x512, so mostly one image; on a GPU by its memory)",
        "Model",
        "N",
    )
    shard_images: int | None = option(
        None,
        "images in one shard, one Parquet file, which is what a retry repeats; fewer if large (default: 64 to 1024)",
        "Run",
        "N",
    )

    @field_validator("policy")
    @classmethod
    def _known_policy(cls, value: str) -> str:
        return str(parse_policy(value))

    @field_validator("scales", mode="before")
    @classmethod
    def _factors(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else value

    @field_validator("scales")
    @classmethod
    def _scales(cls, value: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        return checked_scales(value, parse_policy(info.data["policy"])) if "policy" in info.data else value

    @field_validator("max_pixels", "batch_pixels", "shard_images")
    @classmethod
    def _positive(cls, value: int | None) -> int | None:
        return value if value is None else positive(value)

    @property
    def looks(self) -> Looks:
        """How often the network sees an image."""
        return Looks(self.flip, self.scales)

    def mask_settings(self) -> dict[str, Any]:
        """The settings that decide what becomes of an image: a part of `model_version`.

        One that came later is there only where it is not the default, so that what older versions have done is done.
        """
        found: dict[str, Any] = {
            "policy": self.policy,
            "max_pixels": self.max_pixels,
            "allow_truncated": self.allow_truncated,
            "scaled_decoding": self.scaled_decoding,
            "image_column": self.image_column,
            "precision": self.precision,
        }
        if self.flip:
            found["flip"] = True
        if self.scales != (1.0,):
            found["scales"] = list(self.scales)
        return found


class MetricsSettings(BaseModel):
    """Where Prometheus finds a run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metrics_host: str = option("127.0.0.1", "address that the metrics endpoint binds to", "Metrics", "HOST")
    metrics_port: int = option(0, "port of the metrics endpoint (default: 0, any free one)", "Metrics", "PORT")
    metrics_linger: float = option(
        0,
        "seconds that the last metrics stay there when a run has ended, so that its totals are scraped: two of "
        "Prometheus' scrape intervals or more (default: 0)",
        "Metrics",
        "N",
    )

    @field_validator("metrics_port")
    @classmethod
    def _port(cls, value: int) -> int:
        if not 0 <= value <= 65535:
            raise ValueError("must be from 0 to 65535")
        return value

    @field_validator("metrics_linger")
    @classmethod
    def _linger(cls, value: float) -> float:
        return seconds(value)


class WorkerSettings(ReadingSettings, MetricsSettings):
    """The machines that segment."""

    grace: float = option(
        25,
        "seconds that shards under way have to end in when the run is stopped by Ctrl-C or SIGTERM; what is not done "
        "by then is done when the run goes on",
        "Run",
        "N",
    )
    workers: str = option(
        "auto",
        "how many model workers: N; MIN:MAX, as shards wait and nodes have room; or auto: on this machine one a GPU or "
        "all CPUs, on a cluster from one to as many as it ever has room for",
        "Workers",
        "N",
    )
    engine: Literal["auto", "native", "torch", "compiled"] = option(
        "auto",
        "what computes the network: native (CPU kernels), torch, or compiled (by torch.compile, once for each shape); "
        "their masks are the same but for rounding (default: auto, the fastest that is there)",
        "Workers",
        "NAME",
    )
    cpus_per_worker: int | None = option(
        None,
        "CPUs of a worker, and its threads that decode, that encode and, without a GPU, that run the network "
        "(default: up to 4; with a GPU its share of the machine)",
        "Workers",
        "N",
    )
    decoders: int = option(
        0,
        "actors of one CPU each that fetch and decode for the workers, for GPU hosts with few CPUs beside CPU hosts "
        "with many; the masks are the same (default: 0, the workers do it themselves)",
        "Workers",
        "N",
    )
    prefetch: int = option(2, "batches that wait decoded for the network, in each worker", "Workers", "N")
    memory: int | None = option(
        None,
        "bytes of images that a worker holds at once, from the request to the encoded mask, unless one alone takes "
        "more (default: an eighth of its share of the memory that Ray has, from 256 MB to 4 GB)",
        "Workers",
        "BYTES",
    )
    gpus_per_worker: float | None = option(
        None,
        "GPUs of a worker, 0.5 for two on one (default: 1 where there are any, else 0; 0 with --engine native)",
        "Workers",
        "N",
    )

    @field_validator("workers", mode="before")
    @classmethod
    def _workers(cls, value: Any) -> str:
        worker_range(str(value))
        return str(value)

    @field_validator("cpus_per_worker", "prefetch", "memory")
    @classmethod
    def _counts(cls, value: int | None) -> int | None:
        return value if value is None else positive(value)

    @field_validator("decoders")
    @classmethod
    def _decoders(cls, value: int) -> int:
        if value < 0:
            raise ValueError("must be 0 or more")
        return value

    @field_validator("grace")
    @classmethod
    def _grace(cls, value: float) -> float:
        return seconds(value)

    @field_validator("gpus_per_worker")
    @classmethod
    def _gpus(cls, value: float | None) -> float | None:
        if value is not None and not 0 <= value <= 1 and not (value > 1 and value.is_integer()):
            raise ValueError("must be 0 or more, and whole above 1, as Ray gives no worker one GPU and a half")
        return value


class NightlySettings(PlanSettings, WorkerSettings):
    """What `swath nightly` needs on top: the machines."""


class SegmentSettings(NightlySettings):
    """What `swath segment` needs on top: the run."""

    run_id: str | None = option(
        None,
        "name of the run; the same id resumes it (default: an unfinished run, else a new one by the clock)",
        "Run",
        "ID",
    )

    @field_validator("run_id")
    @classmethod
    def _plain_name(cls, value: str | None) -> str | None:
        return value if value is None else plain_name(value)


class RunArgument(BaseModel):
    """A run that is there already."""

    run: str = Field(description="a run (s3://bucket/masks/runs/ID), or where segment writes, for its newest run")

    @field_validator("run")
    @classmethod
    def _run(cls, value: str) -> str:
        return absolute(value)


class StatusSettings(RunArgument, StorageSettings):
    """What `swath status` needs."""

    as_json: bool = Field(
        default=False,
        alias="json",  # a name that pydantic's own classes have taken
        description="print one JSON object, for scripts",
        json_schema_extra={"group": "Run", "metavar": None},
    )


class RetrySettings(RunArgument, WorkerSettings):
    """What `swath retry` needs on top of the run's own settings, which are in its record."""

    unreadable: bool = option(False, "also images whose status is unreadable, not only missing and failed", "Run")
    checkpoint: str | None = option(
        None, "the same SegFormer weights, where they have moved (default: where the run had them)", "Model", "URL"
    )


class OutputArgument(BaseModel):
    """What is there already."""

    output: str = Field(description="where segment has written: any fsspec URL (/data/masks, s3://bucket/masks)")

    @field_validator("output")
    @classmethod
    def _output(cls, value: str) -> str:
        return absolute(value)


class VerifySettings(OutputArgument, ClusterSettings):
    """What `swath verify` needs."""


class ViewsSettings(OutputArgument, StorageSettings):
    """What `swath views` needs."""


class QuerySettings(OutputArgument, StorageSettings):
    """What `swath query` needs."""

    sql: str = Field("", description="what is asked, in DuckDB's SQL; without it the views are listed")
    file: str | None = option(
        None,
        "an SQL file, each paragraph of which is a question, with its title in comment lines above",
        "Query",
        "FILE",
    )
    format: Literal["table", "csv", "json", "parquet"] = option(
        "table", "of the answer: table for a person (the first 200 rows), csv, json or parquet for all", "Query", "NAME"
    )


class ExportSettings(OutputArgument, StorageSettings):
    """What `swath export` needs."""

    dest: str = Field(description="where the export goes: any fsspec URL, empty or with an earlier export of the same")
    format: Literal["png", "coco", "huggingface"] = option(
        ...,
        "png (a folder of masks), coco (one JSON file, masks as run lengths) or huggingface (images and masks for "
        "datasets.load_dataset)",
        "Export",
        "NAME",
    )
    run_id: str | None = option(
        None, "all masks of this run (default: of each image the newest, of all finished runs)", "Export", "ID"
    )
    where: str | None = option(
        None, "only rows for which this SQL is true ('confidence > 0.9'; columns as in the output)", "Export", "SQL"
    )
    limit: int | None = option(None, "at most so many images, the first by URI", "Export", "N")
    overwrite: bool = option(False, "replace an earlier export of other rows or in another format", "Export")

    @field_validator("dest")
    @classmethod
    def _dest(cls, value: str) -> str:
        return absolute(value)

    @field_validator("limit")
    @classmethod
    def _limit(cls, value: int | None) -> int | None:
        return value if value is None else positive(value)


class ReportSettings(OutputArgument, StorageSettings):
    """What `swath report` needs."""

    to: str = option(
        "swath-report.html", "file of the page: a path or any fsspec URL that ends in .html", "Report", "URL"
    )
    price: float | None = option(
        None,
        "dollars that the whole cluster costs in an hour, for the cost of each run: this by the time from its workers' "
        "start to its record",
        "Report",
        "DOLLARS",
    )
    images: int = option(
        6,
        "images in each part of the gallery: least certain, most certain, random; of classes, each at its most, it has "
        "twice as many; 0 for no gallery",
        "Report",
        "N",
    )

    @field_validator("to")
    @classmethod
    def _to(cls, value: str) -> str:
        if not value.endswith(".html"):
            raise ValueError("must end in .html")
        return value

    @field_validator("price")
    @classmethod
    def _price(cls, value: float | None) -> float | None:
        if value is not None and not 0 <= value < float("inf"):
            raise ValueError("must be 0 or more")
        return value

    @field_validator("images")
    @classmethod
    def _images(cls, value: int) -> int:
        if not 0 <= value <= 50:
            raise ValueError("must be from 0 to 50")
        return value


class SubmitSettings(BaseModel):
    """What `swath submit` needs on top of the command that it submits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    command: tuple[str, ...] = Field(description="after --, the job and its arguments, as without submit")
    ray_address: str | None = option(
        None,
        "the cluster's dashboard, http://HEAD:8265 (default: RAY_API_SERVER_ADDRESS, else RAY_ADDRESS)",
        "Cluster",
        "URL",
    )
    env: Annotated[tuple[str, ...], Field(repr=False)] = option(  # it may be secret
        (),
        "an environment variable for the job and its workers, NAME=VALUE, or NAME for the value that it has here; "
        "whoever may use the cluster can read it; repeatable",
        "Cluster",
        "NAME",
    )
    installed: bool = option(False, "send no code: the cluster's nodes have this package", "Cluster")
    submission_id: str | None = option(None, "name of the Ray job (default: one that Ray makes)", "Cluster", "ID")
    no_wait: bool = option(False, "do not show the job's log and wait for its end", "Cluster")

    @field_validator("submission_id")
    @classmethod
    def _plain_name(cls, value: str | None) -> str | None:
        return value if value is None else plain_name(value)

    @field_validator("command")
    @classmethod
    def _command(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("must not be empty")
        return value

    @field_validator("env")
    @classmethod
    def _env(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            if not re.match(r"[A-Za-z_][A-Za-z0-9_]*(=|$)", text):
                raise ValueError("expected NAME or NAME=VALUE")
        return value


def mapping(value: Any) -> Any:
    """From the command line a list of KEY=VALUE, as it is from a file. Raises ValueError."""
    if not isinstance(value, list):
        return value
    if not all("=" in one for one in value):
        raise ValueError("expected KEY=VALUE")
    found: dict[str, str] = {}
    for key, meant in (one.split("=", 1) for one in value):
        if found.setdefault(key, meant) != meant:
            raise ValueError(f"{key} is given twice, as {found[key]} and as {meant}")
    return found


def absolute(url: str) -> str:
    """`url`, or a local path that means the same on every machine of a cluster. Raises ValueError."""
    if not url.strip():
        raise ValueError("must not be empty")
    protocol, _, rest = url.partition("://") if "://" in url else ("", "", url)
    if not protocol and re.match(r"[a-z0-9]+:/", url):
        raise ValueError("a URL has two slashes: s3://bucket/prefix")
    if protocol and re.match(r"[^/]*:[^/]*@", rest):
        raise ValueError("credentials in a URL would be in every row; use the environment or --storage-option")
    return url if protocol else os.path.abspath(os.path.expanduser(url))


def worker_range(text: str) -> tuple[int, int] | None:
    """(least, most) workers from "3" or "1:8"; None for "auto"; ValueError for anything else."""
    if text == "auto":
        return None
    low, _, high = text.partition(":")
    if not low.isdigit() or not (high or low).isdigit() or not 1 <= int(low) <= int(high or low):
        raise ValueError("expected N, MIN:MAX or auto (1:8)")
    return int(low), int(high or low)


def plain_name(value: str) -> str:
    """`value`, which may then be a part of any path or address. Raises ValueError."""
    if len(value) > 100 or not value.isascii() or not value.replace("-", "").replace("_", "").isalnum():
        raise ValueError("use letters, digits, - and _ only, at most 100")
    return value


def positive(value: int) -> int:
    if value < 1:
        raise ValueError("must be 1 or more")
    return value


def seconds(value: float) -> float:
    if not 0 <= value <= 86400:
        raise ValueError("must be from 0 to 86400 seconds")
    return value


S = TypeVar("S", bound=BaseModel)


def build(kind: type[S], values: Mapping[str, Any], files: Mapping[str, str] | None = None) -> S:
    """Settings of `kind` from `values`, or `ConfigurationError` with the first thing that is wrong.

    `files` says which values came from which file.
    """
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        source = f"{files[name]}: " if files and name in files else ""
        raise ConfigurationError(source + complaint(kind, name, first)) from None


def complaint(kind: type[BaseModel], name: str, error: Any) -> str:
    """One readable line about one invalid setting."""
    match error["type"]:
        case "extra_forbidden":
            known = [info.alias or field for field, info in kind.model_fields.items()]
            near = difflib.get_close_matches(name, known, n=1)
            return f"unknown setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else "; see --help")
        case "missing":
            return f"{name} is missing; see --help"
    message = error["msg"].removeprefix("Value error, ")
    got = (
        "" if "credential" in message or name in ("storage_option", "env") else f" (got {error['input']!r})"
    )  # may be secret
    return f"{name}: {message[:1].lower()}{message[1:]}{got}"


def read_yaml(path: str) -> dict[str, Any]:
    """The settings in a YAML file; keys may be written with - or _.

    Values stay text, as on the command line, and the settings give them their types: YAML 1.1 by itself would read
    `workers: 1:8` as the number 68.
    """
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.load(file, Loader=yaml.BaseLoader)  # noqa: S506  (it makes text, lists and mappings)
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigurationError(f"{path}: expected 'key: value' lines, found a {type(values).__name__}")
    named = {str(key).replace("-", "_"): value for key, value in values.items()}
    return {key: value for key, value in named.items() if value not in ("", "~", "null")}
