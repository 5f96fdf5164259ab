"""What simulations have in common."""

from __future__ import annotations

from tests.snapshots import states_survive_snapshots  # noqa: F401 - a fixture of every test here
