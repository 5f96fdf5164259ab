"""What pki needs of others."""

from __future__ import annotations

from typing import Protocol

from groundswell.registry.v1 import registry_pb2


class RegistryPort(Protocol):
    """The registry. Refusals are ``libs.errors`` with the registry's own reason."""

    async def lookup_product(self, name: str) -> registry_pb2.Product:
        """Raises ``NotFoundError``."""

    async def lookup_cohort(self, name: str) -> registry_pb2.Cohort:
        """Raises ``NotFoundError``."""

    async def provision_device(self, request: registry_pb2.ProvisionDeviceRequest) -> registry_pb2.Device:
        """Idempotent by fingerprint."""

    async def undo_provisioning(self, request: registry_pb2.UndoProvisioningRequest) -> registry_pb2.Device:
        """Idempotent."""
