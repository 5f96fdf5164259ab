"""Deliveries made again from the log, as decisions. Pure.

A replay is a range of positions of the source logs, filtered as its endpoint is and possibly further. Its deliveries
have the ids and bodies of the first time, are marked, obey the endpoint's rate and breaker, and get three attempts
each. Its progress is in the log, so a new leader goes on; what was under way is repeated under the same id.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from groundswell.webhooks.v1 import events_pb2 as events
from groundswell.webhooks.v1 import webhooks_pb2 as pb

from libs.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
)
from libs.eventlog import Context, Decision, NewEvent
from libs.names import last_segment, parent_of
from services.webhooks.catalogue import check_filters
from services.webhooks.model import (
    MAX_REPLAYS,
    MAX_RUNNING_REPLAYS,
    CancelReplay,
    Endpoint,
    Place,
    RecordReplay,
    ResendOne,
    StartReplay,
    State,
    find,
)

Image = pb.Replay
CANCELLED: Final = "CANCELLED_BY_OPERATOR"


def start(state: State, command: StartReplay, ctx: Context) -> Decision:
    """A range of time, of positions, or both."""
    wanted = command.replay
    endpoint = _ready(state, parent_of(wanted.name))
    both = wanted.HasField("start_time") and wanted.HasField("end_time")
    if both and wanted.start_time.ToNanoseconds() >= wanted.end_time.ToNanoseconds():
        raise InvalidArgumentError("INVALID_FIELD", "end_time must be later than start_time", field="end_time")
    check_filters(wanted.event_types, "event_types")
    name = wanted.name
    if not last_segment(name):
        name = f"{name}{ctx.new_uuid('replay')}"
    if name in endpoint.replays:
        raise AlreadyExistsError("ALREADY_EXISTS", f"{name} exists", resource=name)
    replay = Image(
        name=name,
        state=Image.STATE_RUNNING,
        event_types=sorted(set(wanted.event_types)),
        only_failed=wanted.only_failed,
        ranges=_ranges(wanted, dict(command.ends)),
    )
    if wanted.HasField("start_time"):
        replay.start_time.CopyFrom(wanted.start_time)
    if wanted.HasField("end_time"):
        replay.end_time.CopyFrom(wanted.end_time)
    return _begun(replay, ctx)


def resend(state: State, command: ResendOne, ctx: Context) -> Decision:
    """The delivery is found by its id among those that the log of deliveries still holds."""
    name, _, identifier = command.delivery.partition("/deliveries/")
    endpoint = _ready(state, name)
    found = place_of(endpoint, identifier)
    if found is None:
        raise NotFoundError(
            "RESOURCE_NOT_FOUND",
            f"{command.delivery} is not among the deliveries that are kept: replay a range instead",
            resource=command.delivery,
        )
    (topic, partition), position = found
    only = pb.PositionRange(
        topic=topic, partition=partition, from_position=position, to_position=position + 1, next_position=position
    )
    replay = Image(name=f"{name}/replays/{ctx.new_uuid('replay')}", state=Image.STATE_RUNNING, ranges=[only])
    return _begun(replay, ctx)


def place_of(endpoint: Endpoint, identifier: str) -> tuple[Place, int] | None:
    """Where the event of a delivery is, if that is still known."""
    for place, stream in endpoint.streams.items():
        for each in (*stream.exceptions.values(), *stream.dead.values(), *stream.made):
            if each.webhook_id == identifier:
                return place, each.position
    return None


def _ready(state: State, name: str) -> Endpoint:
    endpoint = find(state, name)
    if not endpoint.active:
        shown = pb.WebhookEndpoint.State.Name(endpoint.image.state)
        raise FailedPreconditionError(
            "WRONG_STATE",
            f"{name} is {shown}: only an active endpoint is sent anything",
            resource=name,
            state=shown,
        )
    running = sum(1 for each in endpoint.replays.values() if each.state == Image.STATE_RUNNING)
    if running >= MAX_RUNNING_REPLAYS:
        raise ResourceExhaustedError(
            "QUOTA_EXCEEDED",
            f"{name} has {running} replays running and may have {MAX_RUNNING_REPLAYS}",
            quota="running_replays",
            limit=MAX_RUNNING_REPLAYS,
        )
    return endpoint


def _ranges(wanted: pb.Replay, ends: dict[Place, int]) -> list[pb.PositionRange]:
    """Positions, never beyond what was there when the replay was asked for."""
    if not wanted.ranges:
        return [
            pb.PositionRange(topic=topic, partition=partition, to_position=end)
            for (topic, partition), end in sorted(ends.items())
            if end > 0
        ]
    found: dict[Place, pb.PositionRange] = {}
    for each in wanted.ranges:
        place = (each.topic, each.partition)
        if place not in ends:
            raise InvalidArgumentError(
                "INVALID_FIELD",
                f"'{each.topic[:200]}' {each.partition} is not a source partition of this organization",
                field="ranges.topic",
                value=each.topic[:200],
            )
        if place in found:
            raise InvalidArgumentError("INVALID_FIELD", f"'{each.topic}' is named twice", field="ranges.topic")
        to = min(each.to_position or ends[place], ends[place])
        if each.from_position >= to:
            raise InvalidArgumentError(
                "INVALID_FIELD",
                f"positions from {each.from_position} to {to} hold nothing: the log ends at {ends[place]}",
                field="ranges.from_position",
            )
        found[place] = pb.PositionRange(
            topic=each.topic,
            partition=each.partition,
            from_position=each.from_position,
            to_position=to,
            next_position=each.from_position,
        )
    return [found[place] for place in sorted(found)]


def _begun(replay: pb.Replay, ctx: Context) -> Decision:
    replay.create_time.FromMilliseconds(ctx.now_ms)
    return Decision(events=(_saved(replay, ctx),), result=replay)


def find_replay(state: State, name: str) -> pb.Replay:
    """The replay of that name. Raises RESOURCE_NOT_FOUND."""
    endpoint = state.endpoints.get(parent_of(name))
    found = None if endpoint is None else endpoint.replays.get(name)
    if found is None:
        raise NotFoundError("RESOURCE_NOT_FOUND", f"{name} does not exist", resource=name)
    return found


def cancel(state: State, command: CancelReplay, ctx: Context) -> Decision:
    """End it where it stands."""
    current = find_replay(state, command.name)
    if current.state != Image.STATE_RUNNING:
        raise FailedPreconditionError(
            "WRONG_STATE",
            f"{command.name} has ended",
            resource=command.name,
            state=Image.State.Name(current.state),
        )
    replay = Image()
    replay.CopyFrom(current)
    replay.state, replay.state_reason = Image.STATE_CANCELLED, CANCELLED
    replay.finish_time.FromMilliseconds(ctx.now_ms)
    return Decision(events=(_saved(replay, ctx),), result=replay)


def record(state: State, command: RecordReplay, ctx: Context) -> Decision:
    """From the sender. One that was cancelled meanwhile stays so."""
    endpoint = state.endpoints.get(parent_of(command.replay.name))
    current = None if endpoint is None else endpoint.replays.get(command.replay.name)
    if current is None or current.state != Image.STATE_RUNNING or current == command.replay:
        return Decision()
    replay = Image()
    replay.CopyFrom(command.replay)
    if replay.state != Image.STATE_RUNNING:
        replay.finish_time.FromMilliseconds(ctx.now_ms)
    return Decision(events=(_saved(replay, ctx),))


def _saved(replay: pb.Replay, ctx: Context) -> NewEvent:
    return NewEvent(ctx.organization, replay.name, events.ReplaySaved(replay=replay))


def evolve_replay(state: State, saved: events.ReplaySaved) -> State:
    """After-images replace; the oldest that ended are forgotten."""
    name = parent_of(saved.replay.name)
    endpoint = state.endpoints.get(name)
    if endpoint is None:
        return state
    kept = endpoint.replays.set(saved.replay.name, saved.replay)
    if len(kept) > MAX_REPLAYS:
        ended = [each for each in kept.values() if each.state != Image.STATE_RUNNING]
        oldest = min(ended, key=lambda each: (each.create_time.ToNanoseconds(), each.name), default=None)
        if oldest is not None:
            kept = kept.delete(oldest.name)
    return replace(state, endpoints=state.endpoints.set(name, replace(endpoint, replays=kept)))
