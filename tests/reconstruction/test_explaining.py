"""What is known of a thread, in words: harmless whatever peers wrote, and nothing left out."""

from html.parser import HTMLParser
from typing import Any

import langgraph_peerctx
from langgraph_peerctx import explain_reconstruction
from langgraph_peerctx.reconstruction.explaining import Explanation

AT = "2030-01-01T00:00:00+00:00"
HOSTILE = "</td><script>alert(1)</script>\x1b[2J\u202e"
EVENT = {"kind": "order", "payload": {"units": 3}, "occurred_at": AT}
FOUND: dict[str, Any] = {
    "agent_id": "product",
    "thread_id": "launch",
    "checkpoint": {"checkpoint_id": "c1"},
    "state": {"shelf": "A7"},
    "own_events": [{"interaction_id": "e2", **EVENT, "kind": "plan"}],
    "peer_context": {"e1": {"source": "peer", "told_by": ["inventory"], **EVENT}},
    "coverage": {
        "asked": ["inventory", "pricing"],
        "answered": ["inventory"],
        "silent": ["pricing"],
        "busy": ["marketing"],
        "roster_known": True,
        "complete": False,
    },
    "conflicts": [
        {
            "interaction_id": "e3",
            "versions": {"a": EVENT, "b": {**EVENT, "payload": {"units": 4}}},
        }
    ],
    "in_doubt": [
        {"effect_key": "k1", "agent_id": "payments", "verdict": "seen"},
        {"effect_key": "k9", "agent_id": "payments", "verdict": "cannot_tell"},
    ],
    "effects": [
        {
            "key": "k1",
            "peer": "payments",
            "position": "p",
            "status": "done",
            "source": "peer",
            "verdict": None,
        },
        {
            "key": "k2",
            "name": "mail",
            "peer": None,
            "position": "p",
            "status": "in_doubt",
            "source": None,
            "intent_at": AT,
        },
    ],
    "consumed": [{"peer": "inventory", "interaction_id": "e1", "kind": "order", "occurred_at": AT}],
    "provenance": [
        {"fact": "state.shelf", "source": "checkpoint", "event_id": "c1", "occurred_at": AT},
        {
            "fact": "event.e1",
            "source": "peer",
            "event_id": "e1",
            "occurred_at": AT,
            "told_by": ["inventory"],
        },
        {
            "fact": "event.e2",
            "source": "own",
            "event_id": "e2",
            "occurred_at": AT,
            "told_by": ["product"],
        },
    ],
    "degraded": True,
    "reasons": ["silent: pricing", "this has no word in front: of it"],
}


def of(found: Explanation, about: str) -> list[tuple[str, ...]]:
    return [row[1:] for row in found.rows() if row[0] == about]


def test_each_restored_fact_has_its_value_source_event_and_time() -> None:
    assert of(explain_reconstruction(FOUND), "known") == [
        ("state.shelf", "A7", "checkpoint", "c1", AT),
        ("event.e1", 'order {"units": 3}', "peer: inventory", "e1", AT),
        ("event.e2", 'plan {"units": 3}', "own", "e2", AT),
    ]


def test_conflicts_show_every_version() -> None:
    assert of(explain_reconstruction(FOUND), "conflict") == [
        ("event.e3", 'order {"units": 3}', "a", "e3", AT),
        ("event.e3", 'order {"units": 4}', "b", "e3", AT),
    ]


def test_effects_say_how_each_was_settled_and_by_whom() -> None:
    assert of(explain_reconstruction(FOUND), "effect") == [
        ("k1", "done: payments says seen", "peer: payments", "k1", ""),
        ("mail", "in_doubt", "nobody", "k2", AT),
        ("k9", "payments says cannot_tell", "peer", "k9", ""),
    ]


def test_what_peers_had_taken_and_what_is_not_known_is_said() -> None:
    found = explain_reconstruction(FOUND)
    assert of(found, "consumed") == [("order", "", "inventory", "e1", AT)]
    assert [row[:2] for row in of(found, "unknown")] == [
        ("pricing", "was asked and did not answer"),
        ("marketing", "could not look"),
        ("mail", "nobody could tell whether it happened"),
    ]
    assert [row[:2] for row in of(found, "degraded")] == [
        ("silent", "pricing"),
        ("", "this has no word in front: of it"),
    ]


def test_where_nothing_is_known_that_is_what_is_said() -> None:
    bare = explain_reconstruction({"agent_id": "a", "thread_id": "t"})
    assert [row[:3] for row in bare.rows()] == [
        ("unknown", "checkpoint", "the thread had none: nothing of its state is restored"),
        ("unknown", "peers", "nobody was asked"),
    ]
    asked = explain_reconstruction({**FOUND, "coverage": {"roster_known": False}})
    assert ("unknown", "peers", "who should answer was not known") in [r[:3] for r in asked.rows()]


def test_it_is_read_as_plain_text() -> None:
    text = str(explain_reconstruction(FOUND))
    assert text.startswith(
        "product in launch\n\nWhat is known\n"
        f"  state.shelf: A7 [checkpoint, c1, {AT}]\n"
        f'  event.e1: order {{"units": 3}} [peer: inventory, e1, {AT}]\n'
    )
    assert "\n\nWhat is not known\n  pricing: was asked and did not answer\n" in text
    assert text.endswith("  silent: pricing\n  this has no word in front: of it")


def test_a_record_and_a_whole_result_are_explained_too() -> None:
    record = {
        name: value
        for name, value in FOUND.items()
        if name not in {"state", "own_events", "peer_context", "reasons"}
    }
    named = of(explain_reconstruction(record), "known")
    assert named[0] == ("state.shelf", "", "checkpoint", "c1", AT)
    result = explain_reconstruction({"incident": record, "reasons": ["silent: pricing"]})
    assert of(result, "known") == named
    assert of(result, "degraded") == [("silent", "pricing", "", "", "")]


def hostile(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: hostile(one) for name, one in value.items()}
    if isinstance(value, list):
        return [hostile(one) for one in value]
    return HOSTILE if value in {"A7", "pricing", "payments", "order", "a", "launch"} else value


class Tags(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        del attrs
        self.found.add(tag)


def test_what_anybody_wrote_is_harmless_in_a_terminal_and_in_a_page() -> None:
    found = explain_reconstruction(hostile(FOUND))
    assert str(found).replace("\n", "").isprintable()
    assert "<script>" in str(found)
    html = found._repr_html_()
    assert Tags(html).found <= {"div", "table", "tr", "th", "td"}
    assert "&lt;script&gt;" in html
    assert HOSTILE not in html


def test_long_values_are_cut() -> None:
    found = explain_reconstruction({**FOUND, "state": {"shelf": "x" * 10_000}})
    assert len(str(found)) < 5_000


def test_it_is_published() -> None:
    assert "explain_reconstruction" in langgraph_peerctx.__all__
