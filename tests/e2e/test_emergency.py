"""Emergency response, as in `docs/guides/emergency-response.md`: overtake a running rollout, let it go on, kill one.

The commands are those of the guide, run through `swell` where time does not matter.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from groundswell.rollout.v1 import rollout_pb2

from clients.sdk import ApiError
from demo.steps import wait_until
from deploy.local.settings import ROOT
from tests.e2e import logs
from tests.e2e.device import Answer, RawDevice
from tests.e2e.stack import Stack
from tests.e2e.tenant import PRODUCT, Rollout, StageStatus, Tenant

CANARY = ("canary-1", "canary-2")
MAIN = ("main-1", "main-2", "main-3")
EXPOSED = MAIN[:2]
LAST_OFFER_WITHIN_S = 2.0
"""What is promised: gateways are never further behind than this."""
ANSWER_S = 1.0
"""For an answer that was on its way, on a machine that is busy with other tests."""


class Swell:
    """`swell` with the tenant's key."""

    def __init__(self, stack: Stack, tenant: Tenant) -> None:
        self._argv = [sys.executable, "-m", "clients.cli", "-o", "json", "--profile", str(stack.profile.path)]
        self._argv += ["-O", tenant.organization, "-P", PRODUCT]
        self._environment = {**os.environ, "GROUNDSWELL_API_KEY": tenant.api_key}

    def __call__(self, command: str) -> Any:
        done = subprocess.run(
            [*self._argv, *shlex.split(command)],
            cwd=ROOT,
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert not done.returncode, f"swell {command}: {done.stderr}"
        return json.loads(done.stdout)


def versions(tenant: Tenant) -> dict[str, str]:
    return {name: device.reported.version for name, device in tenant.devices().items()}


def test_an_emergency_overtakes_the_running_rollout_and_lets_it_go_on(stack: Stack, tenant: Tenant) -> None:
    swell = Swell(stack, tenant)
    tenant.bundle("1.1.0")
    tenant.bundle("1.2.0", boot_s=6)  # long enough to look at what is overtaken meanwhile
    tenant.start_agents(*CANARY, *MAIN)
    for device in EXPOSED:
        tenant.update_device(device, tags=["exposed"])

    swell(
        "rollout create to-1-1-0 --bundle fw-1-1-0 --stage canary:max=5,min=2,soak=1s,approve "
        "--stage main:max=5,soak=1s --start"
    )
    older = tenant.rollout_name("to-1-1-0")
    tenant.await_rollout(
        older,
        "the canaries to await approval",
        lambda now: now.stage_statuses[0].state == StageStatus.STATE_AWAITING_APPROVAL,
    )

    swell(
        "rollout create fix-1-2-0 --bundle fw-1-2-0 --stage main:tags=exposed,max=50,min=2,soak=1s --expedited --start"
    )
    fix = tenant.rollout_name("fix-1-2-0")
    paused = tenant.rollout(older)
    assert (paused.state, paused.state_reason, paused.superseded_by) == (Rollout.STATE_PAUSED, "SUPERSEDED", fix)
    with pytest.raises(ApiError) as refused:
        tenant.client.rollout.ResumeRollout(rollout_pb2.ResumeRolloutRequest(name=older))
    assert refused.value.reason == "COHORT_BUSY"

    tenant.await_completion(fix)
    assert {name: version for name, version in versions(tenant).items() if name in MAIN} == {
        "main-1": "1.2.0",
        "main-2": "1.2.0",
        "main-3": "1.0.0",
    }

    tenant.await_rollout(older, "it goes on", lambda now: now.state == Rollout.STATE_RUNNING)
    swell("rollout approve to-1-1-0")
    tenant.await_completion(older)
    wait_until("the last device to report", 20, lambda: versions(tenant)["main-3"] == "1.1.0", 0.2)
    shown = swell("rollout get to-1-1-0")
    assert shown["stage_statuses"][0]["grant_to_confirmed"]["count"] == "2"
    listed = swell("attempt list --rollout fix-1-2-0 --state CONFIRMED")
    assert {one["device"] for one in listed} == {tenant.device_name(device) for device in EXPOSED}
    tenant.fleet.stop()
    logs.check(stack, tenant.organization, tenant.request_ids)


class Polling:
    """Devices that ask again and again, as fast as they are answered, and take nothing."""

    def __init__(self, devices: list[RawDevice]) -> None:
        self.offers: list[tuple[float, RawDevice, dict[str, Any]]] = []
        self.answers: list[tuple[float, Answer]] = []
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._poll, args=(device,)) for device in devices]

    def _poll(self, device: RawDevice) -> None:
        while not self._ended.is_set():
            answer = device.check_in()
            at = time.monotonic()
            self.answers.append((at, answer))
            if "offer" in answer.body:
                self.offers.append((at, device, answer.body["offer"]))

    @contextmanager
    def running(self) -> Iterator[Polling]:
        for thread in self._threads:
            thread.start()
        try:
            yield self
        finally:
            self._ended.set()
            for thread in self._threads:
                thread.join()


