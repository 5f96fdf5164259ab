"""Errors that reach a caller, grouped by who is at fault; ``libs.rpc`` maps them to gRPC status in one interceptor.

Every refusal carries a stable ``reason`` (UPPER_SNAKE, part of the API) and metadata with each variable that the
message mentions. A :class:`DomainError` raised by ``decide`` changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping


class GroundswellError(Exception):
    """Base of all errors with a reason."""

    status: str = "INTERNAL"
    """Name of the gRPC status code."""

    def __init__(self, reason: str, message: str, /, **metadata: object) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata: Mapping[str, str] = {key: str(value) for key, value in metadata.items()}

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


class DomainError(GroundswellError):
    """The caller's request cannot be done; a retry of the same request gives the same answer."""

    status = "FAILED_PRECONDITION"


class InvalidArgumentError(DomainError):
    """A field is wrong whatever the state. ``field`` names it."""

    status = "INVALID_ARGUMENT"

    def __init__(self, reason: str, message: str, /, *, field: str = "", **metadata: object) -> None:
        super().__init__(reason, message, **({"field": field} if field else {}), **metadata)
        self.field = field


class NotFoundError(DomainError):
    """The resource does not exist, or must not be seen by this caller."""

    status = "NOT_FOUND"


class AlreadyExistsError(DomainError):
    """A resource of that name or unique key exists."""

    status = "ALREADY_EXISTS"


class FailedPreconditionError(DomainError):
    """The resource is in a state that does not allow this."""

    status = "FAILED_PRECONDITION"


class AbortedError(DomainError):
    """A stale etag: read again, then decide again."""

    status = "ABORTED"


class ResourceExhaustedError(DomainError):
    """A quota or rate is used up; metadata names it."""

    status = "RESOURCE_EXHAUSTED"


class PermissionDeniedError(DomainError):
    """The caller is known and lacks a permission in its own organization."""

    status = "PERMISSION_DENIED"


class UnauthenticatedError(DomainError):
    """No credentials, or none that can be verified."""

    status = "UNAUTHENTICATED"


class UnavailableError(GroundswellError):
    """Outcome unknown, not leader, or view not caught up: retry the same request after ``retry_after_s``."""

    status = "UNAVAILABLE"

    def __init__(self, reason: str, message: str, /, *, retry_after_s: float = 0.2, **metadata: object) -> None:
        super().__init__(reason, message, **metadata)
        self.retry_after_s = retry_after_s


def check_etag(sent: str, current: str, resource: str) -> None:
    """Refuse a stale etag. An empty one asks for no check (AIP-154)."""
    if sent and sent != current:
        raise AbortedError(
            "ETAG_MISMATCH",
            f"{resource} has changed: read it again and repeat the update on the new version",
            resource=resource,
            sent=sent,
            current=current,
        )
