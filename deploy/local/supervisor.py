"""The detached supervisor: starts processes stage by stage, and brings the dead ones back.

It owns no process in the sense of taking it along when it ends: every process runs in a session of its own with a pid
file, so a supervisor that is killed loses nothing, and the next one adopts what runs. `down` therefore ends the
supervisor first and then exactly the recorded pids, along one path in every case.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import fcntl
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from deploy.local import pids
from deploy.local.files import write
from deploy.local.specs import Spec, is_ready
from libs.scheduling import prefer_throughput

NAME = "supervisor"
FIRST_BACKOFF = 0.5
LAST_BACKOFF = 30.0
# A process that stayed ready this long was fine: its next death is a new story and starts at the first back-off.
SETTLED_AFTER = 10.0
_TICK = 0.1
_PROBE_EVERY = 0.2
_LOG_LIMIT = 32 * 1024 * 1024


class Desired(msgspec.Struct, frozen=True):
    """What should run; written by `up`."""

    generation: int
    specs: tuple[Spec, ...]


class Status(msgspec.Struct, frozen=True):
    """One process, as the supervisor sees it. States: waiting, starting, ready, backing-off, failed."""

    name: str
    state: str
    pid: int
    restarts: int
    note: str


class State(msgspec.Struct, frozen=True):
    """What the supervisor last saw, and for which `Desired`."""

    generation: int
    processes: tuple[Status, ...]


def desired_path(run_dir: Path) -> Path:
    """Where `up` says what should run."""
    return run_dir / "desired.json"


def state_path(run_dir: Path) -> Path:
    """Where the supervisor says what it sees."""
    return run_dir / "state.json"


def read_desired(run_dir: Path) -> Desired:
    """What should run; nothing when `up` never said."""
    try:
        return msgspec.json.decode(desired_path(run_dir).read_bytes(), type=Desired)
    except (OSError, msgspec.DecodeError):
        return Desired(0, ())


def read_state(run_dir: Path) -> State:
    """What the supervisor last saw."""
    try:
        return msgspec.json.decode(state_path(run_dir).read_bytes(), type=State)
    except (OSError, msgspec.DecodeError):
        return State(0, ())


def next_backoff(previous: float, ready_for: float) -> float:
    """How long to wait before a restart: doubling, from the start again after a settled run."""
    if previous == 0 or ready_for >= SETTLED_AFTER:
        return FIRST_BACKOFF
    return min(previous * 2, LAST_BACKOFF)


@dataclass(slots=True)
class _Process:
    """The supervisor's notes on one process; mutable, and touched by the supervisor's loop only."""

    spec: Spec
    state: str = "waiting"
    child: subprocess.Popen[bytes] | None = None
    seen: pids.Recorded | None = None
    restarts: int = 0
    backoff: float = 0.0
    due: float = 0.0
    ready_at: float = 0.0
    was_ready: bool = False
    note: str = ""
    probe: asyncio.Task[str] | None = None
    probe_due: float = 0.0

    def exit_note(self) -> str:
        """How it ended, in a word; empty while it runs."""
        if self.child is not None:
            code = self.child.poll()
            if code is None:
                return ""
            return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit {code}"
        return "" if self.seen and self.seen.is_alive() else "gone"


@dataclass(slots=True)
class Supervisor:
    """Keeps what `desired.json` names alive, until it is told to end."""

    run_dir: Path
    logs_dir: Path
    generation: int = 0
    processes: dict[str, _Process] = field(default_factory=dict)
    _stamp: tuple[int, int] = (0, 0)
    _written: bytes = b""

    async def run(self) -> None:
        """Until SIGTERM. The processes stay; whoever ended the supervisor decides about them."""
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, ended.set)
        self._say("started")
        while not ended.is_set():
            try:
                self._read()
                for process in self.processes.values():
                    self._step(process)
                self._write()
            except OSError as error:  # a full disk must not end the one who restarts things
                self._say(f"cannot go on just now: {error}")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), _TICK)
        self._say("ended")

    def _read(self) -> None:
        try:
            found = desired_path(self.run_dir).stat()
        except FileNotFoundError:
            return
        stamp = (found.st_ino, found.st_mtime_ns)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        desired = read_desired(self.run_dir)
        for spec in desired.specs:
            process = self.processes.get(spec.name)
            if process is None:
                process = self.processes[spec.name] = _Process(spec)
                process.seen = pids.recorded(self.run_dir, spec.name)
                if process.seen:
                    process.state, process.was_ready = "starting", True
                    self._say(f"{spec.name}: found running, pid {process.seen.pid}")
            elif process.state == "failed":
                process.spec, process.state = spec, "waiting"
        self.generation = desired.generation

    def _step(self, process: _Process) -> None:
        now = time.monotonic()
        if process.state == "waiting":
            if self._stage_is_open(process.spec.stage):
                self._start(process)
        elif process.state == "backing-off":
            if now >= process.due:
                process.restarts += 1
                self._start(process)
        elif process.state in ("starting", "ready"):
            how = process.exit_note()
            if how:
                self._died(process, how, now)
            elif process.state == "starting":
                self._probe(process, now)

    def _stage_is_open(self, stage: int) -> bool:
        return all(p.was_ready for p in self.processes.values() if p.spec.stage < stage)

    def _start(self, process: _Process) -> None:
        spec = process.spec
        log = self.logs_dir / f"{spec.name}.log"
        if log.exists() and log.stat().st_size > _LOG_LIMIT:
            log.replace(log.with_suffix(".log.1"))
        with log.open("ab") as output:
            try:
                process.child = subprocess.Popen(
                    spec.argv,
                    cwd=spec.cwd,
                    env=spec.env,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                output.write(f"cannot start {spec.argv[0]}: {error}\n".encode())
                self._died(process, f"cannot start: {error.strerror}", time.monotonic())
                return
        pids.record(self.run_dir, spec.name, process.child.pid)
        process.seen = pids.Recorded(process.child.pid, pids.began(process.child.pid))
        process.state, process.note = "starting", ""
        self._say(f"{spec.name}: {'restarted' if process.restarts else 'started'}, pid {process.child.pid}")

    def _died(self, process: _Process, how: str, now: float) -> None:
        if process.probe:
            process.probe.cancel()
            process.probe = None
        ready_for = now - process.ready_at if process.state == "ready" else 0.0
        process.child = process.seen = None
        process.note = how
        pids.forget(self.run_dir, process.spec.name)
        if not process.was_ready:
            # Never ready: a broken set-up, which a person should read about, not a crash to ride over.
            process.state = "failed"
            self._say(f"{process.spec.name}: ended before it was ready ({how})")
            return
        process.backoff = next_backoff(process.backoff, ready_for)
        process.due = now + process.backoff
        process.state = "backing-off"
        self._say(f"{process.spec.name}: died ({how}); restart in {process.backoff:g} s")

    def _probe(self, process: _Process, now: float) -> None:
        if process.probe is None:
            if now >= process.probe_due:
                process.probe = asyncio.get_running_loop().create_task(is_ready(process.spec.probe))
            return
        if not process.probe.done():
            return
        answer = process.probe.result()
        process.probe = None
        process.probe_due = now + _PROBE_EVERY
        process.note = answer
        if not answer:
            process.state, process.was_ready, process.ready_at = "ready", True, now
            self._say(f"{process.spec.name}: ready")

    def _write(self) -> None:
        state = State(
            self.generation,
            tuple(
                Status(name, p.state, p.seen.pid if p.seen else 0, p.restarts, p.note)
                for name, p in self.processes.items()
            ),
        )
        data = msgspec.json.encode(state)
        if data != self._written:
            write(state_path(self.run_dir), data)
            self._written = data

    def _say(self, line: str) -> None:
        when = datetime.datetime.now().astimezone().isoformat(timespec="milliseconds")
        print(f"{when} {line}", file=sys.stderr, flush=True)


def main(local_dir: Path) -> int:
    """Entry of the detached process. A lock, held until the end, makes sure there is one."""
    run_dir, logs_dir = local_dir / "run", local_dir / "logs"
    with (run_dir / "supervisor.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another supervisor runs", file=sys.stderr)
            return 1
        pids.record(run_dir, NAME, os.getpid())
        # A probe that fails is the answer "not yet"; the client libraries would write a line for each.
        logging.getLogger().addHandler(logging.NullHandler())
        prefer_throughput()  # for the servers too: they are started from here
        asyncio.run(Supervisor(run_dir, logs_dir).run())
        pids.forget(run_dir, NAME)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
