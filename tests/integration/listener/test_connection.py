"""Connections of the device listener over real TLS: what is answered on the short way, what aiohttp is given, and how
a connection ends."""

from __future__ import annotations

import asyncio
import json
import random
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from deploy.local.credentials import ensure_certificates
from deploy.local.settings import load
from services.gateway import connection as connections
from services.gateway.body import MAX_BODY
from services.gateway.connection import Listener, body_length
from services.gateway.http import Reply, application_of
from services.gateway.identity import DeviceTls, HandshakeFailures, Peer, peer_of, refuse_identity
from tests.unit.pki.factory import Ca, der, pem

NAME = "acme.devices.localhost"


class Api:
    """Answers with what it was asked; a body of `slow` waits for the gate."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.asked: list[bytes] = []
        self.by_aiohttp = 0

    def check_in(self, peer: Peer, raw: bytes) -> Any:
        self.asked.append(raw)
        if raw == b"refused":
            raise refuse_identity("DEVICE_RETIRED", "no more")
        if raw == b"broken":
            raise ZeroDivisionError
        answer = json.dumps({"organization": peer.organization, "body": raw.decode()}).encode()
        return self._slowly(answer, raw) if raw.startswith(b"slow") else answer

    async def _slowly(self, answer: bytes, raw: bytes) -> bytes:
        await self.gate.wait()
        if raw == b"slow-refused":
            raise refuse_identity("DEVICE_RETIRED", "no more")
        return answer

    async def download(self, _peer: Peer, grant: str, digest: str) -> Reply:
        return Reply(307, b"", {"Location": f"http://store/{grant}/{digest}", "Cache-Control": "no-store"})

    async def route(self, request: web.Request) -> web.Response:
        """The same by aiohttp."""
        self.by_aiohttp += 1
        assert request.transport is not None
        answer = self.check_in(peer_of(request.transport.get_extra_info("ssl_object")), await request.read())
        return web.Response(body=answer if isinstance(answer, bytes) else await answer, content_type="application/json")


class Device:
    """The other end of a connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:-2])}
        assert "date" in headers
        return int(head[0].split()[1]), headers, await self.reader.readexactly(int(headers["content-length"]))

    async def ask(self, request: bytes) -> tuple[int, Any]:
        self.writer.write(request)
        status, _, body = await self.answer()
        return status, json.loads(body) if body else None


class Stack:
    """A listener, and devices that connect to it."""

    def __init__(self, api: Api, listener: Listener, connect: Callable[[], Any]) -> None:
        self.api, self.listener, self.connect = api, listener, connect


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[Stack]:
    settings = load({"GROUNDSWELL_LOCAL_DIR": str(tmp_path / "local")})
    ensure_certificates(settings)
    files = [str(settings.tls_dir / f"gateway.{kind}") for kind in ("pem", "key")]
    tls = DeviceTls(*files, "devices.localhost", HandshakeFailures())
    ca, key = Ca(), ec.generate_private_key(ec.SECP256R1())
    tls.set_anchors("acme", (der(ca.certificate),))
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "device.pem").write_bytes(secret + pem(ca.leaf("SN-1", key=key)).encode())
    context = ssl.create_default_context(cafile=str(settings.tls_dir / "ca.pem"))
    context.load_cert_chain(tmp_path / "device.pem")

    api = Api()
    runner = web.AppRunner(application_of([("POST", "/v1/checkin", api.route)]), access_log=None)
    await runner.setup()
    assert runner.server is not None
    listener = Listener(api, runner.server, most=4)
    server = await asyncio.get_running_loop().create_server(listener, "127.0.0.1", 0, ssl=tls.context)
    port = server.sockets[0].getsockname()[1]

    devices = []

    async def connect() -> Device:
        device = Device(*await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=NAME))
        devices.append(device)
        return device

    async with asyncio.timeout(20):
        yield Stack(api, listener, connect)
    for device in devices:
        device.writer.close()
    server.close()
    api.gate.set()
    await listener.stop()
    await runner.cleanup()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - what it waits for is told by no event
        await asyncio.sleep(0)


def check_in(body: bytes, *fields: str, length: int | None = None) -> bytes:
    lines = ["POST /v1/checkin HTTP/1.1", f"Host: {NAME}", f"Content-Length: {len(body) if length is None else length}"]
    return "\r\n".join([*lines, *fields, "", ""]).encode() + body


async def test_plain_check_ins_are_answered_one_after_the_other_without_aiohttp(stack: Stack) -> None:
    device = await stack.connect()
    for number in range(3):
        said = f"{number}".encode()
        assert await device.ask(check_in(said)) == (200, {"organization": "acme", "body": said.decode()})
    device.writer.write(b"".join(check_in(f"p{number}".encode()) for number in range(50)))
    for number in range(50):
        assert json.loads((await device.answer())[2])["body"] == f"p{number}"
    assert stack.api.by_aiohttp == 0


