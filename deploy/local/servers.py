"""Kafka, Redis and S3 as ordinary processes: their pinned programs, configuration and command lines."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import subprocess
import uuid
from collections.abc import Callable
from pathlib import Path

from deploy.local.credentials import S3Credentials
from deploy.local.errors import StackError
from deploy.local.files import write
from deploy.local.settings import HOST, KAFKA, KAFKA_CONTROLLER, REDIS, S3, Settings
from deploy.local.specs import KafkaProbe, RedisProbe, S3Probe, Spec

HERE = Path(__file__).resolve().parent
_JAVA_AT_LEAST = 17
_JVM = ("-Xmx512m", "-XX:+UseSerialGC")
# program -> Debian package
PACKAGES = {"java": "default-jre-headless", "mvn": "maven", "redis-server": "redis-server"}

Say = Callable[[str], None]


def server_specs(settings: Settings, credentials: S3Credentials, say: Say) -> tuple[Spec, ...]:
    """The servers that are ours to start, with everything they need in place."""
    specs = []
    if not settings.is_external("GROUNDSWELL_KAFKA"):
        specs.append(_kafka(settings, say))
    if not settings.is_external("GROUNDSWELL_REDIS"):
        specs.append(_redis(settings, say))
    if not settings.is_external("GROUNDSWELL_S3_ENDPOINT"):
        specs.append(_s3(settings, credentials, say))
    return tuple(specs)


def kafka_properties(settings: Settings) -> str:
    """Broker settings of a single node."""
    broker, controller = settings.address(KAFKA), settings.address(KAFKA_CONTROLLER)
    return _properties(
        {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": f"1@{controller}",
            "controller.listener.names": "CONTROLLER",
            "listeners": f"PLAINTEXT://{broker},CONTROLLER://{controller}",
            "advertised.listeners": f"PLAINTEXT://{broker}",
            "log.dirs": str(settings.data_dir / "kafka"),
            "auto.create.topics.enable": "false",
            "default.replication.factor": "1",
            "offsets.topic.replication.factor": "1",
            "offsets.topic.num.partitions": "4",
            "transaction.state.log.replication.factor": "1",
            "transaction.state.log.min.isr": "1",
            "transaction.state.log.num.partitions": "4",
            "share.coordinator.state.topic.replication.factor": "1",
            "share.coordinator.state.topic.min.isr": "1",
            # A dead leader is noticed after its session; a person (and a test) should not wait six seconds for that.
            "group.min.session.timeout.ms": "1000",
            "group.initial.rebalance.delay.ms": "0",
            # A broker that was silent for so long loses all partitions when it goes on, and with them the markers of
            # transactions that end just then (docs/decisions/0010). One that was killed is back so much later at most.
            "broker.session.timeout.ms": "20000",
            "broker.heartbeat.interval.ms": "500",
            # Open transactions of the dead hold back every read_committed reader until they are ended.
            "transaction.abort.timed.out.transaction.cleanup.interval.ms": "1000",
        }
    )


def redis_configuration(settings: Settings) -> str:
    """Redis holds only what can be rebuilt: nothing is written to disk."""
    lines = (
        f"bind {HOST}",
        f"port {settings.port(REDIS)}",
        "daemonize no",
        "appendonly no",
        'save ""',
        f'dir "{settings.data_dir / "redis"}"',
    )
    return "\n".join(lines) + "\n"


def s3_properties(settings: Settings, credentials: S3Credentials) -> str:
    """S3Proxy over a folder. The folder must be absolute: with a relative one listings and multipart are lost."""
    return _properties(
        {
            "s3proxy.endpoint": f"http://{settings.address(S3)}",
            "s3proxy.authorization": "aws-v2-or-v4",
            "s3proxy.identity": credentials.access_key,
            "s3proxy.credential": credentials.secret_key,
            "jclouds.provider": "filesystem-nio2",
            "jclouds.filesystem.basedir": str((settings.data_dir / "s3").resolve()),
        }
    )


def _kafka(settings: Settings, say: Say) -> Spec:
    java = _java(say)
    jars = _jars(settings, "kafka", say)
    config = settings.config_dir / "kafka.properties"
    write(config, kafka_properties(settings))
    logging = f"-Dlog4j2.configurationFile={HERE / 'kafka' / 'log4j2.properties'}"
    java_line = (java, *_JVM, logging, "-cp", f"{jars}/*")
    data = settings.data_dir / "kafka"
    if not (data / "meta.properties").exists():
        data.mkdir(parents=True, exist_ok=True)
        cluster = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=").replace("-", "_")
        _run([*java_line, "kafka.tools.StorageTool", "format", "-t", cluster, "-c", str(config)], "formatting Kafka")
    return Spec(
        name="kafka",
        argv=(*java_line, "kafka.Kafka", str(config)),
        cwd=str(settings.local_dir),
        env=_plain_environment(),
        ports=(settings.port(KAFKA), settings.port(KAFKA_CONTROLLER)),
        stage=0,
        probe=KafkaProbe(settings.kafka),
    )


def kafka_version() -> str:
    """The pinned one."""
    pom = (HERE / "kafka" / "pom.xml").read_text()
    found = re.search(r"<artifactId>kafka_[\d.]+</artifactId>\s*<version>([\d.]+)</version>", pom)
    assert found is not None  # noqa: S101 - a file of this repository
    return found[1]


def _redis(settings: Settings, say: Say) -> Spec:
    program = require("redis-server", say)
    config = settings.config_dir / "redis.conf"
    (settings.data_dir / "redis").mkdir(parents=True, exist_ok=True)
    write(config, redis_configuration(settings))
    return Spec(
        name="redis",
        argv=(program, str(config)),
        cwd=str(settings.local_dir),
        env=_plain_environment(),
        ports=(settings.port(REDIS),),
        stage=0,
        probe=RedisProbe(settings.redis),
    )


def _s3(settings: Settings, credentials: S3Credentials, say: Say) -> Spec:
    java = _java(say)
    jars = _jars(settings, "s3", say)
    config = settings.config_dir / "s3.properties"
    (settings.data_dir / "s3").mkdir(parents=True, exist_ok=True)
    write(config, s3_properties(settings, credentials))
    logging = f"-Dlogback.configurationFile={HERE / 's3' / 'logback.xml'}"
    return Spec(
        name="s3",
        argv=(java, *_JVM, logging, "-cp", f"{jars}/*", "org.gaul.s3proxy.Main", "--properties", str(config)),
        cwd=str(settings.local_dir),
        env=_plain_environment(),
        ports=(settings.port(S3),),
        stage=0,
        probe=S3Probe(settings.s3, settings.bucket, credentials.access_key, credentials.secret_key),
    )


def require(program: str, say: Say) -> str:
    """The program's path; installed with apt when that is possible without asking, else a line that names it."""
    found = shutil.which(program)
    if found:
        return found
    package = PACKAGES[program]
    install = _installer()
    if install:
        say(f"{program} is missing: installing {package}")
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run([*install, "update", "-qq"], env=environment, check=False, capture_output=True)
        command = [*install, "install", "-y", "-qq", "--no-install-recommends", package]
        subprocess.run(command, env=environment, check=False, capture_output=True)
        found = shutil.which(program)
        if found:
            return found
    raise StackError(f"{program} is missing: install the package {package} (sudo apt-get install {package})")


