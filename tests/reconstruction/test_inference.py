import asyncio
import copy
import json
import operator
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage
from langgraph.channels import LastValue, UntrackedValue
from langgraph.func import entrypoint
from langgraph.graph import MessagesState, StateGraph
from langgraph.pregel import NodeBuilder, Pregel
from pydantic import BaseModel, Field, TypeAdapter, field_validator, model_validator
from reconstruction.injections import PAYLOADS
from reconstruction.obedient import CountingSlowly, CountingWords, Obedient, Scripted, obeyed

from langgraph_peerctx.durability.workflow import Workflow
from langgraph_peerctx.nodes.state import PeerContextState
from langgraph_peerctx.protocol.json_values import plain_text
from langgraph_peerctx.protocol.messages import Json
from langgraph_peerctx.reconstruction.inference import Inferred, gaps_of, infer
from langgraph_peerctx.reconstruction.model_answer import UnreadableAnswerError, read_answer
from langgraph_peerctx.reconstruction.question import (
    Question,
    ask,
    estimated_tokens,
    nonce_for,
    without_invisible,
)

NOW = datetime(2030, 1, 1, 12, tzinfo=UTC)


class Item(TypedDict):
    sku: str
    count: NotRequired[int]


class State(PeerContextState, total=False):
    owner: str
    customer: Annotated[str, Field(max_length=1_000)]
    quantity: int
    items: list[Item]
    placed_at: datetime
    anything: Any
    log: Annotated[list[str], operator.add]
    scratch: Annotated[str, UntrackedValue]


def workflow_of(schema: Any, **schemas: Any) -> Workflow:
    builder = StateGraph(schema, **schemas)
    builder.add_node("check_stock", lambda _: None)
    builder.set_entry_point("check_stock")
    return builder.compile()


WORKFLOW = workflow_of(State)
KNOWN: dict[str, Any] = {"owner": "alice", "log": ["in"]}
GAPS = ("anything", "customer", "items", "placed_at", "quantity")


def fact(text: str = "two of A1", *, minute: int = 0, **values: Any) -> Json:
    occurred_at = (NOW + timedelta(minutes=minute)).isoformat()
    return {"source": "peer", "occurred_at": occurred_at, "payload": {"text": text}, **values}


async def inferred(
    llm: BaseChatModel | None,
    workflow: Workflow = WORKFLOW,
    *,
    gaps: tuple[str, ...] = GAPS,
    state: Mapping[str, Any] = KNOWN,
    facts: Mapping[str, Json] | None = None,
    **options: Any,
) -> Inferred:
    given = {"event-1": fact()} if facts is None else facts
    return await infer(
        llm, workflow, gaps=gaps, state=state, facts=given, now=lambda: NOW, **options
    )


def block_in(message: str) -> dict[str, Any]:
    """Return the quoted block; there is exactly one."""
    (nonce,) = set(re.findall(r"^<<<DATA ([0-9a-f]{32})$", message, re.MULTILINE))
    assert message.count(f"DATA {nonce}>>>") == 1
    block = message.partition(f"<<<DATA {nonce}\n")[2].partition(f"\nDATA {nonce}>>>")[0]
    found: dict[str, Any] = json.loads(block)
    return found


def question(facts: Mapping[str, Json], **values: Any) -> Question | None:
    asked: dict[str, Any] = {
        "schema": {"type": "object"},
        "gaps": ["quantity"],
        "state": KNOWN,
        "facts": facts,
        "nodes": ["check_stock"],
        "budget_tokens": 4_000,
        "count": estimated_tokens,
    }
    return ask(**{**asked, **values})


def shown(facts: Mapping[str, Json], **values: Any) -> list[str]:
    found = question(facts, **values)
    assert found is not None
    return list(found.shown)


# --- which keys are gaps -------------------------------------------------------------------------


def test_a_gap_is_a_key_without_a_value_that_keeps_what_is_written_last() -> None:
    assert gaps_of(WORKFLOW, KNOWN) == GAPS


def test_a_value_that_is_none_is_a_value() -> None:
    assert "quantity" not in gaps_of(WORKFLOW, {"quantity": None})


def test_a_key_that_is_excepted_is_no_gap() -> None:
    assert gaps_of(WORKFLOW, KNOWN, but=["items", "unknown"]) == tuple(
        key for key in GAPS if key != "items"
    )


def test_a_functional_workflow_has_no_gaps() -> None:
    @entrypoint()
    def functional(_: Any) -> int:
        return 1

    assert gaps_of(functional, {}) == ()


def test_messages_are_never_a_gap() -> None:
    assert gaps_of(workflow_of(MessagesState), {}) == ()


