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
    fail_points: str = ""
    """Named fail points, tests only."""

    def address(self, service: str, port: Port) -> str:
        """``host:port`` of a service, to bind and to dial."""
        return str(getattr(self, f"{service}_{port}"))

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
