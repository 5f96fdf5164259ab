"""The client: one channel per service, with the interceptors that make calls safe to repeat."""

from __future__ import annotations

import ipaddress
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import grpc
from groundswell.artifacts.v1 import artifacts_pb2_grpc
from groundswell.audit.v1 import audit_pb2_grpc
from groundswell.pki.v1 import pki_pb2_grpc
from groundswell.registry.v1 import registry_pb2_grpc
from groundswell.releases.v1 import releases_pb2_grpc
from groundswell.rollout.v1 import edge_pb2_grpc, rollout_pb2_grpc
from groundswell.webhooks.v1 import webhooks_pb2_grpc

from clients.sdk.errors import ApiError, from_rpc_error
from clients.sdk.profile import SERVICES, Profile, ProfileError

DEFAULT_TIMEOUT_S: Final = 10.0
RETRY_BUDGET_S: Final = 30.0
"""UNAVAILABLE is retried for this long: a leader's hand-over takes about three seconds."""
MAX_MESSAGE: Final = 16 * 1024 * 1024
_TOKENS_SENT: Final = 64


class _CallDetails(NamedTuple):
    method: str
    timeout: float | None
    metadata: list[tuple[str, str | bytes]]
    credentials: grpc.CallCredentials | None
    wait_for_ready: bool | None
    compression: grpc.Compression | None


class _CallDetailsBase(_CallDetails, grpc.ClientCallDetails):  # type: ignore[misc,unused-ignore]
    pass


