"""The releases service's gRPC servicers: they translate, and look up what others own."""

from __future__ import annotations

import time
from typing import Any

from groundswell.artifacts.v1 import artifacts_pb2, artifacts_pb2_grpc
from groundswell.registry.v1 import registry_pb2, registry_pb2_grpc
from groundswell.releases.v1 import releases_pb2 as pb
from groundswell.releases.v1 import releases_pb2_grpc

from libs.errors import FailedPreconditionError, InvalidArgumentError
from libs.eventlog import Runtime
from libs.names import organization_of, parent_of, product_of
from libs.rpc import not_found, page, snapshot_state, submit
from services.releases import domain
from services.releases.domain import State


class References:
    """Synchronous look-ups of what releases refer to; the caller's read-after tokens go along."""

    def __init__(
        self,
        registry: registry_pb2_grpc.RegistryInternalServiceAsyncStub,
        artifacts: artifacts_pb2_grpc.ArtifactsInternalServiceAsyncStub,
    ) -> None:
        self._registry = registry
        self._artifacts = artifacts

    async def check_cohort(self, name: str) -> None:
        """Raises NOT_FOUND."""
        await self._registry.LookupCohort(registry_pb2.GetCohortRequest(name=name))

    async def check_product(self, name: str) -> None:
        """Raises NOT_FOUND."""
        await self._registry.LookupProduct(registry_pb2.GetProductRequest(name=name))

    async def offerable_bundle(self, name: str, product: str) -> artifacts_pb2.Bundle:
        """A bundle of the product that may be offered."""
        if product_of(name) != product:
            raise InvalidArgumentError(
                "INVALID_FIELD", f"'{name}' is not a bundle of {product}", field="release.bundle", bundle=name
            )
        bundle: artifacts_pb2.Bundle = await self._artifacts.LookupBundle(artifacts_pb2.GetBundleRequest(name=name))
        if not bundle.offerable:
            why = bundle.not_offerable_reason or "SIGNATURES_MISSING"
            raise FailedPreconditionError(
                "BUNDLE_NOT_OFFERABLE", f"{name} may not be offered: {why}", bundle=name, why=why
            )
        return bundle


class ReleasesServicer(releases_pb2_grpc.ReleasesServiceServicer):
    """Public API. ``ResolveDevices`` is not there yet and answers UNIMPLEMENTED."""

    def __init__(self, runtime: Runtime[State], references: References) -> None:
        self._runtime = runtime
        self._references = references

    async def CreateRelease(self, request: Any, context: Any) -> pb.Release:
        name = f"{request.parent}/releases/{request.release_id}"
        await self._references.check_cohort(request.parent)
        bundle = await self._references.offerable_bundle(request.release.bundle, product_of(request.parent))
        release = pb.Release()
        release.CopyFrom(request.release)
        release.name, release.security_version = name, bundle.security_version
        release.rollout, release.retracted = "", False
        command = domain.CreateRelease(release, request.previous)
        created: pb.Release = await submit(self._runtime, organization_of(name), command, request, context)
        return created

    async def GetRelease(self, request: Any, context: Any) -> pb.Release:
        graph = snapshot_state(self._runtime, request.name).graphs.get(parent_of(request.name))
        found = graph.get(request.name) if graph is not None else None
        if found is None:
            raise not_found(request.name)
        return found

    async def ListReleases(self, request: Any, context: Any) -> pb.ListReleasesResponse:
        graph = snapshot_state(self._runtime, request.parent).graphs.get(request.parent)
        if graph is None:
            await self._references.check_cohort(request.parent)
        found, token = page(graph.items() if graph is not None else (), request)
        return pb.ListReleasesResponse(releases=found, next_page_token=token)

    async def UpdateRelease(self, request: Any, context: Any) -> pb.Release:
        command = domain.UpdateRelease(request.release, tuple(request.update_mask.paths))
        organization = organization_of(request.release.name)
        updated: pb.Release = await submit(self._runtime, organization, command, request, context)
        return updated

    async def DeleteRelease(self, request: Any, context: Any) -> Any:
        command = domain.DeleteRelease(request.name, request.etag, request.force, request.reason)
        return await submit(self._runtime, organization_of(request.name), command, request, context)

    async def CreateBundleOverride(self, request: Any, context: Any) -> pb.BundleOverride:
        await self._references.check_product(request.parent)
        await self._references.offerable_bundle(request.bundle_override.bundle, request.parent)
        override = pb.BundleOverride()
        override.CopyFrom(request.bundle_override)
        override.name = f"{request.parent}/bundleOverrides/{request.bundle_override_id}"
        command = domain.CreateOverride(override)
        organization = organization_of(request.parent)
        created: pb.BundleOverride = await submit(self._runtime, organization, command, request, context)
        return created

    async def GetBundleOverride(self, request: Any, context: Any) -> pb.BundleOverride:
        found = snapshot_state(self._runtime, request.name).overrides.get(request.name)
        if found is None:
            raise not_found(request.name)
        return found

    async def ListBundleOverrides(self, request: Any, context: Any) -> pb.ListBundleOverridesResponse:
        state = snapshot_state(self._runtime, request.parent)
        prefix = f"{request.parent}/bundleOverrides/"
        found, token = page(((n, o) for n, o in state.overrides.items() if n.startswith(prefix)), request)
        return pb.ListBundleOverridesResponse(bundle_overrides=found, next_page_token=token)

    async def DeleteBundleOverride(self, request: Any, context: Any) -> Any:
        command = domain.DeleteOverride(request.name, request.etag)
        return await submit(self._runtime, organization_of(request.name), command, request, context)

    async def ResolveDevices(self, request: Any, context: Any) -> Any:
        raise NotImplementedError


class ReleasesInternalServicer(releases_pb2_grpc.ReleasesInternalServiceServicer):
    """What the rollout service asks."""

    def __init__(self, runtime: Runtime[State], references: References) -> None:
        self._runtime = runtime
        self._references = references

    async def CreateManagedRelease(self, request: Any, context: Any) -> pb.Release:
        release: pb.Release = request.release
        cohort = parent_of(release.name)
        if not release.rollout:
            raise InvalidArgumentError("INVALID_FIELD", "a managed release names its rollout", field="release.rollout")
        await self._references.check_cohort(cohort)
        if request.validate_only:
            await self._references.offerable_bundle(release.bundle, product_of(cohort))
            state = snapshot_state(self._runtime, release.name)
            domain.validate_managed(state, release, time.time_ns() // 1_000_000)
            return release
        command = domain.CreateRelease(release)
        created: pb.Release = await submit(self._runtime, organization_of(release.name), command, request, context)
        return created

    async def RetractRelease(self, request: Any, context: Any) -> pb.Release:
        return await self._set(request, context, "retract")

    async def DisableManagedRelease(self, request: Any, context: Any) -> pb.Release:
        return await self._set(request, context, "disable")

    async def ReleaseManagement(self, request: Any, context: Any) -> pb.Release:
        return await self._set(request, context, "release")

    async def _set(self, request: Any, context: Any, action: str) -> pb.Release:
        command = domain.SetManaged(request.name, request.rollout, action)
        changed: pb.Release = await submit(self._runtime, organization_of(request.name), command, request, context)
        return changed
