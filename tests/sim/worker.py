"""A scripted worker: a strict, independent model of what ``proto/shards/v1/shard.proto`` says.

It applies plans in their order and raises ``Violation`` at the first that breaks the contract.
Memory is physical: pages with reference counts, and in every cell the token that was computed into
it, with the adapter that computed it, so that a share of the wrong tokens, or a write into shared
memory, is caught by content. It shares no code with the core.

The next token is a function of the adapter and of all tokens before it, and of nothing else. So a
request has the same answer whatever happens to it on the way, and every client knows what it must
get.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from router.core.effects import Admit, RunPlan
from router.core.events import Limits

END_TOKEN = 0
TOKENS = 6
_MASK = (1 << 61) - 1


@dataclass(frozen=True, slots=True, eq=False)
class Wish:
    """How a request is sampled: all that a worker reads of it is whether its prompt is scored."""

    scores_prompt: bool = False


class Violation(AssertionError):
    """The core did something that it must not do."""


def ensure(condition: object, text: str) -> None:
    """Raises ``Violation`` if the condition does not hold."""
    if not condition:
        raise Violation(text)


def follow(digest: int, token: int) -> int:
    """The digest of a list of tokens with one more at its end."""
    return (digest * 1_000_003 + token + 1) & _MASK


def digest_of(salt: int, adapter: str, tokens: tuple[int, ...]) -> int:
    """The digest of a list of tokens, for a model and one of its adapters."""
    digest = salt
    for letter in adapter.encode():
        digest = follow(digest, letter)
    for token in tokens:
        digest = follow(digest, token)
    return digest


def draw(digest: int) -> int:
    """The token that comes after the tokens with this digest; one in twelve ends the answer."""
    mixed = ((digest ^ digest >> 29) * 0xBF58476D1CE4E5B9) & _MASK
    mixed ^= mixed >> 31
    return END_TOKEN if mixed % 12 == 0 else 1 + (mixed >> 8) % (TOKENS - 1)


@dataclass(slots=True, eq=False)
class Page:
    """A page of KV cells: in each, in order, a token and the adapter that it was computed with."""

    cells: list[tuple[int, str]] = field(default_factory=list)
    holders: int = 1


@dataclass(slots=True, eq=False)
class Resident:
    """One sequence: its known tokens, and the pages of those that are computed.

    ``scored`` tokens have a log probability to be told, from the second on: those of the prompt.
    """

    tokens: list[int]
    digest: int
    computed: int
    pages: list[Page]
    adapter: str
    drawn: int = 0
    failed: bool = False
    scored: int = 0


@dataclass(slots=True)
class Drawn:
    """What came of a plan."""

    sequences: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    failures: list[tuple[int, str]] = field(default_factory=list)
    prompts: list[tuple[int, int, tuple[object, ...]]] = field(default_factory=list)


class Worker:
    """One life of one group. ``heirs`` counts the drops that left shared pages to others."""

    def __init__(
        self,
        epoch: int,
        limits: Limits,
        kv_tokens: int,
        salt: int,
        adapters: tuple[str, ...],
        late: bool,
    ) -> None:
        self.epoch = epoch
        self.late = late
        self.adapters = ("", *adapters)
        self.limits = limits
        self.kv_tokens = kv_tokens
        self.salt = salt
        self.residents: dict[int, Resident] = {}
        self.pages = 0
        self.plan_id = 0
        self.heirs = 0

    @property
    def kv_used(self) -> int:
        """Tokens of KV memory in use, in whole pages."""
        return self.pages * self.limits.page_tokens

    def apply(self, plan: RunPlan, fails: Callable[[], bool]) -> Drawn:
        """Does what the plan says; ``fails`` says of each working sequence whether it breaks."""
        ensure(plan.epoch == self.epoch, "a plan of another epoch")
        ensure(plan.plan_id == self.plan_id + 1, "plan ids do not count up by one")
        self.plan_id = plan.plan_id
        for sequence in plan.drops:
            self._drop(sequence)
        drawn = Drawn()
        for admit in plan.admits:
            self._admit(admit, drawn)
        self._compute(plan, drawn, fails)
        ensure(self.kv_used <= self.kv_tokens, "more KV memory is used than there is")
        ensure(len(self.residents) <= self.limits.sequences_max, "too many sequences are resident")
        return drawn

    def _drop(self, sequence: int) -> None:
        ensure(sequence in self.residents, f"{sequence} is dropped but not resident")
        shared = False
        for page in self.residents.pop(sequence).pages:
            page.holders -= 1
            shared |= page.holders > 0
            self.pages -= page.holders == 0
        self.heirs += shared

    def _admit(self, admit: Admit, drawn: Drawn) -> None:
        ensure(admit.sequence not in self.residents, f"{admit.sequence} is admitted twice")
        ensure(0 < admit.prompt_len <= len(admit.tokens), "an admit has no prompt")
        ensure(admit.adapter in self.adapters, f"there is no adapter {admit.adapter} here")
        digest = digest_of(self.salt, admit.adapter, admit.tokens)
        resident = Resident(list(admit.tokens), digest, 0, [], admit.adapter)
        if isinstance(admit.sampling, Wish) and admit.sampling.scores_prompt:
            ensure(admit.share_len == 0, "a prompt that is to be scored is not computed")
            resident.scored = admit.prompt_len
        if admit.share_len:
            self._share(admit, resident)
        else:
            ensure(admit.share_from == 0, "share_from without share_len")
        if resident.failed:
            drawn.failures.append((admit.sequence, "what it was to share could not be computed"))
        self.residents[admit.sequence] = resident

    def _share(self, admit: Admit, resident: Resident) -> None:
        page = self.limits.page_tokens
        ensure(self.limits.shares_prefix, "this engine cannot share")
        ensure(admit.share_from in self.residents, "a share of a sequence that is not resident")
        ensure(0 < admit.share_len < len(admit.tokens), "a share leaves nothing to compute")
        ensure(admit.share_len % page == 0, "a share of part of a page")
        source = self.residents[admit.share_from]
        if source.failed and source.computed < admit.share_len:
            resident.failed = True
            return
        ensure(admit.share_len <= source.computed, "a share of more than is computed")
        resident.pages = source.pages[: admit.share_len // page]
        cells = [cell for shared in resident.pages for cell in shared.cells]
        own = [(token, admit.adapter) for token in admit.tokens[: admit.share_len]]
        ensure(cells == own, "a share of other tokens, or of another adapter's")
        resident.computed = admit.share_len
        for shared in resident.pages:
            shared.holders += 1

    def _compute(self, plan: RunPlan, drawn: Drawn, fails: Callable[[], bool]) -> None:
        ensure(len(plan.work_sequences) == len(plan.work_tokens), "work lists of unequal length")
        ensure(len(set(plan.work_sequences)) == len(plan.work_sequences), "work named twice")
        ensure(sum(plan.work_tokens) <= self.limits.step_tokens_max, "more work than a step does")
        for sequence, count in zip(plan.work_sequences, plan.work_tokens, strict=True):
            resident = self.residents.get(sequence)
            ensure(resident is not None, f"work on {sequence}, which is not resident")
            assert resident is not None
            if resident.failed:
                continue
            ensure(count > 0, "work of nothing")
            ensure(resident.computed + count <= len(resident.tokens), "work on unknown tokens")
            if fails():
                resident.failed = True
                drawn.failures.append((sequence, "the engine cannot go on with it"))
                continue
            self._score(sequence, resident, count, drawn)
            self._write(resident, count)
            if resident.computed == len(resident.tokens):
                self._sample(sequence, resident, drawn)

    def _score(self, sequence: int, resident: Resident, count: int, drawn: Drawn) -> None:
        """Tells of the prompt what these tokens predict: each says how likely the next one is."""
        first, last = resident.computed, resident.computed + count
        if self.late:
            first, last = 0, last if last == len(resident.tokens) else 0
        start, end = first + 1, min(last + 1, resident.scored)
        values = tuple(("score", sequence, position) for position in range(start, end))
        if values:
            drawn.prompts.append((sequence, start, values))

    def _write(self, resident: Resident, count: int) -> None:
        page = self.limits.page_tokens
        ensure(resident.computed + count <= self.limits.length_max, "a sequence is too long")
        for position in range(resident.computed, resident.computed + count):
            if position % page == 0:
                resident.pages.append(Page())
                self.pages += 1
            ensure(resident.pages[-1].holders == 1, "a write into shared memory")
            resident.pages[-1].cells.append((resident.tokens[position], resident.adapter))
        resident.computed += count

    def _sample(self, sequence: int, resident: Resident, drawn: Drawn) -> None:
        token = draw(resident.digest)
        drawn.sequences.append(sequence)
        drawn.tokens.append(token)
        drawn.positions.append(len(resident.tokens))
        resident.tokens.append(token)
        resident.digest = follow(resident.digest, token)
        resident.drawn += 1