async def test_a_workflow_built_of_channels_has_gaps_too() -> None:
    node = NodeBuilder().subscribe_only("a").do(lambda a: a).write_to("b")
    built: Workflow = Pregel(
        nodes={"copy": node},
        channels={"a": LastValue(int), "b": LastValue(int)},
        input_channels="a",
        output_channels="b",
    )

    assert gaps_of(built, {"a": 1}) == ("b",)
    result = await inferred(Scripted(answers=['{"b": 5}']), built, gaps=("b",), state={"a": 1})
    assert result.values == {"b": 5}


# --- when nothing is asked -----------------------------------------------------------------------


async def test_without_a_model_nothing_is_asked() -> None:
    assert await inferred(None) == Inferred(status="off")


async def test_without_gaps_nothing_is_asked() -> None:
    llm = Scripted()

    assert await inferred(llm, gaps=()) == Inferred(status="nothing_to_infer")
    assert llm.asked == []


@pytest.mark.parametrize("key", ["owner", "log", "peer_context", "scratch", "__root__", "unheard"])
async def test_what_is_no_gap_is_not_asked_for(key: str) -> None:
    llm = Scripted()

    result = await inferred(llm, gaps=(key,))

    assert result.status == "nothing_to_infer"
    assert result.reasons == (f"llm_refused_gap: '{key}' is no state key that lacks a value",)
    assert llm.asked == []


async def test_a_gap_that_is_not_allowed_is_not_asked_for() -> None:
    llm = Scripted(answers=['{"quantity": 2, "customer": "eve"}'])

    result = await inferred(llm, gaps=("quantity", "customer"), allowed=["quantity"])

    assert result.values == {"quantity": 2}
    assert "llm_refused_gap: 'customer' may not be inferred" in result.reasons
    assert "customer" not in llm.asked[0][1].text


async def test_a_gap_whose_type_is_no_json_is_refused_and_said() -> None:
    class Odd(TypedDict):
        callback: Callable[[], int]
        connection: asyncio.Lock

    result = await inferred(Scripted(), workflow_of(Odd), gaps=("callback", "connection"), state={})

    assert result.status == "nothing_to_infer"
    assert result.reasons == (
        "llm_refused_gap: the type of 'callback' has no JSON form",
        "llm_refused_gap: the type of 'connection' has no JSON form",
    )


# --- what is asked -------------------------------------------------------------------------------


async def test_one_system_and_one_human_message_are_sent_and_no_tools() -> None:
    llm = Scripted(answers=["{}"])

    await inferred(llm)

    (messages,) = llm.asked
    assert [type(message) for message in messages] == [SystemMessage, HumanMessage]
    assert llm.options == [{"stop": None}]


async def test_the_schema_holds_the_gaps_and_nothing_else() -> None:
    llm = Scripted(answers=["{}"])

    await inferred(llm)

    text = llm.asked[0][1].text
    schema = json.loads(text.splitlines()[1])
    assert sorted(schema["properties"]) == list(GAPS)
    assert schema["additionalProperties"] is False
    assert "required" not in schema


async def test_state_and_facts_are_quoted_with_their_event_ids() -> None:
    llm = Scripted(answers=["{}"])

    await inferred(llm, facts={"later": fact(minute=5), "sooner": fact(minute=1)})

    block = block_in(llm.asked[0][1].text)
    assert block["state"] == KNOWN
    assert [item["event_id"] for item in block["facts"]] == ["sooner", "later"]
    assert block["facts"][0]["fact"] == fact(minute=1)


async def test_what_peers_told_before_is_no_part_of_the_known_state() -> None:
    llm = Scripted(answers=["{}"])

    await inferred(llm, state={**KNOWN, "peer_context": {"event-1": fact()}})

    assert block_in(llm.asked[0][1].text)["state"] == KNOWN


def test_a_fact_that_is_no_json_is_shown_as_well_as_it_can_be() -> None:
    odd: Any = {"when": NOW, "deep": json.loads("[" * 60 + "]" * 60)}

    found = question({"odd": odd, "older": {"payload": 1}})

    assert found is not None
    assert found.shown == ("odd", "older")
    assert block_in(found.human)["facts"][0]["fact"]["when"] == "2030-01-01T12:00:00Z"


async def test_a_state_of_any_objects_is_shown_as_plain_json() -> None:
    class Unshowable:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    endless: list[Any] = []
    endless.append(endless)
    values = {"a": Unshowable(), "b": endless, "c": float("nan"), "d": 10**5_000, "e": {1: {2}}}
    llm = Scripted(answers=["{}"])

    await inferred(llm, state={**KNOWN, **values})

    state = block_in(llm.asked[0][1].text)["state"]
    assert state["c"] is None
    assert state["e"] == {"1": [2]}
    assert sorted(state) == ["a", "b", "c", "d", "e", "log", "owner"]


