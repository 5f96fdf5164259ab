"""What the registry can be asked to do. Messages in a command are the caller's and are never changed."""

from __future__ import annotations

from dataclasses import dataclass

from groundswell.registry.v1 import device_imports_pb2 as imports_pb
from groundswell.registry.v1 import registry_pb2 as pb


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """The platform organization with its member and key; repeating it changes nothing."""

    api_key_id: str
    secret_sha256: bytes


@dataclass(frozen=True, slots=True)
class CreateOrganization:
    """A tenant with its first owner and the owner's key."""

    organization_id: str
    display_name: str
    owner_key_id: str
    owner_key_sha256: bytes


@dataclass(frozen=True, slots=True)
class CreateProduct:
    """A line of devices."""

    parent: str
    product_id: str
    product: pb.Product


@dataclass(frozen=True, slots=True)
class UpdateProduct:
    """New values for the fields that the mask names."""

    product: pb.Product
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CreateCohort:
    """A part of a product's fleet."""

    parent: str
    cohort_id: str
    cohort: pb.Cohort


@dataclass(frozen=True, slots=True)
class CreateDevice:
    """A device made by hand."""

    parent: str
    device_id: str
    device: pb.Device


@dataclass(frozen=True, slots=True)
class UpdateDevice:
    """New values for the fields that the mask names."""

    device: pb.Device
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RetireDevice:
    """Decommission for good."""

    name: str
    etag: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ProvisionDevice:
    """A device for an admitted certificate. Natural key: the certificate's fingerprint."""

    parent: str
    device_id: str
    certificate_fingerprint: str
    provisioned_by: str
    device: pb.Device
    """Cohort, tags, target and description that the CA certificate gives."""
    development: bool


@dataclass(frozen=True, slots=True)
class UndoProvisioning:
    """Retire a device whose admission was refused after all; repeating it changes nothing."""

    name: str
    certificate_fingerprint: str


@dataclass(frozen=True, slots=True)
class CreateMember:
    """Someone with a role."""

    parent: str
    member_id: str
    member: pb.Member


@dataclass(frozen=True, slots=True)
class CreateApiKey:
    """A key whose secret the client made; without a member it is the caller's own."""

    parent: str
    api_key_id: str
    api_key: pb.ApiKey


@dataclass(frozen=True, slots=True)
class RevokeApiKey:
    """Revoke for good; repeating it changes nothing."""

    name: str
    etag: str


@dataclass(frozen=True, slots=True)
class CreateGateway:
    """A gateway of an organization, with its public key."""

    parent: str
    gateway_id: str
    gateway: pb.Gateway


@dataclass(frozen=True, slots=True)
class EnrolGateway:
    """A gateway of the platform registers itself. Natural key: its public key."""

    gateway_id: str
    public_key: bytes


@dataclass(frozen=True, slots=True)
class UpdateOrganization:
    """New values for the fields that the mask names."""

    organization: pb.Organization
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ArchiveProduct:
    """Out of use, or into use again."""

    name: str
    etag: str
    archived: bool


@dataclass(frozen=True, slots=True)
class UpdateCohort:
    """New values for the fields that the mask names."""

    cohort: pb.Cohort
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BatchUpdateDevices:
    """The same change for many devices of a product."""

    request: pb.BatchUpdateDevicesRequest


@dataclass(frozen=True, slots=True)
class UpdateMember:
    """New values for the fields that the mask names."""

    member: pb.Member
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DeleteMember:
    """Out of the organization, with all keys."""

    name: str
    etag: str


@dataclass(frozen=True, slots=True)
class CreateRole:
    """A role of the organization's own."""

    parent: str
    role_id: str
    role: pb.Role


@dataclass(frozen=True, slots=True)
class UpdateRole:
    """New values for the fields that the mask names."""

    role: pb.Role
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DeleteRole:
    """A role that nobody has."""

    name: str
    etag: str


@dataclass(frozen=True, slots=True)
class UpdateApiKey:
    """New values for the fields that the mask names."""

    api_key: pb.ApiKey
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RotateApiKey:
    """A new secret; the old one is taken for a while longer."""

    name: str
    secret_sha256: bytes
    overlap_ms: int | None
    """None means the default."""
    etag: str


@dataclass(frozen=True, slots=True)
class UpdateGateway:
    """New values for the fields that the mask names."""

    gateway: pb.Gateway
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CreateDeviceImport:
    """An import that takes rows."""

    parent: str
    device_import_id: str
    device_import: imports_pb.DeviceImport


@dataclass(frozen=True, slots=True)
class AppendDeviceImportRows:
    """Rows at their index; those that are there already change nothing."""

    name: str
    first_row: int
    rows: tuple[imports_pb.DeviceImportRow, ...]


@dataclass(frozen=True, slots=True)
class ValidateDeviceImport:
    """Judge all rows."""

    name: str
    etag: str


@dataclass(frozen=True, slots=True)
class CommitDeviceImport:
    """Make devices of all rows."""

    name: str
    etag: str
    skip_problems: bool


@dataclass(frozen=True, slots=True)
class CancelDeviceImport:
    """Stop; what was made stays."""

    name: str
    etag: str
    reason: str


@dataclass(frozen=True, slots=True)
class DeleteDeviceImport:
    """Forget an import that has ended."""

    name: str
    etag: str


@dataclass(frozen=True, slots=True)
class AdvanceDeviceImport:
    """The next run of rows, from a task."""

    name: str
