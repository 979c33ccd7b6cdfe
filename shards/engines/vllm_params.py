"""What of our sampling parameters vLLM's sampler takes, in its words; and what it says, in ours.

It takes what it means as ``shards.sampling`` does: temperature, top_k, top_p, min_p, bias,
penalties, min_tokens and log probabilities. What only seems to be the same is left to the host:

- typical_p and our watermark, which vLLM does not have (it has a watermark of its own).
- top_p beside min_p: vLLM applies min_p first, so that its nucleus is one of what min_p leaves.
- Numbers that it refuses: temperatures above 2 and below 0.01 (it would raise these), frequency and
  presence penalties beyond 2.

Penalties are vLLM's, over the tokens that ``vllm_sampling`` has it count. Equals at the border of a
filter are the one difference that is left: vLLM keeps all or any of them, the host the smaller ids.
"""

import math
from typing import Any

import torch
from vllm import SamplingParams as NativeParams
from vllm.v1.outputs import LogprobsLists, LogprobsTensors

from shards.engines.base import Logprobs, SamplingParams
from shards.prompt_logprobs import Pairs
from shards.residents import Resident

RESIDENT = "resident"
TEMPERATURES = 0.01, 2.0
PENALTY_MAX = 2.0


def takes(sampling: SamplingParams) -> bool:
    """Whether vLLM's sampler has all that is asked, and means the same by it."""
    if sampling.watermark is not None:
        return False
    if max(abs(sampling.frequency_penalty), abs(sampling.presence_penalty)) > PENALTY_MAX:
        return False
    if not 0.0 < sampling.repetition_penalty < math.inf:
        return False
    if sampling.temperature == 0.0:
        return True
    if not TEMPERATURES[0] <= sampling.temperature <= TEMPERATURES[1]:
        return False
    typical = 0.0 < sampling.typical_p < 1.0
    return not typical and not (sampling.min_p > 0.0 and 0.0 < sampling.top_p < 1.0)


def native_params(resident: Resident, own: bool, vocab_size: int) -> NativeParams:
    """What vLLM is told of a sequence; and whose row it is, for the processor.

    It is never told of an end. Prompts it scores itself: raw, and as many likeliest tokens as are
    asked for. If it is not to draw by its ``own`` sampler, it is asked for the argmax, of which the
    processor leaves it no choice.
    """
    sampling = resident.sampling
    asked = {}
    if own and not resident.plain and takes(sampling):
        asked = _asked(resident, vocab_size)
    return NativeParams(
        **{"temperature": 0.0, **asked},
        max_tokens=None,
        ignore_eos=True,
        detokenize=False,
        prompt_logprobs=sampling.top_logprobs if sampling.prompt_logprobs else None,
        extra_args={RESIDENT: resident},
    )


def _asked(resident: Resident, vocab_size: int) -> dict[str, Any]:
    """No seed: it would make a generator that knows nothing of positions."""
    sampling = resident.sampling
    bias: dict[int, float] = {}
    for token, value in sampling.logit_bias:
        bias[token] = bias.get(token, 0.0) + value
    stops = [token for token in sampling.stop_tokens if token < vocab_size]
    # What was generated before a loss is prompt to vLLM.
    barred = sampling.min_tokens - (len(resident.tokens) - resident.prompt_len) if stops else 0
    return {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p if 0.0 < sampling.top_p < 1.0 else 1.0,
        "min_p": min(sampling.min_p, 1.0),
        "repetition_penalty": sampling.repetition_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "presence_penalty": sampling.presence_penalty,
        "logit_bias": bias or None,
        "min_tokens": max(barred, 0),
        "stop_token_ids": stops,
        "logprobs": min(sampling.top_logprobs, vocab_size) if sampling.logprobs else None,
    }


def resident_of(
    params: NativeParams, _prompt: list[int] | None, _output: list[int]
) -> Resident | None:
    """The sequence of a row that vLLM has."""
    extra: dict[str, Any] = params.extra_args or {}
    resident = extra.get(RESIDENT)
    return resident if isinstance(resident, Resident) else None


def scores_of(
    resident: Resident, tensors: LogprobsTensors
) -> tuple[list[float], list[Pairs], list[int]]:
    """What vLLM says of a prompt: of its tokens from the second on, the likeliest at each, ranks.

    A row has the token that is there, then the likeliest ones. What came behind the prompt before a
    loss is prompt to vLLM, and left out.
    """
    count, sampling = resident.prompt_len - 1, resident.sampling
    values = tensors.logprobs[:count].tolist()
    logprobs = [row[0] for row in values]
    ranks = tensors.selected_token_ranks[:count].tolist() if sampling.ranks else []
    if not sampling.top_logprobs:
        return logprobs, [], ranks
    ids = tensors.logprob_token_ids[:count].tolist()
    pairs: list[Pairs] = [
        _in_order(tokens[1:], row[1:]) for tokens, row in zip(ids, values, strict=True)
    ]
    return logprobs, pairs, ranks


def told_of(sampling: SamplingParams, lists: LogprobsLists, row: int) -> Logprobs:
    """What vLLM says of the token that it drew in a row; there may be more than was asked for."""
    end = 1 + sampling.top_logprobs
    pairs = _in_order(
        lists.logprob_token_ids[row, 1:end].tolist(), lists.logprobs[row, 1:end].tolist()
    )
    return Logprobs(
        float(lists.logprobs[row, 0]),
        [token for token, _ in pairs],
        [value for _, value in pairs],
        int(lists.sampled_token_ranks[row]) if sampling.ranks else 0,
    )


def _in_order(tokens: list[int], values: list[float]) -> Pairs:
    """Which of equal tokens goes first is up to the device; here the smaller one does."""
    return sorted(zip(tokens, values, strict=True), key=lambda one: (-one[1], one[0]))


def gather_logprobs(scores: torch.Tensor, count: int, token_ids: torch.Tensor) -> LogprobsTensors:
    """Takes the place of vLLM's own, which counts equal tokens as likelier ones for the ranks.

    ``scores`` are [tokens, vocabulary]; a row of the answer is as ``scores_of`` says.
    """
    wanted = token_ids.unsqueeze(-1)
    values = scores.gather(-1, wanted)
    best, ids = scores.topk(count, dim=-1)
    return LogprobsTensors(
        torch.cat((wanted, ids), dim=1).to(torch.int32),
        torch.cat((values, best), dim=1),
        (scores > values).sum(dim=-1) + 1,
    )
