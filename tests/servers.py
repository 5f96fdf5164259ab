"""Which real servers the tests run against, and how those are started.

Addresses from the environment come first, then containers where an engine answers, then the local stack: a test that
needs a server always has one, so no test is ever skipped for the lack of it.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.local import control, pids
from deploy.local.credentials import s3_credentials
from deploy.local.servers import kafka_version
from deploy.local.settings import ROOT, Settings, load
from tests.ports import free_port

TEST_PORTS_FROM_BASE = 10000  # 29000 by default; GROUNDSWELL_PORT_BASE moves it along with the stack
KEEP = "GROUNDSWELL_KEEP_TEST_SERVERS"
ADDRESSES = (
    "GROUNDSWELL_KAFKA",
    "GROUNDSWELL_REDIS",
    "GROUNDSWELL_S3_ENDPOINT",
    "GROUNDSWELL_S3_ACCESS_KEY",
    "GROUNDSWELL_S3_SECRET_KEY",
)


class Source(enum.Enum):
    """Where the servers come from."""

    ENVIRONMENT = "addresses from the environment"
    CONTAINERS = "containers"
    LOCAL = "the local stack"


@dataclass(frozen=True, slots=True)
class Servers:
    """Addresses of real servers, ready to be used."""

    kafka: str
    redis: str
    s3_endpoint: str
    s3_access_key: str
    s3_secret_key: str
    source: Source

    @property
    def environment(self) -> dict[str, str]:
        """The same, as the variables a service reads."""
        return {
            "GROUNDSWELL_KAFKA": self.kafka,
            "GROUNDSWELL_REDIS": self.redis,
            "GROUNDSWELL_S3_ENDPOINT": self.s3_endpoint,
            "GROUNDSWELL_S3_PUBLIC_ENDPOINT": self.s3_endpoint,
            "GROUNDSWELL_S3_ACCESS_KEY": self.s3_access_key,
            "GROUNDSWELL_S3_SECRET_KEY": self.s3_secret_key,
        }


def choose(environ: Mapping[str, str], *, engine_answers: bool) -> Source:
    """Where the servers come from. Half a set of addresses is a mistake that would test the wrong thing."""
    given = [name for name in ADDRESSES if environ.get(name)]
    if len(given) == len(ADDRESSES):
        return Source.ENVIRONMENT
    if given:
        missing = ", ".join(name for name in ADDRESSES if name not in given)
        raise ValueError(f"{', '.join(given)} set, but not {missing}: set all of them, or none")
    return Source.CONTAINERS if engine_answers else Source.LOCAL


def engine_answers() -> bool:
    """Whether a Docker engine answers (having the client proves nothing)."""
    docker = shutil.which("docker")
    if docker is None:
        return False
    command = [docker, "version", "--format", "{{.Server.Version}}"]
    try:
        return subprocess.run(command, capture_output=True, timeout=10, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def local_settings(root: Path = ROOT) -> Settings:
    """A stack of the tests' own, beside the one of `make up`, with the jars shared."""
    names = ("GROUNDSWELL_LOCAL_DIR", "GROUNDSWELL_PORT_BASE")
    parent = load({name: os.environ[name] for name in names if name in os.environ}, root)
    return Settings(root, parent.local_dir / "test", parent.local_dir / "jars", parent.port_base + TEST_PORTS_FROM_BASE)


@contextlib.contextmanager
def running(environ: Mapping[str, str]) -> Iterator[Servers]:
    """The servers, for as long as the block runs."""
    given = any(environ.get(name) for name in ADDRESSES)
    source = choose(environ, engine_answers=not given and engine_answers())
    if source is Source.ENVIRONMENT:
        kafka, redis, endpoint, access_key, secret_key = (environ[name] for name in ADDRESSES)
        yield Servers(kafka, redis, endpoint, access_key, secret_key, source)
    elif source is Source.CONTAINERS:
        with _containers() as servers:
            yield servers
    else:
        with _local(keep=bool(environ.get(KEEP))) as servers:
            yield servers


