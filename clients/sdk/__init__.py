"""Thin typed Python client of Groundswell's public gRPC APIs.

Example::

    from clients.sdk import Client
    from groundswell.registry.v1 import registry_pb2

    with Client.from_profile() as client:
        for device in client.pages(
            client.registry.ListDevices,
            registry_pb2.ListDevicesRequest(parent="organizations/acme/products/thermostat"),
            "devices",
        ):
            print(device.name, device.reported.version)

What it does beyond the generated stubs: credentials, a deadline on every call, ``request_id`` on every command so that
a retry is the same command, retries of ``UNAVAILABLE`` with the server's own delay, read-after tokens (what you wrote,
you read, across services), and errors with their stable reason.
"""

from clients.sdk.client import Client
from clients.sdk.errors import ApiError, SdkError
from clients.sdk.profile import Profile, ProfileError

__all__ = ["ApiError", "Client", "Profile", "ProfileError", "SdkError"]
