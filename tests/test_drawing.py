"""Pictures: well-formed, harmless whatever peers wrote, readable on white and on black."""

import copy
import re
from datetime import UTC, datetime, timedelta
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from langgraph_peerctx import drawing
from langgraph_peerctx.drawing import Drawing, draw_incident, draw_recovery, draw_states, text
from langgraph_peerctx.gathering.peer_context import Coverage, Fact, PeerContext
from langgraph_peerctx.protocol.messages import Interaction

NOW = datetime(2026, 1, 1, 12, 30, 15, tzinfo=UTC)
HOSTILE = "</td><script>alert(1)</script><img src=x onerror='alert(2)'>\x00\x1b]\u202e\"&"
TAGS = {
    *("div", "table", "tr", "th", "td", "span", "b", "details", "summary"),
    *("svg", "text", "rect", "title"),
}

INCIDENT: dict[str, Any] = {
    "incident_id": "i-1",
    "agent_id": "product-agent",
    "thread_id": "launch-1",
    "run_id": None,
    "started_at": NOW.isoformat(),
    "elapsed_seconds": 0.5,
    "status": "resumed",
    "steps": [
        {
            "step": step,
            "started_at": NOW.replace(microsecond=100_000 * number).isoformat(),
            "elapsed_seconds": 0.1,
            "outcome": outcome,
            "detail": {"facts": number},
        }
        for number, (step, outcome) in enumerate(
            [("load_checkpoint", "done"), ("collect_context", "failed"), ("resume", "done")]
        )
    ],
    "checkpoint": None,
    "coverage": Coverage(asked=("a", "b"), answered=("a",), silent=("b",)).as_json(),
    "conflicts": [{}],
    "in_doubt": [],
    "provenance": [
        {
            "fact": "state.shelf",
            "source": "checkpoint",
            "rank": 1,
            "event_id": "c",
            "occurred_at": NOW.isoformat(),
        },
        {
            "fact": "event.e1",
            "source": "peer",
            "rank": 3,
            "event_id": "e1",
            "occurred_at": NOW.isoformat(),
            "told_by": ["a", "b"],
        },
    ],
}
RESULT: dict[str, Any] = {
    "recovered": True,
    "status": "resumed",
    "peer_context_used": True,
    "degraded": True,
    "reasons": ["silent: b"],
    "final_state": {"shelf": "A7", "units": 3},
    "incident": INCIDENT,
}


def context(**changes: Any) -> PeerContext:
    told = Interaction(
        interaction_id="e1",
        thread_id="launch-1",
        from_agent="product-agent",
        to_agent="a",
        kind="order",
        payload={"units": 3},
        occurred_at=NOW,
    )
    fields: dict[str, Any] = {
        "correlation_id": "c",
        "failed_agent_id": "product-agent",
        "thread_id": "launch-1",
        "gathered_at": NOW,
        "facts": (Fact(interaction=told.model_copy(update=changes), told_by=("a", "b")),),
        "memory": {"b": {"liked": "umbrellas"}},
        "coverage": Coverage(
            asked=("a", "b", "c"), answered=("a", "b"), silent=("c",), late=2, roster_known=True
        ),
        "degraded": ("silent: c",),
    }
    return PeerContext(**fields)


def words(html: str) -> str:
    """What a reader sees; fails where it is not well-formed, or holds a tag that we do not use."""
    tree = ET.fromstring(f"<body>{html}</body>")  # noqa: S314 - our own, and that is the test
    for element in tree.iter():
        name = element.tag.rpartition("}")[2]
        assert name in TAGS | {"body"}, name
        assert not any(attribute.startswith("on") for attribute in element.attrib)
    return " ".join(" ".join(tree.itertext()).split())


def shown(picture: object) -> str:
    return words(picture._repr_html_())  # type: ignore[attr-defined]  # what Jupyter calls


def test_who_knew_what_is_shown_with_how_much_of_the_truth_it_is() -> None:
    seen = shown(context())
    assert seen.startswith("What peers remember of product-agent in launch-1 ⚠ silent: c")
    assert (
        'when kind between what a b 12:30:15.000 order product-agent → a {"units": 3} ✓ ✓' in seen
    )
    assert 'b remembers beside: {"liked": "umbrellas"}' in seen
    assert seen.endswith("not complete this may not be everything answered: a, b silent: c 2 late")


