"""T24: kill -9 at every step leaves the old or the new firmware, and the update succeeds in the end."""

from __future__ import annotations

import pytest

from clients.agent.failpoints import STEPS
from tests.integration.agent.conftest import Device, bundle
from tests.integration.agent.doubles import Gateway

# Killed amid the one trial boot, the device takes it back; anywhere else it carries on.
TAKEN_BACK = {"in-trial", "before-confirm"}


@pytest.mark.parametrize("step", STEPS)
def test_a_kill_ends_in_old_or_new_never_neither(gateway: Gateway, device: Device, step: str) -> None:
    first = device.start()
    assert gateway.ended(gateway.release(bundle("1.0.0"))) == "CONFIRMED"
    first.terminate()
    assert first.wait(10) == 0
    killed = device.start(failpoint=step)
    new = bundle("1.1.0")
    attempt = gateway.release(new)
    device.kill_at(killed, step)
    goes = gateway.goes
    checked_in = len(gateway.running)
    device.start()
    if step in TAKEN_BACK:
        assert gateway.ended(attempt) == "REVERTED"
        assert gateway.code(attempt) == "TRIAL_INTERRUPTED"
        gateway.until(lambda: gateway.running[-1]["version"] == "1.0.0", "the old firmware")
        attempt = gateway.release(new)
    assert gateway.ended(attempt) == "CONFIRMED"
    assert gateway.running[-1]["version"] == "1.1.0"
    # At no time did it run anything else, and each step was told once.
    assert {one["version"] for one in gateway.running[checked_in:]} <= {"1.0.0", "1.1.0"}
    states = gateway.states(attempt)
    assert len(states) == len(set(states))
    if step == "before-switch":
        # The leave that it had was not kept: it asked again.
        assert gateway.goes > goes
