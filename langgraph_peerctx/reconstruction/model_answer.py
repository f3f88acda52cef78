"""What a language model answered, read as strictly as what comes from a stranger."""

import json
import math
from collections.abc import Iterator
from typing import Any, Final, NoReturn

from langgraph_peerctx.errors import ProtocolError
from langgraph_peerctx.protocol.json_values import plain_object
from langgraph_peerctx.protocol.messages import Json
from langgraph_peerctx.reconstruction.question import visible

MAX_ANSWER_BYTES: Final = 65_536
"""The longest answer that is looked at."""
_FENCE: Final = "```"


class UnreadableAnswerError(ValueError):
    """An answer that is no JSON object; says why in a sentence, without the answer's text."""


def read_answer(text: str) -> Json:
    """Return the one JSON object of an answer, alone or in a fenced block, as plain JSON.

    Characters that nobody sees are taken out of its values; see `visible`.

    Raises:
        UnreadableAnswerError: If there is none, or more than one; if it is too large or nested too
            deeply; if a key stands twice; if a number is NaN or infinite.
    """
    if len(text) > MAX_ANSWER_BYTES or len(text.encode(errors="replace")) > MAX_ANSWER_BYTES:
        raise UnreadableAnswerError(f"the answer has more than {MAX_ANSWER_BYTES} bytes")
    if not text.strip():
        raise UnreadableAnswerError("the answer is empty")
    value = _loaded(_object_text(text))
    if not isinstance(value, dict):
        raise UnreadableAnswerError("the answer is no JSON object")
    try:
        return plain_object({key: visible(item) for key, item in value.items()}, name="the answer")
    except (ProtocolError, RecursionError):
        raise UnreadableAnswerError("the answer is nested too deeply") from None


def _object_text(text: str) -> str:
    """Return what is to be read: the text itself, or its only fenced block."""
    if text.lstrip().startswith("{"):
        return text
    blocks = list(_fenced(text))
    if len(blocks) > 1:
        raise UnreadableAnswerError("the answer has more than one fenced block")
    return blocks[0] if blocks else text


def _fenced(text: str) -> Iterator[str]:
    """Yield the blocks between lines of backticks; one that does not end is none."""
    block: list[str] | None = None
    for line in text.splitlines():
        mark = line.strip()
        if not mark.startswith(_FENCE):
            if block is not None:
                block.append(line)
        elif block is None:
            block = []
        else:
            yield "\n".join(block)
            block = None


def _loaded(text: str) -> Any:
    try:
        return json.loads(
            text, object_pairs_hook=_each_once, parse_constant=_refuse, parse_float=_finite
        )
    except UnreadableAnswerError:
        raise
    except RecursionError:
        raise UnreadableAnswerError("the answer is nested too deeply") from None
    except json.JSONDecodeError as error:
        # Its own text would not do: it says which of its document's characters it met.
        raise UnreadableAnswerError(f"the answer is no JSON, at character {error.pos}") from None
    except ValueError:
        raise UnreadableAnswerError("the answer holds a number that is too long") from None


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise UnreadableAnswerError("the answer has a key twice in one object")
    return found


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse(text)


def _refuse(_text: str) -> NoReturn:
    raise UnreadableAnswerError("the answer holds NaN or an infinite number")
