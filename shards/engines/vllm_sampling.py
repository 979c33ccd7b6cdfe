"""Where vLLM's logits meet our sampler.

vLLM's own sampling keeps a random generator per request, which cannot go on in the middle, and its
penalties also see the prompt. So vLLM only ever takes the argmax, on its device. For a sequence
that wants anything else this logits processor, which vLLM calls with the raw logits of the batch,
draws the token with ``shards.sampling`` and leaves vLLM no other choice.
"""

from collections.abc import Sequence
from typing import Any

import torch
from vllm import SamplingParams as NativeParams
from vllm.config import VllmConfig
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, process_dict_updates

from shards.prompt_logprobs import Pairs
from shards.residents import Resident
from shards.sampling import Drawn, Sampler

PROCESSOR = f"{__name__}:RowProcessor"
_RESIDENT = "resident"
_NOT_FINITE = "the engine's logits are not finite numbers"


def native_params(resident: Resident) -> NativeParams:
    """What vLLM is told: argmax, without an end; and whose row it is, for the processor.

    Prompts it scores itself: raw, and as many likeliest tokens as are asked for.
    """
    sampling = resident.sampling
    return NativeParams(
        temperature=0.0,
        max_tokens=None,
        ignore_eos=True,
        detokenize=False,
        prompt_logprobs=sampling.top_logprobs if sampling.prompt_logprobs else None,
        extra_args={_RESIDENT: resident},
    )


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
    # Which of equal tokens goes first is up to the device.
    pairs: list[Pairs] = [
        sorted(zip(tokens[1:], row[1:], strict=True), key=lambda one: (-one[1], one[0]))
        for tokens, row in zip(ids, values, strict=True)
    ]
    return logprobs, pairs, ranks


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


class RowProcessor(LogitsProcessor):  # type: ignore[misc]
    """Knows the sequence of each row of vLLM's batch, and draws for those that are to."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._sampler = Sampler(vllm_config.model_config.get_vocab_size())
        self._residents: dict[int, Resident] = {}
        self._drawing: dict[int, Resident] = {}
        self._finite: torch.Tensor | None = None
        self._drawn: dict[int, tuple[Drawn, int]] = {}

    def close(self) -> None:
        """Ends the sampler's threads."""
        self._sampler.close()

    def is_argmax_invariant(self) -> bool:
        """It decides what the argmax is."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follows the sequences through the rows of the batch."""
        process_dict_updates(self._residents, batch_update, _resident_of)

    def begin(self, rows: Sequence[Resident]) -> None:
        """Says which sequences draw in the next step."""
        self._drawing = {row.sequence: row for row in rows}
        self._drawn.clear()
        self._finite = None

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Draws. ``logits`` are float32 [rows of the batch, vocabulary], on the device."""
        # NaN counts as the largest value, so the largest tells.
        self._finite = logits.amax(dim=-1).isfinite()
        wanted = [
            (index, resident)
            for index, resident in self._residents.items()
            if not resident.plain and resident.sequence in self._drawing
        ]
        if wanted:
            self._draw(logits, wanted)
        return logits

    def _draw(self, logits: torch.Tensor, wanted: Sequence[tuple[int, Resident]]) -> None:
        index = torch.tensor([row for row, _ in wanted], device=logits.device)
        drawn = self._sampler.draw(logits[index].cpu().numpy(), [row for _, row in wanted])
        tokens = torch.tensor(drawn.tokens, device=logits.device)
        logits[index] = float("-inf")
        logits[index, tokens] = 0.0
        for place, (_, resident) in enumerate(wanted):
            self._drawn[resident.sequence] = (drawn, place)

    def finish(self, rows: Sequence[Resident], tokens: list[int]) -> Drawn:
        """What came of the step: the tokens that vLLM took, in the order of ``rows``."""
        result = Drawn(tokens)
        finite = {} if self._finite is None else self._flags(self._finite.tolist())
        for place, row in enumerate(rows):
            if row.plain:
                if not finite[row.sequence]:
                    result.failures[place] = _NOT_FINITE
                continue
            drawn, its_place = self._drawn[row.sequence]
            if its_place in drawn.failures:
                result.failures[place] = drawn.failures[its_place]
            elif its_place in drawn.logprobs:
                result.logprobs[place] = drawn.logprobs[its_place]
        return result

    def _flags(self, finite: list[bool]) -> dict[int, bool]:
        return {resident.sequence: finite[row] for row, resident in self._residents.items()}


def _resident_of(
    params: NativeParams, _prompt: list[int] | None, _output: list[int]
) -> Resident | None:
    extra: dict[str, Any] = params.extra_args or {}
    resident = extra.get(_RESIDENT)
    return resident if isinstance(resident, Resident) else None
