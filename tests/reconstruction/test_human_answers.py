"""What humans say of effects in doubt: of which, to which question, and until when."""

import asyncio
import operator
from collections.abc import AsyncIterator
from typing import Annotated, Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.types import Send
from owning import AGENT, AT, GHOST, THREAD, new_run, newest, until
from typing_extensions import TypedDict

from langgraph_peerctx import background, effect
from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.durability.admission import packed_config
from langgraph_peerctx.durability.run_effects import About, RunEffects
from langgraph_peerctx.errors import ConfigurationError, InDoubtError
from langgraph_peerctx.owned import own_runs
from langgraph_peerctx.persistence.effect_ledger import Effect
from langgraph_peerctx.persistence.incidents import ControlDatabase, Incident
from langgraph_peerctx.reconstruction import recoverer
from langgraph_peerctx.reconstruction.answering import aanswer_recovery
from langgraph_peerctx.reconstruction.human_answers import (
    answer_of,
    see_that_it_is_understood,
    what_to_settle,
)
from langgraph_peerctx.reconstruction.recovery import recover_and_resume_workflow_async

pytestmark = pytest.mark.usefixtures("_no_runtime_left", "_runtime_stopped")


@pytest.fixture
async def _runtime_stopped(_no_runtime_left: None) -> AsyncIterator[None]:
    yield
    background.stop_kept_runtime()


class State(TypedDict, total=False):
    n: int
    log: Annotated[list[Any], operator.add]


class KilledError(BaseException):
    """Leaves what a kill would leave."""


class Shop:
    """Takes orders; of those that are to fail nobody knows whether they came."""

    def __init__(self, *failing: Any, error: BaseException | None = None) -> None:
        self.calls: list[Any] = []
        self.failing = {*failing}
        self.error = error or TimeoutError()

    async def order(self, what: Any) -> Any:
        self.calls.append(what)
        if what in self.failing:
            # All that stand in one superstep have been called before the first one fails.
            async with asyncio.timeout(5):
                while not self.failing <= {*self.calls}:
                    await asyncio.sleep(0)
            self.failing.discard(what)
            raise self.error
        return {"order": what}


class Breaks:
    """A node that raises as often as it is told to."""

    def __init__(self, times: int) -> None:
        self.left = times

    def __call__(self, _state: State) -> Any:
        self.left -= 1
        if self.left >= 0:
            raise ValueError("the printer")
        return {"log": ["billed"]}


def sends(shop: Shop, *, breaks: Breaks | None = None) -> Any:
    """A workflow that orders twice under one name.

    The second `Send` bills, too: when the first one is finished, and that is written down.
    """
    saver = InMemorySaver()

    def is_written() -> bool:
        found = saver.get_tuple(AT)
        return found is not None and any(name == "log" for _, name, _ in found.pending_writes or ())

    async def work(state: State) -> Any:
        told = await effect("order", shop.order, state["n"])
        if breaks is None or state["n"] == 0:
            return {"log": [told]}
        await until(is_written)
        return {"log": [told, *breaks(state)["log"]]}

    builder = StateGraph(State)
    builder.add_node("plan", lambda _: {})
    builder.add_node("work", work)
    builder.add_edge(START, "plan")
    builder.add_conditional_edges("plan", lambda _: [Send("work", {"n": i}) for i in range(2)])
    return builder.compile(checkpointer=saver, name="launch")


def in_line(*nodes: Any) -> Any:
    builder = StateGraph(State)
    names = [f"node {number}" for number in range(len(nodes))]
    for name, node, before in zip(names, nodes, [START, *names], strict=False):
        builder.add_node(name, node)
        builder.add_edge(before, name)
    return builder.compile(checkpointer=InMemorySaver(), name="launch")


def orders(shop: Shop, name: str = "order", **terms: Any) -> Any:
    async def order(_: State) -> Any:
        return {"log": [await effect(name, shop.order, name, **terms)]}

    return order


def side_by_side(shop: Shop, *names: str) -> Any:
    builder = StateGraph(State)
    for name in names:
        builder.add_node(name, orders(shop, name))
        builder.add_edge(START, name)
    return builder.compile(checkpointer=InMemorySaver(), name="launch")


async def fail(app: Any, error: type[Exception] = TimeoutError) -> Any:
    """Run it as a process that lives, and sees it fail."""
    owned = own_runs(app, agent_id=AGENT)
    with pytest.raises(error):
        await owned.ainvoke({"log": ["in"]}, AT)
    return owned


