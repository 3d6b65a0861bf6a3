"""What a person sees while a job runs, and when it is done."""

import glob
import shlex
import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from pipeline.names import printable

PLAIN_EVERY = 5.0  # seconds between two lines where there is no terminal
REASONS_SHOWN = 8
EXAMPLE = (  # a question that any output answers: the classes, most pixels first
    "SELECT name, count(*) AS images, round(100 * avg(fraction), 1) AS percent, "
    "round(avg(confidence), 3) AS confidence FROM class_stats GROUP BY 1 ORDER BY 3 DESC"
)


class Display:
    """Progress as a live bar in a terminal, as plain lines elsewhere. Use it as a context manager."""

    def __init__(self) -> None:
        self.console = Console(file=sys.stderr, soft_wrap=True, highlight=False)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.tasks: dict[str, TaskID] = {}
        self.first: dict[str, tuple[float, int]] = {}  # when and at which count each kind of work was first seen
        self.printed = (0.0, ("", -1))  # when a plain line was last printed, of which work, and for how many

    def __enter__(self) -> "Display":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def say(self, text: str) -> None:
        self.console.print(plain(text))

    def listing(self, found: int) -> None:
        began, _ = self.first.setdefault("listing", (time.monotonic(), 0))
        if time.monotonic() - began >= PLAIN_EVERY:  # most are listed sooner
            self.show("listing", found, 0, "")

    def indexing(self, done: int, total: int) -> None:
        if total:
            self.show("reading headers", done, total, "")

    def segmenting(self, done: int, total: int, failures: int) -> None:
        self.show("segmenting", done, total, f"{failures:,} without a mask" if failures else "")

    def counting(self, done: int, total: int) -> None:
        began, _ = self.first.setdefault("counting", (time.monotonic(), 0))
        if time.monotonic() - began >= PLAIN_EVERY:  # most are counted sooner
            self.show("counting", done, total, "")

    def verifying(self, done: int, total: int) -> None:
        if total:
            self.show("verifying", done, total, "")

    def exporting(self, done: int, total: int) -> None:
        self.show("exporting", done, total, "")

    def evaluating(self, done: int, total: int) -> None:
        if total:
            self.show("evaluating", done, total, "")

    def drawing(self, done: int, total: int) -> None:
        self.show("drawing the gallery", done, total, "")

    def checking(self, done: int, total: int, left_out: int) -> None:
        self.show("checking pairs", done, total, f"{left_out:,} left out" if left_out else "")

    def learning(self, step: int, steps: int, images: int, loss: float, best: float | None) -> None:
        scores = "" if best is None else f"  best mean IoU {best:.3f}"
        self.show("learning: step", step, steps, f"loss {loss:.3f}{scores}", images)

    def show(self, work: str, done: int, total: int, note: str, images: int = 1) -> None:
        """`images` is how many each of what is counted stands for."""
        now = time.monotonic()
        began, already = self.first.setdefault(work, (now, done))
        rate = (done - already) / (now - began) if done > already else 0.0
        detail = "  ".join(filter(None, [f"{rate * images:,.1f} images/s" if rate else "", note]))
        if self.console.is_terminal:
            if work not in self.tasks:
                self.tasks[work] = self.bar.add_task(work, total=total or None, detail=detail)
            self.bar.update(self.tasks[work], completed=done, total=total or None, detail=detail)
        elif now - self.printed[0] >= PLAIN_EVERY or (done == total and self.printed[1] != (work, done)):
            self.printed = (now, (work, done))
            left = f"  ETA {clock((total - done) / rate)}" if rate and done < total else ""
            self.say("  ".join(filter(None, [f"{work} {done:,}" + (f"/{total:,}" if total else ""), detail])) + left)


def plain(text: str) -> str:
    """A text that may come from a name, for a console: on one line, and with nothing that it would obey."""
    return escape(printable(text).replace("\n", "\\n"))


def clock(seconds: float) -> str:
    """Seconds as hours, minutes and seconds: 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def size(count: float) -> str:
    """Bytes in the unit that reads best: 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def print_record(record: dict[str, Any], output: str) -> None:
    """The closing table of a run: what became of the images, how fast, what is in them, and how to ask for more."""
    console = Console(soft_wrap=True, highlight=False)
    print_statuses(console, record["statuses"], record["reasons"])
    seconds, before = record["seconds"], record["shards_done_before"]
    pace = f"{record['images'] / max(seconds, 1e-9):,.1f} images/s" if not before else f"{before:,} shards done before"
    read, written = size(record["input_bytes"]), size(record["output_bytes"])
    console.print(f"\n{record['images']:,} images in {clock(seconds)}, {pace}; {read} read, {written} of masks")
    shares = sorted(record["busy_shares"].items(), key=lambda item: -item[1])
    console.print("stages   " + ", ".join(f"{stage} {share:.1%} busy" for stage, share in shares))
    classes = sorted(record["class_pixels"].items(), key=lambda item: -item[1])[:8]
    if classes:
        table = Table("class", "of all pixels", "in images", box=None, header_style="bold", pad_edge=False)
        for column in table.columns[1:]:
            column.justify = "right"
        for name, pixels in classes:
            images = record["class_images"][name]
            table.add_row(escape(name), f"{pixels / record['pixels']:.1%}", f"{images:,}")
        console.print()
        console.print(table)
    segments = segment_files(output)
    console.print(
        f"\nrows     {escape(segments)}", f"run      {record['run_id']}  model {record['model_version']}", sep="\n"
    )
    console.print(f"query    swath query {escape(shlex.quote(output))} {escape(shlex.quote(EXAMPLE))}")


def print_statuses(console: Console, statuses: Mapping[str, int], reasons: Mapping[str, int]) -> None:
    """What became of the images, and the most frequent reasons why some have no mask."""
    table = Table("status", "images", "share", box=None, header_style="bold", pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for status, images in sorted(statuses.items(), key=lambda item: -item[1]):
        table.add_row(status, f"{images:,}", f"{images / sum(statuses.values()):.1%}")
    console.print(table)
    found = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    if not found:
        return
    console.print()
    for reason, images in found[:REASONS_SHOWN]:
        console.print(f"{images:>8,}  {escape(reason)}")
    if rest := found[REASONS_SHOWN:]:
        console.print(f"{sum(images for _, images in rest):>8,}  for {len(rest)} other reasons")


def print_whole(table: Table) -> None:
    """Print a table as wide as it is, which a terminal folds where it must."""
    console = Console(highlight=False)
    widest = console.measure(table, options=console.options.update(max_width=1_000_000)).maximum
    Console(highlight=False, width=max(1, widest)).print(table)


def segment_files(output: str) -> str:
    """A pattern for the segments table of an output, whatever that is called."""
    return f"{glob.escape(output.rstrip('/'))}/segments/*/*.parquet"
