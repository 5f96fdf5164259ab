"""Schemas: of every type, in every version, true of every body, and nothing that services emit is missing."""

from __future__ import annotations

import ast
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from groundswell.registry.v1 import events_pb2 as registry_events
from groundswell.registry.v1 import registry_pb2
from groundswell.releases.v1 import events_pb2 as releases_events
from groundswell.releases.v1 import releases_pb2
from groundswell.rollout.v1 import events_pb2 as rollout_events
from groundswell.rollout.v1 import rollout_pb2
from jsonschema import Draft202012Validator

from services.webhooks import schema
from services.webhooks.catalogue import EVENT_TYPES, TEST_FIRE, description_of, since
from services.webhooks.render import PAYLOAD_VERSIONS, SOURCES, TYPES, WebhookEvent, render
from services.webhooks.schema import closed, example_text, fire_body, records_of, schema_of, schema_text

ROOT = Path(__file__).parents[3]
GOLDEN = Path(__file__).parent / "golden"
VERSIONS = sorted(PAYLOAD_VERSIONS)
DEVICE = "organizations/acme/products/p/devices/d"


@functools.lru_cache(maxsize=1_000)
def validators(event_type: str, version: int) -> tuple[Draft202012Validator, ...]:
    served = json.loads(schema_text(event_type, version))
    checker = Draft202012Validator.FORMAT_CHECKER
    return tuple(Draft202012Validator(each, format_checker=checker) for each in (served, closed(served)))


def valid(body: bytes | str, event_type: str, version: int) -> None:
    """By the schema as it is served, and with no member that it does not describe."""
    for each in validators(event_type, version):
        each.validate(json.loads(body))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("event_type", sorted(EVENT_TYPES))
def test_every_type_has_a_schema_and_its_example_obeys_it(event_type: str, version: int) -> None:
    Draft202012Validator.check_schema(json.loads(schema_text(event_type, version)))
    valid(example_text(event_type, version), event_type, version)
    assert json.loads(example_text(event_type, version))["type"] == event_type
    assert description_of(event_type)
    assert since(event_type)


@pytest.mark.parametrize("kind", sorted(TYPES))
def test_what_every_public_record_can_hold_obeys_the_schemas_of_its_types(kind: str) -> None:
    payload: Any = TYPES[kind]()
    schema._fill(payload, 4)
    mine = [each for each in EVENT_TYPES if TYPES[kind] in records_of(each) and each != TEST_FIRE]
    assert mine, f"no event type of the catalogue is carried by {kind}: see services/webhooks/catalogue.py"
    for event_type in mine:
        for filled in (payload, TYPES[kind]()):
            filled.change = event_type
            event = WebhookEvent(event_type, "e1", "acme", DEVICE, 1_000, filled)
            for version in VERSIONS:
                valid(render(event, version), event_type, version)


def test_an_enum_value_that_a_later_release_sends_obeys_the_schema() -> None:
    device = registry_pb2.Device(name=DEVICE, state=99)  # type: ignore[arg-type]
    event = WebhookEvent("device.created", "e1", "acme", DEVICE, 1_000, registry_events.DeviceChanged(device=device))
    valid(render(event, 2), "device.created", 2)


@pytest.mark.parametrize("event_type", ["device.polished", "rollout.stage_dreamt", "comet.seen"])
def test_a_type_that_nobody_described_is_rendered_described_and_obeys_a_general_schema(event_type: str) -> None:
    payload = registry_events.DeviceChanged(device=registry_pb2.Device(name=DEVICE), change=event_type)
    if event_type.startswith("rollout."):
        rollout = rollout_events.RolloutChanged(rollout=rollout_pb2.Rollout(name="r"), change=event_type)
        valid(render(WebhookEvent(event_type, "e1", "acme", "r", 1_000, rollout), 2), event_type, 2)
    else:
        valid(render(WebhookEvent(event_type, "e1", "acme", DEVICE, 1_000, payload), 2), event_type, 2)
    assert description_of(event_type).startswith("Something happened to a ")
    assert since(event_type) == ""


def test_a_body_without_its_data_obeys_the_schema_and_a_wrong_one_does_not() -> None:
    releases = [releases_pb2.Release(name=f"r{number}", description="x" * 500) for number in range(200)]
    payload = releases_events.GraphChanged(releases=releases, change="release.created")
    body = render(WebhookEvent("release.created", "e1", "acme", "r", 1_000, payload), 2)
    assert json.loads(body)["data_omitted"] is True
    valid(body, "release.created", 2)
    good = json.loads(example_text("device.created", 2))
    validator = Draft202012Validator(schema_of("device.created", 2))
    for wrong in (
        good | {"type": "device.updated"},
        {key: value for key, value in good.items() if key != "event_id"},
        good | {"data_omitted": True},
        good | {"data": {"device": {"tags": "no list"}}},
    ):
        assert not validator.is_valid(wrong)


def test_a_schema_is_open_for_what_a_later_release_adds() -> None:
    good = json.loads(example_text("device.created", 2))
    good["data"]["device"]["later"] = 1
    assert Draft202012Validator(schema_of("device.created", 2)).is_valid(good)
    assert not Draft202012Validator(closed(schema_of("device.created", 2))).is_valid(good)


