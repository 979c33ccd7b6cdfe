"""Token by token gives the same text as all at once, for every kind of decoder."""

from collections.abc import Callable

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from router.text.tokenizer import Tokenizer
from tests.service import vocabularies
from tests.service.vocabularies import byte_level, llama2, suffixed

KINDS = pytest.mark.parametrize("maker", vocabularies.EXACT, ids=lambda maker: maker.__name__)
Maker = Callable[[], tokenizers.Tokenizer]
MADE: dict[Maker, Tokenizer] = {}


def made(maker: Maker) -> Tokenizer:
    if maker not in MADE:
        MADE[maker] = Tokenizer(maker())
    return MADE[maker]


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[tuple[str, str]]:
    detokenizer = tokenizer.detokenizer()
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


def assert_exact(tokenizer: Tokenizer, ids: list[int]) -> None:
    pairs = streamed(tokenizer, ids)
    assert "".join(shown for shown, _ in pairs) == tokenizer.decode(ids, skip_special_tokens=False)
    assert "".join(plain for _, plain in pairs) == tokenizer.decode(ids, skip_special_tokens=True)


@KINDS
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_tokens_give_the_text_of_decode(maker: Maker, data: st.DataObject) -> None:
    tokenizer = made(maker)
    # A few ids beyond the vocabulary: models have more outputs than tokenizers have tokens.
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=60))
    assert_exact(tokenizer, ids)


@KINDS
@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=80))
def test_any_text_gives_the_text_of_decode(maker: Maker, text: str) -> None:
    tokenizer = made(maker)
    assert_exact(tokenizer, tokenizer.encode(text, add_special_tokens=False))


@KINDS
@settings(max_examples=100, deadline=None)
@given(text=st.text(st.sampled_from("aé\u0301👩\u200d👧नम世 \n"), max_size=30))
def test_bytes_of_tokens_are_the_text_together(maker: Maker, text: str) -> None:
    tokenizer = made(maker)
    ids = tokenizer.encode(text, add_special_tokens=False)
    shown = [text for text, _ in streamed(tokenizer, ids)]
    joined = b"".join(map(tokenizer.token_bytes, ids, shown))
    told = joined.decode(errors="replace")  # a vocabulary here has a token that is half a character
    assert told.lstrip() == tokenizer.decode(ids, skip_special_tokens=False).lstrip()


def test_a_part_of_a_character_has_bytes_of_its_own() -> None:
    smile = "🙂".encode()
    byte = made(byte_level)
    ids = byte.encode("a🙂b", add_special_tokens=False)
    parts = [byte.token_bytes(id_, byte.token_text(id_)) for id_ in ids]
    assert len(parts) > 3
    assert b"".join(parts) == b"a" + smile + b"b"
    piece = made(llama2)
    ids = piece.encode("🙂b", add_special_tokens=False)
    texts = [shown for shown, _ in streamed(piece, ids)]
    assert [piece.token_bytes(*pair) for pair in zip(ids, texts, strict=False)] == [
        b"", *(smile[at : at + 1] for at in range(4)), b"b"
    ]  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(st.sampled_from("aé\u0301👩\u200d👧🇫🇷नम世 \n"), max_size=40),
    cut=st.integers(0, 200),
)
def test_a_text_cut_anywhere_in_its_tokens(text: str, cut: int) -> None:
    tokenizer = made(byte_level)
    assert_exact(tokenizer, tokenizer.encode(text, add_special_tokens=False)[:cut])


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=40))
@pytest.mark.parametrize("maker", [byte_level, llama2])
def test_any_bytes_valid_or_not(maker: Maker, data: bytes) -> None:
    tokenizer, raw = made(maker), maker()
    names = {byte: f"<0x{byte:02X}>" for byte in range(256)}
    if maker is byte_level:
        alphabet = tokenizer._decoding.data  # type: ignore[attr-defined]
        single = {alphabet(token): token for token in range(tokenizer.vocab_size)}
        ids = [single[bytes([byte])] for byte in data]
    else:
        ids = [raw.token_to_id(names[byte]) for byte in data]
    assert_exact(tokenizer, ids)


def test_no_piece_ends_inside_a_character() -> None:
    tokenizer = made(byte_level)
    text = "".join(vocabularies.TEXTS[2:]) + "🦄🇫🇷"
    pieces = [
        plain for _, plain in streamed(tokenizer, tokenizer.encode(text, add_special_tokens=False))
    ]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert "" in pieces, "the vocabulary is meant to split characters"


def test_half_a_character_at_the_end_becomes_a_replacement() -> None:
    tokenizer = made(byte_level)
    ids = tokenizer.encode("🦄", add_special_tokens=False)
    assert len(ids) > 1
    assert streamed(tokenizer, ids[:-1])[-1] == ("\ufffd", "\ufffd")


def test_special_tokens_show_in_one_text_only_and_do_not_break_a_character() -> None:
    tokenizer = made(byte_level)
    first, *rest = tokenizer.encode("🦄", add_special_tokens=False)
    end = byte_level().token_to_id("<|im_end|>")
    pairs = streamed(tokenizer, [first, end, *rest])
    assert "".join(plain for _, plain in pairs) == "🦄"
    shown = "".join(shown for shown, _ in pairs)
    assert shown == tokenizer.decode([first, end, *rest], skip_special_tokens=False)
    assert "<|im_end|>" in shown


def test_a_hidden_token_is_left_out_of_the_plain_text() -> None:
    tokenizer = made(byte_level)
    word, stop = (
        tokenizer.encode("is", add_special_tokens=False)[0],
        tokenizer.encode(".", add_special_tokens=False)[0],
    )
    detokenizer = tokenizer.detokenizer()
    detokenizer.push(word)
    assert detokenizer.hide(stop) == "."
    assert detokenizer.push(word)[1] == detokenizer.push(word)[0]


def test_a_leading_space_is_dropped_only_at_the_start() -> None:
    tokenizer = made(llama2)
    word = llama2().token_to_id("▁Par")
    assert [plain for _, plain in streamed(tokenizer, [word, word])] == ["Par", " Par", ""]


def test_streams_of_one_tokenizer_do_not_mix() -> None:
    tokenizer = made(byte_level)
    one, two = tokenizer.detokenizer(), tokenizer.detokenizer()
    unicorn, snowman = (
        tokenizer.encode("🦄", add_special_tokens=False),
        tokenizer.encode("☃", add_special_tokens=False),
    )
    texts: dict[str, list[str]] = {"one": [], "two": []}
    for left, right in zip(unicorn, [*snowman, *snowman], strict=False):
        texts["one"].append(one.push(left)[1])
        texts["two"].append(two.push(right)[1])
    assert "".join(texts["one"]) == "🦄"
    assert "".join(texts["two"])[:1] == "☃"


def test_unknown_ids_do_not_fill_the_table() -> None:
    tokenizer = Tokenizer(byte_level())
    detokenizer = tokenizer.detokenizer()
    for token in range(10_000, 11_000):
        assert detokenizer.push(token) == ("", "")
    assert not tokenizer._decoding.pairs


def test_a_long_answer_of_an_unknown_decoder() -> None:
    tokenizer = made(suffixed)
    assert_exact(tokenizer, [2, 3, 4, 5] * 50)
