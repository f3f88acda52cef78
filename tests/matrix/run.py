"""The crash matrix: 300 kills of each of three systems, and docs/evidence.md about it.

    python tests/matrix/run.py [--kills 300] [--seed N] [--at-once 6] [--json FILE] [--write]

A real Apache Kafka on loopback; every agent and every peer is a process of its own, and ends with
SIGKILL. The same kills are made of all three systems, side by side.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from matrix.cells import drawn
from matrix.evidence import written
from matrix.experiment import experiment
from matrix.killing import all_killed
from matrix.summing import summary
from services.kafka import KafkaServer

ROOT = Path(__file__).parents[2]


async def measured(servers: str, kills: int, seed: int, at_once: int) -> dict[str, Any]:
    began = time.monotonic()
    async with experiment(servers) as made:
        found = await all_killed(made, drawn(kills, seed), at_once=at_once, tell=print)
    return {
        "seed": seed,
        "cores": os.cpu_count(),
        "at_once": at_once,
        "seconds": round(time.monotonic() - began),
        "kills": [kill.as_json() for kill in found],
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--kills", type=int, default=300)
    options.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    options.add_argument("--at-once", type=int, default=6)
    options.add_argument("--json", type=Path, default=ROOT / "bench-results" / "matrix.json")
    options.add_argument("--write", action="store_true", help="write docs/evidence.md and .svg")
    chosen = options.parse_args()
    print(f"seed {chosen.seed}", flush=True)
    with KafkaServer() as kafka:
        found = asyncio.run(
            measured(kafka.bootstrap_servers, chosen.kills, chosen.seed, chosen.at_once)
        )
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    chosen.json.write_text(json.dumps(found, indent=1) + "\n")
    print(summary(found))
    if chosen.write:
        written(found, ROOT / "docs")


if __name__ == "__main__":
    main()
