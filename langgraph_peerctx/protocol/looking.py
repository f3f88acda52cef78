"""Whatever a workflow's state holds, as JSON for looking at."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from itertools import islice
from typing import Any

from pydantic_core import from_json, to_json, to_jsonable_python

DEPTH = 24
"""Deeper than this it is cut: what reads checkpoints has limits of its own."""
TEXT = 1_000

_LEAST_BYTES = 4
"""No item of a list or a mapping is counted for less."""


def plain(value: object) -> Any:
    """Return a value as plain JSON, with text where there is no better; never raises."""
    try:
        found = _jsonable(value)
    except Exception:  # noqa: BLE001 - anybody's object may do anything when it is looked at
        return _cannot(value)
    return _cut(found, DEPTH)


class _Text(bytes):
    """JSON text of a part of a copy: quicker to take than its dicts and lists."""

    __slots__ = ()


class Snapshot:
    """Copies of values, taken at once and no larger than needed, for a look at them later.

    What comes out is for `opened` alone. Text is never cut in the middle: who looks for secrets in
    it must see it whole.

    Args:
        limit_bytes: About so much is copied; then items are left out.
        depth: How many levels.
    """

    __slots__ = ("_depth", "_left", "_limit", "is_whole")

    def __init__(self, limit_bytes: int, *, depth: int = DEPTH // 2 - 2) -> None:
        self._limit = self._left = limit_bytes
        self._depth = depth
        self.is_whole = True

    @property
    def size_bytes(self) -> int:
        """About how large the copies are together."""
        return self._limit - self._left

    def of(self, value: object) -> Any:
        """Return a copy of a value, with text where there is no better; never raises."""
        return self._of(value, self._depth)

    def _of(self, value: Any, depth: int) -> Any:
        self._left -= _LEAST_BYTES
        if value is None or isinstance(value, bool | int | float):
            return value
        try:
            if isinstance(value, str):
                self._left -= len(value)
                return str.__str__(value)
            return self._container(value, depth)
        except Exception:  # noqa: BLE001 - anybody's object may do anything when it is looked at
            return self._without(_cannot(value))

    def _container(self, value: Any, depth: int) -> Any:
        if is_dataclass(value) and not isinstance(value, type):
            value = {f.name: getattr(value, f.name) for f in fields(value)}
        if isinstance(value, Mapping | list | tuple | set | frozenset):
            if depth == 0:
                return self._without("cut: too deep")
            if isinstance(value, Mapping):
                return self._mapping(value, depth)
            return self._list(value, depth)
        if isinstance(value, Iterator):  # to look at it would use it up
            return self._without(_cannot(value))
        if isinstance(value, bytes | bytearray):
            value = bytes(value[: max(0, self._left)])
        return self._text(value, depth)

    def _text(self, value: object, depth: int) -> Any:
        try:
            text = to_json(value, serialize_unknown=True, inf_nan_mode="null", bytes_mode="base64")
        except ValueError:  # lone surrogates, for which Python's own objects have a place
            return self._of(_jsonable(value), depth)
        self._left -= len(text)
        return _Text(text)

    def _mapping(self, value: Mapping[Any, Any], depth: int) -> dict[str, Any]:
        copied: dict[str, Any] = {}
        for key, item in self._affordable(value.items(), len(value)):
            if self._left <= 0:
                self.is_whole = False
                break
            name = str(key)
            self._left -= len(name)
            copied[name] = self._of(item, depth - 1)
        return copied

    def _list(self, value: Any, depth: int) -> list[Any]:
        copied: list[Any] = []
        for item in self._affordable(value, len(value)):
            if self._left <= 0:
                self.is_whole = False
                break
            copied.append(self._of(item, depth - 1))
        return copied

    def _affordable(self, items: Any, count: int) -> tuple[Any, ...]:
        """Return so many items as can be copied at most, taken at once: others may change them."""
        found = tuple(islice(items, max(0, self._left) // _LEAST_BYTES + 1))
        self.is_whole = self.is_whole and len(found) >= count
        return found

    def _without(self, said: str) -> str:
        self._left -= len(said)
        return said


def opened(copy: Any) -> Any:
    """Return a snapshot's copy as plain JSON."""
    if isinstance(copy, _Text):
        return _cut(from_json(copy), DEPTH // 2)
    if isinstance(copy, dict):
        return {key: opened(item) for key, item in copy.items()}
    if isinstance(copy, list):
        return [opened(item) for item in copy]
    return copy


def _jsonable(value: object) -> Any:
    return to_jsonable_python(
        value, serialize_unknown=True, inf_nan_mode="null", bytes_mode="base64"
    )


def _cannot(value: object) -> str:
    return f"cut: {type(value).__name__} cannot be shown"


def _cut(value: Any, depth: int) -> Any:
    if isinstance(value, str):
        return value.replace("\0", "").encode("utf-8", "replace").decode()
    if depth == 0 and isinstance(value, dict | list):
        return "cut: too deep"
    if isinstance(value, dict):
        return {_cut(str(key), depth): _cut(item, depth - 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_cut(item, depth - 1) for item in value]
    return value
