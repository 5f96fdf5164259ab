"""The supervisor with processes as small as possible: the real ones differ only in what they run."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy.local import control, pids, supervisor
from deploy.local.errors import StackError
from deploy.local.settings import Settings, load
from deploy.local.specs import HttpProbe, RedisProbe, Spec
from deploy.local.supervisor import Status
from tests.ports import free_port

HEALTHY = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
print("listening", flush=True)
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def _quiet(_: str) -> None: ...


def _spec(settings: Settings, name: str, *, program: str = HEALTHY, stage: int = 1, port: int = 0) -> Spec:
    port = port or free_port()
    return Spec(
        name=name,
        argv=(sys.executable, "-c", program, str(port)),
        cwd=str(settings.root),
        env={"PATH": os.environ["PATH"]},
        ports=(port,),
        stage=stage,
        probe=HttpProbe(f"http://127.0.0.1:{port}/healthz"),
    )


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Settings]:
    settings = load({"GROUNDSWELL_LOCAL_DIR": str(tmp_path / "local")})
    settings.local_dir.mkdir()
    try:
        yield settings
    finally:
        control.down(settings, _quiet)
        assert not list(settings.run_dir.glob("*.pid")) if settings.run_dir.exists() else True


def _status(settings: Settings, name: str) -> Status:
    return next(s for s in supervisor.read_state(settings.run_dir).processes if s.name == name)


def _await(condition: Callable[[], bool], within: float = 20) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, "not within the time"
        time.sleep(0.02)


def _pid(settings: Settings, name: str) -> int:
    found = pids.recorded(settings.run_dir, name)
    assert found is not None
    return found.pid


def test_a_killed_process_comes_back_and_the_log_says_so(stack: Settings) -> None:
    control.start(stack, (_spec(stack, "one"),), say=_quiet)
    killed = _pid(stack, "one")
    began = time.monotonic()
    os.kill(killed, signal.SIGKILL)
    _await(lambda: _status(stack, "one").restarts == 1 and _status(stack, "one").state == "ready")
    assert time.monotonic() - began >= supervisor.FIRST_BACKOFF
    assert _pid(stack, "one") != killed
    log = (stack.logs_dir / "supervisor.log").read_text()
    assert "one: died (killed by SIGKILL); restart in 0.5 s" in log
    assert "one: restarted" in log


def test_what_it_starts_is_batch_work(stack: Settings) -> None:
    control.start(stack, (_spec(stack, "one"),), say=_quiet)
    assert os.sched_getscheduler(_pid(stack, "one")) == os.SCHED_BATCH


def test_a_second_start_starts_nothing(stack: Settings) -> None:
    spec = _spec(stack, "one")
    assert control.start(stack, (spec,), say=_quiet) == ["one"]
    pid = _pid(stack, "one")
    assert control.start(stack, (spec,), say=_quiet) == []
    assert _pid(stack, "one") == pid
    assert control.status(stack, _quiet)


def test_stages_start_one_after_the_other(stack: Settings) -> None:
    control.start(stack, (_spec(stack, "late", stage=2), _spec(stack, "early", stage=1)), say=_quiet)
    log = (stack.logs_dir / "supervisor.log").read_text()
    assert log.index("early: ready") < log.index("late: started")


def test_down_ends_exactly_what_was_recorded(stack: Settings) -> None:
    control.start(stack, (_spec(stack, "one"), _spec(stack, "two")), say=_quiet)
    found = [pids.recorded(stack.run_dir, name) for name in ("one", "two", supervisor.NAME)]
    lines: list[str] = []
    control.down(stack, lines.append)
    assert [process is not None and process.is_alive() for process in found] == [False] * 3
    assert re.fullmatch("ended (one, two|two, one)", lines[0])
    control.down(stack, lines.append)
    assert lines[-1] == "nothing is running"


def test_what_a_killed_supervisor_left_is_adopted_and_still_watched(stack: Settings) -> None:
    spec = _spec(stack, "one")
    control.start(stack, (spec,), say=_quiet)
    pid = _pid(stack, "one")
    os.kill(_pid(stack, supervisor.NAME), signal.SIGKILL)
    _await(lambda: pids.recorded(stack.run_dir, supervisor.NAME) is None)
    assert not control.status(stack, _quiet)
    assert control.start(stack, (spec,), say=_quiet) == []
    assert _pid(stack, "one") == pid
    os.kill(pid, signal.SIGKILL)
    _await(lambda: _status(stack, "one").restarts == 1 and _status(stack, "one").state == "ready")


def test_what_was_wanted_before_a_reboot_is_not_started_again(stack: Settings) -> None:
    control.start(stack, (_spec(stack, "one"), _spec(stack, "two")), say=_quiet)
    ended = [pids.recorded(stack.run_dir, name) for name in (supervisor.NAME, "one", "two")]
    pids.end([process for process in ended if process], patience=10)
    control.start(stack, (_spec(stack, "two"),), say=_quiet)
    assert [status.name for status in supervisor.read_state(stack.run_dir).processes] == ["two"]


def test_down_needs_no_supervisor(stack: Settings) -> None:
    control.start(stack, (_spec(stack, "one"),), say=_quiet)
    process = pids.recorded(stack.run_dir, "one")
    os.kill(_pid(stack, supervisor.NAME), signal.SIGKILL)
    control.down(stack, _quiet)
    assert process is not None
    assert not process.is_alive()


def test_a_process_dead_at_start_is_a_line_and_the_tail_of_its_log(stack: Settings) -> None:
    broken = _spec(stack, "broken", program="import sys; sys.exit('no such table')")
    control.start(stack, (_spec(stack, "sound"),), say=_quiet)
    with pytest.raises(StackError, match="broken ended at start") as caught:
        control.start(stack, (broken,), say=_quiet)
    assert "no such table" in caught.value.detail
    assert "\n" not in caught.value.line
    # What was fine before goes on, watched, and a mended one can be started.
    _await(lambda: control.status(stack, _quiet))
    assert control.start(stack, (_spec(stack, "broken"),), say=_quiet) == ["broken"]


def test_a_process_that_never_is_ready_is_ended_again(stack: Settings) -> None:
    silent = _spec(stack, "silent", program="import signal; signal.pause()")
    with pytest.raises(StackError, match="silent is not ready after 1 s"):
        control.start(stack, (silent,), say=_quiet, within=1)
    assert pids.recorded(stack.run_dir, "silent") is None


def test_a_used_port_is_named_with_its_owner(stack: Settings) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StackError) as caught:
            control.start(stack, (_spec(stack, "one", port=port),), say=_quiet)
    assert f"port {port}, for one, is in use" in caught.value.line
    if Path("/proc/net/tcp").exists():
        assert f"by pid {os.getpid()} (" in caught.value.line


def test_redis_comes_back_too(stack: Settings) -> None:
    port = free_port()
    redis = Spec(
        name="redis",
        argv=("redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"),
        cwd=str(stack.local_dir),
        env={"PATH": os.environ["PATH"]},
        ports=(port,),
        stage=0,
        probe=RedisProbe(f"redis://127.0.0.1:{port}/0"),
    )
    control.start(stack, (redis,), say=_quiet)
    os.kill(_pid(stack, "redis"), signal.SIGKILL)
    _await(lambda: _status(stack, "redis").restarts == 1 and _status(stack, "redis").state == "ready")


def test_the_command_line_answers_with_one_line(tmp_path: Path) -> None:
    environment = {**os.environ, "GROUNDSWELL_LOCAL_DIR": str(tmp_path), "GROUNDSWELL_PORT_BASE": "80"}
    done = subprocess.run(
        [sys.executable, "-m", "deploy.local", "up"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("groundswell: GROUNDSWELL_PORT_BASE=80 is not usable")
    assert done.stderr.count("\n") == 1