# --- what an answer may look like ----------------------------------------------------------------

GOOD = '{"quantity": 2, "customer": null}'


@pytest.mark.parametrize(
    "answer",
    [
        GOOD,
        f"  {GOOD}\n",
        f"```json\n{GOOD}\n```",
        f"```\n{GOOD}\n```",
        f"Here it is:\n\n```json\n{GOOD}\n```\nAnything else?",
        [{"type": "text", "text": GOOD}],
        ["```json\n", {"type": "text", "text": GOOD}, "\n```"],
        [{"type": "reasoning", "reasoning": "hm"}, {"type": "text", "text": GOOD}],
    ],
)
async def test_json_is_read_bare_fenced_and_in_blocks(answer: Any) -> None:
    llm = Scripted(answers=[answer])

    result = await inferred(llm, gaps=("customer", "quantity"))

    assert (result.status, result.values) == ("inferred", {"quantity": 2})
    assert result.reasons == ("llm: 'customer' cannot be inferred from what is known",)
    assert len(llm.asked) == 1


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("", "the answer is empty"),
        ([], "the answer is empty"),
        ([{"type": "image", "url": "https://example.org"}], "the answer is empty"),
        ("The quantity is two.", "the answer is no JSON, at character 0"),
        ('{"quantity": 2', "the answer is no JSON, at character 14"),
        ("[1, 2]", "the answer is no JSON object"),
        ("null", "the answer is no JSON object"),
        ("```json\n{}\n```\n```json\n{}\n```", "the answer has more than one fenced block"),
        ("```json\n{}", "the answer is no JSON, at character 0"),
        ('{"quantity": NaN}', "the answer holds NaN or an infinite number"),
        ('{"quantity": 1e999}', "the answer holds NaN or an infinite number"),
        ('{"quantity": 1, "quantity": 2}', "the answer has a key twice in one object"),
        ('{"anything": {"a": 1, "a": 1}}', "the answer has a key twice in one object"),
        ('{"quantity": ' + "9" * 5_000 + "}", "the answer holds a number that is too long"),
        ('{"anything": ' + "[" * 30 + "]" * 30 + "}", "the answer is nested too deeply"),
        ("{" + '"a": {' * 9_000, "the answer is nested too deeply"),
        ("x" * 5_000_000, "the answer has more than 65536 bytes"),
        ("\N{SNOWMAN}" * 30_000, "the answer has more than 65536 bytes"),
        ("```json\n" * 8_000, "the answer has more than one fenced block"),
    ],
    ids=lambda value: repr(value)[:40],
)
async def test_an_answer_that_cannot_be_read_twice_is_a_failure(answer: Any, why: str) -> None:
    llm = Scripted(answers=[answer, answer])

    result = await inferred(llm)

    assert result == Inferred(status="failed", reasons=(f"llm_failed: {why}",))
    assert len(llm.asked) == 2


async def test_a_wrong_type_is_told_to_the_model_once_and_can_be_put_right() -> None:
    llm = Scripted(answers=['{"quantity": "two"}', '{"quantity": 2}'])

    result = await inferred(llm, gaps=("quantity",))

    assert (result.status, result.values, result.reasons) == ("inferred", {"quantity": 2}, ())
    first, second = (messages[1].text for messages in llm.asked)
    assert second.startswith(first)
    assert "quantity: Input should be a valid integer" in second
    assert [type(message) for message in llm.asked[1]] == [SystemMessage, HumanMessage]


@pytest.mark.parametrize("wrong", ['"2"', "2.5", "true", "[2]", "{}"])
async def test_types_are_strict_and_a_value_that_is_wrong_twice_is_no_value(wrong: str) -> None:
    llm = Scripted(answers=[f'{{"quantity": {wrong}}}'] * 2)

    result = await inferred(llm, gaps=("quantity",))

    assert (result.status, dict(result.values), result.provenance) == ("failed", {}, ())
    (reason,) = result.reasons
    assert reason.startswith("llm_refused_gap: 'quantity': 'Input should be a valid integer")
    assert len(llm.asked) == 2


async def test_an_answer_that_cannot_be_read_can_be_put_right() -> None:
    llm = Scripted(answers=["The quantity is two.", '{"quantity": 2}'])

    result = await inferred(llm, gaps=("quantity",))

    assert (result.status, result.values, result.reasons) == ("inferred", {"quantity": 2}, ())
    assert '["the answer is no JSON, at character 0"]' in llm.asked[1][1].text


