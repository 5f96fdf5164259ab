"""The device API over mutual TLS: one keep-alive connection, and links followed by hand.

* Where to connect (an address) and whom to expect (the name sent as SNI and checked against the certificate) are
  two settings: the organization is chosen by name, also where no name server knows it.
* A request is sent once. A retry is a new check-in with a new counter, decided by the caller; only a keep-alive
  connection that the gateway closed while it idled is replaced silently, when nothing of the request was answered.
* The redirect of a download is followed on a new connection without the client certificate and with no header but
  `Host` and `Range`: nothing of ours goes to the object store.
* Every exchange has a deadline of its own beside the time-out of a single read, so a peer that sends one byte now
  and then holds nobody.
"""

from __future__ import annotations

import base64
import http.client
import json
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from clients.device.errors import ConfigError, ServerError, TransportError
from clients.device.model import Answer, CheckIn

MAX_REQUEST = 16 * 1024
MAX_ANSWER = 1024 * 1024
_JSON, _PKCS10 = "application/json", "application/pkcs10"
_NETWORK_ERRORS = (OSError, http.client.HTTPException)
# An idle connection that the other side has closed shows itself as one of these before any answer.
_GONE = (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError, ssl.SSLEOFError)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A gateway: where it is, who it must be, and who we are."""

    host: str
    port: int
    server_name: str
    ca_file: Path
    certificate: Path
    key: Path


def _client_context(endpoint: Endpoint) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=str(endpoint.ca_file))
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(endpoint.certificate, endpoint.key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError("TLS_FILES", f"CA file, certificate or key cannot be used: {error}") from error
    return context


def _ca_stamp(endpoint: Endpoint) -> int:
    try:
        return endpoint.ca_file.stat().st_mtime_ns
    except OSError:
        return 0


def fitting(request: CheckIn) -> CheckIn:
    """The same check-in with only as many of its oldest reports as one body holds."""
    while request.reports and len(_body(request)) > MAX_REQUEST:
        request = replace(request, reports=request.reports[: len(request.reports) // 2])
    return request


def _body(request: CheckIn) -> bytes:
    return json.dumps(request.to_json(), separators=(",", ":")).encode()


class _Connection(http.client.HTTPConnection):
    """HTTPS to an address under another name."""

    def __init__(
        self, address: tuple[str, int], timeout: float, context: ssl.SSLContext | None, server_name: str
    ) -> None:
        super().__init__(address[0], address[1], timeout=timeout)
        self._context = context
        self._server_name = server_name

    def connect(self) -> None:
        plain = socket.create_connection((self.host, self.port), self.timeout)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._context is None:
            self.sock = plain
            return
        try:
            self.sock = self._context.wrap_socket(plain, server_hostname=self._server_name)
        except BaseException:
            plain.close()
            raise


@contextmanager
def _deadline(connection: http.client.HTTPConnection, seconds: float) -> Iterator[None]:
    """Cut the connection when the whole exchange takes too long, whatever single reads do."""

    def cut() -> None:
        sock = connection.sock
        if sock is not None:
            with suppress(OSError):
                # Of the plain socket: a TLS socket would drop its session state under the reader's feet.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)

    timer = threading.Timer(seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class DeviceApi:
    """A device's side of one gateway."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        timeout_s: float = 20.0,
        exchange_s: float = 60.0,
        object_store_ca: Path | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._timeout = timeout_s
        self._exchange = exchange_s
        self._context = _client_context(endpoint)
        self._ca_stamp = _ca_stamp(endpoint)
        self._store_ca = object_store_ca
        self._connection: http.client.HTTPConnection | None = None

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def use(self, certificate: Path, key: Path) -> None:
        """Be known by these files from the next connection on. Raises ConfigError, and then nothing has changed."""
        if (self._endpoint.certificate, self._endpoint.key) == (certificate, key):
            return
        endpoint = replace(self._endpoint, certificate=certificate, key=key)
        context = _client_context(endpoint)
        self.close()
        self._endpoint, self._context = endpoint, context

    def reenroll(self, request_der: bytes) -> bytes:
        """Ask for the next certificate (EST simplereenroll): a PKCS#10 request in, a certs-only PKCS#7 out, as DER."""
        path = "/.well-known/est/simplereenroll"
        status, headers, data = self._exchange_once("POST", path, base64.encodebytes(request_der), _PKCS10)
        if status != HTTPStatus.OK:
            raise _refusal(status, headers, _document(data))
        try:
            return base64.b64decode(b"".join(data.split()), validate=True)
        except ValueError as error:
            raise TransportError("MALFORMED_ANSWER", "the answer to an enrolment is not base64") from error

    def check_in(self, request: CheckIn) -> Answer:
        """Send one check-in. Raises TransportError or ServerError; then nothing is known of its effect."""
        body = _body(request)
        if len(body) > MAX_REQUEST:
            raise ConfigError("BODY_TOO_LARGE", f"a check-in of {len(body)} bytes is over the {MAX_REQUEST} allowed")
        status, headers, data = self._exchange_once("POST", "/v1/checkin", body)
        document = _document(data)
        if status != HTTPStatus.OK:
            raise _refusal(status, headers, document)
        return Answer.from_json(document)

    def link(self, url: str) -> str:
        """Ask the gateway for a fresh link to the bytes behind an offer's ``url``."""
        status, headers, data = self._exchange_once("GET", self._path(url), None)
        if status == HTTPStatus.TEMPORARY_REDIRECT:
            location = headers.get("location", "")
            if urlsplit(location).scheme not in {"http", "https"}:
                raise TransportError("MALFORMED_ANSWER", "the redirect names no http or https link")
            return location
        raise _refusal(status, headers, _document(data))

    @contextmanager
    def fetch(self, location: str, start: int, deadline_s: float) -> Iterator[http.client.HTTPResponse]:
        """Open a link at the object store from byte ``start`` on, as a stranger."""
        parts = urlsplit(location)
        secure = parts.scheme == "https"
        context = ssl.create_default_context(cafile=str(self._store_ca) if self._store_ca else None) if secure else None
        host = parts.hostname or ""
        connection = _Connection((host, parts.port or (443 if secure else 80)), self._timeout, context, host)
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        try:
            with _deadline(connection, deadline_s):
                connection.putrequest("GET", target, skip_host=True, skip_accept_encoding=True)
                connection.putheader("Host", parts.netloc.rpartition("@")[2])
                if start:
                    connection.putheader("Range", f"bytes={start}-")
                connection.endheaders()
                yield connection.getresponse()
        except _NETWORK_ERRORS as error:
            raise TransportError("OBJECT_STORE_UNREACHABLE", str(error) or type(error).__name__) from error
        finally:
            connection.close()

    def _path(self, url: str) -> str:
        parts = urlsplit(url)
        if parts.netloc and parts.hostname != self._endpoint.server_name:
            raise TransportError("MALFORMED_ANSWER", "the download link is not on this gateway")
        if not parts.path.startswith("/v1/downloads/") or ".." in parts.path:
            raise TransportError("MALFORMED_ANSWER", "the download link is not a download path")
        return parts.path

    def _exchange_once(
        self, method: str, path: str, body: bytes | None, content_type: str = _JSON
    ) -> tuple[int, Mapping[str, str], bytes]:
        reused = self._connection is not None
        try:
            return self._send(method, path, body, content_type)
        except _GONE as error:
            self.close()
            if not reused:
                raise TransportError("GATEWAY_UNREACHABLE", str(error) or type(error).__name__) from error
        except _NETWORK_ERRORS as error:
            self.close()
            raise TransportError("GATEWAY_UNREACHABLE", str(error) or type(error).__name__) from error
        # The same bytes again: should the first copy have been read after all, it is the same check-in, not a fork.
        try:
            return self._send(method, path, body, content_type)
        except _NETWORK_ERRORS as error:
            self.close()
            raise TransportError("GATEWAY_UNREACHABLE", str(error) or type(error).__name__) from error

    def _send(
        self, method: str, path: str, body: bytes | None, content_type: str
    ) -> tuple[int, Mapping[str, str], bytes]:
        if self._connection is None:
            at = self._endpoint
            stamp = _ca_stamp(at)
            if stamp != self._ca_stamp:
                # Whom to believe has changed on the disk, without a restart of ours.
                self._context, self._ca_stamp = _client_context(at), stamp
            self._connection = _Connection((at.host, at.port), self._timeout, self._context, at.server_name)
        connection = self._connection
        headers = {"Host": self._endpoint.server_name}
        if body is not None:
            headers["Content-Type"] = content_type
        with _deadline(connection, self._exchange):
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            data = response.read(MAX_ANSWER + 1)
        if len(data) > MAX_ANSWER:
            self.close()
            raise TransportError("MALFORMED_ANSWER", f"an answer of over {MAX_ANSWER} bytes")
        if response.will_close:
            self.close()
        return response.status, {key.lower(): value for key, value in response.getheaders()}, data


def _document(data: bytes) -> dict[str, Any]:
    try:
        document = json.loads(data)
    except ValueError:
        document = None
    return document if isinstance(document, dict) else {}


def _refusal(status: int, headers: Mapping[str, str], document: Mapping[str, Any]) -> ServerError:
    error = document.get("error")
    error = error if isinstance(error, dict) else {}
    try:
        retry_after = max(0.0, float(headers["retry-after"]))
    except (KeyError, ValueError):
        retry_after = None
    reason = str(error.get("reason") or f"HTTP_{status}")
    return ServerError(status, reason[:64], str(error.get("message", ""))[:512], retry_after_s=retry_after)
