"""Errors on the wire: ``GroundswellError`` ↔ ``google.rpc.Status`` with ErrorInfo, BadRequest and RetryInfo."""

from __future__ import annotations

from typing import Final, cast

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from libs import errors
from libs.errors import GroundswellError, InvalidArgumentError, UnavailableError

DOMAIN: Final = "groundswell"
_BY_STATUS: Final[dict[str, type[GroundswellError]]] = {
    kind.status: kind
    for kind in (
        errors.InvalidArgumentError,
        errors.NotFoundError,
        errors.AlreadyExistsError,
        errors.FailedPreconditionError,
        errors.AbortedError,
        errors.ResourceExhaustedError,
        errors.PermissionDeniedError,
        errors.UnauthenticatedError,
        errors.UnavailableError,
    )
}


class InvalidFieldsError(InvalidArgumentError):
    """Several fields are wrong at once. ``violations`` holds (path, description)."""

    def __init__(self, violations: list[tuple[str, str]]) -> None:
        text = "; ".join(f"{path}: {why}" for path, why in violations[:5])
        super().__init__("INVALID_FIELD", f"invalid request: {text}", field=violations[0][0] if violations else "")
        self.violations = violations


def _pack(
    message: error_details_pb2.ErrorInfo | error_details_pb2.BadRequest | error_details_pb2.RetryInfo,
) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def to_status(error: GroundswellError) -> grpc.Status:
    """The status with its details; each detail type once (AIP-193)."""
    details = [_pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=dict(error.metadata)))]
    violations = getattr(error, "violations", None)
    if violations is None and isinstance(error, InvalidArgumentError) and error.field:
        violations = [(error.field, error.message)]
    if violations:
        fields = [error_details_pb2.BadRequest.FieldViolation(field=path, description=why) for path, why in violations]
        details.append(_pack(error_details_pb2.BadRequest(field_violations=fields)))
    if isinstance(error, UnavailableError):
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        details.append(_pack(error_details_pb2.RetryInfo(retry_delay=delay)))
    code = grpc.StatusCode[error.status]
    status = status_pb2.Status(code=code.value[0], message=error.message, details=details)
    return rpc_status.to_status(status)


def error_of(error: grpc.aio.AioRpcError) -> GroundswellError:
    """The error another service answered, with its reason, so that it passes through unchanged."""
    reason, metadata, retry_after = "", {}, 0.2
    status = rpc_status.from_call(cast("grpc.Call", error))
    for detail in status.details if status else ():
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            detail.Unpack(info)
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            detail.Unpack(retry)
            retry_after = retry.retry_delay.ToTimedelta().total_seconds()
    message = error.details() or error.code().name
    name = error.code().name
    if name in ("DEADLINE_EXCEEDED", "CANCELLED"):
        return UnavailableError("DEADLINE_EXCEEDED", f"another service did not answer in time: {message}")
    kind = _BY_STATUS.get(name)
    if kind is None or kind is UnavailableError:
        return UnavailableError(reason or "SERVICE_UNAVAILABLE", message, retry_after_s=retry_after, **metadata)
    if kind is InvalidArgumentError:
        field = metadata.pop("field", "")
        return InvalidArgumentError(reason or name, message, field=field, **metadata)
    return kind(reason or name, message, **metadata)
