"""Which kills are made: cells of workflow, place, durability, peer and store, drawn evenly."""

import random
from collections import Counter
from dataclasses import dataclass
from itertools import product
from typing import Literal

from matrix.workflows import KINDS, WORKFLOWS, Kind, Place, WorkflowName, places_of

Durability = Literal["sync", "async", "exit"]
PeerFate = Literal["alive", "down", "gone"]
StoreFate = Literal["kept", "lost"]

DURABILITIES: tuple[Durability, ...] = ("sync", "async", "exit")
PEER_FATES: tuple[PeerFate, ...] = ("alive", "down", "gone")
STORE_FATES: tuple[StoreFate, ...] = ("kept", "lost")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One kill, the same for every system.

    Attributes:
        number: Which one of the run's it is.
        place: Where the agent ends itself.
        peer: `down` ends with the agent and comes back on the same port and store; `gone` does not
            come back.
        store: Whether event store, control database and checkpoints survive the agent.
    """

    number: int
    workflow: WorkflowName
    place: Place
    durability: Durability
    peer: PeerFate
    store: StoreFate

    def __str__(self) -> str:
        return (
            f"{self.number}: {self.workflow}, {self.place.name}, {self.durability}, "
            f"peer {self.peer}, store {self.store}"
        )


def drawn(count: int, seed: int) -> list[Cell]:
    """Draw so many cells: no workflow, durability, peer or store more often than another.

    Each of these 90 combinations gets the kinds of places that it and the whole had least often.
    """
    choosing = random.Random(seed)
    strata = list(product(WORKFLOWS, DURABILITIES, PEER_FATES, STORE_FATES))
    choosing.shuffle(strata)
    overall: Counter[Kind] = Counter()
    used: Counter[tuple[object, ...]] = Counter()
    cells = []
    for number in range(count):
        workflow, durability, peer, store = strata[number % len(strata)]
        here = (peer, store)

        def rarity(kind: Kind, here: tuple[object, ...] = here) -> tuple[int, int, float]:
            return used[(kind, *here)], overall[kind], choosing.random()

        kind = min(KINDS, key=rarity)
        places = [place for place in places_of(workflow) if place.kind == kind]
        fewest = min(used[(workflow, place.name)] for place in places)
        place = choosing.choice([p for p in places if used[(workflow, p.name)] == fewest])
        overall[kind] += 1
        used[(kind, *here)] += 1
        used[(workflow, place.name)] += 1
        cells.append(
            Cell(
                number=number,
                workflow=workflow,
                place=place,
                durability=durability,
                peer=peer,
                store=store,
            )
        )
    return cells


def all_cells() -> int:
    """Return how many different kills there are."""
    places = sum(len(places_of(workflow)) for workflow in WORKFLOWS)
    return places * len(DURABILITIES) * len(PEER_FATES) * len(STORE_FATES)