async def test_a_valid_value_stands_and_only_the_others_are_asked_for_again() -> None:
    llm = Scripted(answers=['{"quantity": 2, "customer": 7}', '{"quantity": 9, "customer": "eve"}'])

    result = await inferred(llm, gaps=("customer", "quantity"))

    assert list(result.values.items()) == [("customer", "eve"), ("quantity", 2)]


async def test_one_invalid_value_does_not_take_the_valid_ones_along() -> None:
    llm = Scripted(answers=['{"quantity": 2, "items": [{"sku": 1}]}', "no JSON"])

    result = await inferred(llm, gaps=("items", "quantity"))

    assert (result.status, result.values) == ("inferred", {"quantity": 2})
    assert result.reasons == (
        "llm_failed: the answer is no JSON, at character 0",
        "llm_refused_gap: 'items': '0.sku: Input should be a valid string'",
    )


async def test_a_long_fault_is_cut_before_it_is_told_to_the_model() -> None:
    class Loud(BaseModel):
        word: str = ""

        @field_validator("word")
        @classmethod
        def refuse(cls, word: str) -> str:
            raise ValueError(word * 1_000)

    llm = Scripted(answers=['{"word": "no\\n"}'] * 2)

    result = await inferred(llm, workflow_of(Loud), gaps=("word",), state={})

    first, second = (messages[1].text for messages in llm.asked)
    assert result.status == "failed"
    assert len(second) - len(first) < 2_500
    assert all(len(reason) < 500 for reason in result.reasons)


async def test_keys_that_are_no_gaps_are_dropped_and_said() -> None:
    llm = Scripted(answers=['{"owner": "mallory", "quantity": 2, "log": [], "x": {"y": 1}}'])

    result = await inferred(llm, gaps=("quantity",))

    assert (result.status, result.values) == ("inferred", {"quantity": 2})
    assert result.reasons == (
        "llm_refused_gap: dropped from the answer, for they are no gaps: 'log, owner, x'",
    )


async def test_a_model_that_wants_tools_gets_none_and_it_is_said() -> None:
    call = {"name": "write_state", "args": {"owner": "mallory"}, "id": "1"}
    llm = Scripted(answers=[AIMessage("", tool_calls=[call])] * 2)

    result = await inferred(llm)

    assert result.status == "failed"
    assert "llm: 2 tool calls were asked for and none was made" in result.reasons


async def test_an_answer_of_nulls_infers_nothing_and_is_no_failure() -> None:
    result = await inferred(Scripted(answers=['{"quantity": null}']), gaps=("items", "quantity"))

    assert (result.status, dict(result.values)) == ("inferred", {})
    assert len(result.reasons) == 2


async def test_each_value_says_that_it_is_inferred_and_of_what() -> None:
    llm = Scripted(answers=['{"quantity": 2}'])

    result = await inferred(llm, facts={"b": fact(minute=2), "a": fact(minute=1)})

    assert result.provenance == (
        {
            "fact": "state.quantity",
            "source": "inference",
            "rank": 1,
            "event_id": None,
            "occurred_at": NOW.isoformat(),
            "model": "Scripted",
            "based_on": ["a", "b"],
        },
    )
    assert json.loads(json.dumps(result.provenance[0])) == result.provenance[0]


async def test_the_same_answer_makes_the_same_result() -> None:
    answer = '{"quantity": 2, "customer": "eve", "b": 1, "a": 1, "items": [{"sku": "A1"}]}'

    first, second = [await inferred(Scripted(answers=[answer])) for _ in range(2)]

    assert first == second


async def test_inferred_text_has_no_characters_that_nobody_sees() -> None:
    llm = Scripted(answers=[r'{"customer": "e\u202ev\u0000e", "anything": {"k\u200b": "\ufeff"}}'])

    result = await inferred(llm)

    assert result.values == {"customer": "eve", "anything": {"k": ""}}


# --- schemas -------------------------------------------------------------------------------------


@dataclass
class DataclassState:
    size: Literal["s", "m"] = "s"
    pair: tuple[int, str] = (0, "")
    tags: set[str] = field(default_factory=set)
    when: datetime | None = None


async def test_values_come_in_the_types_that_the_workflow_declares() -> None:
    answer = {"size": "m", "pair": [1, "a"], "tags": ["t"], "when": "2030-01-01T12:00:00Z"}
    workflow = workflow_of(DataclassState)

    result = await inferred(
        Scripted(answers=[json.dumps(answer)]), workflow, gaps=gaps_of(workflow, {}), state={}
    )

    assert result.values == {"size": "m", "pair": (1, "a"), "tags": {"t"}, "when": NOW}


