"""Messages of ``shards.v1`` to and from the engine's own types, and the digest of a log.

A plan that says the impossible is refused here with ``PlanError``; what depends on the engine's
state, the engine checks.
"""

import hashlib
import math
from array import array
from collections.abc import Collection, Iterator, Sequence

from shards.engines.base import (
    Admit,
    Constraint,
    ConstraintKind,
    EngineInfo,
    FeatureError,
    Outcome,
    Plan,
    PlanError,
    PromptLogprobs,
    SamplingParams,
    Scheduling,
    Vectors,
    Watermark,
)
from shards.v1 import shard_pb2

CHUNK_BYTES = 1 << 20
EMBED_INPUTS_MAX = 256
_SCHEDULING = {
    Scheduling.CALLER: shard_pb2.SCHEDULING_KIND_CALLER,
    Scheduling.STEPPED: shard_pb2.SCHEDULING_KIND_STEPPED,
    Scheduling.SELF: shard_pb2.SCHEDULING_KIND_SELF,
}
# Lowest and highest value of each number; where 0 is "off" on the wire, the neutral value.
_NUMBERS = (
    ("temperature", 0.0, math.inf, 0.0),
    ("top_p", 0.0, 1.0, 1.0),
    ("min_p", 0.0, 1.0, 0.0),
    ("typical_p", 0.0, 1.0, 1.0),
    ("repetition_penalty", 0.0, math.inf, 1.0),
    ("frequency_penalty", -math.inf, math.inf, 0.0),
    ("presence_penalty", -math.inf, math.inf, 0.0),
)
_GREEDY = SamplingParams()
_GREEDY_BYTES = 0


def plan_from_wire(message: shard_pb2.Plan, adapters: Collection[str] = ()) -> Plan:
    """The engine's plan. ``adapters`` are those that the engine has.

    Raises ``PlanError`` for numbers that no engine could follow, and for an adapter that this one
    does not have.
    """
    if len(message.work_sequences) != len(message.work_tokens):
        raise PlanError(
            f"work_sequences has {len(message.work_sequences)} entries"
            f" and work_tokens {len(message.work_tokens)}"
        )
    return Plan(
        drops=list(message.drops),
        admits=[_admit(admit, adapters) for admit in message.admits],
        work=list(zip(message.work_sequences, message.work_tokens, strict=True)),
    )


def _admit(message: shard_pb2.Admit, adapters: Collection[str]) -> Admit:
    adapter = message.adapter
    if adapter and adapter not in adapters:
        known = ", ".join(adapters) or "none"
        raise PlanError(
            f"admit of sequence {message.sequence} with the adapter {adapter!r};"
            f" the engine has {known}"
        )
    return Admit(
        sequence=message.sequence,
        tokens=list(message.tokens),
        prompt_len=message.prompt_len,
        sampling=_sampling(message.sequence, message.sampling),
        share_from=message.share_from,
        share_len=message.share_len,
        adapter=adapter,
    )


def _sampling(sequence: int, message: shard_pb2.Sampling) -> SamplingParams:
    if message.ByteSize() == _GREEDY_BYTES:
        return _GREEDY
    numbers: dict[str, float] = {}
    for name, low, high, neutral in _NUMBERS:
        value = getattr(message, name)
        if not (math.isfinite(value) and low <= value <= high):
            raise PlanError(f"sequence {sequence}: {name} is {value}")
        numbers[name] = value or neutral
    if len(message.bias_tokens) != len(message.bias_values):
        raise PlanError(f"sequence {sequence}: bias_tokens and bias_values differ in length")
    if not all(map(math.isfinite, message.bias_values)):
        raise PlanError(f"sequence {sequence}: a logit bias is not finite")
    return SamplingParams(
        **numbers,
        top_k=message.top_k,
        seed=message.seed,
        logit_bias=tuple(zip(message.bias_tokens, message.bias_values, strict=True)),
        min_tokens=message.min_tokens,
        stop_tokens=tuple(message.stop_tokens),
        logprobs=message.logprobs,
        top_logprobs=message.top_logprobs,
        constraint=constraint_from_wire(message.constraint),
        prompt_logprobs=message.prompt_logprobs,
        ranks=message.ranks,
        watermark=_watermark(sequence, message) if message.HasField("watermark") else None,
    )


def _watermark(sequence: int, message: shard_pb2.Sampling) -> Watermark:
    gamma, delta = message.watermark.gamma, message.watermark.delta
    if not (0.0 < gamma < 1.0 and math.isfinite(delta)):
        raise PlanError(f"sequence {sequence}: a watermark of gamma {gamma} and delta {delta}")
    return Watermark(gamma, delta, message.watermark.key)


def constraint_from_wire(message: shard_pb2.Constraint) -> Constraint | None:
    """The constraint in a message, or None if it holds none."""
    kind = message.WhichOneof("kind")
    return None if kind is None else Constraint(ConstraintKind(kind), getattr(message, kind))


def prepared_constraint(message: shard_pb2.PrepareRequest) -> Constraint:
    """The constraint of a call. Raises ``PlanError`` if there is none."""
    constraint = constraint_from_wire(message.constraint)
    if constraint is None:
        raise PlanError("the call has no constraint")
    return constraint


