"""OpenAI's completions."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from router.api.rest import completion_shapes as shapes
from router.api.rest.asks import (
    fan_out,
    invalid,
    model_name,
    openai_params,
    priority,
    unsupported,
)
from router.api.rest.collect import Whole, collect_all
from router.api.rest.context import Context
from router.api.rest.errors import Dialect
from router.api.rest.models_completions import CompletionRequest
from router.api.rest.openai_answers import Job, stream, whole
from router.api.rest.openai_shapes import Head
from router.api.rest.refusals import refuse_unsupported
from router.ask import Ask, Params
from router.config import Settings
from router.fleet import ModelCard
from router.generation import Generation

KIND = "text_completion"


class CompletionRoute:
    """The handler."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def completions(self, request: Request) -> Response:
        """Continues one or more prompts, whole or as events."""
        return await self._context.answer(request, CompletionRequest, Dialect.OPENAI, self.answer)

    async def answer(self, body: CompletionRequest, arrived: float) -> Response:
        """Answers a checked body. Raises RequestError."""
        context = self._context
        refuse_unsupported(body)
        name = model_name(body.model)
        model, adapter = context.fleet.model(name), context.fleet.adapter(name)
        style = shapes.Style.of(body)
        asks = [
            replace(ask, model=model.id, adapter=adapter)
            for ask in completion_asks(body, model, context.settings)
        ]
        tries = tries_of(body)
        head = Head("cmpl", KIND, adapter or model.id, body, model)
        characters = sum(len(ask.prompt) for ask in asks[::tries])
        job = Job(body, model, head, tries, characters, style.silent)
        echoes = [await self._echo(ask) if body.echo else "" for ask in asks[::tries]]
        if body.stream:
            events = [
                shapes.CompletionEvents(head, index, echoes[index // tries], style)
                for index in range(len(asks))
            ]
            starts = [partial(self._begin, *pair) for pair in zip(asks, events, strict=True)]
            return stream(job, starts, [one.of for one in events])
        answers = await collect_all(context.service, asks)
        choices = [
            shapes.completion_choice(index, answer, echoes[index // (body.n or 1)], style)
            for index, answer in enumerate(best(answers, tries, body.n or 1))
        ]
        return whole(job, answers, choices, arrived)

    async def _begin(self, ask: Ask, events: shapes.CompletionEvents) -> Generation:
        answer = await self._context.service.generate(ask)
        events.begin(answer)
        return answer

    async def _echo(self, ask: Ask) -> str:
        if isinstance(ask.prompt, str):
            return ask.prompt
        skip = ask.params.skip_special_tokens
        return await self._context.service.detokenize(ask.model, ask.prompt, skip)


def tries_of(body: CompletionRequest) -> int:
    """Returns how many answers are made for each prompt."""
    return max(body.n or 1, body.best_of or 1)


def best(answers: Sequence[Whole], tries: int, wanted: int) -> list[Whole]:
    """Returns the best ``wanted`` of each ``tries`` answers, the best first, as TGI chooses them.

    If all are wanted they stay in the order in which they were asked for.
    """
    if tries == wanted:
        return list(answers)
    chosen = []
    for start in range(0, len(answers), tries):
        group = answers[start : start + tries]
        chosen += sorted(group, key=lambda one: one.mean_logprob, reverse=True)[:wanted]
    return chosen


def completion_asks(body: CompletionRequest, model: ModelCard, settings: Settings) -> list[Ask]:
    """Returns the asks of a completion request, for each prompt in turn all of its tries.

    Raises RequestError.
    """
    params = completion_params(body, model, settings)
    prompts = prompts_of(body, settings)
    count, limit = len(prompts) * tries_of(body), settings.max_concurrent_requests
    if count > limit:
        field = "best_of" if body.best_of else "n"
        raise invalid(f"prompts times {field} must be at most {limit}, not {count}", field)
    asks: list[Ask] = []
    for prompt in prompts:
        ask = Ask(
            prompt=prompt,
            params=params,
            add_special_tokens=body.add_special_tokens is not False,
            priority=priority(body),
        )
        asks += fan_out(ask, tries_of(body))
    return asks


def completion_params(body: CompletionRequest, model: ModelCard, settings: Settings) -> Params:
    """Returns the parameters of a completion request. Raises RequestError."""
    choosing = tries_of(body) > (body.n or 1)
    _check_best_of(body, model, choosing)
    scored = bool(body.echo) and body.logprobs is not None
    if scored and "prompt_logprobs" not in model.features:
        text = f"no engine of {model.id} scores prompts; leave it or logprobs out"
        raise unsupported("echo", text)
    if body.max_tokens == 0:
        if not body.echo:
            raise invalid("max_tokens must be at least 1, or 0 with echo", "max_tokens")
        # Engines say nothing of a prompt without a token behind it; that one is not shown.
        body = body.model_copy(update={"max_tokens": 1})
    params = openai_params(body, settings)
    return replace(
        params,
        logprobs=body.logprobs is not None or choosing,
        top_logprobs=max(body.logprobs or 0, body.prompt_logprobs or 0),
        prompt_logprobs=params.prompt_logprobs or scored,
    )


def _check_best_of(body: CompletionRequest, model: ModelCard, choosing: bool) -> None:
    if body.best_of is not None and body.best_of < (body.n or 1):
        raise invalid(f"best_of must be at least n, which is {body.n}", "best_of")
    if choosing and body.stream:
        raise unsupported("best_of", "leave it out, or do not stream: the best is known at the end")
    if choosing and "logprobs" not in model.features:
        raise unsupported("best_of", f"no engine of {model.id} reports log probabilities")


def prompts_of(body: CompletionRequest, settings: Settings) -> list[str | tuple[int, ...]]:
    """Returns the prompts of a completion request, as text or token ids. Raises RequestError."""
    given: Any = body.prompt
    many = isinstance(given, list) and not (given and isinstance(given[0], int))
    prompts: list[Any] = given if many else [given]
    limit = settings.max_client_batch_size
    if len(prompts) > limit:
        raise invalid(f"at most {limit} prompts go into one request, not {len(prompts)}", "prompt")
    if not prompts or not all(prompts):
        raise invalid("prompt cannot be empty", "prompt")
    out: list[str | tuple[int, ...]] = []
    for prompt in prompts:
        ids = not isinstance(prompt, str)
        if ids and min(prompt) < 0:
            raise invalid("token ids cannot be negative", "prompt")
        out.append(tuple(prompt) if ids else prompt)
    return out
