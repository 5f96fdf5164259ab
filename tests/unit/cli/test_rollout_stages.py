"""Stages on the command line."""

from __future__ import annotations

import pytest
import typer

from clients.cli.commands.stages import parse_stage


def test_a_stage_with_everything() -> None:
    stage = parse_stage(
        "canary:max=5,min=3,soak=90s,dark=10m,stall=2d,success=95%,share=0.1,rate=60,failures=2,failure-share=5%,"
        "tags=lab+west,name=first,approve"
    )
    assert (stage.cohort, stage.display_name, list(stage.tags)) == ("canary", "first", ["lab", "west"])
    assert (stage.max_in_flight, stage.share_ppm, stage.max_grants_per_minute) == (5, 100_000, 60)
    gate = stage.gate
    assert (gate.min_sample, gate.success_ppm, gate.failure_limit, gate.failure_limit_ppm) == (3, 950_000, 2, 50_000)
    assert [each.ToSeconds() for each in (gate.soak, gate.dark_after, gate.stall_after)] == [90, 600, 172_800]
    assert gate.manual_approval


def test_a_cohort_alone_is_a_stage_named_after_it() -> None:
    name = "organizations/acme/products/p/cohorts/beta"
    stage = parse_stage(name)
    assert (stage.cohort, stage.display_name) == (name, "beta")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (":max=5", "begin with the cohort"),
        ("canary:maximum=5", "no such key; there are"),
        ("canary:max=many", "max=many"),
        ("canary:max=-1", "max=-1"),
        ("canary:soak=soon", "no duration"),
        ("canary:soak=5x", "no duration"),
        ("canary:share=120%", "no share"),
        ("canary:count=99999999999999999999", "count="),
    ],
)
def test_what_is_not_understood_is_said(text: str, says: str) -> None:
    with pytest.raises(typer.BadParameter) as refused:
        parse_stage(text)
    assert says in str(refused.value)
