"""A site for each test."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from groundswell.registry.v1 import registry_pb2, registry_pb2_grpc

from libs.rpc import channel
from services.artifacts.app import build as build_artifacts
from services.registry.app import build as build_registry
from tests.conftest import S3, KafkaEnv
from tests.integration.artifacts.site import Site, serving, settings_of


@pytest.fixture
async def site(kafka_env: KafkaEnv, s3: S3, tmp_path: Path) -> AsyncIterator[Site]:
    made = Site(settings_of(kafka_env, s3, tmp_path / "local"))
    registry = await build_registry(made.settings)
    await serving(registry)
    artifacts = await build_artifacts(made.settings)
    try:
        await serving(artifacts)
        secret = secrets.token_hex(16)
        bootstrap = registry_pb2.BootstrapRequest(
            api_key_id="bootstrap", secret_sha256=hashlib.sha256(secret.encode()).digest()
        )
        async with channel(made.settings, "registry", identity="registry") as opened:
            await registry_pb2_grpc.RegistryInternalServiceStub(opened).Bootstrap(bootstrap, timeout=20)
        await made.organize("acme", f"gsw_platform_bootstrap_{secret}", required_signatures=2)
        yield made
    finally:
        await artifacts.stop()
        await registry.stop()
