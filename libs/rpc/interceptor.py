"""The one server interceptor: every call passes the same gates in the same order.

1. Identity: SPIFFE id on the internal port, API key on the public one. 2. Deadline: none → 10 s imposed. 3. Validation
by the protovalidate rules of the request. 4. Authorization by the method's ``access`` option; a method without one
refuses all. 5. A call that changes what another replica leads goes there (:mod:`libs.rpc.forward`). 6. Read-after: the
view waits for what the caller has seen. 7. The handler; if it turns out that only the leader can do it, as in 5.
8. Errors become ``google.rpc`` statuses. A stream's caller is authorized again as the stream goes on.

Health needs no authorization; reflection needs identity but no permission.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from functools import cache
from typing import Any, Final, Protocol

import grpc
import protovalidate
from google.protobuf import descriptor_pool
from google.protobuf.message import Message
from groundswell.options.v1 import access_pb2

from libs.errors import GroundswellError, NotFoundError, PermissionDeniedError, UnauthenticatedError, UnavailableError
from libs.eventlog import Deadline, NotLeaderError, Token
from libs.names import organization_of
from libs.rpc.access import KeyDirectory, authenticate, authorize, only_reads, parse_credential, principal_of
from libs.rpc.errors import InvalidFieldsError, error_of, to_status
from libs.rpc.forward import FORWARDED_BY, ORIGINAL_PRINCIPAL, LeaderForwarder, RefusedByLeaderError, header
from libs.rpc.identity import (
    LOG_POSITION,
    READ_AFTER,
    Principal,
    begin_positions,
    caller_name,
    set_caller,
    set_read_after_tokens,
)

log = logging.getLogger(__name__)

DEFAULT_DEADLINE_S: Final = 10.0
MAX_TOKENS: Final = 64
STREAM_RECHECK_S: Final = 1.0
"""A stream's caller is authorized again before a message, when the last time was longer ago than this."""
_OPEN_PREFIX: Final = "/grpc.health.v1.Health/"
_REFLECTION_PREFIX: Final = "/grpc.reflection."
_DENIED_LOG_INTERVAL_S: Final = 5.0


class Reads(Protocol):
    """What the interceptor needs of a runtime; gateways of reads may have none."""

    async def wait_for(self, tokens: Sequence[Token], deadline: Deadline) -> None:
        """Return when the view has reached the tokens."""

    def leader_elsewhere(self, organization: str) -> str:
        """Address of the replica that decides for an organization; empty when it is this one, or not known."""


