"""Ids for what is recorded, made of what runs, nodes and agents are called."""

import hashlib
import re
from functools import lru_cache
from typing import Final

from langgraph_peerctx.identifiers import RECORD_ID_LIMIT, is_legal_id
from langgraph_peerctx.protocol.json_values import plain_text

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_ILLEGAL = re.compile(r"[^A-Za-z0-9_-]+")
LONGEST_AGENT_ID: Final = 64


@lru_cache(maxsize=1_000)
def legal_agent_id(name: str) -> str:
    """Return a name as a legal agent id, the same for the same name.

    Spaces become underscores, as teams do it in the names of their hand-off tools. Where more is
    lost than that, a part of the name's hash tells it from others.
    """
    if is_legal_id(name):
        return name
    spaced = re.sub(r"\s+", "_", name.strip())
    if is_legal_id(spaced):
        return spaced
    mark = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    kept = _ILLEGAL.sub("_", spaced).lstrip("_-")[: LONGEST_AGENT_ID - len(mark) - 1] or "agent"
    return f"{kept}-{mark}"


def shortened(text: str, longest: int) -> str:
    """Return a text, with the middle of a long one hashed."""
    if len(text) <= longest:
        return text
    middle = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    kept = (longest - len(middle) - 2) // 2
    return f"{text[:kept]}~{middle}~{text[-kept:]}"


def record_id(text: str) -> str:
    """Return a run's or thread's id as a record may have it."""
    return shortened(_CONTROL.sub("_", plain_text(text)), RECORD_ID_LIMIT)
