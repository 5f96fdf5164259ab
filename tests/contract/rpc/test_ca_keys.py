"""A CA key is decided at its own partition, also when another replica leads it: pki asks itself."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from deploy.local.credentials import ensure_certificates
from deploy.local.settings import load
from libs.errors import UnavailableError
from libs.eventlog import Command, NotLeaderError, Runtime, partition_of
from libs.eventlog.memory import MemoryLog
from libs.rpc import RpcServer
from libs.settings import Settings
from services.pki.app import build
from services.pki.model import ActivateCa, ConfirmSpki, ReleaseSpki, ReserveSpki, routing_key
from tests.contract.eventlog.support import PARTITIONS, SteeredLog, soon
from tests.ports import free_address

FINGERPRINT = "ab" * 32
KEY = routing_key(FINGERPRINT)
HERE = partition_of(KEY, PARTITIONS)
MINE, THEIRS = (f"organizations/{name}/products/p/caCertificates/c" for name in ("acme", "globex"))


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[tuple[Runtime[Any], Runtime[Any]]]:
    """The first leads everything but the key's partition, which the second leads."""
    ensure_certificates(load({"GROUNDSWELL_LOCAL_DIR": str(tmp_path)}))
    keystore = tmp_path / "keystore"
    keystore.mkdir(mode=0o700)
    (keystore / "kek").write_bytes(os.urandom(32))
    (keystore / "kek").chmod(0o600)
    inner = MemoryLog(partitions=PARTITIONS)
    servers: list[RpcServer] = []
    shares = ({index for index in range(PARTITIONS) if index != HERE}, {HERE})
    for share in shares:
        settings = Settings(
            env="t",
            partitions=PARTITIONS,
            tls_dir=tmp_path / "tls",
            keystore_dir=keystore,
            pki_internal=free_address(),
            pki_public=free_address(),
        )
        log = SteeredLog(inner)
        server = await build(settings, log=log)
        await server.start()
        servers.append(server)
        log.election.assign(*share)
        await server._runtime.wait_leading(soon(), sorted(share))
    first, second = (server._runtime for server in servers)
    await first.catch_up(KEY, soon())
    yield first, second
    for server in servers:
        await server.stop()


async def holder(runtime: Runtime[Any], command: object) -> str:
    result: Any = (await runtime.submit(Command(KEY, command, principal="task"), soon())).result
    return str(result.ca_certificate) if result is not None else ""


async def test_a_key_has_one_holder_whoever_asks_where(pair: tuple[Runtime[Any], Runtime[Any]]) -> None:
    away, home = pair
    assert away.leader_elsewhere(KEY)
    assert await holder(away, ReserveSpki(FINGERPRINT, MINE)) == MINE
    assert await holder(home, ReserveSpki(FINGERPRINT, THEIRS)) == MINE
    assert await holder(away, ReserveSpki(FINGERPRINT, MINE)) == MINE, "again, after a fail-over"
    assert await holder(away, ReleaseSpki(FINGERPRINT, MINE)) == ""
    assert await holder(away, ReserveSpki(FINGERPRINT, THEIRS)) == THEIRS
    assert await holder(away, ConfirmSpki(FINGERPRINT, THEIRS)) == THEIRS
    assert await holder(home, ReserveSpki(FINGERPRINT, MINE)) == THEIRS


async def test_other_commands_of_tasks_are_not_passed_on(pair: tuple[Runtime[Any], Runtime[Any]]) -> None:
    away, _ = pair
    with pytest.raises(NotLeaderError):
        await away.submit(Command(KEY, ActivateCa(MINE)), soon())


async def test_the_other_replica_is_gone(pair: tuple[Runtime[Any], Runtime[Any]], tmp_path: Path) -> None:
    away, home = pair
    await home.stop()
    with pytest.raises(UnavailableError):
        await holder(away, ReserveSpki(FINGERPRINT, MINE))
