"""One attempt of a delivery over HTTPS, with every limit that a foreign server calls for.

The guard is asked for a socket for each *resolved* address of each connection, so neither a literal address, nor a
name that is answered differently each time, nor a redirect (none is followed) reaches an address that the policy
denies. An operator's exception is an exact host and port; those alone use the connector without a guard.
"""

from __future__ import annotations

import errno
import functools
import os
import socket
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import aiohttp
from aiohttp.abc import AbstractResolver
from yarl import URL

from services.webhooks.policy import PORTS, UrlPolicy, allows_text
from services.webhooks.schedule import parse_retry_after

TOTAL_S: Final = 15.0
CONNECT_S: Final = 5.0
MAX_RESPONSE: Final = 16 * 1024
USER_AGENT: Final = "groundswell-webhooks/1"
_THROTTLING: Final = frozenset({429, 502, 504})
_REFUSED: Final = "address not allowed by webhook policy"


@dataclass(frozen=True, slots=True)
class Target:
    """Where to, and whom to trust there."""

    url: str
    ca_pem: str = ""
    """Trusted instead of the public authorities, when set."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of an attempt."""

    status: int = 0
    error: str = ""
    """Reason code, colon, words; empty after success."""
    retry_after_s: float | None = None
    throttled: bool = False
    """Overload: 429, a gateway's time-out, or no answer in time."""
    body: bytes = field(default=b"", compare=False)
    """Beginning of the answer, at most 16 KiB."""
    duration_ms: int = field(default=0, compare=False)
    allowed_origin: str = field(default="", compare=False)
    """``WebHook-Allowed-Origin`` of an answer to OPTIONS."""

    @property
    def succeeded(self) -> bool:
        """Only 2xx counts."""
        return not self.error

    @property
    def gone(self) -> bool:
        """The receiver wants no more, ever."""
        return self.status == 410


class Transport(Protocol):
    """Sends one request; never raises for what the other side does."""

    async def post(self, target: Target, headers: Mapping[str, str], body: bytes) -> Outcome: ...

    async def options(self, target: Target, headers: Mapping[str, str]) -> Outcome: ...


def guarded_socket(addr_info: tuple[Any, Any, Any, Any, Any]) -> socket.socket:
    """A socket for a resolved address, or EACCES."""
    family, kind, proto, _, sockaddr = addr_info
    if family not in {socket.AF_INET, socket.AF_INET6} or not allows_text(str(sockaddr[0])):
        raise OSError(errno.EACCES, _REFUSED)
    return socket.socket(family, kind, proto)


@functools.lru_cache(maxsize=256)
def tls_context(ca_pem: str) -> ssl.SSLContext:
    """Verifies always; a private CA replaces the public ones. Cached: connections are shared only within a context."""
    context = ssl.create_default_context(cadata=ca_pem or None)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


