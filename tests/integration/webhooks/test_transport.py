"""One attempt against real sockets on loopback: what the guard stops, and every limit. Only fakes resolve names."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp.abc import AbstractResolver, ResolveResult

from demo.factory import server_identity
from libs.eventlog.config import wall_clock_ms
from services.webhooks import transport as limits
from services.webhooks.policy import UrlPolicy, allows_text
from services.webhooks.transport import HttpsTransport, Outcome, Target


class Resolver(AbstractResolver):
    """Answers every name with one address."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.asked: list[str] = []

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        self.asked.append(host)
        kind = socket.AF_INET6 if ":" in self.address else socket.AF_INET
        return [
            ResolveResult(
                hostname=host, host=self.address, port=port, family=kind, proto=0, flags=socket.AI_NUMERICHOST
            )
        ]

    async def close(self) -> None:
        """Nothing to close."""


class Server:
    """A TLS server that says exactly what a test tells it to."""

    def __init__(self, folder: Path) -> None:
        self.identity, ca = server_identity(folder)
        self.ca_pem = ca.read_text()
        self.requests: list[bytes] = []
        self.connections = 0
        self.answer: bytes = b"HTTP/1.1 204 No Content\r\n\r\n"
        self.port = 0
        self.hang = asyncio.Event()
        self._server: asyncio.Server | None = None

    async def start(self, maximum: ssl.TLSVersion | None = None) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.identity.certificate, self.identity.key)
        if maximum is not None:
            context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
            context.maximum_version = maximum
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=context)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        self.hang.set()
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                self.requests.append(head)
                size = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
                await reader.readexactly(int(size[0].split(b":")[1]) if size else 0)
                if not self.answer:
                    await self.hang.wait()
                    break
                writer.write(self.answer)
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    made = Server(tmp_path)
    await made.start()
    yield made
    await made.stop()


async def attempt(url: str, ca_pem: str, *, allow: str = "", resolver: Any = None, times: int = 1) -> Outcome:
    transport = HttpsTransport(UrlPolicy.parse(allow), wall_clock_ms, resolver=resolver)
    await transport.start()
    try:
        for _ in range(times):
            outcome = await transport.post(Target(url, ca_pem), {"webhook-id": "msg_1"}, b"{}")
        return outcome
    finally:
        await transport.stop()


def exception(server: Server) -> str:
    return f"127.0.0.1:{server.port}"


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::1", "0.0.0.0", "10.0.0.1"],  # noqa: S104
)
async def test_t63_a_public_name_that_is_answered_with_a_denied_address(server: Server, address: str) -> None:
    resolver = Resolver(address)
    outcome = await attempt("https://hooks.example/", server.ca_pem, resolver=resolver)
    assert outcome.error.startswith("ADDRESS_NOT_ALLOWED")
    assert address not in outcome.error
    assert resolver.asked == ["hooks.example"]


async def test_t63_the_guard_stands_although_the_port_is_listened_on(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "PORTS", frozenset({server.port}))
    for host in ("127.0.0.1", "[::ffff:127.0.0.1]", "localhost", "hooks.example"):
        outcome = await attempt(f"https://{host}:{server.port}/", server.ca_pem, resolver=Resolver("127.0.0.1"))
        assert outcome.error.startswith("ADDRESS_NOT_ALLOWED"), host
    assert server.connections == 0
    good = await attempt(f"https://127.0.0.1:{server.port}/", server.ca_pem, allow=exception(server))
    assert good.succeeded


