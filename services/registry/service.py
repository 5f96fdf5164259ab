"""The registry's gRPC servicers: they translate, nothing more."""

from __future__ import annotations

import hashlib
from typing import Any

from groundswell.registry.v1 import registry_pb2 as pb
from groundswell.registry.v1 import registry_pb2_grpc

from libs.errors import InvalidArgumentError
from libs.eventlog import Runtime
from libs.names import is_within, organization_of, parent_of
from libs.rpc import caller, not_found, page, snapshot_state, submit
from libs.rpc.access import PLATFORM, KeyRecord
from libs.rpc.directory import key_record
from services.registry import domain
from services.registry.domain import State

COLLECTION_OF = {
    "products": "products",
    "cohorts": "cohorts",
    "devices": "devices",
    "members": "members",
    "api_keys": "apiKeys",
    "gateways": "gateways",
}


class OwnKeys:
    """The registry's own :class:`libs.rpc.access.KeyDirectory`: its committed state."""

    def __init__(self, runtime: Runtime[State]) -> None:
        self._runtime = runtime

    async def lookup(self, organization: str, name: str) -> KeyRecord | None:
        """The key with its member's role."""
        state: State = self._runtime.snapshot(organization).state  # type: ignore[assignment]
        key = state.api_keys.get(name)
        return key_record(key, state.members.get(key.member, pb.Member())) if key is not None else None


class RegistryServicer(registry_pb2_grpc.RegistryServiceServicer):
    """Public API."""

    def __init__(self, runtime: Runtime[State]) -> None:
        self._runtime = runtime

    def _get(self, attribute: str, name: str) -> Any:
        found = getattr(snapshot_state(self._runtime, name), attribute).get(name)
        if found is None:
            raise not_found(name)
        return found

    def _list(self, attribute: str, request: Any) -> tuple[list[Any], str]:
        state = snapshot_state(self._runtime, request.parent)
        held = state.products if "/" in request.parent.partition("/")[2] else state.organizations
        if request.parent not in held:
            raise not_found(request.parent)
        prefix = f"{request.parent}/{COLLECTION_OF[attribute]}/"
        visible = caller().resource_prefix
        return page(
            (
                (name, item)
                for name, item in getattr(state, attribute).items()
                if name.startswith(prefix) and (is_within(name, visible) or not visible)
            ),
            request,
        )

    async def _create(self, request: Any, context: Any, collection: str, resource_id: str, resource: Any) -> Any:
        principal = caller()
        name = f"{request.parent}/{collection}/{resource_id}"
        if resource.name and resource.name != name:
            raise InvalidArgumentError("INVALID_FIELD", f"the name will be {name}: leave it empty", field="name")
        command = domain.Create(
            name, resource, principal.role, principal.member, principal.scopes, principal.resource_prefix
        )
        return await submit(self._runtime, organization_of(request.parent), command, request, context)

    async def CreateOrganization(self, request: Any, context: Any) -> pb.Organization:
        command = domain.CreateOrganization(
            request.organization_id,
            request.organization.display_name,
            request.owner_key_id,
            request.owner_key_sha256,
        )
        return await submit(self._runtime, request.organization_id, command, request, context)

    async def GetOrganization(self, request: Any, context: Any) -> pb.Organization:
        return self._get("organizations", request.name)

    async def ListOrganizations(self, request: Any, context: Any) -> pb.ListOrganizationsResponse:
        principal = caller()
        everyone = principal.role == PLATFORM
        items: list[tuple[str, pb.Organization]] = []
        for partition in range(self._runtime.config.partitions):
            state: State = self._runtime.snapshot_of_partition(partition).state  # type: ignore[assignment]
            items.extend(
                (name, organization)
                for name, organization in state.organizations.items()
                if everyone or name == f"organizations/{principal.organization}"
            )
        found, token = page(items, request)
        return pb.ListOrganizationsResponse(organizations=found, next_page_token=token)

    async def CreateProduct(self, request: Any, context: Any) -> pb.Product:
        return await self._create(request, context, "products", request.product_id, request.product)

    async def GetProduct(self, request: Any, context: Any) -> pb.Product:
        return self._get("products", request.name)

    async def ListProducts(self, request: Any, context: Any) -> pb.ListProductsResponse:
        found, token = self._list("products", request)
        return pb.ListProductsResponse(products=found, next_page_token=token)

    async def UpdateProduct(self, request: Any, context: Any) -> pb.Product:
        command = domain.Update(request.product, tuple(request.update_mask.paths))
        return await submit(self._runtime, organization_of(request.product.name), command, request, context)

    async def CreateCohort(self, request: Any, context: Any) -> pb.Cohort:
        return await self._create(request, context, "cohorts", request.cohort_id, request.cohort)

    async def GetCohort(self, request: Any, context: Any) -> pb.Cohort:
        return self._get("cohorts", request.name)

    async def ListCohorts(self, request: Any, context: Any) -> pb.ListCohortsResponse:
        found, token = self._list("cohorts", request)
        return pb.ListCohortsResponse(cohorts=found, next_page_token=token)

    async def CreateDevice(self, request: Any, context: Any) -> pb.Device:
        return await self._create(request, context, "devices", request.device_id, request.device)

    async def GetDevice(self, request: Any, context: Any) -> pb.Device:
        return self._get("devices", request.name)

    async def ListDevices(self, request: Any, context: Any) -> pb.ListDevicesResponse:
        found, token = self._list("devices", request)
        return pb.ListDevicesResponse(devices=found, next_page_token=token)

    async def UpdateDevice(self, request: Any, context: Any) -> pb.Device:
        command = domain.Update(request.device, tuple(request.update_mask.paths))
        return await submit(self._runtime, organization_of(request.device.name), command, request, context)

    async def RetireDevice(self, request: Any, context: Any) -> pb.Device:
        command = domain.RetireDevice(request.name, request.etag, request.reason)
        return await submit(self._runtime, organization_of(request.name), command, request, context)

    async def CreateMember(self, request: Any, context: Any) -> pb.Member:
        return await self._create(request, context, "members", request.member_id, request.member)

    async def GetMember(self, request: Any, context: Any) -> pb.Member:
        return self._get("members", request.name)

    async def ListMembers(self, request: Any, context: Any) -> pb.ListMembersResponse:
        found, token = self._list("members", request)
        return pb.ListMembersResponse(members=found, next_page_token=token)

    async def CreateApiKey(self, request: Any, context: Any) -> pb.ApiKey:
        return await self._create(request, context, "apiKeys", request.api_key_id, request.api_key)

    async def GetApiKey(self, request: Any, context: Any) -> pb.ApiKey:
        return self._get("api_keys", request.name)

    async def ListApiKeys(self, request: Any, context: Any) -> pb.ListApiKeysResponse:
        found, token = self._list("api_keys", request)
        return pb.ListApiKeysResponse(api_keys=found, next_page_token=token)

    async def RevokeApiKey(self, request: Any, context: Any) -> pb.ApiKey:
        command = domain.RevokeApiKey(request.name, request.etag)
        return await submit(self._runtime, organization_of(request.name), command, request, context)

    async def CreateGateway(self, request: Any, context: Any) -> pb.Gateway:
        return await self._create(request, context, "gateways", request.gateway_id, request.gateway)

    async def GetGateway(self, request: Any, context: Any) -> pb.Gateway:
        return self._get("gateways", request.name)

    async def ListGateways(self, request: Any, context: Any) -> pb.ListGatewaysResponse:
        found, token = self._list("gateways", request)
        return pb.ListGatewaysResponse(gateways=found, next_page_token=token)


