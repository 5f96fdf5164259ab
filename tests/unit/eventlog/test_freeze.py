"""The codec of snapshots: everything that a state may hold comes back equal, and nothing else is stored."""

from __future__ import annotations

import enum
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import immutables
import msgspec
import pytest
from google.protobuf.wrappers_pb2 import BytesValue, StringValue

from libs.eventlog.freeze import PIECE, Codec, FreezeError, reachable
from services.artifacts.state import State as ArtifactsState
from services.pki.model import State as PkiState
from services.registry.domain.state import State as RegistryState
from services.releases.domain import State as ReleasesState
from services.rollout.domain import State as RolloutState
from services.webhooks.domain import State as WebhooksState


class Colour(enum.Enum):
    RED = "red"
    GREEN = "green"


class Pair(NamedTuple):
    left: int
    right: str


class Leaf(msgspec.Struct, frozen=True):
    number: int
    words: frozenset[str] = frozenset()
    colour: Colour = Colour.RED
    message: StringValue | None = None


@dataclass(frozen=True, slots=True)
class Root:
    leaves: immutables.Map[str, Leaf] = field(default_factory=immutables.Map)
    shelves: immutables.Map[str, immutables.Map[int, Leaf]] = field(default_factory=immutables.Map)
    pairs: tuple[Pair, ...] = ()
    last: int = 0


CODEC = Codec(reachable(Root))


def there_and_back(*values: Any, codec: Codec = CODEC) -> list[Any]:
    found: list[Any] = []
    for so_far in codec.thaw(iter(list(codec.freeze(values)))):
        found = so_far
    return found


def leaf(rng: random.Random) -> Leaf:
    return Leaf(
        rng.randint(-(2**63), 2**63 - 1),
        frozenset(f"w{rng.randint(0, 9)}" for _ in range(rng.randint(0, 4))),
        rng.choice(list(Colour)),
        rng.choice([None, StringValue(value="é" * rng.randint(0, 3))]),
    )


def root(rng: random.Random) -> Root:
    sizes = (0, 1, PIECE, PIECE + 1, 3 * PIECE + 7)
    return Root(
        immutables.Map({f"k{index}": leaf(rng) for index in range(rng.choice(sizes))}),
        immutables.Map(
            {
                f"s{index}": immutables.Map({number: leaf(rng) for number in range(rng.choice(sizes))})
                for index in range(rng.choice((0, 3, PIECE + 5)))
            }
        ),
        tuple(Pair(number, str(number)) for number in range(rng.randint(0, 5))),
        rng.randint(0, 9),
    )


@pytest.mark.parametrize("seed", range(20))
def test_whatever_a_state_holds_comes_back_equal(seed: int) -> None:
    rng = random.Random(seed)
    values = [root(rng), root(rng).shelves, {("a", 1): Pair(1, "x"), ("b", 2): Pair(2, "y")}, 1.5, b"\x00", None, True]
    found = there_and_back(*values)
    assert found == values
    assert [type(value) for value in found] == [type(value) for value in values]


def test_big_maps_go_in_pieces() -> None:
    """Whoever drives the generator gets a turn at least once in so many entries."""
    frames = list(CODEC.freeze([immutables.Map(dict.fromkeys(range(10 * PIECE), "v"))]))
    assert len(frames) >= 10
    nested = immutables.Map({"only": immutables.Map(dict.fromkeys(range(10 * PIECE), "v"))})
    big = nested.update({str(number): immutables.Map() for number in range(PIECE)})
    assert len(list(CODEC.freeze([big]))) >= 10


@dataclass(frozen=True)
class Stranger:
    number: int = 0


@pytest.mark.parametrize("value", [Stranger(), object(), {1}, 2**80, "\ud800"])
def test_what_is_not_registered_is_not_stored(value: object) -> None:
    with pytest.raises(FreezeError):
        list(CODEC.freeze([Root(last=value)]))  # type: ignore[arg-type]


def damaged(frames: list[bytes]) -> Iterator[list[bytes]]:
    yield frames[:-1]
    yield [*frames[:1], b"\xc1", *frames[1:]]
    yield [frame[:-1] for frame in frames]


def test_damaged_frames_are_an_error_and_nothing_else() -> None:
    frames = list(CODEC.freeze([root(random.Random(4))]))
    assert len(frames) > 3
    for broken in damaged(frames):
        with pytest.raises(FreezeError):
            for _ in CODEC.thaw(iter(broken)):
                pass


def test_a_changed_shape_has_another_fingerprint() -> None:
    @dataclass(frozen=True, slots=True)
    class Other:
        number: int

    fields = {"number": int, "more": str}
    assert Codec([Other]).fingerprint == Codec([Other]).fingerprint
    changed = type(Other)("Other", (), {"__annotations__": fields, "__module__": __name__})
    changed.__qualname__ = Other.__qualname__
    assert Codec([dataclass(frozen=True)(changed)]).fingerprint != Codec([Other]).fingerprint


def test_messages_are_found_by_their_full_name() -> None:
    assert there_and_back((BytesValue(value=b"x"), StringValue())) == [(BytesValue(value=b"x"), StringValue())]


@pytest.mark.parametrize("state", [ArtifactsState, PkiState, RegistryState, ReleasesState, RolloutState, WebhooksState])
def test_every_service_has_a_shape(state: type) -> None:
    types = reachable(state)
    assert state in types
    empty = state()
    assert there_and_back(empty, codec=Codec(types)) == [empty]
