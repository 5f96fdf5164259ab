"""Pages, filters, errors on the wire, the denied counter, the directory's freshness, names."""

from __future__ import annotations

import logging
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status
from groundswell.registry.v1 import events_pb2, registry_pb2, registry_pb2_grpc

from libs.errors import InvalidArgumentError, UnavailableError
from libs.eventlog import Foreign
from libs.eventlog.follower import ParkedRecord
from libs.eventlog.memory import MemoryLog
from libs.names import organization_of, parent_of, product_of, segment
from libs.rpc.commands import page
from libs.rpc.directory import AccessDirectory
from libs.rpc.errors import InvalidFieldsError, to_status
from libs.rpc.interceptor import DeniedCalls, access_of
from libs.rpc.server import OneLineFormatter
from libs.settings import Settings

PARENT = "organizations/acme/products/pump"


def device(number: int, **fields: Any) -> tuple[str, registry_pb2.Device]:
    name = f"{PARENT}/devices/d{number:02}"
    return name, registry_pb2.Device(name=name, state=registry_pb2.Device.STATE_ACTIVE, **fields)


def listing(**fields: Any) -> registry_pb2.ListDevicesRequest:
    return registry_pb2.ListDevicesRequest(parent=PARENT, **fields)


def test_pages_hold_everything_once_and_end() -> None:
    items = [device(number) for number in reversed(range(7))]
    seen: list[str] = []
    token = ""
    while True:
        found, token = page(items, listing(page_size=3, page_token=token))
        seen += [item.name for item in found]
        if not token:
            break
    assert seen == sorted(name for name, _ in items)


def test_a_page_that_ends_exactly_names_no_next_one() -> None:
    assert page([device(1), device(2)], listing(page_size=2))[1] == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('target = "a"', ["d01"]),
        ("quarantined = true", ["d02"]),
        ("state = ACTIVE", ["d01", "d02", "d03"]),
        ("state = STATE_RETIRED", []),
        ('tags:"x"', ["d01", "d03"]),
        ('tags:"x" AND target = "b c"', ["d03"]),
        ("", ["d01", "d02", "d03"]),
    ],
)
def test_filters_choose(text: str, expected: list[str]) -> None:
    items = [device(1, target="a", tags=["x"]), device(2, quarantined=True), device(3, target="b c", tags=["x", "y"])]
    found, _ = page(items, listing(filter=text))
    assert [item.name.rpartition("/")[2] for item in found] == expected


@pytest.mark.parametrize("text", ["target", "target = ", 'target = "a" OR tags:"x"', "nothing = 1", 'target = "a'])
def test_filters_outside_the_subset_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError) as error:
        page([device(1)], listing(filter=text))
    assert (error.value.reason, error.value.field) == ("INVALID_FIELD", "filter")


@pytest.mark.parametrize("token", ["!", "e", "_w=="])
def test_a_foreign_page_token_is_refused(token: str) -> None:
    with pytest.raises(InvalidArgumentError) as error:
        page([device(1)], listing(page_token=token))
    assert error.value.field == "page_token"


def details(error: Any) -> dict[str, Any]:
    status: Any = to_status(error)
    packed = Status.FromString(dict(status.trailing_metadata)["grpc-status-details-bin"])
    found: dict[str, Any] = {"code": status.code}
    for detail in packed.details:
        for kind in (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo):
            if detail.Is(kind.DESCRIPTOR):
                message = kind()
                detail.Unpack(message)
                found[kind.DESCRIPTOR.name] = message
    return found


def test_field_errors_name_every_field() -> None:
    found = details(InvalidFieldsError([("parent", "is empty"), ("page_size", "is negative")]))
    assert found["code"] is grpc.StatusCode.INVALID_ARGUMENT
    assert (found["ErrorInfo"].reason, found["ErrorInfo"].domain) == ("INVALID_FIELD", "groundswell")
    assert [violation.field for violation in found["BadRequest"].field_violations] == ["parent", "page_size"]


def test_unavailable_says_when_to_come_back() -> None:
    found = details(UnavailableError("NOT_READY", "soon", retry_after_s=1.5))
    assert found["RetryInfo"].retry_delay.ToMilliseconds() == 1500
    assert "BadRequest" not in found


def test_a_method_without_a_rule_has_no_access() -> None:
    assert access_of("/groundswell.registry.v1.RegistryService/Nothing") is None
    rule = access_of("/groundswell.registry.v1.RegistryService/UpdateDevice")
    assert rule is not None
    assert (rule.permission, rule.resource) == ("registry.devices.update", "device.name")


