"""N6: salted, nested, uniform shares, and the vectors that other implementations check themselves against."""

from __future__ import annotations

import hashlib
import json
import struct
import uuid
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs import resolution
from libs.resolution import in_share
from libs.resolution.buckets import bucket, uid_bytes
from tests.unit.resolution.fleet import ask, chain, codes, device

VECTORS = json.loads((Path(resolution.__file__).parent / "vectors.json").read_text())["vectors"]
ids = st.binary(min_size=16, max_size=16)
shares = st.integers(0, 1_000_000)


@pytest.mark.parametrize("row", VECTORS, ids=lambda row: row["uid"][:8])
def test_published_vectors(row: dict[str, str]) -> None:
    salt, uid, least = uid_bytes(row["salt"]), uid_bytes(row["uid"]), int(row["smallest_share_ppm"])
    assert bucket(salt, uid) == int(row["bucket"])
    assert in_share(salt, uid, least)
    assert not in_share(salt, uid, least - 1)


@given(ids, ids, shares)
def test_agrees_with_exact_fractions(salt: bytes, uid: bytes, ppm: int) -> None:
    (place,) = struct.unpack(">Q", hashlib.sha256(salt + uid).digest()[:8])
    assert in_share(salt, uid, ppm) is (Fraction(place) < Fraction(ppm * 2**64, 10**6))


@given(ids, ids, shares, shares)
def test_a_smaller_share_is_inside_a_larger(salt: bytes, uid: bytes, one: int, other: int) -> None:
    small, large = sorted((one, other))
    assert in_share(salt, uid, large) or not in_share(salt, uid, small)


@given(ids, ids)
def test_nothing_and_all(salt: bytes, uid: bytes) -> None:
    assert not in_share(salt, uid, 0)
    assert in_share(salt, uid, 1_000_000)


def test_shares_are_uniform_and_salts_independent() -> None:
    fleet = [uuid.uuid5(uuid.NAMESPACE_OID, str(index)).bytes for index in range(20_000)]
    salts = [uuid.uuid5(uuid.NAMESPACE_OID, f"salt {index}").bytes for index in range(2)]
    held = [{uid for uid in fleet if in_share(salt, uid, 100_000)} for salt in salts]
    # Six standard deviations of a binomial: 2,000 +- 255, and both at once 200 +- 85.
    assert all(1_745 < len(some) < 2_255 for some in held)
    assert 115 < len(held[0] & held[1]) < 285


@given(ids, st.dictionaries(ids, st.integers(0, 4), min_size=1, max_size=12), st.lists(shares, min_size=5, max_size=5))
def test_n7_a_late_joiner_is_judged_as_if_it_had_been_there_all_along(
    salt: bytes, joins: dict[bytes, int], asked: list[int]
) -> None:
    """A share that grows step by step; devices join at any step. Who is inside is told by the share alone."""
    inside: set[bytes] = set()
    for step, share in enumerate(sorted(asked)):
        graph = chain({}, {"share_ppm": share, "salt": salt})
        here = [uid for uid, joined in joins.items() if joined <= step]
        now = {uid for uid in here if "NOT_IN_SHARE" not in codes(ask(device(uid=uid, release="r0"), graph))}
        assert now == {uid for uid in here if in_share(salt, uid, share)}
        assert inside <= now, "nobody who was inside is outside of a larger share"
        inside = now
