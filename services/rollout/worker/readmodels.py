"""Last-seen and the last receipt of each device in Redis: rebuildable, so trouble here never holds the stream up.

One script for the records of one acknowledgement, guarded by (partition, position): what was applied and is delivered
again changes nothing.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Mapping, Sequence
from typing import Final

from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.rollout.keys import last_seen_key, positions_key, receipt_key
from services.rollout.observations import Observed

log = logging.getLogger(__name__)

KEEP_S: Final = 14 * 24 * 3600
"""As long as the check-in topic keeps receipts."""
MOST_DEVICES: Final = 2000
"""Devices of one script, which keeps Redis from everybody else while it runs."""
_SCRIPT: Final = """
local at = redis.call('HGET', KEYS[1], ARGV[1])
if at and tonumber(at) >= tonumber(ARGV[2]) then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
local said = cmsgpack.unpack(ARGV[4])
for i = 1, #said, 3 do
  redis.call('SET', ARGV[5] .. said[i], said[i + 1], 'EX', ARGV[3])
  if said[i + 2] ~= '' then redis.call('SET', ARGV[6] .. said[i], said[i + 2], 'EX', ARGV[3]) end
end
return 1
"""
"""Device, time and receipt come by turns in one MessagePack array: as arguments of the command they would cost the
worker several times as much. Redis knows only the format's older part, where bytes are raw strings."""
_HEAD: Final = struct.Struct(">BI").pack


def packed(said: Mapping[str, tuple[str, bytes]]) -> bytes:
    """Device, time and receipt by turns, as Redis unpacks them."""
    parts = [_HEAD(0xDD, len(said) * 3)]
    for device, (seen_ms, receipt) in said.items():
        name, at = device.encode(), seen_ms.encode()
        parts += (_HEAD(0xDB, len(name)), name, _HEAD(0xDB, len(at)), at, _HEAD(0xDB, len(receipt)), receipt)
    return b"".join(parts)


class ReadModels:
    """Writes what a record says of devices."""

    def __init__(self, redis: Redis, env: str) -> None:
        self._env = env
        self._redis = redis
        self._script = redis.register_script(_SCRIPT)
        self.failures = 0

    async def update(self, partition: int, records: Sequence[Observed]) -> None:
        """Apply records, in order, once; a failure is counted and forgotten, the next check-in repeats it."""
        said: dict[str, tuple[str, bytes]] = {}
        for index, observed in enumerate(records):
            seen_ms = str(observed.devices[0].seen_ms) if observed.devices else ""
            for seen in observed.devices:
                said[seen.device] = (seen_ms, seen.receipt or said.get(seen.device, ("", b""))[1])
            if said and (len(said) >= MOST_DEVICES or index + 1 == len(records)):
                await self._apply(partition, observed.position, said)
                said = {}

    async def _apply(self, partition: int, position: int, said: dict[str, tuple[str, bytes]]) -> None:
        prefixes = (last_seen_key(self._env, ""), receipt_key(self._env, ""))
        try:
            await self._script(
                keys=[positions_key(self._env)],
                args=[partition, position, KEEP_S, packed(said), *prefixes],
            )
        except RedisError as error:
            self.failures += 1
            if self.failures % 100 == 1:
                log.warning("read models not updated (%d so far): %s", self.failures, type(error).__name__)

    async def close(self) -> None:
        """Disconnect."""
        await self._redis.aclose()
