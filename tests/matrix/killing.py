"""All kills of a run, several at once."""

import asyncio
from collections.abc import Callable, Sequence

from matrix.cells import Cell
from matrix.experiment import Experiment
from matrix.judging import GOOD, Kill
from matrix.trading import SYSTEMS

TOLD_EVERY = 30


async def all_killed(
    made: Experiment, cells: Sequence[Cell], *, at_once: int, tell: Callable[[str], object]
) -> list[Kill]:
    """Kill each system in each way; so many at once."""
    places, found = asyncio.Semaphore(at_once), list[Kill]()

    async def one(cell: Cell) -> None:
        for system in SYSTEMS:
            async with places:
                kill = await made.kill(cell, system)
            found.append(kill)
            if system == "peers" and (kill.verdict not in GOOD or kill.notes):
                tell(f"{kill.system}: {kill.verdict}: {cell}: {kill.ending} {kill.notes}")
            if len(found) % TOLD_EVERY == 0:
                tell(f"{len(found)} of {len(cells) * len(SYSTEMS)}")

    async with asyncio.TaskGroup() as kills:
        for cell in cells:
            kills.create_task(one(cell))
    return sorted(found, key=lambda kill: (kill.cell.number, SYSTEMS.index(kill.system)))
