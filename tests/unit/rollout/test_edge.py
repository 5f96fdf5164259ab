"""What a gateway that is not ours may ask: its own organization's devices, and nothing else reaches the leader."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any

import pytest
from groundswell.device.v1 import device_pb2
from groundswell.registry.v1 import registry_pb2
from groundswell.rollout.v1 import edge_pb2, rollout_pb2

from libs.errors import DomainError
from services.rollout.edge import MAX_ITEM_BYTES, MAX_REPORTS, RolloutEdgeServicer

PRODUCT = "organizations/acme/products/pump"
DEVICE = f"{PRODUCT}/devices/SN-1"
GATEWAY = "organizations/acme/gateways/edge"


@dataclass
class Recorder:
    """Remembers what reached the leader."""

    asked: list[Any] = field(default_factory=list)

    async def ClaimOffers(self, request: Any, _context: Any) -> rollout_pb2.ClaimOffersResponse:  # noqa: N802
        self.asked.append(request)
        results = [rollout_pb2.ClaimResult(live_attempt=item.device) for item in request.items]
        return rollout_pb2.ClaimOffersResponse(results=results)

    async def AuthorizeSwitch(self, request: Any, _context: Any) -> rollout_pb2.AuthorizeSwitchResponse:  # noqa: N802
        self.asked.append(request)
        return rollout_pb2.AuthorizeSwitchResponse(valid_for_s=7)


class Known:
    """The registry's gateways."""

    def __init__(self) -> None:
        names = (GATEWAY, "organizations/acme/gateways/off", "organizations/other/gateways/edge")
        self.held = {name: registry_pb2.Gateway(name=name, disabled=name.endswith("off")) for name in names}

    async def gateway(self, name: str) -> registry_pb2.Gateway | None:
        return self.held.get(name)


class Edge:
    def __init__(self) -> None:
        self.leader = Recorder()
        self.servicer = RolloutEdgeServicer(self.leader, Known())

    def claim(self, *items: rollout_pb2.ClaimItem, parent: str = PRODUCT, gateway: str = GATEWAY) -> Awaitable[Any]:
        request = edge_pb2.EdgeClaimOffersRequest(parent=parent, gateway=gateway, items=items)
        return self.servicer.ClaimOffers(request, None)

    def go(self, **changes: Any) -> Awaitable[Any]:
        asked = {"gateway": GATEWAY, "device": DEVICE, "attempt": f"{DEVICE}/attempts/1", "check_in": said(DEVICE)}
        return self.servicer.AuthorizeSwitch(edge_pb2.EdgeAuthorizeSwitchRequest(**asked | changes), None)

    async def refused(self, call: Awaitable[Any]) -> str:
        with pytest.raises(DomainError) as refused:
            await call
        assert self.leader.asked == []
        return refused.value.reason


@pytest.fixture
def edge() -> Edge:
    return Edge()


def said(device: str, **fields: Any) -> device_pb2.CheckInItem:
    given: dict[str, Any] = {"device": device, "instance": "i", "counter": 1, "body_sha256": bytes(32)}
    return device_pb2.CheckInItem(**given | fields)


def item(device: str = DEVICE, **fields: Any) -> rollout_pb2.ClaimItem:
    return rollout_pb2.ClaimItem(device=device, check_in=said(device, **fields))


@pytest.mark.parametrize("parent", ["organizations/acme", PRODUCT])
async def test_claims_go_to_the_leader_in_their_order(edge: Edge, parent: str) -> None:
    answer = await edge.claim(item(), item(f"{PRODUCT}/devices/SN-2"), parent=parent)
    assert [result.live_attempt for result in answer.results] == [DEVICE, f"{PRODUCT}/devices/SN-2"]
    (asked,) = edge.leader.asked
    assert (asked.organization, asked.gateway, len(asked.items)) == ("acme", GATEWAY, 2)


@pytest.mark.parametrize(
    "device",
    [
        "organizations/other/products/pump/devices/SN-1",
        "organizations/acme/products/valve/devices/SN-1",
        "organizations/acme/products/pumps/devices/SN-1",
        f"{PRODUCT}/cohorts/beta",
        f"{PRODUCT}/devices/SN-1/attempts/1",
        PRODUCT,
        "",
    ],
)
async def test_one_device_outside_of_the_parent_hides_the_whole_call(edge: Edge, device: str) -> None:
    assert await edge.refused(edge.claim(item(), item(device))) == "RESOURCE_NOT_FOUND"


@pytest.mark.parametrize(
    ("gateway", "reason"),
    [
        ("organizations/other/gateways/edge", "RESOURCE_NOT_FOUND"),
        ("organizations/platform/gateways/edge", "RESOURCE_NOT_FOUND"),
        ("organizations/acme/gateways/unknown", "RESOURCE_NOT_FOUND"),
        ("organizations/acme/gateways/off", "GATEWAY_DISABLED"),
    ],
)
async def test_only_an_enabled_gateway_of_the_organization_asks(edge: Edge, gateway: str, reason: str) -> None:
    assert await edge.refused(edge.claim(item(), gateway=gateway)) == reason
    assert await edge.refused(edge.go(gateway=gateway)) == reason


REPORT = device_pb2.Report(counter=1, attempt="a")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"device": f"{PRODUCT}/devices/SN-2"}, "IDENTITY_MISMATCH"),
        ({"instance": ""}, "INVALID_FIELD"),
        ({"counter": 0}, "INVALID_FIELD"),
        ({"body_sha256": b"x"}, "INVALID_FIELD"),
        ({"reports": [REPORT] * (MAX_REPORTS + 1)}, "INVALID_FIELD"),
        ({"reports": [device_pb2.Report(detail="ä" * 257)]}, "INVALID_FIELD"),
        ({"reports": [device_pb2.Report(code="X" * 513)]}, "INVALID_FIELD"),
        ({"attributes": {str(index): "" for index in range(33)}}, "INVALID_FIELD"),
        ({"metrics": {str(index): 1.0 for index in range(33)}}, "INVALID_FIELD"),
        ({"boot_id": "x" * MAX_ITEM_BYTES}, "INVALID_FIELD"),
    ],
)
async def test_a_check_in_that_no_device_could_send_is_refused(edge: Edge, fields: Any, reason: str) -> None:
    check_in = said(**{"device": DEVICE} | fields)
    assert await edge.refused(edge.claim(rollout_pb2.ClaimItem(device=DEVICE, check_in=check_in))) == reason
    assert await edge.refused(edge.go(check_in=check_in)) == reason


async def test_leave_to_switch_is_asked_for_an_attempt_of_the_device(edge: Edge) -> None:
    assert (await edge.go()).valid_for_s == 7
    (asked,) = edge.leader.asked
    assert (asked.organization, asked.device, asked.check_in.device) == ("acme", DEVICE, DEVICE)


@pytest.mark.parametrize(
    "attempt", [f"{DEVICE}0/attempts/1", "organizations/other/products/pump/devices/SN-1/attempts/1", DEVICE, "x"]
)
async def test_an_attempt_of_another_device_does_not_exist(edge: Edge, attempt: str) -> None:
    assert await edge.refused(edge.go(attempt=attempt)) == "RESOURCE_NOT_FOUND"
