"""Writes docs/evidence.md and its figure; every number in them is from one run."""

import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from html import escape
from itertools import product
from pathlib import Path
from typing import Any

from matrix.cells import DURABILITIES, PEER_FATES, STORE_FATES, all_cells
from matrix.experiment import BACK_SECONDS
from matrix.judging import GOOD, VERDICTS
from matrix.summing import of_system, times, verdicts
from matrix.trading import SYSTEMS, TITLES
from matrix.workflows import KINDS, WORKFLOWS
from matrix.workflows import TITLES as WORKFLOW_TITLES

Found = dict[str, Any]

_COLOURS = {
    "as uninterrupted": "#1f6fb2",
    "unknowable, surfaced": "#86b9e0",
    "waits for its peer": "#c8d0d8",
    "surfaced without need": "#f3cf63",
    "in doubt, not said": "#f0a04b",
    "begun anew": "#d9772b",
    "failed": "#8c6d31",
    "ended differently": "#b38bc4",
    "an effect lost": "#6b2d5c",
    "an effect repeated": "#c8283c",
}
_DARK = {"as uninterrupted", "failed", "an effect lost", "an effect repeated"}
_WIDTH, _LEFT, _BAR, _GAP, _GROUP = 940, 330, 20, 4, 26
_FONT = 'font-family="Helvetica, Arial, sans-serif" font-size="13"'


def written(found: Found, folder: Path) -> None:
    """Write the page and its figure."""
    (folder / "evidence.md").write_text(page(found))
    (folder / "evidence.svg").write_text(figure(found))


def page(found: Found) -> str:
    """Return the page."""
    text = _PAGE.format(
        kills=len(of_system(found, "peers")),
        cells=f"{all_cells():,}",
        back=BACK_SECONDS,
        bare=TITLES["langgraph"],
        alone=TITLES["no peers"],
        whole=TITLES["peers"],
        seed=found["seed"],
        minutes=f"{found['seconds'] / 60:.0f}",
        cores=found["cores"],
        at_once=found["at_once"],
        workflows="; ".join(WORKFLOW_TITLES[name] for name in WORKFLOWS),
        answer=_answer(found),
        verdicts=_verdict_table(found),
        meanings="\n".join(f"- **{verdict}**: {VERDICTS[verdict]}." for verdict in VERDICTS),
        by_fate=_share_table(
            found,
            ("peer", "stores"),
            list(product(PEER_FATES, STORE_FATES)),
            lambda kill: (kill["cell"]["peer"], kill["cell"]["store"]),
        ),
        by_durability=_share_table(
            found,
            ("durability",),
            [(name,) for name in DURABILITIES],
            lambda kill: (kill["cell"]["durability"],),
        ),
        by_place=_share_table(
            found,
            ("killed",),
            [(name,) for name in KINDS],
            lambda kill: (kill["cell"]["place"]["kind"],),
        ),
        by_workflow=_share_table(
            found,
            ("workflow",),
            [(name,) for name in WORKFLOWS],
            lambda kill: (kill["cell"]["workflow"],),
        ),
        times=_times_table(found),
        while_down=_asked_meanwhile(found, "down"),
        while_alive=_asked_meanwhile(found, "alive"),
        faults=_faults(found),
    )
    return "\n\n".join(map(_wrapped, text.split("\n\n")))


