"""``python -m services.registry.bootstrap``: makes the platform key known and writes the profile for ``swell``.

Reads a secret from a file that only its owner can read, registers its SHA-256 over the internal port, and writes the
profile (0600). Repeating it changes nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import grpc
from groundswell.registry.v1 import registry_pb2, registry_pb2_grpc

from libs.rpc import channel
from libs.rpc.errors import error_of
from libs.settings import Settings

SERVICES = ("registry", "pki", "artifacts", "releases", "rollout", "webhooks")
KEY_ID = "bootstrap"


def read_secret(path: Path) -> str:
    """The secret, or SystemExit with what to do."""
    try:
        mode = path.stat().st_mode & 0o777
        secret = path.read_text().strip()
    except OSError as error:
        raise SystemExit(f"bootstrap: {path} cannot be read ({error.strerror}): run `make up` again") from None
    if mode & 0o077:
        raise SystemExit(f"bootstrap: {path} is readable by others (mode {mode:o}): chmod 600 it")
    if len(secret) < 32:
        raise SystemExit(f"bootstrap: {path} holds fewer than 32 characters: delete it and run `make up`")
    return secret


async def register(settings: Settings, secret: str) -> None:
    """Make the key known; the registry may still be claiming its partitions, so UNAVAILABLE is retried."""
    request = registry_pb2.BootstrapRequest(api_key_id=KEY_ID, secret_sha256=hashlib.sha256(secret.encode()).digest())
    async with channel(settings, "registry", identity="registry") as open_channel:
        stub = registry_pb2_grpc.RegistryInternalServiceStub(open_channel)
        async with asyncio.timeout(45):
            while True:
                try:
                    await stub.Bootstrap(request)
                    return
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.UNAVAILABLE:
                        raise SystemExit(f"bootstrap: {error_of(error)}") from None
                await asyncio.sleep(0.2)


def write_profile(settings: Settings, secret: str) -> Path:
    """Write the profile; keys that were added to it stay."""
    path = settings.local_dir / "profile.json"
    document: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    document |= {
        "platform_key": f"gsw_platform_{KEY_ID}_{secret}",
        "endpoints": {name: settings.address(name, "public") for name in SERVICES},
        "gateway": settings.gateway_listen,
        "gateway_domain": settings.gateway_domain,
        "ca": os.path.relpath(settings.tls_dir / "ca.pem", path.parent),
    }
    scratch = path.with_suffix(f".{os.getpid()}")
    with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(document, file, indent=1)
    scratch.replace(path)
    return path


def main() -> int:
    """Command line."""
    settings = Settings()
    secret = read_secret(settings.bootstrap_secret_file)
    try:
        asyncio.run(register(settings, secret))
    except TimeoutError:
        print("bootstrap: the registry did not answer within 45 s: see its log", file=sys.stderr)
        return 1
    write_profile(settings, secret)
    return 0


if __name__ == "__main__":
    sys.exit(main())
