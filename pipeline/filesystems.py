"""fsspec's file systems, opened as the settings say, and the version that each gives to what it holds."""

import errno
import os
import re
import stat
from collections.abc import Mapping
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.utils import get_protocol

from pipeline.config import StorageSettings

S3_OPTIONS: dict[str, Any] = {
    "connect_timeout": 5,  # seconds
    "read_timeout": 30,
    "retries": {"total_max_attempts": 1},  # `attempts` tries again
    "max_pool_connections": 128,
    "request_checksum_calculation": "when_required",  # servers other than AWS refuse botocore's newer default
    "response_checksum_validation": "when_required",
}

WEB = re.compile(r"\bhttps?://", re.IGNORECASE)  # itself, or behind a cache
USER = re.compile(r"(\bhttps?://)[^/]*@", re.IGNORECASE)
PASSWORD = re.compile(r"://[^/:@]*:[^/]*@")


def open_filesystem(url: str, settings: StorageSettings) -> tuple[AbstractFileSystem, str]:
    """The file system behind a URL, and its own path of it. Raises whatever that finds wrong with them."""
    filesystem, path = url_to_fs(url, **storage_options(url, settings))
    if "s3" in filesystem.protocol:
        filesystem.retries = 1  # `attempts` tries again
    return filesystem, path


def storage_options(url: str, settings: StorageSettings) -> dict[str, Any]:
    """What fsspec is told about the store behind `url`."""
    protocol = get_protocol(url)
    protocol = "s3" if protocol == "s3a" else protocol
    given = {key.partition(".")[2]: value for key, value in settings.storage_option.items() if is_for(key, protocol)}
    if protocol != "s3":
        return given
    region = settings.region or os.environ.get("AWS_REGION")  # which botocore itself does not read
    client = {"region_name": region} if region else {}
    return {
        "anon": settings.anonymous,
        "endpoint_url": settings.endpoint_url,
        "client_kwargs": client,
        "config_kwargs": S3_OPTIONS,
        "use_listings_cache": False,
    } | given


def is_for(key: str, protocol: str) -> bool:
    return key.partition(".")[0] == protocol


def is_plain(filesystem: AbstractFileSystem) -> bool:
    """Whether what comes from an S3 server is protected by nothing on its way."""
    if "s3" not in filesystem.protocol:
        return False
    filesystem.connect()
    return filesystem.s3.meta.endpoint_url.startswith("http://")


def regular_file(path: str) -> os.stat_result | None:
    """The file at `path` or behind its symbolic links; None for a folder, for what is gone, and for a pipe or socket,
    whose reading would never end. Raises OSError where that cannot be told."""
    try:
        found = os.stat(path)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
            raise
        return None
    except ValueError:  # no file has a name with a NUL in it
        return None
    return found if stat.S_ISREG(found.st_mode) else None


def local_etag(file: os.stat_result) -> str:
    """What a local file has in place of an etag: its size and its time of change."""
    return f"{file.st_size}-{file.st_mtime_ns}"


def etag_of(info: Mapping[str, Any]) -> str:
    """The store's own version of an object, or, where it has none, its size and the time of its change."""
    for key in ("ETag", "etag", "md5Hash", "content_md5", "version"):
        if info.get(key):
            return str(info[key]).strip('"')
    changed = info.get("last_modified") or info.get("updated") or info.get("LastModified") or ""
    return f"{info.get('size', 0)}-{changed}"


def public_url(url: str) -> str:
    """`url` without what may be secret: a password; of a web address its user, who may be a token, and its query."""
    if web := WEB.search(url):
        url = url[: web.end()] + url[web.end() :].partition("?")[0]
    return PASSWORD.sub("://", USER.sub(r"\1", url))