def _installer() -> list[str]:
    """How apt can be run without asking anybody; empty when it cannot."""
    apt = shutil.which("apt-get")
    if apt is None:
        return []
    if os.geteuid() == 0:
        return [apt]
    sudo = shutil.which("sudo")
    if sudo and subprocess.run([sudo, "-n", "true"], check=False, capture_output=True).returncode == 0:
        return [sudo, "-n", apt]
    return []


def _java(say: Say) -> str:
    home = os.environ.get("JAVA_HOME")
    own = Path(home) / "bin" / "java" if home else None
    java = str(own) if own and own.exists() else require("java", say)
    text = subprocess.run([java, "-version"], capture_output=True, text=True, check=False).stderr
    found = re.search(r'version "(\d+)', text)
    if not found or int(found[1]) < _JAVA_AT_LEAST:
        version = text.splitlines()[0] if text else "no version"
        raise StackError(
            f"Java {_JAVA_AT_LEAST} or newer is needed and {java} says {version}: install one, set JAVA_HOME"
        )
    return java


def _jars(settings: Settings, server: str, say: Say) -> Path:
    """The server's jars, fetched once; named after the pom, so that a new pin is fetched and an old one kept."""
    pom = HERE / server / "pom.xml"
    folder = settings.jars_dir / f"{server}-{hashlib.sha256(pom.read_bytes()).hexdigest()[:12]}"
    if folder.exists():
        return folder
    maven = require("mvn", say)
    say(f"fetching the jars of {server} (once)")
    settings.jars_dir.mkdir(parents=True, exist_ok=True)
    partial = settings.jars_dir / f".{folder.name}.{os.getpid()}"
    goal = [maven, "-q", "-B", "-C", "-f", str(pom), "dependency:copy-dependencies"]
    try:
        _run([*goal, f"-DoutputDirectory={partial}", "-DincludeScope=runtime"], f"fetching the jars of {server}")
        _move(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _move(partial: Path, folder: Path) -> None:
    """Give what is complete its name. Two stacks of one checkout may fetch at the same time: the first one's counts."""
    try:
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _run(command: list[str], doing: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise StackError(f"{doing} failed (exit {done.returncode})", (done.stdout + done.stderr)[-2000:])


def _properties(values: dict[str, str]) -> str:
    return "".join(f"{name}={value}\n" for name, value in values.items())


def _plain_environment() -> dict[str, str]:
    """Servers get no secrets and no settings of ours."""
    kept = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "JAVA_HOME", "USER")
    return {name: os.environ[name] for name in kept if name in os.environ}
