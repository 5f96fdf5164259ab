"""CA keys are decided at their own partition, which another replica may lead: both ends of that call.

A task's command is no request that could be forwarded whole, so these few commands travel as an RPC of pki to itself.
"""

from __future__ import annotations

from typing import Any, Final

import grpc
from groundswell.pki.v1 import events_pb2, keys_pb2, keys_pb2_grpc

from libs.eventlog import Command, Committed, Deadline, NotLeaderError, Runtime, Token
from libs.rpc import dial, error_of, submit
from libs.settings import Settings
from services.pki.model import ConfirmSpki, ReleaseSpki, ReserveSpki, State, routing_key

_ACTIONS: Final = {
    ReserveSpki: keys_pb2.HoldCaKeyRequest.ACTION_RESERVE,
    ConfirmSpki: keys_pb2.HoldCaKeyRequest.ACTION_CONFIRM,
    ReleaseSpki: keys_pb2.HoldCaKeyRequest.ACTION_RELEASE,
}
_COMMANDS: Final = {action: command for command, action in _ACTIONS.items()}


class CaKeyServicer(keys_pb2_grpc.CaKeyInternalServiceServicer):
    """The leader's end."""

    def __init__(self, runtime: Runtime[State]) -> None:
        self._runtime = runtime

    async def HoldCaKey(self, request: Any, context: Any) -> keys_pb2.HoldCaKeyResponse:  # noqa: N802
        """Decide, and name the holder."""
        command = _COMMANDS[request.action](request.spki_fingerprint, request.ca_certificate)
        held = await submit(self._runtime, routing_key(request.spki_fingerprint), command, request, context)
        holder = held.ca_certificate if isinstance(held, events_pb2.SpkiReserved) else ""
        return keys_pb2.HoldCaKeyResponse(ca_certificate=holder)


class CaKeyForwarder:
    """A `libs.eventlog` Forwarder for these commands, and for no others."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    async def __call__(self, address: str, command: Command, deadline: Deadline, /) -> Committed:
        payload = command.payload
        if not isinstance(payload, ReserveSpki | ConfirmSpki | ReleaseSpki):
            raise NotLeaderError("another replica leads the partition", address)
        request = keys_pb2.HoldCaKeyRequest(
            spki_fingerprint=payload.fingerprint,
            ca_certificate=payload.ca_certificate,
            action=_ACTIONS[type(payload)],
        )
        # Registrations are rare, so a channel is not kept for them.
        async with dial(self._settings, (address,), identity="pki") as channel:
            stub = keys_pb2_grpc.CaKeyInternalServiceStub(channel)
            try:
                answer = await stub.HoldCaKey(request, timeout=deadline.remaining())
            except grpc.aio.AioRpcError as error:
                raise error_of(error) from error
        held = events_pb2.SpkiReserved(spki_fingerprint=payload.fingerprint, ca_certificate=answer.ca_certificate)
        return Committed(held, Token("pki", 0, "", -1, 0))
