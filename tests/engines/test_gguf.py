"""GGUF files: what is read of them, the cache of conversions, and the default model's text."""

import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from shards import gguf_tokenizer
from shards.engines.llama_native import Model
from shards.gguf_file import dtype_name, read_metadata
from shards.gguf_tokenizer import convert, tokenizer_files
from tests.engines.test_llamacpp import model_file

CORPUS = [
    "The capital of France is Paris. It's lovely, isn't it? I'd say we've seen WORSE.",
    "def f(x):\n    return {'a': x**2, \"b\": [1, 2]}  # comment\n\n\n\tclass X(object): pass\n",
    '#include <stdio.h>\nint main() { printf("%d\\n", 0xFF); return 0; }\r\n',
    "<div class='a'>&nbsp;</div> SELECT * FROM t WHERE a >= 10;",
    "1234567890 3.14159 1,000,000 12.5e-3 ٣٤٥ ⅷ ² ½ 一二三 07:45 +49 30 123456",
    "Falsches Üben von Xylophonmusik quält jeden größeren Zwerg.",
    "Portez ce vieux whisky au juge blond qui fume. Œuvre, cœur, naïve.",
    "El pingüino Wenceslao hizo kilómetros bajo exhaustiva lluvia. ¿Qué? ¡No!",
    "Zażółć gęślą jaźń. Příliš žluťoučký kůň. Đurđevac. Ölçüm \u0131s\u0131 İstanbul.",
    "Съешь же ещё этих мягких французских булок. Ґанок її. Ξεσκεπάζω την ψυχοφθόρα.",
    "敏捷的棕色狐狸跳過懶狗。日本語のテキスト、カタカナ。한국어 텍스트입니다。",
    "نص حكيم له سر قاطع وذو شأن عظيم، «مكتوب» على ثوب أخضر. עברית עם נִקּוּד.",
    "हिन्दी में पाठ। বাংলা লেখা। தமிழ் உரை। ไทยเขียนติดกัน ខ្មែរ မြန်မာ ქართული Հայերեն",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🚂🚃🚃 👍🏽 🇩🇪 ❤️ ☕︎ ♟️ 🫠",
    "e\u0301a\u0308\u0323 n\u0303 Z\u0351\u036b\u0343a\u0306l\u0354g\u0321o\u0322 \ufb01 \uff21",
    "   leading,  double   triple    many        spaces   \n\n\n  \t\t mixed \r\n\r\n trailing   ",
    "\x01\x02\x1b[31m\x7f\x85\u00a0\u2003\u2028\u2029\u3000\u200b\u200d\u202eRTL\u202c\ufeff\ufffd",
    "snake_case camelCase kebab-case SCREAMING_CASE a.b.c /usr/lib $HOME ~/.x C:\\Temp @user #tag",
    "!!! ??? ... --- *** ((())) [[[]]] {{{}}} <<<>>> ^^^ ``` ''' \"\"\" ;:;: |&|",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|> <|im_start|",
    "'s 't 're 've 'm 'll 'd 'S 'T 'RE x's''s \u2019s",
]


@pytest.fixture(scope="module")
def metadata() -> dict[str, Any]:
    return read_metadata(model_file())


@pytest.fixture(scope="module")
def converted(metadata: dict[str, Any]) -> Tokenizer:
    files = convert(model_file(), metadata)
    return Tokenizer.from_str(files["tokenizer.json"].decode())


@pytest.fixture(scope="module")
def native() -> Iterator[Model]:
    model = Model(model_file(), 0, lambda _fraction: None)
    yield model
    model.close()


@pytest.mark.parametrize("index", range(len(CORPUS)))
def test_the_corpus_is_cut_as_the_engine_cuts_it(
    converted: Tokenizer, native: Model, index: int
) -> None:
    text = CORPUS[index]
    ids = converted.encode(text, add_special_tokens=False).ids
    assert ids == native.tokenize(text, special=True)
    assert converted.decode(ids, skip_special_tokens=False) == text


# What Unicode has assigned since the engine's tables were made counts as a letter in one and as
# nothing in the other; Python's own tables are older than both.
characters = st.characters(exclude_categories=("Cs", "Cn", "Co"), exclude_characters="\0")
spaces = st.sampled_from([" ", "  ", "\n", "\t", "\r\n", "\u00a0", "'", "'s", "12"])


@given(st.lists(st.one_of(st.text(characters, max_size=6), spaces), max_size=12).map("".join))
@example("\u0e33\u0e33 \u0345")
def test_any_text_is_cut_as_the_engine_cuts_it(
    converted: Tokenizer, native: Model, text: str
) -> None:
    assert all(unicodedata.category(char) != "Cn" for char in text)
    ids = converted.encode(text, add_special_tokens=False).ids
    assert ids == native.tokenize(text, special=True)


def test_reads_the_head(metadata: dict[str, Any]) -> None:
    assert metadata["general.architecture"] == "llama"
    assert metadata["llama.context_length"] == 8192
    assert len(metadata["tokenizer.ggml.tokens"]) == 49152
    assert dtype_name(metadata) == "Q4_1"
    assert dtype_name({}) == "mixed"
    assert dtype_name({"general.file_type": 999}) == "file_type_999"


def test_config_names_the_special_tokens(metadata: dict[str, Any]) -> None:
    files = convert(model_file(), metadata)
    config = json.loads(files["tokenizer_config.json"])
    assert (config["bos_token"], config["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    assert config["add_bos_token"] is False
    assert config["model_max_length"] == 8192
    assert b"im_start" in files["chat_template.jinja"]


def small(**changes: Any) -> dict[str, Any]:
    """A vocabulary of a few tokens, byte-level unless changed."""
    tokens = ["<s>", "</s>", "a", "b", "Ġ", "ab", "Ġab"]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 1, 1, 1, 1, 1],
        "tokenizer.ggml.merges": ["a b", "Ġ ab", "x y"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        **changes,
    }


def test_conversions_are_cached_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made: list[Path] = []

    def counted(path: Path, metadata: dict[str, Any]) -> dict[str, bytes]:
        made.append(path)
        return convert(path, metadata)

    monkeypatch.setattr(gguf_tokenizer, "convert", counted)
    plain, other = small(), small(**{"tokenizer.chat_template": "{{ x }}"})
    first = tokenizer_files(Path("a.gguf"), plain)
    assert tokenizer_files(Path("b.gguf"), plain) == first
    assert len(made) == 1
    assert tokenizer_files(Path("a.gguf"), other)["chat_template.jinja"] == b"{{ x }}"
    assert tokenizer_files(Path("a.gguf"), other)["chat_template.jinja"] == b"{{ x }}"
    assert len(made) == 2


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert "tokenizer.json" in tokenizer_files(Path("a.gguf"), small())
