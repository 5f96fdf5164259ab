"""Connections of the device listener, and the short way by which most requests are answered.

A fleet's requests are nearly all alike: a whole check-in in one piece, or a download to redirect, with a head that says
nothing unusual. Such a request is recognised here and answered on the spot; a head that was seen before costs one look
into a table. Rules:

* What is recognised is a strict subset of HTTP/1.1 (RFC 9112): the exact request line of a route, single-line fields of
  visible ASCII, one ``Host``, and for a check-in one ``Content-Length`` of digits that is no more than a body may hold.
  Nothing may speak of framing, expectations, encodings, upgrades or the end of the connection.
* Anything else, and a head that is not here whole, is for aiohttp: it is given the connection with every byte not yet
  answered, for good. So there is one full HTTP server, and no request is read by two.
* Requests of one connection are answered in the order in which they came, one at a time.
* A body that is late is refused after ``BODY_S``, a connection that is idle for ``IDLE_S`` is closed.
"""

from __future__ import annotations

import asyncio
import re
import socket
import time
from collections.abc import Awaitable
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, Final, Protocol

from aiohttp import web

from services.gateway.body import MAX_BODY
from services.gateway.http import BODY_S, Reply, reply_of
from services.gateway.identity import Peer, peer_of

IDLE_S: Final = 75.0
"""Longer than a usual poll interval."""
STOP_S: Final = 3.0
"""Longest wait for answers that are under way when the gateway stops."""
MOST_AHEAD: Final = 64 * 1024
"""Bytes that a device may send before it has its answer; then it is not read any more."""
MOST_HEADS: Final = 4096
LONGEST_HEAD: Final = 1024
"""A longer head is not remembered, and not recognised."""

_POST: Final = b"POST /v1/checkin HTTP/1.1\r\n"
_GET: Final = re.compile(rb"GET /v1/downloads/([0-9A-Za-z._~-]+)/([0-9A-Za-z._~-]+) HTTP/1\.1\r\n")
_FIELD: Final = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\x21-\x7e](?:[\x20-\x7e\t]*[\x21-\x7e])?)?[ \t]*")
_DIGITS: Final = re.compile(rb"[0-9]{1,5}")
_NOT_PLAIN: Final = frozenset(
    {b"transfer-encoding", b"content-encoding", b"expect", b"upgrade", b"te", b"trailer", b"http2-settings"}
)
_OK: Final = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nDate: "


class Api(Protocol):
    """What is answered on the short way."""

    def check_in(self, peer: Peer, raw: bytes) -> bytes | Awaitable[bytes]: ...

    async def download(self, peer: Peer, grant: str, digest: str) -> Reply: ...


def body_length(fields: bytes) -> int | None:
    """Length of the body of a request with these header lines, each with its line end; None: not plain."""
    length, hosts = None, 0
    for line in fields.split(b"\r\n")[:-1]:
        field = _FIELD.fullmatch(line)
        if field is None:
            return None
        name, value = field[1].lower(), field[2] or b""
        if name in _NOT_PLAIN or (name == b"connection" and value.lower() != b"keep-alive"):
            return None
        if name == b"content-length":
            if length is not None or _DIGITS.fullmatch(value) is None:
                return None
            length = int(value)
        hosts += name == b"host"
    return None if hosts != 1 else length or 0


class Listener:
    """The connections of one gateway. A call makes the protocol of the next one."""

    def __init__(self, api: Api, server: web.Server, most: int) -> None:
        self.api = api
        self.server = server
        """Of aiohttp, for what is not plain."""
        self.connections: set[DeviceConnection] = set()
        self.cut = 0
        """Connections over ``most``: a device comes back, by then perhaps to another gateway."""
        self.stopping = False
        self._most = most
        self._heads: dict[bytes, int | None] = {}
        self._ok = (0, b"")

    def __call__(self) -> asyncio.Protocol:
        """For ``create_server``."""
        if self.stopping or len(self.connections) + len(self.server.connections) >= self._most:
            self.cut += 1
            return _Cut()
        return DeviceConnection(self)

    async def stop(self) -> None:
        """Close what is idle, answer what was asked."""
        self.stopping = True
        for connection in list(self.connections):
            connection.stop()
        until = asyncio.get_running_loop().time() + STOP_S
        while self.connections and asyncio.get_running_loop().time() < until:
            await asyncio.wait([connection.lost for connection in self.connections], timeout=STOP_S)
        for connection in list(self.connections):
            connection.abort()

    def plain_body(self, head: bytes) -> int | None:
        """Length of the body that follows the head of a plain check-in; None when it is none."""
        try:
            return self._heads[head]
        except KeyError:
            pass
        plain = head.startswith(_POST) and len(head) <= LONGEST_HEAD
        length = body_length(head[len(_POST) : -2]) if plain else None
        if length is not None and length > MAX_BODY:
            length = None
        if plain:
            if len(self._heads) >= MOST_HEADS:
                self._heads.clear()
            self._heads[head] = length
        return length

    def ok(self, body: bytes) -> bytes:
        """A good answer as written. What stands before its length is made once a second."""
        second = int(time.time())
        if self._ok[0] != second:
            self._ok = (second, _OK + formatdate(second, usegmt=True).encode() + b"\r\nContent-Length: ")
        return b"%b%d\r\n\r\n%b" % (self._ok[1], len(body), body)


