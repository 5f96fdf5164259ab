"""Internal certificates are replaced under a running service and a running client."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from groundswell.pki.v1 import pki_pb2, pki_pb2_grpc

from deploy.local.credentials import ensure_all, renew_certificates
from deploy.local.settings import Settings as StackSettings
from deploy.local.settings import load
from libs.eventlog import Deadline
from libs.eventlog.memory import MemoryLog
from libs.rpc import RpcServer, channel
from libs.rpc.certificates import RenewedChannel
from libs.settings import Settings
from services.pki.app import build
from tests.integration.registry.running import TARGET
from tests.ports import free_address

ABSENT = pki_pb2.GetDeviceCertificateRequest(name=f"organizations/acme/deviceCertificates/{'0' * 64}")


@dataclass
class Site:
    """A running pki and the files of everybody."""

    stack: StackSettings
    settings: Settings
    server: RpcServer

    @property
    def tls(self) -> Path:
        return self.settings.tls_dir

    async def fresh(self, folder: Path | None = None, anchors: bytes = b"") -> grpc.StatusCode:
        """How a new connection with the files of a folder ends; NOT_FOUND means that both sides believed each other."""
        folder = folder or self.tls
        credentials = grpc.ssl_channel_credentials(
            anchors or (folder / "ca.pem").read_bytes(),
            (folder / "gateway.key").read_bytes(),
            (folder / "gateway.pem").read_bytes(),
        )
        # A pool of its own, or a connection of before would be used again.
        options = (*TARGET, ("grpc.use_local_subchannel_pool", 1))
        async with grpc.aio.secure_channel(self.settings.pki_internal, credentials, options=options) as opened:
            return await code(pki_pb2_grpc.PkiInternalServiceStub(opened))


async def code(stub: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.LookupDeviceCertificate(ABSENT, timeout=10)
    return error.value.code()


def newest(ca_pem: bytes) -> bytes:
    """The first certificate of a file with several."""
    end = b"-----END CERTIFICATE-----\n"
    return ca_pem[: ca_pem.index(end) + len(end)]


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    stack = load({"GROUNDSWELL_LOCAL_DIR": str(tmp_path)})
    ensure_all(stack)
    settings = Settings(
        env="t",
        tls_dir=stack.tls_dir,
        keystore_dir=stack.keystore_dir,
        pki_internal=free_address(),
        pki_public=free_address(),
        registry_internal=free_address(),
    )
    server = await build(settings, log=MemoryLog(partitions=settings.partitions))
    await server.start()
    try:
        await server._runtime.wait_ready(Deadline.after(20))
        yield Site(stack, settings, server)
    finally:
        await server.stop()


async def test_a_service_accepts_a_client_of_a_new_ca_without_a_restart(site: Site, tmp_path: Path) -> None:
    before = tmp_path / "before"
    shutil.copytree(site.tls, before)
    assert await site.fresh() is grpc.StatusCode.NOT_FOUND

    renew_certificates(site.stack, new_ca=True)

    new_ca = newest((site.tls / "ca.pem").read_bytes())
    assert new_ca not in (before / "ca.pem").read_bytes()
    assert await site.fresh(anchors=new_ca) is grpc.StatusCode.NOT_FOUND, "the new client believes the new server"
    # Who has the old certificate and believes both is still let in; who believes only the old CA is shown a stranger.
    assert await site.fresh(before, (site.tls / "ca.pem").read_bytes()) is grpc.StatusCode.NOT_FOUND
    assert await site.fresh(before) is grpc.StatusCode.UNAVAILABLE

    renew_certificates(site.stack, forget_old_ca=True)

    assert (site.tls / "ca.pem").read_bytes() == new_ca
    assert await site.fresh() is grpc.StatusCode.NOT_FOUND
    assert await site.fresh(before, new_ca) is grpc.StatusCode.UNAVAILABLE, "nobody believes the old CA any more"


async def test_a_channel_goes_on_over_both_steps(site: Site) -> None:
    opened = channel(site.settings, "pki", identity="gateway")
    try:
        stub = pki_pb2_grpc.PkiInternalServiceStub(opened)
        assert isinstance(opened, RenewedChannel)
        assert await code(stub) is grpc.StatusCode.NOT_FOUND
        first = opened.current()
        renew_certificates(site.stack, new_ca=True)
        async with asyncio.timeout(10):
            while opened.current() is first:
                assert await code(stub) is grpc.StatusCode.NOT_FOUND
        renew_certificates(site.stack, forget_old_ca=True)
        second = opened.current()
        async with asyncio.timeout(10):
            while opened.current() in (first, second):
                assert await code(stub) is grpc.StatusCode.NOT_FOUND
        assert await code(stub) is grpc.StatusCode.NOT_FOUND
    finally:
        await opened.close()


async def test_half_of_a_pair_is_left_until_it_is_whole(site: Site, tmp_path: Path) -> None:
    before = tmp_path / "before"
    shutil.copytree(site.tls, before)
    (site.tls / "pki.key").write_bytes((site.tls / "registry.key").read_bytes())
    assert await site.fresh() is grpc.StatusCode.NOT_FOUND
    (site.tls / "pki.pem").unlink()
    assert await site.fresh() is grpc.StatusCode.NOT_FOUND
    (site.tls / "pki.pem").write_bytes((site.tls / "registry.pem").read_bytes())
    assert await site.fresh() is grpc.StatusCode.NOT_FOUND
