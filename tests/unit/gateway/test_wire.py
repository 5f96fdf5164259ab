"""What is written by hand reads as what protobuf itself would have written."""

from __future__ import annotations

import pytest
from groundswell.device.v1 import device_pb2

from services.gateway.wire import IDLE, agent_said, tag, varint


@pytest.mark.parametrize("counter", [1, 127, 128, 16_383, 16_384, 2_097_152, 2**31, 2**63 - 1, 2**64 - 1])
@pytest.mark.parametrize("length", [8, 36, 64, 127])
def test_an_agents_fields(counter: int, length: int) -> None:
    expected = device_pb2.CheckInItem(
        instance="a" * length, boot_id="b" * length, counter=counter, body_sha256=bytes(range(32))
    )
    written = agent_said("a" * length, "b" * length, counter, bytes(range(32)))
    assert device_pb2.CheckInItem.FromString(written) == expected
    expected.idle = True
    assert device_pb2.CheckInItem.FromString(written + IDLE) == expected


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16_383, 16_384, 200_000])
def test_items_of_a_batch(size: int) -> None:
    item = device_pb2.CheckInItem(attempt="a" * size)
    said = item.SerializeToString()
    batch = tag(device_pb2.CheckInBatch.ITEMS_FIELD_NUMBER) + varint(len(said)) + said
    assert list(device_pb2.CheckInBatch.FromString(batch).items) == [item]
