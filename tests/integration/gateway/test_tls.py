"""The device listener's own certificate and its anchors, replaced while it listens."""

from __future__ import annotations

import asyncio
import hashlib
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from deploy.local.credentials import ensure_certificates, renew_certificates
from deploy.local.settings import Settings, load
from services.gateway.identity import DeviceTls, HandshakeFailures
from tests.unit.pki.factory import Ca, der, pem

NAME = "acme.devices.localhost"


@dataclass
class Listener:
    """A TLS port that answers one byte."""

    stack: Settings
    tls: DeviceTls
    port: int
    folder: Path

    def client(self, ca: Ca, name: str) -> ssl.SSLContext:
        key = ec.generate_private_key(ec.SECP256R1())
        secret = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        path = self.folder / f"{name}.pem"
        path.write_bytes(secret + pem(ca.leaf(name, key=key)).encode())
        context = ssl.create_default_context(cafile=str(self.stack.tls_dir / "ca.pem"))
        context.load_cert_chain(path)
        return context

    async def shown(self, context: ssl.SSLContext) -> str:
        """Fingerprint of the certificate that the listener shows; the device's own was accepted."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=context, server_hostname=NAME)
        try:
            assert await reader.read(1) == b"k"
            shown: bytes = writer.get_extra_info("ssl_object").getpeercert(True)
            return hashlib.sha256(shown).hexdigest()
        finally:
            writer.close()


@pytest.fixture
async def listener(tmp_path: Path) -> AsyncIterator[Listener]:
    stack = load({"GROUNDSWELL_LOCAL_DIR": str(tmp_path / "local")})
    ensure_certificates(stack)
    certificate, key = (str(stack.tls_dir / f"gateway.{kind}") for kind in ("pem", "key"))
    tls = DeviceTls(certificate, key, "devices.localhost", HandshakeFailures())

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"k")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls.context)
    async with server:
        yield Listener(stack, tls, server.sockets[0].getsockname()[1], tmp_path)


async def test_a_renewed_certificate_is_shown_to_the_next_connection(listener: Listener) -> None:
    ca = Ca()
    listener.tls.set_anchors("acme", (der(ca.certificate),))
    device = listener.client(ca, "SN-1")
    first = await listener.shown(device)
    assert await listener.shown(device) == first
    renew_certificates(listener.stack)
    listener.tls.renew()
    assert await listener.shown(device) != first


async def test_half_of_a_pair_spoils_nothing(listener: Listener) -> None:
    ca = Ca()
    listener.tls.set_anchors("acme", (der(ca.certificate),))
    device = listener.client(ca, "SN-1")
    first = await listener.shown(device)
    key = listener.stack.tls_dir / "gateway.key"
    key.write_bytes((listener.stack.tls_dir / "pki.key").read_bytes())
    with pytest.raises(ssl.SSLError):
        listener.tls.renew()
    assert await listener.shown(device) == first


async def test_an_issuing_ca_beside_the_factorys_is_an_anchor(listener: Listener) -> None:
    factory, issuing = Ca("Factory"), Ca("Issuing")
    operational = listener.client(issuing, "SN-2")
    listener.tls.set_anchors("acme", (der(factory.certificate),))
    with pytest.raises((ssl.SSLError, ConnectionError, AssertionError)):
        await listener.shown(operational)
    listener.tls.set_anchors("acme", tuple(sorted((der(factory.certificate), der(issuing.certificate)))))
    assert await listener.shown(operational) == await listener.shown(listener.client(factory, "SN-1"))
