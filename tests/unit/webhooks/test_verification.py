"""Verification of an endpoint: nothing is sent before it, and what counts as a yes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from groundswell.webhooks.v1 import events_pb2 as events
from groundswell.webhooks.v1 import webhooks_pb2 as pb
from standardwebhooks import Webhook

from libs.eventlog import TimerFired
from libs.keystore import MemoryKeyStore
from services.webhooks import verify
from services.webhooks.model import (
    VERIFY,
    VERIFY_STEPS_MS,
    DeleteEndpoint,
    RecordVerification,
    UpdateEndpoint,
    shown,
)
from services.webhooks.signing import Signer
from services.webhooks.transport import Outcome, Target
from services.webhooks.verify import Verifier
from tests.unit.webhooks.support import NAME, PLACE, World, event, pump_of

Image = pb.WebhookEndpoint


@dataclass
class Receiver:
    """Answers as it is told; remembers what it was asked."""

    answer: Outcome = field(default_factory=lambda: Outcome(200))
    repeats: bool = False
    asked: list[tuple[Mapping[str, str], bytes]] = field(default_factory=list)

    async def post(self, target: Target, headers: Mapping[str, str], body: bytes) -> Outcome:
        self.asked.append((headers, body))
        if self.repeats:
            said = json.dumps({"challenge": json.loads(body)["data"]["challenge"]})
            return Outcome(200, body=said.encode())
        return self.answer

    async def options(self, target: Target, headers: Mapping[str, str]) -> Outcome:
        self.asked.append((headers, b""))
        return self.answer


def asked(receiver: Receiver, signer: Signer | None = None) -> Verifier:
    return Verifier(receiver, signer or Signer(MemoryKeyStore()), "groundswell.local", lambda: 1_700_000_000_000)


def image(verification: Image.Verification.ValueType = Image.VERIFICATION_CHALLENGE) -> Image:
    return Image(name=NAME, uid="u", url="https://hooks.example/", verification=verification, secret_generation=1)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"", "CHALLENGE_NOT_REPEATED"),
        (b"ok", "CHALLENGE_NOT_REPEATED"),
        (b"[]", "CHALLENGE_NOT_REPEATED"),
        (b'{"challenge": 7}', "CHALLENGE_NOT_REPEATED"),
        (b'{"challenge": "\xc3\xa4"}', "CHALLENGE_NOT_REPEATED"),
        (b'{"challenge": "guess"}', "CHALLENGE_NOT_REPEATED"),
        (b"\xff", "CHALLENGE_NOT_REPEATED"),
    ],
)
async def test_an_answer_that_does_not_repeat_the_nonce_is_no_proof(body: bytes, problem: str) -> None:
    receiver = Receiver(Outcome(200, body=body))
    assert (await asked(receiver).ask(image())).startswith(problem)


async def test_repeating_the_nonce_is_proof_and_the_question_is_signed() -> None:
    signer = Signer(MemoryKeyStore())
    receiver = Receiver(repeats=True)
    assert await asked(receiver, signer).ask(image()) == ""
    headers, body = receiver.asked[0]
    signed = dict(headers)
    assert json.loads(body)["type"] == "webhook.test_fire"
    oracle = Webhook(signer.keys(NAME, "u").shown_secret)
    with pytest.raises(Exception, match="too old"):
        oracle.verify(body.decode(), signed)  # of 2023: the signature's time is what counts, and it is checked
    assert signed["webhook-signature"] == signer.ring(image()).signature(signed["webhook-id"], 1_700_000_000_000, body)


async def test_a_failing_answer_is_no_proof_in_any_way() -> None:
    for verification in (1, 2, 3):
        receiver = Receiver(Outcome(500, "RESPONSE_STATUS: answered 500", allowed_origin="*"))
        assert await asked(receiver).ask(image(verification)) == "RESPONSE_STATUS: answered 500"  # type: ignore[arg-type]


async def test_a_plain_2xx_is_proof_only_where_the_endpoint_says_so() -> None:
    assert await asked(Receiver(Outcome(204))).ask(image(Image.VERIFICATION_TEST_FIRE)) == ""
    assert await asked(Receiver(Outcome(204))).ask(image()) != ""


@pytest.mark.parametrize(
    ("origin", "good"), [("*", True), ("groundswell.local", True), ("", False), ("other.example", False)]
)
async def test_cloudevents_asks_with_options_and_needs_the_origin(origin: str, good: bool) -> None:
    receiver = Receiver(Outcome(200, allowed_origin=origin))
    problem = await asked(receiver).ask(image(Image.VERIFICATION_CLOUDEVENTS))
    assert (problem == "") is good
    assert receiver.asked == [({"webhook-request-origin": "groundswell.local"}, b"")]


async def test_a_nonce_is_of_one_endpoint_at_one_url() -> None:
    signer = Signer(MemoryKeyStore())
    other = image()
    other.url = "https://hooks.example/other"
    again = image()
    assert signer.nonce(image()) == signer.nonce(again)
    assert signer.nonce(image()) != signer.nonce(other)


async def test_one_endpoint_is_asked_with_pauses_however_many_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "PAUSE_S", 0.05)
    monkeypatch.setattr(verify, "MOST_PACED", 2)
    receiver = Receiver(Outcome(204))
    verifier = asked(receiver)
    began = asyncio.get_running_loop().time()
    await asyncio.gather(*(verifier.test_fire(image()) for _ in range(4)))
    assert asyncio.get_running_loop().time() - began >= 0.14
    others = []
    for number in range(5):
        other = image()
        other.name = f"{NAME}{number}"
        others.append(verifier.test_fire(other))
    await asyncio.gather(*others)
    assert len(receiver.asked) == 9


# In the log.


def test_nothing_is_sent_while_pending_and_what_came_meanwhile_follows() -> None:
    world = World()
    made = world.create_pending()
    pump = pump_of(world)
    assert pump.offer(PLACE, 10, event(10))
    assert pump.take(0) is None
    assert pump.wake_at_ms(0) is None
    world.do(RecordVerification(NAME, made.uid, made.url, ""))
    pump.update(world.endpoint, pump.keys)
    item = pump.take(0)
    assert item is not None
    assert item.position == 10


def test_it_is_asked_a_number_of_times_with_pauses_and_then_by_hand() -> None:
    world = World()
    world.create_pending()
    made = world.endpoint.image
    waits = []
    for attempt in range(len(VERIFY_STEPS_MS)):
        asked = RecordVerification(NAME, made.uid, made.url, f"TIMEOUT: {attempt}", f"task-{attempt}")
        decision = world.do(asked)
        assert decision.close_tasks == (f"task-{attempt}",)
        waits += [timer.at_ms - world.now_ms for timer in decision.set_timers]
        assert shown(world.endpoint).state_reason == f"TIMEOUT: {attempt}"
        for timer in decision.set_timers:
            world.now_ms = timer.at_ms
            opened = world.do(TimerFired(timer.timer_id, timer.kind, timer.payload)).open_tasks
            assert [task.kind for task in opened] == [VERIFY]
    assert waits == list(VERIFY_STEPS_MS[1:])
    assert shown(world.endpoint).etag == made.etag, "a failed attempt is no change of the endpoint"
    result: Any = world.do(RecordVerification(NAME, made.uid, made.url, "")).result
    assert result.state == Image.STATE_ACTIVE
    assert result.HasField("verify_time")


def test_an_answer_about_another_url_endpoint_or_time_counts_for_nothing() -> None:
    world = World()
    made = world.create_pending()
    world.do(UpdateEndpoint(Image(name=NAME, url="https://new.example/"), ("url",)))
    assert not world.do(RecordVerification(NAME, made.uid, made.url, "", "task")).events
    assert not world.do(RecordVerification(NAME, "other", "https://new.example/", "", "task")).events
    assert world.endpoint.image.state == Image.STATE_PENDING
    world.do(DeleteEndpoint(NAME, ""))
    gone = world.do(RecordVerification(NAME, made.uid, made.url, "", "task"))
    assert (gone.events, gone.close_tasks) == ((), ("task",))
    assert not world.do(TimerFired("x", VERIFY, NAME.encode())).open_tasks


def test_another_url_is_another_question_and_deliveries_wait() -> None:
    world = World()
    world.create()
    decision = world.do(UpdateEndpoint(Image(name=NAME, url="https://new.example/"), ("url",)))
    assert world.endpoint.image.state == Image.STATE_PENDING
    assert not world.endpoint.image.HasField("verify_time")
    assert [task.kind for task in decision.open_tasks] == [VERIFY]
    same = world.do(UpdateEndpoint(Image(name=NAME, url="https://new.example/"), ("url",)))
    assert (same.events, same.open_tasks) == ((), ())


def test_enabling_asks_again_only_when_the_url_was_never_verified() -> None:
    world = World()
    world.create()
    off, on = Image(name=NAME, state=Image.STATE_DISABLED), Image(name=NAME, state=Image.STATE_ACTIVE)
    world.do(UpdateEndpoint(off, ("state",)))
    assert not world.do(UpdateEndpoint(on, ("state",))).open_tasks
    assert world.endpoint.active
    world.do(UpdateEndpoint(off, ("state",)))
    world.do(UpdateEndpoint(Image(name=NAME, url="https://new.example/"), ("url",)))
    assert world.endpoint.image.state == Image.STATE_DISABLED
    assert len(world.do(UpdateEndpoint(on, ("state",))).open_tasks) == 1
    assert world.endpoint.image.state == Image.STATE_PENDING


def test_pending_cannot_be_talked_into_active() -> None:
    world = World()
    world.create_pending()
    on = Image(name=NAME, state=Image.STATE_ACTIVE)
    assert not world.do(UpdateEndpoint(on, ("state",))).events
    assert world.endpoint.image.state == Image.STATE_PENDING


def test_an_endpoint_of_before_verification_stays_active() -> None:
    world = World()
    old = Image(name=NAME, uid="u", url="https://hooks.example/", state=Image.STATE_ACTIVE)
    saved = events.WebhookEndpointSaved(webhook_endpoint=old)
    from services.webhooks.endpoints import evolve_saved

    world.state = evolve_saved(world.state, saved)
    pump = pump_of(world)
    pump.offer(PLACE, 10, event(10))
    assert pump.take(0) is not None
