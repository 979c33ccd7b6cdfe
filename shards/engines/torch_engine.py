"""Any causal language model that ``transformers`` knows, on whatever device torch reports.

The modelling code is the library's own, with our paged attention (``torch_attention``) in it. A
step is one forward pass over all work, prefill chunks and decodes alike. With several ranks each
process holds a slice of the weights and of the KV heads (``torch_ranks``); all ranks draw the same
tokens.

Engine options (``--engine-option key=value``):

- ``page_tokens``: tokens in one page of KV cache, a power of two. Default: 16.
- ``graphs``: ``on`` (default) or ``off``: replay decode steps on CUDA as captured graphs.
- ``compile``: ``on`` or ``off``: compile layers for decode steps that are replayed. Default: where
  these are captured on CUDA and Triton is installed.
- ``attention``: of sequences that decode: ``kernel`` (default on CUDA, if Triton is installed) or
  ``gather``.
- ``pack``: ``on`` or ``off``: keep weights in the order in which a CPU's kernels read them.
  Default: where torch has such kernels.
- ``native``: ``on`` or ``off``: compute layers by kernels of our own, compiled at load.
  Default: where bfloat16 weights are packed and the machine has a C++ compiler.
- ``fuse``: ``on`` or ``off``: multiply weights that share their input as one matrix, and on
  accelerators compute norms in one kernel. Default: where they are packed, and on accelerators.
- ``sample``: ``device`` or ``host``: where tokens are drawn that ask for no more than temperature,
  top_k, top_p and min_p. Default: the device, if it is an accelerator that draws as the host does.
- ``peer_timeout_s``: how long a rank waits for the others within a step. Default: 5.
"""

import shards.engines.torch_spin  # noqa: F401 - before torch, whose threads read what it says

# isort: split
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers

from shards.engines import torch_choices as choices
from shards.engines.base import (
    Engine,
    EngineInfo,
    EngineLost,
    EngineOptions,
    ModelError,
    Progress,
    Scheduling,
)
from shards.engines.caller import Drawing
from shards.engines.omp_cores import Cores
from shards.engines.paged import PagedEngine
from shards.engines.threads import ThreadControl, usable_cores
from shards.engines.torch_devices import (
    Device,
    ToHost,
    choose_device,
    choose_dtype,
    dtype_name,
    kv_tokens_default,
)
from shards.engines.torch_graphs import (
    Capture,
    CudaCapture,
    DecodeGraphs,
    Packing,
    is_decode,
    run_directly,
)
from shards.engines.torch_late import Greedy, Late, any_late
from shards.engines.torch_linear import fuse, pack
from shards.engines.torch_model import PagedModel, length_trained
from shards.engines.torch_norms import fuse_norms
from shards.engines.torch_ranks import Ranks, check_split, load_slice
from shards.engines.torch_sampling import DeviceDrawing, DeviceSampler
from shards.engines.torch_trial import trouble
from shards.engines.torch_views import Viewer
from shards.engines.torch_weights import Checkpoint, count_bytes
from shards.extras import Extras
from shards.filters import Floats
from shards.kv import StepLayout
from shards.prompt_logprobs import Pairs, targets_of
from shards.residents import Limits, Resident
from shards.sampling import Drawn

PAGE_TOKENS = 16
SEQUENCES_MAX = 64
STEP_TOKENS_MAX = 256
ACCELERATOR_STEP_TOKENS_MAX = 2048
PEER_TIMEOUT_S = 5.0
# Share of the progress that is loading of weights, if layers are compiled then.
LOADING = 0.6
# Kinds of devices that draw tokens themselves, unasked.
DRAWING = ("cuda", "xpu", "hpu")
_FEATURES = (
    *("logprobs", "penalties", "seed", "logit_bias", "min_tokens", "typical_p", "prefix_sharing"),
    *("prompt_logprobs", "grammar", "ranks", "watermark"),
)
# Logits that are brought to float32 at once to score prompts: 16 MiB of them.
SCORED_AT_ONCE = 1 << 22


