"""How long the event store takes, beside the same rows through a bare driver.

    python tests/benchmarks/event_store.py [--sizes 10000,1000000,10000000] [--rounds 7]
        [--databases sqlite,postgresql] [--folder DIR] [--json FILE]

Each size has a database of its own, filled with conversations of 200 events in such an order that
no two events of a conversation stand beside each other: the worst for a cache. Then rounds over
all sizes take turns, and in them the store and the bare driver, call by call. Figures are medians
over the rounds, in microseconds.

`query`: the newest 50 events of a pair, thread and window, parsed; `bare`: the same rows out of
`sqlite3` or psycopg, as tuples; `cpu`: of the wall time, what the calling thread worked, which is
all that a busy machine leaves comparable. `async`: through the twin that does not block the loop.
`append`: one event, durable. `many`: one event out of a hundred in a transaction. Before each round
the files are read into the system's cache; the blocks that were read from a disk in spite of it
are counted. A PostgreSQL of its own is started and stopped.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import platform
import random
import resource
import shutil
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import psycopg
from services.postgres import PostgresServer

from langgraph_peerctx.persistence.event_store import EventStore
from langgraph_peerctx.persistence.rows import FIELDS, microseconds, row_of
from langgraph_peerctx.protocol.messages import Interaction

AGENT = "product-agent-1"
CONVERSATION = 200
WANTED = 50
QUERIES, ASYNC_QUERIES, APPENDS, BATCHES, BATCH = 400, 200, 200, 5, 100
START = datetime(2026, 1, 1, tzinfo=UTC)
STEP = timedelta(milliseconds=100)
TEXT = "an order of three units " * 8
SERVER = {"shared_buffers": "4GB", "max_wal_size": "8GB", "maintenance_work_mem": "1GB"}
COLUMNS = (
    "agent_id",
    "interaction_id",
    "counterpart_id",
    "thread_id",
    "from_agent",
    "to_agent",
    "kind",
    "payload",
    "occurred_at",
    "recorded_at",
    "effect_key",
    "run_id",
    "checkpoint_id",
)
SELECT = (
    f"SELECT {', '.join(FIELDS)} FROM peerctx_interactions "  # noqa: S608 - constants
    "WHERE agent_id = {0} AND counterpart_id = {0} AND thread_id = {0} "
    "AND occurred_at BETWEEN {0} AND {0} ORDER BY occurred_at DESC, sequence DESC LIMIT {0}"
)
INSERT = (
    f"INSERT INTO peerctx_interactions ({', '.join(COLUMNS)}) "  # noqa: S608 - constants
    f"VALUES ({', '.join(['{0}'] * len(COLUMNS))})"
)

fresh = itertools.count()
chance = random.Random(7)


@dataclass(frozen=True)
class Question:
    """A conversation, and the half of it that is newest."""

    counterpart_id: str
    thread_id: str
    since: datetime
    until: datetime


@dataclass
class Subject:
    """One database of one size, the store on it, and the bare driver beside it."""

    database: str
    size: int
    store: EventStore
    bare: Any
    mark: str
    folder: Path
    blocks_read: int = 0
    figures: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    @property
    def conversations(self) -> int:
        return self.size // CONVERSATION

    def question(self) -> Question:
        number = chance.randrange(self.conversations)
        half = (CONVERSATION // 2) * self.conversations
        return Question(
            counterpart_id=counterpart(number),
            thread_id=thread(number),
            since=START + half * STEP,
            until=START + self.size * STEP,
        )

    def ask(self, question: Question) -> int:
        found = self.store.interactions_with(
            AGENT,
            question.counterpart_id,
            thread_id=question.thread_id,
            since=question.since,
            until=question.until,
            limit=WANTED,
        )
        return len(found)

    async def ask_twin(self, question: Question) -> int:
        found = await self.store.ainteractions_with(
            AGENT,
            question.counterpart_id,
            thread_id=question.thread_id,
            since=question.since,
            until=question.until,
            limit=WANTED,
        )
        return len(found)

    def ask_bare(self, question: Question) -> int:
        values = (
            AGENT,
            question.counterpart_id,
            question.thread_id,
            microseconds(question.since),
            microseconds(question.until),
            WANTED,
        )
        return len(self.bare.execute(SELECT.format(self.mark), values).fetchall())

    def append_bare(self, interaction: Interaction) -> None:
        row = row_of(AGENT, interaction)
        self.bare.execute(INSERT.format(self.mark), tuple(row[name] for name in COLUMNS))


def counterpart(conversation: int) -> str:
    return f"peer-{conversation % 100}"


def thread(conversation: int) -> str:
    return f"thread-{conversation // 100}"


def event() -> Interaction:
    """Something that happens now, between us and a newcomer: the questions' rows stay."""
    return Interaction(
        interaction_id=f"{chance.getrandbits(128):032x}",
        thread_id=f"new-{next(fresh) // CONVERSATION}",
        from_agent=AGENT,
        to_agent="newcomer",
        kind="message",
        payload={"text": TEXT},
        occurred_at=datetime.now(UTC),
    )