async def lose(control: ControlDatabase, app: Any) -> None:
    """Run it as a process that dies in its effects."""
    lease = control.admit(new_run(app, durability="sync", config=packed_config(app, {})), GHOST)
    about = About(agent_id=AGENT, thread_id=THREAD, run_id="r1", epoch=lease.epoch)
    effects = RunEffects(control, about, incarnation=GHOST.incarnation)
    place = effects.go_along({**AT, "metadata": {"run_id": "r1"}})
    with pytest.raises(KilledError):
        await app.ainvoke({"log": ["in"]}, place, durability="sync")


async def recover(app: Any, answers: Any = None, **more: Any) -> Any:
    return await recover_and_resume_workflow_async(
        workflow=app,
        agent_id=AGENT,
        thread_id=THREAD,
        answers=answers,
        use_peer_context=False,
        **more,
    )


def known(control: ControlDatabase) -> list[Effect]:
    """The effects of the newest run, in the order of their places."""
    found = control.effects_of(AGENT, THREAD, newest(control).run_id)
    return sorted(found, key=lambda effect: (effect.position, effect.name))


def statuses(control: ControlDatabase) -> list[tuple[str, str | None]]:
    return [(effect.status, effect.source) for effect in known(control)]


def incident_of(control: ControlDatabase) -> Incident:
    found = control.incident_of(AGENT, THREAD)
    assert found is not None
    return found


async def asked_something_else(control: ControlDatabase, app: Any, before: Any) -> Any:
    """Return the question that follows one, when its incident's next attempt has come."""
    async with asyncio.timeout(20):
        while True:
            await recover(app)
            now: Any = incident_of(control).question
            if now is not None and now["question_id"] != before["question_id"]:
                return now
            await asyncio.sleep(0.05)


async def test_an_answer_by_the_name_of_several_says_nothing_of_an_earlier_answer(
    control: ControlDatabase,
) -> None:
    shop = Shop(0, 1)
    app = await fail(sends(shop))
    first, second = known(control)
    result = await recover(app, {first.key: {"happened": True, "reply": "came"}})
    assert result["status"] == "in_doubt"
    with pytest.raises(ConfigurationError, match="'order' is the name of several"):
        await recover(app, {"order": False})
    assert statuses(control) == [("done", "human"), ("intent", None)]
    result = await recover(app, {second.key: False})
    assert result["final_state"]["log"] == ["in", "came", {"order": 1}]
    assert sorted(shop.calls) == [0, 1, 1]


async def test_where_several_have_a_name_each_question_says_where_and_needs_the_key(
    control: ControlDatabase,
) -> None:
    app = sends(Shop(0, 1, error=KilledError()))
    await lose(control, app)
    assert (await recover(app))["status"] == "waiting_for_human"
    incident = incident_of(control)
    question: Any = incident.question
    first, second = known(control)
    for one in (first, second):
        line = f"Did 'order' ({one.key}, at {one.position}) happen? It names no peer"
        assert line in question["question"]
    assert {e["answer_with"] for e in question["effects"]} == {first.key, second.key}
    assert "'order' names several: of these, the full key" in question["how_to_answer"]
    with pytest.raises(ConfigurationError, match="'order' is the name of several"):
        await aanswer_recovery(incident.incident_id, {"order": True})
    control.settle_effect(first, "seen", "peer")
    after = await asked_something_else(control, app, question)
    assert second.position in after["question"], "what is settled has its name all the same"


async def test_a_correction_that_comes_too_late_is_not_written_and_is_said(
    control: ControlDatabase,
) -> None:
    shop = Shop("order")
    app = await fail(in_line(orders(shop), Breaks(2)))
    assert (await recover(app, {"order": True}))["status"] == "failed"
    result = await recover(app, {"order": True})
    assert not [reason for reason in result["reasons"] if reason.startswith("too_late: ")]
    assert result["status"] == "failed", "what was said before may be said again"
    result = await recover(app, {"order": False})
    (late,) = [reason for reason in result["reasons"] if reason.startswith("too_late: ")]
    assert "'order' (order@" in late
    assert "the workflow is past it" in late
    assert statuses(control) == [("done", "human")]
    assert (result["status"], result["degraded"]) == ("resumed", True)
    assert shop.calls == ["order"]


