"""Last-seen and the last receipt of each device in Redis: rebuildable, so trouble here never holds the stream up.

One script per record, guarded by (partition, position): a redelivered record changes nothing.
"""

from __future__ import annotations

import logging
from typing import Final

from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.rollout.keys import last_seen_key, positions_key, receipt_key
from services.rollout.observations import Observed

log = logging.getLogger(__name__)

KEEP_S: Final = 14 * 24 * 3600
"""As long as the check-in topic keeps receipts."""
_SCRIPT: Final = """
local at = redis.call('HGET', KEYS[1], ARGV[1])
if at and tonumber(at) >= tonumber(ARGV[2]) then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
for i = 2, #KEYS, 2 do
  redis.call('SET', KEYS[i], ARGV[4], 'EX', ARGV[3])
  local receipt = ARGV[4 + i / 2]
  if receipt ~= '' then redis.call('SET', KEYS[i + 1], receipt, 'EX', ARGV[3]) end
end
return 1
"""


class ReadModels:
    """Writes what a record says of devices."""

    def __init__(self, redis: Redis, env: str) -> None:
        self._env = env
        self._redis = redis
        self._script = redis.register_script(_SCRIPT)
        self.failures = 0

    async def update(self, partition: int, observed: Observed) -> None:
        """Apply one record once; a failure is counted and forgotten, the next check-in repeats it."""
        if not observed.devices:
            return
        keys = [positions_key(self._env)]
        for seen in observed.devices:
            keys += [last_seen_key(self._env, seen.device), receipt_key(self._env, seen.device)]
        arguments: list[str | int | bytes] = [partition, observed.position, KEEP_S, observed.devices[0].seen_ms]
        arguments += [seen.receipt for seen in observed.devices]
        try:
            await self._script(keys=keys, args=arguments)
        except RedisError as error:
            self.failures += 1
            if self.failures % 100 == 1:
                log.warning("read models not updated (%d so far): %s", self.failures, type(error).__name__)

    async def close(self) -> None:
        """Disconnect."""
        await self._redis.aclose()