def _wrapped(block: str) -> str:
    """Return a paragraph, or a list's items, in lines of 100; anything else as it is."""
    if block.startswith(("|", "#", "!", "<", "`")):
        return block
    items = block.split("\n- ")
    indent = "  " if block.startswith("- ") else ""
    filled = [
        textwrap.fill(
            " ".join((item if number == 0 else f"- {item}").split()),
            width=100,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for number, item in enumerate(items)
    ]
    return "\n".join(filled) + ("\n" if block.endswith("\n") else "")


def _answer(found: Found) -> str:
    lines = []
    for system in SYSTEMS:
        kills = of_system(found, system)
        counts = verdicts(kills)
        lost = counts["an effect lost"]
        repeated = counts["an effect repeated"]
        orders = sum(times - 1 for kill in kills for times in kill["applied"].values() if times > 1)
        unsaid = counts["in doubt, not said"]
        lines.append(
            f"- **{TITLES[system]}**: of {len(kills)} kills {repeated} repeated an effect "
            f"({orders} orders too many), {lost} lost one, {unsaid} left one in doubt and did not "
            f"say so; {counts['as uninterrupted']} ended as uninterrupted."
        )
    return "\n".join(lines)


def _verdict_table(found: Found) -> str:
    counts = [verdicts(of_system(found, system)) for system in SYSTEMS]
    rows = [[verdict, *(str(one[verdict]) for one in counts)] for verdict in VERDICTS]
    return _table(["", *(TITLES[system] for system in SYSTEMS)], rows)


def _share_table(
    found: Found,
    names: Sequence[str],
    keys: Sequence[tuple[str, ...]],
    key_of: Callable[[Any], tuple[str, ...]],
) -> str:
    """Return how many kills of each kind ended well, of how many."""
    columns = []
    for system in SYSTEMS:
        kills = of_system(found, system)
        all_, good = Counter(map(key_of, kills)), Counter(map(key_of, filter(_is_good, kills)))
        columns.append({key: f"{good[key]} of {all_[key]}" for key in keys})
    rows = [[*key, *(column[key] for column in columns)] for key in keys]
    return _table([*names, *(TITLES[system] for system in SYSTEMS)], rows)


def _times_table(found: Found) -> str:
    rows = []
    for system in SYSTEMS:
        for stage, row in times(of_system(found, system)).items():
            rows.append([TITLES[system], stage, *(f"{row[name]:.0f}" for name in row)])
    return _table(["", "from the kill to", "p50, ms", "p90, ms", "longest, ms"], rows)


def _faults(found: Found) -> str:
    bad = [kill for kill in of_system(found, "peers") if not _is_good(kill)]
    if not bad:
        return "None."
    lines = []
    for kill in bad:
        cell = kill["cell"]
        where = f"{cell['workflow']}, {cell['place']['name']}, {cell['durability']}"
        fate = f"peer {cell['peer']}, stores {cell['store']}"
        why = "; ".join([kill["verdict"], *kill["repeated"], *kill["lost"], *kill["notes"]])
        lines.append(f"- kill {cell['number']} ({where}, {fate}): {why}")
    return "\n".join(lines)


def _is_good(kill: Any) -> bool:
    return kill["verdict"] in GOOD and not kill["notes"]


def _asked_meanwhile(found: Found, peer: str) -> str:
    """Say of how many kills, their peer being so, a human was asked for a time."""
    kills = [kill for kill in of_system(found, "peers") if kill["cell"]["peer"] == peer]
    return f"{sum(kill['ending']['asked_meanwhile'] for kill in kills)} of {len(kills)}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figure(found: Found) -> str:
    """Return the figure: a bar for each system, in a group for each fate of peer and stores."""
    parts, y = [], 16
    for peer, store in product(PEER_FATES, STORE_FATES):
        title = f"peer {_FATES[peer]}, stores {store}"
        parts.append(f'<text x="12" y="{y + 12}" font-weight="bold">{escape(title)}</text>')
        y += _BAR
        for system in SYSTEMS:
            kills = [
                kill
                for kill in of_system(found, system)
                if (kill["cell"]["peer"], kill["cell"]["store"]) == (peer, store)
            ]
            label = escape(TITLES[system])
            parts.append(f'<text x="{_LEFT - 10}" y="{y + 15}" text-anchor="end">{label}</text>')
            parts += _bar(y, verdicts(kills), len(kills))
            y += _BAR + _GAP
        y += _GROUP - _GAP
    legend, height = _legend(y)
    body = "\n".join([*parts, *legend])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" role="img" {_FONT} fill="#222">\n'
        f"<title>How killed runs ended, by system</title>\n"
        f'<rect width="100%" height="100%" fill="#fff"/>\n{body}\n</svg>\n'
    )


_FATES = {"alive": "alive", "down": "down and back", "gone": "gone"}


def _bar(y: int, counts: dict[str, int], total: int) -> list[str]:
    parts, x = [], float(_LEFT)
    for verdict, count in counts.items():
        if not count:
            continue
        width = (_WIDTH - _LEFT - 16) * count / total
        colour, ink = _COLOURS[verdict], "#fff" if verdict in _DARK else "#222"
        parts.append(
            f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_BAR}" fill="{colour}" '
            f'stroke="#fff"><title>{verdict}: {count} of {total}</title></rect>'
        )
        middle = x + width / 2
        parts.append(
            f'<text x="{middle:.1f}" y="{y + 15}" text-anchor="middle" fill="{ink}">{count}</text>'
        )
        x += width
    return parts


