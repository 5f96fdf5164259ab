"""What a call raises."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status


class SdkError(Exception):
    """Something on this side of the API cannot go on: a file, a key, a profile. The message says why and what to do."""


class ApiError(Exception):
    """A refused or failed call. ``reason`` is stable and part of the API."""

    def __init__(
        self,
        code: str,
        reason: str,
        message: str,
        metadata: Mapping[str, str],
        fields: Mapping[str, str],
        retry_after_s: float | None,
    ) -> None:
        super().__init__(f"{reason or code}: {message}")
        self.code = code
        """gRPC status code name."""
        self.reason = reason
        """UPPER_SNAKE reason, empty when the server never answered."""
        self.message = message
        self.metadata = metadata
        self.fields = fields
        """Field path → what is wrong with it."""
        self.retry_after_s = retry_after_s


def from_rpc_error(error: grpc.RpcError) -> ApiError:
    """The error with its ``google.rpc`` details unpacked."""
    # Every error of a call is a Call too, but its type does not say so.
    call: Any = error
    code, message = call.code().name, call.details() or ""
    reason = ""
    metadata: dict[str, str] = {}
    fields: dict[str, str] = {}
    retry_after: float | None = None
    status = rpc_status.from_call(call)
    for detail in status.details if status else ():
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            detail.Unpack(info)
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad = error_details_pb2.BadRequest()
            detail.Unpack(bad)
            fields = {violation.field: violation.description for violation in bad.field_violations}
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            detail.Unpack(retry)
            retry_after = retry.retry_delay.ToTimedelta().total_seconds()
    return ApiError(code, reason, message, metadata, fields, retry_after)
