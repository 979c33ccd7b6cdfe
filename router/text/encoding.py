"""Texts to tokens without holding up the loop."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from router.validation import invalid

INLINE_CHARS = 2048
"""Texts up to this long are tokenised and laid out on the event loop: some 0.3 ms at most, less
than a thread would add. Longer ones go to a thread, for which the loop need not wait."""

Tokens = TypeVar("Tokens")


async def encoded(
    encode: Callable[[str, bool], Tokens], text: str, special: bool, field: str
) -> Tokens:
    """What ``encode`` makes of a text, with or without the model's special tokens.

    Raises RequestError, with the name of the field, for what is no text.
    """
    try:
        if len(text) <= INLINE_CHARS:
            return encode(text, special)
        return await asyncio.to_thread(encode, text, special)
    except ValueError as error:
        raise invalid(f"`inputs` cannot be tokenised: {error}", field) from error
