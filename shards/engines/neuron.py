"""AWS Neuron (Inferentia, Trainium): models compiled ahead of time, with a static cache of slots.

A step is at most one call of a context-encoding graph per bucket, and then one call of a
token-generation graph for all slots. ``neuron_graphs`` knows the two libraries;
``docs/engines/neuron.md`` says what has been checked, and how.

Sampling is ours, on the host, unless the model was compiled to draw on the device. Then there are
no logits, and none of the features that need them; what the device would ignore fails by name.

- A prompt is computed whole, in the step in which its last token is scheduled: context encoding
  starts at position 0, so chunks are bookkeeping.
- A slot has its own room in the cache, so a shared prefix is computed again. It is exact, and saves
  nothing: the feature "prefix_sharing" is not offered.
- A sequence that is longer than the longest context graph (one that comes back after a loss) is
  filled up by token generation, one call per token.
- Token generation writes into every slot. For those that do not take part it writes where their
  own next token goes, which is then written again before anybody reads it.

Engine options (``--engine-option key=value``):

- ``library``: ``optimum`` (default) or ``nxdi``: which of the two compiled the model; or ``vllm``,
  which is another engine altogether: ``neuron_vllm``.
"""

from collections.abc import Sequence

import numpy as np

from shards.engines.base import (
    Engine,
    EngineInfo,
    EngineOptions,
    ModelError,
    Plan,
    Progress,
    SamplingParams,
    Scheduling,
    Started,
    check_scoring,
    undeclared,
)
from shards.engines.caller import CallerEngine, Work
from shards.engines.neuron_graphs import Found, Graphs, Shapes, load_nxdi, load_optimum
from shards.engines.self_model import Folder, installed_version, open_folder
from shards.extras import Extras
from shards.hf_folder import read_config, tokenizer_files
from shards.pages import page
from shards.residents import Limits, Resident
from shards.sampling import Drawn, Sampler

NEURON_CONFIG = "neuron_config.json"
_VLLM = "vllm"
_DISTRIBUTIONS = {"optimum": "optimum-neuron", "nxdi": "neuronx-distributed-inference"}
_NARROW = (
    "this model draws on the device, among the {} likeliest tokens, without seeds, penalties, bias"
    " or log probabilities; compile it without on_device_sampling to have them"
)
_WORDS = {"grammar": "constraints", "watermark": "watermarks"}
Words = tuple[float, float, float]
# The likeliest token, whatever the temperature.
_GREEDY: Words = (1.0, 1.0, 1.0)
_FEATURES = (
    *("logprobs", "penalties", "seed", "logit_bias", "min_tokens", "typical_p", "grammar"),
    *("ranks", "watermark"),
)


class NeuronEngine(CallerEngine):
    """See the module. ``graphs`` are those of the model in the folder."""

    def __init__(
        self, options: EngineOptions, folder: Folder, graphs: Graphs, library: str
    ) -> None:
        self._graphs = graphs
        self._folder = folder
        shapes = graphs.shapes
        slots = min(options.sequences_max or shapes.slots, shapes.slots)
        # A slot that is full still has a place for what is written into it in passing.
        length_max = shapes.length - 1
        kv_tokens = slots * length_max
        limits = Limits(
            kv_tokens=min(options.kv_tokens or kv_tokens, kv_tokens),
            page_tokens=1,
            sequences_max=slots,
            step_tokens_max=options.step_tokens_max or max(shapes.context.sizes[-1], slots),
            length_max=min(length_max, options.kv_tokens or length_max),
            vocab_size=folder.vocab_size,
        )
        super().__init__(limits)
        self._sampler = Sampler(limits.vocab_size)
        # Tokens of each slot that are in the cache; others are known, and counted, only.
        self._cached = np.zeros(shapes.slots, np.int32)
        self._info = _describe(options, folder, limits, graphs.shapes, library)

    def describe(self) -> EngineInfo:
        """See ``Engine``."""
        return self._info

    def tokenizer_files(self) -> dict[str, bytes]:
        """See ``Engine``."""
        return tokenizer_files(self._folder.path)

    def close(self) -> None:
        """See ``Engine``. The graphs go with it."""
        self._sampler.close()

    def reset(self) -> None:
        """See ``Engine``. The cache need not be cleared: a prompt overwrites its slot."""
        super().reset()
        self._cached[:] = 0

    def start(self, plan: Plan) -> Started:
        """See ``Engine``."""
        check_scoring(plan, self._info)
        return super().start(plan)

    def _let_go(self, resident: Resident) -> None:
        self._cached[resident.slot] = 0

    def _compute(self, work: Work, rows: Sequence[Resident]) -> Drawn:
        if not rows:
            return Drawn([])
        among = self._graphs.shapes.draws_among
        if among:
            tokens = np.empty(len(rows), np.int64)
            self._fill(rows, tokens, [_on_device(row.sampling, among) for row in rows])
            unable = {index: _unable(row.sampling, among) for index, row in enumerate(rows)}
            failures = {index: why for index, why in unable.items() if why}
            return Drawn(tokens.tolist(), failures=failures)
        logits = np.empty((len(rows), self._folder.vocab_size), np.float32)
        self._fill(rows, logits, [_GREEDY] * len(rows))
        return self._sampler.draw(logits, rows)

    def _fill(self, rows: Sequence[Resident], found: Found, words: Sequence[Words]) -> None:
        """Computes what is left of each row; ``found`` is what is behind its last token."""
        self._encode(rows, found, words)
        self._generate(rows, found, words)

    def _encode(self, rows: Sequence[Resident], found: Found, words: Sequence[Words]) -> None:
        """Computes the prompts that are not in the cache, those of one bucket together."""
        buckets = self._graphs.shapes.context
        groups: dict[int, list[int]] = {}
        for index, row in enumerate(rows):
            if not self._cached[row.slot] and len(row.tokens) >= self._graphs.prompt_min:
                length = min(len(row.tokens), buckets.sizes[-1])
                groups.setdefault(buckets.width(length), []).append(index)
        for width, indices in groups.items():
            tokens = np.zeros((len(indices), width), np.int32)
            lengths = [min(len(rows[index].tokens), width) for index in indices]
            for line, index in enumerate(indices):
                tokens[line, : lengths[line]] = rows[index].tokens[: lengths[line]]
            slots = [rows[index].slot for index in indices]
            sampling = np.array([words[index] for index in indices], np.float32)
            found[indices] = self._graphs.encode(tokens, lengths, slots, sampling)
            self._cached[slots] = lengths

    def _generate(self, rows: Sequence[Resident], found: Found, words: Sequence[Words]) -> None:
        """Computes what is left behind the cache: one token of a sequence that decodes."""
        while behind := [
            index for index, row in enumerate(rows) if self._cached[row.slot] < len(row.tokens)
        ]:
            tokens = np.zeros(len(self._cached), np.int32)
            sampling = np.ones((len(tokens), 3), np.float32)
            slots = [rows[index].slot for index in behind]
            for index, slot in zip(behind, slots, strict=True):
                tokens[slot] = rows[index].tokens[self._cached[slot]]
                sampling[slot] = words[index]
            width = self._graphs.shapes.generation.width(int(self._cached.max()) + 1)
            answer = self._graphs.generate(tokens, self._cached.copy(), width, sampling)
            found[behind] = answer[slots]
            self._cached[slots] += 1


