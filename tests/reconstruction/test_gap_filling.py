"""A model fills what nothing else has, and is marked; it changes nothing else."""

import operator
import re
from datetime import timedelta
from typing import Annotated, Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from owning import AGENT, AT, THREAD
from reconstruction.fake_runtime import NOW, FakeRuntime, context, interaction
from reconstruction.injections import PAYLOADS
from reconstruction.obedient import Obedient, Scripted

from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.errors import ConfigurationError
from langgraph_peerctx.nodes.state import PeerContextState
from langgraph_peerctx.reconstruction.gap_filling import Inference
from langgraph_peerctx.reconstruction.reconstructor import (
    AgentReconstructor,
    recover_and_resume_workflow_async,
)
from langgraph_peerctx.reconstruction.recovery_graph import create_recovery_graph


class State(PeerContextState, total=False):
    log: Annotated[list[str], operator.add]
    owner: str
    customer: str
    quantity: int
    summary: str


class DiedError(Exception):
    """Leaves what a kill would leave."""


class Case:
    """A workflow that dies in its second node, once."""

    def __init__(self) -> None:
        self.dies = True
        builder = StateGraph(State)
        builder.add_sequence([("first", self.first), ("second", self.second)])
        builder.add_edge(START, "first")
        self.app: Any = builder.compile(checkpointer=InMemorySaver())

    def first(self, _: State) -> Any:
        return {"log": ["first"]}

    def second(self, state: State) -> Any:
        if self.dies:
            self.dies = False
            raise DiedError
        return {"log": [f"second saw {state.get('customer')}, {state.get('quantity')}"]}

    async def die(self) -> None:
        with pytest.raises(DiedError):
            await self.app.ainvoke({"log": ["in"], "owner": "me"}, AT, durability="sync")

    async def recover(self, llm: Any = None, **more: Any) -> Any:
        runtime = more.pop("runtime", None) or FakeRuntime()
        return await recover_and_resume_workflow_async(
            workflow=self.app,
            agent_id=AGENT,
            thread_id=THREAD,
            llm=llm,
            runtime=runtime,
            **more,
        )


def origins(result: Any) -> dict[str, str]:
    return {p["fact"]: p["source"] for p in result["incident"]["provenance"]}


async def test_what_a_lost_run_lacks_is_filled_and_marked() -> None:
    case = Case()
    case.dies = False
    llm = Scripted(answers=['```json\n{"customer": "Ada", "quantity": 2}\n```'])
    result = await case.recover(llm, initial_state={"log": ["in"], "owner": "me"})
    assert result["status"] == "restarted"
    state = result["final_state"]
    assert (state["customer"], state["quantity"], state["owner"]) == ("Ada", 2, "me")
    assert state["log"] == ["in", "first", "second saw Ada, 2"]
    marked = origins(result)
    assert (marked["state.customer"], marked["state.quantity"]) == ("inference", "inference")
    assert "state.owner" not in marked


async def test_what_the_caller_gives_is_never_replaced() -> None:
    case = Case()
    case.dies = False
    llm = Scripted(answers=['{"customer": "Mallory", "quantity": 2, "owner": "Mallory"}'])
    given = {"log": ["in"], "owner": "me", "customer": "Ada"}
    result = await case.recover(llm, initial_state=given)
    assert result["final_state"]["customer"] == "Ada"
    assert result["final_state"]["owner"] == "me"
    assert any("customer" in reason for reason in result["reasons"])


async def test_a_checkpoint_has_no_gaps_unless_they_are_named() -> None:
    case = Case()
    await case.die()
    llm = Scripted(answers=[])
    result = await case.recover(llm)
    assert result["status"] == "resumed"
    assert llm.asked == []
    assert result["final_state"]["log"] == ["in", "first", "second saw None, None"]


async def test_a_named_gap_of_a_checkpoint_is_filled_before_the_workflow_goes_on() -> None:
    case = Case()
    await case.die()
    llm = Scripted(answers=['{"customer": "Ada"}'])
    result = await case.recover(llm, infer=["customer"])
    assert result["final_state"]["log"] == ["in", "first", "second saw Ada, None"]
    assert origins(result)["state.customer"] == "inference"
    assert set(result["final_state"]["peer_context"]) == {"order-1"}


async def test_without_peers_a_gap_is_filled_by_an_update_of_its_own() -> None:
    case = Case()
    await case.die()
    llm = Scripted(answers=['{"customer": "Ada"}'])
    nobody = FakeRuntime(answer=context())
    result = await case.recover(llm, infer=["customer"], runtime=nobody)
    assert result["final_state"]["log"] == ["in", "first", "second saw Ada, None"]


