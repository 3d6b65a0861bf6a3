"""A Ray on this machine that stays for several runs: to start one takes longer than most runs of a test."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator

PROGRAM = """
import os
import sys

import ray

# as many CPUs as a run gives to its own Ray
here = ray.init(address="local", num_cpus=(os.cpu_count() or 1) + 1, include_dashboard=False, log_to_driver=False)
print(here.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def ray_here() -> Iterator[str]:
    """The address of one that has the environment of now, and ends with the block or with this process."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        yield process.stdout.readline().strip()
