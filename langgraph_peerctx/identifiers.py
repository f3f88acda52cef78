"""The ids that stand in topics, records and rows, and what a legal one looks like."""

import re
from typing import Annotated
from uuid import uuid4

from pydantic import StringConstraints

from langgraph_peerctx.errors import ProtocolError

_LEGAL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")

Identifier = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]
"""An id that may become a part of a topic's name. (pydantic's `$` is the very end.)"""

RECORD_ID_LIMIT = 255
"""The longest record, thread, run or effect key, in characters."""

RecordId = Annotated[
    str,
    StringConstraints(min_length=1, max_length=RECORD_ID_LIMIT, pattern=r"^[^\x00-\x1f\x7f]+$"),
]
"""An id that stands in rows and records only: any text without control characters."""


def new_id() -> str:
    """Return a fresh random id: 128 bits as 32 hexadecimal digits."""
    return uuid4().hex


def is_legal_id(text: object) -> bool:
    """Tell whether `text` may name an agent, a process or a requester."""
    return isinstance(text, str) and _LEGAL_ID.fullmatch(text) is not None


def check_id(text: str, name: str) -> str:
    """Return `text` if it is a legal id.

    Args:
        text: The id.
        name: What it is the id of, for the error.

    Raises:
        ProtocolError: If it is none; it names the rule.
    """
    if not is_legal_id(text):
        raise ProtocolError(
            "id",
            f"{name}={text!r:.80} is no legal id: 1 to 64 of the letters A-Z and a-z, the digits, "
            "'_' and '-', beginning with a letter or digit",
        )
    return text
