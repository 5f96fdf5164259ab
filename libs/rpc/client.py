"""Channels to our own services: mutual TLS, a deadline on every call, read-after tokens passed on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

import grpc

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
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.ssl_target_name_override", "localhost"),
)

T = TypeVar("T")


class _Outgoing(grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[misc,unused-ignore]
    """Adds what every call of ours carries."""

    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        metadata = grpc.aio.Metadata(*(client_call_details.metadata or ()))
        for token in read_after_tokens():
            metadata.add(READ_AFTER, token)
        details = grpc.aio.ClientCallDetails(
            client_call_details.method,
            client_call_details.timeout or DEFAULT_DEADLINE_S,
            metadata,
            client_call_details.credentials,
            client_call_details.wait_for_ready,
        )
        return await continuation(details, request)


def channel(settings: Settings, service: str, *, identity: str) -> grpc.aio.Channel:
    """A channel to the internal port of a service, as one of our services."""
    certificate, key = settings.certificate(identity)
    credentials = grpc.ssl_channel_credentials(settings.ca, key, certificate)
    return grpc.aio.secure_channel(
        settings.address(service, "internal"), credentials, options=list(OPTIONS), interceptors=[_Outgoing()]
    )


async def retry_unavailable(call: Callable[[], Awaitable[T]], attempts: int = 4, first_delay_s: float = 0.1) -> T:
    """Repeat an idempotent call while it answers UNAVAILABLE, with growing delay; the last error is raised."""
    delay = first_delay_s
    for attempt in range(attempts):
        try:
            return await call()
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE or attempt == attempts - 1:
                raise
            await asyncio.sleep(delay)
            delay *= 2
    raise RuntimeError("at least one attempt is needed")
