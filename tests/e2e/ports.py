"""Every public port, called bare: nothing of the SDK repeats or changes a call."""

from __future__ import annotations

import time

import grpc
from google.protobuf import symbol_database
from google.protobuf.message import Message

from clients.sdk import ApiError
from clients.sdk.errors import from_rpc_error
from tests.e2e.routes import Route, request_for
from tests.e2e.stack import Stack

PATIENCE_S = 20.0


class Ports:
    """Channels to all public ports of an installation."""

    def __init__(self, stack: Stack) -> None:
        credentials = grpc.ssl_channel_credentials(stack.ca_pem)
        self._channels = {
            name: grpc.secure_channel(address, credentials) for name, address in stack.profile.endpoints.items()
        }

    def refusal(self, route: Route, request: Message, key: str) -> ApiError | None:
        """The error of a call, None when it was answered. Only a leader's hand-over is waited for."""
        output = symbol_database.Default().GetSymbol(route.method.output_type.full_name)
        channel = self._channels[route.service]
        make = channel.unary_stream if route.streams else channel.unary_unary
        call = make(route.path, lambda message: message.SerializeToString(), output.FromString)
        metadata = [("authorization", f"Bearer {key}")] if key else []
        give_up = time.monotonic() + PATIENCE_S
        while True:
            try:
                if route.streams:
                    stream = call(request, metadata=metadata, timeout=10)
                    next(iter(stream))
                    stream.cancel()
                else:
                    call(request, metadata=metadata, timeout=10)
            except grpc.RpcError as raw:
                error = from_rpc_error(raw)
                if error.code == "UNAVAILABLE" and time.monotonic() < give_up:
                    continue
                return error
            return None

    def call(self, route: Route, organization: str, key: str) -> tuple[str, str, str]:
        """(status, reason, message) of a well-formed call that names things of the organization."""
        error = self.refusal(route, request_for(route, organization), key)
        return ("OK", "", "") if error is None else (error.code, error.reason, str(error))

    def close(self) -> None:
        for channel in self._channels.values():
            channel.close()
