"""Special tokens that are text: the markers of calls, where all others are skipped."""

from router.ask import Ask, Params
from router.core.events import Reason
from router.text.tokenizer import Tokenizer
from tests.service.scripted_core import house
from tests.service.vocabularies import SPECIALS, byte_level

TOKENIZER = Tokenizer(byte_level())
START, MARK, EOS = (byte_level().token_to_id(special) for special in SPECIALS)


async def shown(params: Params, tokens: list[int]) -> str:
    async with house(TOKENIZER, (EOS,)) as small:
        generation = await small.service.generate(Ask("a", params))
        small.say(generation.request, tokens, Reason.LENGTH)
        chunks = [chunk async for chunk in generation]
    assert chunks[-1].finish is not None
    text = "".join(chunk.text for chunk in chunks)
    assert chunks[-1].finish.text == text
    return text


async def test_kept_tokens_are_text_and_other_special_ones_are_not() -> None:
    a, b = TOKENIZER.encode("a", False)[0], TOKENIZER.encode("b", False)[0]
    tokens = [a, MARK, START, b]
    assert await shown(Params(), tokens) == "ab"
    assert await shown(Params(kept_tokens=frozenset({MARK})), tokens) == f"a{SPECIALS[1]}b"
    everything = Params(skip_special_tokens=False, kept_tokens=frozenset({MARK}))
    assert await shown(everything, tokens) == f"a{SPECIALS[1]}{SPECIALS[0]}b"


async def test_a_kept_token_may_stand_in_a_character() -> None:
    first, second = TOKENIZER.encode("é", False)[:1] * 2
    a = TOKENIZER.encode("a", False)[0]
    kept = Params(kept_tokens=frozenset({MARK}))
    assert SPECIALS[1] in await shown(kept, [first, MARK, second, a])