async def test_a_correction_about_a_send_that_has_finished_comes_too_late(
    control: ControlDatabase,
) -> None:
    shop = Shop(0, 1)
    app = await fail(sends(shop, breaks=Breaks(1)))
    first, second = known(control)
    result = await recover(app, {first.key: True, second.key: True})
    assert result["status"] == "failed"
    result = await recover(app, {first.key: False, second.key: False})
    late = [reason for reason in result["reasons"] if reason.startswith("too_late: ")]
    assert len(late) == 1
    assert first.key in late[0]
    assert [e.status for e in known(control)] == ["done", "done"]
    assert shop.calls[2:] == [1]


async def test_what_others_have_told_meanwhile_outranks_an_answer_and_is_said(
    control: ControlDatabase,
) -> None:
    shop = Shop("order")
    app = await fail(in_line(orders(shop)))
    control.settle_effect(known(control)[0], "seen", "peer", {"order": 7})
    result = await recover(app, {"order": False})
    assert [r for r in result["reasons"] if "too_late: " in r and "its peer has told" in r]
    assert result["final_state"]["log"] == ["in", {"order": 7}]


async def test_a_doubt_of_the_thread_is_asked_about_by_the_run_that_comes_to_it(
    control: ControlDatabase,
) -> None:
    shop = Shop("order")
    app = in_line(orders(shop, scope="thread"))
    await fail(app)
    (before,) = known(control)
    await fail(app, InDoubtError)
    (effect_now,) = known(control)
    assert effect_now.run_id == newest(control).run_id != before.run_id
    assert effect_now.key == before.key
    assert (await recover(app))["status"] == "waiting_for_human"
    result = await recover(app, {"order": {"happened": True, "reply": 7}})
    assert result["status"] == "resumed"
    assert result["final_state"]["log"][-1] == 7
    assert shop.calls == ["order"]


async def test_a_doubt_of_the_thread_is_answered_before_a_run_comes_to_it(
    control: ControlDatabase,
) -> None:
    shop = Shop("order")
    breaks = Breaks(0)
    app = in_line(breaks, orders(shop, scope="thread"))
    await fail(app)
    breaks.left = 1
    await fail(app, ValueError)
    result = await recover(app, {"order": {"happened": True, "reply": 7}})
    assert result["status"] == "resumed"
    assert result["final_state"]["log"][-1] == 7
    assert statuses(control) == [("done", "human")]
    assert shop.calls == ["order"]


async def test_a_bare_answer_is_about_the_one_that_the_question_names(
    control: ControlDatabase,
) -> None:
    shop = Shop("a", "b", error=KilledError())
    app = side_by_side(shop, "a", "b")
    await lose(control, app)
    await recover(app)
    incident = incident_of(control)
    question: Any = incident.question
    with pytest.raises(ConfigurationError, match="does not say of which effect"):
        await aanswer_recovery(incident.incident_id, True)  # noqa: FBT003 - the answer
    control.settle_effect(known(control)[1], "seen", "peer", "told")
    question = await asked_something_else(control, app, question)
    assert [e["name"] for e in question["effects"]] == ["a"]
    await aanswer_recovery(incident.incident_id, True)  # noqa: FBT003 - the answer
    assert (await recover(app))["status"] == "resumed"
    assert statuses(control) == [("done", "human"), ("done", "peer")]


async def test_a_bare_answer_to_a_question_about_two_is_never_used_for_one(
    control: ControlDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recoverer, "FIRST_RETRY_SECONDS", 60)  # the answer alone brings the next
    app = side_by_side(Shop("a", "b", error=KilledError()), "a", "b")
    await lose(control, app)
    await recover(app)
    incident = incident_of(control)
    control.answer(incident.incident_id, True)  # noqa: FBT003 - unseen by who would refuse it
    control.settle_effect(known(control)[1], "seen", "peer", "told")
    for _ in range(2):
        assert (await recover(app))["status"] == "waiting_for_human"
        assert statuses(control) == [("intent", None), ("done", "peer")]
    now: Any = incident_of(control).question
    assert now["question"].startswith("True is no answer. Did 'a' happen?")
    await aanswer_recovery(incident.incident_id, {"a": False})
    assert (await recover(app))["status"] == "resumed"