def test_every_method_of_our_services_states_who_may_call_it() -> None:
    for service in registry_pb2.DESCRIPTOR.services_by_name.values():
        for method in service.methods:
            rule = access_of(f"/{service.full_name}/{method.name}")
            assert rule is not None, method.full_name
            assert bool(rule.permission) != bool(rule.callers), method.full_name


def test_a_flood_of_denied_calls_is_counted_and_sampled(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    denied = DeniedCalls(lambda: now)
    with caplog.at_level(logging.WARNING):
        for _ in range(100):
            denied.record("/m", "PERMISSION_MISSING", "k")
        now = 6.0
        denied.record("/m", "PERMISSION_MISSING", "k")
    assert denied.counts["/m", "PERMISSION_MISSING"] == 101
    assert len(caplog.records) == 2


def test_a_log_event_is_one_line() -> None:
    record = logging.LogRecord("n", logging.INFO, "p", 1, "a\nforged %s", ("line\r\n",), None)
    assert "\n" not in OneLineFormatter("%(message)s").format(record)


class NoRegistry:
    async def LookupApiKey(self, *request: Any, **options: Any) -> Any:  # noqa: N802 - the stub's name
        raise AssertionError("a known key needs no question")


def directory() -> AccessDirectory:
    stub: registry_pb2_grpc.RegistryInternalServiceAsyncStub = NoRegistry()  # type: ignore[assignment]
    found = AccessDirectory(MemoryLog(partitions=4), Settings(env="unit"), stub)
    key = registry_pb2.ApiKey(name="organizations/acme/apiKeys/k", member="organizations/acme/members/m")
    member = registry_pb2.Member(name="organizations/acme/members/m", role="viewer")
    for resource, payload in (
        (key.name, events_pb2.ApiKeyChanged(api_key=key)),
        (member.name, events_pb2.MemberChanged(member=member)),
    ):
        found._apply(Foreign("registry", "t", 0, 0, 1, "acme", resource, payload, 0))
    return found


@pytest.mark.parametrize(("lag", "fresh"), [(0.0, True), (5.0, True), (5.1, False)])
async def test_a_stale_view_of_keys_refuses(lag: float, monkeypatch: pytest.MonkeyPatch, *, fresh: bool) -> None:
    known = directory()
    monkeypatch.setattr(known.follower, "lag_s", lambda partition: lag)
    if fresh:
        record = await known.lookup("acme", "organizations/acme/apiKeys/k")
        assert record is not None
        assert record.role == "viewer"
        return
    with pytest.raises(UnavailableError) as error:
        await known.lookup("acme", "organizations/acme/apiKeys/k")
    assert error.value.reason == "ACCESS_VIEW_STALE"


async def test_before_the_view_was_ever_measured_the_registry_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    known = directory()
    monkeypatch.setattr(known.follower, "lag_s", lambda partition: float("inf"))
    asked: list[str] = []

    async def ask(name: str) -> None:
        asked.append(name)

    monkeypatch.setattr(known, "_ask", ask)
    assert await known.lookup("acme", "organizations/acme/apiKeys/k") is None
    assert asked == ["organizations/acme/apiKeys/k"]


@pytest.mark.parametrize("lag", [0.0, 5.1])
async def test_a_gateway_is_known_while_the_view_is_fresh(lag: float, monkeypatch: pytest.MonkeyPatch) -> None:
    known = directory()
    monkeypatch.setattr(known.follower, "lag_s", lambda partition=None: lag)
    image = registry_pb2.Gateway(name="organizations/acme/gateways/edge", disabled=True)
    change = events_pb2.GatewayChanged(gateway=image)
    known._apply(Foreign("registry", "t", 0, 0, 2, "acme", image.name, change, 0))
    if lag:
        with pytest.raises(UnavailableError) as error:
            await known.gateway(image.name)
        assert error.value.reason == "ACCESS_VIEW_STALE"
        return
    assert await known.gateway(image.name) == image
    assert await known.gateway("organizations/acme/gateways/unknown") is None
    known._forget(ParkedRecord("registry", "t", 0, 0, 3, "acme", image.name, "Odd"))
    assert await known.gateway(image.name) is None


def test_names() -> None:
    name = f"{PARENT}/devices/d1"
    assert (organization_of(name), parent_of(name), segment(name, "devices"), product_of(name)) == (
        "acme",
        PARENT,
        "d1",
        PARENT,
    )
    assert (segment(name, "cohorts"), parent_of("organizations/acme")) == ("", "")
    with pytest.raises(InvalidArgumentError):
        organization_of("products/x")


def test_settings_come_from_the_environment_and_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROUNDSWELL_PKI_INTERNAL", "127.0.0.1:1")
    settings = Settings()
    assert settings.address("pki", "internal") == "127.0.0.1:1"
    with pytest.raises(ValueError, match="frozen"):
        settings.env = "other"
