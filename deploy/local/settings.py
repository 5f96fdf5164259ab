"""All ports and settings of the local stack, with their defaults in one block.

A checkout is moved as a whole with GROUNDSWELL_PORT_BASE and GROUNDSWELL_LOCAL_DIR, so that two can run side by side.
Any single value is replaced by its own variable of docs/conventions.md; a server whose address is given that way is
somebody else's, and is not started.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from deploy.local.errors import StackError

# ---- defaults ------------------------------------------------------------------------------------------------------
PORT_BASE = 19000
KAFKA, KAFKA_CONTROLLER, REDIS, S3 = 92, 93, 379, 900  # offsets from the base, here and below
SERVICES = {"registry": 101, "pki": 102, "artifacts": 103, "releases": 104, "rollout": 105, "webhooks": 106}
PUBLIC = 100  # a service's public port, from its internal one
REPLICA = 10  # the next replica's ports, from those of the one before
MAX_REPLICAS = 9
GATEWAY, GATEWAY_HEALTH, WORKER_HEALTH = 443, 407, 408
GATEWAYS_HEALTH, MOST_GATEWAYS = 420, 16  # of the second and every further gateway, by its number
WEBHOOK_RECEIVER = 700  # where a receiver on this machine may listen: the one exception to the webhook policy
ENV, DEPLOYMENT, PARTITIONS, BUCKET = "dev", "local", 4, "groundswell"
GATEWAY_DOMAIN = "devices.localhost"
HOST = "127.0.0.1"
LOCAL_DIR = ".local"
# --------------------------------------------------------------------------------------------------------------------

SPAN = 1000
IDENTITIES = (*SERVICES, "gateway", "worker")
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Settings:
    """Where everything of one local stack is. Build it with `load`."""

    root: Path
    local_dir: Path
    jars_dir: Path
    port_base: int
    overrides: Mapping[str, str] = field(default_factory=dict)
    replicas: int = 1
    """Processes of each service that has a log; the gateway and the worker are one each."""
    gateways: int = 1
    """Gateway processes, all behind one device port (GROUNDSWELL_GATEWAYS)."""

    def port(self, offset: int) -> int:
        """A port of this stack's block."""
        return self.port_base + offset

    def address(self, offset: int) -> str:
        """`host:port` of this stack's block."""
        return f"{HOST}:{self.port(offset)}"

    @property
    def environment(self) -> dict[str, str]:
        """The variables of docs/conventions.md as services get them, without the S3 credentials."""
        s3_endpoint = self.overrides.get("GROUNDSWELL_S3_ENDPOINT", f"http://{self.address(S3)}")
        defaults = {
            "GROUNDSWELL_ENV": ENV,
            "GROUNDSWELL_DEPLOYMENT": DEPLOYMENT,
            "GROUNDSWELL_PARTITIONS": str(PARTITIONS),
            "GROUNDSWELL_PORT_BASE": str(self.port_base),
            "GROUNDSWELL_LOCAL_DIR": str(self.local_dir),
            "GROUNDSWELL_KAFKA": self.address(KAFKA),
            "GROUNDSWELL_REDIS": f"redis://{self.address(REDIS)}/0",
            "GROUNDSWELL_S3_ENDPOINT": s3_endpoint,
            "GROUNDSWELL_S3_PUBLIC_ENDPOINT": s3_endpoint,
            "GROUNDSWELL_S3_BUCKET": BUCKET,
            "GROUNDSWELL_TLS_DIR": str(self.tls_dir),
            "GROUNDSWELL_KEYSTORE_DIR": str(self.local_dir / "keystore"),
            "GROUNDSWELL_BOOTSTRAP_SECRET_FILE": str(self.bootstrap_secret),
            "GROUNDSWELL_GATEWAY_LISTEN": self.address(GATEWAY),
            "GROUNDSWELL_GATEWAY_HEALTH": self.address(GATEWAY_HEALTH),
            "GROUNDSWELL_WORKER_HEALTH": self.address(WORKER_HEALTH),
            "GROUNDSWELL_GATEWAY_DOMAIN": GATEWAY_DOMAIN,
            "GROUNDSWELL_WEBHOOK_ALLOW": self.webhook_receiver,
        }
        for name, offset in SERVICES.items():
            offsets = range(offset, offset + self.replicas * REPLICA, REPLICA)
            defaults[f"GROUNDSWELL_{name.upper()}_INTERNAL"] = ",".join(map(self.address, offsets))
            defaults[f"GROUNDSWELL_{name.upper()}_PUBLIC"] = ",".join(self.address(each + PUBLIC) for each in offsets)
        return defaults | dict(self.overrides)

    def is_external(self, variable: str) -> bool:
        """Whether that server's address was given, so that it is not ours to start."""
        return variable in self.overrides

    @property
    def webhook_receiver(self) -> str:
        """`host:port` that webhooks may be sent to although it is loopback."""
        return self.address(WEBHOOK_RECEIVER)

    @property
    def env(self) -> str:
        """Prefix of topics."""
        return self.environment["GROUNDSWELL_ENV"]

    @property
    def deployment(self) -> str:
        """Trust domain of the SPIFFE ids."""
        return self.environment["GROUNDSWELL_DEPLOYMENT"]

    @property
    def partitions(self) -> int:
        """Partition count of the installation."""
        return int(self.environment["GROUNDSWELL_PARTITIONS"])

    @property
    def kafka(self) -> str:
        """Bootstrap servers."""
        return self.environment["GROUNDSWELL_KAFKA"]

    @property
    def redis(self) -> str:
        """Redis URL."""
        return self.environment["GROUNDSWELL_REDIS"]

    @property
    def s3(self) -> str:
        """S3 endpoint URL."""
        return self.environment["GROUNDSWELL_S3_ENDPOINT"]

    @property
    def bucket(self) -> str:
        """S3 bucket."""
        return self.environment["GROUNDSWELL_S3_BUCKET"]

    @property
    def tls_dir(self) -> Path:
        """Development CA and certificates."""
        return Path(self.overrides.get("GROUNDSWELL_TLS_DIR", str(self.local_dir / "tls")))

    @property
    def keystore_dir(self) -> Path:
        """Sealed keys and the key-encryption key."""
        return Path(self.environment["GROUNDSWELL_KEYSTORE_DIR"])

    @property
    def bootstrap_secret(self) -> Path:
        """What the first platform key is exchanged for."""
        return self.local_dir / "bootstrap.secret"

    @property
    def data_dir(self) -> Path:
        """What the servers store."""
        return self.local_dir / "data"

    @property
    def config_dir(self) -> Path:
        """Configuration files written for the servers."""
        return self.local_dir / "config"

    @property
    def logs_dir(self) -> Path:
        """One log a process."""
        return self.local_dir / "logs"

    @property
    def run_dir(self) -> Path:
        """Pid files and the supervisor's state."""
        return self.local_dir / "run"


