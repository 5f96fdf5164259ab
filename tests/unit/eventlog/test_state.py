"""The fold: what it refuses, and how long it remembers requests."""

from __future__ import annotations

import random
import uuid

import pytest
from google.protobuf.wrappers_pb2 import BoolValue, Int64Value, StringValue
from groundswell.eventlog.v1 import eventlog_pb2 as pb

from libs.errors import FailedPreconditionError, InvalidArgumentError
from libs.eventlog import Decision, Event, NewEvent, Public
from libs.eventlog.codec import CorruptLogError, decode_result, read_envelope
from libs.eventlog.ports import NewRecord, Record
from libs.eventlog.replica import HaltedError, Replica
from libs.eventlog.state import (
    HOUR_MS,
    ID_KEPT_MS,
    RESULT_KEPT_MS,
    FoldDifferenceError,
    PartitionState,
    RequestEntry,
    RequestTable,
    Schema,
    recall,
)
from libs.eventlog.working import InternalError, Origin, Working, Writer, uuid_of
from tests.contract.eventlog.support import HOME, PARTITIONS, KeyValue, State

ORIGIN = Origin("acme", "someone")
SCHEMA: Schema[State] = Schema.of(KeyValue(), "unit", PARTITIONS)


def writer(epoch: int = 1) -> Writer:
    return Writer("here", epoch, HOME, "unit.registry.events.v1", "unit.registry.public.v1", 1000)


def read_back(record: NewRecord, position: int) -> Record:
    return Record(record.topic, record.partition, position, 5, record.key, record.value, tuple(record.headers))


def claim(epoch: int, partitions: int = PARTITIONS) -> Record:
    envelope = pb.Envelope(event_id=f"claim-{epoch}", epoch=epoch, origin="here")
    value = pb.LeaderClaimed(epoch=epoch, node="n", address="here", partition_count=partitions)
    headers = (
        ("envelope", envelope.SerializeToString()),
        ("event-type", pb.LeaderClaimed.DESCRIPTOR.full_name.encode()),
    )
    return Record("unit.registry.events.v1", HOME, epoch * 1000, 5, b"", value.SerializeToString(), headers)


def claimed(epoch: int = 1) -> PartitionState[State]:
    state = PartitionState(SCHEMA, HOME)
    state.apply(claim(epoch))
    return state


def put(*names: str, organization: str = "acme") -> Decision:
    return Decision(
        tuple(NewEvent(organization, name, StringValue(value="v"), (Public(name, StringValue()),)) for name in names)
    )


def private(working: Working[State], start: int = 1001) -> list[Record]:
    found = [record for record in working.records if "events" in record.topic]
    return [read_back(record, start + index) for index, record in enumerate(found)]


def test_a_batch_read_back_gives_the_working_state() -> None:
    state = claimed()
    working = Working(SCHEMA, state, writer(), 1000)
    working.take(put("a", "a", "b"), ORIGIN)
    for record in private(working):
        state.apply(record)
    state.publish_versions()
    assert state.domain == working.domain
    assert dict(state.versions) == {"a": 2, "b": 1}
    assert state.public_seq == 3
    assert state.log_id == "claim-1"


def test_public_records_are_numbered_and_name_their_log() -> None:
    working = Working(SCHEMA, claimed(), writer(), 1000)
    working.take(put("a", "b"), ORIGIN)
    published = [record for record in working.records if "public" in record.topic]
    assert [read_envelope(read_back(record, 1))[0].public_seq for record in published] == [1, 2]
    assert dict(published[0].headers)["log-id"] == b"claim-1"


@pytest.mark.parametrize("lost", [0, 1])
def test_a_missing_record_is_corruption(lost: int) -> None:
    state = claimed()
    working = Working(SCHEMA, state, writer(), 1000)
    working.take(put("a", "a", "a"), ORIGIN)
    records = private(working)
    del records[lost]
    follower: Replica[State] = Replica(SCHEMA, "registry", HOME)
    follower.state = state
    follower.feed(records)
    assert "chain" in follower.halted


def test_a_changed_record_breaks_the_chain() -> None:
    state = claimed()
    working = Working(SCHEMA, state, writer(), 1000)
    working.take(put("a", "b"), ORIGIN)
    first, second = private(working)
    state.apply(first._replace(value=StringValue(value="forged").SerializeToString()))
    with pytest.raises(CorruptLogError, match="chain"):
        state.apply(second)


def test_a_version_gap_is_corruption() -> None:
    state = claimed()
    ahead = Working(SCHEMA, state, writer(), 1000)
    ahead.take(put("a"), ORIGIN)
    later = Working(SCHEMA, state, writer(), 1000, ahead)
    later.take(put("a", organization="acme"), ORIGIN)
    (record,) = private(later)
    state.heads["acme"] = read_envelope(record)[0].prev_hash
    with pytest.raises(CorruptLogError, match="version"):
        state.apply(record)


