"""Ask the Python Package Index which of the pinned dependencies have known vulnerabilities; fail for any that has.

Where the index cannot be asked, as on a mirror of packages alone, that is said and is no failure.
"""

import json
import subprocess
import sys

COMMAND = (
    "pip-audit",
    "-r",
    "constraints.txt",
    "--no-deps",
    "--disable-pip",
    "-f",
    "json",
    "--progress-spinner",
    "off",
)
ACCEPTED: dict[str, str] = {}  # vulnerability: why it does not concern this project


def main() -> int:
    done = subprocess.run(
        [sys.executable, "-m", COMMAND[0].replace("-", "_"), *COMMAND[1:]], check=False, capture_output=True, text=True
    )
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except ValueError:
        said = done.stderr.strip().splitlines()[-1:]
        is_away = "requests.exceptions" in done.stderr
        print("dependencies: not audited:", *said)
        return 0 if is_away else 1
    audited = [package for package in packages if "vulns" in package]
    if not audited:
        print("dependencies: not audited, as the index that is reached here gives no advisories")
        return 0
    found = [
        f"{package['name']} {package['version']} has {one['id']}; mended in: {', '.join(one['fix_versions']) or 'none'}"
        for package in audited
        for one in package["vulns"]
        if one["id"] not in ACCEPTED
    ]
    print(*found, f"dependencies: {len(audited)} audited, {len(found)} known vulnerabilities", sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
