"""One request from ask to finish, through the real driver."""

import asyncio
from collections.abc import AsyncIterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from router.ask import Ask, Chunk, Params
from router.core.events import Reason
from router.errors import FAULT_OF_REASON, RequestError
from router.generation import Generation
from router.text.tokenizer import Tokenizer
from shards.v1.shard_pb2 import TokenLogprobs
from tests.service.scripted_core import House, house
from tests.service.test_text_stop import searched
from tests.service.vocabularies import SPECIALS, byte_level, byte_level_with_bos

TOKENIZER = Tokenizer(byte_level_with_bos(), chat_template="{{ messages[0].content }}")
BOS, _, EOS = (byte_level().token_to_id(special) for special in SPECIALS)
GREEDY = Params(temperature=0.0)


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


@pytest.fixture
async def small() -> AsyncIterator[House]:
    async with house(TOKENIZER, (EOS,)) as built:
        yield built


async def rest(generation: Generation) -> list[Chunk]:
    return [chunk async for chunk in generation]


async def answer(small: House, params: Params, text: str, close: Reason | None) -> list[Chunk]:
    """Each token in a turn of its own, then the end."""
    generation = await small.service.generate(Ask("a", params))
    chunks = []
    for token in ids(text):
        small.say(generation.request, [token])
        chunks.append(await anext(generation))
        if chunks[-1].finish is not None:
            return chunks
    small.say(generation.request, [], close)
    return [*chunks, *await rest(generation)]


