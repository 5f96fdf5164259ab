"""A check-in record is good in one place, once, from one gateway, for the organizations it may speak for."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from groundswell.device.v1 import device_pb2

from libs.checkins import (
    MAX_BYTES,
    MAX_ITEMS,
    CheckInSigner,
    GatewayKey,
    Rejected,
    SequenceGuard,
    VerifiedBatch,
    key_id_of,
    verify,
)
from libs.eventlog.config import partition_of

TOPIC = "t.device.checkins.v1"
PARTITIONS = 4
PLATFORM = "organizations/platform/gateways/edge"
OWN = "organizations/acme/gateways/own"
PROCESS = "0b6e7a52-3f0c-4d19-9a53-5f2f0c1f7d01"
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
HOME = partition_of("acme", PARTITIONS)
ELSEWHERE = next(name for name in ("beta", "gamma", "delta", "omega") if partition_of(name, PARTITIONS) != HOME)

Headers = list[tuple[str, bytes]]


@dataclass
class Keys:
    known: dict[str, GatewayKey] = field(default_factory=dict)
    seq: int = 10

    def get(self, gateway: str) -> GatewayKey | None:
        return self.known.get(gateway)

    def reached(self, gateway: str) -> int:
        return self.seq


def keys_of(*gateways: str, disabled: bool = False) -> Keys:
    public = KEY.public_key().public_bytes_raw()
    return Keys({name: GatewayKey(name, key_id_of(public), public, disabled) for name in gateways})


ALL = keys_of(PLATFORM, OWN)


def signer(gateway: str = PLATFORM, registry_seq: int = 3) -> CheckInSigner:
    return CheckInSigner(KEY, gateway, PROCESS, TOPIC, registry_seq)


def batch(gateway: str = PLATFORM, organization: str = "acme", items: int = 1) -> device_pb2.CheckInBatch:
    device = f"organizations/{organization}/products/p/devices/d"
    return device_pb2.CheckInBatch(
        gateway=gateway,
        organization=organization,
        items=[device_pb2.CheckInItem(device=device, counter=index) for index in range(items)],
    )


def judge(
    message: device_pb2.CheckInBatch, partition: int = HOME, keys: Keys = ALL, gateway: str = PLATFORM
) -> VerifiedBatch | Rejected:
    value = message.SerializeToString()
    headers = signer(gateway).headers(partition, value)
    return verify(headers, value, TOPIC, partition, keys, partitions=PARTITIONS)


def reason(result: VerifiedBatch | Rejected) -> str:
    assert isinstance(result, Rejected), result
    return result.reason


def test_a_signed_record_is_verified() -> None:
    result = judge(batch())
    assert isinstance(result, VerifiedBatch)
    assert (result.gateway, result.process, result.sequence, result.partition) == (PLATFORM, PROCESS, 1, HOME)
    assert (result.organization, result.heartbeat) == ("acme", False)
    assert list(result.items) == list(batch().items)


def test_an_item_may_be_written_in_parts() -> None:
    """Protobuf reads messages one after the other as one; the gateway puts items together that way."""
    device = "organizations/acme/products/p/devices/d"
    views = [device_pb2.ViewPosition(service="registry", public_seq=5)]
    parts = (
        device_pb2.CheckInItem(
            device=device, counter=1, receipt=device_pb2.Receipt(steps=[device_pb2.Reason(code="A")])
        ),
        device_pb2.CheckInItem(receipt=device_pb2.Receipt(views=views), idle=True),
        device_pb2.CheckInItem(receipt=device_pb2.Receipt(answer="none")),
    )
    item = b"".join(part.SerializeToString() for part in parts)
    head = device_pb2.CheckInBatch(gateway=PLATFORM, organization="acme").SerializeToString()
    value = head + b"\x1a" + bytes((len(item),)) + item
    result = verify(signer().headers(HOME, value), value, TOPIC, HOME, ALL, partitions=PARTITIONS)
    assert isinstance(result, VerifiedBatch)
    ((name, receipt),) = result.seen
    assert name == device
    assert device_pb2.Receipt.FromString(receipt) == device_pb2.Receipt(
        steps=[device_pb2.Reason(code="A")], views=views, answer="none"
    )
    assert not result.items, "idle, whatever part says so"


def test_what_matters_is_handed_on_without_its_receipt() -> None:
    message = batch(items=2)
    for item in message.items:
        item.receipt.answer = "none"
    message.items[1].idle = True
    result = judge(message)
    assert isinstance(result, VerifiedBatch)
    assert [receipt for _, receipt in result.seen] == [device_pb2.Receipt(answer="none").SerializeToString()] * 2
    assert list(result.items) == [batch().items[0]]


def test_an_organizations_own_gateway_speaks_for_it() -> None:
    assert isinstance(judge(batch(OWN), gateway=OWN), VerifiedBatch)


def tampered(name: str, content: bytes) -> str:
    value = batch().SerializeToString()
    headers = [(key, content if key == name else old) for key, old in signer().headers(HOME, value)]
    return reason(verify(headers, value, TOPIC, HOME, ALL, partitions=PARTITIONS))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("gateway", OWN.encode(), "BAD_SIGNATURE"),
        ("gateway", b"organizations/acme/gateways/other", "UNKNOWN_GATEWAY_KEY"),
        ("gateway", b"organizations/acme", "MALFORMED"),
        ("gateway", PLATFORM.encode() + b"\0", "MALFORMED"),
        ("key-id", b"0" * 64, "UNKNOWN_GATEWAY_KEY"),
        ("key-id", b"A" * 64, "MALFORMED"),
        ("process", b"0b6e7a52-3f0c-4d19-9a53-5f2f0c1f7d02", "BAD_SIGNATURE"),
        ("process", b"x", "MALFORMED"),
        ("sequence", b"2", "BAD_SIGNATURE"),
        ("sequence", b"01", "MALFORMED"),
        ("sequence", b"-1", "MALFORMED"),
        ("sequence", b"9999999999999999999", "MALFORMED"),
        ("registry-seq", b"", "MALFORMED"),
        ("registry-seq", "٣".encode(), "MALFORMED"),
        ("signature", b"\0" * 64, "BAD_SIGNATURE"),
        ("signature", b"short", "BAD_SIGNATURE"),
    ],
)
def test_a_changed_header_is_noticed(name: str, content: bytes, expected: str) -> None:
    assert tampered(name, content) == expected


def test_topic_partition_and_value_are_signed() -> None:
    value = batch().SerializeToString()
    headers = signer().headers(HOME, value)
    other = (HOME + 1) % PARTITIONS
    assert reason(verify(headers, value, "u.device.checkins.v1", HOME, ALL, partitions=PARTITIONS)) == "BAD_SIGNATURE"
    assert reason(verify(headers, value, TOPIC, other, ALL, partitions=PARTITIONS)) == "BAD_SIGNATURE"
    changed = batch(items=2).SerializeToString()
    assert reason(verify(headers, changed, TOPIC, HOME, ALL, partitions=PARTITIONS)) == "BAD_SIGNATURE"


@pytest.mark.parametrize("name", ["gateway", "key-id", "process", "sequence", "registry-seq", "signature"])
def test_a_missing_or_doubled_header_is_malformed(name: str) -> None:
    value = batch().SerializeToString()
    headers = signer().headers(HOME, value)
    without = [header for header in headers if header[0] != name]
    doubled = headers + [header for header in headers if header[0] == name]
    for changed in (without, doubled):
        assert reason(verify(changed, value, TOPIC, HOME, ALL, partitions=PARTITIONS)) == "MALFORMED"


def test_headers_of_others_do_no_harm() -> None:
    value = batch().SerializeToString()
    headers = [("traceparent", b"x"), *signer().headers(HOME, value)]
    assert isinstance(verify(headers, value, TOPIC, HOME, ALL, partitions=PARTITIONS), VerifiedBatch)


def test_a_key_that_may_still_come_is_waited_for_and_then_refused() -> None:
    value = batch().SerializeToString()
    headers = signer(registry_seq=11).headers(HOME, value)
    early = verify(headers, value, TOPIC, HOME, Keys(seq=10), partitions=PARTITIONS)
    assert isinstance(early, Rejected)
    assert (early.reason, early.wait) == ("KEY_NOT_YET_KNOWN", True)
    late = verify(headers, value, TOPIC, HOME, Keys(seq=11), partitions=PARTITIONS)
    assert isinstance(late, Rejected)
    assert (late.reason, late.wait) == ("UNKNOWN_GATEWAY_KEY", False)


def test_a_disabled_gateway_is_refused() -> None:
    assert reason(judge(batch(), keys=keys_of(PLATFORM, disabled=True))) == "KEY_DISABLED"


def test_a_gateway_speaks_for_its_organization_alone() -> None:
    foreign = batch(OWN, ELSEWHERE)
    assert reason(judge(foreign, partition_of(ELSEWHERE, PARTITIONS), gateway=OWN)) == "ORGANIZATION_MISMATCH"


def test_an_item_of_another_organization_is_refused() -> None:
    mixed = batch()
    mixed.items.add(device="organizations/acme-two/products/p/devices/d")
    assert reason(judge(mixed)) == "ORGANIZATION_MISMATCH"


def test_a_batch_in_the_wrong_partition_is_refused() -> None:
    assert reason(judge(batch(), (HOME + 1) % PARTITIONS)) == "PARTITION_MISMATCH"


def test_the_signed_header_and_the_batch_name_the_same_gateway() -> None:
    assert reason(judge(batch(OWN))) == "GATEWAY_MISMATCH"


def test_limits_on_items_and_bytes() -> None:
    assert isinstance(judge(batch(items=MAX_ITEMS)), VerifiedBatch)
    assert reason(judge(batch(items=MAX_ITEMS + 1))) == "BATCH_TOO_LARGE"
    large = batch()
    large.items[0].attempt = "a" * MAX_BYTES
    assert reason(judge(large)) == "BATCH_TOO_LARGE"


def test_heartbeats() -> None:
    beat = device_pb2.CheckInBatch(gateway=PLATFORM, heartbeat=True)
    for partition in range(PARTITIONS):
        assert isinstance(judge(beat, partition), VerifiedBatch)
    own = device_pb2.CheckInBatch(gateway=OWN, heartbeat=True)
    assert isinstance(judge(own, HOME, gateway=OWN), VerifiedBatch)
    assert reason(judge(own, (HOME + 1) % PARTITIONS, gateway=OWN)) == "PARTITION_MISMATCH"
    loaded = batch()
    loaded.heartbeat = True
    assert reason(judge(loaded)) == "MALFORMED"
    assert reason(judge(device_pb2.CheckInBatch(gateway=PLATFORM))) == "MALFORMED"


def test_bytes_that_are_no_batch_are_malformed_even_when_signed() -> None:
    value = b"\xff\xff"
    headers = signer().headers(HOME, value)
    assert reason(verify(headers, value, TOPIC, HOME, ALL, partitions=PARTITIONS)) == "MALFORMED"


def verified(sequence: int, process: str = PROCESS, partition: int = 0) -> VerifiedBatch:
    return VerifiedBatch(PLATFORM, process, sequence, partition)


def test_a_replayed_sequence_is_rejected_and_a_redelivered_record_is_not() -> None:
    guard = SequenceGuard()
    assert guard.judge(verified(1), 100) == verified(1)
    assert guard.judge(verified(2), 101) == verified(2)
    assert guard.judge(verified(2), 101) == verified(2)
    assert guard.judge(verified(1), 100) == verified(1)
    assert reason(guard.judge(verified(2), 102)) == "REPLAYED_SEQUENCE"
    assert reason(guard.judge(verified(1), 103)) == "REPLAYED_SEQUENCE"
    assert guard.judge(verified(3), 104) == verified(3)


def test_sequences_are_by_process_and_partition() -> None:
    guard = SequenceGuard()
    assert guard.judge(verified(5), 1) == verified(5)
    other = PROCESS.replace("0b", "0c")
    assert guard.judge(verified(1, other), 2) == verified(1, other)
    assert guard.judge(verified(1, partition=1), 0) == verified(1, partition=1)


def test_a_guard_goes_on_where_another_ended_and_stays_small() -> None:
    guard = SequenceGuard()
    guard.judge(verified(7), 1)
    successor = SequenceGuard(guard.last)
    assert reason(successor.judge(verified(7), 2)) == "REPLAYED_SEQUENCE"
    for index in range(200):
        successor.judge(verified(1, f"process-{index}"), 10 + index)
    assert len(successor.last) == 64


def test_sequences_grow_by_partition() -> None:
    mine = signer()
    taken = [dict(mine.headers(partition, b""))["sequence"] for partition in (0, 0, 1, 0)]
    assert taken == [b"1", b"2", b"1", b"3"]


def test_a_signer_refuses_names_that_could_not_be_verified() -> None:
    with pytest.raises(ValueError, match="resource name"):
        CheckInSigner(KEY, "gateway", PROCESS, TOPIC)