def _on_device(sampling: SamplingParams, among: int) -> Words:
    """Top_k, top_p and temperature in the device's words."""
    if sampling.temperature == 0.0:
        return _GREEDY
    top_k = min(sampling.top_k or among, among)
    return top_k, sampling.top_p or 1.0, sampling.temperature


def _unable(sampling: SamplingParams, among: int) -> str:
    """What the device would ignore, in one line; or nothing."""
    if lacking := undeclared(sampling, ()):
        what = _WORDS.get(lacking, lacking)
        return f"neuron does not support {what} in a model that draws on the device"
    if sampling.temperature == 0.0:
        return ""
    if sampling.min_p > 0.0:
        return "neuron does not support min_p in a model that draws on the device"
    if sampling.top_k > among:
        return f"neuron draws among {among} tokens in this model: top_k is {sampling.top_k}"
    return ""


def _describe(
    options: EngineOptions, folder: Folder, limits: Limits, shapes: Shapes, library: str
) -> EngineInfo:
    warnings = [_NARROW.format(shapes.draws_among)] if shapes.draws_among else []
    return EngineInfo(
        engine="neuron",
        engine_version=installed_version(_DISTRIBUTIONS[library]),
        device="neuron",
        model_id=options.model_id,
        dtype=shapes.dtype,
        scheduling=Scheduling.CALLER,
        kv_tokens=limits.kv_tokens,
        page_tokens=limits.page_tokens,
        sequences_max=limits.sequences_max,
        step_tokens_max=limits.step_tokens_max,
        length_max=limits.length_max,
        vocab_size=limits.vocab_size,
        eos_token_ids=folder.eos_token_ids,
        features=() if shapes.draws_among else _FEATURES,
        warnings=tuple(warnings),
    )


def load(options: EngineOptions, progress: Progress) -> Engine:
    """Makes the engine; see ``shards.engines``."""
    extras = Extras("neuron", options.extra)
    library = extras.choice("library", "optimum", (*_DISTRIBUTIONS, _VLLM))
    if options.adapters:
        raise ModelError("neuron: LoRA adapters are not served; merge them into the model")
    through_vllm = library == _VLLM
    made = _with_vllm(options, extras) if through_vllm else _compiled(options, extras, library)
    progress(1.0)
    return made


def _with_vllm(options: EngineOptions, extras: Extras) -> Engine:
    from shards.engines import neuron_vllm

    if options.device not in ("", "neuron"):
        raise ModelError(
            f"neuron: --device {options.device}: NEURON_RT_VISIBLE_CORES names the cores; leave"
            " --device out"
        )
    return neuron_vllm.load(options, extras, open_folder("neuron", options))


def _compiled(options: EngineOptions, extras: Extras, library: str) -> Engine:
    folder = open_folder("neuron", options, "compile the model for them")
    extras.finish()
    if options.dtype or options.device not in ("", "neuron"):
        given = f"--dtype {options.dtype}" if options.dtype else f"--device {options.device}"
        raise ModelError(f"neuron: {given}: a compiled model has it in itself; leave it out")
    if not (folder.path / NEURON_CONFIG).is_file():
        raise ModelError(
            f"neuron: {folder.path} was not compiled for Neuron: it has no {NEURON_CONFIG};"
            f" with --engine-option library=vllm vLLM compiles it; see {page('engines/neuron.md')}"
        )
    if library == "optimum":
        graphs = load_optimum(str(folder.path), folder.vocab_size)
    else:
        model_type = str(read_config(folder.path).get("model_type", ""))
        graphs = load_nxdi(str(folder.path), model_type, folder.vocab_size)
    return NeuronEngine(options, folder, graphs, library)
