"""Our own certificates as their files say them now: a rotation needs no restart.

Servers ask at each handshake, channels at most once a second; a certificate whose key is not there yet is left for the
next time, since its two files are not replaced in one step. Connections that are open stay as they are: what they were
made with was in force then, and who may call what is judged by name.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Self

import grpc

from libs.settings import Settings

log = logging.getLogger(__name__)

LOOK_S: Final = 1.0
"""A channel looks at its files no more often than this."""
DRAIN_S: Final = 30.0
"""Calls of a replaced channel get this long to end."""

Stamp = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Pem:
    """What one identity shows and whom it believes."""

    certificate: bytes
    key: bytes
    ca: bytes


class CertificateFiles:
    """The files of one identity."""

    def __init__(self, settings: Settings, identity: str) -> None:
        self._settings = settings
        self._identity = identity
        folder = settings.tls_dir
        self.certificate: Final = folder / f"{identity}.pem"
        self.key: Final = folder / f"{identity}.key"
        self._paths = (self.certificate, self.key, folder / "ca.pem")
        self._stamp: Stamp = ()

    def read(self) -> Pem:
        """As they are; raises OSError when they are not there."""
        self._stamp = self._look()
        certificate, key = self._settings.certificate(self._identity)
        return Pem(certificate, key, self._settings.ca)

    def changed(self) -> Pem | None:
        """What is new since the last time, once it is whole. Raises nothing: then the old goes on."""
        try:
            stamp = self._look()
            if stamp == self._stamp:
                return None
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.certificate, self.key)
            certificate, key = self._settings.certificate(self._identity)
            found = Pem(certificate, key, self._settings.ca)
            if self._look() != stamp:
                return None
        except (OSError, ssl.SSLError):
            return None
        self._stamp = stamp
        log.info("certificates of %s have changed: new connections use them", self._identity)
        return found

    def _look(self) -> Stamp:
        seen = [path.stat() for path in self._paths]
        return tuple((one.st_mtime_ns, one.st_size, one.st_ino) for one in seen)


def server_credentials(settings: Settings, identity: str, *, mutual: bool) -> grpc.ServerCredentials:
    """Of a port, read again when the files change."""
    files = CertificateFiles(settings, identity)

    def configuration(pem: Pem) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration(
            [(pem.key, pem.certificate)], root_certificates=pem.ca if mutual else None
        )

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        pem = files.changed()
        return configuration(pem) if pem is not None else None

    # "Nothing new" is None, which the stubs of grpc do not know.
    return grpc.dynamic_ssl_server_credentials(configuration(files.read()), fetch, mutual)  # type: ignore[arg-type]


class RenewedChannel(grpc.aio.Channel):  # type: ignore[misc,unused-ignore]
    """A channel that is made anew when its files have changed. Stubs keep it; calls under way end as they began."""

    def __init__(self, files: CertificateFiles, make: Callable[[Pem], grpc.aio.Channel]) -> None:
        self._files = files
        self._make = make
        self._channel = make(files.read())
        self._looked = time.monotonic()
        self._closing: set[asyncio.Task[None]] = set()

    def current(self) -> grpc.aio.Channel:
        """The channel for a call that begins now."""
        now = time.monotonic()
        if now - self._looked >= LOOK_S:
            self._looked = now
            pem = self._files.changed()
            if pem is not None:
                closing = asyncio.ensure_future(self._channel.close(DRAIN_S))
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)
                self._channel = self._make(pem)
        return self._channel

    def unary_unary(self, *args: Any, **options: Any) -> Any:
        return _Method(self, "unary_unary", args, options)

    def unary_stream(self, *args: Any, **options: Any) -> Any:
        return _Method(self, "unary_stream", args, options)

    def stream_unary(self, *args: Any, **options: Any) -> Any:
        return _Method(self, "stream_unary", args, options)

    def stream_stream(self, *args: Any, **options: Any) -> Any:
        return _Method(self, "stream_stream", args, options)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:  # noqa: FBT001, FBT002
        return self.current().get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self.current().wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self.current().channel_ready()

    async def close(self, grace: float | None = None) -> None:
        for closing in self._closing:
            closing.cancel()
        await asyncio.gather(*self._closing, return_exceptions=True)
        await self._channel.close(grace)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class _Method:
    """One method of a stub, on the channel of the moment."""

    __slots__ = ("_args", "_callable", "_channel", "_kind", "_options", "_owner")

    def __init__(self, owner: RenewedChannel, kind: str, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        self._owner = owner
        self._kind = kind
        self._args = args
        self._options = options
        self._channel: grpc.aio.Channel | None = None
        self._callable: Any = None

    def __call__(self, *args: Any, **options: Any) -> Any:
        channel = self._owner.current()
        if channel is not self._channel:
            self._channel = channel
            self._callable = getattr(channel, self._kind)(*self._args, **self._options)
        return self._callable(*args, **options)