class Rebinding(Resolver):
    """A public address the first time, one of ours from then on: the classic of DNS rebinding."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await super().resolve(host, port, family)
        self.address = "127.0.0.1"
        return found


async def test_t63_a_name_that_is_answered_differently_each_time_is_judged_each_time(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "PORTS", frozenset({server.port}))
    judged: list[str] = []

    def judge(text: str) -> bool:
        judged.append(text)
        return allows_text(text)

    monkeypatch.setattr(limits, "allows_text", judge)
    # The first answer is from a range that the policy denies as well: no packet may leave this machine.
    resolver = Rebinding("192.0.2.7")
    transport = HttpsTransport(UrlPolicy(), wall_clock_ms, resolver=resolver)
    await transport.start()
    try:
        for name in ("one.example", "two.example"):
            target = Target(f"https://{name}:{server.port}/", server.ca_pem)
            outcome = await transport.post(target, {"webhook-id": "msg_1"}, b"{}")
            assert outcome.error.startswith("ADDRESS_NOT_ALLOWED")
    finally:
        await transport.stop()
    assert judged == ["192.0.2.7", "127.0.0.1"], "what was connected to is what was judged"
    assert server.connections == 0


async def test_t63_a_redirect_to_a_private_address_is_not_followed(server: Server) -> None:
    for status in (301, 302, 303, 307, 308):
        for to in (f"https://127.0.0.1:{server.port}/inner", "https://10.0.0.1/", "https://[::1]/", "//127.0.0.1/"):
            server.answer = f"HTTP/1.1 {status} Go\r\nlocation: {to}\r\ncontent-length: 0\r\n\r\n".encode()
            outcome = await attempt(f"https://127.0.0.1:{server.port}/", server.ca_pem, allow=exception(server))
            assert outcome.error == f"REDIRECT_NOT_FOLLOWED: answered {status}"
    assert all(request.startswith(b"POST / HTTP/1.1\r\n") for request in server.requests)


async def test_t63_several_answers_of_which_one_is_denied(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PORTS", frozenset({server.port}))

    class Several(Resolver):
        async def resolve(
            self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
        ) -> list[ResolveResult]:
            found = []
            for self.address in ("10.0.0.1", "::ffff:127.0.0.1", "127.0.0.1"):
                found += await super().resolve(host, port, family)
            return found

    outcome = await attempt(f"https://hooks.example:{server.port}/", server.ca_pem, resolver=Several(""))
    assert outcome.error.startswith("ADDRESS_NOT_ALLOWED")
    assert server.connections == 0


async def test_options_are_asked_after_cloudevents(server: Server) -> None:
    server.answer = (
        b"HTTP/1.1 200 OK\r\nwebhook-allowed-origin: groundswell.local\r\nwebhook-allowed-rate: 10\r\n"
        b"content-length: 0\r\n\r\n"
    )
    transport = HttpsTransport(UrlPolicy.parse(exception(server)), wall_clock_ms)
    await transport.start()
    try:
        target = Target(f"https://127.0.0.1:{server.port}/hooks", server.ca_pem)
        outcome = await transport.options(target, {"webhook-request-origin": "groundswell.local"})
    finally:
        await transport.stop()
    assert (outcome.status, outcome.allowed_origin) == (200, "groundswell.local")
    assert server.requests[0].startswith(b"OPTIONS /hooks HTTP/1.1\r\n")
    assert b"webhook-request-origin: groundswell.local" in server.requests[0].lower()


async def test_an_answer_in_pieces_is_put_together(server: Server) -> None:
    server.answer = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n3\r\ndef\r\n0\r\n\r\n"
    outcome = await attempt(f"https://127.0.0.1:{server.port}/", server.ca_pem, allow=exception(server))
    assert outcome.body == b"abcdef"


async def test_t63_a_port_that_is_allowed_no_longer(server: Server) -> None:
    outcome = await attempt(f"https://127.0.0.1:{server.port}/", server.ca_pem)
    assert outcome.error.startswith("PORT_NOT_ALLOWED")
    assert server.connections == 0


async def test_connections_are_used_again_and_nothing_but_what_we_mean_is_sent(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    server.answer = b"HTTP/1.1 200 OK\r\nset-cookie: a=b\r\ncontent-length: 2\r\n\r\nok"
    outcome = await attempt(f"https://127.0.0.1:{server.port}/hooks", server.ca_pem, allow=exception(server), times=3)
    assert outcome == Outcome(200)
    assert server.connections == 1
    assert len(server.requests) == 3
    assert all(b"cookie" not in request.lower() for request in server.requests)
    assert all(request.startswith(b"POST /hooks HTTP/1.1\r\n") for request in server.requests)


async def test_a_large_answer_is_not_read_to_its_end(server: Server) -> None:
    server.answer = b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\n" + b"x" * limits.MAX_RESPONSE
    outcome = await attempt(f"https://127.0.0.1:{server.port}/", server.ca_pem, allow=exception(server))
    assert outcome == Outcome(200)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n", Outcome(500, "RESPONSE_STATUS: answered 500")),
        (
            b"HTTP/1.1 429 Slow\r\nretry-after: 90\r\ncontent-length: 0\r\n\r\n",
            Outcome(429, "RESPONSE_STATUS: answered 429", 90.0, throttled=True),
        ),
        (
            b"HTTP/1.1 307 Go\r\nlocation: https://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n",
            Outcome(307, "REDIRECT_NOT_FOLLOWED: answered 307"),
        ),
        (b"no http at all\r\n\r\n", Outcome(0, "PROTOCOL_ERROR: the answer is not HTTP as it should be")),
    ],
)
async def test_answers_that_are_failures(server: Server, answer: bytes, expected: Outcome) -> None:
    server.answer = answer
    outcome = await attempt(f"https://127.0.0.1:{server.port}/", server.ca_pem, allow=exception(server))
    assert outcome == expected
    assert server.connections == 1


async def test_a_receiver_that_never_answers(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "TOTAL_S", 0.3)
    server.answer = b""
    outcome = await attempt(f"https://127.0.0.1:{server.port}/", server.ca_pem, allow=exception(server))
    assert outcome.error.startswith("TIMEOUT")
    assert outcome.throttled


async def test_certificates_are_verified(server: Server, tmp_path: Path) -> None:
    _, other_ca = server_identity(tmp_path / "other")
    for ca_pem in ("", other_ca.read_text()):
        outcome = await attempt(f"https://127.0.0.1:{server.port}/", ca_pem, allow=exception(server))
        assert outcome.error.startswith("TLS_FAILED")
    assert server.requests == []
    wrong_name = await attempt(
        f"https://hooks.example:{server.port}/",
        server.ca_pem,
        allow=f"hooks.example:{server.port}",
        resolver=Resolver("127.0.0.1"),
    )
    assert wrong_name.error.startswith("TLS_FAILED")
    assert server.requests == []


def test_old_protocol_versions_are_not_spoken() -> None:
    assert limits.tls_context("").minimum_version >= ssl.TLSVersion.TLSv1_2
    assert limits.tls_context("").verify_mode is ssl.CERT_REQUIRED
    assert limits.tls_context("").check_hostname


def test_the_installed_client_has_the_hook_that_the_guard_needs() -> None:
    assert "socket_factory" in aiohttp.TCPConnector.__init__.__code__.co_varnames