def test_records_of_another_epoch_are_corruption() -> None:
    state = claimed(1)
    working = Working(SCHEMA, state, writer(1), 1000)
    working.take(put("a"), ORIGIN)
    state.apply(claim(2))
    with pytest.raises(CorruptLogError, match="epoch"):
        state.apply(private(working, 2001)[0])


def test_an_unknown_type_on_the_own_log_is_corruption() -> None:
    state = claimed()
    working = Working(SCHEMA, state, writer(), 1000)
    working.take(put("a"), ORIGIN)
    (record,) = private(working)
    strange = record._replace(headers=(record.headers[0], ("event-type", b"a.b.C")))
    with pytest.raises(CorruptLogError, match="does not know"):
        state.apply(strange)


def test_another_partition_count_is_corruption() -> None:
    with pytest.raises(CorruptLogError, match="partitions"):
        PartitionState(SCHEMA, HOME).apply(claim(1, partitions=8))


async def test_a_replica_halts_with_its_last_good_state() -> None:
    replica: Replica[State] = Replica(SCHEMA, "registry", HOME)
    replica.feed([claim(1)])
    working = Working(SCHEMA, replica.state, writer(), 1000)
    working.take(put("a", "b"), ORIGIN)
    good, bad = private(working)
    waiting = replica.watch("never")
    replica.feed([good, bad._replace(headers=())])
    assert replica.halted
    assert dict(replica.state.versions) == {"a": 1}
    with pytest.raises(HaltedError):
        await waiting
    with pytest.raises(HaltedError):
        replica.check()


def test_a_batch_sees_the_one_before_it() -> None:
    state = claimed()
    first = Working(SCHEMA, state, writer(), 1000)
    first.take(put("a"), ORIGIN)
    first.finish()
    second = Working(SCHEMA, state, writer(), 900, first)
    assert second.version("a") == 1
    assert second.now_ms == 1000
    second.take(put("a"), ORIGIN)
    for record in private(first) + private(second, 1010):
        state.apply(record)
    state.publish_versions()
    assert dict(state.versions) == {"a": 2}


@pytest.mark.parametrize(
    "decision",
    [
        put("a", "x" * 10, organization="another partition's"),
        Decision((NewEvent("acme", "a", BoolValue(value=True)),)),
        Decision((NewEvent("acme", "a", StringValue(value="x" * 2000)),)),
        Decision((NewEvent("acme", "a", StringValue(value="v"), (Public("a", StringValue(value="x" * 2000)),)),)),
    ],
)
def test_impossible_decisions_leave_no_trace(decision: Decision) -> None:
    working = Working(SCHEMA, claimed(), writer(), 1000)
    both = Decision(put("before").events + decision.events)
    with pytest.raises(InternalError):
        working.take(both, ORIGIN)
    assert working.records == []
    assert working.version("before") == 0
    assert working.domain == SCHEMA.domain.initial_state(HOME)


def test_an_answer_too_large_to_be_remembered_is_refused() -> None:
    working = Working(SCHEMA, claimed(), writer(), 1000)
    decision = Decision(put("a").events, StringValue(value="x" * 2000))
    with pytest.raises(InternalError, match="RECORD_TOO_LARGE"):
        working.take(decision, Origin("acme", "key", "r1"))
    assert working.records == []
    working.take(decision, ORIGIN)  # without a request id the answer is not stored


def test_the_answer_is_remembered_under_the_commands_organization() -> None:
    state = claimed()
    working = Working(SCHEMA, state, writer(), 1000)
    asker = Origin("acme", "key", "r1", b"digest")
    foreign = next(name for name in (f"o{number}" for number in range(99)) if _same_partition(name))
    working.take(Decision(put("a", organization=foreign).events, Int64Value(value=7)), asker)
    for record in private(working):
        state.apply(record)
    entry = state.requests.get(("acme", "key", "r1"))
    assert entry is not None
    assert decode_result(entry.result_type, entry.result) == Int64Value(value=7)


def _same_partition(name: str) -> bool:
    from libs.eventlog import partition_of

    return partition_of(name, PARTITIONS) == HOME


def entry(at_ms: int) -> RequestEntry:
    return RequestEntry(b"d", at_ms, "google.protobuf.StringValue", b"")


def test_request_ages() -> None:
    assert recall(None, b"d", 0) is None
    assert recall(entry(0), b"d", RESULT_KEPT_MS - 1) is not None
    with pytest.raises(FailedPreconditionError, match="REQUEST_ID_EXPIRED"):
        recall(entry(0), b"d", RESULT_KEPT_MS)
    with pytest.raises(InvalidArgumentError, match="REQUEST_ID_REUSED"):
        recall(entry(0), b"other", RESULT_KEPT_MS)
    assert recall(entry(0), b"d", ID_KEPT_MS) is None


