"""An event loop without real time: when nothing is ready, the clock jumps to the next timer. Same seed, same run."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _JumpingSelector(selectors.DefaultSelector):
    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[Any]:
        self.loop.turns += 1
        if self.loop.on_turn is not None:
            self.loop.on_turn(self.loop.turns)
        if timeout is None:
            raise RuntimeError("everybody waits for something that nobody will do")
        if timeout > 0:
            self.loop.now += timeout
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """`turns` counts iterations: between two of them lies every place where a task may be interrupted."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.turns = 0
        self.on_turn: Callable[[int], None] | None = None
        selector = _JumpingSelector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.now

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:
        """No threads: they know nothing of this clock, and would make a run another one each time."""
        del executor
        done = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - it is whoever waits that must see it
            done.set_exception(error)
        return done


def run(make: Callable[[VirtualLoop], Coroutine[Any, Any, T]]) -> T:
    """Run to the end in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, VirtualLoop)
        return runner.run(make(loop))