@contextlib.contextmanager
def _local(*, keep: bool) -> Iterator[Servers]:
    """The local stack, shared by every test process of this checkout; the last one out ends it.

    Each holds a shared lock while it uses the stack: a lock goes with its process even when that is killed, so the
    count of users is never wrong.
    """
    settings = local_settings()
    settings.local_dir.mkdir(parents=True, exist_ok=True)
    with (settings.local_dir / "users.lock").open("w") as users:
        try:
            with _turn(settings):
                fcntl.flock(users, fcntl.LOCK_SH)
                if not pids.recorded(settings.run_dir, "kafka"):
                    # What earlier runs left behind only makes the broker slow to start.
                    control.clean(settings, say=lambda _: None)
                control.up(settings, servers_only=True, say=lambda _: None)
            credentials = s3_credentials(settings)
            yield Servers(
                settings.kafka,
                settings.redis,
                settings.s3,
                credentials.access_key,
                credentials.secret_key,
                Source.LOCAL,
            )
        finally:
            with _turn(settings):
                fcntl.flock(users, fcntl.LOCK_UN)
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if not keep:
                        control.down(settings, say=lambda _: None)


@contextlib.contextmanager
def _turn(settings: Settings) -> Iterator[None]:
    with (settings.local_dir / "turn.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _containers() -> Iterator[Servers]:
    """The same servers from images. Kafka must announce the port it is reached at, so that is chosen beforehand."""
    from testcontainers.core.container import DockerContainer

    kafka_port, access_key, secret_key = free_port(), "groundswell", "groundswell-tests"
    kafka: Any = DockerContainer(f"apache/kafka:{kafka_version()}").with_bind_ports(9092, kafka_port)
    for name, value in {
        "KAFKA_NODE_ID": "1",
        "KAFKA_PROCESS_ROLES": "broker,controller",
        "KAFKA_CONTROLLER_QUORUM_VOTERS": "1@localhost:9093",
        "KAFKA_CONTROLLER_LISTENER_NAMES": "CONTROLLER",
        "KAFKA_LISTENERS": "PLAINTEXT://:9092,CONTROLLER://:9093",
        "KAFKA_ADVERTISED_LISTENERS": f"PLAINTEXT://127.0.0.1:{kafka_port}",
        "KAFKA_LISTENER_SECURITY_PROTOCOL_MAP": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "KAFKA_AUTO_CREATE_TOPICS_ENABLE": "false",
        "KAFKA_OFFSETS_TOPIC_REPLICATION_FACTOR": "1",
        "KAFKA_TRANSACTION_STATE_LOG_REPLICATION_FACTOR": "1",
        "KAFKA_TRANSACTION_STATE_LOG_MIN_ISR": "1",
        "KAFKA_GROUP_MIN_SESSION_TIMEOUT_MS": "1000",
        "KAFKA_GROUP_INITIAL_REBALANCE_DELAY_MS": "0",
    }.items():
        kafka = kafka.with_env(name, value)
    redis: Any = DockerContainer("redis:7").with_exposed_ports(6379)
    s3: Any = DockerContainer("andrewgaul/s3proxy:4.0.0").with_exposed_ports(80)
    for name, value in {
        "S3PROXY_AUTHORIZATION": "aws-v2-or-v4",
        "S3PROXY_IDENTITY": access_key,
        "S3PROXY_CREDENTIAL": secret_key,
        "JCLOUDS_PROVIDER": "filesystem-nio2",
    }.items():
        s3 = s3.with_env(name, value)
    with kafka, redis, s3:
        servers = Servers(
            f"127.0.0.1:{kafka_port}",
            f"redis://127.0.0.1:{redis.get_exposed_port(6379)}/0",
            f"http://127.0.0.1:{s3.get_exposed_port(80)}",
            access_key,
            secret_key,
            Source.CONTAINERS,
        )
        # Answering their own protocol, as for every other source: `up` finds them external and waits for each.
        control.await_external(load({**servers.environment, "GROUNDSWELL_LOCAL_DIR": ".local/test"}))
        yield servers