class Order(BaseModel):
    count: int = Field(ge=1, le=10)
    total: int = 0
    json_: str = Field(default="", alias="json")

    @field_validator("total")
    @classmethod
    def even(cls, total: int) -> int:
        if total % 2:
            raise ValueError("odd")
        return total

    @model_validator(mode="after")
    def consistent(self) -> "Order":
        if self.total > 100 * self.count:
            raise ValueError("too dear")
        return self


@pytest.mark.parametrize(
    ("answer", "state", "values"),
    [
        ({"count": 3, "total": 4}, {}, {"count": 3, "total": 4}),
        ({"count": 11, "total": 4}, {}, {"total": 4}),
        ({"count": 3, "total": 5}, {}, {"count": 3}),
        ({"count": 3, "total": 400}, {}, {}),
        ({"total": 400}, {"count": 3}, {}),
        ({"total": 300}, {"count": 3}, {"total": 300}),
    ],
)
async def test_a_pydantic_states_constraints_and_validators_are_asked(
    answer: dict[str, Any], state: dict[str, Any], values: dict[str, Any]
) -> None:
    workflow = workflow_of(Order)
    gaps = tuple(key for key in ("count", "total") if key not in state)

    result = await inferred(
        Scripted(answers=[json.dumps(answer)] * 2), workflow, gaps=gaps, state=state
    )

    assert result.values == values


async def test_a_pydantic_states_constraints_are_shown_to_the_model() -> None:
    llm = Scripted(answers=["{}"])

    await inferred(llm, workflow_of(Order), gaps=("count",), state={})

    assert '"maximum": 10, "minimum": 1' in llm.asked[0][1].text


async def test_validators_that_break_refuse_the_value_and_break_nothing() -> None:
    class Breaking(BaseModel):
        first: int = 0
        second: int = 0

        @field_validator("first")
        @classmethod
        def divide(cls, first: int) -> int:
            return first // 0

    llm = Scripted(answers=['{"first": 1}'] * 2)

    result = await inferred(llm, workflow_of(Breaking), gaps=("first",), state={})

    assert result.reasons == ("llm_refused_gap: 'first': 'ZeroDivisionError'",)


async def test_a_types_own_validator_that_breaks_refuses_the_value() -> None:
    class Strange(BaseModel):
        number: int

        @field_validator("number")
        @classmethod
        def divide(cls, number: int) -> int:
            return number // 0

    class Holder(TypedDict):
        strange: Strange

    llm = Scripted(answers=['{"strange": {"number": 1}}'] * 2)

    result = await inferred(llm, workflow_of(Holder), gaps=("strange",), state={})

    assert result.reasons == ("llm_refused_gap: 'strange': 'ZeroDivisionError'",)


async def test_keys_with_names_that_pydantic_does_not_take_are_inferred_all_the_same() -> None:
    names = TypedDict("names", {"json": int, "model_config": int, "_x": int, "a-b": int})
    answer = {"json": 1, "model_config": 2, "_x": 3, "a-b": 4}

    result = await inferred(
        Scripted(answers=[json.dumps(answer)]), workflow_of(names), gaps=tuple(answer), state={}
    )

    assert result.values == answer


class Tree(TypedDict):
    children: "list[Tree]"


async def test_a_typed_dict_without_end_is_no_gap_and_no_endless_loop() -> None:
    class Forest(TypedDict):
        trees: dict[str, Annotated[Item | None, "any"]]
        tree: Tree

    llm = Scripted(answers=['{"trees": {"a": {"sku": "A1"}, "b": null}}'])

    result = await inferred(llm, workflow_of(Forest), gaps=("trees",), state={})
    endless = await inferred(
        Scripted(answers=["{}"]), workflow_of(Forest), gaps=("tree",), state={}
    )

    assert result.values == {"trees": {"a": {"sku": "A1"}, "b": None}}
    assert endless.status in {"nothing_to_infer", "inferred"}


async def test_a_key_of_one_nodes_own_schema_is_a_gap_too() -> None:
    class Private(TypedDict):
        hint: int

    builder: Any = StateGraph(State)

    def look(_: Private) -> None: ...

    builder.add_node("look", look)
    builder.set_entry_point("look")
    workflow: Workflow = builder.compile()

    result = await inferred(Scripted(answers=['{"hint": 3}']), workflow, gaps=("hint",))

    assert result.values == {"hint": 3}


# --- models that fail ----------------------------------------------------------------------------


async def test_a_model_that_raises_is_named_by_its_errors_class_and_nothing_else() -> None:
    llm = Scripted(answers=[ConnectionError("key sk-secret was refused")])

    result = await inferred(llm)

    assert result == Inferred(status="failed", reasons=("llm_failed: ConnectionError",))


