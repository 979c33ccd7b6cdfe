"""The tokenizer as the router sees it: files, offsets, special tokens, odd input."""

import json
import threading

import pytest
import tokenizers

from router.text.tokenizer import Tokenizer
from tests.service.vocabularies import SPECIALS, byte_level, byte_level_with_bos, llama2


def files(**config: object) -> dict[str, bytes]:
    return {
        "tokenizer.json": byte_level_with_bos().to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }


def test_all_three_files_are_read() -> None:
    tokenizer = Tokenizer.from_files(
        files(bos_token="<|endoftext|>", eos_token={"content": "<|im_end|>"}, chat_template="old")
        | {"chat_template.jinja": b"{{ bos_token }}{{ eos_token }} new"}
    )
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert tokenizer.chat_template is not None
    assert tokenizer.chat_template.render([]) == "<|endoftext|><|im_end|> new"


def test_only_the_tokenizer_is_needed() -> None:
    tokenizer = Tokenizer.from_files({"tokenizer.json": byte_level().to_str().encode()})
    assert tokenizer.chat_template is None
    assert tokenizer.bos_token is tokenizer.eos_token is None


def test_a_list_of_templates_gives_the_default_one() -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    template = Tokenizer.from_files(files(chat_template=named)).chat_template
    assert template is not None
    assert template.source == "d"
    assert Tokenizer.from_files(files(chat_template=named[:1])).chat_template is None


@pytest.mark.parametrize(
    ("broken", "name"),
    [
        ({}, "no tokenizer.json"),
        ({"tokenizer.json": b"{"}, "tokenizer.json cannot be read"),
        (files() | {"tokenizer_config.json": b"{"}, "tokenizer_config.json is not JSON"),
        (files() | {"tokenizer_config.json": b"[]"}, "tokenizer_config.json is not a JSON object"),
        (files() | {"tokenizer_config.json": b"\xff"}, "tokenizer_config.json is not JSON"),
        (files() | {"tokenizer_config.json": b"[" * 10**5}, "tokenizer_config.json is not JSON"),
        (files() | {"chat_template.jinja": b"\xff"}, "chat_template.jinja"),
    ],
)
def test_a_broken_file_is_named(broken: dict[str, bytes], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Tokenizer.from_files(broken)


def test_special_tokens_are_added_on_request() -> None:
    tokenizer = Tokenizer(byte_level_with_bos())
    bare = tokenizer.encode("Paris", add_special_tokens=False)
    start = byte_level().token_to_id(SPECIALS[0])
    assert tokenizer.encode("Paris", add_special_tokens=True) == [start, *bare]
    assert tokenizer.is_special(start)
    assert not tokenizer.is_special(bare[0])
    assert not tokenizer.is_special(byte_level().token_to_id("<tool>"))


def test_short_and_long_texts_are_encoded_alike() -> None:
    tokenizer = Tokenizer(byte_level_with_bos())
    text = "The capital of France is Paris. 🦄 "
    long = tokenizer.encode(text * 500, add_special_tokens=False)
    assert long == [
        token for _ in range(500) for token in tokenizer.encode(text, add_special_tokens=False)
    ]


def test_prompts_are_never_cut_or_padded() -> None:
    made = tokenizers.Tokenizer.from_str(byte_level().to_str())
    made.enable_truncation(3)
    made.enable_padding(length=50)
    tokenizer = Tokenizer.from_files({"tokenizer.json": made.to_str().encode()})
    text = "The capital of France"
    assert tokenizer.encode(text, add_special_tokens=False) == byte_level().encode(text).ids


def test_offsets_count_code_points() -> None:
    tokenizer = Tokenizer(byte_level_with_bos())
    text = "naïve 👩\u200d👧 is"
    first, *spans = tokenizer.encode_offsets(text, add_special_tokens=True)
    assert first == (byte_level().token_to_id(SPECIALS[0]), SPECIALS[0], 0, 0)
    assert [token for token, *_ in spans] == tokenizer.encode(text, add_special_tokens=False)
    for _, shown, start, end in spans:
        assert 0 <= start < end <= len(text)
        assert shown == text[start:end]
    covered = {place for *_, start, end in spans for place in range(start, end)}
    assert covered == set(range(len(text)))


@pytest.mark.parametrize("length", [1, 10_000])
def test_half_a_surrogate_pair_is_an_error(length: int) -> None:
    tokenizer = Tokenizer(byte_level())
    for encode in (tokenizer.encode, tokenizer.encode_offsets):
        with pytest.raises(ValueError, match="surrogate"):
            encode("x" * length + "\ud83d", add_special_tokens=False)


def test_token_text_is_that_of_a_token_behind_others() -> None:
    tokenizer = Tokenizer(llama2())
    assert tokenizer.token_text(llama2().token_to_id("▁Par")) == " Par"
    assert tokenizer.token_text(llama2().token_to_id("</s>")) == "</s>"
    assert tokenizer.token_text(llama2().token_to_id("<0x41>")) == "A"
    assert tokenizer.token_text(llama2().token_to_id("<0xF0>")) == "\ufffd"


def test_other_threads_run_while_a_long_text_is_encoded() -> None:
    tokenizer = Tokenizer(byte_level())
    text = "The capital of France is Paris. " * 20_000
    beats = 0
    done = threading.Event()

    def encode() -> None:
        tokenizer.encode(text, add_special_tokens=False)
        done.set()

    worker = threading.Thread(target=encode)
    worker.start()
    while not done.wait(0.001):
        beats += 1
    worker.join()
    # Holding the interpreter lock all along, it would leave time for one or two.
    assert beats > 5
