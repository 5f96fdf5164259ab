"""gRPC servicers of the registry: requests to commands, state to answers, nothing more."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, TypeVar

from google.protobuf.message import Message
from groundswell.registry.v1 import device_imports_pb2 as imports_pb
from groundswell.registry.v1 import registry_pb2 as pb
from groundswell.registry.v1 import registry_pb2_grpc

from libs.eventlog import Deadline, Runtime
from libs.names import is_within, last_segment, organization_of
from libs.rpc import caller, not_found, page, page_in_order, report_position, snapshot_state, submit
from libs.rpc.access import PLATFORM, KeyRecord
from libs.rpc.directory import check_fresh
from services.registry import domain, views
from services.registry.domain import State, find
from services.registry.domain.rules import invalid
from services.registry.domain.state import Shelves, known_key, shelf

M = TypeVar("M", bound=Message)

CATCH_UP_S: Final = 3.0
"""Longest wait of a replica that does not lead for what it has not read yet."""


class OwnKeys:
    """The registry knows keys from its own state: a `libs.rpc.KeyDirectory`."""

    def __init__(self, runtime: Runtime[State]) -> None:
        self._runtime = runtime

    async def lookup(self, organization: str, name: str) -> KeyRecord | None:
        """The key, or None. A replica that does not lead reads on before it says that there is none."""
        found = self._known(organization, name)
        lag = self._runtime.lag(organization)
        if found is None and lag > 0:
            await self._runtime.catch_up(organization, Deadline.after(CATCH_UP_S))
            return self._known(organization, name)
        check_fresh(lag)
        return found

    def _known(self, organization: str, name: str) -> KeyRecord | None:
        state = self._runtime.snapshot(organization).state
        assert isinstance(state, State)  # noqa: S101 - the runtime was built for this domain
        return known_key(state, name)


def _found(message: M | None, name: str) -> M:
    if message is None:
        raise not_found(name)
    return message


def _items(shelves: Shelves[M], collection: str) -> Iterable[tuple[str, M]]:
    return shelf(shelves, collection).items()


class RegistryServicer(registry_pb2_grpc.RegistryServiceServicer):
    """The public API."""

    def __init__(self, runtime: Runtime[State]) -> None:
        self._runtime = runtime

    def _state(self, name: str) -> State:
        return snapshot_state(self._runtime, name)

    async def _do(self, name: str, command: object, request: Message, context: Any) -> Any:
        return await submit(self._runtime, organization_of(name), command, request, context)

    async def CreateOrganization(self, request: pb.CreateOrganizationRequest, context: Any) -> Any:
        command = domain.CreateOrganization(
            request.organization_id, request.organization.display_name, request.owner_key_id, request.owner_key_sha256
        )
        return await submit(self._runtime, request.organization_id, command, request, context)

    async def GetOrganization(self, request: pb.GetOrganizationRequest, context: Any) -> Any:
        return _found(self._state(request.name).organizations.get(request.name), request.name)

    async def ListOrganizations(self, request: pb.ListOrganizationsRequest, context: Any) -> Any:
        principal = caller()
        everywhere = principal.role == PLATFORM and not principal.resource_prefix
        found: list[tuple[str, pb.Organization]] = []
        for partition in range(self._runtime.config.partitions):
            snapshot = self._runtime.snapshot_of_partition(partition)
            report_position(snapshot.token)
            assert isinstance(snapshot.state, State)  # noqa: S101 - the runtime was built for this domain
            found.extend(
                (name, organization)
                for name, organization in snapshot.state.organizations.items()
                if everywhere
                or (organization_of(name) == principal.organization and is_within(name, principal.resource_prefix))
            )
        organizations, token = page(found, request)
        return pb.ListOrganizationsResponse(organizations=organizations, next_page_token=token)

    async def UpdateOrganization(self, request: pb.UpdateOrganizationRequest, context: Any) -> Any:
        command = domain.UpdateOrganization(request.organization, tuple(request.update_mask.paths))
        return await self._do(request.organization.name, command, request, context)

    async def CreateProduct(self, request: pb.CreateProductRequest, context: Any) -> Any:
        command = domain.CreateProduct(request.parent, request.product_id, request.product)
        return await self._do(request.parent, command, request, context)

    async def GetProduct(self, request: pb.GetProductRequest, context: Any) -> Any:
        return _found(find(self._state(request.name).products, request.name), request.name)

    async def ListProducts(self, request: pb.ListProductsRequest, context: Any) -> Any:
        state = self._state(request.parent)
        _found(state.organizations.get(request.parent), request.parent)
        products, token = page(_items(state.products, f"{request.parent}/products"), request)
        return pb.ListProductsResponse(products=products, next_page_token=token)

    async def UpdateProduct(self, request: pb.UpdateProductRequest, context: Any) -> Any:
        command = domain.UpdateProduct(request.product, tuple(request.update_mask.paths))
        return await self._do(request.product.name, command, request, context)

    async def ArchiveProduct(self, request: pb.ArchiveProductRequest, context: Any) -> Any:
        command = domain.ArchiveProduct(request.name, request.etag, archived=True)
        return await self._do(request.name, command, request, context)

    async def UnarchiveProduct(self, request: pb.UnarchiveProductRequest, context: Any) -> Any:
        command = domain.ArchiveProduct(request.name, request.etag, archived=False)
        return await self._do(request.name, command, request, context)

    async def CreateCohort(self, request: pb.CreateCohortRequest, context: Any) -> Any:
        command = domain.CreateCohort(request.parent, request.cohort_id, request.cohort)
        return await self._do(request.parent, command, request, context)

    async def GetCohort(self, request: pb.GetCohortRequest, context: Any) -> Any:
        return _found(find(self._state(request.name).cohorts, request.name), request.name)

    async def ListCohorts(self, request: pb.ListCohortsRequest, context: Any) -> Any:
        state = self._state(request.parent)
        _found(find(state.products, request.parent), request.parent)
        cohorts, token = page(_items(state.cohorts, f"{request.parent}/cohorts"), request)
        return pb.ListCohortsResponse(cohorts=cohorts, next_page_token=token)

    async def UpdateCohort(self, request: pb.UpdateCohortRequest, context: Any) -> Any:
        command = domain.UpdateCohort(request.cohort, tuple(request.update_mask.paths))
        return await self._do(request.cohort.name, command, request, context)

    async def CreateDevice(self, request: pb.CreateDeviceRequest, context: Any) -> Any:
        command = domain.CreateDevice(request.parent, request.device_id, request.device)
        return await self._do(request.parent, command, request, context)

    async def GetDevice(self, request: pb.GetDeviceRequest, context: Any) -> Any:
        return _found(find(self._state(request.name).devices, request.name), request.name)

    async def ListDevices(self, request: pb.ListDevicesRequest, context: Any) -> Any:
        state = self._state(request.parent)
        _found(find(state.products, request.parent), request.parent)
        devices, token = page_in_order(views.devices(state, request), request)
        return pb.ListDevicesResponse(devices=devices, next_page_token=token)

    async def UpdateDevice(self, request: pb.UpdateDeviceRequest, context: Any) -> Any:
        command = domain.UpdateDevice(request.device, tuple(request.update_mask.paths))
        return await self._do(request.device.name, command, request, context)

    async def BatchUpdateDevices(self, request: pb.BatchUpdateDevicesRequest, context: Any) -> Any:
        return await self._do(request.parent, domain.BatchUpdateDevices(request), request, context)

    async def RetireDevice(self, request: pb.RetireDeviceRequest, context: Any) -> Any:
        return await self._do(
            request.name, domain.RetireDevice(request.name, request.etag, request.reason), request, context
        )

    async def CreateMember(self, request: pb.CreateMemberRequest, context: Any) -> Any:
        command = domain.CreateMember(request.parent, request.member_id, request.member)
        return await self._do(request.parent, command, request, context)

    async def GetMember(self, request: pb.GetMemberRequest, context: Any) -> Any:
        return _found(find(self._state(request.name).members, request.name), request.name)

    async def ListMembers(self, request: pb.ListMembersRequest, context: Any) -> Any:
        members, token = page(_items(self._state(request.parent).members, f"{request.parent}/members"), request)
        return pb.ListMembersResponse(members=members, next_page_token=token)

    async def UpdateMember(self, request: pb.UpdateMemberRequest, context: Any) -> Any:
        command = domain.UpdateMember(request.member, tuple(request.update_mask.paths))
        return await self._do(request.member.name, command, request, context)

    async def DeleteMember(self, request: pb.DeleteMemberRequest, context: Any) -> Any:
        command = domain.DeleteMember(request.name, request.etag)
        return await self._do(request.name, command, request, context)

    async def CreateRole(self, request: pb.CreateRoleRequest, context: Any) -> Any:
        command = domain.CreateRole(request.parent, request.role_id, request.role)
        return await self._do(request.parent, command, request, context)

    async def GetRole(self, request: pb.GetRoleRequest, context: Any) -> Any:
        return _found(find(self._state(request.name).roles, request.name), request.name)

    async def ListRoles(self, request: pb.ListRolesRequest, context: Any) -> Any:
        roles, token = page(_items(self._state(request.parent).roles, f"{request.parent}/roles"), request)
        return pb.ListRolesResponse(roles=roles, next_page_token=token)

    async def UpdateRole(self, request: pb.UpdateRoleRequest, context: Any) -> Any:
        command = domain.UpdateRole(request.role, tuple(request.update_mask.paths))
        return await self._do(request.role.name, command, request, context)

    async def DeleteRole(self, request: pb.DeleteRoleRequest, context: Any) -> Any:
        command = domain.DeleteRole(request.name, request.etag)
        return await self._do(request.name, command, request, context)

    async def CreateApiKey(self, request: pb.CreateApiKeyRequest, context: Any) -> Any:
        command = domain.CreateApiKey(request.parent, request.api_key_id, request.api_key)
        return await self._do(request.parent, command, request, context)

    async def GetApiKey(self, request: pb.GetApiKeyRequest, context: Any) -> Any:
        return _found(find(self._state(request.name).api_keys, request.name), request.name)

    async def ListApiKeys(self, request: pb.ListApiKeysRequest, context: Any) -> Any:
        keys, token = page(_items(self._state(request.parent).api_keys, f"{request.parent}/apiKeys"), request)
        return pb.ListApiKeysResponse(api_keys=keys, next_page_token=token)

    async def UpdateApiKey(self, request: pb.UpdateApiKeyRequest, context: Any) -> Any:
        command = domain.UpdateApiKey(request.api_key, tuple(request.update_mask.paths))
        return await self._do(request.api_key.name, command, request, context)

    async def RotateApiKey(self, request: pb.RotateApiKeyRequest, context: Any) -> Any:
        overlap = request.overlap.ToMilliseconds() if request.HasField("overlap") else None
        command = domain.RotateApiKey(request.name, request.secret_sha256, overlap, request.etag)
        return await self._do(request.name, command, request, context)

    async def RevokeApiKey(self, request: pb.RevokeApiKeyRequest, context: Any) -> Any:
        return await self._do(request.name, domain.RevokeApiKey(request.name, request.etag), request, context)

    async def CreateGateway(self, request: pb.CreateGatewayRequest, context: Any) -> Any:
        command = domain.CreateGateway(request.parent, request.gateway_id, request.gateway)
        return await self._do(request.parent, command, request, context)

    async def GetGateway(self, request: pb.GetGatewayRequest, context: Any) -> Any:
        return _found(find(self._state(request.name).gateways, request.name), request.name)

    async def ListGateways(self, request: pb.ListGatewaysRequest, context: Any) -> Any:
        gateways, token = page(_items(self._state(request.parent).gateways, f"{request.parent}/gateways"), request)
        return pb.ListGatewaysResponse(gateways=gateways, next_page_token=token)

    async def UpdateGateway(self, request: pb.UpdateGatewayRequest, context: Any) -> Any:
        command = domain.UpdateGateway(request.gateway, tuple(request.update_mask.paths))
        return await self._do(request.gateway.name, command, request, context)

    async def CreateDeviceImport(self, request: imports_pb.CreateDeviceImportRequest, context: Any) -> Any:
        command = domain.CreateDeviceImport(request.parent, request.device_import_id, request.device_import)
        return await self._do(request.parent, command, request, context)

    async def GetDeviceImport(self, request: imports_pb.GetDeviceImportRequest, context: Any) -> Any:
        return _found(find(self._state(request.name).imports, request.name), request.name)

    async def ListDeviceImports(self, request: imports_pb.ListDeviceImportsRequest, context: Any) -> Any:
        state = self._state(request.parent)
        _found(find(state.products, request.parent), request.parent)
        found, token = page(_items(state.imports, f"{request.parent}/deviceImports"), request)
        return imports_pb.ListDeviceImportsResponse(device_imports=found, next_page_token=token)

    async def AppendDeviceImportRows(self, request: imports_pb.AppendDeviceImportRowsRequest, context: Any) -> Any:
        command = domain.AppendDeviceImportRows(request.name, request.first_row, tuple(request.rows))
        return await self._do(request.name, command, request, context)

    async def ValidateDeviceImport(self, request: imports_pb.ValidateDeviceImportRequest, context: Any) -> Any:
        command = domain.ValidateDeviceImport(request.name, request.etag)
        return await self._do(request.name, command, request, context)

    async def ListDeviceImportVerdicts(self, request: imports_pb.ListDeviceImportVerdictsRequest, context: Any) -> Any:
        state = self._state(request.parent)
        image = _found(find(state.imports, request.parent), request.parent)
        walk = views.verdicts(state, image, all_rows=request.all_rows)
        verdicts, token = page_in_order(walk, request)
        return imports_pb.ListDeviceImportVerdictsResponse(verdicts=verdicts, next_page_token=token)

    async def CommitDeviceImport(self, request: imports_pb.CommitDeviceImportRequest, context: Any) -> Any:
        command = domain.CommitDeviceImport(request.name, request.etag, request.skip_problems)
        return await self._do(request.name, command, request, context)

    async def CancelDeviceImport(self, request: imports_pb.CancelDeviceImportRequest, context: Any) -> Any:
        command = domain.CancelDeviceImport(request.name, request.etag, request.reason)
        return await self._do(request.name, command, request, context)

    async def DeleteDeviceImport(self, request: imports_pb.DeleteDeviceImportRequest, context: Any) -> Any:
        command = domain.DeleteDeviceImport(request.name, request.etag)
        return await self._do(request.name, command, request, context)


class RegistryInternalServicer(registry_pb2_grpc.RegistryInternalServiceServicer):
    """What other services ask."""

    def __init__(self, runtime: Runtime[State]) -> None:
        self._runtime = runtime

    def _state(self, name: str) -> State:
        return snapshot_state(self._runtime, name)

    async def Bootstrap(self, request: pb.BootstrapRequest, context: Any) -> Any:
        command = domain.Bootstrap(request.api_key_id, request.secret_sha256)
        return await submit(self._runtime, PLATFORM, command, request, context)

    async def ProvisionDevice(self, request: pb.ProvisionDeviceRequest, context: Any) -> Any:
        command = domain.ProvisionDevice(
            request.parent,
            request.device_id,
            request.certificate_fingerprint,
            request.provisioned_by,
            pb.Device(cohort=request.cohort, tags=request.tags, target=request.target, description=request.description),
            request.development,
        )
        return await submit(self._runtime, organization_of(request.parent), command, request, context)

    async def UndoProvisioning(self, request: pb.UndoProvisioningRequest, context: Any) -> Any:
        command = domain.UndoProvisioning(request.name, request.certificate_fingerprint)
        return await submit(self._runtime, organization_of(request.name), command, request, context)

    async def LookupProduct(self, request: pb.GetProductRequest, context: Any) -> Any:
        return _found(find(self._state(request.name).products, request.name), request.name)

    async def LookupCohort(self, request: pb.GetCohortRequest, context: Any) -> Any:
        return _found(find(self._state(request.name).cohorts, request.name), request.name)

    async def LookupDevice(self, request: pb.GetDeviceRequest, context: Any) -> Any:
        return _found(find(self._state(request.name).devices, request.name), request.name)

    async def LookupApiKey(self, request: pb.LookupApiKeyRequest, context: Any) -> Any:
        organization = organization_of(request.name)
        if self._runtime.lag(organization) > 0:
            await self._runtime.catch_up(organization, Deadline.after(CATCH_UP_S))
        state = self._state(request.name)
        key = _found(find(state.api_keys, request.name), request.name)
        member = _found(find(state.members, key.member), key.member)
        return pb.LookupApiKeyResponse(api_key=key, member=member, role=find(state.roles, member.role))

    async def EnrolGateway(self, request: pb.CreateGatewayRequest, context: Any) -> Any:
        if last_segment(request.parent) != PLATFORM:
            raise invalid("parent", f"must be organizations/{PLATFORM}: a gateway enrols with the platform")
        command = domain.EnrolGateway(request.gateway_id, request.gateway.public_key)
        return await submit(self._runtime, PLATFORM, command, request, context)
