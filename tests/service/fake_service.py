"""A service in memory: it yields what a test scripts, and counts what happens to it."""

import asyncio
import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Self

from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models, pre_tokenizers

from router.ask import Ask, Chunk, Finish, TokenOut
from router.core.events import Limits, Reason
from router.errors import Fault, RequestError
from router.fleet import GroupCard, ModelCard
from router.text.tokenizer import Tokenizer, TokenSpan

FEATURES = (
    "logprobs",
    "penalties",
    "seed",
    "logit_bias",
    "min_tokens",
    "prompt_logprobs",
    "grammar",
)
WORDS = ("Once", " upon", " a", " tîme", " 🙂")

Step = Chunk | RequestError | asyncio.Event


@lru_cache
def byte_tokenizer() -> Tokenizer:
    """A real tokenizer with one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    hf = HfTokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    hf.decoder = decoders.ByteLevel()
    return Tokenizer.from_files({"tokenizer.json": hf.to_str().encode()})


def words(
    texts: Sequence[str] = WORDS,
    reason: Reason = Reason.LENGTH,
    *,
    prompt_tokens: int = 7,
    seed: int | None = None,
    tops: int = 0,
    mean: float = -0.5,
) -> list[Step]:
    """An answer with one token per chunk."""
    top = tuple((90 + i, f"t{i}", -float(i)) for i in range(tops))
    outs = [TokenOut(10 + i, text, False, mean, top) for i, text in enumerate(texts)]
    finish = Finish(reason, "".join(texts), prompt_tokens, len(texts), 2, seed)
    return [Chunk((out,), out.text, finish if out is outs[-1] else None) for out in outs]


class FakeGeneration:
    """Plays one script."""

    def __init__(self, service: "FakeService", steps: Sequence[Step]) -> None:
        self.prompt_tokens, self.prompt_ids = 7, tuple(range(70, 77))
        self._service = service
        finishes = [step.finish for step in steps if isinstance(step, Chunk) and step.finish]
        self.prompt = finishes[0].prompt if finishes else ()
        self._steps = iter(steps)
        self._over = False

    async def __aenter__(self) -> Self:
        self._service.open += 1
        return self

    async def __aexit__(self, *_: object) -> None:
        self._service.open -= 1
        if not self._over:
            self._service.cancelled += 1
            self._service.left.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        for step in self._steps:
            if isinstance(step, asyncio.Event):
                self._service.waiting.set()
                await step.wait()
                continue
            if isinstance(step, RequestError):
                self._over = True
                raise step
            self._over = step.finish is not None
            return step
        raise StopAsyncIteration


class FakeService:
    """Answers the k-th ask with the k-th script, the last one again and again."""

    def __init__(self, *scripts: Sequence[Step]) -> None:
        self.scripts = list(scripts) or [words()]
        self.asks: list[Ask] = []
        self.messages: list[Any] = []
        self.variables: dict[str, Any] = {}
        self.refusal: Exception | None = None
        self.refused_errors: list[RequestError] = []
        self.open = 0
        self.cancelled = 0
        self.waiting = asyncio.Event()
        self.left = asyncio.Event()
        self.fleet: FakeFleet | None = None

    async def generate(self, ask: Ask) -> FakeGeneration:
        if self.fleet is not None:
            self.fleet.model(ask.model)
        if self.refusal is not None:
            raise self.refusal
        number = min(len(self.asks), len(self.scripts) - 1)
        self.asks.append(ask)
        return FakeGeneration(self, self.scripts[number])

    def refused(self, error: RequestError) -> None:
        self.refused_errors.append(error)

    def card(self, model: ModelCard | str | None) -> ModelCard:
        assert self.fleet is not None
        return model if isinstance(model, ModelCard) else self.fleet.model(model)

    async def render_chat(
        self,
        model: ModelCard | str | None,
        messages: Sequence[Any],
        name: str | None = None,
        /,
        **variables: Any,
    ) -> str:
        self.messages, self.variables = list(messages), variables
        lines = [f"<{m['role']}>{m['content']}</>" for m in messages]
        return "".join(lines) + ("<assistant>" if variables["add_generation_prompt"] else "")

    async def tokenize(
        self, model: ModelCard | str | None, text: str, add_special_tokens: bool = True
    ) -> list[TokenSpan]:
        assert self.fleet is not None
        card = self.fleet.model(model) if not isinstance(model, ModelCard) else model
        return card.tokenizer.encode_offsets(text, add_special_tokens)

    async def detokenize(
        self, model: ModelCard | str | None, ids: Sequence[int], skip_special_tokens: bool = True
    ) -> str:
        assert self.fleet is not None
        card = self.fleet.model(model) if not isinstance(model, ModelCard) else model
        return card.tokenizer.decode(list(ids), skip_special_tokens)


class FakeFleet:
    """One model, ``m/one``, on one group."""

    def __init__(self) -> None:
        self.tokenizer = byte_tokenizer()
        self.features = FEATURES
        self.up = True
        self.known = True

    def models(self) -> tuple[ModelCard, ...]:
        if not self.known:
            return ()
        group = GroupCard(
            "g0", "m/one", "scripted", "1.0", "cpu", "f32", "caller", 1,
            Limits(4096, 1, 64, 512, 2048, True), self.features, (0,), 256, "hash", ("i",),
            ready=self.up,
        )  # fmt: skip
        numbers = (0,), 2047, 2048, 256
        return (ModelCard("m/one", self.tokenizer, *numbers, self.features, (group,)),)

    def groups_up(self) -> dict[str, bool]:
        return {"g0": self.up and self.known}

    def takes(self, model: ModelCard) -> bool:
        return self.up

    @property
    def healthy(self) -> bool:
        return self.up and self.known

    def adapter(self, name: str | None) -> str:
        return ""

    def model(self, name: str | None) -> ModelCard:
        if not self.known:
            raise RequestError(Fault.UNAVAILABLE, "no worker has come up yet")
        if name in (None, "", "tgi", "dummy", "m/one"):
            return self.models()[0]
        raise RequestError(Fault.MODEL_NOT_FOUND, f"model {name!r} is not served here", "model")


class FakeMetrics:
    def __init__(self) -> None:
        self.refusals: list[RequestError] = []

    def render(self) -> bytes:
        return b"# HELP x y\n"

    def refused(self, error: RequestError) -> None:
        self.refusals.append(error)


def events_of(body: str) -> list[Any]:
    """The JSON of the server-sent events of a stream, ``[DONE]`` as text."""
    found: list[Any] = []
    for block in body.split("\n\n"):
        if block.startswith("data:"):
            data = block.removeprefix("data:").lstrip()
            found.append(data if data == "[DONE]" else json.loads(data))
    return found
