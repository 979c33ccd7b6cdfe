"""What the service refuses, in which words, and that nothing of it reaches the core."""

import math
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from router.ask import Ask, Constraint, ConstraintKind, Params
from router.config import Settings
from router.errors import Fault, RequestError, TooLongError
from router.service import INLINE_CHARS
from router.text.tokenizer import Tokenizer
from tests.service.scripted_core import House, house
from tests.service.vocabularies import SPECIALS, byte_level, byte_level_with_bos

TEMPLATE = "{% for m in messages %}[{{ m.content }}]{% endfor %}{{ mood }}"
TOKENIZER = Tokenizer(byte_level_with_bos(), chat_template=TEMPLATE)
EOS = byte_level().token_to_id(SPECIALS[2])
LAST = TOKENIZER.vocab_size - 1
MANY = tuple(range(1025))
FORMAT = Constraint(ConstraintKind.REGEX, "a+", "response_format")


@pytest.fixture
async def small() -> AsyncIterator[House]:
    async with house(TOKENIZER, (EOS,)) as built:
        yield built


async def refused(small: House, ask: Ask) -> RequestError:
    with pytest.raises(RequestError) as caught:
        await small.service.generate(ask)
    await small.settle()
    assert not small.core.submitted
    assert small.driver.open_requests == 0
    return caught.value


NAN, INF = math.nan, math.inf
PARAMS: list[tuple[str, list[Any], str]] = [
    ("temperature", [-0.1, 100.5, NAN, INF, -INF], "`temperature` must be >= 0 and <= 100"),
    ("top_p", [0.0, -1.0, 1.01, NAN, INF], "`top_p` must be > 0.0 and <= 1.0"),
    ("typical_p", [0.0, -1.0, 1.01, NAN, INF], "`typical_p` must be > 0.0 and <= 1.0"),
    ("min_p", [-0.1, 1.1, NAN], "`min_p` must be >= 0 and <= 1"),
    ("top_k", [-1, 2**31], "`top_k` must be >= 0"),
    ("repetition_penalty", [0.0, -1.0, NAN, INF, 1e300, 1e-300], "`repetition_penalty` must be"),
    ("frequency_penalty", [-2.1, 2.1, NAN, INF], "`frequency_penalty` must be >= -2 and <= 2"),
    ("presence_penalty", [-2.1, 2.1, NAN, INF], "`presence_penalty` must be >= -2 and <= 2"),
    ("max_tokens", [0, -1], "`max_new_tokens` must be strictly positive"),
    ("max_tokens", [199, 2**40], "`inputs` tokens + `max_new_tokens` must be <= 200. Given: 2 "),
    ("min_tokens", [-1, 2**31], "`min_tokens` must be >= 0"),
    ("min_tokens", [199], "`min_tokens` must be <= `max_new_tokens`. Given: 199 `min_tokens` and"),
    ("seed", [-1, 2**64], "`seed` must be >= 0"),
    ("top_logprobs", [21, -1], "`top_n_tokens` must be >= 0 and <= 20"),
    ("stop", [("a",) * 5], "`stop` supports up to 4 stop sequences. Given: 5"),
    ("stop", [("a", "")], "`stop` holds an empty stop sequence"),
    ("stop", [("a" * 1025,)], "`stop` supports up to 1024 characters each. Given: 1025"),
    ("stop_token_ids", [(LAST + 1,), (-1,)], "`stop_token_ids` holds the token id"),
    ("stop_token_ids", [MANY], "`stop_token_ids` supports up to 1024 tokens"),
    ("logit_bias", [((LAST + 1, 0.0),), ((-1, 0.0),)], "`logit_bias` holds the token id"),
    ("logit_bias", [((1, 101.0),), ((1, NAN),), ((1, -INF),)], "`logit_bias` values must be"),
    ("logit_bias", [tuple((token, 0.0) for token in MANY)], "`logit_bias` supports up to 1024"),
]
CASES = [(name, value, words) for name, values, words in PARAMS for value in values]


@pytest.mark.parametrize(("name", "value", "words"), CASES)
async def test_a_parameter_out_of_range(small: House, name: str, value: Any, words: str) -> None:
    error = await refused(small, Ask("a", replace(Params(), **{name: value})))
    assert error.fault is Fault.VALIDATION
    assert error.field == name
    assert error.message.startswith(words)