class RegistryInternalServicer(registry_pb2_grpc.RegistryInternalServiceServicer):
    """What other services ask."""

    def __init__(self, runtime: Runtime[State]) -> None:
        self._runtime = runtime

    def _get(self, attribute: str, name: str) -> Any:
        found = getattr(snapshot_state(self._runtime, name), attribute).get(name)
        if found is None:
            raise not_found(name)
        return found

    async def Bootstrap(self, request: Any, context: Any) -> pb.BootstrapResponse:
        command = domain.Bootstrap(request.api_key_id, request.secret_sha256)
        return await submit(self._runtime, PLATFORM, command, request, context)

    async def ProvisionDevice(self, request: Any, context: Any) -> pb.Device:
        command = domain.ProvisionDevice(request)
        return await submit(self._runtime, organization_of(request.parent), command, request, context)

    async def UndoProvisioning(self, request: Any, context: Any) -> pb.Device:
        command = domain.UndoProvisioning(request)
        return await submit(self._runtime, organization_of(request.name), command, request, context)

    async def LookupProduct(self, request: Any, context: Any) -> pb.Product:
        return self._get("products", request.name)

    async def LookupCohort(self, request: Any, context: Any) -> pb.Cohort:
        return self._get("cohorts", request.name)

    async def LookupDevice(self, request: Any, context: Any) -> pb.Device:
        return self._get("devices", request.name)

    async def LookupApiKey(self, request: Any, context: Any) -> pb.LookupApiKeyResponse:
        key = self._get("api_keys", request.name)
        state = snapshot_state(self._runtime, request.name)
        return pb.LookupApiKeyResponse(api_key=key, member=state.members.get(key.member, pb.Member()))

    async def EnrolGateway(self, request: Any, context: Any) -> pb.Gateway:
        if parent_of(f"{request.parent}/gateways/{request.gateway_id}") != f"organizations/{PLATFORM}":
            raise InvalidArgumentError(
                "INVALID_FIELD", "only gateways of the platform enrol themselves", field="parent", value=request.parent
            )
        key = request.gateway.public_key
        if len(key) != 32:
            raise InvalidArgumentError("INVALID_FIELD", "public_key holds 32 bytes", field="gateway.public_key")
        name = f"{request.parent}/gateways/{request.gateway_id}"
        command = domain.EnrolGateway(name, key, hashlib.sha256(key).hexdigest())
        return await submit(self._runtime, PLATFORM, command, request, context)
