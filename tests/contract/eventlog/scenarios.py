"""Stories that must hold on every log, kept apart from their tests so that mutants can be put through them too."""

from __future__ import annotations

import asyncio

from groundswell.eventlog.v1 import eventlog_pb2 as pb

from libs.errors import UnavailableError
from libs.eventlog.codec import read_envelope
from tests.contract.eventlog.support import (
    HOME,
    Gate,
    Replica,
    Taker,
    World,
    eventually,
    soon,
)


class ViolationError(AssertionError):
    """An invariant of the log was broken."""


async def check_one_writer_between_claims(world: World, service: str = "registry") -> None:
    """Between two claims only one leader's writes."""
    leader = ""
    for record in await world.records(service):
        envelope, _, kind = read_envelope(record)
        if kind == pb.LeaderClaimed.DESCRIPTOR.full_name:
            leader = envelope.origin
        elif envelope.origin != leader:
            raise ViolationError(f"{envelope.origin} wrote at {record.position}, which {leader} had claimed")


async def zombie_wakes_up(world: World, *, held_at: str) -> None:
    """The old leader is held at a step of its transaction while a new one claims and writes; then it goes on."""
    old = await world.start()
    await old.lead()
    await old.put("a", "before")
    new = await world.start()
    gate = Gate(held_at)
    old.log.hooks.append(gate)
    zombie = asyncio.create_task(old.put("a", "zombie"))
    await gate.arrived.wait()
    # With the mutant that does not fence, the zombie's open transaction keeps the new leader from reading its claim.
    new.log.election.assign(HOME)
    await new.runtime.wait_leading(soon(), [HOME])
    await new.put("a", "after")
    gate.opened.set()
    outcome = (await asyncio.gather(zombie, return_exceptions=True))[0]
    await check_one_writer_between_claims(world)
    if not isinstance(outcome, UnavailableError) or outcome.reason != "OUTCOME_UNKNOWN":
        raise ViolationError(f"the zombie answered {outcome!r}")
    if new.values()["a"] != "after":
        raise ViolationError("the new leader's value was lost")


async def answers_wait_for_the_tail(world: World) -> None:
    """Whoever was answered can read what was written, however slow the tail is."""
    replica = await world.start()
    await replica.lead()
    await replica.put("warm", "up")
    tail = Gate("fetched registry")
    replica.log.hooks.append(tail)
    putting = asyncio.create_task(replica.put("a", "1"))
    await tail.arrived.wait()
    # The record is committed and fetched, but not applied. A good runtime is silent now.
    answered, _ = await asyncio.wait({putting}, timeout=0.2)
    if answered:
        committed = putting.result()
        view = replica.runtime.snapshot("acme")
        if view.token.position < committed.token.position or "a" not in replica.values():
            raise ViolationError("an answer was given before the view held it")
    tail.opened.set()
    committed = await putting
    if replica.runtime.snapshot("acme").token.position < committed.token.position:
        raise ViolationError("the view is behind the answer")


async def inbox_takes_each_record_once(world: World) -> None:
    """Across a change of leader, each foreign record causes its event once."""
    source = await world.start()
    await source.lead()
    first = await world.start(Taker())
    await first.lead()
    for number in range(5):
        await source.put(f"r{number}", "x")
    await eventually(lambda: len(first.values()) == 5)
    second = await world.start(Taker())
    first.retire()
    await second.lead()
    for number in range(5, 7):
        last = await source.put(f"r{number}", "x")
    await second.runtime.wait_for([last.token], soon())
    await eventually(lambda: len(second.values()) == 7)
    taken = [resource for kind, _, resource, _ in await world.events("pki") if kind == "StringValue"]
    if sorted(taken) != sorted(f"r{number}" for number in range(7)):
        raise ViolationError(f"taken in: {taken}")


async def hand_over(old: Replica, new: Replica) -> None:
    """An orderly change of leader."""
    old.retire()
    await new.lead()