@pytest.mark.parametrize("answer", [OSError("secret"), "no json", '{"customer": 7}'])
async def test_a_model_that_fails_changes_nothing_and_is_said(answer: Any) -> None:
    case = Case()
    case.dies = False
    given = {"log": ["in"], "owner": "me"}
    result = await case.recover(Scripted(answers=[answer, answer]), initial_state=given)
    assert result["final_state"]["log"] == ["in", "first", "second saw None, None"]
    assert result["degraded"]
    assert any(reason.startswith("llm") for reason in result["reasons"])
    assert "secret" not in str(result)


async def test_a_model_that_obeys_its_peers_changes_nothing_but_the_gaps() -> None:
    given = {"log": ["in"], "owner": "me"}
    plain = Case()
    plain.dies = False
    untouched = (await plain.recover(initial_state=given))["final_state"]
    for payload in PAYLOADS[::12]:
        case = Case()
        case.dies = False
        runtime = FakeRuntime(answer=context(interaction(payload={"note": payload})))
        result = await case.recover(Obedient(), initial_state=given, runtime=runtime)
        state = result["final_state"]
        assert (state["owner"], state["log"][:2]) == ("me", untouched["log"][:2])
        assert set(state) - set(untouched) <= {"customer", "quantity", "summary"}
        for fact, source in origins(result).items():
            assert source != "inference" or fact.removeprefix("state.") in state


async def test_a_reconstruction_marks_what_was_inferred() -> None:
    case = Case()
    reconstructor = AgentReconstructor(
        workflow=case.app, runtime=FakeRuntime(), llm=Scripted(answers=['{"customer": "Ada"}'])
    )
    found = await reconstructor.reconstruct_async(AGENT, THREAD)
    assert found["inferred"] == {"customer": "Ada"}
    assert found["state"] == {}
    (marked,) = [p for p in found["provenance"] if p["source"] == "inference"]
    assert marked["fact"] == "state.customer"


def told_often() -> FakeRuntime:
    """Return a runtime whose peers remember a hundred orders, one a minute."""
    orders = [
        interaction(f"order-{n:03}").model_copy(update={"occurred_at": NOW + timedelta(minutes=n)})
        for n in range(100)
    ]
    return FakeRuntime(answer=context(*orders))


async def test_a_small_budget_leaves_out_the_older_facts_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = {"log": ["in"], "owner": "me"}
    asked: dict[str, list[str]] = {}
    for tokens in ("1200", "40000"):
        monkeypatch.setenv("PEER_CONTEXT_INFERENCE_TOKENS", tokens)
        case, llm = Case(), Scripted(answers=["{}"])
        case.dies = False
        result = await case.recover(llm, initial_state=given, runtime=told_often())
        asked[tokens] = sorted(set(re.findall(r"order-\d{3}", llm.asked[0][1].text)))
        is_cut = any("did not fit into 1200 tokens" in reason for reason in result["reasons"])
        assert is_cut == (tokens == "1200")
    every = [f"order-{n:03}" for n in range(100)]
    assert asked["40000"] == every
    assert asked["1200"] == every[-len(asked["1200"]) :] != every


async def test_a_model_that_takes_longer_than_allowed_is_waited_for_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PEER_CONTEXT_INFERENCE_TIMEOUT_SECONDS", "0.05")
    case = Case()
    case.dies = False
    llm = Scripted(answers=['{"customer": "Ada"}'], delay_seconds=60)
    result = await case.recover(llm, initial_state={"log": ["in"], "owner": "me"})
    assert result["final_state"]["log"] == ["in", "first", "second saw None, None"]
    assert "llm_failed: no valid answer within 0.05 seconds" in result["reasons"]


async def test_settings_that_are_given_count_and_not_the_environments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PEER_CONTEXT_INFERENCE_TIMEOUT_SECONDS", "60")
    llm = Scripted(answers=[], delay_seconds=60)
    settings = PeerContextSettings(inference_tokens=5_000, inference_timeout_seconds=0.05)
    found = await Inference(llm=llm).fill(Case().app, {}, {}, is_exact=False, settings=settings)
    assert found.reasons == ("llm_failed: no valid answer within 0.05 seconds",)


@pytest.mark.parametrize("make", [create_recovery_graph, AgentReconstructor])
def test_a_key_that_the_state_lacks_is_refused(make: Any) -> None:
    with pytest.raises(ConfigurationError, match="infer= names nothing"):
        make(workflow=Case().app, llm=Scripted(), infer=["nothing"])
    with pytest.raises(ConfigurationError, match="needs llm="):
        make(workflow=Case().app, infer=["customer"])
