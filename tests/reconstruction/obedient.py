"""Chat models that do as a test says, or as whoever spoke last says."""

import asyncio
import json
import re
import time
from collections.abc import Sequence
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from pydantic import Field
from typing_extensions import override


class Scripted(BaseChatModel):
    """Gives one answer after the other, and notes what it was asked.

    An answer is a message, a message's content, or an exception to raise.
    """

    answers: list[Any] = Field(default_factory=list)
    asked: list[list[BaseMessage]] = Field(default_factory=list)
    options: list[dict[str, Any]] = Field(default_factory=list)
    delay_seconds: float = 0.0

    @property
    @override
    def _llm_type(self) -> str:
        return "scripted"

    def answer_to(self, _messages: Sequence[BaseMessage]) -> Any:
        return self.answers[len(self.asked) - 1]

    @override
    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        raise NotImplementedError

    @override
    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        self.asked.append(messages)
        self.options.append({"stop": stop, **kwargs})
        if self.delay_seconds:
            await asyncio.sleep(self.delay_seconds)
        answer = self.answer_to(messages)
        if isinstance(answer, BaseException):
            raise answer
        message = answer if isinstance(answer, AIMessage) else AIMessage(answer)
        return ChatResult(generations=[ChatGeneration(message=message)])


class CountingWords(Scripted):
    """Has a tokenizer of its own: one token a word, or as many as it is told."""

    per_word: int = 1
    fails: bool = False

    @override
    def get_num_tokens(self, text: str) -> int:
        if self.fails:
            raise OSError("no network")
        return self.per_word * len(text.split())


class CountingSlowly(Scripted):
    """Takes its time to count, as one does that asks a server."""

    @override
    def get_num_tokens(self, text: str) -> int:
        time.sleep(0.3)
        return 1


_ORDER = re.compile(
    r"set (?P<key>\w+) to (?P<value>[\w.-]+)"
    r"|reply with (?P<reply>\{.*)"
    r"|call tool (?P<tool>\w+)"
    r'|"(?:name|tool)": ?"(?P<shape>\w+)"'
    r"|(?P<silent>say nothing)"
)


class Obedient(Scripted):
    """Does what the last text in its input that looks like an order says."""

    @override
    def answer_to(self, _messages: Sequence[BaseMessage]) -> Any:
        said = obeyed("\n".join(message.text for message in _messages))
        return AIMessage("{}") if said is None else said


def obeyed(text: str) -> AIMessage | None:
    """Return what the last order in a text makes of a model; None if there is none."""
    text = text.replace('\\\\"', '"').replace('\\"', '"').replace("\\n", "\n")
    orders = list(_ORDER.finditer(text))
    if not orders:
        return None
    order = orders[-1].groupdict()
    if order["key"]:
        value = int(order["value"]) if order["value"].isdecimal() else order["value"]
        return AIMessage(json.dumps({order["key"]: value, "extra": {"deep": [value]}}))
    if order["reply"]:
        return AIMessage(_object_at_the_start(order["reply"]))
    if tool := order["tool"] or order["shape"]:
        call = {"name": tool, "args": {"owner": "mallory"}, "id": "call-1"}
        return AIMessage('{"owner": "mallory"}', tool_calls=[call])
    return AIMessage("")


def _object_at_the_start(text: str) -> str:
    depth = 0
    for end, letter in enumerate(text, 1):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if depth == 0:
            return text[:end]
    return text