def test_the_request_table_forgets_results_then_ids() -> None:
    table = RequestTable()
    table.put(("o", "p", "old"), entry(0))
    table.put(("o", "p", "day"), entry(25 * HOUR_MS))
    old = table.get(("o", "p", "old"))
    assert old is not None
    assert old.result_type == ""
    table.put(("o", "p", "later"), entry(73 * HOUR_MS))
    assert table.get(("o", "p", "old")) is None
    assert table.get(("o", "p", "day")) is not None
    assert len(table) == 2


def test_an_id_used_again_after_its_time_is_kept() -> None:
    table = RequestTable()
    key = ("o", "p", "id")
    table.put(key, entry(0))
    table.put(key, entry(72 * HOUR_MS))
    table.put(("o", "p", "x"), entry(80 * HOUR_MS))
    assert table.get(key) == entry(72 * HOUR_MS)


class Counting(KeyValue):
    """Counts its folds; `drift` makes them depend on more than state and event."""

    def __init__(self, *, drift: bool = False) -> None:
        self.folds = 0
        self._drift = drift

    def evolve(self, state: State, event: Event) -> State:
        self.folds += 1
        return super().evolve(state.set("drift", str(self.folds)) if self._drift else state, event)


def foreseen(domain: KeyValue, *, verify: bool = False) -> tuple[PartitionState[State], Working[State], list[Record]]:
    """A leader's state that foresees a batch, and the batch as the log gives it back."""
    schema: Schema[State] = Schema.of(domain, "unit", PARTITIONS, verify=verify)
    state = PartitionState(schema, HOME)
    state.apply(claim(1))
    working = Working(schema, state, writer(), 1000)
    working.take(put("a", "a", "b"), ORIGIN)
    state.foresee(working.foreseen)
    return state, working, private(working)


def test_what_a_leader_has_folded_is_not_folded_again() -> None:
    domain = Counting()
    state, working, records = foreseen(domain)
    before = domain.folds
    for record in records:
        state.apply(record)
    state.publish_versions()
    assert domain.folds == before
    assert state.domain is working.domain
    assert (dict(state.versions), state.heads["acme"]) == ({"a": 2, "b": 1}, working._head("acme"))


@pytest.mark.parametrize("differs", ["value", "envelope", "missing"])
def test_what_the_log_holds_is_followed_whatever_was_foreseen(differs: str) -> None:
    domain = Counting()
    state, _, records = foreseen(domain)
    before = domain.folds
    other = Working(Schema.of(domain, "unit", PARTITIONS), state, writer(), 2000)  # another time: another envelope
    other.take(put("a"), ORIGIN)
    (late,) = private(other)
    before = domain.folds
    match differs:
        case "value":
            state.apply(records[0]._replace(value=StringValue(value="forged").SerializeToString()))
            assert state.domain["a"] == "forged"
        case "envelope":
            state.apply(late)
        case "missing":
            state.apply(claim(2)._replace(position=1500))  # the batch was aborted, and somebody else claimed
            again = Working(Schema.of(domain, "unit", PARTITIONS), state, writer(2), 1000)
            again.take(put("a"), ORIGIN)
            before = domain.folds
            (record,) = private(again, 2000)
            state.apply(record)
    assert domain.folds == before + 1


def test_verifying_finds_a_fold_that_is_no_function_of_state_and_event() -> None:
    state, working, records = foreseen(Counting(), verify=True)
    for record in records:
        state.apply(record)
    assert state.domain is working.domain
    state, _, records = foreseen(Counting(drift=True), verify=True)
    with pytest.raises(FoldDifferenceError, match="StringValue"):
        state.apply(records[0])


def test_a_decision_that_has_folded_is_taken_as_it_is() -> None:
    domain = Counting()
    working = Working(Schema.of(domain, "unit", PARTITIONS), claimed(), writer(), 1000)
    decision = put("a", "b")
    states = (State({"a": "v"}), State({"a": "v", "b": "v"}))
    working.take(decision.replace(folded=states), ORIGIN)
    assert (domain.folds, working.domain) == (0, states[-1])
    assert [(it.before, it.after) for it in working.foreseen] == [(State(), states[0]), (states[0], states[1])]
    with pytest.raises(InternalError, match="1 states for 2 events"):
        working.take(decision.replace(folded=states[:1]), ORIGIN)


def test_uuids_are_those_of_the_library() -> None:
    rng = random.Random(1)
    for _ in range(500):
        digest = rng.randbytes(32)
        assert uuid_of(digest) == str(uuid.UUID(bytes=digest[:16], version=4))