def test_a_complete_coverage_says_so_and_an_unknown_roster_too() -> None:
    whole = Coverage(asked=("a",), answered=("a",), roster_known=True)
    assert shown(whole) == "complete everybody was asked and has told all answered: a"
    assert "who should answer was not known" in shown(Coverage(answered=("a",)))


def test_an_incident_is_a_bar_a_step_on_one_axis() -> None:
    picture = draw_incident(INCIDENT)
    seen = shown(picture)
    assert "product-agent in launch-1 : resumed after 0.500 s (i-1)" in seen
    assert "restored: 1 from checkpoint 1 from peer 1 conflicts" in seen
    bars = re.findall(r"<rect x='([\d.]+)'[^>]* width='([\d.]+)'[^>]*fill='([^']+)'", picture.html)
    assert [float(x) for x, _, _ in bars] == [150.0, 290.0, 430.0]
    assert {float(width) for _, width, _ in bars} == {140.0}
    assert [fill for _, _, fill in bars] == [drawing.GOOD, drawing.BAD, drawing.GOOD]


def test_an_incident_that_came_to_nothing_is_shown_too() -> None:
    bare = {**INCIDENT, "steps": [], "coverage": None, "provenance": [], "conflicts": []}
    assert shown(draw_incident(bare)).startswith("product-agent in launch-1 : resumed")


def moment(seconds: float) -> str:
    return (NOW + timedelta(seconds=seconds)).isoformat()


TIMES: dict[str, Any] = {
    "last_heartbeat_at": moment(-4),
    "known_at": moment(-1),
    "why": "silent",
    "claimed_at": moment(0),
    "requested_at": moment(0.1),
    "answers": [
        {
            "responder_id": "host-a",
            "agents": {"a": "context"},
            "at": moment(0.2),
            "after_seconds": 0.1,
        },
        {"responder_id": "host-b", "agents": {"b": "nothing"}, "at": moment(1)},
    ],
    "reconstructed_at": moment(2),
    "resumed_at": moment(3),
    "first_checkpoint_at": None,
    "ended_at": moment(6),
    "clocks": "one",
}


def test_an_incident_is_a_timeline_from_the_last_heartbeat_to_its_end() -> None:
    picture = draw_incident({**INCIDENT, "times": TIMES})
    seen = shown(picture)
    assert "last heartbeat 12:30:11.000 , noticed: silent known" in seen
    rows = re.findall(
        r"(known|claimed|asked|answered|reconstructed|resumed|ended|first checkpoint)</text>"
        r"<rect x='([\d.]+)' y='\d+' width='([\d.]+)'",
        picture.html,
    )
    assert rows == [
        ("known", "150.0", "126.0"),
        ("claimed", "276.0", "42.0"),
        ("asked", "318.0", "4.2"),
        ("answered", "322.2", "37.8"),
        ("reconstructed", "360.0", "42.0"),
        ("resumed", "402.0", "42.0"),
        ("ended", "444.0", "126.0"),
    ]
    marks = re.findall(r"<rect x='([\d.]+)' y='\d+' width='2'[^>]*><title>([^<]*)", picture.html)
    assert marks == [
        ("325.4", "host-a answered after 100.0 ms (a: context)"),
        ("359.0", "host-b answered (b: nothing)"),
    ]
    assert "host-a answered after 100.0 ms (a: context) host-b answered (b: nothing)" in seen
    assert "clocks" not in seen


def test_clocks_that_disagree_draw_nothing_backwards_and_are_said_to_be_several() -> None:
    early = {**TIMES["answers"][0], "at": moment(-9)}
    times = {
        **TIMES,
        "known_at": moment(-9),
        "answers": [early, *TIMES["answers"]],
        "resumed_at": moment(1.5),
        "clocks": "several",
    }
    steps = [{**INCIDENT["steps"][0], "started_at": moment(-9)}, *INCIDENT["steps"]]
    picture = draw_incident({**INCIDENT, "steps": steps, "times": times})
    assert not re.search(r">-\d", picture.html)
    assert "these are the clocks of several hosts" in shown(picture)
    places = re.findall(r"<rect x='([\d.-]+)' y='\d+' width='([\d.-]+)'", picture.html)
    assert all(float(x) >= 149 and float(width) >= 2 for x, width in places)


