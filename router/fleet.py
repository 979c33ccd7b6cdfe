"""Which models there are, and which groups hold them, as far as users may know.

Groups report here when they come up and go down. A model stays known while its workers are down:
its requests then wait in the queue for one to return.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from router.config import GroupSpec, Settings
from router.core.events import Limits
from router.errors import Fault, RequestError
from router.text.agreement import difference
from router.text.tokenizer import Tokenizer
from router.turns import Turns
from shards.v1.shard_pb2 import Constraint

DEFAULT_NAMES = frozenset({"", "tgi", "dummy"})
"""Model names that clients of TGI and of OpenAI send when they do not care."""
# What to do with two groups that cannot serve one model together.
APART = "give one of them a router of its own, or its worker another --model-id"

EmbedCall = Callable[[Sequence[Sequence[int]]], Awaitable[list[Sequence[float]]]]
"""Turns token ids into vectors on one group; see ``Link.embed``."""
PrepareCall = Callable[[Constraint], Awaitable[None]]
"""Has a constraint compiled by every rank of one group; see ``Link.prepare``."""


class MismatchError(Exception):
    """Workers that cannot serve, or not together; the text is one line that says why."""


@dataclass(frozen=True, slots=True)
class GroupCard:
    """One group: what its ranks said when they last came up, and whether they are up now.

    ``limits`` are the smallest of its ranks'; ``features`` what all of them can do;
    ``weight_bytes`` is their sum and ``load_seconds`` their longest.
    """

    name: str
    model: str
    engine: str
    engine_version: str
    device: str
    dtype: str
    scheduling: str
    world: int
    limits: Limits
    features: tuple[str, ...]
    eos_token_ids: tuple[int, ...]
    vocab_size: int
    tokenizer_sha256: str
    instances: tuple[str, ...]
    load_seconds: float = 0.0
    weight_bytes: int = 0
    warnings: tuple[str, ...] = ()
    ready: bool = True
    adapters: tuple[str, ...] = ()
    embed_tokens_max: int = 0


@dataclass(frozen=True, slots=True)
class ModelCard:
    """One model. ``features`` and ``adapters`` are those that at least one of its groups has.

    ``embed_tokens_max`` is how long an input to embed can be on each of the groups that embed.

    ``eos_token_ids`` are all that any of its groups names: not every copy of a model names all.
    """

    id: str
    tokenizer: Tokenizer
    eos_token_ids: tuple[int, ...]
    max_input_tokens: int
    max_total_tokens: int
    vocab_size: int
    features: tuple[str, ...]
    groups: tuple[GroupCard, ...]
    adapters: tuple[str, ...] = ()
    embed_tokens_max: int = 0


def _pair(one: GroupCard, other: GroupCard) -> frozenset[str]:
    """The tokenizers of two groups, in no order."""
    return frozenset((one.tokenizer_sha256, other.tokenizer_sha256))


class Fleet:
    """All models and groups behind one router. Changed by the groups alone."""

    def __init__(self, settings: Settings, specs: Iterable[GroupSpec]) -> None:
        self._settings = settings
        self._specs = list(specs)
        self._cards: dict[str, GroupCard] = {}
        self._engines: dict[str, str] = {}
        self._claims: dict[str, GroupCard] = {}
        # Claims whose tokenizer has been agreed on, and what any two tokenizers differ in.
        self._agreed: dict[str, GroupCard] = {}
        self._differences: dict[frozenset[str], str] = {}
        self._tokenizers: dict[str, Tokenizer] = {}
        self._files: dict[str, Mapping[str, bytes]] = {}
        self._watchers: list[Callable[[], None]] = []
        self._models: dict[str, ModelCard] = {}
        self._embed_calls: dict[str, EmbedCall] = {}
        self._prepare_calls: dict[str, PrepareCall] = {}
        self._ready = asyncio.Event()
        self._expecting = False
        self.turns = Turns(self._specs)

    # --- for users

    def model(self, name: str | None) -> ModelCard:
        """Finds a model by its name or by that of one of its adapters.

        None, "", "tgi" and "dummy" mean the default one, that of the first group. Raises
        ``RequestError``: UNAVAILABLE if its workers have never come up, MODEL_NOT_FOUND if nobody
        serves a model of that name.
        """
        card = self._models.get(name or "") or self._parent(name)
        if card is not None:
            return card
        if not self._models:
            raise RequestError(
                Fault.UNAVAILABLE, "no worker has come up yet; try again in a few seconds"
            )
        if name is None or name in DEFAULT_NAMES:
            return self.models()[0]
        if any(name == spec.model for spec in self._specs):
            raise RequestError(
                Fault.UNAVAILABLE, f"no worker of model {name!r} has come up yet; try again later"
            )
        adapters = (adapter for model in self.models() for adapter in model.adapters)
        known = ", ".join(dict.fromkeys((*self._models, *adapters)))
        raise RequestError(
            Fault.MODEL_NOT_FOUND, f"model {name!r} is not served here; there is: {known}", "model"
        )

    def adapter(self, name: str | None) -> str:
        """The adapter that the name of a model stands for; "" if it means a model itself."""
        return name if name and name not in self._models and self._parent(name) else ""

    def _parent(self, name: str | None) -> ModelCard | None:
        """The first model with an adapter of that name."""
        return next((card for card in self._models.values() if name in card.adapters), None)

    def embed_calls(self, model: str) -> dict[str, EmbedCall]:
        """The groups of a model that are up and can embed, and how each is asked to."""
        return {
            name: call
            for name, call in self._embed_calls.items()
            if self._cards[name].model == model
        }

    def prepare_calls(self, model: str) -> dict[tuple[str, ...], PrepareCall]:
        """How the groups of a model that are up and follow constraints are asked to compile one.

        By the instances of their ranks, which tell each life of a worker from the others.
        """
        return {
            self._cards[name].instances: call
            for name, call in self._prepare_calls.items()
            if self._cards[name].model == model
        }

    def models(self) -> tuple[ModelCard, ...]:
        """Every model that has ever come up, the default one first."""
        return tuple(self._models.values())

    def groups_up(self) -> dict[str, bool]:
        """For each configured group, whether it is connected."""
        return {
            spec.name: spec.name in self._cards and self._cards[spec.name].ready
            for spec in self._specs
        }

    @property
    def healthy(self) -> bool:
        """Whether some model takes requests, which may have to wait for a group that is coming."""
        return any(map(self.takes, self._models.values()))

    def takes(self, model: ModelCard) -> bool:
        """Whether a group of the model is up, or one is coming in the place of those that were."""
        return self._expecting or any(group.ready for group in model.groups)

    def engines(self) -> Mapping[str, str]:
        """For each group that has ever come up, the name of its engine."""
        return self._engines

    async def wait_ready(self) -> None:
        """Waits until a first group has come up. The caller sets the deadline."""
        await self._ready.wait()

    # --- for gateways

    def groups(self) -> list[tuple[GroupSpec, GroupCard | None]]:
        """Every configured group, and what it last said of itself, if it has ever come up."""
        return [(spec, self._cards.get(spec.name)) for spec in self._specs]

    @property
    def expecting(self) -> bool:
        """Whether a group is coming for which others have been ended."""
        return self._expecting

    def tokenizer_files(self, sha256: str) -> Mapping[str, bytes] | None:
        """The tokenizer files with this hash, by name, if some group has fetched them."""
        return self._files.get(sha256)

    @contextmanager
    def watched(self, changed: Callable[[], None]) -> Iterator[None]:
        """Calls ``changed``, which must not wait, after each change of a group."""
        self._watchers.append(changed)
        try:
            yield
        finally:
            self._watchers.remove(changed)

    # --- for whoever adds and removes groups

    def add(self, spec: GroupSpec) -> None:
        """A further group, behind the others; what is known of a former one of its name stays."""
        self._specs = [*(one for one in self._specs if one.name != spec.name), spec]
        self.turns.add(spec)
        self._rebuild()

    def expect(self, coming: bool) -> None:
        """A group is coming for which others are ended, or that is over, in whatever way."""
        if coming is not self._expecting:
            self._expecting = coming
            self._tell_watchers()

    def forget(self, name: str) -> None:
        """A group is gone for good, and its model too, if no other group has had it."""
        self._specs = [spec for spec in self._specs if spec.name != name]
        self.turns.remove(name)
        self._cards.pop(name, None)
        self.leaving(name)
        self._rebuild()

    # --- for groups

    def tokenizer(self, sha256: str) -> Tokenizer | None:
        """The tokenizer with this hash of its files, if some group has fetched it before."""
        return self._tokenizers.get(sha256)

    def keep_files(self, sha256: str, files: Mapping[str, bytes]) -> None:
        """Keeps the files of a tokenizer, some megabytes, for gateways that will ask for them."""
        self._files[sha256] = files

    @contextmanager
    def claim(self, card: GroupCard) -> Iterator[None]:
        """Holds the workers of a group for it, from before their streams are opened to their end.

        Raises ``MismatchError`` if the group cannot join the others.
        """
        for other in self._claims.values():
            if set(card.instances) & set(other.instances):
                raise MismatchError(f"a worker of this group already serves group {other.name}")
        for other in self._replicas(card, self._claims):
            if other.vocab_size != card.vocab_size:
                raise MismatchError(
                    f"group {other.name} serves {card.model} with {other.vocab_size} tokens, and "
                    f"this one has {card.vocab_size}; {APART}"
                )
        self._claims[card.name] = card
        try:
            yield
        finally:
            del self._claims[card.name]
            self._agreed.pop(card.name, None)

    async def agree(self, card: GroupCard, tokenizer: Tokenizer) -> None:
        """Makes sure that the group's tokenizer can stand for that of every replica of its model.

        Prompts are read, and answers written, by the tokenizer of the first group that serves the
        model, whichever group computes them. Raises ``MismatchError`` if they differ.
        """
        self._tokenizers[card.tokenizer_sha256] = tokenizer
        # While two are compared another group may come to an agreement: then once more.
        while missing := [
            other
            for other in self._replicas(card, self._agreed)
            if _pair(card, other) not in self._differences
        ]:
            pair, known = _pair(card, missing[0]), self._tokenizers[missing[0].tokenizer_sha256]
            differ = "" if len(pair) == 1 else await asyncio.to_thread(difference, known, tokenizer)
            self._differences[pair] = differ
        for other in self._replicas(card, self._agreed):
            if found := self._differences[_pair(card, other)]:
                raise MismatchError(
                    f"group {other.name} serves {card.model} with another tokenizer ({found});"
                    f" {APART}"
                )
        self._agreed[card.name] = card
        self.turns.over(card.name)

    def _replicas(self, card: GroupCard, coming: Mapping[str, GroupCard]) -> list[GroupCard]:
        """The other groups of a card's model: those that have been up, and those coming up."""
        return [
            other
            for other in {**self._cards, **coming}.values()
            if other.name != card.name and other.model == card.model
        ]

    def up(
        self,
        card: GroupCard,
        tokenizer: Tokenizer,
        embed: EmbedCall | None = None,
        prepare: PrepareCall | None = None,
    ) -> None:
        """A group has come up. ``embed`` asks it to embed, ``prepare`` to compile, if it can."""
        if embed is not None and "embeddings" in card.features:
            self._embed_calls[card.name] = embed
        if prepare is not None and "grammar" in card.features:
            self._prepare_calls[card.name] = prepare
        self._tokenizers[card.tokenizer_sha256] = tokenizer
        self._cards[card.name] = card
        self._engines[card.name] = card.engine
        self._rebuild()
        self._ready.set()

    def leaving(self, name: str) -> None:
        """A group that is up gets no more requests; nor is it asked beside the log."""
        self._embed_calls.pop(name, None)
        self._prepare_calls.pop(name, None)

    def down(self, name: str) -> None:
        """A group has gone down. What it said of itself stays known."""
        self._embed_calls.pop(name, None)
        self._prepare_calls.pop(name, None)
        self._cards[name] = replace(self._cards[name], ready=False)
        self._rebuild()

    def _rebuild(self) -> None:
        """Forms the models anew, in the order of the configured groups."""
        members: dict[str, list[GroupCard]] = {}
        for spec in self._specs:
            card = self._cards.get(spec.name)
            if card is not None:
                members.setdefault(card.model, []).append(card)
        self._models = {name: self._model_of(name, cards) for name, cards in members.items()}
        self._tell_watchers()

    def _tell_watchers(self) -> None:
        for changed in self._watchers:
            changed()

    def _model_of(self, name: str, cards: list[GroupCard]) -> ModelCard:
        """The model that these groups hold; a request may be as long as the roomiest one allows."""
        first = cards[0]
        ends = (token for card in cards for token in card.eos_token_ids)
        total = max(self._total_tokens(card.limits) for card in cards)
        return ModelCard(
            id=name,
            tokenizer=self._tokenizers[first.tokenizer_sha256],
            eos_token_ids=tuple(dict.fromkeys(ends)),
            max_input_tokens=min(self._settings.max_input_tokens or total - 1, total - 1),
            max_total_tokens=total,
            vocab_size=first.vocab_size,
            features=tuple(sorted({feature for card in cards for feature in card.features})),
            groups=tuple(cards),
            adapters=tuple(dict.fromkeys(name for card in cards for name in card.adapters)),
            embed_tokens_max=min(
                (card.embed_tokens_max for card in cards if card.embed_tokens_max), default=0
            ),
        )

    def _total_tokens(self, limits: Limits) -> int:
        """The longest request, prompt and answer together, that an empty group can hold."""
        held = min(limits.kv_tokens, self._settings.max_batch_total_tokens or limits.kv_tokens)
        held -= held % limits.page_tokens
        asked = self._settings.max_total_tokens or limits.length_max
        return min(asked, limits.length_max, held)