EDGES: list[dict[str, Any]] = [
    {"temperature": 0.0, "top_p": 1.0, "typical_p": 1.0, "min_p": 0.0, "top_k": 0},
    {"temperature": 100.0, "top_p": 1e-9, "typical_p": 1e-9, "min_p": 1.0, "top_k": 2**31 - 1},
    {"frequency_penalty": -2.0, "presence_penalty": 2.0, "repetition_penalty": 0.001},
    {"max_tokens": 198, "min_tokens": 198, "seed": 2**64 - 1, "top_logprobs": 20},
    {"max_tokens": 1, "seed": 0, "stop": ("a" * 1024, "b", "c", "d"), "stop_token_ids": (0, LAST)},
    {"logit_bias": ((0, -100.0), (LAST, 100.0))},
]


@pytest.mark.parametrize("fields", EDGES)
async def test_the_ends_of_the_ranges_are_allowed(small: House, fields: dict[str, Any]) -> None:
    await small.service.generate(Ask("a", replace(Params(), **fields)))
    await small.settle()
    assert len(small.core.submitted) == 1


LONG = "is" * 300


@pytest.mark.parametrize(
    ("ask", "field", "words"),
    [
        (Ask(""), "prompt", "`inputs` cannot be empty"),
        (Ask(()), "prompt", "`inputs` cannot be empty"),
        (Ask((5, LAST + 1)), "prompt", f"`inputs` holds the token id {LAST + 1}; this model's ids"),
        (Ask((-1,)), "prompt", "`inputs` holds the token id -1"),
        (Ask((1,) * 200), "prompt", "`inputs` must have less than 200 tokens. Given: 200"),
        (Ask(LONG), "prompt", "`inputs` must have less than 200 tokens. Given: "),
        (Ask("\ud83d"), "prompt", "`inputs` cannot be tokenised: the text holds half of a surr"),
        (Ask("x" * 5000 + "\udc00"), "prompt", "`inputs` cannot be tokenised: the text holds half"),
        (Ask("a", truncate=0), "truncate", "`truncate` must be strictly positive and less than"),
        (Ask("a", truncate=200), "truncate", "`truncate` must be strictly positive and less than"),
        (Ask("a", priority=-1), "priority", "`priority` must be >= 0 and <= 3. Given: -1"),
        (Ask("a", priority=4), "priority", "`priority` must be >= 0 and <= 3. Given: 4"),
        (Ask("a", deadline_s=0.0), "deadline_s", "the deadline must be a positive number"),
        (Ask("a", deadline_s=NAN), "deadline_s", "the deadline must be a positive number"),
        (Ask("a", deadline_s=INF), "deadline_s", "the deadline must be a positive number"),
    ],
    ids=lambda value: str(value)[:30] if not isinstance(value, Ask) else "",
)
async def test_an_ask_that_cannot_be(small: House, ask: Ask, field: str, words: str) -> None:
    error = await refused(small, ask)
    assert error.fault is Fault.VALIDATION
    assert error.field == field
    assert error.message.startswith(words)
    assert b'tgi_request_failure{err="validation"} 1.0' in small.driver.metrics.render()


async def test_too_long_prompts_are_told_apart(small: House) -> None:
    for ask in (Ask((1,) * 200), Ask("a", Params(max_tokens=200))):
        assert isinstance(await refused(small, ask), TooLongError)


async def test_a_prompt_of_the_greatest_length_has_room_for_one_token(small: House) -> None:
    await small.service.generate(Ask((1,) * 199))
    await small.settle()
    assert small.core.submitted[0].max_tokens == 1


async def test_a_longer_prompt_than_allowed_may_be_truncated(small: House) -> None:
    await small.service.generate(Ask((1,) * 5000, truncate=199))
    await small.settle()
    assert len(small.core.submitted[0].prompt) == 199


async def test_an_unknown_model(small: House) -> None:
    error = await refused(small, Ask("a", model="other"))
    assert error.fault is Fault.MODEL_NOT_FOUND