@pytest.mark.parametrize("times", [None, {}, dict.fromkeys(TIMES), {"answers": []}])
def test_an_incident_whose_times_are_not_known_is_its_steps(times: Any) -> None:
    assert draw_incident({**INCIDENT, "times": times}).html == draw_incident(INCIDENT).html


@pytest.mark.parametrize(
    ("status", "recovered", "colour"),
    [
        ("resumed", True, drawing.GOOD),
        ("already_finished", False, drawing.GOOD),
        ("waiting_for_human", False, drawing.WARN),
        ("failed", False, drawing.BAD),
    ],
)
def test_a_recovery_shows_how_it_ended_and_where_each_fact_comes_from(
    status: str,
    recovered: bool,  # noqa: FBT001 - pytest hands it over by name
    colour: str,
) -> None:
    picture = draw_recovery({**RESULT, "status": status, "recovered": recovered})
    seen = shown(picture)
    assert seen.startswith(f"{status} with what peers know ⚠ silent: b")
    assert "state.shelf checkpoint 12:30:15.000 event.e1 peer a, b 12:30:15.000" in seen
    assert "final state key value shelf A7 units 3" in seen
    assert picture.html.index(colour) < picture.html.index(status)


@pytest.mark.parametrize("state", [None, "text", ["a", 1]])
def test_a_final_state_that_is_no_mapping_is_shown_as_it_is(state: object) -> None:
    assert "final state" in shown(draw_recovery({**RESULT, "final_state": state}))


def test_states_stand_side_by_side_and_differences_are_marked() -> None:
    seen = shown(draw_states({"one": {"a": 1, "b": 2}, "two": {"a": 1, "b": 3, "c": None}}))
    assert seen == "one two equal a 1 1 ✓ b 2 3 ≠ c — null ≠"


@pytest.mark.parametrize("place", ["payload", "kind"])
def test_what_a_peer_wrote_is_shown_and_never_obeyed(place: str) -> None:
    value = {"said": HOSTILE} if place == "payload" else HOSTILE
    seen = shown(context(**{place: value}))
    assert "<script>alert(1)</script>" in seen


def test_foreign_text_is_harmless_wherever_it_stands_in_a_result() -> None:
    def poisoned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: poisoned(item) for key, item in value.items()}
        if isinstance(value, list):
            return [poisoned(item) for item in value]
        return HOSTILE if value == "resumed" or value in {"a", "b", "A7", "silent: b"} else value

    result = poisoned(copy.deepcopy(RESULT))
    assert shown(draw_recovery(result)).count("<script>") >= 5
    answer = {**TIMES["answers"][0], "responder_id": HOSTILE, "agents": {HOSTILE: HOSTILE}}
    times = {**TIMES, "why": HOSTILE, "answers": [answer]}
    assert shown(draw_incident({**INCIDENT, "times": times})).count("<script>") >= 5


@given(st.text(), st.integers(1, 50))
def test_any_text_becomes_harmless_text_of_bounded_length(anything: str, limit: int) -> None:
    seen = words(f"<b>{text(anything, limit)}</b>")
    assert len(seen) <= limit + 1


def test_long_tables_are_cut_and_say_so() -> None:
    seen = shown(draw_states({"one": {f"key-{n}": n for n in range(drawing.MAX_ROWS + 5)}}))
    assert seen.endswith("and 5 more")


def luminance(colour: str) -> float:
    """Of a colour as #rrggbb, as WCAG 2 defines it."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("page", ["#ffffff", "#111111"])
def test_every_colour_is_read_on_a_light_and_on_a_dark_page(page: str) -> None:
    for colour in (drawing.GOOD, drawing.WARN, drawing.BAD, drawing.MUTED):
        lighter, darker = sorted((luminance(colour), luminance(page)), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 4, colour
    timed = draw_incident({**INCIDENT, "times": {**TIMES, "clocks": "several"}})
    for html in (draw_recovery(RESULT).html, timed.html, context()._repr_html_()):
        used = set(re.findall(r"(?:fill|color)[:=]'?(#\w+|\w+)", html))
        known = {drawing.GOOD, drawing.WARN, drawing.BAD, drawing.MUTED, *drawing.SOURCES.values()}
        assert used <= known | {"inherit", "currentColor"}


def test_a_drawing_is_its_html() -> None:
    assert Drawing("<b>x</b>")._repr_html_() == "<b>x</b>"