async def test_an_answer_to_a_question_of_before_is_not_applied(control: ControlDatabase) -> None:
    app = side_by_side(Shop("a", "b", error=KilledError()), "a", "b")
    await lose(control, app)
    await recover(app)
    incident = incident_of(control)
    control.settle_effect(known(control)[1], "seen", "peer", "told")
    await asked_something_else(control, app, incident.question)
    with pytest.raises(ConfigurationError, match="asks something else by now: see `peerctx"):
        control.answer(incident.incident_id, {"a": True}, question=incident.question)
    assert statuses(control) == [("intent", None), ("done", "peer")]


async def test_an_answer_counts_for_the_question_and_the_attempt_that_it_was_given_to(
    control: ControlDatabase,
) -> None:
    app = side_by_side(Shop("a", "b", error=KilledError()), "a", "b")
    await lose(control, app)
    await recover(app)
    incident = incident_of(control)
    incident = control.answer(incident.incident_id, {"a": True, "b": False})
    first, second = known(control)

    def used(**changed: Any) -> set[str]:
        given: Any = {**vars_of(incident), **changed}
        return {*answer_of(Incident(**given), [first], [first, second])}

    assert used() == {first.key}
    other = what_to_settle([first], among=[first, second], asked=False)
    assert used(question=other) == set()
    assert used(question=None) == set()
    begun_anew: Any = dict(incident.question or {})
    begun_anew["effects"] = [{**e, "attempt": 7} for e in begun_anew["effects"]]
    assert used(question=begun_anew) == set()
    bare = {"value": True, "question_id": other["question_id"]}
    assert used(question=None, answer=bare) == {first.key}, "it is what would be asked now"


def vars_of(incident: Incident) -> dict[str, Any]:
    return {name: getattr(incident, name) for name in Incident.__slots__}


def asking(*effects: Any) -> Any:
    return {"effects": effects, "how_to_answer": "?"}


FIRST, SECOND = ({"key": f"order@{number}", "name": "order"} for number in (1, 2))
ONE, TWO = asking(FIRST), asking(FIRST, SECOND)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        (ONE, {"order": {"happened": True, "number": 7}}),
        (ONE, {"happened": True, "result": {"number": 7}}),
        (ONE, {"happened": False, "reply": {"number": 7}}),
        (ONE, {"order": {"happened": {"approve": True}}}),
        (ONE, {"order": True, "order@1": False}),
        (ONE, {"order": True, "ordr": True}),
        (ONE, {1: True}),
        (ONE, []),
        (TWO, {"order": True}),
        (TWO, {"order@1": True, "order": False}),
        (TWO, True),
        (TWO, {"happened": True}),
    ],
)
def test_an_answer_of_which_a_part_is_none_is_refused_whole(question: Any, answer: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"is no answer about 'order.*: true if it happ"):
        see_that_it_is_understood(question, answer)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        (ONE, {"happened": True, "reply": {"number": 7}}),
        (ONE, {"order": {"happened": "no"}}),
        (ONE, "seen"),
        (TWO, {"order@1": True, "order@2": False}),
        (TWO, {"order@2": {"happened": True, "reply": None}}),
    ],
)
def test_an_answer_is_accepted_by_what_the_question_names(question: Any, answer: Any) -> None:
    see_that_it_is_understood(question, answer)


@pytest.mark.parametrize("effects", [[], [FIRST], [FIRST, SECOND]])
def test_to_approve_a_resume_is_no_answer_about_the_effects_that_are_shown(effects: Any) -> None:
    question = {"question": "Resume the workflow with this?", "effects": effects}
    see_that_it_is_understood(question, True)  # noqa: FBT003 - the answer
    with pytest.raises(ConfigurationError, match="is no answer: Resume"):
        see_that_it_is_understood(question, {"order@1": True})


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        ({"ordr": True}, "'ordr' is none of them"),
        ({"order": True, "ordr": True}, "'ordr' is none of them"),
        ({"order": "perhaps"}, "'perhaps' does not say whether it happened"),
        ({"order": {"happened": True, "number": 7}}, "does not say whether it happened, and with"),
        ({"happened": True}, "it does not say of which effect"),
    ],
)
async def test_by_hand_an_answer_that_is_none_is_refused_and_the_thread_stays_free(
    control: ControlDatabase, answers: Any, why: str
) -> None:
    shop = Shop("order")
    app = await fail(in_line(orders(shop)))
    with pytest.raises(ConfigurationError, match=f"{why}.*is no answer about 'order': true if"):
        await recover(app, answers)
    assert statuses(control) == [("intent", None)]
    lease = control.lease_of(AGENT, THREAD)
    assert lease is not None
    assert lease.owner_id is None
    assert (await recover(app, {"order": True}))["status"] == "resumed"
    assert shop.calls == ["order"]


