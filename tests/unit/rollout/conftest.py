"""A small fleet with one stage, for tests of single rules."""

from __future__ import annotations

import pytest
from groundswell.rollout.v1 import rollout_pb2

from tests.simulation.rollout.world import Rollout, World, cohort, seconds


class Small(World):
    """Devices on release 1.0.0 in one or two cohorts; rollout ``r`` to 2.0.0."""

    def __init__(self) -> None:
        super().__init__()
        self.add_bundle("1.0.0")
        self.add_bundle("2.0.0", 1)
        self.base = {name: self.add_release(name, "1.0.0", "old") for name in ("canary", "beta")}

    def stage(self, name: str = "canary", **fields: object) -> rollout_pb2.Stage:
        stage = rollout_pb2.Stage(display_name=name, cohort=cohort(name), max_in_flight=5)
        gate = {key: fields.pop(key) for key in list(fields) if key in rollout_pb2.Gate.DESCRIPTOR.fields_by_name}
        for key, value in fields.items():
            if key == "tags":
                stage.tags.extend(value)  # type: ignore[arg-type]
            else:
                setattr(stage, key, value)
        stage.gate.soak.CopyFrom(seconds(gate.pop("soak", 10)))  # type: ignore[arg-type]
        stage.gate.dark_after.CopyFrom(seconds(gate.pop("dark_after", 20)))  # type: ignore[arg-type]
        if "stall_after" in gate:
            stage.gate.stall_after.CopyFrom(seconds(gate.pop("stall_after")))  # type: ignore[arg-type]
        for key, value in gate.items():
            setattr(stage.gate, key, value)
        return stage

    def start(self, *stages: rollout_pb2.Stage, back: bool = False, rollout_id: str = "r") -> None:
        action = Rollout.FAILURE_ACTION_ROLL_BACK if back else Rollout.FAILURE_ACTION_PAUSE
        image = Rollout(stages=stages or [self.stage()], failure_action=action)
        image.attempt_policy.lease.CopyFrom(seconds(30))
        image.attempt_policy.max_lease.CopyFrom(seconds(100))
        image.attempt_policy.go_valid.CopyFrom(seconds(5))
        self.create(rollout_id, "2.0.0", image)
        self.control("start", rollout_id)

    def device(self, serial: str = "d1", cohort_id: str = "canary", **facts: object):  # type: ignore[no-untyped-def]
        return self.add_device(serial, cohort_id, release=self.base[cohort_id], **facts)

    def granted(self, device) -> str:  # type: ignore[no-untyped-def]
        """Ask, and take what is offered."""
        result = self.claim(device)
        assert result.HasField("offer"), result
        device.take(result.offer)
        return str(result.offer.attempt)

    def said(self, device):  # type: ignore[no-untyped-def]
        """Check in with what is queued, asking for nothing."""
        result = self.claim(device, candidates=[])
        device.reports.clear()
        return result

    def confirmed(self, device) -> str:  # type: ignore[no-untyped-def]
        """All the way."""
        name = self.granted(device)
        assert self.ask_go(device).answer == rollout_pb2.AuthorizeSwitchResponse.ANSWER_GO
        device.reports.clear()
        device.switch()
        self.said(device)
        return name

    def attempt(self, name: str):  # type: ignore[no-untyped-def]
        return self.leader.state.attempts[name]

    def counts(self, stage: int = 0, rollout_id: str = "r") -> rollout_pb2.StageStatus:
        return self.leader.plan(rollout_id).stage_statuses[stage]


@pytest.fixture
def small() -> Small:
    return Small()
