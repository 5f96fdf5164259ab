"""The settings of a process: environment variables with the prefix ``GROUNDSWELL_``, read once.

Every variable, its default and its meaning is listed in docs/conventions.md. Components get the one frozen object, or
the values they need; nothing else reads the environment.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

Port = Literal["internal", "public"]


class Settings(BaseSettings):
    """All settings with the defaults of a development installation."""

    model_config = SettingsConfigDict(env_prefix="GROUNDSWELL_", frozen=True, extra="ignore")

    env: str = "dev"
    """Prefix of topics, groups and transactional ids."""
    deployment: str = "local"
    """Trust domain of SPIFFE ids."""
    partitions: int = Field(default=4, ge=1)
    """Partition count of the installation; part of the data format."""
    kafka: str = "127.0.0.1:19092"
    redis: str = "redis://127.0.0.1:19379/0"
    s3_endpoint: str = "http://127.0.0.1:19900"
    s3_public_endpoint: str = ""
    """S3 as devices and operators reach it: signed into links. Empty means the same as ``s3_endpoint``."""
    s3_access_key: str = ""
    s3_secret_key: SecretStr = SecretStr("")
    s3_bucket: str = "groundswell"
    s3_region: str = "us-east-1"
    local_dir: Path = Path(".local")
    tls_dir: Path = Path(".local/tls")
    keystore_dir: Path = Path(".local/keystore")
    bootstrap_secret_file: Path = Path(".local/bootstrap.secret")
    registry_internal: str = "127.0.0.1:19101"
    registry_public: str = "127.0.0.1:19201"
    pki_internal: str = "127.0.0.1:19102"
    pki_public: str = "127.0.0.1:19202"
    artifacts_internal: str = "127.0.0.1:19103"
    artifacts_public: str = "127.0.0.1:19203"
    releases_internal: str = "127.0.0.1:19104"
    releases_public: str = "127.0.0.1:19204"
    rollout_internal: str = "127.0.0.1:19105"
    rollout_public: str = "127.0.0.1:19205"
    webhooks_internal: str = "127.0.0.1:19106"
    webhooks_public: str = "127.0.0.1:19206"
    gateway_listen: str = "127.0.0.1:19443"
    gateway_health: str = "127.0.0.1:19407"
    gateway_domain: str = "devices.localhost"
    gateway_id: str = "local-1"
    """Last segment of this gateway's resource name; each process that runs at the same time needs its own."""
    gateway_cache: int = Field(default=50_000, ge=1)
    """Devices, and as many certificates, that a gateway process keeps in memory; the others are read from Redis."""
    gateway_connections: int = Field(default=20_000, ge=1)
    """Device connections of a gateway process; one more is cut."""
    worker_health: str = "127.0.0.1:19408"
    artifacts_grace_s: int = Field(default=86_400, ge=0)
    """How long content stays in the object store after nothing refers to it."""
    webhook_allow: str = ""
    """Comma list of exact ``host:port`` that webhooks may be sent to whatever the address policy says."""
    quota_products: int = Field(default=1_000, ge=0)
    """Products of an organization. All quotas are answered with QUOTA_EXCEEDED naming them."""
    quota_cohorts: int = Field(default=1_000, ge=0)
    """Cohorts of a product."""
    quota_devices: int = Field(default=1_000_000, ge=0)
    """Devices of an organization that are not retired."""
    quota_members: int = Field(default=1_000, ge=0)
    quota_api_keys: int = Field(default=1_000, ge=0)
    """API keys of an organization that are not revoked."""
    quota_gateways: int = Field(default=1_000, ge=0)
    replica: int = Field(default=0, ge=0)
    """Which of the addresses listed for its service this process has, counted from 0."""
    bind_host: str = ""
    """Interface to listen on; empty means the host of this process's own address."""
    advertise_host: str = ""
    """Host under which other replicas reach this one; empty means that of its own address."""
    snapshot_every_events: int = Field(default=100_000, ge=0)
    """A leader stores a snapshot after this many records; 0 stores none and loads none."""
    snapshot_every_s: float = Field(default=900.0, gt=0)
    """… or after this long, when anything changed."""
    fail_points: str = ""
    """Named fail points, tests only."""

    def addresses(self, service: str, port: Port) -> tuple[str, ...]:
        """Every ``host:port`` of a service, to dial: one for each replica, or one name that stands for all."""
        listed = str(getattr(self, f"{service}_{port}"))
        return tuple(each.strip() for each in listed.split(",") if each.strip())

    def address(self, service: str, port: Port) -> str:
        """``host:port`` of the replica of a service that this process is, as others reach it."""
        own = self._own(service, port)
        return f"{self.advertise_host}:{own.rpartition(':')[2]}" if self.advertise_host else own

    def bind(self, service: str, port: Port) -> str:
        """``host:port`` to listen on."""
        own = self._own(service, port)
        return f"{self.bind_host}:{own.rpartition(':')[2]}" if self.bind_host else own

    def _own(self, service: str, port: Port) -> str:
        listed = self.addresses(service, port)
        if len(listed) == 1 and self.advertise_host:
            return listed[0]  # one name stands for all replicas, which share a port
        if self.replica >= len(listed):
            raise ValueError(
                f"GROUNDSWELL_REPLICA={self.replica}, but GROUNDSWELL_{service.upper()}_{port.upper()} lists "
                f"{len(listed)} addresses: list one for each replica, or set GROUNDSWELL_ADVERTISE_HOST"
            )
        return listed[self.replica]

    @property
    def s3_public(self) -> str:
        """S3 endpoint as seen from outside."""
        return self.s3_public_endpoint or self.s3_endpoint

    def certificate(self, identity: str) -> tuple[bytes, bytes]:
        """PEM of a service's certificate chain and key."""
        return (self.tls_dir / f"{identity}.pem").read_bytes(), (self.tls_dir / f"{identity}.key").read_bytes()

    @property
    def ca(self) -> bytes:
        """PEM of the CA that internal certificates come from."""
        return (self.tls_dir / "ca.pem").read_bytes()
