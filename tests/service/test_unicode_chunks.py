"""However an answer is cut into tokens and turns: the pieces are the whole, the counts add up."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from router.api.rest.app import create_app
from router.config import Settings
from router.core.events import Reason
from router.text.tokenizer import Tokenizer
from shards.engines.scripted_text import CHAT_TEMPLATE, Script
from shards.v1.shard_pb2 import TokenLogprobs
from tests.service import scripted_core, ways
from tests.service.fake_service import FakeMetrics
from tests.service.fakes import PATIENCE_S
from tests.service.rest_server import Current
from tests.service.vocabularies import byte_level, gemma, llama2
from tests.service.ways import Said, Way, Wish

EXACT = Tokenizer.from_files(Script().files())
"""Gives every text back; the others have tokens that are no text alone."""
TOKENIZERS = {
    make.__name__: Tokenizer(make(), chat_template=CHAT_TEMPLATE)
    for make in (byte_level, llama2, gemma)
}
EOS = 100_000
"""No token of any of them."""
ONE_ANSWER: tuple[Way, ...] = (
    *(ways.native, ways.compat, ways.native_stream),
    *(ways.completions, ways.completions_stream, ways.chat, ways.chat_stream),
    *(ways.responses, ways.responses_stream, ways.messages, ways.messages_stream),
)
SERVICE, FLEET = Current(), Current()
APP = create_app(SERVICE, FLEET, FakeMetrics(), Settings())  # type: ignore[arg-type]


@dataclass
class Desk:
    """As much of a house as a way over REST needs: the application, called directly."""

    client: httpx.AsyncClient = field(
        default_factory=lambda: httpx.AsyncClient(
            transport=httpx.ASGITransport(APP), base_url="http://test"
        )
    )

    async def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return await self.client.post(path, json=body)


@dataclass(frozen=True)
class Told:
    """What a client was told, beside what the core was given."""

    said: Said
    prompt: int


async def ask(way: Way, tokenizer: Tokenizer, turns: Sequence[Sequence[int]]) -> Told:
    """Asks one way, while the core delivers these tokens, one list in each turn."""
    async with asyncio.timeout(PATIENCE_S), scripted_core.house(tokenizer, (EOS,)) as small:
        SERVICE.target, FLEET.target = small.service, small.fleet
        desk = Desk()
        wish = Wish("x", max(1, sum(map(len, turns))))
        call = asyncio.create_task(way(desk, wish))  # type: ignore[arg-type]
        arrival = asyncio.create_task(small.submission())
        await asyncio.wait((call, arrival), return_when=asyncio.FIRST_COMPLETED)
        if not arrival.done():
            arrival.cancel()
            raise AssertionError(f"it was refused: {await call}")
        (submitted,) = small.core.submitted
        for number, turn in enumerate(turns, 1):
            scores = [TokenLogprobs(logprob=-0.5)] * len(turn)
            close = Reason.LENGTH if number == len(turns) else None
            small.say(submitted.request, turn, close, logprobs=scores)
            await small.settle()
        said = await call
        await desk.client.aclose()
        return Told(said, len(submitted.prompt))


def cut(ids: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """The ids in turns of these sizes, over and over."""
    turns, at, number = [], 0, 0
    while at < len(ids):
        size = sizes[number % len(sizes)]
        turns.append(list(ids[at : at + size]))
        at, number = at + size, number + 1
    return turns


SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@pytest.mark.parametrize("way", ONE_ANSWER, ids=lambda way: way.__name__)
@given(text=st.text(min_size=1, max_size=30), sizes=SIZES)
@examples(max_examples=15)
def test_the_pieces_of_any_text_are_the_text(way: Way, text: str, sizes: list[int]) -> None:
    ids = EXACT.encode(text, add_special_tokens=False)
    told = asyncio.run(ask(way, EXACT, cut(ids, sizes)))
    assert told.said.text == text
    assert told.said.completion in (None, len(ids))
    assert told.said.prompt in (None, told.prompt)
    assert told.said.pieces <= len(ids) + 2


@pytest.mark.parametrize("way", ONE_ANSWER, ids=lambda way: way.__name__)
@given(
    name=st.sampled_from(sorted(TOKENIZERS)),
    ranks=st.lists(st.integers(3, 250), min_size=1, max_size=20),
    sizes=SIZES,
)
@examples(max_examples=15)
def test_any_tokens_say_the_same_every_way(
    way: Way, name: str, ranks: list[int], sizes: list[int]
) -> None:
    """Tokens that are no text, too: bytes out of order, characters cut in two."""
    tokenizer = TOKENIZERS[name]
    told = asyncio.run(ask(way, tokenizer, cut(ranks, sizes)))
    assert told.said.text == tokenizer.decode(ranks, skip_special_tokens=True)
    assert told.said.completion in (None, len(ranks))
