"""Up, down, status, clean, logs: what a person and the tests do with a local stack."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
from aiokafka.errors import KafkaError

from deploy.local import pids, supervisor
from deploy.local.credentials import S3Credentials, ensure_all, s3_credentials
from deploy.local.errors import StackError
from deploy.local.files import check_room, write
from deploy.local.servers import server_specs
from deploy.local.services import service_environment, service_specs
from deploy.local.settings import Settings
from deploy.local.specs import KafkaProbe, Probe, RedisProbe, S3Probe, Spec, is_ready, s3_client
from deploy.local.supervisor import Desired, State
from deploy.topics import TopicMismatchError, ensure_topics

Say = Callable[[str], None]

READY_WITHIN = 90.0
_PATIENCE = 15.0
_BOOTSTRAP_WITHIN = 60.0
_POLL = 0.05
_TAIL_LINES = 20
# What `clean` removes: everything but the jars, which hold nothing of anybody's and take a while to fetch.
_CLEANED = ("config", "data", "keystore", "logs", "run", "tls", "bootstrap.secret", "profile.json", "s3.json")


def up(settings: Settings, *, servers_only: bool = False, say: Say = print) -> None:
    """Servers, topics and bucket; then, unless only servers are wanted, services and the platform bootstrap."""
    check_room(settings.local_dir)
    with _one_at_a_time(settings):
        credentials = ensure_all(settings)
        fresh = start(settings, server_specs(settings, credentials, say), say=say)
        await_external(settings, credentials)
        create_topics_and_bucket(settings, credentials, say)
        if not servers_only:
            fresh = [*fresh, *start(settings, service_specs(settings, credentials), say=say)]
            _bootstrap(settings, credentials)
        say("already running" if not fresh else "everything is ready")
        for line in describe(settings, servers_only=servers_only):
            say(line)


def start(settings: Settings, specs: tuple[Spec, ...], *, say: Say = print, within: float = READY_WITHIN) -> list[str]:
    """Have the supervisor run these too; return once all are ready, with the names that were not running before.

    What could not be started is ended again, so that the next `up` begins from a clean place.
    """
    for folder in (settings.run_dir, settings.logs_dir):
        folder.mkdir(parents=True, exist_ok=True)
    before = _current(settings)
    running = {spec.name for spec in specs if pids.recorded(settings.run_dir, spec.name)}
    # With a live supervisor a known process that is down just now is in its hands: its port is not somebody else's.
    watched = {spec.name for spec in before.specs} if _supervisor(settings) else set()
    fresh = [spec for spec in specs if spec.name not in running and spec.name not in watched]
    _check_ports(fresh)
    kept = tuple(spec for spec in before.specs if spec.name not in {other.name for other in specs})
    known = {spec.name: spec for spec in before.specs}
    wanted = tuple(known.get(spec.name, spec) if spec.name in running else spec for spec in specs)
    desired = Desired(before.generation + 1, kept + wanted)
    write(supervisor.desired_path(settings.run_dir), msgspec.json.encode(desired))
    _start_supervisor(settings)
    if fresh:
        say(f"starting {', '.join(spec.name for spec in fresh)}")
    try:
        _await_ready(settings, desired, specs, within)
    except StackError:
        _end(settings, [spec.name for spec in fresh])
        write(supervisor.desired_path(settings.run_dir), msgspec.json.encode(before))
        if before.specs:
            _start_supervisor(settings)
        raise
    return [spec.name for spec in fresh]


def down(settings: Settings, say: Say = print) -> None:
    """End exactly what was recorded: the supervisor first, so that it restarts nothing, then last stage first."""
    if not settings.run_dir.exists():
        say("nothing is running")
        return
    with _one_at_a_time(settings):
        names = _recorded_names(settings)
        ended = _end(settings, names)
        supervisor.desired_path(settings.run_dir).unlink(missing_ok=True)
        supervisor.state_path(settings.run_dir).unlink(missing_ok=True)
    say(f"ended {', '.join(ended)}" if ended else "nothing is running")


def clean(settings: Settings, say: Say = print) -> None:
    """Down, and remove the data, certificates, secrets and logs."""
    down(settings, say)
    for name in _CLEANED:
        path = settings.local_dir / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    say(f"removed what the stack stored under {settings.local_dir}")


def status(settings: Settings, say: Say = print) -> bool:
    """One line a process; whether all of them are ready."""
    alive = _supervisor(settings)
    state = supervisor.read_state(settings.run_dir)
    if not state.processes:
        say("nothing is running; `make up` starts it")
        return False
    healthy = alive is not None
    for process in state.processes:
        running = pids.recorded(settings.run_dir, process.name)
        seen = process.state if alive else ("running" if running else "dead")
        healthy = healthy and seen == "ready"
        restarts = f", restarted {process.restarts} times" if process.restarts else ""
        note = f" - {process.note}" if process.note else ""
        say(f"{process.name:12} {seen:12} pid {running.pid if running else '-'}{restarts}{note}")
    if not alive:
        say("the supervisor is not running; `make up` starts it again")
    return healthy


def logs(settings: Settings, names: list[str], *, follow: bool, say: Say = print) -> int:
    """The end of the logs; with `follow`, as they grow."""
    files = [settings.logs_dir / f"{name}.log" for name in names] or sorted(settings.logs_dir.glob("*.log"))
    missing = [str(file) for file in files if not file.exists()]
    if missing or not files:
        raise StackError(f"no log at {', '.join(missing) or settings.logs_dir}: is it running? see `make status`")
    if follow:
        return subprocess.run(["tail", "-F", *map(str, files)], check=False).returncode
    for file in files:
        say(f"==> {file} <==")
        say(_tail(file))
    return 0


def describe(settings: Settings, *, servers_only: bool) -> list[str]:
    """Where everything answers."""
    lines = [f"Kafka {settings.kafka}  Redis {settings.redis}  S3 {settings.s3} bucket {settings.bucket}"]
    if not servers_only:
        environment = settings.environment
        for name in ("registry", "pki", "artifacts", "releases", "rollout", "webhooks"):
            upper = name.upper()
            public, internal = environment[f"GROUNDSWELL_{upper}_PUBLIC"], environment[f"GROUNDSWELL_{upper}_INTERNAL"]
            lines.append(f"{name:10} {public}  (internal {internal})")
        lines.append(f"{'gateway':10} {environment['GROUNDSWELL_GATEWAY_LISTEN']}")
    lines.append(f"logs {settings.logs_dir}")
    return lines


def _current(settings: Settings) -> Desired:
    """What is wanted now. Without a supervisor (a reboot, say) only what still runs: the rest is long forgotten."""
    desired = supervisor.read_desired(settings.run_dir)
    if _supervisor(settings):
        return desired
    alive = tuple(spec for spec in desired.specs if pids.recorded(settings.run_dir, spec.name))
    return Desired(desired.generation, alive)


def _check_ports(specs: list[Spec]) -> None:
    for spec in specs:
        for port in spec.ports:
            if not pids.port_is_free(port):
                owner = pids.listener_of(port)
                by = f" by {owner}" if owner else ""
                raise StackError(
                    f"port {port}, for {spec.name}, is in use{by}: end that, or move this checkout with "
                    "GROUNDSWELL_PORT_BASE"
                )


def _supervisor(settings: Settings) -> pids.Recorded | None:
    return pids.recorded(settings.run_dir, supervisor.NAME)


def _start_supervisor(settings: Settings) -> None:
    if _supervisor(settings):
        return
    with (settings.logs_dir / f"{supervisor.NAME}.log").open("ab") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "deploy.local.supervisor", str(settings.local_dir)],
            cwd=settings.root,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    deadline = time.monotonic() + READY_WITHIN
    while _supervisor(settings) is None:
        if child.poll() is not None or time.monotonic() > deadline:
            raise StackError(
                "the supervisor did not start: see the end of its log",
                _tail(settings.logs_dir / f"{supervisor.NAME}.log"),
            )
        time.sleep(_POLL)
    # Detached on purpose: it outlives this command, and is ended by pid.
    child.returncode = 0


def _await_ready(settings: Settings, desired: Desired, specs: tuple[Spec, ...], within: float) -> None:
    names = [spec.name for spec in specs]
    deadline = time.monotonic() + within
    while True:
        state = supervisor.read_state(settings.run_dir)
        seen = {process.name: process for process in state.processes}
        if state.generation == desired.generation:
            for name in names:
                process = seen.get(name)
                if process and process.state == "failed":
                    log = settings.logs_dir / f"{name}.log"
                    raise StackError(f"{name} ended at start ({process.note}): the end of {log} says why", _tail(log))
            if all(name in seen and seen[name].state == "ready" for name in names):
                return
        if time.monotonic() > deadline:
            raise StackError(*_late(settings, state, names, within))
        if _supervisor(settings) is None:
            log = settings.logs_dir / f"{supervisor.NAME}.log"
            raise StackError(f"the supervisor ended: the end of {log} says why", _tail(log))
        time.sleep(_POLL)


def _late(settings: Settings, state: State, names: list[str], within: float) -> tuple[str, str]:
    waiting = [process for process in state.processes if process.name in names and process.state != "ready"]
    culprit = next((process for process in waiting if process.state != "waiting"), None)
    if culprit is None:
        return f"not ready after {within:g} s: {', '.join(names)}", ""
    log = settings.logs_dir / f"{culprit.name}.log"
    return f"{culprit.name} is not ready after {within:g} s ({culprit.note}): see {log}", _tail(log)


def _recorded_names(settings: Settings) -> list[str]:
    """Last stage first; whatever else has a pid file comes before them."""
    ordered = [spec.name for spec in sorted(supervisor.read_desired(settings.run_dir).specs, key=lambda s: -s.stage)]
    others = [path.stem for path in settings.run_dir.glob("*.pid") if path.stem not in (*ordered, supervisor.NAME)]
    return [*others, *ordered]


def _end(settings: Settings, names: list[str]) -> list[str]:
    watcher = _supervisor(settings)
    if watcher:
        pids.end([watcher], _PATIENCE)
        pids.forget(settings.run_dir, supervisor.NAME)
    stages = {spec.name: spec.stage for spec in supervisor.read_desired(settings.run_dir).specs}
    ended = []
    for servers in (False, True):  # services lose no server under their hands while they end
        group = [name for name in names if (stages.get(name, 1) == 0) is servers]
        found = {name: process for name in group if (process := pids.recorded(settings.run_dir, name))}
        pids.end(list(found.values()), _PATIENCE)
        for name in group:
            pids.forget(settings.run_dir, name)
        ended += list(found)
    return ended


def await_external(settings: Settings, credentials: S3Credentials | None = None, within: float = 30.0) -> None:
    """Wait for the servers that are somebody else's: they must answer their protocol too, or be named."""
    credentials = credentials or s3_credentials(settings)
    probes: dict[str, Probe] = {
        "GROUNDSWELL_KAFKA": KafkaProbe(settings.kafka),
        "GROUNDSWELL_REDIS": RedisProbe(settings.redis),
        "GROUNDSWELL_S3_ENDPOINT": S3Probe(
            settings.s3, settings.bucket, credentials.access_key, credentials.secret_key
        ),
    }
    deadline = time.monotonic() + within
    for variable, probe in probes.items():
        while settings.is_external(variable) and (answer := asyncio.run(is_ready(probe))):
            if time.monotonic() > deadline:
                raise StackError(f"{variable}={settings.overrides[variable]} does not answer ({answer})")
            time.sleep(_POLL)


