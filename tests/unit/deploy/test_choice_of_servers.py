from __future__ import annotations

import pytest

from tests.servers import ADDRESSES, Source, choose

ALL = dict.fromkeys(ADDRESSES, "x")


@pytest.mark.parametrize("engine", [True, False])
def test_addresses_come_first(engine: bool) -> None:
    assert choose(ALL, engine_answers=engine) is Source.ENVIRONMENT


def test_then_containers_then_the_local_stack() -> None:
    assert choose({}, engine_answers=True) is Source.CONTAINERS
    assert choose({}, engine_answers=False) is Source.LOCAL


def test_an_empty_variable_is_none() -> None:
    assert choose(dict.fromkeys(ADDRESSES, ""), engine_answers=False) is Source.LOCAL


@pytest.mark.parametrize("name", ADDRESSES)
def test_half_a_set_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        choose({key: value for key, value in ALL.items() if key != name}, engine_answers=True)
