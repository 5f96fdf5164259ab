"""A service's two gRPC ports, its health, and its life from start to SIGTERM.

The internal port asks for a client certificate of our CA; the public one takes API keys. Internal services are not even
registered on the public port. Public services are registered on the internal one too: there other replicas of the same
service forward calls that only the leader can answer, and nobody else is let in.
A service whose runtime is no longer live ends, so that its supervisor starts it anew.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, Protocol, TypeVar, runtime_checkable

import grpc
import uvloop
from groundswell.audit.v1 import audit_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from libs.blobs.s3 import S3BlobStore
from libs.blobs.snapshots import BlobSnapshotStore
from libs.eventlog import Domain, Runtime, RuntimeConfig, TaskHandler
from libs.eventlog.collector import tune_collector
from libs.eventlog.ports import EventLog, SnapshotStore
from libs.eventlog.runtime import Forwarder
from libs.rpc.access import KeyDirectory
from libs.rpc.audit import AuditServicer
from libs.rpc.certificates import server_credentials
from libs.rpc.forward import LeaderForwarder
from libs.rpc.interceptor import Gate
from libs.scheduling import prefer_throughput
from libs.settings import Settings

log = logging.getLogger(__name__)

MAX_REQUEST: Final = 4 * 1024 * 1024
GRACE_S: Final = 3.0
HEALTH_INTERVAL_S: Final = 0.25
INBOX_PACE_S: Final = 0.5
"""What services learn of each other waits for so long while it comes in streams, as in the updates of a fleet."""
_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_REQUEST),
    ("grpc.max_send_message_length", 16 * 1024 * 1024),
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),
)

S = TypeVar("S")
Registration = tuple[Callable[[Any, Any], None], Any]
"""(generated ``add_…Servicer_to_server``, servicer)."""


class Part(Protocol):
    """Something with a life of its own beside the servers, e.g. a follower."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...


@runtime_checkable
class _MayDie(Protocol):
    """A part that can end by itself."""

    @property
    def live(self) -> bool: ...