async def test_a_request_in_pieces_is_answered_once_it_is_whole(stack: Stack) -> None:
    device = await stack.connect()
    whole = check_in(b"in two pieces")
    device.writer.write(whole[:-5])
    await until(lambda: any(one._ahead for one in stack.listener.connections))
    assert stack.api.asked == []
    assert (await device.ask(whole[-5:]))[1]["body"] == "in two pieces"
    assert stack.api.by_aiohttp == 0
    device.writer.write(whole[:20])  # not even a head: for aiohttp, from here on
    await until(lambda: not stack.listener.connections)
    assert (await device.ask(whole[20:]))[1]["body"] == "in two pieces"
    assert (await device.ask(whole))[0] == 200
    assert stack.api.by_aiohttp == 2


async def test_answers_keep_the_order_of_requests_whatever_each_waits_for(stack: Stack) -> None:
    device = await stack.connect()
    device.writer.write(check_in(b"slow") + check_in(b"quick") + check_in(b"odd", "Connection: close"))
    await until(lambda: any(one._ahead for one in stack.listener.connections))
    assert stack.api.asked == [b"slow"], "one at a time"
    stack.api.gate.set()
    assert [json.loads((await device.answer())[2])["body"] for _ in range(3)] == ["slow", "quick", "odd"]
    assert await device.reader.read() == b"", "aiohttp closed it, as it was asked"
    assert stack.api.by_aiohttp == 1


async def test_refusals_and_mistakes_are_answers_and_the_connection_goes_on(stack: Stack) -> None:
    device = await stack.connect()
    stack.api.gate.set()
    for body, status, reason in (
        (b"refused", 403, "DEVICE_RETIRED"),
        (b"slow-refused", 403, "DEVICE_RETIRED"),
        (b"broken", 503, "INTERNAL"),
    ):
        answer = await device.ask(check_in(body))
        assert (answer[0], answer[1]["error"]["reason"]) == (status, reason)
    assert (await device.ask(check_in(b"well")))[0] == 200
    assert stack.api.by_aiohttp == 0


@pytest.mark.parametrize("seed", range(12))
async def test_however_it_is_cut_a_stream_of_requests_has_its_answers_in_order(stack: Stack, seed: int) -> None:
    """Plain and odd ones mixed: sooner or later aiohttp has the connection, and nothing is lost on the way."""
    dice = random.Random(seed)
    stack.api.gate.set()
    requests: list[tuple[bytes, int, str]] = []
    for number in range(40):
        said = f"{number}" + "x" * dice.randrange(300)
        kind = dice.choices(("plain", "slow", "refused", "chunked", "elsewhere"), (20, 6, 3, 1, 1))[0]
        chunk = f"{len(said):x}\r\n{said}\r\n0\r\n\r\n".encode()
        requests.append(
            {
                "plain": (check_in(said.encode()), 200, said),
                "slow": (check_in(f"slow{said}".encode()), 200, f"slow{said}"),
                "refused": (check_in(b"refused"), 403, "DEVICE_RETIRED"),
                "chunked": (
                    check_in(chunk, "Transfer-Encoding: chunked").replace(b"Content-Length", b"X-L"),
                    200,
                    said,
                ),
                "elsewhere": (f"GET /{number} HTTP/1.1\r\nHost: {NAME}\r\n\r\n".encode(), 404, "NO_SUCH_ROUTE"),
            }[kind]
        )
    device = await stack.connect()
    stream, at = b"".join(request for request, _, _ in requests), 0
    answering = asyncio.create_task(answers(device, len(requests)))
    while at < len(stream):
        size = dice.choice((1, 7, 80, 200, 1000, 5000))
        device.writer.write(stream[at : at + size])
        at += size
        if dice.random() < 0.3:
            await asyncio.sleep(0.001)
    assert await answering == [(status, word) for _, status, word in requests]


async def answers(device: Device, count: int) -> list[tuple[int, str]]:
    """Status of each answer, and the body that was said, or the reason."""
    found = []
    for _ in range(count):
        status, _, body = await device.answer()
        told = json.loads(body)
        found.append((status, told["body"] if status == 200 else told["error"]["reason"]))
    return found


async def test_a_download_is_redirected(stack: Stack) -> None:
    device = await stack.connect()
    device.writer.write(f"GET /v1/downloads/gr.an-t_/{'ab' * 32} HTTP/1.1\r\nHost: {NAME}\r\n\r\n".encode())
    status, headers, body = await device.answer()
    assert (status, body) == (307, b"")
    assert headers["location"] == f"http://store/gr.an-t_/{'ab' * 32}"
    assert headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    ("request_bytes", "status", "reason"),
    [
        (check_in(b"", length=MAX_BODY + 1), 413, "BODY_TOO_LARGE"),
        (b"GET /v1/checkin HTTP/1.1\r\nHost: x\r\n\r\n", 405, "METHOD_NOT_ALLOWED"),
        (b"POST /v1/elsewhere HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", 404, "NO_SUCH_ROUTE"),
        (b"GET /v1/downloads/a HTTP/1.1\r\nHost: x\r\n\r\n", 404, "NO_SUCH_ROUTE"),
    ],
)
async def test_what_is_not_plain_is_answered_by_aiohttp(
    stack: Stack, request_bytes: bytes, status: int, reason: str
) -> None:
    device = await stack.connect()
    assert (await device.ask(check_in(b"first")))[0] == 200
    device.writer.write(request_bytes + (bytes(MAX_BODY + 1) if status == 413 else b""))
    answered, _, body = await device.answer()
    assert (answered, json.loads(body)["error"]["reason"]) == (status, reason)


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"POST /v1/checkin HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"POST /v1/checkin HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/checkin HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/checkin HTTP/1.1\r\nHost: a\r\n folded: x\r\nContent-Length: 1\r\n\r\na",
    ],
)
async def test_garbage_and_smuggling_are_refused_by_aiohttp_and_end_the_connection(
    stack: Stack, garbage: bytes
) -> None:
    device = await stack.connect()
    device.writer.write(garbage)
    heard = await device.reader.read()
    assert heard.startswith((b"HTTP/1.1 400", b"HTTP/1.0 400"))
    assert stack.api.asked == []


