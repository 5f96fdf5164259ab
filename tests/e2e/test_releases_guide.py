"""docs/guides/releases.md, command by command."""

from __future__ import annotations

import pytest
from groundswell.registry.v1 import registry_pb2
from groundswell.releases.v1 import releases_pb2

from tests.e2e.guide import Guide
from tests.e2e.stack import Stack
from tests.e2e.tenant import Tenant


@pytest.mark.timeout(600)
def test_the_guide_to_releases_holds(stack: Stack, tenant: Tenant) -> None:
    for version in ("1.0.0", "1.1.0"):
        tenant.bundle(version)
    tenant.client.registry.CreateCohort(
        registry_pb2.CreateCohortRequest(
            parent=tenant.product, cohort_id="beta", cohort=registry_pb2.Cohort(display_name="beta")
        )
    )
    guide = Guide.open("releases.md", stack, tenant)
    said = {" ".join(command): guide.run(command) for command in guide.commands()}

    assert said["swell graph show canary"].splitlines()[1].startswith("1-1-0  open  1.1.0  [< 1.1.0]")
    assert "SN-1: nothing" in said["swell resolve SN-1 SN-2"]
    assert "NOTHING_REPORTED" in said["swell resolve SN-1 SN-2"]
    assert "SN-1: 1-1-0" in said["swell resolve SN-1 --version 1.0.0 --tag lab"]
    supposed = "swell resolve --cohort canary --version 0.9.0 --target board-a --at 2031-05-01T06:00:00Z"
    assert "a device like that: 1-1-0, 1-0-0" in said[supposed]
    assert "to change it: the device reports no release" in said["swell resolve SN-1 --explain"]
    assert "SN-2: fw-1-1-0" in said["swell resolve SN-2"]
    beta = f"{tenant.cohort('beta')}/releases/1-1-0"
    promoted = tenant.client.releases.GetRelease(releases_pb2.GetReleaseRequest(name=beta))
    assert (promoted.version, promoted.HasField("phase")) == ("1.1.0", False)
    graph = tenant.client.releases.GetGraph(releases_pb2.GetGraphRequest(cohort=tenant.cohort("canary")))
    assert [node.release.version for node in graph.nodes] == ["1.1.0"]
    overrides = releases_pb2.ListBundleOverridesRequest(parent=tenant.product)
    assert not tenant.client.releases.ListBundleOverrides(overrides).bundle_overrides
