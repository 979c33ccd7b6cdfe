"""Where vLLM's sampler meets our sequences.

vLLM's own sampler draws, on its device, what it can express (``vllm_params.takes``), and is kept to
what our contract says of a draw:

- It depends on seed and position alone. vLLM keeps a random generator for each request, which could
  not go on in the middle. Here each row that draws is lent one for the step, seeded anew from both.
- Penalties see generated tokens only, those from before a loss too. vLLM counts those that it has
  generated itself and, for one penalty, the prompt; here it is handed the tokens to count.
- Log probabilities are those of the raw logits. So masks of constraints, ours, applied by vLLM on
  its device, come behind them.

What else a sequence may ask for is drawn on the host, by ``shards.sampling``: with all that vLLM
should not draw, a row of logits goes there, and the token comes back as the only one left. With the
engine option ``sampler=host`` these are all rows that want more than the argmax.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput, SamplerOutput
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, process_dict_updates
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.penalties import apply_all_penalties
from vllm.v1.sample.sampler import Sampler as NativeSampler
from vllm.v1.structured_output.utils import apply_grammar_bitmask

from shards.allowed import GuideError
from shards.changes import penalises
from shards.engines.vllm_params import gather_logprobs, resident_of, takes, told_of
from shards.residents import Resident
from shards.sampling import NOT_FINITE, Drawn, Sampler, mixed

PROCESSOR = f"{__name__}:RowProcessor"
_NO_TOKEN = "bias, penalties and min_tokens leave no token to draw"
_NO_TOKEN_ALLOWED = "the constraint, bias and penalties leave no token to draw"
_MINUS_INF = float("-inf")


class RowProcessor(LogitsProcessor):  # type: ignore[misc]
    """Knows the sequence of each row of vLLM's batch, and draws for those that vLLM should not.

    It is the first of vLLM's processors, so it sees the raw logits.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._vocab: int = vllm_config.model_config.get_vocab_size()
        self._sampler = Sampler(self._vocab)
        self._residents: dict[int, Resident] = {}
        self._own, self._batch = False, None
        self._generators: dict[int, torch.Generator] = {}
        self._hosted: set[int] = set()
        self._native: dict[int, Resident] = {}
        self._narrowed = False
        self._finite: torch.Tensor | None = None
        self._left: torch.Tensor | None = None
        self._drawn: dict[int, tuple[Drawn, int]] = {}
        self._faults: dict[int, str] = {}

    def take_over(self, runner: Any, own: bool) -> None:
        """Makes the sampler of vLLM's ``runner`` follow this; ``own``: it draws what it can."""
        self._own, self._batch = own, runner.input_batch
        processors = runner.input_batch.logitsprocs.non_argmax_invariant
        processors.remove(self)
        processors.insert(0, self)
        runner.sampler = RowSampler(runner.sampler, self)

    def close(self) -> None:
        """Ends the sampler's threads."""
        self._sampler.close()

    def is_argmax_invariant(self) -> bool:
        """It decides what the argmax is."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follows the sequences through the rows of the batch."""
        process_dict_updates(self._residents, batch_update, resident_of)

    def begin(self, rows: Sequence[Resident]) -> None:
        """Says which sequences draw in the next step."""
        wanting = {row.sequence: row for row in rows if not row.plain}
        self._native = {}
        if self._own:
            self._native = {key: row for key, row in wanting.items() if takes(row.sampling)}
        self._hosted = wanting.keys() - self._native.keys()
        self._narrowed = any(row.guide or _is_barred(row) for row in self._native.values())
        self._drawn.clear()
        self._faults.clear()
        self._finite = self._left = None

    # What vLLM's sampler asks, in this order ----------------------------------------------------

    def lend(self, generators: dict[int, torch.Generator], device: torch.device) -> None:
        """Gives each row that vLLM draws at a temperature a generator, by its number."""
        for index, resident in self._residents.items():
            sampling = resident.sampling
            if sampling.temperature > 0.0 and resident.sequence in self._native:
                generator = self._generators.get(index)
                if generator is None:
                    generator = self._generators[index] = torch.Generator(device)
                generator.manual_seed(mixed(sampling.seed, len(resident.tokens)))
                generators[index] = generator

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Draws. ``logits`` are float32 [rows of the batch, vocabulary], on the device."""
        # NaN counts as the largest value, so the largest tells.
        self._finite = logits.amax(dim=-1).isfinite()
        wanted = [
            (index, resident)
            for index, resident in self._residents.items()
            if resident.sequence in self._hosted
        ]
        if wanted:
            self._draw(logits, wanted)
        if self._native:
            _soothe(logits, self._finite)
            self._mask(logits)
        return logits

    def _draw(self, logits: torch.Tensor, wanted: Sequence[tuple[int, Resident]]) -> None:
        index = torch.tensor([row for row, _ in wanted], device=logits.device)
        drawn = self._sampler.draw(logits[index].cpu().numpy(), [row for _, row in wanted])
        tokens = torch.tensor(drawn.tokens, device=logits.device)
        logits[index] = _MINUS_INF
        logits[index, tokens] = 0.0
        for place, (_, resident) in enumerate(wanted):
            self._drawn[resident.sequence] = (drawn, place)

    def _mask(self, logits: torch.Tensor) -> None:
        """Has vLLM apply the constraints of its rows."""
        names, words = [], []
        for sequence, resident in self._native.items():
            if resident.guide is not None:
                try:
                    words.append(resident.guide.allowed())
                except GuideError as error:
                    self._faults[sequence] = str(error)
                else:
                    names.append(str(sequence))
        if names:
            masks = GrammarOutput(names, np.stack(words).view(np.int32))
            apply_grammar_bitmask(SchedulerOutput.make_empty(), masks, self._batch, logits)

    def generated(self, count: int) -> list[list[int]]:
        """The tokens that penalties count, of each of so many rows."""
        found: list[list[int]] = [[] for _ in range(count)]
        for index, resident in self._residents.items():
            if resident.sequence in self._native and penalises(resident.sampling):
                found[index] = resident.tokens[resident.prompt_len :]
        return found

    def look(self, logits: torch.Tensor) -> None:
        """Sees whether there is anything left to draw, behind all that changes logits."""
        if self._narrowed:
            self._left = logits.amax(dim=-1) > _MINUS_INF
            _soothe(logits, self._left)

    # What came of it ----------------------------------------------------------------------------

    def finish(self, rows: Sequence[Resident], output: ModelRunnerOutput) -> Drawn:
        """What came of the step: the tokens that vLLM took, in the order of ``rows``."""
        places: dict[str, int] = output.req_id_to_index
        index = [places[str(row.sequence)] for row in rows]
        result = Drawn([output.sampled_token_ids[one][0] for one in index])
        finite = [] if self._finite is None else self._finite.tolist()
        left = [True] * len(finite) if self._left is None else self._left.tolist()
        for place, (row, at) in enumerate(zip(rows, index, strict=True)):
            if row.sequence in self._hosted:
                self._take(result, place, *self._drawn[row.sequence])
            elif not finite[at]:
                result.failures[place] = NOT_FINITE
            elif row.sequence in self._faults:
                result.failures[place] = self._faults[row.sequence]
            elif not left[at]:
                result.failures[place] = _NO_TOKEN if row.guide is None else _NO_TOKEN_ALLOWED
            elif row.sampling.logprobs:
                result.logprobs[place] = told_of(row.sampling, output.logprobs, at)
        return result

    @staticmethod
    def _take(result: Drawn, place: int, drawn: Drawn, its_place: int) -> None:
        if its_place in drawn.failures:
            result.failures[place] = drawn.failures[its_place]
        elif its_place in drawn.logprobs:
            result.logprobs[place] = drawn.logprobs[its_place]


class RowSampler(NativeSampler):  # type: ignore[misc]
    """vLLM's sampler, with what it is given and shown of ``rows`` in between."""

    def __init__(self, former: NativeSampler, rows: RowProcessor) -> None:
        super().__init__(former.logprobs_mode, former.use_fp64_gumbel)
        self._rows = rows

    gather_logprobs = staticmethod(gather_logprobs)

    def forward(
        self, logits: torch.Tensor, sampling_metadata: SamplingMetadata, *more: Any, **most: Any
    ) -> SamplerOutput:
        """Draws, with generators that are of no use afterwards."""
        generators = sampling_metadata.generators
        self._rows.lend(generators, logits.device)
        try:
            return super().forward(logits, sampling_metadata, *more, **most)
        finally:
            # vLLM would carry them along, though another row may have that place in the next step.
            generators.clear()

    def apply_penalties(
        self, logits: torch.Tensor, metadata: SamplingMetadata, _tokens: list[list[int]]
    ) -> torch.Tensor:
        """By the tokens that count for us, and no prompt; the last to change logits."""
        if not metadata.no_penalties:
            rows, vocab_size = logits.shape
            nothing = torch.full((rows, 1), vocab_size, dtype=torch.int64, device=logits.device)
            logits = apply_all_penalties(
                logits,
                nothing,
                metadata.presence_penalties,
                metadata.frequency_penalties,
                metadata.repetition_penalties,
                self._rows.generated(rows),
            )
        self._rows.look(logits)
        return logits


def _is_barred(row: Resident) -> bool:
    return len(row.tokens) - row.prompt_len < row.sampling.min_tokens


def _soothe(logits: torch.Tensor, sound: torch.Tensor) -> None:
    """Gives rows that nobody can draw from logits that do not upset who draws the others."""
    if logits.is_cpu and bool(sound.all()):
        return  # elsewhere it takes longer to find out
    logits.masked_fill_(~sound.unsqueeze(1), 0.0)