async def test_a_body_that_does_not_come_is_refused(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "BODY_S", 0.05)
    device = await stack.connect()
    device.writer.write(check_in(b"half", length=100))
    status, headers, body = await device.answer()
    assert (status, headers["connection"]) == (408, "close")
    assert json.loads(body)["error"]["reason"] == "BODY_TIMEOUT"
    assert await device.reader.read() == b""


async def test_an_idle_connection_is_closed_and_a_busy_one_is_not(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "IDLE_S", 0.1)
    idle, busy = await stack.connect(), await stack.connect()
    busy.writer.write(check_in(b"slow"))
    assert await idle.reader.read() == b""
    stack.api.gate.set()
    assert (await busy.answer())[0] == 200


async def test_one_connection_too_many_is_cut_whoever_holds_the_others(stack: Stack) -> None:
    held = [await stack.connect() for _ in range(4)]
    assert (await held[0].ask(check_in(b"x", "TE: trailers")))[0] == 200
    assert stack.api.by_aiohttp == 1
    for device in held[1:]:
        assert (await device.ask(check_in(b"x")))[0] == 200
    assert await (await stack.connect()).reader.read() == b""
    assert stack.listener.cut == 1
    held[1].writer.close()
    await held[1].writer.wait_closed()
    await asyncio.wait([one.lost for one in stack.listener.connections], timeout=0.05)
    assert (await (await stack.connect()).ask(check_in(b"x")))[0] == 200


async def test_stopping_closes_what_is_idle_and_answers_what_was_asked(stack: Stack) -> None:
    idle, busy = await stack.connect(), await stack.connect()
    assert (await idle.ask(check_in(b"x")))[0] == 200
    busy.writer.write(check_in(b"slow"))
    await until(lambda: len(stack.api.asked) == 2)
    stopping = asyncio.create_task(stack.listener.stop())
    assert await idle.reader.read() == b""
    stack.api.gate.set()
    assert (await busy.answer())[0] == 200
    assert await busy.reader.read() == b""
    await stopping
    assert not stack.listener.connections


@pytest.mark.parametrize(
    ("fields", "length"),
    [
        (b"Host: a\r\nContent-Length: 12\r\n", 12),
        (b"host:a\r\ncontent-length:12  \r\nX-Empty:\r\nAccept: */*\r\nConnection: Keep-Alive\r\n", 12),
        (b"Host: a\r\n", 0),
        (b"Content-Length: 12\r\n", None),
        (b"Host: a\r\nHost: b\r\nContent-Length: 12\r\n", None),
        (b"Host: a\r\nContent-Length: +12\r\n", None),
        (b"Host: a\r\nContent-Length: 1_2\r\n", None),
        (b"Host: a\r\nContent-Length: 123456\r\n", None),
        (b"Host: a\r\nContent-Length: 12, 12\r\n", None),
        (b"Host: a\r\nContent-Length: 12\r\nContent-Length: 12\r\n", None),
        (b"Host: a\r\nContent-Length : 12\r\n", None),
        (b"Host: a\r\nTransfer-Encoding: chunked\r\n", None),
        (b"Host: a\r\nContent-Encoding: gzip\r\nContent-Length: 12\r\n", None),
        (b"Host: a\r\nExpect: 100-continue\r\nContent-Length: 12\r\n", None),
        (b"Host: a\r\nUpgrade: websocket\r\nContent-Length: 12\r\n", None),
        (b"Host: a\r\nConnection: close\r\nContent-Length: 12\r\n", None),
        (b"Host: a\r\nConnection: keep-alive, te\r\nContent-Length: 12\r\n", None),
        (b"Host: a\nContent-Length: 12\r\n", None),
        (b"Host: a\r\nX: a\x00b\r\nContent-Length: 12\r\n", None),
        (b"Host: a\r\nX: \xff\r\nContent-Length: 12\r\n", None),
        (b"Host: a\r\n folded\r\nContent-Length: 12\r\n", None),
    ],
)
def test_only_heads_without_anything_unusual_are_plain(fields: bytes, length: int | None) -> None:
    assert body_length(fields) == length
