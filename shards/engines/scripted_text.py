"""What the scripted engine says: a tiny tokenizer and the words that follow each other.

The tokenizer is byte-level, so any text survives it. Common words are single tokens; characters
outside ASCII take several, so that readers of the stream must put characters together.
"""

import json
from collections.abc import Sequence
from itertools import pairwise

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

WORDS = tuple(
    "the a of to and in is it that was for on are with as at be this have from or one had by word"
    " but not what all were we when your can said there use each which she do how their if will up"
    " other about out many then them these so some her would make like him into time has look two"
    " more write go see number no way could people my than first water been call who oil its now"
    " find long down day did get come made may part".split()
)
# Every byte of these stands in one place only, so the byte before says which one follows.
PIECES = (" é", " 日", " 🚂")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EOS = "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Of this many words, one is a piece that takes several tokens.
PIECE_EVERY = 8
_SPREAD = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


class Script:
    """The vocabulary, the tokenizer, and the successor of any sequence of tokens."""

    def __init__(self) -> None:
        self._tokenizer = _tokenizer()
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        eos = self._tokenizer.token_to_id(EOS)
        assert eos is not None, "the special tokens were added"
        self.eos = eos
        self._words = [self._single(" " + word) for word in WORDS]
        self._starts: list[int] = []
        self._inside: dict[int, int] = {}
        for piece in PIECES:
            ids = self.encode(piece)
            self._starts.append(ids[1])
            self._inside.update(pairwise(ids[1:]))
        self._space = self.encode(" ")[0]

    def _single(self, text: str) -> int:
        ids = self.encode(text)
        assert len(ids) == 1, "a common word is one token"
        return ids[0]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def follow(self, known: Sequence[int]) -> int:
        """The token after these: the rest of a character, or else a word picked by hashing.

        The hash sees the count of tokens, the last two, and another one that the count picks: a
        history that was put together wrongly shows sooner or later, at no cost that grows with it.
        """
        last, count = known[-1], len(known)
        inside = self._inside.get(last)
        if inside is not None:
            return inside
        picked = known[(count * _SPREAD & _MASK) % count]
        mixed = (count << 48 ^ known[-2 % count] << 32 ^ picked << 16 ^ last) * _SPREAD & _MASK
        mixed = ((mixed ^ mixed >> 29) * _SPREAD & _MASK) >> 32
        if last == self._space:
            return self._starts[mixed % len(self._starts)]
        if mixed % PIECE_EVERY == 0:
            return self._space
        return self._words[mixed // PIECE_EVERY % len(self._words)]

    def files(self) -> dict[str, bytes]:
        """The tokenizer files, as a model folder has them."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None,
            "eos_token": EOS,
            "unk_token": None,
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1 << 20,
        }
        return {
            "tokenizer.json": self._tokenizer.to_str().encode(),
            "tokenizer_config.json": json.dumps(config).encode(),
            "chat_template.jinja": CHAT_TEMPLATE.encode(),
        }


def _tokenizer() -> Tokenizer:
    """Byte-level BPE whose merges build each word from the left."""
    vocab = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        left = "Ġ"
        for char in word:
            if left + char not in vocab:
                vocab[left + char] = len(vocab)
                merges.append((left, char))
            left += char
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    return tokenizer
