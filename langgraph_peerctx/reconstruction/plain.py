"""Whatever a workflow's state holds, as JSON for looking at."""

from typing import Any

from pydantic_core import to_jsonable_python

DEPTH = 24
"""Deeper than this it is cut: what reads checkpoints has limits of its own."""
TEXT = 1_000


def plain(value: object) -> Any:
    """Return a value as plain JSON, with text where there is no better; never raises."""
    try:
        found = to_jsonable_python(
            value, serialize_unknown=True, inf_nan_mode="null", bytes_mode="base64"
        )
    except Exception:  # noqa: BLE001 - anybody's object may do anything when it is looked at
        return f"cut: {type(value).__name__} cannot be shown"
    return _cut(found, DEPTH)


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
