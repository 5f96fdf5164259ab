"""Adds a tag to a device without losing what somebody else writes at the same time.

    python examples/careful_update.py organizations/acme/products/thermostat/devices/SN-0042 field-test

The etag of what was read goes back with the change. ETAG_MISMATCH means that somebody was faster: read again, decide
again. A lost connection is no reason to worry: the SDK repeats the command under one request id, and the server answers
a repeat from its log.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from google.protobuf.field_mask_pb2 import FieldMask
from groundswell.registry.v1 import registry_pb2

from clients.sdk import ApiError, Client

TRIES = 5


def add_tag(client: Client, name: str, tag: str) -> registry_pb2.Device:
    """The device with the tag. Raises ApiError when it is refused, or was changed under our hands five times."""
    for attempt in range(TRIES):
        device = client.registry.GetDevice(registry_pb2.GetDeviceRequest(name=name))
        if tag in device.tags:
            return device
        device.tags[:] = sorted({*device.tags, tag})
        try:
            return client.registry.UpdateDevice(
                registry_pb2.UpdateDeviceRequest(device=device, update_mask=FieldMask(paths=["tags"]))
            )
        except ApiError as error:
            if error.reason != "ETAG_MISMATCH" or attempt == TRIES - 1:
                raise
    raise AssertionError("unreachable")


def main(arguments: Sequence[str]) -> int:
    """Print the tags afterwards."""
    with Client.from_profile() as client:
        print(", ".join(add_tag(client, arguments[0], arguments[1]).tags))
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: careful_update.py DEVICE TAG")
    sys.exit(main(sys.argv[1:]))