async def test_an_answer_token_by_token(small: House) -> None:
    chunks = await answer(small, Params(), "is Paris 🦄.", Reason.LENGTH)
    assert "".join(chunk.text for chunk in chunks) == "is Paris 🦄."
    assert [chunk.finish is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    finish = chunks[-1].finish
    assert finish is not None
    assert finish.text == "is Paris 🦄."
    assert finish.reason is Reason.LENGTH
    assert (finish.prompt_tokens, finish.generated_tokens) == (2, len(ids("is Paris 🦄.")))
    assert [token.id for chunk in chunks for token in chunk.tokens] == ids("is Paris 🦄.")
    assert all(len(chunk.tokens) == 1 for chunk in chunks[:-1])
    assert not small.core.ended, "the core ended it, nobody else"


async def test_all_that_has_arrived_comes_in_one_chunk(small: House) -> None:
    generation = await small.service.generate(Ask("a"))
    small.say(generation.request, ids("The"))
    small.say(generation.request, ids(" capital"))
    small.say(generation.request, [EOS], Reason.EOS)
    generation._channel.life.cached_tokens = 7
    await small.settle()
    (chunk,) = await rest(generation)
    assert chunk.finish is not None
    assert chunk.text == chunk.finish.text == "The capital"
    assert chunk.finish.cached_tokens == 7


async def test_the_end_of_sequence_is_a_token_but_no_text(small: House) -> None:
    for skip, text in ((True, "is"), (False, "is<|im_end|>")):
        generation = await small.service.generate(Ask("a", Params(skip_special_tokens=skip)))
        small.say(generation.request, [*ids("is"), EOS], Reason.EOS)
        await small.settle()
        (chunk,) = await rest(generation)
        assert chunk.text == text
        assert chunk.finish is not None
        assert chunk.finish.generated_tokens == len(ids("is")) + 1
        assert chunk.finish.reason is Reason.EOS
        last = chunk.tokens[-1]
        assert (last.id, last.text, last.special) == (EOS, "<|im_end|>", True)
        assert not chunk.tokens[0].special


async def test_an_end_of_sequence_that_the_tokenizer_takes_for_text() -> None:
    word = ids(".")[0]
    async with house(TOKENIZER, (word,)) as small:
        generation = await small.service.generate(Ask("a"))
        small.say(generation.request, [*ids("is"), word], Reason.EOS)
        await small.settle()
        (chunk,) = await rest(generation)
        assert chunk.text == "is"
        assert chunk.tokens[-1].special
        # A request that ignores it has it in its text.
        generation = await small.service.generate(Ask("a", Params(ignore_eos=True)))
        small.say(generation.request, [word, *ids("is")], Reason.LENGTH)
        await small.settle()
        (chunk,) = await rest(generation)
        assert chunk.text == ".is"
        assert not chunk.tokens[0].special
        await small.settle()
        assert small.core.submitted[-1].stop_tokens == frozenset()


async def test_a_stop_token_is_cut_like_a_stop_string(small: House) -> None:
    word = ids(".")[0]
    for include, text in ((False, "is"), (True, "is.")):
        params = Params(stop_token_ids=(word,), include_stop=include)
        generation = await small.service.generate(Ask("a", params))
        small.say(generation.request, [*ids("is"), word], Reason.EOS)
        await small.settle()
        (chunk,) = await rest(generation)
        assert chunk.text == text
        assert chunk.finish is not None
        assert chunk.finish.reason is Reason.STOP_TOKEN
        assert (chunk.tokens[-1].text, chunk.tokens[-1].special) == (".", False)
        assert small.core.submitted[-1].stop_tokens == {word, EOS}


async def test_half_a_character_at_the_end(small: House) -> None:
    generation = await small.service.generate(Ask("a"))
    small.say(generation.request, [*ids("is"), *ids("🦄")[:-1]])
    first = await anext(generation)
    small.say(generation.request, [], Reason.LENGTH)
    last = await anext(generation)
    assert (first.text, last.text) == ("is", "\ufffd")
    assert last.finish is not None
    assert last.finish.text == "is\ufffd"


async def test_a_stop_string_over_token_borders(small: House) -> None:
    text = "The capital of France is"
    for include, kept in ((False, "The capital"), (True, "The capital of Fr")):
        params = Params(stop=("xyz", " of Fr"), include_stop=include)
        chunks = await answer(small, params, text, None)
        finish = chunks[-1].finish
        assert finish is not None
        assert "".join(chunk.text for chunk in chunks) == finish.text == kept
        assert (finish.reason, finish.stop) == (Reason.STOP_STRING, " of Fr")
        taken = [token.id for chunk in chunks for token in chunk.tokens]
        assert taken == ids(text)[: len(taken)]
        assert finish.generated_tokens == len(taken)
        assert " of Fr" in TOKENIZER.decode(taken, skip_special_tokens=True)
        assert " of Fr" not in TOKENIZER.decode(taken[:-1], skip_special_tokens=True)
    await small.settle()
    assert [event.reason for event in small.core.ended] == [Reason.STOP_STRING] * 2


async def test_after_a_stop_string_nothing_is_shown(small: House) -> None:
    generation = await small.service.generate(Ask("a", Params(stop=("Fr",))))
    small.say(generation.request, ids("of France is Paris."))
    async with generation:
        (chunk,) = await rest(generation)
    assert chunk.text == "of "
    assert len(chunk.tokens) < len(ids("of France is Paris."))
    await small.settle()
    assert len(small.core.ended) == 1


async def test_a_stop_string_in_the_last_tokens_does_not_end_it_twice(small: House) -> None:
    generation = await small.service.generate(Ask("a", Params(stop=("Fr",))))
    small.say(generation.request, ids("of Fr"), Reason.LENGTH)
    await small.settle()
    (chunk,) = await rest(generation)
    assert chunk.finish is not None
    assert chunk.finish.reason is Reason.STOP_STRING
    await small.settle()
    assert not small.core.ended


async def test_text_held_back_for_a_stop_string_comes_at_the_end(small: House) -> None:
    chunks = await answer(small, Params(stop=("is Paris",)), "France is", Reason.LENGTH)
    assert chunks[-1].text == "is"
    assert chunks[-1].finish is not None
    assert chunks[-1].finish.stop is None
    assert chunks[-1].finish.text == "France is"


async def test_log_probabilities_come_with_their_tokens(small: House) -> None:
    generation = await small.service.generate(Ask("a", Params(logprobs=True, top_logprobs=2)))
    one, two = ids("is")[0], ids(".")[0]
    entry = TokenLogprobs(logprob=-0.5, top_tokens=[one, EOS], top_values=[-0.5, -1.5])
    small.say(generation.request, [one, two], logprobs=[entry, None])
    chunk = await anext(generation)
    first, second = chunk.tokens
    assert first.logprob == -0.5
    shown = TOKENIZER.token_text(one)
    assert first.top == ((one, shown, -0.5), (EOS, "<|im_end|>", -1.5))
    assert (second.logprob, second.top) == (None, ())
    # The next token of the same id must not inherit them.
    small.say(generation.request, [one])
    assert (await anext(generation)).tokens[0].logprob is None
    await small.settle()
    assert small.core.submitted[0].needs == ("logprobs",)


@pytest.mark.parametrize("reason", FAULT_OF_REASON)
async def test_an_answer_that_breaks_off_is_an_error(small: House, reason: Reason) -> None:
    async with await small.service.generate(Ask("a")) as generation:
        small.say(generation.request, ids("is"))
        await anext(generation)
        small.say(generation.request, [], reason, detail="worker 0 is gone")
        with pytest.raises(RequestError, match="worker 0 is gone") as caught:
            await anext(generation)
        assert caught.value.fault is FAULT_OF_REASON[reason]
        assert await rest(generation) == []
    await small.settle()
    assert not small.core.ended


async def test_leaving_early_cancels_once(small: House) -> None:
    async with await small.service.generate(Ask("a")) as generation:
        small.say(generation.request, ids("is"))
        await anext(generation)
    generation.cancel()
    await small.settle()
    (ended,) = small.core.ended
    assert (ended.request, ended.reason) == (generation.request, Reason.CANCELLED)
    assert await rest(generation) == []
    assert small.driver.open_requests == 0


async def test_a_cancelled_task_and_an_exception_cancel_too(small: House) -> None:
    async def read() -> None:
        async with await small.service.generate(Ask("a")) as generation:
            await rest(generation)

    task = asyncio.create_task(read())
    await small.submission()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    async def fail() -> None:
        async with await small.service.generate(Ask("a")):
            raise OSError

    with pytest.raises(OSError):  # noqa: PT011
        await fail()
    await small.settle()
    assert [event.reason for event in small.core.ended] == [Reason.CANCELLED] * 2


async def test_a_finished_answer_is_not_cancelled(small: House) -> None:
    async with await small.service.generate(Ask("a")) as generation:
        small.say(generation.request, [EOS], Reason.EOS)
        await rest(generation)
    await small.settle()
    assert not small.core.ended


CHOICES = st.lists(st.integers(0, TOKENIZER.vocab_size + 2), max_size=30)


@examples(max_examples=150, deadline=None)
@given(
    tokens=CHOICES,
    cuts=st.sets(st.integers(0, 30)),
    stops=st.lists(st.text("isé Paris", min_size=1, max_size=3), max_size=3),
    include=st.booleans(),
    skip=st.booleans(),
)
def test_chunks_joined_are_the_decoded_text_up_to_a_stop(
    tokens: list[int], cuts: set[int], stops: list[str], include: bool, skip: bool
) -> None:
    tokens = [token for token in tokens if token != EOS]
    whole = TOKENIZER.decode(tokens, skip_special_tokens=skip)
    expected, stop = searched(whole, stops, include)

    async def run() -> list[Chunk]:
        params = Params(stop=tuple(stops), include_stop=include, skip_special_tokens=skip)
        async with (
            house(TOKENIZER, (EOS,)) as small,
            await small.service.generate(Ask("a", params)) as generation,
        ):
            chunks = []
            edges = sorted({0, len(tokens), *(cut for cut in cuts if cut < len(tokens))})
            for start, end in pairwise(edges):
                small.say(generation.request, tokens[start:end])
                chunks.append(await anext(generation))
                if chunks[-1].finish is not None:
                    return chunks
            small.say(generation.request, [], Reason.LENGTH)
            return [*chunks, await anext(generation)]

    chunks = asyncio.run(run())
    finish = chunks[-1].finish
    assert finish is not None
    assert "".join(chunk.text for chunk in chunks) == finish.text == expected
    assert finish.stop == stop
    assert finish.reason is (Reason.LENGTH if stop is None else Reason.STOP_STRING)
    assert finish.generated_tokens == sum(len(chunk.tokens) for chunk in chunks)
