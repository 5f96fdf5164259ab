"""A call that only a leader can answer, passed on to it whole: one hop, over mutual TLS (docs/decisions/0002).

What the leader gets is the request as it came, so a retry with the same ``request_id`` is the same command wherever it
arrives. Of the headers only an allow-list travels; the credential does not. The caller travels as a *name* in
``x-original-principal``, believed only from a peer with the SPIFFE id of the same service, and the leader looks up that
name's rights and authorizes again: a replica with an old view lends nobody a right. A call that carries
``x-forwarded-by`` is never passed on again.

What comes back is given back unchanged: trailing positions, status, error details. A leader that cannot be reached is
UNAVAILABLE with RetryInfo, because it is not known whether it had begun.
"""

from __future__ import annotations

import logging
from typing import Any, Final, cast

import grpc
from google.protobuf.message import Message
from grpc_status import rpc_status

from libs.errors import UnavailableError
from libs.rpc.client import dial
from libs.rpc.identity import LOG_POSITION, READ_AFTER, Principal
from libs.settings import Settings

log = logging.getLogger(__name__)

FORWARDED_BY: Final = "x-forwarded-by"
ORIGINAL_PRINCIPAL: Final = "x-original-principal"
ALLOWED: Final = frozenset({READ_AFTER, "traceparent"})
"""Headers that go with the call; those of gRPC itself are made anew."""
MARGIN_S: Final = 0.2
"""Kept back of the caller's deadline, so that the answer finds a caller who still waits."""
MAX_CHANNELS: Final = 32
"""Addresses come from the log; those of replicas long gone are let go."""


class RefusedByLeaderError(Exception):
    """The leader's own refusal, to be given back as it is."""

    def __init__(self, status: grpc.Status) -> None:
        super().__init__(status.details)
        self.status = status


def header(context: Any, name: str) -> str:
    """The value of a header, empty when it was not sent."""
    return next((str(value) for key, value in context.invocation_metadata() or () if key == name), "")


def _serialized(message: Message) -> bytes:
    return message.SerializeToString()


class LeaderForwarder:
    """Channels to the other replicas of a service, by their addresses in the log."""

    def __init__(self, settings: Settings, service: str) -> None:
        self._settings = settings
        self.service = service
        self._own = settings.address(service, "internal")
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def call(
        self, address: str, method: str, request: Message, context: Any, principal: Principal, remaining: float
    ) -> tuple[bytes, list[str]]:
        """The leader's answer, still serialized, and the positions it reports."""
        metadata = [(key, value) for key, value in context.invocation_metadata() or () if key in ALLOWED]
        metadata += [(FORWARDED_BY, self._own), (ORIGINAL_PRINCIPAL, principal.name)]
        invoke: Any = self._channel(address).unary_unary(method, request_serializer=_serialized)
        call = invoke(request, metadata=metadata, timeout=max(remaining - MARGIN_S, remaining / 2))
        try:
            answer = await call
        except grpc.aio.AioRpcError as error:
            raise self._refusal(error, address, method) from error
        trailing = await call.trailing_metadata() or ()
        return bytes(answer), [str(value) for key, value in trailing if key == LOG_POSITION]

    def _refusal(self, error: grpc.aio.AioRpcError, address: str, method: str) -> Exception:
        status = rpc_status.from_call(cast("grpc.Call", error))
        if status is not None:
            return RefusedByLeaderError(rpc_status.to_status(status))
        log.warning("forwarding %s to %s: %s %s", method, address, error.code().name, error.details())
        return UnavailableError(
            "LEADER_UNREACHABLE",
            "the replica that leads did not answer, so it is not known whether the request was carried out: "
            "repeat it with the same request_id",
            retry_after_s=0.5,
        )

    def _channel(self, address: str) -> grpc.aio.Channel:
        found = self._channels.pop(address, None) or dial(self._settings, (address,), identity=self.service)
        self._channels[address] = found  # the newest last
        return found

    async def tidy(self) -> None:
        """Close what was not used for longest, when there are many."""
        while len(self._channels) > MAX_CHANNELS:
            await self._channels.pop(next(iter(self._channels))).close()

    async def close(self) -> None:
        """Close all channels."""
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()
