"""Redis as the gateways' shelf: one hash for each service, partition and log, which holds its own position.

* The key names schema, service, partition and log id: a new schema or a log made anew fills a hash of its own beside
  the old one, which is given up when nobody has used it for an hour. So a rebuild never mixes two histories.
* Field ``@`` is the position of the view. Rows and position change in one script, guarded by the position before
  (positions have gaps): any number of projectors may run, and a batch is applied once.
* One ``HMGET`` reads a row together with the position. A hash that was deleted or evicted has no position, and no row
  of it counts until it has been filled again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from redis.asyncio import Redis
from redis.exceptions import RedisError

log = logging.getLogger(__name__)

SCHEMA: Final = 1
"""Changes with the meaning of a row."""
POSITION: Final = "@"
REST_S: Final = 0.5
"""After a failure Redis is left alone for this long, so that not every request waits for its time-out."""
FORGOTTEN_S: Final = 3600.0
_USED: Final = "edge:hashes"

_APPLY: Final = """
local at = redis.call('HGET', KEYS[1], '@') or ''
if at ~= ARGV[1] then return at end
if #ARGV > 2 then redis.call('HSET', KEYS[1], unpack(ARGV, 3)) end
redis.call('HSET', KEYS[1], '@', ARGV[2])
return ARGV[2]
"""

Row = tuple[str, bytes]


class Shelves:
    """The hashes of one service."""

    def __init__(self, redis: Redis, env: str, service: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._redis = redis
        self._env = env
        self._service = service
        self._clock = clock
        self._apply = redis.register_script(_APPLY)
        self._rest_until = 0.0
        self.failures = 0

    def key(self, partition: int, log_id: str) -> str:
        """Name of a partition's hash."""
        return f"{self._env}:edge:v{SCHEMA}:{self._service}:{partition}:{log_id}"

    async def read(self, partition: int, log_id: str, row: str) -> tuple[bytes | None, int] | None:
        """A row (None: there is none) and the view's position; None when Redis cannot be used for it."""
        if not log_id or self._clock() < self._rest_until:
            return None
        try:
            value, position = await self._redis.hmget(self.key(partition, log_id), [row, POSITION])
        except (RedisError, OSError) as error:
            self._rest_until = self._clock() + REST_S
            self.failures += 1
            if self.failures % 100 == 1:
                log.warning("redis does not answer (%d so far): %s", self.failures, type(error).__name__)
            return None
        if position is None:
            return None
        return value if value is None or isinstance(value, bytes) else value.encode(), int(position)

    async def position(self, partition: int, log_id: str) -> int | None:
        """Where the hash stands; None when there is none."""
        found = await self._redis.hget(self.key(partition, log_id), POSITION)
        return None if found is None else int(found)

    async def apply(
        self, partition: int, log_id: str, before: int | None, last: int, rows: Sequence[Row]
    ) -> int | None:
        """Write rows if the hash stands at ``before``; where it stands afterwards, which is ``last`` on success."""
        arguments: list[Any] = ["" if before is None else before, last]
        for row in rows:
            arguments += row
        at = await self._apply(keys=[self.key(partition, log_id)], args=arguments)
        return int(at) if at else None

    async def keep(self, places: Sequence[tuple[int, str]]) -> None:
        """Say that these hashes are in use, and remove what nobody has used for an hour."""
        now = time.time()
        used = f"{self._env}:{_USED}"
        await self._redis.zadd(used, {self.key(partition, log_id): now for partition, log_id in places})
        forgotten: list[bytes] = await self._redis.zrangebyscore(used, 0, now - FORGOTTEN_S)  # type: ignore[assignment]
        for old in forgotten:
            await self._redis.unlink(old)
            await self._redis.zrem(used, old)
