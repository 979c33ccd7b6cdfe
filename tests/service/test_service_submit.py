"""What the core is handed for a request, and when it is not."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from router.ask import Ask, Params
from router.config import Settings
from router.core.events import Reason
from router.errors import Fault, RequestError
from router.service import INLINE_CHARS
from router.text.tokenizer import Tokenizer
from shards.v1.shard_pb2 import Sampling, Watermark
from tests.service.scripted_core import House, house
from tests.service.vocabularies import SPECIALS, byte_level, byte_level_with_bos

TOKENIZER = Tokenizer(byte_level_with_bos())
BOS, _, EOS = (byte_level().token_to_id(special) for special in SPECIALS)
GREEDY = Params(temperature=0.0)


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


@pytest.fixture
async def small() -> AsyncIterator[House]:
    async with house(TOKENIZER, (EOS,)) as built:
        yield built


async def test_the_core_gets_the_whole_request(small: House) -> None:
    generation = await small.service.generate(Ask("The capital", priority=0))
    await small.settle()
    (submitted,) = small.core.submitted
    prompt = (BOS, *ids("The capital"))
    assert submitted.prompt == prompt
    assert submitted.request == generation.request
    assert (submitted.model, submitted.priority, submitted.deadline_ms) == ("small", 0, None)
    assert submitted.max_tokens == 200 - len(prompt)
    assert submitted.stop_tokens == {EOS}
    assert submitted.needs == ()
    assert generation.prompt_tokens == len(prompt)
    assert generation.model.id == "small"


async def test_seeds(small: House) -> None:
    seen = []
    for params in (Params(), Params(), Params(seed=5), Params(temperature=0.0, seed=5), GREEDY):
        generation = await small.service.generate(Ask("a", params))
        small.say(generation.request, [EOS], Reason.EOS)
        chunk = await anext(generation)
        assert chunk.finish is not None
        seen.append(chunk.finish.seed)
    first, second, given_one, *greedy = seen
    assert first != second
    assert first is not None
    assert 0 <= first < 2**63
    assert given_one == 5
    assert greedy == [None, None]
    sent = [submitted.sampling for submitted in small.core.submitted]
    assert [s.seed for s in sent if isinstance(s, Sampling)] == [first, second, 5, 0, 0]
    assert [submitted.needs for submitted in small.core.submitted] == [(), (), ("seed",), (), ()]


async def test_the_sampling_message_says_what_was_asked(small: House) -> None:
    full = Params(
        max_tokens=20,
        min_tokens=3,
        temperature=0.5,
        top_k=4,
        top_p=0.25,
        min_p=0.125,
        typical_p=0.75,
        repetition_penalty=1.5,
        frequency_penalty=0.5,
        presence_penalty=-0.5,
        seed=2**64 - 1,
        logit_bias=((5, -100.0),),
        stop_token_ids=(9,),
        logprobs=True,
        top_logprobs=2,
    )
    await small.service.generate(Ask("a", full))
    await small.settle()
    (submitted,) = small.core.submitted
    assert submitted.sampling == Sampling(
        min_tokens=3,
        temperature=0.5,
        top_k=4,
        top_p=0.25,
        min_p=0.125,
        typical_p=0.75,
        repetition_penalty=1.5,
        frequency_penalty=0.5,
        presence_penalty=-0.5,
        seed=2**64 - 1,
        bias_tokens=[5],
        bias_values=[-100.0],
        stop_tokens=sorted([9, EOS]),
        logprobs=True,
        top_logprobs=2,
    )
    assert submitted.needs == (
        *("logprobs", "penalties", "seed", "logit_bias", "min_tokens", "typical_p"),
    )
    assert submitted.max_tokens == 20


async def test_the_mark_of_the_settings_travels_with_the_request() -> None:
    settings = Settings(watermark_gamma=0.1, watermark_delta=3.3, watermark_key=2**63 - 1)
    marks = Watermark(gamma=0.1, delta=3.3, key=2**63 - 1)
    features = ("watermark", "ranks", "logprobs")
    async with house(TOKENIZER, (EOS,), settings=settings, features=features) as small:
        await small.service.generate(Ask("a", replace(GREEDY, watermark=True)))
        await small.service.generate(Ask("a", replace(GREEDY, ranks=True)))
        await small.settle()
        marked, ranked = small.core.submitted
    assert marked.sampling == Sampling(watermark=marks)
    assert marked.needs == ("watermark",)
    # A rank comes with the log probability, whether or not that is shown.
    assert ranked.sampling == Sampling(ranks=True, logprobs=True)
    assert ranked.needs == ("logprobs", "ranks")


async def test_what_is_off_is_not_sent(small: House) -> None:
    await small.service.generate(Ask("a", GREEDY))
    await small.settle()
    assert small.core.submitted[0].sampling == Sampling()


async def test_a_share_too_small_for_a_float_is_not_switched_off(small: House) -> None:
    await small.service.generate(Ask("a", Params(top_p=1e-60, typical_p=1e-60, seed=1)))
    await small.settle()
    sampling = small.core.submitted[0].sampling
    assert isinstance(sampling, Sampling)
    assert 0 < sampling.top_p < 1e-5
    assert 0 < sampling.typical_p < 1e-5


async def test_the_nearer_deadline_counts() -> None:
    settings = Settings(request_deadline_s=10.0)
    async with house(TOKENIZER, (EOS,), settings=settings, clock_ms=5000) as small:
        for asked in (None, 2.5, 60.0, 1e-9):
            await small.service.generate(Ask("a", deadline_s=asked))
        await small.settle()
        deadlines = [submitted.deadline_ms for submitted in small.core.submitted]
        assert deadlines == [15_000, 7_500, 15_000, 5_001]


async def test_truncation_keeps_the_last_tokens(small: House) -> None:
    text = "The capital of France is Paris."
    await small.service.generate(Ask(text, truncate=3))
    await small.service.generate(Ask(tuple(range(20)), truncate=4))
    await small.service.generate(Ask("is", truncate=100))
    await small.settle()
    prompts = [submitted.prompt for submitted in small.core.submitted]
    assert prompts == [tuple(ids(text)[-3:]), (16, 17, 18, 19), (BOS, *ids("is"))]


async def test_too_many_requests_are_refused_and_counted() -> None:
    settings = Settings(max_concurrent_requests=2)
    async with house(TOKENIZER, (EOS,), settings=settings) as small:
        open_ones = [await small.service.generate(Ask("a")) for _ in range(2)]
        with pytest.raises(RequestError) as caught:
            await small.service.generate(Ask("a"))
        assert caught.value.fault is Fault.OVERLOADED
        assert b'tgi_request_failure{err="overloaded"} 1.0' in small.driver.metrics.render()
        open_ones[0].cancel()
        await small.settle()
        await small.service.generate(Ask("a"))


async def test_a_long_prompt_does_not_stall_the_others(small: House) -> None:
    text = "The capital of France is Paris. " * 5000
    assert len(text) > INLINE_CHARS
    beats = 0

    async def beat() -> None:
        nonlocal beats
        while True:
            beats += 1
            await asyncio.sleep(0.001)

    beating = asyncio.create_task(beat())
    await small.service.generate(Ask(text, truncate=10))
    beating.cancel()
    assert beats > 3
