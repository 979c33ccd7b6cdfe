"""Conversations cut to what a model has room for: the truncation `auto` of OpenAI's responses."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from router.api.rest.context import Context
from router.conversation import ChatAsk
from router.errors import RequestError, TooLongError
from router.validation import tokens_allowed

Messages = Sequence[Mapping[str, Any]]


async def cut_to_fit(context: Context, ask: ChatAsk) -> ChatAsk:
    """Returns the chat without its oldest messages, as many as it takes for the rest to fit.

    Those of the system and the last one stay, and results of tools go with their call. What is left
    begins with no answer if that can be: many templates want the user to begin. The chat comes back
    as it is if it fits, if no part of it does, or if it has another fault; whoever submits it will
    be told.
    """
    try:
        if await _fits(context, ask):
            return ask
    except RequestError:
        return ask
    places = list(_places(ask.messages))
    turns = [at for at in places if ask.messages[at]["role"] != "assistant"]
    within = [at for at in places if not turns or at > turns[-1]]
    for starts in (turns, within):
        found = await _longest(context, ask, starts)
        if found is not None:
            return found
    return ask


def _places(messages: Messages) -> Iterator[int]:
    """Where a conversation can begin, the system's messages in front of it left out."""
    first = _first(messages)
    for at in range(first + 1, len(messages)):
        if messages[at]["role"] != "tool":
            yield at


def _first(messages: Messages) -> int:
    roles = (at for at, one in enumerate(messages) if one["role"] not in ("system", "developer"))
    return next(roles, len(messages))


def _begun_at(ask: ChatAsk, at: int) -> ChatAsk:
    return replace(ask, messages=[*ask.messages[: _first(ask.messages)], *ask.messages[at:]])


async def _longest(context: Context, ask: ChatAsk, starts: Sequence[int]) -> ChatAsk | None:
    """The chat from the first of these places from which it fits; few of them are tried."""
    low, high = 0, len(starts)
    while low < high:
        middle = (low + high) // 2
        if await _may_fit(context, _begun_at(ask, starts[middle])):
            high = middle
        else:
            low = middle + 1
    return _begun_at(ask, starts[low]) if low < len(starts) else None


async def _may_fit(context: Context, ask: ChatAsk) -> bool:
    """Whether a shorter chat fits; not if the template does not take it."""
    try:
        return await _fits(context, ask)
    except RequestError:
        return False


async def _fits(context: Context, ask: ChatAsk) -> bool:
    """Raises RequestError for all other faults."""
    card, prompt = await context.chat.render(ask)
    spans = await context.service.tokenize(card, prompt, add_special_tokens=False)
    try:
        tokens_allowed(len(spans), ask.params, card)
    except TooLongError:
        return False
    return True