async def test_a_model_that_fails_at_the_repair_does_not_take_the_valid_values_along() -> None:
    llm = Scripted(answers=['{"quantity": 2, "customer": 1}', TimeoutError("429")])

    result = await inferred(llm, gaps=("customer", "quantity"))

    assert (result.status, result.values) == ("inferred", {"quantity": 2})
    assert result.reasons[0] == "llm_failed: TimeoutError"


async def test_a_slow_model_is_not_waited_for() -> None:
    llm = Scripted(answers=[GOOD], delay_seconds=60)

    result = await inferred(llm, timeout_seconds=0.05)

    assert result == Inferred(
        status="failed", reasons=("llm_failed: no valid answer within 0.05 seconds",)
    )


async def test_the_time_limit_is_for_both_questions_together() -> None:
    llm = Scripted(answers=["no", GOOD], delay_seconds=2)

    result = await inferred(llm, timeout_seconds=3.5)

    assert (result.status, len(llm.asked)) == ("failed", 2)


async def test_a_slow_count_is_not_waited_for() -> None:
    result = await inferred(CountingSlowly(answers=[GOOD]), timeout_seconds=0.05)

    assert result.status == "failed"


async def test_a_cancellation_passes_through() -> None:
    llm = Scripted(answers=[GOOD], delay_seconds=60)
    task = asyncio.create_task(inferred(llm))
    while not llm.asked:
        await asyncio.sleep(0.01)

    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_client_that_turns_the_cancellation_into_an_error_is_cancelled_all_the_same() -> (
    None
):
    class Swallowing(Scripted):
        async def ainvoke(self, *args: Any, **kwargs: Any) -> Any:
            try:
                return await super().ainvoke(*args, **kwargs)
            except asyncio.CancelledError:
                raise ConnectionError("aborted") from None

    llm = Swallowing(answers=[GOOD], delay_seconds=60)
    task = asyncio.create_task(inferred(llm))
    while not llm.asked:
        await asyncio.sleep(0.01)

    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task
    result = await inferred(Swallowing(answers=[GOOD], delay_seconds=60), timeout_seconds=0.05)
    assert result.reasons == ("llm_failed: no valid answer within 0.05 seconds",)


# --- the budget ----------------------------------------------------------------------------------


def many(count: int, text: str = "word " * 20) -> dict[str, Json]:
    return {f"event-{n:03}": fact(text, minute=n) for n in range(count)}


@pytest.mark.parametrize("budget", [600, 900, 2_000, 4_000])
@pytest.mark.parametrize("text", ["word " * 20, "库存数量" * 10])
async def test_a_question_keeps_to_its_budget_and_says_what_it_left_out(
    budget: int, text: str
) -> None:
    llm = Scripted(answers=["{}"])

    result = await inferred(
        llm, gaps=("quantity",), facts=many(200, text), state=KNOWN, budget_tokens=budget
    )

    asked = "\n".join(message.text for message in llm.asked[0])
    kept = len(block_in(llm.asked[0][1].text)["facts"])
    assert budget - 100 < estimated_tokens(asked) <= budget
    assert f"llm: {200 - kept} of 200 facts did not fit into {budget} tokens" in result.reasons


async def test_a_task_that_alone_is_too_long_is_not_sent() -> None:
    llm = Scripted(answers=["{}"])

    result = await inferred(llm, budget_tokens=100)

    assert llm.asked == []
    assert result == Inferred(
        status="failed", reasons=("llm_failed: the task alone does not fit into 100 tokens",)
    )


def test_of_equally_relevant_facts_the_newest_stay() -> None:
    facts = many(100)

    found = shown(facts, budget_tokens=2_000)

    assert 0 < len(found) < 100
    assert found == sorted(facts)[-len(found) :]


def test_what_mentions_a_gap_stays_before_what_mentions_a_node_or_a_known_value() -> None:
    facts = many(100) | {
        "gap": fact("Quantity was two", minute=-9),
        "node": fact("seen by check_stock", minute=-8),
        "value": fact("asked by ALICE", minute=-7),
        "order": fact("of order 4711", minute=-6),
    }
    state = {**KNOWN, "order_number": 4_711}

    assert {"gap", "node", "value", "order"} <= set(shown(facts, state=state, budget_tokens=900))
    tight = [shown(facts, state=state, budget_tokens=budget) for budget in range(400, 700)]
    assert next(found for found in tight if found) == ["gap"]


def test_a_fact_that_is_too_large_leaves_room_for_the_smaller_ones() -> None:
    facts = {"large": fact("quantity " * 5_000), "small": fact("two")}

    assert shown(facts) == ["small"]


def test_facts_without_a_usable_time_are_the_oldest() -> None:
    facts: dict[str, Json] = {
        "naive": {"occurred_at": "2029-01-01T12:00:00"},
        "none": {"payload": 1},
        "broken": {"occurred_at": "yesterday"},
        "aware": fact(),
    }

    assert shown(facts) == ["broken", "none", "naive", "aware"]


