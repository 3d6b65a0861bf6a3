"""The page as one file: the template with numbers in words, and a policy by which a browser runs nothing but its own.

Whatever comes from an image, a label or an object name is escaped by the template (autoescape). If that ever had a
hole, the page's Content-Security-Policy, which allows one script and one style by their hashes, would still run nothing
and fetch nothing.
"""

import base64
import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from jobs.display import size
from jobs.page.figures import BUCKETS, CLASSES, Figures
from jobs.page.gallery import Group
from jobs.page.runs import Runs, moment
from model.labels import Colour
from pipeline.filesystems import public_url

FOLDER = Path(__file__).parent
POLICY = (
    "default-src 'none'; img-src data:; style-src '{style}'; script-src '{script}'; base-uri 'none'; form-action 'none'"
)
LONGEST = 400  # characters of a name that are shown
CUT = "…"
NONE = "\N{EN DASH}"
ADDRESS = re.compile(r"\w+://[^\s'\"]+")  # in a text, where it may have a password or a signature
# what a reader would not see, or what would have him read other text than there is (control and bidirectional ones)
INVISIBLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]")


@dataclass(frozen=True)
class Page:
    """All that the template shows."""

    output: str
    figures: Figures
    runs: Runs
    groups: list[Group]
    colours: Mapping[str, Colour]  # of a class by its name, as far as masks have said
    price: float | None  # dollars an hour
    note: str  # on which rows count


def render(page: Page) -> str:
    """The HTML."""
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "percent": percent,
        "bytes": size,
        "duration": duration,
        "dollars": dollars,
        "decimal": decimal,
        "amount": amount,
        "moment": moment,
        "name": name,
        "place": place,
        "last": last,
        "megapixels": megapixels,
    }
    script, style = ((FOLDER / f"report.{kind}").read_text(encoding="utf-8") for kind in ("js", "css"))
    return environment.get_template("report.html").render(
        page=page,
        figures=page.figures,
        runs=page.runs,
        most_classes=CLASSES,
        most_buckets=BUCKETS,
        made=moment(datetime.now(UTC).isoformat()),
        policy=POLICY.format(script=digest(script), style=digest(style)),
        script=Markup(script),  # noqa: S704  (our own files)
        style=Markup(style),  # noqa: S704
    )


def digest(text: str) -> str:
    """The hash by which a Content-Security-Policy allows an inline element with this text (CSP Level 3, 2.3.1)."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def number(value: float) -> str:
    return f"{value:,.0f}"


def decimal(value: float | None, digits: int = 1) -> str:
    return f"{value:,.{digits}f}" if value is not None and math.isfinite(value) else NONE


def amount(count: float) -> str:
    """A number of which three digits matter: 3,072, 8.5 million."""
    for unit, name_of_it in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if count >= unit:
            return f"{count / unit:,.1f} {name_of_it}"
    return number(count)


def percent(share: float) -> str:
    """12.3 %, and never 0 or 100 for what is more than nothing or less than all."""
    if 0 < share < 0.0005:
        return "< 0.1 %"
    if 0.9995 <= share < 1:
        return "> 99.9 %"
    return f"{100 * share:.1f} %" if 0 < share < 1 else f"{100 * share:.0f} %"


def duration(seconds: float) -> str:
    """As one would say it: 0.4 s, 5 min 12 s, 3 h 20 min, 4 d 2 h."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    parts = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    left = round(seconds)
    for (unit, length), (below, part) in pairwise(parts):
        if left >= length:
            rest = left % length // part
            return f"{left // length:,} {unit}" + (f" {rest} {below}" if rest else "")
    return f"{left} s"


def dollars(amount: float) -> str:
    """$1,234.50; of less than a dollar two digits that say something."""
    if amount >= 1 or amount == 0:
        return f"${amount:,.2f}"
    return f"${amount:.2g}" if amount >= 0.0001 else "< $0.0001"


def megapixels(octave: int) -> str:
    """Sizes from 2**octave megapixels to twice that."""
    low, high = 2.0**octave, 2.0 ** (octave + 1)
    return f"{low * 1e6:,.0f} to {high * 1e6:,.0f} pixels" if high < 0.01 else f"{low:.3g} to {high:.3g} MP"


def name(text: str) -> str:
    """A name or text from anywhere as it is to be read: nothing in it that may be secret, what is invisible as its
    code, the middle of a long one left out."""
    open_to_all = ADDRESS.sub(lambda found: public_url(found[0]), text)
    seen = INVISIBLE.sub(lambda found: f"\\u{ord(found[0]):04x}", open_to_all)
    half = LONGEST // 2
    return seen if len(seen) <= LONGEST else f"{seen[:half]}{CUT}{seen[-half:]}"


def place(uri: str) -> str:
    """The same of a URI, without what may be secret in it."""
    return name(public_url(uri))


def last(uri: str) -> str:
    """The last part of a URI."""
    return name(public_url(uri).rstrip("/").rpartition("/")[2] or uri)
