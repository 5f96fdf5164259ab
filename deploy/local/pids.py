"""Naming a process so that a reused pid is never mistaken for it.

`make down` must end exactly what `make up` started. A pid alone does not say that, hours later: with the moment the
process began it does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

_POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Recorded:
    """A process as the pid file names it."""

    pid: int
    began: str

    def is_alive(self) -> bool:
        """Whether that very process still runs; a zombie does not."""
        return bool(self.began) and began(self.pid) == self.began


def began(pid: int) -> str:
    """When the process began, as an opaque text; empty when it does not run."""
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self/stat").exists():
        try:
            # The command name, in parentheses, may hold anything: count fields from behind it.
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            return ""
        return "" if fields[0] in "ZX" else fields[19]
    answer = subprocess.run(
        ["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
    ).stdout.strip()
    return "" if not answer or answer.startswith("Z") else " ".join(answer.split()[1:])


def record(run_dir: Path, name: str, pid: int) -> None:
    """Write the pid file (the pid alone, so that `kill $(cat …)` works) and, beside it, when the process began."""
    (run_dir / f"{name}.began").write_text(began(pid))
    (run_dir / f"{name}.pid").write_text(f"{pid}\n")


def recorded(run_dir: Path, name: str) -> Recorded | None:
    """The process a pid file names, if it still runs."""
    try:
        found = Recorded(int((run_dir / f"{name}.pid").read_text()), (run_dir / f"{name}.began").read_text())
    except (OSError, ValueError):
        return None
    return found if found.is_alive() else None


def forget(run_dir: Path, name: str) -> None:
    """Remove a pid file."""
    (run_dir / f"{name}.pid").unlink(missing_ok=True)
    (run_dir / f"{name}.began").unlink(missing_ok=True)


def end(processes: list[Recorded], patience: float) -> list[int]:
    """SIGTERM them all, wait, SIGKILL what is left; return the pids that had to be killed."""
    for process in processes:
        _signal(process, signal.SIGTERM)
    if _all_gone(processes, patience):
        return []
    left = [process for process in processes if process.is_alive()]
    for process in left:
        _signal(process, signal.SIGKILL)
    _all_gone(left, 5.0)
    return [process.pid for process in left]


def port_is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a server could listen there now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def listener_of(port: int) -> str:
    """`pid 123 (java)` of whoever listens on the port, when the system tells; else an empty text."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for row in Path(table).read_text().splitlines()[1:]:
                fields = row.split()
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{fields[9]}]")
    if not inodes:
        return ""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(descriptor) in inodes:  # noqa: PTH115 - a socket's name is not a path
                pid = descriptor.parts[2]
                return f"pid {pid} ({Path(f'/proc/{pid}/comm').read_text().strip()})"
    return ""


def _signal(process: Recorded, number: signal.Signals) -> None:
    if process.is_alive():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


def _all_gone(processes: list[Recorded], patience: float) -> bool:
    deadline = time.monotonic() + patience
    while any(process.is_alive() for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True
