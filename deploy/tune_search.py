"""What ``roundhouse tune`` tries, and in which order. Pure: it is told results and names the next.

First every engine with its defaults; then, beginning with the fastest, the settings that can matter
for it, one at a time, each on top of the best so far. So the number of measurements grows with the
sum of the values, not with their product.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

# The options of ``serve`` that a candidate may set.
OPTIONS = (
    *("model", "threads", "step-tokens-max", "dtype", "kv-tokens", "sequences-max", "device"),
    *("num-shard", "engine-option"),
)
# Engines whose defaults reach this share of the best are worth refining after it.
REFINED_SHARE = 0.6
# Measurements of the same thing differ by about so much: within it, the simpler candidate wins.
NOISE = 0.02
# On an uneven machine two measurements of the same thing can differ by so much. If the two fastest
# are no further apart, they are measured once more, in turns, and their means decide.
UNSURE = 0.15
FINALISTS, ROUNDS = 2, 2
# What engines hold by default; see their modules.
SEQUENCES_DEFAULT, KV_TOKENS_DEFAULT, STEP_TOKENS_DEFAULT = 64, 32768, 256
PART_SEQUENCES_DEFAULT, PART_TOKENS_DEFAULT = 32, 2048


@dataclass(frozen=True, slots=True)
class Shape:
    """The traffic: tokens of a prompt, tokens of an answer, requests at once."""

    prompt_tokens: int
    new_tokens: int
    concurrency: int

    def __str__(self) -> str:
        return (
            f"{self.prompt_tokens} prompt + {self.new_tokens} new tokens,"
            f" {self.concurrency} at once"
        )


@dataclass(frozen=True, slots=True)
class Candidate:
    """An engine with settings: pairs of an option of ``serve`` and its value, in order.

    An engine's own option is ``engine-option`` with the value KEY=VALUE. ``model`` is a setting of
    those that serve another copy of the model than the first.
    """

    engine: str
    settings: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return " ".join((self.engine, *(_shown(*pair) for pair in self.settings)))

    @property
    def model(self) -> str:
        """Its own copy of the model; "": the first."""
        return dict(self.settings).get("model", "")

    def adding(self, option: str, value: str) -> "Candidate":
        """The same with one setting more, which takes the place of what it contradicts."""
        kept = (pair for pair in self.settings if _subject(*pair) != _subject(option, value))
        return Candidate(self.engine, tuple(sorted((*kept, (option, value)))))


def _shown(option: str, value: str) -> str:
    """A setting in a table: as it is typed, but for names that go without saying."""
    if option == "engine-option":
        return value
    return f"{option}={value.rstrip('/').rpartition('/')[2] if option == 'model' else value}"


def _subject(option: str, value: str) -> str:
    """What a setting is about: the option, or the engine's own option within it."""
    return f"{option} {value.partition('=')[0]}" if option == "engine-option" else option


def parse(text: str) -> Candidate:
    """``ENGINE[,OPTION=VALUE...]``. Raises ``ValueError`` with one line."""
    engine, *pairs = text.split(",")
    candidate = Candidate(engine)
    for pair in pairs:
        option, equals, value = pair.partition("=")
        option = option.replace("_", "-")
        if not equals or option not in OPTIONS:
            raise ValueError(f"{pair!r} is not OPTION=VALUE; options are {', '.join(OPTIONS)}")
        if option == "engine-option" and "=" not in value:
            raise ValueError(f"{pair!r} is not engine-option=KEY=VALUE")
        candidate = candidate.adding(option, value)
    return candidate


@dataclass(frozen=True, slots=True)
class Setting:
    """An option, the values worth trying, and what they may change."""

    option: str
    values: tuple[str, ...]
    why: str


Space = Callable[[str], Sequence[Setting]]


def base(engine: str, shape: Shape, model: str = "") -> Candidate:
    """An engine with its defaults, and the places that this traffic needs.

    ``model`` is the copy of the model that it serves, if that is not the first.
    """
    candidate = Candidate(engine)
    if model:
        candidate = candidate.adding("model", model)
    if shape.concurrency > SEQUENCES_DEFAULT:
        candidate = candidate.adding("sequences-max", str(shape.concurrency))
    return candidate