class DeviceConnection(asyncio.Protocol):
    """One connection, until it is given to aiohttp."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._transport: Any = None
        self._peer: Peer | None = None
        self._ahead = b""
        """What has come and was not answered yet."""
        self._answering: asyncio.Future[Any] | None = None
        self._late: asyncio.TimerHandle | None = None
        self._active = 0.0
        self._idle: asyncio.TimerHandle | None = None
        self.lost: asyncio.Future[None] = self._loop.create_future()

    # Protocol.

    def connection_made(self, transport: Any) -> None:  # uvloop's are of no class of asyncio's
        self._transport = transport
        found = transport.get_extra_info("socket")
        if found is not None:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._active = self._loop.time()
        self._idle = self._loop.call_later(IDLE_S, self._look_idle)
        self._listener.connections.add(self)

    def connection_lost(self, _exc: Exception | None) -> None:
        self._leave()
        self._ahead = b""

    def data_received(self, data: bytes) -> None:
        if self._answering is not None:
            self._ahead += data
            if len(self._ahead) > MOST_AHEAD:
                self._transport.pause_reading()
            return
        self._serve(self._ahead + data if self._ahead else data)

    def pause_writing(self) -> None:
        """It does not read its answers: it is not read either."""
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._transport.resume_reading()

    # Requests.

    def _serve(self, data: bytes) -> None:
        """Answer what has come, as far as it is whole."""
        listener = self._listener
        while data:
            end = data.find(b"\r\n\r\n") + 4
            if end < 4:
                self._hand_over(data)
                return
            head = data[:end]
            answer: bytes | Awaitable[bytes | Reply]
            length = listener.plain_body(head)
            if length is not None:
                whole = end + length
                if len(data) < whole:
                    self._await_body(data)
                    return
                try:
                    answer = listener.api.check_in(self._identity(), data[end:whole])
                except Exception as error:  # noqa: BLE001 - it is looked at there
                    answer = _written(reply_of(error, "check-in"))
                else:
                    if isinstance(answer, bytes):
                        answer = listener.ok(answer)
            else:
                wanted = _GET.match(head) if end <= LONGEST_HEAD else None
                if wanted is None or body_length(head[wanted.end() : -2]) != 0:
                    self._hand_over(data)
                    return
                whole = end
                try:
                    answer = listener.api.download(self._identity(), wanted[1].decode(), wanted[2].decode())
                except Exception as error:  # noqa: BLE001 - the same
                    answer = _written(reply_of(error, "download"))
            data = data[whole:]
            if self._late is not None:
                self._late.cancel()
                self._late = None
            if not isinstance(answer, bytes):
                self._ahead = data
                self._answering = asyncio.ensure_future(answer, loop=self._loop)
                self._answering.add_done_callback(self._answered)
                return
            self._write(answer)
        self._ahead = b""

    def _identity(self) -> Peer:
        if self._peer is None:
            self._peer = peer_of(self._transport.get_extra_info("ssl_object"))
        return self._peer

    def _answered(self, answering: asyncio.Future[Any]) -> None:
        """Write an answer that had to be waited for, and go on with what came meanwhile."""
        if answering.cancelled():
            self._transport.close()
            return
        error = answering.exception()
        if error is None:
            answer: bytes | Reply = answering.result()
        elif isinstance(error, Exception):
            answer = reply_of(error, "a request of a device")
        else:
            raise error
        if isinstance(answer, Reply):
            self._write(_written(answer))
        else:
            self._write(self._listener.ok(answer))
        self._answering = None
        if self._transport.is_closing():
            return
        if self._listener.stopping:
            self._transport.close()
            return
        data, self._ahead = self._ahead, b""
        if len(data) > MOST_AHEAD:
            self._transport.resume_reading()
        self._serve(data)

    def _write(self, answer: bytes) -> None:
        self._active = self._loop.time()
        if not self._transport.is_closing():
            self._transport.write(answer)

    def _await_body(self, data: bytes) -> None:
        self._ahead = data
        if self._late is None:
            self._late = self._loop.call_later(BODY_S, self._too_late)

    def _too_late(self) -> None:
        self._write(_written(reply_of(web.HTTPRequestTimeout(), "check-in")))
        self._transport.close()

    def _hand_over(self, data: bytes) -> None:
        """Leave the connection to aiohttp, with what was not answered."""
        self._leave()
        protocol = self._listener.server()
        self._transport.set_protocol(protocol)
        protocol.connection_made(self._transport)
        protocol.data_received(data)

    # Ends.

    def _leave(self) -> None:
        for timer in (self._idle, self._late):
            if timer is not None:
                timer.cancel()
        self._listener.connections.discard(self)
        if not self.lost.done():
            self.lost.set_result(None)

    def _look_idle(self) -> None:
        left = self._active + IDLE_S - self._loop.time()
        if left <= 0 and self._answering is None and not self._ahead:
            self._transport.close()
            return
        self._idle = self._loop.call_later(max(left, 1.0), self._look_idle)

    def stop(self) -> None:
        """Close now, or once the answer under way is written."""
        if self._answering is None:
            self._transport.close()

    def abort(self) -> None:
        """Close, whatever is under way."""
        self._transport.abort()


class _Cut(asyncio.Protocol):
    """Ends its connection at once."""

    def connection_made(self, transport: Any) -> None:
        transport.abort()


def _written(reply: Reply) -> bytes:
    """An answer as it goes on the wire."""
    lines = [f"HTTP/1.1 {reply.status} {HTTPStatus(reply.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in reply.headers.items()]
    lines += [f"Date: {formatdate(usegmt=True)}", f"Content-Length: {len(reply.body)}"]
    if reply.closing:
        lines.append("Connection: close")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + reply.body