class HttpsTransport:
    """aiohttp with nothing taken from the environment: no proxies, no cookies, no redirects."""

    def __init__(
        self, policy: UrlPolicy, wall_clock_ms: Callable[[], int], *, resolver: AbstractResolver | None = None
    ) -> None:
        self._policy = policy
        self._now_ms = wall_clock_ms
        self._resolver = resolver
        self._guarded: aiohttp.ClientSession | None = None
        self._excepted: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        """Opens no connection yet."""
        self._guarded = self._session(guarded_socket)
        self._excepted = self._session(None)

    async def stop(self) -> None:
        """Close all connections."""
        for session in (self._guarded, self._excepted):
            if session is not None:
                await session.close()

    async def post(self, target: Target, headers: Mapping[str, str], body: bytes) -> Outcome:
        """One attempt, to its end or its time-out."""
        return await self._request("POST", target, headers, body)

    async def options(self, target: Target, headers: Mapping[str, str]) -> Outcome:
        """The question whether webhooks are wanted, after CloudEvents."""
        return await self._request("OPTIONS", target, headers, None)

    async def _request(self, method: str, target: Target, headers: Mapping[str, str], body: bytes | None) -> Outcome:
        if self._guarded is None or self._excepted is None:
            raise RuntimeError("the transport has not been started")
        url = URL(target.url)
        excepted = self._policy.is_exception(url)
        if not excepted and url.port not in PORTS:
            return Outcome(error="PORT_NOT_ALLOWED: the operator allows this port no longer")
        session = self._excepted if excepted else self._guarded
        try:
            context = tls_context(target.ca_pem)
            async with session.request(
                method, url, data=body, headers=headers, ssl=context, allow_redirects=False, max_redirects=0
            ) as response:
                # Read a little, so that the connection can be used again; never more than that.
                said = await _beginning(response.content)
                if not response.content.at_eof():
                    response.close()
                allowed = response.headers.get("webhook-allowed-origin", "")[:300]
                return self._judge(response, said, allowed)
        except TimeoutError:
            return Outcome(error=f"TIMEOUT: no answer within {TOTAL_S:.0f} s", throttled=True)
        except ssl.SSLError as error:
            return Outcome(error=f"TLS_FAILED: {_tls_words(error)}")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return _connection_failure(error)

    def _judge(self, response: aiohttp.ClientResponse, said: bytes, allowed_origin: str) -> Outcome:
        status = response.status
        if 200 <= status < 300:
            return Outcome(status, body=said, allowed_origin=allowed_origin)
        retry_after = parse_retry_after(response.headers.get("retry-after", ""), self._now_ms())
        code = "REDIRECT_NOT_FOLLOWED" if 300 <= status < 400 else "RESPONSE_STATUS"
        return Outcome(
            status,
            f"{code}: answered {status}",
            retry_after,
            status in _THROTTLING,
            body=said,
            allowed_origin=allowed_origin,
        )

    def _session(self, factory: Callable[[Any], socket.socket] | None) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(
            limit=0, ttl_dns_cache=10, keepalive_timeout=30, socket_factory=factory, resolver=self._resolver
        )
        return aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=TOTAL_S, sock_connect=CONNECT_S),
            headers={"user-agent": USER_AGENT, "accept-encoding": "identity"},
            auto_decompress=False,
            trust_env=False,
        )


async def _beginning(content: aiohttp.StreamReader) -> bytes:
    """At most the limit, also when it comes in pieces."""
    said = b""
    while len(said) < MAX_RESPONSE and not content.at_eof():
        said += await content.read(MAX_RESPONSE - len(said))
    return said


def _connection_failure(error: Exception) -> Outcome:
    """A reason without what the other side could smuggle into it, and without addresses of our own network."""
    if _REFUSED in str(error):
        return Outcome(error=f"ADDRESS_NOT_ALLOWED: {_REFUSED}")
    certificate = getattr(error, "certificate_error", None)
    if isinstance(error, aiohttp.ClientConnectorCertificateError) and isinstance(certificate, Exception):
        return Outcome(error=f"TLS_FAILED: {_tls_words(certificate)}")
    if isinstance(error, aiohttp.ClientSSLError):
        return Outcome(error="TLS_FAILED: the handshake failed")
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return Outcome(error="NAME_NOT_RESOLVED: the host name has no address")
    if isinstance(error, aiohttp.ClientConnectorError):
        number = error.os_error.errno
        return Outcome(error=f"CONNECT_FAILED: {os.strerror(number) if number else 'no connection'}")
    if isinstance(error, aiohttp.ClientResponseError):
        return Outcome(error="PROTOCOL_ERROR: the answer is not HTTP as it should be")
    return Outcome(error=f"CONNECTION_LOST: {type(error).__name__}")


def _tls_words(error: Exception) -> str:
    words = getattr(error, "verify_message", "") or getattr(error, "reason", "") or type(error).__name__
    return str(words)[:120]
