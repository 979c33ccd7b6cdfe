"""Prompts as token ids: deterministic, of exact length, and sharing nothing that is not meant.

The ids are those of common English words in the embedded model's vocabulary, so that both servers
get the very same prompt, and answers are ordinary text.
"""

import random
import re
from functools import cache

from gguf import GGUFReader

from benchmarks.systems import model_path

WORD = re.compile("\u0120[a-z]{3,9}")  # the byte-level alphabet writes a space like this
POOL = 8192
SCRIPTED_IDS = 200


@cache
def words() -> tuple[int, ...]:
    """Ids of tokens that are a space and a word; frequent ones come first in the vocabulary."""
    field = GGUFReader(model_path()).fields["tokenizer.ggml.tokens"]
    texts = (bytes(field.parts[index]).decode("utf-8") for index in field.data)
    found = [number for number, text in enumerate(texts) if WORD.fullmatch(text)]
    return tuple(found[:POOL])


def distinct(count: int, length: int, seed: int) -> list[list[int]]:
    """Prompts whose first tokens all differ, so that no two share a prefix.

    Raises ``ValueError`` if there are more prompts than words.
    """
    draw = random.Random(seed)
    pool = words()
    firsts = draw.sample(pool, count)
    return [[first, *draw.choices(pool, k=length - 1)] for first in firsts]


def scripted(count: int, length: int, seed: int) -> list[list[int]]:
    """Prompts for the scripted engine's small vocabulary; two share one token at most."""
    draw = random.Random(seed)
    ids = range(1, SCRIPTED_IDS)
    firsts = draw.sample([(one, two) for one in ids for two in ids], count)
    return [[*first, *draw.choices(ids, k=length - 2)] for first in firsts]


def sharing(count: int, prefix: int, length: int, seed: int) -> list[list[int]]:
    """Prompts that share their first ``prefix`` tokens and no more; ``length`` tokens follow."""
    (common,) = distinct(1, prefix, seed)
    return [common + tail for tail in distinct(count, length, seed + 1)]
