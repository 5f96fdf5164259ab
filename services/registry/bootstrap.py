"""`python -m services.registry.bootstrap`: the platform's key, made from a 0600 secret; idempotent.

Calls the registry's internal port as the registry itself and writes `profile.json` (0600) for the command line. The
secret never leaves this machine: the registry gets its SHA-256. Keys that people added to the profile are kept.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any, Final

import grpc
from groundswell.registry.v1 import registry_pb2 as pb
from groundswell.registry.v1 import registry_pb2_grpc

from libs.rpc import channel, error_of, retry_unavailable
from libs.settings import Settings

KEY_ID: Final = "bootstrap"
SERVICES: Final = ("registry", "pki", "artifacts", "releases", "rollout", "webhooks")
WAIT_STEP_S: Final = 0.25
ATTEMPTS: Final = 160
"""A registry that has just been started claims its partitions within seconds; this waits for about 40."""


class BootstrapError(Exception):
    """Cannot go on; the message says what to do."""


def read_secret(path: Path) -> str:
    """The secret, if nobody else can read it."""
    try:
        status = path.stat()
        secret = path.read_text().strip()
    except OSError as error:
        raise BootstrapError(f"the bootstrap secret {path} cannot be read: {error.strerror}") from None
    if status.st_mode & 0o077:
        raise BootstrapError(f"others may read {path}: make it private (chmod 600) and change the secret")
    if len(secret) < 32:
        raise BootstrapError(f"the secret in {path} is shorter than 32 characters")
    return secret


def profile_document(settings: Settings, secret: str, target: Path, previous: dict[str, Any]) -> dict[str, Any]:
    """Contents of the profile; what people keep in it stays."""
    return {
        **previous,
        "platform_key": f"gsw_platform_{KEY_ID}_{secret}",
        "endpoints": {service: ",".join(settings.addresses(service, "public")) for service in SERVICES},
        "gateway": settings.gateway_listen,
        "gateway_domain": settings.gateway_domain,
        "ca": os.path.relpath(settings.tls_dir / "ca.pem", target.parent),
    }


def write_profile(settings: Settings, secret: str) -> Path:
    """Write the profile in one step, readable by its owner alone."""
    target = settings.local_dir / "profile.json"
    try:
        previous = json.loads(target.read_text())
    except FileNotFoundError:
        previous = {}
    except ValueError:
        raise BootstrapError(f"{target} is not JSON: move it away and repeat") from None
    scratch = target.with_suffix(f".{os.getpid()}")
    text = json.dumps(profile_document(settings, secret, target, previous), indent=1)
    with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text + "\n")
    scratch.replace(target)
    return target


async def bootstrap(settings: Settings) -> Path:
    """Make the platform's key known and write the profile."""
    secret = read_secret(settings.bootstrap_secret_file)
    request = pb.BootstrapRequest(api_key_id=KEY_ID, secret_sha256=hashlib.sha256(secret.encode()).digest())
    async with channel(settings, "registry", identity="registry") as to_registry:
        stub = registry_pb2_grpc.RegistryInternalServiceStub(to_registry)
        try:
            await retry_unavailable(lambda: stub.Bootstrap(request, timeout=5), ATTEMPTS, WAIT_STEP_S, WAIT_STEP_S)
        except grpc.aio.AioRpcError as error:
            raise BootstrapError(f"the registry refused: {error_of(error)}") from error
    return await asyncio.to_thread(write_profile, settings, secret)


def main() -> int:
    """Exit status."""
    try:
        written = asyncio.run(bootstrap(Settings()))
    except BootstrapError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"platform key: ready; profile: {written}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