def create_topics_and_bucket(settings: Settings, credentials: S3Credentials, say: Say = print) -> None:
    """Topics and bucket. Idempotent."""
    try:
        created = asyncio.run(ensure_topics(settings.kafka, settings.env, settings.partitions))
    except TopicMismatchError as error:
        raise StackError(str(error)) from error
    except (KafkaError, TimeoutError) as error:
        raise StackError(f"creating the topics failed ({error or type(error).__name__}): see `make logs`") from error
    if created:
        say(f"created {len(created)} topics of {settings.env}")
    client = s3_client(settings.s3, credentials.access_key, credentials.secret_key)
    if not client.bucket_exists(settings.bucket):
        client.make_bucket(settings.bucket)


def _bootstrap(settings: Settings, credentials: S3Credentials) -> None:
    """The first platform key, into the command line's profile."""
    command = [sys.executable, "-m", "services.registry.bootstrap"]
    try:
        done = subprocess.run(
            command,
            cwd=settings.root,
            env=service_environment(settings, credentials),
            capture_output=True,
            text=True,
            check=False,
            timeout=_BOOTSTRAP_WITHIN,
        )
    except subprocess.TimeoutExpired as error:
        raise StackError(f"the platform bootstrap took over {_BOOTSTRAP_WITHIN:g} s: see `make logs`") from error
    if done.returncode != 0:
        raise StackError(
            f"the platform bootstrap failed (exit {done.returncode}); the services stay up, `make up` tries it again",
            (done.stdout + done.stderr)[-2000:],
        )


@contextlib.contextmanager
def _one_at_a_time(settings: Settings) -> Iterator[None]:
    """Two `make up` at once: the second waits and finds everything running."""
    settings.local_dir.mkdir(parents=True, exist_ok=True)
    with (settings.local_dir / "up.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 64 * 1024), os.SEEK_SET)
            return "\n".join(file.read().decode(errors="replace").splitlines()[-_TAIL_LINES:])
    except OSError:
        return ""