def rows(size: int) -> Iterator[tuple[Any, ...]]:
    """The rows of so many events, in the order of `COLUMNS`."""
    conversations = size // CONVERSATION
    start, step = microseconds(START), STEP // timedelta(microseconds=1)
    for number in range(size):
        peer = counterpart(number % conversations)
        moment = start + number * step
        yield (
            AGENT,
            f"{chance.getrandbits(128):032x}",
            peer,
            thread(number % conversations),
            *((AGENT, peer) if number % 2 else (peer, AGENT)),
            "message",
            f'{{"number":{number},"text":"{TEXT}"}}',
            moment,
            moment,
            None,
            None,
            None,
        )


def fill_sqlite(file: Path, size: int) -> None:
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as bare:
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "cache_size=-4000000"):
            bare.execute(f"PRAGMA {pragma}")
        bare.execute("BEGIN")
        bare.executemany(INSERT.format("?"), rows(size))
        bare.execute("COMMIT")
        bare.execute("PRAGMA journal_mode=WAL")


def fill_postgresql(url: str, size: int) -> None:
    with psycopg.connect(url, autocommit=True) as bare:
        into = f"COPY peerctx_interactions ({', '.join(COLUMNS)}) FROM STDIN"
        with bare.cursor().copy(into.encode()) as copy:
            for row in rows(size):
                copy.write_row(row)
        bare.execute("VACUUM (ANALYZE) peerctx_interactions")
        bare.execute("CHECKPOINT")


@contextlib.contextmanager
def sqlite_subject(folder: Path, size: int) -> Iterator[Subject]:
    file = folder / f"{size}.db"
    EventStore(f"sqlite:///{file}").close()
    fill_sqlite(file, size)
    with (
        EventStore(f"sqlite:///{file}") as store,
        contextlib.closing(sqlite3.connect(file, isolation_level=None)) as bare,
    ):
        bare.execute("PRAGMA synchronous=NORMAL")
        yield Subject("sqlite", size, store, bare, "?", folder)


@contextlib.contextmanager
def postgresql_subject(server: PostgresServer, size: int) -> Iterator[Subject]:
    with server.database() as url:
        EventStore(url).close()
        fill_postgresql(url, size)
        with EventStore(url) as store, psycopg.connect(url, autocommit=True) as bare:
            (folder,) = bare.execute("SHOW data_directory").fetchone() or [""]
            yield Subject("postgresql", size, store, bare, "%s", Path(folder) / "base")


def warm(folder: Path) -> None:
    """Bring every file into the system's cache: this system may take idle pages out of it."""
    for file in (path for path in folder.rglob("*") if path.is_file()):
        with file.open("rb") as opened:
            while opened.read(1 << 24):
                pass


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - started) / 1_000


def quantiles(micros: Sequence[float]) -> tuple[float, float]:
    ordered = sorted(micros)
    return statistics.median(ordered), ordered[int(len(ordered) * 0.99)]


def note(subject: Subject, what: str, micros: Sequence[float]) -> None:
    subject.figures.setdefault(what, []).append(quantiles(micros))


def queries_round(subject: Subject) -> None:
    took: dict[str, list[float]] = {"query": [], "bare query": [], "query cpu": []}
    calls = [("query", subject.ask), ("bare query", subject.ask_bare)]
    for _ in range(QUERIES):
        calls.reverse()
        question = subject.question()
        for what, call in calls:
            worked, started = time.thread_time_ns(), time.perf_counter_ns()
            found = call(question)
            took[what].append((time.perf_counter_ns() - started) / 1_000)
            if what == "query":
                took["query cpu"].append((time.thread_time_ns() - worked) / 1_000)
            if found != WANTED:
                raise AssertionError(f"{what} found {found} rows instead of {WANTED}")
    for what, micros in took.items():
        note(subject, what, micros)


async def async_round(subject: Subject) -> None:
    micros = []
    for _ in range(ASYNC_QUERIES):
        question = subject.question()
        started = time.perf_counter_ns()
        await subject.ask_twin(question)
        micros.append((time.perf_counter_ns() - started) / 1_000)
    note(subject, "async query", micros)


def appends_round(subject: Subject) -> None:
    took: dict[str, list[float]] = {"append": [], "bare append": []}
    for _ in range(APPENDS):
        ours, theirs = event(), event()
        took["append"].append(timed(lambda e=ours: subject.store.append(AGENT, e)))  # type: ignore[misc]
        took["bare append"].append(timed(lambda e=theirs: subject.append_bare(e)))  # type: ignore[misc]
    for _ in range(BATCHES):
        batch = [event() for _ in range(BATCH)]
        one = timed(lambda b=batch: subject.store.append_many(AGENT, b)) / BATCH  # type: ignore[misc]
        took.setdefault("append of many", []).append(one)
    for what, micros in took.items():
        note(subject, what, micros)