class DeniedCalls:
    """Denied calls are counted, with a sample in the log now and then: a flood of them writes nothing more."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self._clock = clock
        self._last: dict[tuple[str, str], float] = {}

    def record(self, method: str, reason: str, principal: str) -> None:
        """Count one denied call."""
        key = (method, reason)
        self.counts[key] += 1
        now = self._clock()
        if now - self._last.get(key, -_DENIED_LOG_INTERVAL_S) >= _DENIED_LOG_INTERVAL_S:
            self._last[key] = now
            log.warning(
                "denied: method=%s reason=%s count=%d principal=%s", method, reason, self.counts[key], principal
            )


@cache
def access_of(method: str) -> access_pb2.Access | None:
    """Access rule of ``/package.Service/Method``, or None when it has none."""
    try:
        found = descriptor_pool.Default().FindMethodByName(method.lstrip("/").replace("/", "."))
    except KeyError:
        return None
    options = found.GetOptions()
    return options.Extensions[access_pb2.access] if options.HasExtension(access_pb2.access) else None


def resource_of(request: Message, path: str) -> str:
    """Value at a dotted path of the request."""
    value: Any = request
    for part in path.split("."):
        value = getattr(value, part)
    return str(value)


class Gate(grpc.aio.ServerInterceptor):  # type: ignore[misc,unused-ignore]
    """See the module. ``trust_domain`` makes it the gate of an internal port; without one it is that of a public port.

    An internal gate uses ``directory`` for the callers of forwarded calls only.
    """

    def __init__(
        self,
        reads: Reads | None,
        *,
        directory: KeyDirectory | None = None,
        trust_domain: str = "",
        forwarder: LeaderForwarder | None = None,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._reads = reads
        self._directory = directory
        self._trust_domain = trust_domain
        self._forwarder = forwarder
        self._now_ms = now_ms
        self._validator = protovalidate.Validator()
        self.denied = DeniedCalls()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the method's handler."""
        handler = await continuation(handler_call_details)
        method: str = handler_call_details.method
        if handler is None or method.startswith(_OPEN_PREFIX):
            return handler
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(
                self._unary(method, handler.unary_unary),
                handler.request_deserializer,
                _passing_bytes(handler.response_serializer),
            )
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(
                self._stream(method, handler.unary_stream), handler.request_deserializer, handler.response_serializer
            )
        if handler.stream_stream is not None and method.startswith(_REFLECTION_PREFIX):
            return grpc.stream_stream_rpc_method_handler(
                self._reflection(method, handler.stream_stream),
                handler.request_deserializer,
                handler.response_serializer,
            )
        return _closed(method)

    def _unary(
        self, method: str, handler: Callable[[Any, Any], Awaitable[Any]]
    ) -> Callable[[Any, Any], Awaitable[Any]]:
        async def call(request: Message, context: Any) -> Any:
            try:
                remaining = context.time_remaining() or DEFAULT_DEADLINE_S
                async with asyncio.timeout(remaining):
                    response, positions = await self._answer(method, handler, request, context, remaining)
            except grpc.aio.AbortError:
                raise
            except RefusedByLeaderError as refusal:
                await context.abort_with_status(refusal.status)
            except TimeoutError:
                await _abort(context, UnavailableError("DEADLINE_EXCEEDED", f"{method} did not finish in its deadline"))
            except Exception as error:
                await _abort(context, self._known(method, error))
            if positions:
                context.set_trailing_metadata(tuple((LOG_POSITION, position) for position in positions))
            return response

        return call

    async def _answer(
        self,
        method: str,
        handler: Callable[[Any, Any], Awaitable[Any]],
        request: Message,
        context: Any,
        remaining: float,
    ) -> tuple[Any, list[str]]:
        """The response, which is bytes when the leader gave it, and the positions to report."""
        deadline = Deadline.after(remaining)
        principal, positions = await self._enter(method, request, context)
        leader = self._leader_elsewhere(method, request, context)
        if not leader:
            try:
                await self._read_after(context, deadline)
                return await handler(request, context), positions
            except NotLeaderError as error:
                # Nothing was decided here: whatever the handler did before can be done again, as for any retry.
                leader = error.leader
                if not leader or self._forwarder is None or header(context, FORWARDED_BY):
                    raise
        assert self._forwarder is not None  # noqa: S101 - without one there is no leader elsewhere
        await self._forwarder.tidy()
        return await self._forwarder.call(leader, method, request, context, principal, deadline.remaining())

    def _leader_elsewhere(self, method: str, request: Message, context: Any) -> str:
        """Where a call goes that is known beforehand to change something: before its handler does any work for it."""
        rule = access_of(method)
        if self._forwarder is None or self._reads is None or rule is None or header(context, FORWARDED_BY):
            return ""
        if not rule.permission or not rule.resource or only_reads(rule.permission):
            return ""
        return self._reads.leader_elsewhere(organization_of(resource_of(request, rule.resource)))

    def _stream(
        self, method: str, handler: Callable[[Any, Any], AsyncGenerator[Any, None]]
    ) -> Callable[[Any, Any], AsyncIterator[Any]]:
        async def call(request: Message, context: Any) -> AsyncIterator[Any]:
            try:
                await self._enter(method, request, context)
                await self._read_after(context, Deadline.after(DEFAULT_DEADLINE_S))
                checked = time.monotonic()
                async with aclosing(handler(request, context)) as responses:
                    async for response in responses:
                        if time.monotonic() - checked >= STREAM_RECHECK_S:
                            # A key that was revoked since must see nothing more.
                            self._authorize(method, await self._identify(context), request)
                            checked = time.monotonic()
                        yield response
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                await _abort(context, self._known(method, error))

        return call

    def _reflection(
        self, method: str, handler: Callable[[Any, Any], AsyncIterator[Any]]
    ) -> Callable[[Any, Any], AsyncIterator[Any]]:
        async def call(requests: Any, context: Any) -> AsyncIterator[Any]:
            try:
                await self._identify(context)
            except GroundswellError as error:
                await _abort(context, self._known(method, error))
            async for response in handler(requests, context):
                yield response

        return call

    async def _enter(self, method: str, request: Message, context: Any) -> tuple[Principal, list[str]]:
        principal = await self._identify(context)
        set_caller(principal)
        positions = begin_positions()
        self._validate(request)
        self._authorize(method, principal, request)
        return principal, positions

    async def _read_after(self, context: Any, deadline: Deadline) -> None:
        tokens = tuple(str(value) for key, value in context.invocation_metadata() if key == READ_AFTER)[:MAX_TOKENS]
        set_read_after_tokens(tokens)
        if tokens and self._reads is not None:
            await self._reads.wait_for([_token(text) for text in tokens], deadline)

    async def _identify(self, context: Any) -> Principal:
        if self._trust_domain or self._directory is None:
            peer = self._service(context)
            original = header(context, ORIGINAL_PRINCIPAL)
            same = self._forwarder is not None and peer.service == self._forwarder.service
            return await self._original(original) if original and same else peer
        metadata = {key: value for key, value in context.invocation_metadata() if key == "authorization"}
        if "authorization" not in metadata:
            raise UnauthenticatedError(
                "CREDENTIALS_MISSING", "present an API key as `authorization: Bearer gsw_<organization>_<id>_<secret>`"
            )
        credential = parse_credential(str(metadata["authorization"]))
        record = await self._directory.lookup(credential.organization, credential.name)
        return authenticate(credential, record, self._now_ms())

    async def _original(self, name: str) -> Principal:
        """Whoever another replica of this service has identified, with the rights that are known here."""
        prefix = f"spiffe://{self._trust_domain}/service/"
        if name.startswith(prefix):
            return Principal(name=name, kind="service", service=name.removeprefix(prefix))
        organization = organization_of(name)
        record = await self._directory.lookup(organization, name) if self._directory is not None else None
        return principal_of(organization, record, self._now_ms())

    def _service(self, context: Any) -> Principal:
        prefix = f"spiffe://{self._trust_domain}/service/"
        ids = [name.decode() for name in context.auth_context().get("peer_spiffe_id", [])]
        if len(ids) != 1 or not ids[0].startswith(prefix):
            raise UnauthenticatedError("SERVICE_UNKNOWN", "the internal port takes services of this deployment only")
        return Principal(name=ids[0], kind="service", service=ids[0].removeprefix(prefix))

    def _validate(self, request: Message) -> None:
        violations = self._validator.collect_violations(request)
        if violations:
            raise InvalidFieldsError([_violation(violation) for violation in violations])

    def _authorize(self, method: str, principal: Principal, request: Message) -> None:
        rule = access_of(method)
        if principal.kind == "service":
            if rule is None or principal.service not in rule.callers:
                raise PermissionDeniedError(
                    "CALLER_NOT_ALLOWED",
                    f"{principal.name} may not call {method}",
                    caller=principal.name,
                    method=method,
                )
            return
        if rule is None or not rule.permission:
            raise PermissionDeniedError("PERMISSION_MISSING", f"{method} is not public", method=method)
        resource = resource_of(request, rule.resource) if rule.resource else ""
        if rule.resource and not resource:
            # An empty name would be authorized on nothing in particular.
            raise InvalidFieldsError([(rule.resource, "a resource name is required")])
        authorize(principal, rule.permission, resource)

    def _known(self, method: str, error: Exception) -> GroundswellError:
        """The error to answer; unexpected ones are logged under an id that the answer names."""
        if isinstance(error, GroundswellError):
            if isinstance(error, PermissionDeniedError | UnauthenticatedError | NotFoundError):
                self.denied.record(method, error.reason, caller_name())
            return error
        if isinstance(error, grpc.aio.AioRpcError):
            return error_of(error)
        if isinstance(error, NotImplementedError):
            unfinished = GroundswellError("UNIMPLEMENTED", f"{method} is not there yet", method=method)
            unfinished.status = "UNIMPLEMENTED"
            return unfinished
        incident = uuid.uuid4().hex[:12]
        log.error("unexpected error %s in %s", incident, method, exc_info=error)
        return GroundswellError("INTERNAL", f"unexpected error, logged as {incident}", incident=incident)