def test_after_a_kill_no_offer_leaves_and_no_link_works_within_the_bound(stack: Stack, tenant: Tenant) -> None:
    swell = Swell(stack, tenant)
    tenant.bundle("1.3.0")
    devices = [tenant.enrolled(f"main-raw-{number}") for number in range(4)]
    swell("rollout create to-1-3-0 --bundle fw-1-3-0 --stage main:max=50,min=50 --start")
    name = tenant.rollout_name("to-1-3-0")

    with Polling(devices).running() as polling:
        wait_until("every device to be offered it", 30, lambda: len(polling.offers) > 20, 0.05)
        _, holder, offer = polling.offers[-1]
        link = offer["binaries"][0]["url"]
        assert holder.send(b"", method="GET", path=link).status == 307
        before = swell("rollout get to-1-3-0")
        # Not through `swell`: ending that process takes longer than the last offer.
        killed = tenant.client.rollout.KillRollout(rollout_pb2.KillRolloutRequest(name=name, reason="bricks"))
        acknowledged = time.monotonic()
        wait_until(
            "answers after the bound", 30, lambda: polling.answers[-1][0] > acknowledged + LAST_OFFER_WITHIN_S + 1, 0.05
        )
        answered = holder.send(b"", method="GET", path=link)

    assert killed.state == Rollout.STATE_KILLED
    assert killed.control_epoch == int(before["control_epoch"]) + 1
    last = max(at for at, _, _ in polling.offers) - acknowledged
    print(f"last offer {last:+.3f} s after the kill was acknowledged")
    assert last < LAST_OFFER_WITHIN_S + ANSWER_S
    assert len([at for at, _ in polling.answers if at > acknowledged + last]) > 20, "they went on asking"
    assert (answered.status, answered.reason) == (403, "OFFER_WITHDRAWN")
    assert tenant.rollout(name).stage_statuses[0].in_flight == 0
    assert swell("rollout held to-1-3-0") == []
    swell("rollout create again-1-3-0 --bundle fw-1-3-0 --stage main")
    assert swell('rollout kill again-1-3-0 --reason "never mind" --yes')["state"] == "STATE_KILLED"
    listed = swell("rollout list --filter 'state = KILLED'")
    assert {one["name"] for one in listed} == {name, tenant.rollout_name("again-1-3-0")}
    # The log itself: nothing was granted and no leave given behind the kill.
    kinds = [
        (entry.event_type.rsplit(".", 1)[-1], entry) for entry in logs.entries(stack, "rollout", tenant.organization)
    ]
    at = max(
        index
        for index, (kind, entry) in enumerate(kinds)
        if kind == "RolloutSaved" and entry.message().change == "rollout.killed"
    )
    assert not {kind for kind, _ in kinds[at:]} & {"AttemptGranted", "GoGiven"}


def test_a_device_that_failed_a_plain_release_tries_again_when_somebody_says_so(stack: Stack, tenant: Tenant) -> None:
    swell = Swell(stack, tenant)
    tenant.bundle("1.1.0")
    swell("release create 1-1-0 --cohort canary --bundle fw-1-1-0 --version 1.1.0 --version-requirement '< 1.1.0'")
    device = tenant.enrolled("canary-sick")

    def offered() -> str:
        found: list[str] = []

        def asked() -> bool:
            answer = device.check_in().body
            found[:] = [answer["offer"]["attempt"]] if answer["answer"] == "offer" else []
            return bool(found)

        wait_until("an offer", 30, asked, 0.2)
        return found[0]

    first = offered()
    device.counter += 1
    report = {"counter": device.counter, "attempt": first, "state": "FAILED", "code": "NO_POWER"}
    device.check_in(reports=[report], attempt={"name": first})
    wait_until("the failure", 20, lambda: "ALREADY_FAILED" in device.check_in().codes, 0.2)

    assert swell('attempt retry canary-sick --reason "new battery"')["name"] == first
    assert offered() != first
