"""Prove an output: every image has one row, every row is whole, and no row is there besides.

Reads all that segment has written: shards and the masks in them, plans, records, the index, with as many machines as
there are. Prints what it has read and, if anything is wrong, the first 20 things, one a line. Exit code 0 when all is
proven, 1 when anything is wrong.

  swath verify s3://bucket/masks
"""

from functools import partial

from rich.console import Console
from rich.markup import escape

from jobs.display import Display
from pipeline.config import VerifySettings

SETTINGS = VerifySettings


def run(settings: VerifySettings) -> int:
    from pipeline.cluster import spread
    from pipeline.verify import verify

    with Display() as display:
        report = verify(settings, display, partial(spread, settings))
    console = Console(soft_wrap=True, highlight=False)
    console.print("checked  " + ", ".join(f"{kind} {count:,}" for kind, count in report.checked.items() if count))
    findings = report.findings
    for line in findings.first:
        console.print(f"wrong    {escape(line)}")
    if findings.count > len(findings.first):
        console.print(f"wrong    {findings.count - len(findings.first):,} things more")
    if findings.count:
        console.print(f"\n{escape(settings.output)} is not proven; wrong: {findings.count:,}")
        return 1
    console.print(f"\n{escape(settings.output)} is proven: nothing lost, nothing twice, nothing damaged")
    return 0
