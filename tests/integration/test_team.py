"""The team of the demo: an order is done once, and only for whoever owns the launch."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeBroker, FakeTransport

from graphs.team.mail import Mailbox
from graphs.team.peers import do_once, marketing_workflow, times_done
from graphs.team.scenario import MARKETING, PRODUCT, TEAM, mail_topic
from langgraph_peerctx import EffectTicket, EventStore, Receiver, StaleOwnerError

ORDER = {"product": "umbrella"}
SLOGAN = "The umbrella for commuters"


def ticket(epoch: int, key: str = "campaign@1") -> EffectTicket:
    return EffectTicket(
        effect_key=key,
        name="campaign",
        sender_id=PRODUCT,
        thread_id="thread",
        run_id="run",
        epoch=epoch,
    )


@asynccontextmanager
async def serving(url: str) -> AsyncIterator[Mailbox]:
    """A marketing agent at work; yields the product agent's mailbox."""
    broker = FakeBroker(topics={mail_topic(agent_id): [] for agent_id in TEAM})
    with EventStore(url) as store:
        do = partial(do_once, Receiver(MARKETING, store=store), marketing_workflow())
        marketing = Mailbox(MARKETING, FakeTransport(broker), store, do)
        product = Mailbox(PRODUCT, FakeTransport(broker), store)
        for mailbox in (marketing, product):
            await mailbox.open()
        service = asyncio.create_task(marketing.serve())
        try:
            yield product
        finally:
            service.cancel()
            await asyncio.wait({service})


async def test_an_order_that_comes_again_is_answered_and_not_done_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"sqlite:///{tmp_path}/events.db"
    async with serving(url) as product:
        answers: list[Any] = [
            await product.ask(MARKETING, "campaign", ORDER, ticket(epoch)) for epoch in (1, 2)
        ]
    assert answers[0]["slogan"] == SLOGAN
    assert answers[1] == answers[0]
    assert times_done(url, MARKETING, "thread") == 1
    said = [json.loads(line)["event"] for line in capsys.readouterr().out.splitlines()]
    assert said == ["work", "done_already"]


async def test_an_order_of_a_superseded_owner_is_refused_and_the_next_one_is_served(
    tmp_path: Path,
) -> None:
    url = f"sqlite:///{tmp_path}/events.db"
    async with serving(url) as product:
        await product.ask(MARKETING, "campaign", ORDER, ticket(epoch=2))
        with pytest.raises(StaleOwnerError, match="another owner"):
            await product.ask(MARKETING, "campaign", ORDER, ticket(epoch=1, key="campaign@2"))
        await product.ask(MARKETING, "campaign", ORDER, ticket(epoch=2, key="campaign@3"))
    assert times_done(url, MARKETING, "thread") == 2