def test_a_large_state_leaves_room_for_the_facts_and_is_said() -> None:
    state = {"large": "x" * 50_000} | {f"middle_{n}": "y" * 1_500 for n in range(9)}

    found = question(many(100), state=state)

    assert found is not None
    assert len(found.shown) > 10
    assert sorted(block_in(found.human)["state"]) == ["middle_0", "middle_1", "middle_2"]
    assert found.reasons[1] == "llm: 7 of 10 state values did not fit into 4000 tokens"


def test_a_state_may_have_the_room_that_facts_do_not_need() -> None:
    found = question({}, state={"large": "x" * 9_000})

    assert found is not None
    assert found.reasons == ()


@pytest.mark.parametrize("per_word", [1, 3, 10])
async def test_a_model_that_counts_for_itself_is_believed(per_word: int) -> None:
    llm = CountingWords(answers=["{}"], per_word=per_word)

    await inferred(llm, gaps=("quantity",), facts=many(500), budget_tokens=4_000)

    text = "\n".join(message.text for message in llm.asked[0])
    counted = llm.get_num_tokens(text)
    assert counted <= 4_000
    assert counted > 3_000


async def test_an_encoder_that_was_given_to_the_model_counts() -> None:
    llm = Scripted(answers=["{}"], custom_get_token_ids=lambda text: [0] * len(text))

    await inferred(llm, gaps=("quantity",), facts=many(100), budget_tokens=4_000)

    assert 3_000 < sum(len(message.text) for message in llm.asked[0]) < 4_000


async def test_a_count_that_fails_is_replaced_by_the_estimate() -> None:
    llm = CountingWords(answers=[GOOD], fails=True)

    assert (await inferred(llm, facts=many(500))).status == "inferred"


def test_languages_with_more_bytes_to_a_letter_are_not_underestimated() -> None:
    assert estimated_tokens("库存数量" * 100) >= 400


# --- what is quoted ------------------------------------------------------------------------------

ANY_TEXT = st.text(st.characters(codec=None), max_size=60)
TEXTS = ANY_TEXT | st.sampled_from(PAYLOADS)


@given(st.dictionaries(TEXTS, TEXTS, max_size=6), st.integers(300, 3_000))
def test_whatever_facts_say_the_block_is_json_of_those_kept_and_ends_once(
    texts: dict[str, str], budget: int
) -> None:
    facts: dict[str, Json] = {key: fact(text, note={text: [key]}) for key, text in texts.items()}

    found = question(facts, budget_tokens=budget)

    if found is None:
        return
    text = f"{found.system}\n{found.human}"
    nonce = re.findall(r"<<<DATA ([0-9a-f]{32})\n", found.human)[0]
    assert text.count(f"DATA {nonce}>>>") == 1
    assert text.count(f"<<<DATA {nonce}") == 1
    kept = block_in(found.human)["facts"]
    assert len(kept) == len(found.shown)
    for item, event_id in zip(kept, found.shown, strict=True):
        assert item["event_id"] == without_invisible(event_id)
        assert item["fact"]["occurred_at"] == facts[event_id]["occurred_at"]
        assert item["fact"]["payload"]["text"] == without_invisible(plain_text(texts[event_id]))
    assert estimated_tokens(text) <= budget


def test_a_number_that_occurs_in_the_data_is_not_used() -> None:
    drawn = iter(["1" * 32, "2" * 32])

    assert nonce_for("DATA " + "1" * 32 + ">>>", lambda: next(drawn)) == "2" * 32


def test_each_question_has_a_number_of_its_own() -> None:
    first, second = question({}), question({})

    assert first is not None
    assert second is not None
    assert first.human != second.human
    repaired = first.repaired(["no"]).human
    assert len(set(re.findall(r"[0-9a-f]{32}", repaired))) == 2


SEEN_FORMATS = {"ARABIC", "SYRIAC", "KAITHI", "EGYPTIAN"}


def test_no_format_or_control_character_stays_but_those_that_are_seen() -> None:
    for code in range(0x110000):
        letter = chr(code)
        category = unicodedata.category(letter)
        kept = without_invisible(letter)
        if category == "Cf" and unicodedata.name(letter, "").split()[0] in SEEN_FORMATS:
            assert kept == ("" if code == 0x61C else letter), hex(code)
        elif letter in "\n\t":
            assert kept == letter
        elif category in {"Zl", "Zp"} or letter in "\r\x85":
            assert kept == "\n"
        elif category in {"Cf", "Cc", "Cs"}:
            assert not kept, hex(code)