async def test_by_hand_an_answer_about_a_run_without_effects_is_refused(
    control: ControlDatabase,
) -> None:
    breaks = Breaks(1)
    app = await fail(in_line(breaks), ValueError)
    with pytest.raises(ConfigurationError, match="about anything: no effect is known"):
        await recover(app, {"order": True})
    assert newest(control).end_kind == "raised"
    assert (await recover(app))["status"] == "resumed"


async def test_by_hand_a_first_answer_that_is_none_leaves_a_lost_run_asking(
    control: ControlDatabase,
) -> None:
    shop = Shop("order", error=KilledError())
    app = in_line(orders(shop))
    await lose(control, app)
    result = await recover(app, {"ordr": True})
    assert result["status"] == "waiting_for_human"
    assert "{'ordr': True} is no answer. Did 'order' happen?" in result["reasons"][0]
    with pytest.raises(ConfigurationError, match="'ordr' is none of them"):
        await recover(app, {"ordr": True})
    incident = incident_of(control)
    assert (incident.status, incident.answer) == ("waiting_for_human", None)
    assert statuses(control) == [("intent", None)]
    assert (await recover(app, {"order": {"happened": True, "reply": 7}}))["status"] == "resumed"
    assert shop.calls == ["order"]


async def test_by_hand_an_answer_does_not_wait_for_the_next_attempt(
    control: ControlDatabase,
) -> None:
    shop = Shop("order")
    app = in_line(orders(shop))
    await fail(app)
    owned = own_runs(app, agent_id=AGENT)
    with pytest.raises(InDoubtError):
        await owned.ainvoke(None, AT)
    lost = control.open_run(AGENT, THREAD)
    assert lost is not None
    control.note(lost, {"status": "failed", "reasons": []}, again_seconds=600)
    result = await recover(app)
    assert result["status"] == "recovering_elsewhere"
    result = await recover(app, {"order": {"happened": True, "reply": 7}})
    assert result["status"] == "resumed"
    assert shop.calls == ["order"]


@pytest.mark.parametrize("answers", [{"order": True}, {"no such key": True}])
async def test_by_hand_answers_about_a_run_of_which_no_record_is_left_are_refused(
    control: ControlDatabase, settings: PeerContextSettings, monkeypatch: Any, answers: Any
) -> None:
    monkeypatch.setenv("PEER_CONTEXT_CONTROL_DATABASE_URL", settings.control_url)
    shop = Shop()
    app = in_line(orders(shop))
    began: Any = {"initial_state": {"log": ["in"]}}
    with pytest.raises(ConfigurationError, match="no effect of it is known yet: recover without"):
        await recover(app, answers, **began)
    assert app.get_state(AT).values == {}
    assert control.lease_of(AGENT, THREAD) is None
    assert (await recover(app, **began))["status"] == "in_doubt"
    result = await recover(app, {"order": {"happened": True, "reply": 7}}, **began)
    assert result["final_state"]["log"] == ["in", 7]
    assert shop.calls == []


@pytest.mark.parametrize("is_lost", [True, False])
async def test_what_a_human_has_answered_is_not_called_unknown_any_more(
    control: ControlDatabase, *, is_lost: bool
) -> None:
    shop = Shop("order", error=KilledError() if is_lost else None)
    app = in_line(orders(shop))
    await (lose(control, app) if is_lost else fail(app))
    asked = await recover(app)
    assert "Did 'order' happen?" in asked["reasons"][0]
    result = await recover(app, {"order": False})
    assert result["status"] == "resumed"
    assert [reason for reason in result["reasons"] if reason.startswith("in_doubt")] == []
    assert shop.calls == ["order", "order"]


@pytest.mark.parametrize("answers", [True, "yes", [1]])
async def test_by_hand_answers_are_a_dict(answers: Any) -> None:
    with pytest.raises(ConfigurationError, match="expected a dict from each effect's key"):
        await recover(in_line(Breaks(0)), answers)


async def test_by_hand_a_first_call_may_answer_what_only_the_recovery_knows(
    control: ControlDatabase,
) -> None:
    shop = Shop("order", error=KilledError())
    app = in_line(orders(shop))
    await lose(control, app)
    result = await recover(app, {"order": {"happened": True, "reply": 7}})
    assert result["final_state"]["log"] == ["in", 7]
    assert shop.calls == ["order"]