def outcome_to_wire(
    epoch: int, plan_id: int, outcome: Outcome, digest: int, step_us: int, rank: int
) -> shard_pb2.Outcome:
    """The answer to one plan. Ranks other than 0 tell the digest and the failures only."""
    message = shard_pb2.Outcome(epoch=epoch, plan_id=plan_id, digest=digest, step_us=step_us)
    for sequence, text in outcome.failures.items():
        message.failures.add(sequence=sequence, message=text)
    if rank:
        return message
    message.sequences.extend(outcome.sequences)
    message.tokens.extend(outcome.tokens)
    if outcome.logprobs:
        for sequence in outcome.sequences:
            found = outcome.logprobs.get(sequence)
            if found is not None:
                entry = message.logprobs.add(
                    sequence=sequence,
                    logprob=found.logprob,
                    top_tokens=found.top_tokens,
                    top_values=found.top_values,
                )
                if found.rank:
                    entry.rank = found.rank
    for sequence, prompt in outcome.prompt_logprobs.items():
        message.prompt_logprobs.append(_prompt_to_wire(sequence, prompt))
    return message


def _prompt_to_wire(sequence: int, prompt: PromptLogprobs) -> shard_pb2.PromptLogprobs:
    likeliest = [
        shard_pb2.Likeliest(
            tokens=[token for token, _ in pairs], values=[value for _, value in pairs]
        )
        for pairs in prompt.likeliest
    ]
    return shard_pb2.PromptLogprobs(
        sequence=sequence,
        start=prompt.start,
        logprobs=prompt.logprobs,
        likeliest=likeliest,
        ranks=prompt.ranks,
    )


class Digest:
    """A running 64-bit digest of the plans that were applied and the tokens that were drawn."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=8)

    def add(self, plan: Plan, outcome: Outcome) -> int:
        """Takes one step in; returns the digest of everything so far."""
        update = self._hash.update
        if plan.drops:
            update(array("Q", plan.drops))
        for admit in plan.admits:
            update(array("Q", (admit.sequence, admit.share_from, admit.share_len)))
            update(array("I", admit.tokens))
            update(admit.adapter.encode())
        update(array("Q", [number for pair in plan.work for number in pair]))
        update(array("Q", outcome.sequences))
        update(array("I", outcome.tokens))
        return int.from_bytes(self._hash.copy().digest(), "little")


def info_to_wire(
    info: EngineInfo, load_seconds: float, instance_id: str, files: dict[str, bytes]
) -> shard_pb2.DescribeResponse:
    """What the worker says of itself."""
    return shard_pb2.DescribeResponse(
        engine=info.engine,
        engine_version=info.engine_version,
        device=info.device,
        model_id=info.model_id,
        dtype=info.dtype,
        scheduling=_SCHEDULING[info.scheduling],
        rank=info.rank,
        world=info.world,
        kv_tokens=info.kv_tokens,
        page_tokens=info.page_tokens,
        sequences_max=info.sequences_max,
        step_tokens_max=info.step_tokens_max,
        length_max=info.length_max,
        features=info.features,
        load_seconds=load_seconds,
        weight_bytes=info.weight_bytes,
        instance_id=instance_id,
        tokenizer_sha256=files_sha256(files),
        eos_token_ids=info.eos_token_ids,
        vocab_size=info.vocab_size,
        warnings=info.warnings,
        donor_tokens_max=info.donor_tokens_max,
        adapters=info.adapters,
        embed_tokens_max=info.embed_tokens_max,
    )


def embed_inputs(message: shard_pb2.EmbedRequest, info: EngineInfo) -> list[list[int]]:
    """The inputs of a call. Raises ``FeatureError``, or ``PlanError`` for one that cannot be."""
    if "embeddings" not in info.features:
        raise FeatureError(f"engine {info.engine} does not support embeddings")
    inputs = [list(one.tokens) for one in message.inputs]
    if not 0 < len(inputs) <= EMBED_INPUTS_MAX:
        raise PlanError(f"{len(inputs)} inputs were sent; it must be 1 to {EMBED_INPUTS_MAX}")
    for number, tokens in enumerate(inputs):
        if not 0 < len(tokens) <= info.embed_tokens_max:
            raise PlanError(
                f"input {number} has {len(tokens)} tokens; it must be 1 to {info.embed_tokens_max}"
            )
        if max(tokens) >= info.vocab_size:
            raise PlanError(f"input {number} has a token outside the vocabulary")
    return inputs


def embed_batches(inputs: Sequence[list[int]], tokens_max: int) -> Iterator[list[list[int]]]:
    """The inputs in their order, as many together as have ``tokens_max`` tokens at most."""
    batch: list[list[int]] = []
    for tokens in inputs:
        if batch and sum(map(len, batch)) + len(tokens) > tokens_max:
            yield batch
            batch = []
        batch.append(tokens)
    yield batch


def vectors_to_wire(vectors: Vectors) -> shard_pb2.EmbedResponse:
    """The answer to ``Embed``."""
    return shard_pb2.EmbedResponse(
        embeddings=[shard_pb2.Embedding(values=vector) for vector in vectors]
    )


def files_sha256(files: dict[str, bytes]) -> str:
    """SHA-256 over names, lengths and contents, in the order of names."""
    total = hashlib.sha256()
    for name in sorted(files):
        total.update(f"{name}\0{len(files[name])}\0".encode())
        total.update(files[name])
    return total.hexdigest()


def file_chunks(files: dict[str, bytes]) -> Iterator[shard_pb2.TokenizerChunk]:
    """The files in pieces of at most ``CHUNK_BYTES``. An empty file is one empty piece."""
    for name in sorted(files):
        data = files[name]
        for start in range(0, max(len(data), 1), CHUNK_BYTES):
            yield shard_pb2.TokenizerChunk(name=name, data=data[start : start + CHUNK_BYTES])