def test_no_schema_knows_a_secret() -> None:
    for event_type in EVENT_TYPES:
        assert "secretSha256" not in schema_text(event_type, 2)
        assert "secretSha256" not in example_text(event_type, 2)


# Nothing is missing.


def test_every_type_of_the_catalogue_is_carried_by_a_record() -> None:
    assert [each for each in EVENT_TYPES if not records_of(each) and each != TEST_FIRE] == []


def test_every_public_record_of_the_contracts_is_read() -> None:
    public: set[str] = set()
    for service in SOURCES:
        text = (ROOT / "protos" / "groundswell" / service / "v1" / "events.proto").read_text()
        found = re.findall(r"// Public[:,].*\n(?://.*\n)*message (\w+)", text)
        public.update(f"groundswell.{service}.v1.{name}" for name in found)
    assert len(public) > 15
    assert public == set(TYPES)


def nouns() -> dict[str, list[Any]]:
    """What event types begin with → descriptors of the records that carry them."""
    found: dict[str, list[Any]] = {}
    for event_type in EVENT_TYPES:
        noun = event_type.partition(".")[0]
        found.setdefault(noun, []).extend(kind.DESCRIPTOR for kind in records_of(event_type))
    return found


def is_field(path: str, descriptors: list[Any]) -> bool:
    """Whether it is the path of a field, as errors name them: `device.cohort`."""
    noun, *rest = path.split(".")
    for descriptor in descriptors:
        field = descriptor.fields_by_name.get(noun) or descriptor.fields_by_name.get(f"{noun}s")
        kind = field.message_type if field is not None else None
        for part in rest:
            field = kind.fields_by_name.get(part) if kind is not None else None
            kind = field.message_type if field is not None else None
        if field is not None:
            return True
    return False


def literals(tree: ast.AST) -> Iterator[tuple[str, str, str]]:
    """(text, name of the function that it is given to, keyword) of all strings in a module."""
    inside: dict[ast.AST, tuple[str, str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            inside.update((argument, (name, "")) for argument in node.args)
            inside.update((keyword.value, (name, keyword.arg or "")) for keyword in node.keywords)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield (node.value, *inside.get(node, ("", "")))


def emitted() -> set[str]:
    """Every literal in the code of services that can only be an event type."""
    known = nouns()
    found: set[str] = set()
    for service in SOURCES:
        for path in (ROOT / "services" / service).rglob("*.py"):
            if path.name in {"catalogue.py", "schema.py"}:
                continue
            for text, function, keyword in literals(ast.parse(path.read_text())):
                if not re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", text) or text.partition(".")[0] not in known:
                    continue
                if text.endswith((".pem", ".key", ".json")):
                    continue  # a file
                emits = keyword == "change" or re.search(r"save|emit|publish|event", function)
                refuses = keyword == "field" or re.search(r"invalid|check|clean|require|refuse|Error", function)
                if emits or not (refuses or is_field(text, known[text.partition(".")[0]])):
                    found.add(text)
    return found


def test_the_catalogue_describes_every_type_that_the_code_of_services_emits() -> None:
    found = emitted()
    assert len(found) > 40
    assert {"device.claimed_release", "rollout.halted", "webhook.endpoint.opened", "api_key.created"} <= found
    missing = found - EVENT_TYPES.keys()
    assert not missing, f"describe in services/webhooks/catalogue.py, EVENT_TYPES: {sorted(missing)}"


# Bodies never change.


def samples() -> dict[str, WebhookEvent]:
    device = registry_pb2.Device(
        name=DEVICE, uid="u", tags=["b", "a"], cohort="organizations/acme/products/p/cohorts/canary", quarantined=True
    )
    device.reported.release = "organizations/acme/products/p/cohorts/old/releases/r"
    attempt = rollout_pb2.Attempt(
        name=f"{DEVICE}/attempts/a", device=DEVICE, release="organizations/acme/products/p/cohorts/canary/releases/r-1"
    )
    attempt.grant_time.FromMilliseconds(1_767_225_600_123)
    key = registry_pb2.ApiKey(name="organizations/acme/apiKeys/k", secret_sha256=b"\x01" * 32, scopes=["ä"])
    payloads: dict[str, tuple[str, Any]] = {
        "device.updated": (DEVICE, registry_events.DeviceChanged(device=device, change="device.updated")),
        "device.claimed_release": (
            attempt.name,
            rollout_events.AttemptChanged(attempt=attempt, change="device.claimed_release"),
        ),
        "api_key.created": (key.name, registry_events.ApiKeyChanged(api_key=key, change="api_key.created")),
    }
    return {
        name: WebhookEvent(name, "e1", "acme", resource, 1_767_225_600_123, payload)
        for name, (resource, payload) in payloads.items()
    }


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("event_type", sorted(samples()))
def test_bodies_are_the_bytes_of_the_golden_files(event_type: str, version: int) -> None:
    body = render(samples()[event_type], version)
    assert body == (GOLDEN / f"{event_type}.v{version}.json").read_bytes()
    valid(body, event_type, version)


def test_the_golden_files_are_of_every_version() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == {
        f"{event_type}.v{version}.json" for event_type in samples() for version in VERSIONS
    }


def test_a_test_fire_obeys_its_schema() -> None:
    body = fire_body("organizations/acme/webhookEndpoints/ops", "acme", "e1", 5, "nonce")
    for version in VERSIONS:
        valid(body, TEST_FIRE, version)
