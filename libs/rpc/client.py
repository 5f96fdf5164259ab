"""Channels to our own services: mutual TLS, a deadline on every call, read-after tokens passed on."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeVar

import grpc

from libs.errors import UnavailableError
from libs.rpc.certificates import CertificateFiles, Pem, RenewedChannel
from libs.rpc.errors import error_of
from libs.rpc.identity import READ_AFTER, read_after_tokens
from libs.settings import Settings

DEFAULT_DEADLINE_S: Final = 10.0
MAX_MESSAGE: Final = 16 * 1024 * 1024
OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.max_send_message_length", MAX_MESSAGE),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # How long one try to connect may take, handshake included; a refused one fails at once all the same.
    ("grpc.min_reconnect_backoff_ms", 3_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.ssl_target_name_override", "localhost"),
)

T = TypeVar("T")


def _details(given: Any, default_deadline_s: float | None) -> grpc.aio.ClientCallDetails:
    """What every call of ours carries."""
    metadata = grpc.aio.Metadata(*(given.metadata or ()))
    for token in read_after_tokens():
        metadata.add(READ_AFTER, token)
    timeout = given.timeout if given.timeout is not None else default_deadline_s
    return grpc.aio.ClientCallDetails(given.method, timeout, metadata, given.credentials, given.wait_for_ready)


class _Outgoing(grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[misc,unused-ignore]
    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await continuation(_details(client_call_details, DEFAULT_DEADLINE_S), request)


class _OutgoingStream(grpc.aio.UnaryStreamClientInterceptor):  # type: ignore[misc,unused-ignore]
    """Streams last as long as their caller wants, so they get no deadline of ours."""

    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await continuation(_details(client_call_details, None), request)


def _interceptors() -> list[Any]:
    return [_Outgoing(), _OutgoingStream()]


def target_of(addresses: Sequence[str]) -> str:
    """What gRPC dials for a list of addresses: all of them, each call at the next one that is connected."""
    if len(addresses) == 1:
        return addresses[0]
    versions = {_version(address) for address in addresses}
    if len(versions) != 1 or 0 in versions:
        raise ValueError(
            f"{','.join(addresses)}: a list holds IP addresses of one family; for host names give one name that "
            "resolves to all replicas"
        )
    return f"ipv{versions.pop()}:{','.join(addresses)}"


def _version(address: str) -> int:
    try:
        return ipaddress.ip_address(address.rpartition(":")[0].strip("[]")).version
    except ValueError:
        return 0


def dial(settings: Settings, addresses: Sequence[str], *, identity: str) -> grpc.aio.Channel:
    """A channel to internal ports, as one of our services; it follows the files of its certificate."""
    target = target_of(addresses)

    def make(pem: Pem) -> grpc.aio.Channel:
        credentials = grpc.ssl_channel_credentials(pem.ca, pem.key, pem.certificate)
        options = [*OPTIONS, ("grpc.lb_policy_name", "round_robin")]
        return grpc.aio.secure_channel(target, credentials, options=options, interceptors=_interceptors())

    return RenewedChannel(CertificateFiles(settings, identity), make)


def channel(settings: Settings, service: str, *, identity: str) -> grpc.aio.Channel:
    """A channel to the internal ports of all replicas of a service."""
    return dial(settings, settings.addresses(service, "internal"), identity=identity)


async def retry_unavailable(
    call: Callable[[], Awaitable[T]], attempts: int = 4, first_delay_s: float = 0.1, most_delay_s: float = 2.0
) -> T:
    """Repeat an idempotent call while it answers UNAVAILABLE; the last error is raised.

    Waits as long as the answer's RetryInfo asks, and at least a delay that doubles.
    """
    delay = first_delay_s
    for attempt in range(attempts):
        try:
            return await call()
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE or attempt == attempts - 1:
                raise
            asked = error_of(error)
            await asyncio.sleep(max(delay, asked.retry_after_s if isinstance(asked, UnavailableError) else 0.0))
            delay = min(delay * 2, most_delay_s)
    raise RuntimeError("at least one attempt is needed")
