"""`explain device`: one input changes, and with it exactly the reason that speaks of it."""

from __future__ import annotations

import pytest

from demo.steps import DemoError, wait_until
from tests.e2e.device import RawDevice
from tests.e2e.tenant import Tenant

DEVICE = "canary-1"
Blocking = frozenset[tuple[str, str]]


def blocking(tenant: Tenant) -> Blocking:
    """Code and subject of what stands in the device's way, by its last stored check-in."""
    steps = tenant.explain(DEVICE).last_check_in.steps
    return frozenset((step.code, step.subject) for step in steps if step.blocking)


def await_blocking(tenant: Tenant, device: RawDevice, *expected: tuple[str, str]) -> None:
    """The device goes on polling until its receipt says this, and nothing else."""
    seen: list[Blocking] = []

    def polled() -> bool:
        device.check_in()
        seen.append(blocking(tenant))
        return seen[-1] == frozenset(expected)

    try:
        wait_until("the reasons", 20, polled, 0.2)
    except DemoError:
        pytest.fail(f"expected {sorted(expected)}, seen last: {[sorted(one) for one in seen[-3:]]}")


def test_each_input_of_a_device_changes_exactly_its_own_reason(tenant: Tenant) -> None:
    rollout = tenant.start_rollout(tenant.bundle("1.1.0"), cohorts=[("canary", 1)], tags=["blue"])
    tenant.await_rollout(rollout, "its release", lambda now: now.stage_statuses[0].release)
    device = tenant.enrolled(DEVICE)

    untagged = ("TAGS_NOT_MATCHED", rollout)
    await_blocking(tenant, device, untagged)

    tenant.update_device(DEVICE, quarantined=True, quarantine_reason="water damage")
    await_blocking(tenant, device, ("QUARANTINED", tenant.device_name(DEVICE)))
    tenant.update_device(DEVICE, quarantined=False, quarantine_reason="")
    await_blocking(tenant, device, untagged)

    tenant.update_device(DEVICE, cohort=tenant.cohort("main"))
    await_blocking(tenant, device, ("NO_RELEASES", tenant.cohort("main")))
    tenant.update_device(DEVICE, cohort=tenant.cohort("canary"))
    await_blocking(tenant, device, untagged)

    assert not tenant.explain(DEVICE).grants
    tenant.update_device(DEVICE, tags=["made", "blue"])
    await_blocking(tenant, device)
    granted = tenant.explain(DEVICE)
    release = tenant.rollout(rollout).stage_statuses[0].release
    assert [(grant.attempt.rollout, grant.attempt.release) for grant in granted.grants] == [(rollout, release)]
    assert {reason.code for reason in granted.grants[0].reasons} >= {"CANDIDATE"}
    assert granted.grants[0].views, "a grant names the views it was decided on"
