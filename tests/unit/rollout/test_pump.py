"""The pump between Faust and the leader: nothing lost, nothing acknowledged early, nothing dropped in silence."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from groundswell.device.v1 import device_pb2
from groundswell.rollout.v1 import rollout_pb2

from libs.checkins import CheckInSigner, Claim, GatewayKey, Rejected, SequenceGuard, key_id_of
from libs.eventlog import partition_of
from services.rollout.keys import routing_key
from services.rollout.observations import MAX_ITEMS, Backlog, Observed
from services.rollout.worker import pump
from services.rollout.worker.pump import QUIET_S, Delivery, Pump, Tools, _prove

GATEWAY = "organizations/platform/gateways/g1"
TOPIC = "t.device.checkins.v1"
PARTITIONS = 4
PARTITION = partition_of("acme", PARTITIONS)


class Keys:
    def __init__(self) -> None:
        self.known: dict[str, GatewayKey] = {}
        self.seq = 0

    def get(self, gateway: str) -> GatewayKey | None:
        return self.known.get(gateway)

    def reached(self, _gateway: str) -> int:
        return self.seq


class Bench:
    """A pump with everything around it in memory."""

    def __init__(self) -> None:
        self.private = Ed25519PrivateKey.generate()
        self.signer = CheckInSigner(
            self.private, GATEWAY, "00000000-0000-4000-8000-000000000000", TOPIC, registry_seq=5
        )
        self.keys = Keys()
        self.calls: list[rollout_pb2.RecordObservationsRequest] = []
        self.failures = 0
        self.rejected: list[tuple[int, str]] = []
        self.acknowledged: list[int] = []
        self.seen: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.pump = Pump(
            PARTITION, Tools(TOPIC, PARTITIONS, self.keys, SequenceGuard(), self._record, self._reject, self)
        )

    def trust(self) -> None:
        raw = self.private.public_key().public_bytes_raw()
        self.keys.known[GATEWAY] = GatewayKey(GATEWAY, key_id_of(raw), raw)
        self.keys.seq = 5

    async def _record(self, request: rollout_pb2.RecordObservationsRequest) -> rollout_pb2.RecordObservationsResponse:
        await self.gate.wait()
        if self.failures:
            self.failures -= 1
            raise ConnectionError("no leader")
        self.calls.append(request)
        return rollout_pb2.RecordObservationsResponse(through_position=request.through_position)

    async def _reject(self, _partition: int, delivery: Delivery, why: Rejected) -> None:
        self.rejected.append((delivery.position, why.reason))

    async def update(self, _partition: int, records: Sequence[Observed]) -> None:
        self.seen.extend(device for observed in records for device, _ in observed.seen)

    async def deliver(self, position: int, *, idle: bool = False, forged: bool = False) -> None:
        batch = device_pb2.CheckInBatch(gateway=GATEWAY, organization="acme")
        batch.items.add(device="organizations/acme/products/p/devices/d", counter=position, idle=idle)
        value = batch.SerializeToString()
        headers = self.signer.headers(PARTITION, value)
        if forged:
            value += b"\x00"

        def acknowledge() -> None:
            self.acknowledged.append(position)

        await self.pump.put(Delivery(position, 1000 + position, headers, value, acknowledge))

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not condition():  # noqa: ASYNC110 - what it waits for is told by no event
                await asyncio.sleep(0)


@pytest.fixture
async def bench() -> Bench:
    made = Bench()
    made.trust()
    return made


async def test_nothing_is_acknowledged_before_the_leader_has_it(bench: Bench) -> None:
    bench.gate.clear()
    await bench.deliver(1)
    await bench.until(lambda: not bench.pump.idle)
    assert bench.acknowledged == []
    bench.gate.set()
    await bench.until(lambda: bench.acknowledged == [1])
    await bench.pump.stop()


async def test_a_leader_that_is_away_is_asked_again_and_nothing_is_lost(bench: Bench) -> None:
    bench.failures = 3
    await bench.deliver(1)
    await bench.deliver(3)
    await bench.until(lambda: bench.acknowledged == [1, 3])
    assert [record.position for call in bench.calls for record in call.records] == [1, 3]
    await bench.pump.stop()


async def test_when_behind_several_records_go_in_one_call(bench: Bench) -> None:
    bench.gate.clear()
    for position in range(1, 9):
        await bench.deliver(position)
    await bench.until(lambda: bench.pump._judged.qsize() == 7)
    bench.gate.set()
    await bench.until(lambda: len(bench.acknowledged) == 8)
    assert len(bench.calls) == 2
    assert bench.acknowledged == list(range(1, 9))
    await bench.pump.stop()


async def test_idle_items_refresh_last_seen_and_only_move_the_watermark(bench: Bench) -> None:
    await bench.deliver(7, idle=True)
    await bench.until(lambda: bench.acknowledged == [7])
    assert bench.seen == ["organizations/acme/products/p/devices/d"]
    assert [(list(call.records), call.through_position) for call in bench.calls] == [([], 7)]
    await bench.pump.stop()


async def test_quiet_records_are_told_of_together_and_not_held_back_by_silence(bench: Bench) -> None:
    await bench.deliver(1, idle=True)
    await bench.until(lambda: bench.acknowledged == [1])
    for position in range(2, 6):
        await bench.deliver(position, idle=True)
    await bench.until(lambda: bench.acknowledged == [1, 2, 3, 4, 5])
    assert [call.through_position for call in bench.calls] == [1, 5]
    await bench.pump.stop()


async def test_what_is_new_to_the_leader_does_not_wait_as_long_and_takes_quiet_records_along(bench: Bench) -> None:
    loop = asyncio.get_running_loop()
    await bench.deliver(1)
    await bench.until(lambda: bench.acknowledged == [1])
    began = loop.time()
    for position in range(2, 5):
        await bench.deliver(position, idle=position == 2)
    await bench.until(lambda: bench.acknowledged == [1, 2, 3, 4])
    assert loop.time() - began < QUIET_S
    assert [call.through_position for call in bench.calls] == [1, 4]
    assert [record.position for record in bench.calls[1].records] == [3, 4]
    await bench.pump.stop()


async def test_a_full_call_does_not_wait(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.rollout.worker.pump.PACE_S", 3600.0)
    for position in range(1, 2 + MAX_ITEMS):
        await bench.deliver(position)
    await bench.until(lambda: len(bench.calls) == 2)
    assert [len(call.records) for call in bench.calls] == [1, MAX_ITEMS]
    await bench.pump.stop()


async def test_a_forged_record_is_kept_aside_and_holds_nothing_up(bench: Bench) -> None:
    await bench.deliver(1, forged=True)
    await bench.deliver(2)
    await bench.until(lambda: bench.acknowledged == [1, 2])
    assert bench.rejected == [(1, "BAD_SIGNATURE")]
    assert bench.calls[-1].through_position == 2
    await bench.pump.stop()


async def test_a_key_that_is_still_on_its_way_is_waited_for() -> None:
    bench = Bench()
    await bench.deliver(1)
    await asyncio.sleep(0)
    assert bench.rejected == []
    bench.trust()
    await bench.until(lambda: bench.acknowledged == [1])
    assert bench.rejected == []
    await bench.pump.stop()


async def test_a_record_delivered_twice_is_no_replay_and_a_replay_is_rejected(bench: Bench) -> None:
    await bench.deliver(1)
    await bench.until(lambda: bench.acknowledged == [1])
    bench.signer._sequences[PARTITION] = 0
    await bench.deliver(1)
    bench.signer._sequences[PARTITION] = 0
    await bench.deliver(9)
    await bench.until(lambda: bench.acknowledged == [1, 1, 9])
    assert bench.rejected == [(9, "REPLAYED_SEQUENCE")]
    await bench.pump.stop()


def test_a_call_holds_at_most_five_hundred_items() -> None:
    backlog = Backlog(0)
    items = [device_pb2.CheckInItem()] * 300
    for position in (1, 2, 3):
        backlog.waiting.append(Observed(position, rollout_pb2.ObservedRecord(position=position, items=items)))
    request, count = backlog.take()
    assert (count, request.through_position) == (1, 1)
    assert sum(len(record.items) for record in request.records) <= MAX_ITEMS


@pytest.mark.parametrize("partitions", [1, 4, 12])
def test_a_routing_key_of_every_partition_is_no_organizations_name(partitions: int) -> None:
    for partition in range(partitions):
        key = routing_key(partition, partitions)
        assert partition_of(key, partitions) == partition
        assert key.startswith("~")


@pytest.mark.parametrize("alone", [0, 1 << 30], ids=["in a thread", "at once"])
async def test_of_many_checked_in_a_row_each_gets_its_own_verdict(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, alone: int
) -> None:
    threads: set[bool] = set()

    def prove(claims: Sequence[Claim | Rejected]) -> list[bool]:
        threads.add(threading.current_thread() is threading.main_thread())
        return _prove(claims)

    monkeypatch.setattr(pump, "ALONE", alone)
    monkeypatch.setattr(pump, "_prove", prove)
    bench.gate.clear()
    forged = {3, 4, 17, 30}
    for position in range(1, 41):
        await bench.deliver(position, forged=position in forged)
    bench.gate.set()
    await bench.until(lambda: len(bench.acknowledged) == 40)
    assert bench.acknowledged == list(range(1, 41))
    assert bench.rejected == [(position, "BAD_SIGNATURE") for position in sorted(forged)]
    told = [record.position for call in bench.calls for record in call.records]
    assert told == [position for position in range(1, 41) if position not in forged]
    assert threads == {alone > 0}
    await bench.pump.stop()


async def test_stopping_while_signatures_are_checked_acknowledges_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    checking, go_on = threading.Event(), threading.Event()

    def prove(claims: Sequence[Claim | Rejected]) -> list[bool]:
        checking.set()
        go_on.wait(5)
        return _prove(claims)

    monkeypatch.setattr(pump, "ALONE", 0)
    monkeypatch.setattr(pump, "_prove", prove)
    await bench.deliver(1)
    await bench.until(checking.is_set)
    await bench.pump.stop()
    go_on.set()
    assert bench.acknowledged == []
    assert bench.calls == []


async def test_trouble_with_the_keys_is_only_a_delay(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    get, failures = bench.keys.get, iter(range(2))

    def fails_twice(gateway: str) -> GatewayKey | None:
        if next(failures, None) is not None:
            raise RuntimeError("the keys are not there")
        return get(gateway)

    monkeypatch.setattr(bench.keys, "get", fails_twice)
    await bench.deliver(1)
    await bench.deliver(2)
    await bench.until(lambda: bench.acknowledged == [1, 2])
    assert bench.rejected == []
    await bench.pump.stop()
