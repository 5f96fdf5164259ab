"""Work that the registry gives itself: long work is asked for in runs, so that other callers get in between."""

from __future__ import annotations

from collections.abc import Mapping

from libs.eventlog import Command, Task, TaskContext, TaskHandler
from libs.names import organization_of
from services.registry.domain import AdvanceDeviceImport
from services.registry.domain.imports import TASK_KIND


async def advance_import(task: Task, _ctx: TaskContext, /) -> Command | None:
    """Ask for the next run of an import's rows; the decision closes the task with the last one."""
    name = task.payload.decode()
    return Command(organization_of(name), AdvanceDeviceImport(name))


HANDLERS: Mapping[str, TaskHandler] = {TASK_KIND: advance_import}