def _passing_bytes(serialize: Callable[[Any], bytes] | None) -> Callable[[Any], bytes]:
    """What the leader has serialized is not taken apart to be put together again."""

    def serialized(response: Any) -> bytes:
        return response if isinstance(response, bytes) or serialize is None else serialize(response)

    return serialized


def _closed(method: str) -> grpc.RpcMethodHandler[Any, Any]:
    """No API of ours takes a stream of requests; such a method would pass no gate, so it is not open at all."""

    async def refuse(requests: Any, context: Any) -> None:  # noqa: ARG001 - grpc's signature
        error = GroundswellError("UNIMPLEMENTED", f"{method} takes a stream of requests", method=method)
        error.status = "UNIMPLEMENTED"
        await _abort(context, error)

    return grpc.stream_unary_rpc_method_handler(refuse)


def _violation(violation: Any) -> tuple[str, str]:
    proto = violation.proto
    path = ".".join(element.field_name for element in proto.field.elements) if proto.field else ""
    return path, proto.message or proto.rule_id


def _token(text: str) -> Token:
    parts = text.split("/")
    try:
        service, partition, log_id, position, public_seq = parts
        return Token(service, int(partition), log_id, int(position), int(public_seq))
    except ValueError:
        raise InvalidFieldsError([(READ_AFTER, "is not a token that this installation gave out")]) from None


async def _abort(context: Any, error: GroundswellError) -> None:
    await context.abort_with_status(to_status(error))
