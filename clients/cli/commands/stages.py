"""Stages on the command line: ``canary:max=5,min=3,soak=30s,tags=lab+west,share=10%``."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

import typer
from google.protobuf.duration_pb2 import Duration
from groundswell.rollout.v1 import rollout_pb2

_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION: Final = re.compile(r"(\d{1,9}(?:\.\d{1,3})?)(ms|s|m|h|d)?")
HELP: Final = (
    "A stage, in order: `COHORT[:KEY=VALUE,…]` with max (in flight), min (sample), soak, dark, stall (durations: 30s, "
    "10m), success and share (per cent: 95%), count, rate (grants a minute), failures, tags (any of a+b), name, "
    "approve."
)


def duration(text: str) -> Duration:
    """A duration such as ``90s``, ``10m`` or ``1.5h``."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError(f"'{text}' is no duration: write 30s, 10m, 2h or 1d")
    found = Duration()
    found.FromMilliseconds(round(float(match[1]) * _UNITS[match[2] or "s"] * 1000))
    return found


def parts_per_million(text: str) -> int:
    """A share such as ``10%`` or ``0.1``."""
    value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    if not 0 <= value <= 1:
        raise ValueError(f"'{text}' is no share: write 10% or 0.1")
    return round(value * 1_000_000)


_PLAIN: Final[dict[str, tuple[str, Callable[[str], Any]]]] = {
    "max": ("max_in_flight", int),
    "count": ("count", int),
    "share": ("share_ppm", parts_per_million),
    "rate": ("max_grants_per_minute", int),
    "name": ("display_name", str),
}
_GATE: Final[dict[str, tuple[str, Callable[[str], Any]]]] = {
    "min": ("min_sample", int),
    "success": ("success_ppm", parts_per_million),
    "failures": ("failure_limit", int),
    "failure-share": ("failure_limit_ppm", parts_per_million),
}
_TIMES: Final = {"soak": "soak", "dark": "dark_after", "stall": "stall_after"}


def parse_stage(text: str) -> rollout_pb2.Stage:
    """One ``--stage``; raises ``typer.BadParameter`` with what would have been understood."""
    cohort, _, rest = text.partition(":")
    stage = rollout_pb2.Stage(cohort=cohort, display_name=cohort.rsplit("/", 1)[-1])
    for item in filter(None, (part.strip() for part in rest.split(","))):
        key, _, value = item.partition("=")
        try:
            _set(stage, key, value)
        except (ValueError, TypeError) as error:
            raise typer.BadParameter(f"--stage {text}: {item}: {error}") from None
    if not cohort:
        raise typer.BadParameter(f"--stage {text}: begin with the cohort: canary:max=5")
    return stage


def _set(stage: rollout_pb2.Stage, key: str, value: str) -> None:
    if key == "approve":
        stage.gate.manual_approval = True
    elif key == "tags":
        stage.tags.extend(filter(None, value.split("+")))
    elif key in _TIMES:
        getattr(stage.gate, _TIMES[key]).CopyFrom(duration(value))
    elif key in _PLAIN:
        field, convert = _PLAIN[key]
        setattr(stage, field, convert(value))
    elif key in _GATE:
        field, convert = _GATE[key]
        setattr(stage.gate, field, convert(value))
    else:
        known = ", ".join(sorted((*_PLAIN, *_GATE, *_TIMES, "tags", "approve")))
        raise ValueError(f"no such key; there are {known}")