class TorchEngine(PagedEngine):
    """See the module."""

    def __init__(self, options: EngineOptions, progress: Progress) -> None:
        if options.model is None:
            raise ModelError("torch: --model PATH is missing")
        if options.adapters:
            raise ModelError("torch: LoRA adapters are not supported; serve them with vllm")
        extras = Extras("torch", options.extra)
        page = extras.whole("page_tokens", PAGE_TOKENS)
        graphs = extras.choice("graphs", "on", ("on", "off")) == "on"
        compiled = extras.choice("compile", "auto", ("auto", "on", "off"))
        attention = extras.choice("attention", "auto", ("auto", "kernel", "gather"))
        fused = extras.choice("fuse", "auto", ("auto", "on", "off"))
        native = extras.choice("native", "auto", ("auto", "on", "off"))
        packed = extras.choice("pack", "auto", ("auto", "on", "off"))
        sample = extras.choice("sample", "auto", ("auto", "device", "host"))
        peer_timeout_s = extras.number("peer_timeout_s", PEER_TIMEOUT_S)
        extras.finish()
        if page < 1 or page & (page - 1):
            raise ModelError(f"torch: engine option page_tokens={page} is not a power of two")
        self._device = choose_device(options.device, options.rank, options.world)
        self._device.use()
        self._to_host = ToHost()
        self._checkpoint = Checkpoint(options.model)
        self._dtype = choose_dtype(options.dtype, self._checkpoint.stored_dtype, self._device)
        compiling = choices.compiles(compiled, self._device, graphs=graphs, world=options.world)
        packing = choices.packs(packed, self._device, self._dtype, compiling=compiling)
        self._native, unbuilt = choices.choose_native(native, self._dtype, packing=packing)
        self._control = ThreadControl(_threads(options, self._device))
        self._cores = Cores()
        self._set_threads()
        check_split(self._checkpoint.config, options.world, self._checkpoint.where)
        self._ranks = Ranks(options, self._device, peer_timeout_s)
        fusing = fused == "on" or (fused == "auto" and (packing or self._device.kind != "cpu"))
        self._kernel = choices.choose_kernel(attention, self._device)
        share = LOADING if compiling else 1.0
        self._model, self._weight_bytes = self._load(lambda x: progress(share * x), fusing, packing)
        self._limits = self._limit(options, page)
        self._model.make_cache(self._limits.kv_tokens // page, page)
        super().__init__(self._limits)
        masked = self._kernel is None
        self._viewer = Viewer(page, self._dtype, self._device.torch, masked=masked)
        self._late = Late(self._limits.sequences_max, self._device.torch)
        self._graphs: DecodeGraphs | None = None
        lacking: tuple[str, ...] = ()
        if graphs and options.world == 1 and (compiling or self._device.kind == "cuda"):
            rest = (lambda x: progress(share + (1.0 - share) * x)) if compiling else None
            self._graphs, lacking = self._make_graphs(page, rest)
        self._drawer, warnings = self._make_drawer(sample)
        self._info = self._describe(options, (*unbuilt, *lacking, *warnings))
        self._control.start()
        progress(1.0)

    def _load(self, progress: Progress, fusing: bool, packing: bool) -> tuple[PagedModel, int]:
        device = self._device.torch
        if self._ranks.world == 1:
            model = self._checkpoint.load(self._dtype, device, progress)
        else:
            model = load_slice(self._checkpoint, self._dtype, self._device, self._ranks, progress)
        weight_bytes = count_bytes(model)
        if fusing:
            fuse(model)
            if self._device.kind != "cpu":
                fuse_norms(model)
        if packing:
            pack(model, self._native)
        if self._native is not None:
            from shards.engines.torch_native_layers import use_native

            use_native(model, self._native)
        # The probe computes together, and its collectives do not wait as long as a slow disk takes.
        self._ranks.least(0, self._device)
        try:
            with self._ranks.watched():
                where, ways = self._checkpoint.where, (self._kernel, self._native)
                return PagedModel(model, where, device, self._dtype, *ways), weight_bytes
        except EngineLost as error:
            raise ModelError(f"torch: {error}") from error

    def _limit(self, options: EngineOptions, page: int) -> Limits:
        trained = length_trained(self._checkpoint.config)
        kv_tokens = options.kv_tokens // page * page
        if options.kv_tokens and not kv_tokens:
            raise ModelError(f"torch: --kv-tokens {options.kv_tokens} is less than a page ({page})")
        if not kv_tokens:
            per_token = self._model.bytes_per_token()
            kv_tokens = kv_tokens_default(self._device, per_token, trained, page)
        on_cpu = self._device.kind == "cpu"
        step_tokens = STEP_TOKENS_MAX if on_cpu else ACCELERATOR_STEP_TOKENS_MAX
        kv_tokens = self._ranks.least(kv_tokens, self._device)
        return Limits(
            kv_tokens=kv_tokens,
            page_tokens=page,
            sequences_max=options.sequences_max or SEQUENCES_MAX,
            step_tokens_max=options.step_tokens_max or step_tokens,
            length_max=min(trained, kv_tokens),
            vocab_size=self._model.vocab_size,
        )

    def _make_graphs(
        self, page: int, compiling: Progress | None
    ) -> tuple[DecodeGraphs, tuple[str, ...]]:
        """Decode steps as they are replayed, and what to warn of; compiled if that has progress."""
        limits, device, masked = self._limits, self._device.torch, self._kernel is None
        lacking: tuple[str, ...] = ()
        packing = Packing(self._model.kinds, page, self._dtype, self._late, masked=masked)
        capture: Capture = CudaCapture(device) if device.type == "cuda" else run_directly
        if compiling is not None:
            from shards.engines.torch_compile import compiled

            capture, lacking = compiled(capture, self._model, packing, limits, device, compiling)
        pages = -(-limits.length_max // page)
        made = DecodeGraphs(self._model, packing, limits.sequences_max, pages, capture)
        try:
            made.warm()
        except RuntimeError as error:
            raise ModelError(
                f"torch: decode steps of this model cannot be captured as graphs:"
                f" {str(error).splitlines()[0]}; start it with --engine-option graphs=off"
            ) from error
        return made, lacking

    def _make_drawer(self, wanted: str) -> tuple[DeviceSampler | None, tuple[str, ...]]:
        """What draws on the device, or None, and what to warn of. All ranks get the same."""
        if wanted == "host" or (wanted == "auto" and self._device.kind not in DRAWING):
            return None, ()
        size, device = self._limits.vocab_size, self._device.torch
        kernel = choices.choose_draw_kernel(self._device, size)
        if not self._ranks.least(int(kernel is not None), self._device):
            kernel = None
        warnings: tuple[str, ...] = ()
        for way in (None,) if kernel is None else (kernel, None):
            upload, to_host = self._viewer.tensor, self._to_host
            drawer = DeviceSampler(size, self._sampler, upload, to_host, kernel=way)
            fault = trouble(drawer, self._sampler, size, device, self._dtype)
            if self._ranks.least(int(not fault), self._device):
                return drawer, warnings
            fault = fault or "another rank's device does not draw what the host does"
            how = "by torch's operations" if way else f"on the host, not on {self._device.name}"
            warnings = (f"tokens are drawn {how}: {fault}",)
        return None, warnings

    def _describe(self, options: EngineOptions, warnings: tuple[str, ...]) -> EngineInfo:
        limits = self._limits
        return EngineInfo(
            engine="torch",
            engine_version=f"{torch.__version__} transformers {transformers.__version__}",
            device=self._device.name,
            model_id=options.model_id,
            dtype=dtype_name(self._dtype),
            scheduling=Scheduling.CALLER,
            kv_tokens=limits.kv_tokens,
            page_tokens=limits.page_tokens,
            sequences_max=limits.sequences_max,
            step_tokens_max=limits.step_tokens_max,
            length_max=limits.length_max,
            vocab_size=limits.vocab_size,
            eos_token_ids=self._checkpoint.eos_token_ids(),
            features=_FEATURES,
            rank=options.rank,
            world=options.world,
            weight_bytes=self._weight_bytes,
            warnings=warnings,
        )

    def describe(self) -> EngineInfo:
        """See ``Engine``."""
        return self._info

    def tokenizer_files(self) -> dict[str, bytes]:
        """See ``Engine``."""
        return self._checkpoint.tokenizer_files()

    def close(self) -> None:
        """Stops following the load, leaves the group, and takes back what it set for all."""
        self._sampler.close()
        self._control.close()
        self._cores.follow(0)
        self._ranks.close()
        if self._native is not None:
            self._native.close()

    def _set_threads(self) -> None:
        if self._device.kind == "cpu" and torch.get_num_threads() != self._control.threads:
            torch.set_num_threads(self._control.threads)

    def _ready_threads(self) -> None:
        """As many as may compute now, each where it stays. At load others start threads, too."""
        self._set_threads()
        if self._device.kind == "cpu":
            self._cores.follow(self._control.threads)

    def reset(self) -> None:
        """See ``Engine``."""
        if any(one.failed for one in self._residents.by_sequence.values()):
            self._model.clear(slice(None))
        super().reset()

    def _let_go(self, resident: Resident) -> None:
        """Pages of a sequence that failed may hold numbers that are none (NaN).

        A mask does not keep these from whoever gets the pages next: nothing times NaN is NaN.
        """
        pages = list(self._tables.table(resident.sequence)) if resident.failed else []
        super()._let_go(resident)
        if pages:
            others = self._residents.by_sequence
            held = {page for other in others for page in self._tables.table(other)}
            self._model.clear([page for page in pages if page not in held])

    # A step -------------------------------------------------------------------------------------

    def _draw(self, layout: StepLayout, rows: Sequence[Resident]) -> Drawing:
        """Draws on an accelerator if nothing but the likeliest tokens is wanted, or as asked."""
        logits = self._logits(layout)
        if len(layout.scores):
            self._score_here(logits[len(layout.draws) :])
            logits = logits[: len(layout.draws)]
        if not rows:
            return Drawn([])
        if self._device.kind != "cpu" and all(row.plain for row in rows):
            return self._keep(Greedy(logits))
        if self._drawer is not None:
            return self._keep(self._drawer.begin(logits, rows))
        self._settle_before()
        return self._sampler.draw(self._to_host(logits), rows)

    def _keep(self, drawing: Greedy | DeviceDrawing) -> Drawing:
        """Leaves tokens on the device for the next step, if that can begin without the host."""
        if drawing.sure and self._ranks.world == 1:
            self._late.keep(drawing.tokens)
            return drawing
        self._settle_before()
        return drawing.take()

    def _forward(self, layout: StepLayout) -> Floats:
        return self._to_host(self._logits(layout)[: len(layout.draws)])

    def _score_here(self, logits: Any) -> None:
        """Scores prompts on the device, from what would take long to copy to the host."""
        rows = max(1, SCORED_AT_ONCE // logits.shape[-1])
        at = 0
        for resident, count in self._scoring:
            targets, sampling = targets_of(resident, count), resident.sampling
            for start in range(0, len(targets), rows):
                wanted = targets[start : start + rows]
                block = logits[at : at + len(wanted)]
                ranks = ranks_of(block, wanted) if sampling.ranks else ()
                self._scores.add(resident, *score(block, wanted, sampling.top_logprobs), ranks)
                at += len(wanted)

    def _logits(self, layout: StepLayout) -> Any:
        """[draws and then scores, vocabulary] on the device."""
        self._ready_threads()
        with self._ranks.watched():
            if self._graphs is not None and is_decode(layout):
                return self._graphs.logits(layout)
            tensor = self._viewer.tensor
            self._model.step.begin(layout, self._model.kinds, self._viewer)
            tokens = tensor(layout.tokens.astype(np.int64))
            return self._model.forward(
                self._late.known(tokens) if any_late(layout.tokens) else tokens,
                tensor(layout.positions.astype(np.int64)),
                tensor(np.concatenate((layout.draws, layout.scores)).astype(np.int64)),
            )


def score(logits: Any, targets: Sequence[int], top: int) -> tuple[list[float], list[Pairs]]:
    """As ``prompt_logprobs.score``, on the device."""
    logits = logits.float()
    totals = logits.logsumexp(dim=-1, keepdim=True)
    wanted = torch.tensor(targets, device=logits.device)[:, None]
    values: list[float] = (logits.gather(-1, wanted) - totals)[:, 0].tolist()
    if not top:
        return values, []
    best, ids = logits.topk(min(top, logits.shape[-1]))
    pairs = zip(ids.tolist(), (best - totals).tolist(), strict=True)
    # Which of equal tokens goes first is up to the device.
    return values, [
        sorted(zip(*pair, strict=True), key=lambda one: (-one[1], one[0])) for pair in pairs
    ]


def ranks_of(logits: Any, targets: Sequence[int]) -> list[int]:
    """As ``prompt_logprobs.ranks_of``, on the device."""
    wanted = logits.gather(-1, torch.tensor(targets, device=logits.device)[:, None])
    ranks: list[int] = ((logits > wanted).sum(dim=-1) + 1).tolist()
    return ranks


def _threads(options: EngineOptions, device: Device) -> int:
    """The count that was asked for; ranks on one CPU share its cores. 0: follow the load."""
    if options.threads or options.world == 1 or device.kind != "cpu":
        return options.threads
    return max(1, usable_cores() // options.world)


def load(options: EngineOptions, progress: Progress) -> Engine:
    """Makes the engine; see ``shards.engines``."""
    return TorchEngine(options, progress)