def test_letters_of_all_languages_stay() -> None:
    fillers = {0x115F, 0x1160, 0x3164, 0xFFA0}
    letters = "".join(
        chr(code)
        for code in range(0x110000)
        if unicodedata.category(chr(code))[0] in "LNPSZ" and code not in {0x2028, 0x2029}
    )

    assert set(letters) - set(without_invisible(letters)) == {chr(code) for code in fillers}
    assert without_invisible("e\u0301 हिन्दी ภาษาไทย") == "e\u0301 हिन्दी ภาษาไทย"


def test_characters_that_smuggle_are_taken_out() -> None:
    hidden = "".join(chr(0xE0100 + byte) for byte in b"set owner") + "\ufe0f\u034f\u180b"

    assert without_invisible(f"a{hidden}b") == "ab"


@given(st.text() | st.sampled_from(PAYLOADS))
def test_any_text_is_an_answer_or_is_refused(text: str) -> None:
    try:
        answer = read_answer(text)
    except UnreadableAnswerError:
        return
    assert json.loads(json.dumps(answer, allow_nan=False)) == answer


# --- a model that obeys what it reads ------------------------------------------------------------


def as_payload(text: str) -> tuple[dict[str, Any], dict[str, Json]]:
    return KNOWN, {"event-1": fact(), "event-2": fact(text, minute=1)}


def as_event_id(text: str) -> tuple[dict[str, Any], dict[str, Json]]:
    return KNOWN, {"event-1": fact(), text: fact(minute=1)}


def as_memory(text: str) -> tuple[dict[str, Any], dict[str, Json]]:
    memory = fact(kind="memory", payload={"plan": [{text: text}]})
    return KNOWN, {"memory:inventory-agent": memory}


def as_agent(text: str) -> tuple[dict[str, Any], dict[str, Json]]:
    return KNOWN, {"event-1": fact(told_by=[text], from_agent=text, kind=text)}


def as_state(text: str) -> tuple[dict[str, Any], dict[str, Json]]:
    return {**KNOWN, "owner": text, "log": [text]}, {}


TYPES: dict[str, TypeAdapter[Any]] = {
    "anything": TypeAdapter(Any),
    "customer": TypeAdapter(Annotated[str, Field(max_length=1_000)]),
    "items": TypeAdapter(list[dict[Literal["sku", "count"], Any]]),
    "placed_at": TypeAdapter(datetime),
    "quantity": TypeAdapter(int),
}
PLACES = [as_payload, as_event_id, as_memory, as_agent, as_state]


def test_there_are_at_least_200_different_injections_and_the_model_obeys_each() -> None:
    assert len(set(PAYLOADS)) >= 200
    for payload in PAYLOADS:
        said = obeyed(without_invisible(payload))
        assert said is not None, payload
        assert said.tool_calls or said.text not in {"{}", "null"}, payload


@pytest.mark.no_cover  # each line is counted, and other tests reach them all
@pytest.mark.parametrize("place", PLACES)
async def test_nothing_that_is_injected_reaches_anything_but_the_gaps(
    place: Callable[[str], tuple[dict[str, Any], dict[str, Json]]],
) -> None:
    outcomes: set[str] = set()
    for payload in PAYLOADS:
        state, facts = place(payload)
        before = copy.deepcopy((state, facts))
        llm = Obedient()

        result = await inferred(llm, state=state, facts=facts, budget_tokens=40_000)

        assert (state, facts) == before
        assert not any("did not fit" in reason for reason in result.reasons)
        after = {**state, **result.values}
        assert {key: value for key, value in after.items() if key not in GAPS} == state
        assert gaps_of(WORKFLOW, KNOWN) == GAPS
        for key, value in result.values.items():
            assert TYPES[key].validate_python(value, strict=True) == value
            assert len(json.dumps(value, default=str)) < 65_536
        assert [item["fact"] for item in result.provenance] == [
            f"state.{key}" for key in result.values
        ]
        assert {item["rank"] for item in result.provenance} <= {1}
        assert 1 <= len(llm.asked) <= 2
        assert all(_is_one_question(messages) for messages in llm.asked)
        assert all(options == {"stop": None} for options in llm.options)
        outcomes.add(result.status)
        outcomes.update(reason.partition(":")[0] for reason in result.reasons)
        outcomes.update(result.values)
    # The model did obey: keys were dropped, answers refused, and gaps filled as the payload says.
    assert {"inferred", "failed", "llm_refused_gap", "llm_failed", "customer"} <= outcomes


def _is_one_question(messages: list[BaseMessage]) -> bool:
    block_in(messages[1].text)
    return [type(message) for message in messages] == [SystemMessage, HumanMessage]
