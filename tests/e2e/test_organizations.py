"""Two organizations side by side, on one partition: what happens in one is nowhere in the other's log."""

from __future__ import annotations

from collections.abc import Callable

from demo import checker
from tests.e2e import logs
from tests.e2e.stack import Stack
from tests.e2e.tenant import Tenant


def test_a_rollout_in_one_organization_leaves_the_others_log_untouched(
    stack: Stack, new_tenant: Callable[..., Tenant]
) -> None:
    busy = new_tenant()
    quiet = new_tenant(beside=busy)
    before = logs.read(stack)

    bundle = busy.bundle("1.1.0")
    busy.start_agents("canary-1", "main-1")
    busy.await_completion(busy.start_rollout(bundle, cohorts=[("canary", 1), ("main", 1)]))

    after = logs.read(stack)
    assert logs.of_organization(after, quiet.organization) == logs.of_organization(before, quiet.organization)
    assert logs.of_organization(after, busy.organization) != logs.of_organization(before, busy.organization)
    partitions = {
        entry.partition
        for entry in after.private["registry"]
        if entry.envelope.organization in (busy.organization, quiet.organization)
    }
    assert len(partitions) == 1, "the two were meant to share a partition"
    assert checker.check_audit_chain(after).holds
    assert not quiet.devices()