class Tokens:
    """Highest log position seen of each service and partition; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tokens: dict[tuple[str, str], str] = {}

    def record(self, metadata: Any) -> None:
        """Take the positions out of trailing metadata."""
        for key, value in metadata or ():
            if key == "x-log-position":
                self._put(value)

    def _put(self, token: str) -> None:
        service, partition, log_id, position, _ = token.split("/", 4)
        with self._lock:
            known = self._tokens.get((service, partition))
            if known is None or known.split("/")[2] != log_id or int(known.split("/")[3]) < int(position):
                self._tokens[(service, partition)] = token

    def headers(self) -> list[tuple[str, str | bytes]]:
        """Metadata that asks servers to wait for what was seen."""
        with self._lock:
            return [("x-read-after", token) for token in list(self._tokens.values())[:_TOKENS_SENT]]

    def forget(self) -> None:
        """Drop all: a log was reset."""
        with self._lock:
            self._tokens.clear()


class _Interceptor(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):  # type: ignore[misc,unused-ignore]
    def __init__(
        self,
        api_key: str,
        tokens: Tokens,
        timeout_s: float,
        retry_budget_s: float,
        on_acknowledged: Callable[[str, str], None] | None,
    ) -> None:
        self._on_acknowledged = on_acknowledged
        self._authorization = f"Bearer {api_key}"
        self._tokens = tokens
        self._timeout_s = timeout_s
        self._retry_budget_s = retry_budget_s

    def _details(self, details: grpc.ClientCallDetails, timeout: float | None) -> _CallDetailsBase:
        metadata: list[tuple[str, str | bytes]] = list(details.metadata or ())
        metadata.append(("authorization", self._authorization))
        metadata.extend(self._tokens.headers())
        return _CallDetailsBase(details.method, timeout, metadata, details.credentials, details.wait_for_ready, None)

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        """One logical call: the same request id however often it is sent."""
        is_command = "request_id" in request.DESCRIPTOR.fields_by_name
        if is_command and not request.request_id:
            request.request_id = str(uuid.uuid4())
        timeout = client_call_details.timeout or self._timeout_s
        give_up = time.monotonic() + self._retry_budget_s
        delay, reset = 0.1, False
        while True:
            call = continuation(self._details(client_call_details, timeout), request)
            try:
                call.result()
            except grpc.RpcError as raw:
                error = from_rpc_error(raw)
                if error.reason == "LOG_RESET" and not reset:
                    reset = True
                    self._tokens.forget()
                    continue
                if error.code != "UNAVAILABLE" or time.monotonic() >= give_up:
                    raise error from None
                time.sleep(max(delay, error.retry_after_s or 0.0))
                delay = min(delay * 2, 2.0)
                continue
            self._tokens.record(call.trailing_metadata())
            if self._on_acknowledged is not None and is_command:
                self._on_acknowledged(client_call_details.method, request.request_id)
            return call

    def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        """A stream has no deadline unless the caller gives one; errors are raised by ``Client.stream``."""
        return continuation(self._details(client_call_details, client_call_details.timeout), request)


def _channel(endpoints: str, credentials: grpc.ChannelCredentials, options: list[tuple[str, Any]]) -> grpc.Channel:
    """One channel to all replicas: each call, and so each retry, goes to the next one that is connected."""
    listed = [endpoint.strip() for endpoint in endpoints.split(",") if endpoint.strip()]
    if len(listed) <= 1:
        return grpc.secure_channel(endpoints, credentials, options)
    hosts = [endpoint.rpartition(":")[0].strip("[]") for endpoint in listed]
    try:
        (version,) = {ipaddress.ip_address(host).version for host in hosts}
    except ValueError:
        raise ProfileError(
            f"endpoints '{endpoints}': a list holds IP addresses of one family; for host names give one name that "
            "resolves to all replicas"
        ) from None
    several = [*options, ("grpc.lb_policy_name", "round_robin")]
    if not any(name == "grpc.ssl_target_name_override" for name, _ in options):
        several.append(("grpc.ssl_target_name_override", hosts[0]))
    return grpc.secure_channel(f"ipv{version}:{','.join(listed)}", credentials, several)


class Client:
    """Public APIs of one installation. Thread-safe; close it or use it as a context manager.

    Raises :class:`ApiError` for every refused or failed call.
    """

    def __init__(
        self,
        endpoints: Mapping[str, str],
        api_key: str,
        ca_pem: bytes,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retry_budget_s: float = RETRY_BUDGET_S,
        server_name: str = "",
        on_acknowledged: Callable[[str, str], None] | None = None,
    ) -> None:
        """``on_acknowledged(method, request_id)`` is called after each command that succeeded."""
        self.tokens = Tokens()
        credentials = grpc.ssl_channel_credentials(ca_pem)
        options: list[tuple[str, Any]] = [
            ("grpc.max_receive_message_length", MAX_MESSAGE),
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1_000),
        ]
        if server_name:
            options.append(("grpc.ssl_target_name_override", server_name))
        interceptor = _Interceptor(api_key, self.tokens, timeout_s, retry_budget_s, on_acknowledged)
        self._channels = {name: _channel(endpoints[name], credentials, options) for name in SERVICES}
        wrapped = {name: grpc.intercept_channel(channel, interceptor) for name, channel in self._channels.items()}
        self.registry = registry_pb2_grpc.RegistryServiceStub(wrapped["registry"])
        self.pki = pki_pb2_grpc.PkiServiceStub(wrapped["pki"])
        self.artifacts = artifacts_pb2_grpc.ArtifactsServiceStub(wrapped["artifacts"])
        self.releases = releases_pb2_grpc.ReleasesServiceStub(wrapped["releases"])
        self.rollout = rollout_pb2_grpc.RolloutServiceStub(wrapped["rollout"])
        self.edge = edge_pb2_grpc.RolloutEdgeServiceStub(wrapped["rollout"])
        self.webhooks = webhooks_pb2_grpc.WebhooksServiceStub(wrapped["webhooks"])
        self.audit = {name: audit_pb2_grpc.AuditServiceStub(channel) for name, channel in wrapped.items()}

    @classmethod
    def from_profile(cls, path: Path | None = None, *, api_key: str = "", **options: Any) -> Self:
        """Client for the profile's endpoints and current key, or the given key."""
        profile = Profile.load(path)
        return cls(profile.endpoints, api_key or profile.api_key, profile.ca.read_bytes(), **options)

    def pages(self, method: Callable[[Any], Any], request: Any, field: str) -> Iterator[Any]:
        """Every item of a List method, page by page."""
        while True:
            response = method(request)
            yield from getattr(response, field)
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    def stream(self, method: Callable[[Any], Any], request: Any) -> Iterator[Any]:
        """Items of a server stream, with errors as :class:`ApiError`."""
        try:
            yield from method(request)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None

    def close(self) -> None:
        """Close the channels."""
        for channel in self._channels.values():
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


__all__ = ["ApiError", "Client", "Tokens"]