def load(environ: Mapping[str, str] | None = None, root: Path = ROOT) -> Settings:
    """The settings of this checkout, from the environment."""
    environ = os.environ if environ is None else environ
    base = environ.get("GROUNDSWELL_PORT_BASE") or str(PORT_BASE)
    if not base.isdigit() or not 1024 <= int(base) <= 65535 - SPAN:
        raise StackError(
            f"GROUNDSWELL_PORT_BASE={base} is not usable: give one from 1024 to {65535 - SPAN}, such as {PORT_BASE}"
        )
    replicas = environ.get("GROUNDSWELL_REPLICAS") or "1"
    if not replicas.isdigit() or not 1 <= int(replicas) <= MAX_REPLICAS:
        raise StackError(f"GROUNDSWELL_REPLICAS={replicas} is not usable: give a number from 1 to {MAX_REPLICAS}")
    local_dir = root / (environ.get("GROUNDSWELL_LOCAL_DIR") or LOCAL_DIR)
    stack = Settings(root, local_dir, Path(environ.get("GROUNDSWELL_JARS_DIR") or local_dir / "jars"), int(base))
    known = stack.environment.keys() | {"GROUNDSWELL_S3_ACCESS_KEY", "GROUNDSWELL_S3_SECRET_KEY"}
    placed = {"GROUNDSWELL_PORT_BASE", "GROUNDSWELL_LOCAL_DIR", "GROUNDSWELL_BOOTSTRAP_SECRET_FILE"}
    overrides = {name: environ[name] for name in sorted(known - placed) if environ.get(name)}
    partitions = overrides.get("GROUNDSWELL_PARTITIONS", "1")
    if not partitions.isdigit() or int(partitions) < 1:
        raise StackError(f"GROUNDSWELL_PARTITIONS={partitions} is not usable: give a whole number from 1")
    gateways = environ.get("GROUNDSWELL_GATEWAYS") or "1"
    if not gateways.isdigit() or not 1 <= int(gateways) <= MOST_GATEWAYS:
        raise StackError(f"GROUNDSWELL_GATEWAYS={gateways} is not usable: give a number from 1 to {MOST_GATEWAYS}")
    return Settings(root, local_dir, stack.jars_dir, int(base), overrides, int(replicas), int(gateways))
