"""The chaos tests' workflow, as an operator would name it in a file; its scenario is a variable."""

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from chaos.scenario import Scenario, workflow


@asynccontextmanager
async def launch() -> AsyncIterator[Any]:
    scenario = Scenario(**json.loads(os.environ["LAUNCH_SCENARIO"]))
    async with scenario.checkpointer() as saver:
        yield workflow(scenario, saver, f"{os.getpid()}")
