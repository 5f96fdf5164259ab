"""What receivers see: signatures that other people's code verifies, ids and bodies that never change."""

from __future__ import annotations

import base64
import json
import re
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from google.protobuf.message import Message
from groundswell.eventlog.v1 import eventlog_pb2
from groundswell.registry.v1 import events_pb2 as registry_events
from groundswell.registry.v1 import registry_pb2
from groundswell.releases.v1 import events_pb2 as releases_events
from groundswell.releases.v1 import releases_pb2
from standardwebhooks import Webhook, WebhookVerificationError

from libs.errors import InvalidArgumentError
from libs.eventlog.ports import Record
from libs.keystore import MemoryKeyStore
from services.webhooks.catalogue import EVENT_TYPES, TEST_FIRE, check_filters, matches
from services.webhooks.render import MAX_BODY, SOURCES, read_event, render
from services.webhooks.signing import Signer, webhook_id

NAME = "organizations/acme/webhookEndpoints/ops"


def record(payload: Message, *, type_name: str = "", event_id: str = "e1") -> Record:
    envelope = eventlog_pb2.Envelope(
        event_id=event_id, organization="acme", resource="organizations/acme/x", occurred_at_ms=1_767_225_600_123
    )
    name = type_name or payload.DESCRIPTOR.full_name
    headers = (("envelope", envelope.SerializeToString()), ("event-type", name.encode()))
    return Record("t", 0, 5, 0, b"acme", payload.SerializeToString(), headers)


def test_a_receiver_with_the_standard_library_verifies_and_notices_an_edit() -> None:
    keys = Signer(MemoryKeyStore()).keys(NAME, "uid")
    now = int(datetime.now(UTC).timestamp())
    body = b'{"type":"rollout.halted"}'
    headers = {
        "webhook-id": "msg_1",
        "webhook-timestamp": str(now),
        "webhook-signature": keys.signature("msg_1", now, body),
    }
    assert Webhook(keys.shown_secret).verify(body.decode(), headers) == {"type": "rollout.halted"}
    with pytest.raises(WebhookVerificationError):
        Webhook(keys.shown_secret).verify('{"type":"rollout.paused"}', headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(keys.shown_secret).verify(body.decode(), headers | {"webhook-id": "msg_2"})


def test_the_asymmetric_signature_verifies_with_the_public_key_alone() -> None:
    keys = Signer(MemoryKeyStore()).keys(NAME, "uid")
    asymmetric = keys.signature("msg_1", 7, b"{}").split()[1].removeprefix("v1a,")
    public = Ed25519PublicKey.from_public_bytes(base64.b64decode(keys.public_key.removeprefix("whpk_")))
    public.verify(base64.b64decode(asymmetric), b"msg_1.7.{}")
    with pytest.raises(InvalidSignature):
        public.verify(base64.b64decode(asymmetric), b"msg_1.8.{}")


def test_keys_are_the_same_again_and_no_two_endpoints_share_them() -> None:
    store = MemoryKeyStore()
    first, again = Signer(store).keys(NAME, "uid-1"), Signer(store).keys(NAME, "uid-1")
    assert (first.shown_secret, first.public_key) == (again.shown_secret, again.public_key)
    others = [Signer(store).keys(NAME, "uid-2"), Signer(store).keys(NAME + "2", "uid-1")]
    assert first.shown_secret not in [other.shown_secret for other in others]
    assert first.public_key not in [other.public_key for other in others]
    assert len(base64.b64decode(first.shown_secret.removeprefix("whsec_"))) == 32
    assert first.shown_secret not in repr(first)


def test_an_id_depends_on_endpoint_and_event_and_holds_no_dot() -> None:
    ids = {webhook_id("uid-1", "e1"), webhook_id("uid-1", "e2"), webhook_id("uid-2", "e1")}
    assert len(ids) == 3
    assert webhook_id("uid-1", "e1") in ids
    assert all(each.startswith("msg_") and "." not in each for each in ids)


def test_a_body_is_the_same_bytes_whenever_it_is_rendered() -> None:
    device = registry_pb2.Device(name="organizations/acme/products/p/devices/d", tags=["b", "a"], uid="u")
    source = record(registry_events.DeviceChanged(device=device, change="device.created"))
    event = read_event(source)
    assert event is not None
    body = render(event)
    assert body == (
        b'{"data":{"device":{"name":"organizations/acme/products/p/devices/d","tags":["b","a"],"uid":"u"}},'
        b'"event_id":"e1","organization":"acme","resource":"organizations/acme/x",'
        b'"timestamp":"2026-01-01T00:00:00.123Z","type":"device.created"}'
    )
    again = read_event(source)
    assert again is not None
    assert render(again) == body


def test_the_hash_of_an_api_secret_is_left_out() -> None:
    key = registry_pb2.ApiKey(name="organizations/acme/apiKeys/k", secret_sha256=b"\x01" * 32)
    event = read_event(record(registry_events.ApiKeyChanged(api_key=key, change="api_key.created")))
    assert event is not None
    assert json.loads(render(event))["data"] == {"apiKey": {"name": "organizations/acme/apiKeys/k"}}


def test_an_event_too_large_is_sent_without_its_data() -> None:
    releases = [releases_pb2.Release(name=f"r{number}", description="x" * 500) for number in range(200)]
    event = read_event(record(releases_events.GraphChanged(releases=releases, change="release.created")))
    assert event is not None
    document = json.loads(render(event))
    assert len(render(event)) < MAX_BODY
    assert document["data_omitted"] is True
    assert document["type"] == "release.created"


def test_records_that_are_not_understood_give_nothing() -> None:
    payload = registry_events.DeviceChanged(change="device.created")
    assert read_event(record(payload, type_name="groundswell.later.v9.Unknown")) is None
    assert read_event(record(payload)._replace(headers=())) is None
    assert read_event(record(payload)._replace(value=b"\xff\xff\xff")) is None


@pytest.mark.parametrize(
    ("filters", "event_type", "delivered"),
    [
        ((), "rollout.halted", True),
        ((), "", False),
        ((), "webhook.endpoint.created", False),
        (("webhook.*",), "webhook.endpoint.created", True),
        (("webhook.*",), "webhook.test_fire", False),
        (("rollout.halted",), "rollout.halted", True),
        (("rollout.halted",), "rollout.halted_again", False),
        (("rollout.*",), "rollout.halted", True),
        (("rollout.*",), "rollouts.halted", False),
        (("device.*", "rollout.paused"), "rollout.halted", False),
    ],
)
def test_filters(filters: tuple[str, ...], event_type: str, delivered: bool) -> None:
    assert matches(filters, event_type) is delivered


@pytest.mark.parametrize(
    "text", ["*", "", "rollout.", "Rollout.*", "rollout.*.x", "rollout.haltd", "webhook.test_fire", "a b"]
)
def test_filters_that_could_never_match_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="event_types"):
        check_filters([text])


def test_every_type_of_the_catalogue_can_be_asked_for() -> None:
    check_filters(["device.*", "rollout.*"])
    for name in EVENT_TYPES.keys() - {TEST_FIRE}:
        check_filters([name])


def test_the_catalogue_names_every_type_that_the_contracts_name() -> None:
    protos = Path(__file__).parents[3] / "protos" / "groundswell"
    named: set[str] = set()
    for service in SOURCES:
        text = (protos / service / "v1" / "events.proto").read_text()
        for comment in re.findall(r"((?:  //[^\n]*\n)+)  string change = \d+;", text):
            if "Webhook event type" in comment:
                named.update(re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)`", comment))
    assert len(named) > 30
    assert named - EVENT_TYPES.keys() == set()