@pytest.mark.parametrize(
    ("feature", "params", "field"),
    [
        ("logprobs", Params(logprobs=True), "logprobs"),
        ("logprobs", Params(top_logprobs=1), "logprobs"),
        ("penalties", Params(repetition_penalty=1.1), "repetition_penalty"),
        ("penalties", Params(frequency_penalty=0.1), "frequency_penalty"),
        ("penalties", Params(presence_penalty=0.1), "presence_penalty"),
        ("seed", Params(seed=1), "seed"),
        ("grammar", Params(constraint=FORMAT), "response_format"),
        ("logit_bias", Params(logit_bias=((1, 1.0),)), "logit_bias"),
        ("min_tokens", Params(min_tokens=1), "min_tokens"),
        ("typical_p", Params(typical_p=0.9), "typical_p"),
        ("watermark", Params(watermark=True), "watermark"),
    ],
)
async def test_what_the_engine_cannot_do(feature: str, params: Params, field: str) -> None:
    async with house(TOKENIZER, (EOS,), features=("embeddings",)) as small:
        error = await refused(small, Ask("a", params))
        assert (error.fault, error.field) == (Fault.UNSUPPORTED, field)
        assert "scripted" in error.message
        assert field in error.message
        await small.service.generate(Ask("a"))
    async with house(TOKENIZER, (EOS,), features=(feature,)) as small:
        await small.service.generate(Ask("a", params))
        await small.settle()
        assert small.core.submitted[0].needs == (feature,)


async def test_the_limits_are_the_settings() -> None:
    settings = Settings(max_stop_sequences=1, max_top_n_tokens=30, max_total_tokens=50)
    async with house(TOKENIZER, (EOS,), settings=settings) as small:
        for params in (Params(stop=("a", "b")), Params(top_logprobs=31), Params(max_tokens=49)):
            await refused(small, Ask("a", params))


async def test_a_chat_is_laid_out(small: House) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    assert await small.service.render_chat(None, messages) == "[Hi]"
    card = small.fleet.model("small")
    assert await small.service.render_chat(card, messages, mood="glad") == "[Hi]glad"
    long = [{"role": "user", "content": "x" * INLINE_CHARS}, {"role": "user", "content": None}]
    assert await small.service.render_chat("small", long) == f"[{'x' * INLINE_CHARS}][None]"


async def test_a_chat_that_cannot_be_laid_out(small: House) -> None:
    with pytest.raises(RequestError, match="`messages` cannot be empty"):
        await small.service.render_chat(None, [])
    with pytest.raises(RequestError) as caught:
        await small.service.render_chat("other", [{"content": "x"}])
    assert caught.value.fault is Fault.MODEL_NOT_FOUND
    # A variable of a client may have any name, even that of an argument.
    with pytest.raises(RequestError, match="`messages` cannot be set"):
        await small.service.render_chat(None, [{"content": "x"}], messages=[])
    assert await small.service.render_chat(None, [{"content": "x"}], model="y") == "[x]"


async def test_a_model_without_a_template_says_so() -> None:
    async with house(Tokenizer(byte_level()), (EOS,)) as small:
        with pytest.raises(RequestError, match="model small has no chat template") as caught:
            await small.service.render_chat(None, [{"content": "x"}])
        assert caught.value.fault is Fault.TEMPLATE


@pytest.mark.parametrize("times", [1, 1000])
async def test_text_to_tokens_and_back(small: House, times: int) -> None:
    text = "The capital 🦄 " * times
    spans = await small.service.tokenize(None, text)
    assert spans[0][1:] == (SPECIALS[0], 0, 0)
    bare = await small.service.tokenize("small", text, add_special_tokens=False)
    assert bare == spans[1:]
    ids = [span[0] for span in spans]
    assert await small.service.detokenize(None, ids) == text
    assert await small.service.detokenize(None, ids, skip_special_tokens=False) == (
        SPECIALS[0] + text
    )


async def test_neither_text_nor_ids_that_do_not_exist(small: House) -> None:
    with pytest.raises(RequestError, match="surrogate"):
        await small.service.tokenize(None, "\ud83d")
    for wrong in (-1, LAST + 1, 2**40):
        with pytest.raises(RequestError, match=f"token id {wrong}") as caught:
            await small.service.detokenize(None, [0, wrong])
        assert caught.value.field == "token_ids"
