"""The manufacturing workflow: the factory's list is imported first, the devices come later and find their place.

What the line knew (cohort, tags, description) stays; what the CA would give to a device that nobody announced does not
touch it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import timedelta
from typing import Any

from groundswell.registry.v1 import registry_pb2
from groundswell.rollout.v1 import rollout_pb2

from demo.steps import ROOT, wait_until
from tests.e2e.stack import Stack
from tests.e2e.tenant import PRODUCT, TARGET, Tenant

HEADER = "identifier,description,tags,cohort,target\n"
ACTIVE = registry_pb2.Device.STATE_ACTIVE


def swell(stack: Stack, tenant: Tenant, *arguments: str) -> tuple[int, Any]:
    """Status and JSON of a command as a person at the line would run it."""
    argv = [sys.executable, "-m", "clients.cli", "-o", "json", "--profile", str(stack.profile.path.resolve())]
    done = subprocess.run(
        [*argv, "-O", tenant.organization, *arguments],
        cwd=ROOT,
        env={**os.environ, "GROUNDSWELL_API_KEY": tenant.api_key},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return done.returncode, json.loads(done.stdout) if done.stdout.strip() else done.stderr


def import_list(stack: Stack, tenant: Tenant, text: str, *options: str) -> tuple[int, Any]:
    file = tenant.directory / "line-4.csv"
    file.write_text(HEADER + text)
    return swell(stack, tenant, "import", "devices", str(file), "--product", PRODUCT, *options)


def test_imported_devices_are_bound_at_their_first_contact(stack: Stack, tenant: Tenant) -> None:
    text = "".join(f"SN-{n:04d},pump of line 4,line-4;lot-7,canary,{TARGET}\n" for n in range(1, 6))
    status, image = import_list(stack, tenant, text, "--dry-run")
    assert (status, image["state"], tenant.devices()) == (0, "STATE_VALIDATED", {})
    status, image = import_list(stack, tenant, text)
    assert (status, image["state"], image["created_count"]) == (0, "STATE_COMPLETED", 5)
    before = tenant.devices()
    assert sorted(before) == [f"SN-{n:04d}" for n in range(1, 6)]

    tenant.enrolled("SN-0001")
    tenant.enrolled("unannounced")
    after = tenant.devices()
    bound = after["SN-0001"]
    assert bound.uid == before["SN-0001"].uid, "bound, not created anew"
    assert (bound.cohort, list(bound.tags)) == (tenant.cohort("canary"), ["line-4", "lot-7"])
    assert (bound.description, bound.state, bound.preregistered) == ("pump of line 4", ACTIVE, True)
    assert len(bound.certificate_fingerprint) == 64
    assert bound.provisioned_by.endswith("/caCertificates/factory")
    assert not after["SN-0002"].certificate_fingerprint
    fresh = after["unannounced"]
    assert (fresh.cohort, list(fresh.tags), fresh.preregistered) == (tenant.cohort("main"), ["made"], False)
    assert tenant.certificates("SN-0001")[0].fingerprint == bound.certificate_fingerprint


def test_a_device_that_has_its_certificate_takes_no_other(stack: Stack, tenant: Tenant) -> None:
    status, _ = import_list(stack, tenant, f"SN-0001,,line-4,canary,{TARGET}\n")
    assert status == 0
    tenant.enrolled("SN-0001")
    known = tenant.devices()["SN-0001"]
    copied = tenant.raw_device(tenant.factory.device("SN-0001", valid=timedelta(days=30)))
    answer = copied.check_in()
    assert (answer.status, answer.reason) == (403, "SECOND_CERTIFICATE")
    assert tenant.devices()["SN-0001"].certificate_fingerprint == known.certificate_fingerprint


def test_a_bad_list_changes_nothing_and_names_its_rows(stack: Stack, tenant: Tenant) -> None:
    text = f"SN-0001,,line-4,canary,{TARGET}\nSN 2,,,,\nSN-0001,,,,\nSN-0004,,,nowhere,\n"
    status, image = import_list(stack, tenant, text)
    assert (status, image["problem_count"], tenant.devices()) == (1, 3, {})
    found = [(problem["row"], problem["code"]) for problem in image["problems"]]
    assert found == [(1, "INVALID_FIELD"), (2, "DUPLICATE_ROW"), (3, "RESOURCE_NOT_FOUND")]
    file = tenant.directory / "other.csv"
    file.write_text("serial\nSN-1\n")
    status, error = swell(stack, tenant, "import", "devices", str(file), "--product", PRODUCT)
    assert status == 1
    assert "does not know 'serial'" in str(error)


def test_a_bound_device_takes_part_in_its_cohorts_rollout(stack: Stack, tenant: Tenant) -> None:
    bundle = tenant.bundle("1.1.0")
    status, _ = import_list(stack, tenant, f"SN-0007,,line-4,canary,{TARGET}\n")
    assert status == 0
    tenant.start_agents("SN-0007")
    wait_until("the device to be bound", 40, lambda: tenant.devices()["SN-0007"].certificate_fingerprint, 0.2)
    done = tenant.await_completion(tenant.start_rollout(bundle, cohorts=[("canary", 1)]))
    assert done.state == rollout_pb2.Rollout.STATE_COMPLETED
    wait_until("the registry to hear of it", 20, lambda: tenant.devices()["SN-0007"].reported.version == "1.1.0", 0.2)
    assert list(tenant.devices()["SN-0007"].tags) == ["line-4"]