def measure(subjects: Sequence[Subject], rounds: int) -> None:
    for number in range(rounds + 1):
        for folder in {subject.folder for subject in subjects}:
            warm(folder)
        for subject in subjects:
            before = blocks_read()
            queries_round(subject)
            asyncio.run(async_round(subject))
            subject.blocks_read += blocks_read() - before
            appends_round(subject)
            if number == 0:  # the first round warms
                subject.figures.clear()
                subject.blocks_read = 0


def blocks_read() -> int:
    """Return how many blocks of 512 bytes this process had to read from a disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_inblock


def summary(subject: Subject) -> dict[str, Any]:
    figures = {}
    for what, seen in subject.figures.items():
        p50s, p99s = zip(*seen, strict=True)
        figures[what] = {
            "p50_us": round(statistics.median(p50s), 1),
            "p99_us": round(statistics.median(p99s), 1),
            "quietest_p50_us": round(min(p50s), 1),
            "quietest_p99_us": round(min(p99s), 1),
        }
    return {
        "database": subject.database,
        "size": subject.size,
        "figures": figures,
        "blocks_read": subject.blocks_read,
    }


def table(summaries: Sequence[dict[str, Any]]) -> str:
    whats = list(summaries[0]["figures"])
    lines = [f"{'µs, p50 / p99':24}" + "".join(f"{what:>20}" for what in whats)]
    for one in summaries:
        cells = [f"{f['p50_us']:.0f} / {f['p99_us']:.0f}" for f in one["figures"].values()]
        name = f"{one['database']} {one['size']:,}"
        lines.append(f"{name:24}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def verdicts(summaries: Sequence[dict[str, Any]]) -> list[str]:
    """What the figures that are promised came to: SQLite, the smallest size beside the largest."""
    ours = [one for one in summaries if one["database"] == "sqlite"]
    if not ours:
        return []
    small, large = ours[0]["figures"]["query"], ours[-1]["figures"]["query"]
    said = [f"sqlite, {ours[-1]['size']:,} events beside {ours[0]['size']:,}, 50 rows:"]
    for rounds, mark in (("median of rounds", ""), ("quietest round", "quietest_")):
        p99 = large[f"{mark}p99_us"] / 1_000
        ratio = large[f"{mark}p50_us"] / small[f"{mark}p50_us"]
        said.append(
            f"  {rounds}: p99 {p99:.3f} ms (wanted: under 1), p50 x {ratio:.2f} (up to 1.5)"
        )
    return said


def machine() -> dict[str, Any]:
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    names = [line for line in lines if "model name" in line]
    return {
        "cores": os.cpu_count(),
        "cpu": names[0].partition(":")[2].strip() if names else platform.processor(),
        "python": platform.python_version(),
        "sqlite": f"{sqlite3.sqlite_version}, WAL, synchronous=NORMAL",
        "postgresql": SERVER | {"fsync": "on"},
        "load_average": os.getloadavg(),
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@contextlib.contextmanager
def all_subjects(
    database: str, sizes: Sequence[int], folder: Path | None
) -> Iterator[list[Subject]]:
    with contextlib.ExitStack() as stack:
        make: Callable[[int], contextlib.AbstractContextManager[Subject]]
        if database == "sqlite":
            files = Path(tempfile.mkdtemp(prefix="event-store-", dir=folder))
            stack.callback(shutil.rmtree, files, ignore_errors=True)
            make = lambda size: sqlite_subject(files, size)  # noqa: E731
        else:
            server = stack.enter_context(PostgresServer(SERVER))
            make = lambda size: postgresql_subject(server, size)  # noqa: E731
        subjects = []
        for size in sizes:
            started = time.monotonic()
            subjects.append(stack.enter_context(make(size)))
            print(f"{database}: {size:,} events in {time.monotonic() - started:.0f} s", flush=True)
        yield subjects


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    numbers = lambda text: sorted(int(size) for size in text.split(","))  # noqa: E731
    parser.add_argument("--sizes", type=numbers, default=[10_000, 1_000_000, 10_000_000])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--databases", default="sqlite,postgresql")
    parser.add_argument("--folder", type=Path, help="where there is room for SQLite's files")
    parser.add_argument("--json", type=Path, default=Path("bench-results/event_store.json"))
    return parser.parse_args()


def main() -> None:
    options = arguments()
    print(json.dumps(machine(), indent=1))
    summaries: list[dict[str, Any]] = []
    for database in options.databases.split(","):
        with all_subjects(database, options.sizes, options.folder) as subjects:
            measure(subjects, options.rounds)
            summaries += [summary(subject) for subject in subjects]
    print(table(summaries), *verdicts(summaries), sep="\n")
    print("blocks read from a disk:", [one["blocks_read"] for one in summaries])
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"machine": machine(), "results": summaries}, indent=1))


if __name__ == "__main__":
    main()
