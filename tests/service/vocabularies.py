"""Small tokenizers of every kind there is, made on the spot."""

from functools import cache

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

TEXTS = [
    "The capital of France is Paris.",
    "Grüße aus Köln, naïve café, coöperate",
    "नमस्ते दुनिया, こんにちは世界, 안녕하세요",
    "👩‍👩‍👧‍👦 family, 🇫🇷 flag, e\u0301 combining, \u200d joiner",
    "def f(x):\n    return x  # four spaces\n\n\tand a tab",
]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@cache
def byte_level() -> tokenizers.Tokenizer:
    """As GPT-2, Llama 3, Qwen or SmolLM2: bytes; few merges, so that characters get split."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIALS,
        show_progress=False,
    )
    made.train_from_iterator(TEXTS * 3, trainer)
    # Added tokens are no bytes: one with a space stands for itself, one without is read as bytes.
    made.add_tokens([AddedToken("über alles"), AddedToken("é"), AddedToken("<tool>")])
    return made


@cache
def byte_level_with_bos() -> tokenizers.Tokenizer:
    """The same, but prompts begin with a special token."""
    made = tokenizers.Tokenizer.from_str(byte_level().to_str())
    bos = SPECIALS[0]
    made.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, made.token_to_id(bos))]
            ),
        ]
    )
    return made


def _pieces() -> list[str]:
    words = ["▁", "▁The", "▁capital", "▁Par", "is", "a", "b", "é", "▁▁", "\n", ".", "▁über", "�"]
    return ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]


def _sentencepiece(decoder: decoders.Decoder) -> tokenizers.Tokenizer:
    scored = [(piece, -float(rank)) for rank, piece in enumerate(_pieces())]
    made = tokenizers.Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoder
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


@cache
def llama2() -> tokenizers.Tokenizer:
    """As Llama 2 and Mistral: byte fallback, one leading space dropped."""
    steps = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(content=" ", left=1, right=0),
    ]
    return _sentencepiece(decoders.Sequence(steps))


@cache
def gemma() -> tokenizers.Tokenizer:
    """As Gemma: byte fallback, nothing dropped."""
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return _sentencepiece(decoders.Sequence(steps))


@cache
def metaspace() -> tokenizers.Tokenizer:
    """As T5: the first token loses its leading marks."""
    return _sentencepiece(decoders.Metaspace(prepend_scheme="first"))


def _words(decoder: decoders.Decoder | None, pieces: list[str]) -> tokenizers.Tokenizer:
    vocabulary = {piece: index for index, piece in enumerate(["[UNK]", "[SEP]", *pieces])}
    made = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if decoder is not None:
        made.decoder = decoder
    made.add_special_tokens(["[UNK]", "[SEP]"])
    return made


@cache
def wordpiece() -> tokenizers.Tokenizer:
    """As BERT."""
    pieces = ["the", "play", "##ing", "do", "n't", ".", ",", "'s", "é", "'"]
    return _words(decoders.WordPiece(), pieces)


@cache
def words() -> tokenizers.Tokenizer:
    """No decoder at all: tokens with spaces between."""
    return _words(None, ["the", "cat", "é", "."])


@cache
def suffixed() -> tokenizers.Tokenizer:
    """As the first GPT: a mark at the end of words, dropped from the last one."""
    return _words(decoders.BPEDecoder(suffix="</w>"), ["the</w>", "pla", "ying</w>", "é</w>", "a"])


EXACT = [byte_level, llama2, gemma, metaspace, wordpiece, words, suffixed]
"""Makers of tokenizers whose decoding is reproduced exactly."""
