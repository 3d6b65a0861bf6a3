"""Debian's packages for the servers and tools of this folder and of the tests, installed where they are missing."""

import fcntl
import os
import shutil
import subprocess
from collections.abc import Mapping

LOCK = "/run/lock/swath-apt"  # apt fails, and does not wait, where another process of ours installs
OURS_TO_START = ("prometheus", "prometheus-alertmanager")  # whose packages start a service on all addresses


def install_missing(programs: Mapping[str, str]) -> None:
    """Install the packages of those `programs` that are not there: package by program.

    Raises RuntimeError with the remedy where that is not for us to do, and with apt's own words where it fails.
    """
    if not missing(programs):
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        packages = missing(programs)
        raise RuntimeError(f"not installed: {', '.join(packages)}; sudo apt-get install {' '.join(packages)}")
    with open(LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if packages := missing(programs):  # still
            install(packages)


def missing(programs: Mapping[str, str]) -> list[str]:
    """The packages that are wanted."""
    return sorted({package for program, package in programs.items() if not shutil.which(program)})


def install(packages: list[str]) -> None:
    services = [package for package in packages if package in OURS_TO_START]
    systemctl("mask", "--runtime", services)
    try:
        for step in (["update", "-qq"], ["install", "-qq", "-y", "--no-install-recommends", *packages]):
            environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
            done = subprocess.run(["apt-get", *step], check=False, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"apt-get {' '.join(step)} failed: {done.stderr.strip()[-300:]}")
    finally:
        systemctl("disable", "--quiet", services)
        systemctl("unmask", "--runtime", services)


def systemctl(verb: str, option: str, services: list[str]) -> None:
    """Have systemd, where it runs, start none of these by itself."""
    if services and shutil.which("systemctl"):
        subprocess.run(["systemctl", verb, option, *services], check=False, capture_output=True)
