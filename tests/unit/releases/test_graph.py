"""Whatever is tried, a cohort's graph keeps one latest, no circle, and nothing phased before the latest."""

from __future__ import annotations

from google.protobuf.timestamp_pb2 import Timestamp
from groundswell.releases.v1 import releases_pb2 as pb
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from libs.errors import DomainError
from services.releases.domain import CreateRelease, DeleteRelease, SetManaged, UpdateRelease
from services.releases.graph import is_phased, is_scheduled
from tests.unit.releases.world import COHORT, ROLLOUT, Fold, bundle_of, name_of

IDS = st.sampled_from([f"r{index}" for index in range(7)])
PHASES = st.sampled_from([None, pb.Phase(share_ppm=100_000), pb.Phase(count=3), pb.Phase(tags=["lab"])])


class Graphs(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.fold = Fold()

    def attempt(self, command: object) -> None:
        before = self.fold.state
        try:
            self.fold.do(command)
        except DomainError:
            assert self.fold.state is before

    @rule(name=IDS, ahead=st.one_of(st.just(""), IDS), previous=st.one_of(st.just(""), IDS), phase=PHASES,
          later=st.integers(-1, 1), required=st.booleans())  # fmt: skip
    def create(self, name: str, ahead: str, previous: str, phase: pb.Phase | None, later: int, required: bool) -> None:
        release = pb.Release(name=name_of(name), bundle=bundle_of("b"), phase=phase, required=required)
        if later:
            release.schedule_time.CopyFrom(Timestamp(seconds=self.fold.inputs.now_ms // 1000 + later * 100))
        release.next = name_of(ahead) if ahead else ""
        self.attempt(CreateRelease(release, name_of(previous) if previous else ""))

    @rule(name=IDS)
    def create_managed(self, name: str) -> None:
        self.attempt(CreateRelease(pb.Release(name=name_of(name), bundle=bundle_of("b"), rollout=ROLLOUT)))

    @rule(name=IDS, ahead=st.one_of(st.just(""), IDS))
    def relink(self, name: str, ahead: str) -> None:
        image = pb.Release(name=name_of(name), next=name_of(ahead) if ahead else "")
        self.attempt(UpdateRelease(image, ("next",)))

    @rule(name=IDS, phase=PHASES)
    def change_phase(self, name: str, phase: pb.Phase | None) -> None:
        self.attempt(UpdateRelease(pb.Release(name=name_of(name), phase=phase), ("phase",)))

    @rule(name=IDS, force=st.booleans())
    def delete(self, name: str, force: bool) -> None:
        self.attempt(DeleteRelease(name_of(name), "", force, "because"))

    @rule(name=IDS, action=st.sampled_from(["retract", "disable", "release"]))
    def steer(self, name: str, action: str) -> None:
        self.attempt(SetManaged(name_of(name), ROLLOUT, action))

    @rule()
    def time_passes(self) -> None:
        self.fold.inputs.now_ms += 60_000

    @invariant()
    def one_latest_that_all_lead_to(self) -> None:
        graph = self.fold.state.graphs.get(COHORT)
        if not graph:
            return
        sinks = [one for one in graph.values() if not one.next]
        assert len(sinks) == 1
        for one in graph.values():
            seen = set()
            at = one
            while at.next:
                assert at.name not in seen
                seen.add(at.name)
                at = graph[at.next]
            assert at is sinks[0]

    @invariant()
    def only_the_latest_is_phased_or_scheduled(self) -> None:
        for one in (self.fold.state.graphs.get(COHORT) or {}).values():
            if one.next:
                assert not is_phased(one)
                assert not is_scheduled(one, self.fold.inputs.now_ms)

    @invariant()
    def retracted_is_disabled(self) -> None:
        for one in (self.fold.state.graphs.get(COHORT) or {}).values():
            assert one.disabled or not one.retracted


TestGraphs = Graphs.TestCase
TestGraphs.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
