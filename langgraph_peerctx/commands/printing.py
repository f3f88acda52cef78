"""How every command speaks: tables for people, JSON for programs."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import UTC, datetime
from typing import Any, TextIO

from pydantic_core import to_jsonable_python
from rich.console import Console
from rich.json import JSON
from rich.table import Column, Table
from rich.text import Text

_kept: list[TextIO] = []
"""Where stdout was, while it is ours alone; a list, as another thread may print."""


@contextmanager
def stdout_to_ourselves() -> Iterator[None]:
    """Let what anybody else prints go to stderr; what we print goes where stdout was.

    A workflow's nodes print, and so do the processes that they start.
    """
    with _apart() as out, redirect_stdout(sys.stderr):
        _kept.append(out)
        try:
            yield
        finally:
            _kept.pop()


@contextmanager
def _apart() -> Iterator[TextIO]:
    """Keep stdout's descriptor apart, and let its number lead to stderr; without one, stdout."""
    sys.stdout.flush()
    try:
        number, others = sys.stdout.fileno(), sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):  # closed, or nothing but an object
        yield sys.stdout
        return
    with os.fdopen(os.dup(number), "w", encoding=sys.stdout.encoding) as out:
        os.dup2(others, number)
        try:
            yield out
        finally:
            out.flush()
            os.dup2(out.fileno(), number)


def _out() -> TextIO:
    return _kept[-1] if _kept else sys.stdout


def lean_table(*columns: Column) -> Table:
    """Return a table without lines, for 80 columns."""
    return Table(*columns, box=None, pad_edge=False, padding=(0, 2, 0, 0))


def whole(name: str) -> Column:
    """Return a column whose words are never broken."""
    return Column(name, no_wrap=True)


def folded(name: str) -> Column:
    """Return a column that may be broken anywhere, and loses nothing."""
    return Column(name, overflow="fold")


def table_of(*names: str) -> Table:
    """Return a table that cuts nothing off: the end of a variable's name is what one needs."""
    return Table(*(Column(name, overflow="fold") for name in names))


def print_json(value: object, *, indent: int | None = 2) -> None:
    """Print one JSON document; with `indent=None` on one line, at once."""
    plain = to_jsonable_python(value, serialize_unknown=True, inf_nan_mode="null")
    print(json.dumps(plain, indent=indent), file=_out(), flush=True)


def print_line(text: str) -> None:
    """Print a sentence, on as few lines as the terminal can show it."""
    Console(file=_out()).print(text, soft_wrap=True, markup=False, highlight=False)


def print_value(name: str, value: object, limit: int) -> None:
    """Print a JSON value under its name, as wide as it is; cut to so many characters."""
    plain = to_jsonable_python(value, serialize_unknown=True, inf_nan_mode="null")
    text = json.dumps(plain, ensure_ascii=False, indent=2)
    console = Console()
    console.print(Text(f"\n{name}", style="bold"))
    if len(text) <= limit:
        console.print(JSON(text), soft_wrap=True)
    else:
        print_line(f"{text[:limit]}\n… cut: --json has it all")


def say(text: str) -> None:
    """Say on stderr what is no part of the answer."""
    Console(stderr=True).print(text, soft_wrap=True, markup=False, highlight=False)


def cut(value: object, length: int) -> str:
    """Return a value as JSON, cut to so many characters."""
    plain = to_jsonable_python(value, serialize_unknown=True, inf_nan_mode="null")
    text = json.dumps(plain, ensure_ascii=False)
    return text if len(text) <= length else text[: length - 1] + "…"


def ago(seconds: float | None) -> str:
    """Return how long ago something was, for people."""
    return "?" if seconds is None else f"{seconds:.1f} s" if seconds < 100 else f"{seconds:.0f} s"  # noqa: PLR2004 - three digits are enough


def moment(at: datetime | None) -> str:
    """Return a moment for people, to the second, in UTC."""
    return "" if at is None else at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")


def now() -> str:
    """Return this moment as every JSON line has it."""
    return datetime.now(UTC).isoformat()


def event(name: str, **said: Any) -> None:
    """Print one thing that happened, as JSON on a line of its own."""
    print_json({"event": name, "at": now(), **said}, indent=None)