class App(Protocol):
    """What ``serve`` runs."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def live(self) -> bool:
        """False when the process should end and be started anew."""


def service_runtime(
    domain: Domain[S],
    log_: EventLog,
    settings: Settings,
    task_handlers: Mapping[str, TaskHandler] | None = None,
    *,
    forward: Forwarder | None = None,
    inbox_pace_s: float = INBOX_PACE_S,
) -> Runtime[S]:
    """The runtime of a service as the settings have it: every service makes its own in this way."""
    config = RuntimeConfig(
        env=settings.env,
        partitions=settings.partitions,
        address=settings.address(domain.service, "internal"),
        inbox_pace_s=inbox_pace_s,
        snapshot_every_events=settings.snapshot_every_events,
        snapshot_every_s=settings.snapshot_every_s,
    )
    return Runtime(domain, log_, config, task_handlers, forward=forward, snapshots=_snapshots(settings))


def _snapshots(settings: Settings) -> SnapshotStore | None:
    """None without a store to put them in: every start then reads the whole log."""
    if not settings.snapshot_every_events or not settings.s3_access_key:
        return None
    blobs = S3BlobStore.from_settings(settings)
    return BlobSnapshotStore(blobs, blobs.close)


class RpcServer:
    """Both ports of a service. Parts are started before them, in order, and stopped after them, in reverse."""

    def __init__(
        self,
        settings: Settings,
        service: str,
        runtime: Runtime[Any],
        log_: EventLog,
        *,
        public: Sequence[Registration],
        internal: Sequence[Registration],
        directory: KeyDirectory,
        parts: Sequence[Part] = (),
    ) -> None:
        self._settings = settings
        self._service = service
        self._runtime = runtime
        self._log = log_
        self._public = [
            *public,
            (audit_pb2_grpc.add_AuditServiceServicer_to_server, AuditServicer(log_, settings, service)),
        ]
        self._internal = list(internal)
        self._directory = directory
        self._parts = list(parts)
        self._servers: list[grpc.aio.Server] = []
        self._forwarder = LeaderForwarder(settings, service)
        self._health = health_aio.HealthServicer()
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start parts and runtime, then listen."""
        for part in (*self._parts, self._runtime):
            await part.start()
        internal = server_credentials(self._settings, self._service, mutual=True)
        public = server_credentials(self._settings, self._service, mutual=False)
        directory, forwarder = self._directory, self._forwarder
        inner = Gate(self._runtime, directory=directory, trust_domain=self._settings.deployment, forwarder=forwarder)
        outer = Gate(self._runtime, directory=directory, forwarder=forwarder)
        bind = self._settings.bind
        await self._listen(bind(self._service, "internal"), internal, self._internal, inner, forwarded=self._public)
        await self._listen(bind(self._service, "public"), public, self._public, outer)
        self._watch = asyncio.create_task(self._report_health(), name="health")
        log.info(
            "listening: internal=%s public=%s",
            *(self._settings.address(self._service, p) for p in ("internal", "public")),
        )

    async def _listen(
        self,
        address: str,
        credentials: grpc.ServerCredentials,
        registrations: Sequence[Registration],
        gate: Gate,
        forwarded: Sequence[Registration] = (),
    ) -> None:
        server = grpc.aio.server(interceptors=[gate], options=list(_OPTIONS))
        names = [reflection.SERVICE_NAME, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name]
        for add, servicer in registrations:
            names.append(_service_name(add, servicer))
            add(servicer, server)
        for add, servicer in forwarded:
            add(servicer, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection(names, server)
        server.add_secure_port(address, credentials)
        await server.start()
        self._servers.append(server)

    async def _report_health(self) -> None:
        """SERVING once reads are served and everything assigned here is led."""
        shown: int | None = None
        while True:
            health = self._runtime.health()
            good = health.live and health.ready and health.leading
            status = health_pb2.HealthCheckResponse.SERVING if good else health_pb2.HealthCheckResponse.NOT_SERVING
            if status != shown:
                log.info("health: %s", "serving" if good else f"not serving {'; '.join(health.problems)}")
                await self._health.set("", status)
                shown = status
            await asyncio.sleep(HEALTH_INTERVAL_S)

    def live(self) -> bool:
        """Whether the runtime's own tasks, and the parts that can tell, are alive; the log says which are not."""
        health = self._runtime.health()
        ended = [type(part).__name__ for part in self._parts if isinstance(part, _MayDie) and not part.live]
        if health.live and not ended:
            return True
        log.error("not live: %s", "; ".join([*health.problems, *(f"{name} has ended" for name in ended)]))
        return False

    async def stop(self) -> None:
        """Stop intake, hand over, finish what runs."""
        if self._watch is not None:
            self._watch.cancel()
        await self._health.enter_graceful_shutdown()
        # Others lead at once, however long the calls and streams that are open here still take.
        await asyncio.gather(self._runtime.step_down(), *(server.stop(GRACE_S) for server in self._servers))
        await self._runtime.stop()
        await self._forwarder.close()
        for part in reversed(self._parts):
            await part.stop()
        await self._log.close()


class _Recorder:
    """Stands in for a server to learn a servicer's full service name."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def add_generic_rpc_handlers(self, handlers: Sequence[Any]) -> None:
        self.names.extend(handler.service_name() for handler in handlers)

    def add_registered_method_handlers(self, name: str, handlers: Any) -> None:
        self.names.append(name)


def _service_name(add: Callable[[Any, Any], None], servicer: Any) -> str:
    recorder = _Recorder()
    add(servicer, recorder)
    return recorder.names[0]


class OneLineFormatter(logging.Formatter):
    """An event is one line whatever it says: line ends inside it, tracebacks too, are escaped."""

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).replace("\r", "\\r").replace("\n", "\\n")


def configure_logging() -> None:
    """One line an event, to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLineFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for noisy in ("aiokafka", "grpc", "faust", "kafka"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def serve(name: str, build: Callable[[Settings], Awaitable[App]]) -> None:
    """Run a service until SIGTERM or SIGINT. Exit status 1 when it has to be started anew."""
    configure_logging()
    prefer_throughput()
    sys.exit(uvloop.run(_serve(name, build)))


async def _serve(name: str, build: Callable[[Settings], Awaitable[App]]) -> int:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    app = await build(Settings())
    try:
        await app.start()
    except Exception:
        log.exception("%s cannot start", name)
        return 1
    tune_collector()
    status = 0
    while not stopping.is_set():
        try:
            await asyncio.wait_for(stopping.wait(), 1.0)
        except TimeoutError:
            status = 0 if app.live() else 1
        if status:
            log.error("%s is no longer live: ending, to be started anew", name)
            break
    log.info("%s stops", name)
    await app.stop()
    return status
