"""gRPC for our services: servers, the interceptor that guards every call, channels, and helpers for servicers."""

from libs.rpc.access import KeyDirectory, KeyRecord, covers, may_grant, not_found
from libs.rpc.client import channel, dial, retry_unavailable
from libs.rpc.commands import page, page_in_order, parse_filter, snapshot_state, submit
from libs.rpc.directory import AccessDirectory
from libs.rpc.errors import error_of, to_status
from libs.rpc.identity import Principal, caller, read_after_tokens, report_position
from libs.rpc.server import RpcServer, configure_logging, serve, service_runtime

__all__ = [
    "AccessDirectory",
    "KeyDirectory",
    "KeyRecord",
    "Principal",
    "RpcServer",
    "caller",
    "channel",
    "configure_logging",
    "covers",
    "dial",
    "error_of",
    "may_grant",
    "not_found",
    "page",
    "page_in_order",
    "parse_filter",
    "read_after_tokens",
    "report_position",
    "retry_unavailable",
    "serve",
    "service_runtime",
    "snapshot_state",
    "submit",
    "to_status",
]
