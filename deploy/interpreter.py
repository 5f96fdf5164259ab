"""Which Python `make setup` builds `.venv` from: `python3`, or a faster build of the same version on this machine.

    python3 deploy/interpreter.py

A Python built without profile-guided optimization, as version managers do by default, takes half as long again for the
same code, and nothing it says of itself tells the two apart for certain. So each is timed. One that gains less than
``MARGIN`` is not worth a surprise. Another version is taken only when `python3` is too old. Prints the path of the
choice; says on standard error why it is not `python3`, and with which command to have that one.

It is run by whatever `python3` is, so it keeps to what Python 3.8 understands.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple, Sequence  # noqa: UP035 - Python 3.8

LEAST = (3, 11)
NEWEST_MINOR = 14
MARGIN = 1.15
"""How many times as fast another build must be."""
PROBE_TIMEOUT_S = 60

PROBE = """
import ensurepip, ssl, sys, time, venv

class Point:
    __slots__ = ("x", "y")
    def __init__(self, x, *, y):
        self.x, self.y = x, y

def work():
    seen = {}
    for number in range(4_000):
        point = Point(number, y=number)
        seen[number & 255] = (point.x, f"{point.y:x}/{number}".split("/"))
        sorted((3, 1, number), key=lambda one: -one)
    return sum(number for number in range(4_000))

def timed():
    began = time.perf_counter()
    work()
    return time.perf_counter() - began

print(sys.version_info[0], sys.version_info[1], min(timed() for _ in range(40)), sys.executable)
"""
"""What a service does all the time: objects, keywords, dictionaries, strings, closures, generators."""


class Build(NamedTuple):
    """An interpreter that can make a virtual environment."""

    path: str
    version: tuple[int, int]
    seconds: float
    """Best time of a fixed piece of work."""


def choose(builds: Sequence[Build]) -> Build | None:
    """The build to use; the first is what a bare `python3` gives. None when none is new enough."""
    usable = [build for build in builds if build.version >= LEAST]
    if not usable:
        return None
    first = usable[0]
    fastest = min((build for build in usable if build.version == first.version), key=lambda build: build.seconds)
    return fastest if fastest.seconds * MARGIN < first.seconds else first


def probed(path: Path) -> Build | None:
    """What is at the path; None when it does not run, or lacks what a virtual environment needs."""
    try:
        ran = subprocess.run(
            [str(path), "-I", "-c", PROBE], capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=True
        )
        major, minor, seconds, executable = ran.stdout.strip().split(" ", 3)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return Build(executable, (int(major), int(minor)), float(seconds))


def found(search: str) -> list[Build]:
    """Every interpreter of a search path, each once; first what a shell would run as `python3`."""
    builds: dict[Path, Build] = {}
    tried = set()
    names = ["python3", *(f"python3.{minor}" for minor in range(NEWEST_MINOR, LEAST[1] - 1, -1))]
    for name in names:
        for folder in filter(None, search.split(os.pathsep)):
            path = Path(folder, name)
            if os.access(path, os.X_OK) and path.resolve() not in tried:
                tried.add(path.resolve())
                build = probed(path)
                if build is not None:
                    builds.setdefault(Path(build.path).resolve(), build)
    return list(builds.values())


def main() -> int:
    """Print the choice."""
    builds = found(os.environ.get("PATH", "") + os.pathsep + os.defpath)
    chosen = choose(builds)
    if chosen is None:
        least = ".".join(map(str, LEAST))
        print(f"Python {least} or newer with venv is needed; try: make setup PYTHON=python{least}", file=sys.stderr)
        return 1
    first = builds[0]
    if chosen != first:
        share = f", which takes {chosen.seconds / first.seconds:.0%} of its time" if first.version >= LEAST else ""
        print(f"not {first.path} but {chosen.path}{share}; for the other: make setup PYTHON=python3", file=sys.stderr)
    print(chosen.path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
