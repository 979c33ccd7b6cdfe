"""Log probabilities of a prompt, from the outcome of a worker to the end of an answer."""

import asyncio
import math
from collections.abc import AsyncIterator

import pytest

from router.ask import Ask, Params, TokenOut
from router.core.events import PROMPT_LOGPROBS, Reason
from router.errors import Fault, RequestError
from router.life import step_done
from router.scores import LEAST, PromptScores
from router.text.tokenizer import Tokenizer
from shards.v1.shard_pb2 import Likeliest, Outcome, PromptLogprobs, TokenLogprobs
from tests.service.scripted_core import FEATURES, House, house
from tests.service.vocabularies import SPECIALS, byte_level, byte_level_with_bos

TOKENIZER = Tokenizer(byte_level_with_bos())
BOS, _, EOS = (byte_level().token_to_id(special) for special in SPECIALS)
SCORED = Params(prompt_logprobs=True)
PROMPT = "is Paris 🦄"


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


@pytest.fixture
async def small() -> AsyncIterator[House]:
    async with house(TOKENIZER, (EOS,), features=(*FEATURES, PROMPT_LOGPROBS)) as built:
        yield built


def values_of(tokens: list[int]) -> list[object]:
    return [TokenLogprobs(logprob=-1.0 - index) for index, _ in enumerate(tokens)]


def test_an_outcome_says_them_position_by_position() -> None:
    told = PromptLogprobs(
        sequence=7,
        start=3,
        logprobs=[-1.0, -2.0],
        likeliest=[Likeliest(tokens=[4, 5], values=[-0.5, -1.0]), Likeliest()],
    )
    plain = PromptLogprobs(sequence=8, start=1, logprobs=[-4.0])
    done = step_done("g", Outcome(epoch=1, plan_id=2, prompt_logprobs=[told, plain]))
    assert done.prompts == (
        (
            7,
            3,
            [
                TokenLogprobs(logprob=-1.0, top_tokens=[4, 5], top_values=[-0.5, -1.0]),
                TokenLogprobs(logprob=-2.0),
            ],
        ),
        (8, 1, [TokenLogprobs(logprob=-4.0)]),
    )


def test_ranks_go_beside_them_with_likeliest_ones_and_without() -> None:
    bare = PromptLogprobs(sequence=7, start=1, logprobs=[-1.0, -2.0], ranks=[1, 40_000])
    full = PromptLogprobs(
        sequence=8,
        start=1,
        logprobs=[-1.0, -2.0],
        likeliest=[Likeliest(tokens=[4], values=[-1.0]), Likeliest(tokens=[5], values=[-0.5])],
        ranks=[1, 2],
    )
    found = step_done("g", Outcome(prompt_logprobs=[bare, full])).prompts
    ranks = [[getattr(value, "rank", None) for value in values] for _, _, values in found]
    assert ranks == [[1, 40_000], [1, 2]]
    scores = PromptScores(TOKENIZER, ids("is P")[:3])
    scores.push(found[0][2])
    assert [token.rank for token in scores.tokens] == [0, 1, 40_000]


def test_likeliest_tokens_that_are_too_few_leave_positions_out() -> None:
    """So that the core, which counts them, gives the group up."""
    told = PromptLogprobs(sequence=7, start=1, logprobs=[-1.0, -2.0], likeliest=[Likeliest()])
    ((_, _, values),) = step_done("g", Outcome(prompt_logprobs=[told])).prompts
    assert len(values) == 1


async def test_the_finish_has_the_prompt(small: House) -> None:
    prompt = [BOS, *ids(PROMPT)]
    generation = await small.service.generate(Ask(PROMPT, SCORED))
    await small.submission()
    (submitted,) = small.core.submitted
    assert submitted.needs == (PROMPT_LOGPROBS,)
    assert list(submitted.prompt) == prompt
    values = values_of(prompt[1:])
    small.say(generation.request, prompt=values[:2])
    await small.settle()
    small.say(generation.request, ids("The"), prompt=values[2:])
    small.say(generation.request, [EOS], Reason.EOS)
    await small.settle()
    chunks = [chunk async for chunk in generation]
    finish = chunks[-1].finish
    assert finish is not None
    assert [token.id for token in finish.prompt] == prompt
    assert [token.logprob for token in finish.prompt] == [
        None,
        *(-1.0 - index for index in range(len(prompt) - 1)),
    ]
    assert [token.special for token in finish.prompt] == [True] + [False] * (len(prompt) - 1)
    assert "".join(token.text for token in finish.prompt[1:]) == PROMPT


async def test_scores_alone_make_no_chunk_and_are_there_with_the_first(small: House) -> None:
    generation = await small.service.generate(Ask(PROMPT, SCORED))
    values = values_of([BOS, *ids(PROMPT)][1:])
    first = asyncio.create_task(anext(generation))
    small.say(generation.request, prompt=values[:2])
    await small.settle()
    await asyncio.sleep(0)
    assert len(generation.prompt) == 3
    assert not first.done()
    small.say(generation.request, ids("The"), prompt=values[2:])
    chunk = await first
    assert chunk.text == "The"
    assert chunk.finish is None
    assert len(generation.prompt) == generation.prompt_tokens
    generation.cancel()


async def test_a_request_that_breaks_off_in_its_prompt_says_so(small: House) -> None:
    generation = await small.service.generate(Ask(PROMPT, SCORED))
    small.say(
        generation.request, close=Reason.ENGINE_FAILED, detail="not finite", prompt=values_of([1])
    )
    with pytest.raises(RequestError, match="not finite"):
        await anext(generation)


async def test_who_does_not_ask_gets_none(small: House) -> None:
    generation = await small.service.generate(Ask(PROMPT))
    small.say(generation.request, [EOS], Reason.EOS)
    (chunk,) = [chunk async for chunk in generation]
    assert chunk.finish is not None
    assert chunk.finish.prompt == generation.prompt == ()


async def test_an_engine_that_cannot_is_named() -> None:
    async with house(TOKENIZER, (EOS,)) as plain:
        with pytest.raises(RequestError, match=r"scripted.*prompt_logprobs") as caught:
            await plain.service.generate(Ask(PROMPT, SCORED))
    assert (caught.value.fault, caught.value.field) == (Fault.UNSUPPORTED, PROMPT_LOGPROBS)


def test_likeliest_tokens_have_their_texts() -> None:
    token, other = ids("is")[0], ids("The")[0]
    scores = PromptScores(TOKENIZER, [token, other])
    scores.push(
        [TokenLogprobs(logprob=-math.inf, top_tokens=[token, other], top_values=[-0.25, -math.inf])]
    )
    assert scores.tokens == (
        TokenOut(token, "is"),
        TokenOut(other, "Th", logprob=LEAST, top=((token, "is", -0.25), (other, "Th", LEAST))),
    )
