"""The table of `peerctx agents`: what is in it, and that it can be read."""

from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console, RenderableType

from langgraph_peerctx.commands.agents import Fitted, _How, is_of_interest
from langgraph_peerctx.commands.naming import doctor_id, is_a_command, looker_id
from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.reconstruction.failure_detector import ProcessState

ALIVE = ProcessState(
    process_id="ip-10-0-12-7-123456",
    incarnation="0123456789abcdef",
    state="alive",
    why="it beats",
    phi=0.0,
    last_heartbeat_seconds=0.4,
    agents=("launcher", "inventory"),
    open_runs=2,
    loop_lag_seconds=0.0,
    supervises=True,
    sentinel_id="sentinel-1",
    holds=1,
)
LOST = replace(
    ALIVE,
    process_id="launcher-2",
    state="unreachable",
    why="silent, but it holds a lease for 5.3 s more",
    last_heartbeat_seconds=None,
    holds=None,
)
LEFT = replace(ALIVE, process_id="gone-1", state="left", holds=0, last_heartbeat_seconds=61.0)
USUAL = _How(is_wide=False, shows_all=False)


def shown(what: RenderableType, width: int = 80, height: int = 25) -> str:
    console = Console(file=StringIO(), width=width, height=height)
    console.print(what)
    return console.file.getvalue()  # type: ignore[attr-defined] # it is ours


def test_in_eighty_columns_no_name_and_no_word_is_broken() -> None:
    out = shown(USUAL.table([ALIVE, LOST]))
    assert max(map(len, out.splitlines())) <= 80
    words = {*ALIVE.agents, "2/1", "2/?", "0.4", "never", *LOST.why.split()}
    assert {ALIVE.process_id, LOST.process_id, "alive", "unreachable", *words} <= set(out.split())
    assert "01234567" not in out


def test_wide_has_the_rest() -> None:
    out = shown(_How(is_wide=True, shows_all=False).table([ALIVE]), width=150)
    for more in ("life", "01234567", "phi", "lag", "supervises", "yes", "sentinel-1"):
        assert more in out.split()


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (ALIVE, True),
        (LEFT, False),
        (replace(LEFT, last_heartbeat_seconds=59.0), True),
        (replace(LEFT, state="dead"), False),
        (replace(LEFT, state="dead", holds=1), True),
        (replace(LEFT, state="dead", holds=None), True),
        (replace(LEFT, state="dead", last_heartbeat_seconds=None), True),
        (replace(LEFT, state="stuck"), True),
        (replace(ALIVE, process_id=looker_id()), False),
        (replace(ALIVE, process_id=doctor_id()), False),
        (replace(ALIVE, process_id="peerctx-supervisor-5d8f-1"), True),  # a pod of that name
    ],
)
def test_of_interest_is(one: ProcessState, expected: object) -> None:
    assert is_of_interest(one) is expected


def test_how_many_are_hidden_is_said_and_all_shows_them() -> None:
    out = shown(USUAL.table([ALIVE, LEFT]))
    assert "gone-1" not in out
    assert out.splitlines()[-1].startswith("1 is hidden")
    everybody = shown(_How(is_wide=False, shows_all=True).table([ALIVE, LEFT]))
    assert "gone-1" in everybody
    assert "hidden" not in everybody


def test_a_screen_that_is_too_low_says_how_much_it_does_not_show() -> None:
    many = [replace(ALIVE, process_id=f"process-{number}") for number in range(20)]
    whole = shown(USUAL.table(many)).splitlines()
    assert [line.rstrip() for line in shown(Fitted(USUAL.table(many)), height=60).splitlines()] == [
        line.rstrip() for line in whole
    ]
    cut = shown(Fitted(USUAL.table(many)), height=10).splitlines()
    assert len(cut) < 10
    assert f"{len(whole) - len(cut) + 1} lines more" in cut[-1]


def test_the_commands_have_legal_ids_of_their_own() -> None:
    for name in (looker_id(), doctor_id()):
        assert is_a_command(name)
        assert PeerContextSettings(process_id=name).process_id == name
