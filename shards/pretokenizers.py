"""How byte-level BPE models cut text into words, by the name that GGUF files give the way.

The names and the patterns are those of llama.cpp (``llm_tokenizer_bpe`` in llama-vocab.cpp). Where
llama.cpp had to write around missing features of its regular expressions, the pattern of the
model's own tokenizer.json stands here, which it quotes beside its own.
"""

from dataclasses import dataclass

_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_MARKS = r"[\p{P}\$\+<=>\^~\|]+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _modern(digits: str) -> str:
    """The pattern of Llama 3, Qwen 2 and their kin, which differ in how digits stay together."""
    return (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"
    )


def _cased(contractions: str, digits: str) -> str:
    """The pattern of Tekken and GPT-4o, which cuts before a capital letter."""
    return (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{contractions}"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{contractions}"
        rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
    )


_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-\u309f\u30a0-\u30ff]+",
    (
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
        r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
)
_PATTERNS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "starcoder": (r"\p{N}", _GPT2),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"),
    "default": (_MARKS, _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "llama-bpe": (_modern(r"\p{N}{1,3}"),),
    "qwen2": (_modern(r"\p{N}"),),
    "qwen35": (
        (
            rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
            rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_TAIL}"
        ),
    ),
    "tekken": (_cased("", r"\p{N}"),),
    "gpt-4o": (_cased(f"{_CONTRACTIONS}?", r"\p{N}{1,3}"),),
    "deepseek-v3": _DEEPSEEK3,
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
    "seed-coder": (
        (
            rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}"
            rf"| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_TAIL}"
        ),
    ),
    "bailingmoe": (
        (
            r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
        ),
    ),
}
# Name in the file: name of the pattern.
_KIN = {
    kin: name
    for name, kins in {
        "gpt-2": "phi-2 gigachat a.x-4.0 mellum modern-bert mpt olmo jais trillion granite-docling"
        " exaone4",
        "starcoder": "refact command-r smollm codeshell exaone minerva-7b mellum2",
        "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 dbrx smaug-bpe"
        " chatglm-bpe glm4 glm5",
        "qwen2": "deepseek-r1-qwen kormo f2llmv2 stablelm2 hunyuan solar-open megrez grok-2",
        "gpt-4o": "llama4 kanana2 talkie minimax-m2",
        "deepseek-v3": "hunyuan-dense joyai-llm hy_v4",
        "bailingmoe": "bailingmoe2 llada-moe",
    }.items()
    for kin in kins.split()
}
_KEEPS_WHOLE_WORDS = frozenset(
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 glm4 glm5 tekken".split()
)
_ADDS_BOS = _KEEPS_WHOLE_WORDS - {"glm4", "glm5"}


@dataclass(frozen=True, slots=True)
class WordCut:
    """Patterns that apply one after the other, each to the pieces that the former one left.

    ``whole_words``: a word that is a token is taken as it is, without merging. ``adds_bos``: text
    starts with the beginning-of-sequence token unless the file says otherwise.
    """

    patterns: tuple[str, ...]
    whole_words: bool
    adds_bos: bool


def word_cut(name: str) -> WordCut | None:
    """The way of that name; None if it is not known here."""
    patterns = _PATTERNS.get(_KIN.get(name, name))
    if patterns is None:
        return None
    return WordCut(patterns, name in _KEEPS_WHOLE_WORDS, name in _ADDS_BOS)


def names() -> tuple[str, ...]:
    """All names that are known."""
    return tuple(sorted({*_PATTERNS, *_KIN}))