def space(engine: str, cores: int, shape: Shape, *, on_cpu: bool) -> tuple[Setting, ...]:
    """The settings worth trying for an engine, the most promising first."""
    settings: list[Setting] = []
    if engine == "llamacpp" and _fits_parts(shape):
        why = "no row of a step reads the masks of others' cells"
        settings.append(Setting("engine-option", ("kv=split",), why))
    if engine == "llamacpp":
        why = "flash attention is faster for many sequences, and not for every prompt"
        settings.append(Setting("engine-option", ("flash=off",), why))
    if on_cpu and engine in ("llamacpp", "torch", "vllm"):
        counts = dict.fromkeys(str(count) for count in (cores, cores - 1) if count > 0)
        why = "a fixed number of threads, instead of one that follows the machine's load"
        settings.append(Setting("threads", tuple(counts), why))
    most = shape.concurrency * shape.prompt_tokens
    sizes = (STEP_TOKENS_DEFAULT // 4, STEP_TOKENS_DEFAULT * 2, STEP_TOKENS_DEFAULT * 8)
    steps = tuple(str(size) for size in sizes if size > shape.concurrency and size < most)
    if steps:
        why = "larger chunks of prompts are computed faster, smaller ones hold up answers less"
        settings.append(Setting("step-tokens-max", steps, why))
    needed = shape.concurrency * (shape.prompt_tokens + shape.new_tokens)
    if needed > KV_TOKENS_DEFAULT:
        why = "a cache that holds all requests at once"
        settings.append(Setting("kv-tokens", (str(-(-needed // 1024) * 1024),), why))
    if engine in ("torch", "jax", "vllm"):
        # Last, as they choose well, and may have to compile everything anew.
        why = "half the memory traffic, or the width that the processor is fastest at"
        settings.append(Setting("dtype", ("bfloat16", "float32"), why))
    return tuple(settings)


def _fits_parts(shape: Shape) -> bool:
    """Whether there are several requests, each with a part of llama.cpp's divided cache for itself.

    ``base`` asks for as many as there are requests if those are more than the usual number.
    """
    parts = 1 < shape.concurrency <= PART_SEQUENCES_DEFAULT or shape.concurrency > SEQUENCES_DEFAULT
    return parts and shape.prompt_tokens + shape.new_tokens <= PART_TOKENS_DEFAULT


@dataclass(frozen=True, slots=True)
class Numbers:
    """What was measured: output tokens a second over all requests, and what one client feels.

    Times are in milliseconds. ``requests`` had their first token within the measurement, which took
    ``seconds``. ``dtype`` is the element type that the engine computed in. All are means if it was
    measured in several ``rounds``, but for ``requests`` and ``seconds``, which are sums.
    """

    tokens_s: float
    first_p50_ms: float
    gap_p50_ms: float
    gap_p99_ms: float
    requests: int
    seconds: float
    dtype: str = ""
    rounds: int = 1

    def and_again(self, other: "Numbers") -> "Numbers":
        """Both measurements as one."""
        rounds = self.rounds + other.rounds

        def mean(one: float, another: float) -> float:
            return (one * self.rounds + another * other.rounds) / rounds

        return Numbers(
            tokens_s=mean(self.tokens_s, other.tokens_s),
            first_p50_ms=mean(self.first_p50_ms, other.first_p50_ms),
            gap_p50_ms=mean(self.gap_p50_ms, other.gap_p50_ms),
            gap_p99_ms=mean(self.gap_p99_ms, other.gap_p99_ms),
            requests=self.requests + other.requests,
            seconds=self.seconds + other.seconds,
            dtype=other.dtype,
            rounds=rounds,
        )


@dataclass(frozen=True, slots=True)
class Result:
    """One candidate's numbers; without them, ``problem`` says in one line why there are none.

    ``late``: more time would have helped.
    """

    candidate: Candidate
    numbers: Numbers | None = None
    problem: str = ""
    cached: bool = False
    load_s: float = 0.0
    late: bool = False

    @property
    def score(self) -> float:
        """Output tokens a second; 0 for a failure."""
        return self.numbers.tokens_s if self.numbers else 0.0

    @property
    def dtype(self) -> str:
        """What it computed in, whether or not it was told to; "" if that is not known."""
        return self.numbers.dtype if self.numbers else ""


@dataclass(slots=True)
class Search:
    """The order of measurements. ``following`` yields candidates; each is to be ``tell``-ed."""

    bases: Sequence[Candidate]
    space: Space
    results: dict[Candidate, Result] = field(default_factory=dict)

    def following(self) -> Iterator[Candidate]:
        """The candidates, one after the other; what comes next depends on what has been told."""
        for candidate in dict.fromkeys(self.bases):
            yield candidate
        engines = dict.fromkeys(candidate.engine for candidate in self.bases)
        order = sorted(engines, key=lambda engine: -self._best(engine).score)
        for engine in order:
            if self._best(engine).score < REFINED_SHARE * self._top() or not self._top():
                continue
            for setting in self.space(engine):
                for value in setting.values:
                    best = self._best(engine)
                    candidate = best.candidate.adding(setting.option, value)
                    same = setting.option == "dtype" and best.dtype == value
                    if not same and candidate not in self.results:
                        yield candidate

    def tell(self, result: Result) -> None:
        """Notes what came of a candidate."""
        self.results[result.candidate] = result

    def finalists(self) -> list[Candidate]:
        """The two fastest, the faster one last, if a single measurement cannot tell them apart."""
        fastest = sorted(self.results.values(), key=lambda result: -result.score)[:FINALISTS]
        near = [one for one in fastest if one.score >= self._top() * (1 - UNSURE) and one.numbers]
        if len(near) < FINALISTS:
            return []
        rounds = ((one, one.numbers.rounds) for one in reversed(near) if one.numbers)
        return [one.candidate for one, measured in rounds if measured < ROUNDS]

    def planned(self) -> int:
        """How many measurements there will be, about: all told ones, and one engine's settings."""
        engines = dict.fromkeys(candidate.engine for candidate in self.bases)
        refining = max(
            (sum(len(setting.values) for setting in self.space(engine)) for engine in engines),
            default=0,
        )
        return max(len(self.results), len(dict.fromkeys(self.bases)) + refining)

    def _top(self) -> float:
        return max((result.score for result in self.results.values()), default=0.0)

    def _best(self, engine: str) -> Result:
        """The best result of an engine; of one that was never measured, an empty one."""
        own = [result for result in self.results.values() if result.candidate.engine == engine]
        return winner(own) or Result(Candidate(engine))


def winner(results: Sequence[Result]) -> Result | None:
    """The fastest; among those that are as fast within the noise, the one with fewest settings.

    Where that is not one either, the one whose slowest gaps between tokens are shortest.
    """
    top = max((result.score for result in results), default=0.0)
    near = [result for result in results if result.numbers and result.score >= top * (1 - NOISE)]
    return min(
        near,
        key=lambda one: (
            sum(option != "model" for option, _ in one.candidate.settings),
            one.numbers.gap_p99_ms if one.numbers else 0,
        ),
        default=None,
    )
