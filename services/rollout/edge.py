"""What a gateway that is not ours asks, over the public port with an API key.

It may do what our own gateway does, for its own organization alone: the gateway named in the call must be an enabled
one of that organization, every device must lie within the parent that the key was authorized on, and an attempt must be
the device's own. What does not is NOT_FOUND for the whole call, before anything is decided. Then the call goes the way
of every other claim; links come back sealed, and the key that seals them never leaves.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

from groundswell.device.v1 import device_pb2
from groundswell.registry.v1 import registry_pb2
from groundswell.rollout.v1 import edge_pb2, edge_pb2_grpc, rollout_pb2

from libs.errors import FailedPreconditionError, InvalidArgumentError
from libs.names import is_within, organization_of, product_of
from libs.rpc import not_found

MAX_ITEM_BYTES: Final = 32 * 1024
MAX_REPORTS: Final = 64
MAX_PAIRS: Final = 32
MAX_TEXT: Final = 512


class Gateways(Protocol):
    """The registry's gateways as this service knows them."""

    async def gateway(self, name: str) -> registry_pb2.Gateway | None:
        """The gateway, or None. Raises UNAVAILABLE when what is known is too old to trust."""


class Leader(Protocol):
    """The rollout leader, as gateways ask it."""

    async def ClaimOffers(  # noqa: N802 - gRPC's name
        self, request: rollout_pb2.ClaimOffersRequest, context: Any
    ) -> rollout_pb2.ClaimOffersResponse: ...

    async def AuthorizeSwitch(  # noqa: N802 - gRPC's name
        self, request: rollout_pb2.AuthorizeSwitchRequest, context: Any
    ) -> rollout_pb2.AuthorizeSwitchResponse: ...


class RolloutEdgeServicer(edge_pb2_grpc.RolloutEdgeServiceServicer):
    """See the proto. Method names are gRPC's."""

    def __init__(self, leader: Leader, gateways: Gateways) -> None:
        self._leader = leader
        self._gateways = gateways

    async def ClaimOffers(  # noqa: N802
        self, request: edge_pb2.EdgeClaimOffersRequest, context: Any
    ) -> edge_pb2.EdgeClaimOffersResponse:
        organization = organization_of(request.parent)
        await self._check_gateway(request.gateway, organization)
        for item in request.items:
            if not is_within(item.device, request.parent) or item.device != _device_name(item.device):
                raise not_found(item.device[:MAX_TEXT])
        for index, item in enumerate(request.items):
            check_item(item.check_in, item.device, f"items[{index}].check_in")
        claims = rollout_pb2.ClaimOffersRequest(organization=organization, gateway=request.gateway, items=request.items)
        answer = await self._leader.ClaimOffers(claims, context)
        return edge_pb2.EdgeClaimOffersResponse(results=answer.results)

    async def AuthorizeSwitch(  # noqa: N802
        self, request: edge_pb2.EdgeAuthorizeSwitchRequest, context: Any
    ) -> rollout_pb2.AuthorizeSwitchResponse:
        organization = organization_of(request.device)
        await self._check_gateway(request.gateway, organization)
        if not request.attempt.startswith(f"{request.device}/attempts/"):
            raise not_found(request.attempt)
        check_item(request.check_in, request.device, "check_in")
        asked = rollout_pb2.AuthorizeSwitchRequest(
            organization=organization, attempt=request.attempt, device=request.device, check_in=request.check_in
        )
        return await self._leader.AuthorizeSwitch(asked, context)

    async def _check_gateway(self, name: str, organization: str) -> None:
        known = await self._gateways.gateway(name) if organization_of(name) == organization else None
        if known is None:
            raise not_found(name)
        if known.disabled:
            raise FailedPreconditionError("GATEWAY_DISABLED", f"{name} is disabled", gateway=name)


def check_item(item: device_pb2.CheckInItem, device: str, field: str) -> None:
    """A check-in of the device, no larger than the device API would take."""
    if item.device != device:
        raise InvalidArgumentError("IDENTITY_MISMATCH", "the check-in is of another device", field=f"{field}.device")
    if item.ByteSize() > MAX_ITEM_BYTES:
        raise InvalidArgumentError("INVALID_FIELD", f"a check-in has at most {MAX_ITEM_BYTES} bytes", field=field)
    if not item.instance or not item.counter or len(item.body_sha256) != 32:
        raise InvalidArgumentError(
            "INVALID_FIELD", "a check-in has an instance, a counter above 0 and a body_sha256 of 32 bytes", field=field
        )
    if len(item.reports) > MAX_REPORTS:
        raise InvalidArgumentError("INVALID_FIELD", f"at most {MAX_REPORTS} reports", field=f"{field}.reports")
    if any(len(report.detail.encode()) > MAX_TEXT or len(report.code) > MAX_TEXT for report in item.reports):
        raise InvalidArgumentError(
            "INVALID_FIELD", f"code and detail have at most {MAX_TEXT} bytes", field=f"{field}.reports"
        )
    if len(item.attributes) > MAX_PAIRS or len(item.metrics) > MAX_PAIRS:
        raise InvalidArgumentError("INVALID_FIELD", f"at most {MAX_PAIRS} attributes and metrics", field=field)


def _device_name(name: str) -> str:
    """The name as it must be spelled, empty when it is no device's."""
    parts = name.split("/")
    well_formed = len(parts) == 6 and parts[0::2] == ["organizations", "products", "devices"] and all(parts)
    return f"{product_of(name)}/devices/{parts[5]}" if well_formed else ""