def _legend(y: int) -> tuple[list[str], int]:
    parts = []
    for number, verdict in enumerate(_COLOURS):
        x, line = 12 + 305 * (number % 3), y + 24 * (number // 3)
        parts.append(
            f'<rect x="{x}" y="{line}" width="14" height="14" fill="{_COLOURS[verdict]}"/>'
            f'<text x="{x + 21}" y="{line + 12}">{verdict}</text>'
        )
    return parts, y + 24 * -(-len(_COLOURS) // 3) + 8


_PAGE = """# What was shown by killing

<!-- Written by `make matrix`; every number is of one run. -->

An agent's process ends itself with `SIGKILL` at a named place of its workflow. What then becomes of
the run is compared with the same workflow undisturbed, and with what its peer has really done. The
same {kills} kills were made of three systems:

{answer}

![How killed runs ended](evidence.svg)

{verdicts}

{meanings}

The first three are as good as it gets: where the peer is gone, no system can place the orders that
are left, and nobody can tell of an order that was under way.

## What was run

Five workflows: {workflows}. Their nodes take about 12 ms; two or three of each workflow's nodes
order something from a peer, which takes orders over TCP in a process of its own. The kills:

- **where**: before, inside and after every node; and of every order before its intent, between
  intent and call, between the call (the peer has done it) and its outcome, and after the outcome;
- **durability**: `sync`, `async`, `exit`;
- **the peer**: alive; down, that is killed in the same instant as the agent, and started again on
  the same port and store {back:g} s later; or gone, killed and never started again;
- **the stores**: event store, control database and checkpoints kept, or all deleted afterwards.

These are {cells} combinations; {kills} were drawn evenly with the seed {seed}. The systems:

- **{bare}**: after the kill somebody calls `ainvoke(None)`, or `ainvoke(input)` where nothing is
  stored; and again each second while the peer may come back. The peer is called plainly.
- **{alone}**: `own_runs`, `effect(...)` that names no peer, and a `RecoverySupervisor` whose
  workflows have `use_peer_context=False`.
- **{whole}**: the same with `effect(..., peer=...)`, a peer that takes orders with `Receiver` and
  answers over Kafka, and a supervisor that asks it.

Where the stores are lost nobody knows of the run: the last two are then recovered with
`recover_and_resume_workflow_async(..., initial_state=..., expect=[peer])`, as an operator would.
The team's approval is given by the experiment, whoever asks for it.

Each peer writes down every order that it *applies*, under what the order is and not under its key:
so a repeated order is seen although it came under another key. **A gone peer** is judged by what
the agent left: an effect with an intent and no outcome is in doubt, and must be put to a human, by
name and alone; everything else waits for a peer that is not there, its run fails with
`ConnectionRefusedError`, and nothing may be lost or repeated. Where the stores are lost as well, no
intent is left that could be named: the whole run is in doubt, and is not begun before its peer is
heard: whoever begins it (with peers, its first node; without, its first order) has begun it anew,
and that counts as bad. Where no peer is named, every effect in doubt is unknowable. A question that
names what the killed run cannot have begun counts as bad wherever it is asked.

A real Apache Kafka on loopback, SQLite stores, a sentinel, heartbeats each 0.25 s; {cores} cores,
{at_once} kills at once, {minutes} minutes. To run it again, with the same kills:

```sh
make matrix KILLS={kills} SEED={seed}
```

## By peer and stores

How many ended well (one of the first three), of how many:

{by_fate}

With peers {while_down} whose peer was down waited for a human for a time, and went on without one
when the peer was back and had told. Of those whose peer was alive all the time, and was late with
its word, {while_alive} did: with the stores kept each of them counts as surfaced without need.

## By durability, place and workflow

{by_durability}

{by_place}

{by_workflow}

## Times

Of the kills that ended as uninterrupted, the peer alive and the stores kept. *Known*: the
supervisor's detector, or for LangGraph alone the experiment itself, has seen the death. *Resumed*:
the successor has begun its first node. *Ended*: seen to have ended. {at_once} experiments at once
share {cores} cores, so these are no figures of speed: see the benchmarks for those.

{times}

## What did not end well, with peers

{faults}
"""
