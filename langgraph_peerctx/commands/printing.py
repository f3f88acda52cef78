"""How every command speaks: tables for people, JSON for programs."""

import json
from datetime import UTC, datetime
from typing import Any

from pydantic_core import to_jsonable_python
from rich.console import Console
from rich.table import Column, Table


def table_of(*names: str) -> Table:
    """Return a table that cuts nothing off: the end of a variable's name is what one needs."""
    return Table(*(Column(name, overflow="fold") for name in names))


def print_json(value: object, *, indent: int | None = 2) -> None:
    """Print one JSON document; with `indent=None` on one line, at once."""
    plain = to_jsonable_python(value, serialize_unknown=True, inf_nan_mode="null")
    print(json.dumps(plain, indent=indent), flush=True)  # noqa: T201 - the output


def print_line(text: str) -> None:
    """Print a sentence, on as few lines as the terminal can show it."""
    Console().print(text, soft_wrap=True, markup=False, highlight=False)


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
