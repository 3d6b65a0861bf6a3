"""Names of files that follow the URIs of images: below where they are put, and never the same for two images.

A name comes from a collection, so it may be anything: `../../etc/passwd`, a kilobyte long, a control character. What a
file's name should not have is written as % and its UTF-8 bytes in hexadecimal, `%` too, so that no two names become
one; what is too long is cut and ends in its SHA-256, behind `%~`, which nothing else is written as.

Letters stay what they are. So file systems that ignore case, or how an accent is composed, take `a.jpg` and `A.jpg` for
one, and Windows refuses a few names (`CON`, a dot at the end).
"""

import hashlib
from os.path import commonprefix

RESERVED = '%#<>:"\\|?*'  # by some file system, or with a meaning in URLs
LONGEST = 200  # bytes of one part: file systems take 255, of which a file that is being written needs some
LONGEST_NAME = 700  # bytes of all parts: S3 takes 1,024, with the prefix of where they go
CHANGED = "%~"  # a plain name that begins so is not as it is


def common_root(first: str, last: str) -> str:
    """The folder, with its `/`, that is common to all URIs from `first` to `last` in order; "" where there is none."""
    folder, slash, _ = commonprefix([first, last]).rpartition("/")  # noqa: RUF071  (of letters)
    return folder + slash


def safe_name(uri: str, root: str, suffix: str) -> str:
    """The name, with `/` between folders, of a file that belongs to an image below `root`; it ends in `suffix`."""
    *folders, last = uri.removeprefix(root).split("/")
    # a folder must not have the name that the file of an image beside it could have
    parts = [safe_part(f"{folder}/" if suffix and folder.lower().endswith(suffix) else folder) for folder in folders]
    parts.append(safe_part(last, suffix))
    name = "/".join(parts)
    if len(name.encode()) <= LONGEST_NAME:
        return name
    return f"%~{digest(uri)}/{parts[-1]}"


def plain_name(uri: str, root: str) -> str:
    """The name of an image below `root` as it is, for who looks for it there; where that would lead elsewhere the safe
    one, in a folder `%~`, where no image is as it is.
    """
    name = uri.removeprefix(root)
    leads_elsewhere = any(part in ("", ".", "..") for part in name.split("/")) or "\0" in name or "\\" in name
    return f"{CHANGED}/{safe_name(uri, root, '')}" if leads_elsewhere or name.startswith(CHANGED) else name


def safe_part(text: str, suffix: str = "") -> str:
    """One part of a name. No two texts give the same, nor `.`, `..` or nothing."""
    kept = "".join(letter if is_plain(letter) else escaped(letter) for letter in text)
    if text in (".", ".."):
        kept = text.replace(".", "%2E")
    room = LONGEST - len(suffix)
    if len(kept.encode()) > room:
        mark = f"%~{digest(text)}"
        kept = kept.encode()[: room - len(mark)].decode(errors="ignore") + mark
    return (kept or "%2F") + suffix


def is_plain(letter: str) -> bool:
    return letter.isprintable() and letter not in RESERVED and letter != "/"


def escaped(letter: str) -> str:
    return "".join(f"%{byte:02X}" for byte in letter.encode(errors="surrogatepass"))


def digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:32]


def printable(text: str) -> str:
    """`text` with all but line ends spelled out that a terminal would obey: it may come from a name."""
    return "".join(one if one.isprintable() or one == "\n" else repr(one)[1:-1] for one in text)
