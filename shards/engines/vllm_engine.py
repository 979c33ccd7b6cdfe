"""vLLM inside a worker: its model code, kernels and cache, with the plan as its scheduler.

vLLM's ``LLMEngine`` is made in this process, without processes of its own, and is then driven one
layer below its scheduler: a step hands its executor the ``SchedulerOutput`` that says what the plan
says. So the plan's work is binding (``Scheduling.CALLER``): vLLM neither queues nor preempts, and
computes nothing that was not asked for.

Pages are vLLM's blocks, and which block is whose is decided by ``shards.kv``, as in the other
engines that own their cache. vLLM's own prefix cache is off. It would find shared blocks by their
hash, but it drops those of a finished sequence when it likes, and the router's ledger, which counts
a shared prefix once, could promise memory that is not there. With tables of our own a donor keeps
its blocks until the plan drops it, sharing is exact, and every rank has the same tables.

Tokens are drawn by vLLM's own sampler on its device, which ``vllm_sampling`` keeps to our contract,
or by the project's one sampler on the host; see the option ``sampler``.

With several ranks each process is one rank of vLLM's tensor parallelism (its external launcher),
and runs the same log. ``peers`` lets them meet, and ends a process whose peer is gone.

The layer that is driven is internal to vLLM, so its version is pinned exactly.

Engine options (``--engine-option key=value``):

- ``eager=1``: no compilation and no captured graphs. Loads faster, computes slower.
- ``page_tokens``: tokens of one block. Default: 32 on CPUs, otherwise vLLM's choice.
- ``length_max``: the longest sequence. Default: what the model and the cache allow.
- ``memory_fraction``: share of a device's memory for weights and cache (default 0.9).
- ``quantization``, ``kv_dtype``: as vLLM's ``--quantization`` and ``--kv-cache-dtype``.
- ``sampler``: who draws where a sequence wants more than the argmax. ``vllm``: vLLM's own sampler
  whatever it means as we do, the host's the rest. ``host``: all by the host's, so that a seed draws
  the same on every engine. Default, ``auto``: ``host`` on CPUs, ``vllm`` elsewhere.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.engines.base import (
    EngineInfo,
    EngineOptions,
    ModelError,
    Plan,
    Progress,
    Scheduling,
    Started,
    check_scoring,
)
from shards.engines.caller import CallerEngine, Work
from shards.engines.omp_cores import Cores
from shards.engines.peers import Peers, PeersError
from shards.engines.threads import ThreadControl
from shards.engines.vllm_segments import sweep
from shards.engines.vllm_setup import (
    check,
    draws_itself,
    environment,
    make,
    meet,
    set_threads,
    slow_dtype,
    threads,
    weight_bytes,
)
from shards.hf_folder import eos_token_ids, read_config, tokenizer_files
from shards.kv import PageTables
from shards.residents import Limits, Resident
from shards.sampling import Drawn

if TYPE_CHECKING:
    from vllm import LLMEngine

    from shards.engines.vllm_sampling import RowProcessor

if find_spec("vllm") is None:
    # vLLM itself is imported later: it reads the environment that is set for it then.
    raise ModuleNotFoundError("No module named 'vllm'", name="vllm")

FEATURES = (
    "logprobs",
    "penalties",
    "seed",
    "logit_bias",
    "min_tokens",
    "typical_p",
    "prefix_sharing",
    "grammar",
    "ranks",
    "watermark",
)
# With adapters vLLM looks up the one of each row that it computes logits of, but knows them for the
# rows that draw only.
WITHOUT_ADAPTERS = "prompt_logprobs"
EXIT_LOST = 3


class VllmEngine(CallerEngine):
    """See the module."""

    def __init__(self, options: EngineOptions, progress: Progress) -> None:
        self._folder = check(options)
        self._files = tokenizer_files(self._folder)
        self._ends = eos_token_ids(self._folder, text_config(self._folder))
        environment(options)
        self._control = ThreadControl(threads(options))
        self._peers = _join(options) if options.world > 1 else None
        self._engine = make(self._folder, options, progress)
        self._executor = self._engine.model_executor
        limits = _limits(self._folder, self._engine)
        super().__init__(limits)
        self._tables = PageTables(limits.kv_tokens, limits.page_tokens)
        self._processor = _processor(self._runner)
        self._adapters = _load_adapters(self._engine, options)
        from shards.engines.vllm_steps import Steps

        self._info = self._describe(options)
        own = draws_itself(options, self._info.device)
        self._processor.take_over(self._runner, own)
        self._steps = Steps(self._tables, self._adapters, own, limits.vocab_size)
        self._cores = Cores() if self._info.device == "cpu" else None
        if self._cores is not None:
            self._control.start()

    @property
    def _runner(self) -> Any:
        return self._executor.driver_worker.worker.model_runner

    def _describe(self, options: EngineOptions) -> EngineInfo:
        from vllm import __version__
        from vllm.platforms import current_platform

        limits = self._limits
        return EngineInfo(
            engine="vllm",
            engine_version=__version__,
            device=current_platform.device_type,
            model_id=options.model_id,
            dtype=str(self._engine.model_config.dtype).removeprefix("torch."),
            scheduling=Scheduling.CALLER,
            kv_tokens=limits.kv_tokens,
            page_tokens=limits.page_tokens,
            sequences_max=limits.sequences_max,
            step_tokens_max=limits.step_tokens_max,
            length_max=limits.length_max,
            vocab_size=limits.vocab_size,
            eos_token_ids=self._ends,
            features=(*FEATURES, "lora" if self._adapters else WITHOUT_ADAPTERS),
            rank=options.rank,
            world=options.world,
            weight_bytes=weight_bytes(self._folder) // options.world,
            warnings=self._warnings(options, current_platform.device_type),
            adapters=tuple(self._adapters),
        )

    def _warnings(self, options: EngineOptions, device: str) -> tuple[str, ...]:
        slow = "" if options.dtype else slow_dtype(self._folder, device)
        if not slow:
            return ()
        return (
            f"this CPU has no instructions for {slow}, so the model is computed in float32;"
            f" --dtype {slow} would take half the memory and be slower",
        )

    @property
    def _limits(self) -> Limits:
        return self._residents.limits

    def describe(self) -> EngineInfo:
        """See ``Engine``."""
        return self._info

    def tokenizer_files(self) -> dict[str, bytes]:
        """See ``Engine``."""
        return self._files

    def reset(self) -> None:
        """See ``Engine``."""
        super().reset()
        self._tables.clear()
        self._steps.clear()

    def start(self, plan: Plan) -> Started:
        """See ``Engine``."""
        check_scoring(plan, self._info)
        return super().start(plan)

    def close(self) -> None:
        """Frees the device, and leaves the other ranks in order."""
        self._processor.close()
        if self._peers is not None:
            self._peers.close()
        if self._cores is not None:
            self._control.close()
            self._cores.follow(0)
        self._engine.engine_core.shutdown()

    def _let_go(self, resident: Resident) -> None:
        self._tables.drop(resident.sequence)
        self._steps.let_go(resident.sequence)

    def _share(self, donor: Resident, resident: Resident, length: int) -> None:
        self._tables.share(donor.sequence, resident.sequence, length)

    def _compute(self, work: Work, rows: Sequence[Resident]) -> Drawn:
        for resident, count in work:
            self._tables.extend(resident.sequence, resident.computed + count)
        self._processor.begin(rows)
        set_threads(self._control.threads)
        if self._cores is not None:
            self._cores.follow(self._control.threads)
        self._executor.execute_model(self._steps.output(work))
        output = self._executor.sample_tokens(None)
        if output.prompt_logprobs_dict:
            self._score(work, output.prompt_logprobs_dict)
        return self._processor.finish(rows, output)

    def _score(self, work: Work, found: Mapping[str, Any]) -> None:
        """Tells of the prompts that are whole now; vLLM keeps what it found out until then."""
        from shards.engines.vllm_params import scores_of

        for resident, _ in work:
            tensors = found.get(str(resident.sequence))
            if tensors is not None and resident.prompt_len > 1:
                self._scores.add(resident, *scores_of(resident, tensors), start=1)


def text_config(folder: Path) -> dict[str, Any]:
    """``config.json``; a model of text and images names the end of a text one level down."""
    config = read_config(folder)
    inner = config.get("text_config")
    if config.get("eos_token_id") is None and isinstance(inner, dict):
        return {**config, "eos_token_id": inner.get("eos_token_id")}
    return config


def _join(options: EngineOptions) -> Peers:
    if options.rank == 0:
        sweep()
    try:
        peers = meet(options)
    except PeersError as error:
        raise ModelError(f"vllm: {error}") from error
    peers.watch(_end)
    return peers


def _end(reason: str) -> None:
    """Ends this process: its engine thread may be waiting for the lost rank, and cannot be told."""
    with suppress(OSError):
        sys.stderr.write(f"vllm: {reason}\n")
        sys.stderr.flush()
    os._exit(EXIT_LOST)


def _limits(folder: Path, engine: "LLMEngine") -> Limits:
    """What vLLM can hold. Raises ``ModelError`` if its cache is not of one kind of pages."""
    from vllm.v1.kv_cache_interface import (
        AttentionSpec,
        CrossAttentionSpec,
        EncoderOnlyAttentionSpec,
        UniformTypeKVCacheSpecs,
    )

    config = engine.vllm_config
    groups = engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups
    specs = [group.kv_cache_spec for group in groups]
    paged = (
        len(specs) == 1
        and isinstance(specs[0], AttentionSpec | UniformTypeKVCacheSpecs)
        and not isinstance(specs[0], CrossAttentionSpec | EncoderOnlyAttentionSpec)
    )
    if not paged or not config.scheduler_config.enable_chunked_prefill:
        kinds = " and ".join(sorted({type(spec).__name__ for spec in specs})) or "no cache"
        raise ModelError(
            f"model folder {folder}: vllm keeps {kinds} for it; this engine serves decoder-only"
            " models whose layers all attend to cached tokens"
        )
    page_tokens = specs[0].block_size
    # vLLM keeps block 0 to itself, and counts the token that is drawn behind the last computed one.
    kv_tokens = (config.cache_config.num_gpu_blocks - 1) * page_tokens
    return Limits(
        kv_tokens=kv_tokens,
        page_tokens=page_tokens,
        sequences_max=config.scheduler_config.max_num_seqs,
        step_tokens_max=config.scheduler_config.max_num_batched_tokens,
        length_max=min(config.model_config.max_model_len - 1, kv_tokens),
        vocab_size=config.model_config.get_vocab_size(),
    )


def _processor(runner: Any) -> "RowProcessor":
    """The logits processor that vLLM made for us."""
    from shards.engines.vllm_sampling import RowProcessor

    processors = runner.input_batch.logitsprocs.all
    found: RowProcessor = next(one for one in processors if isinstance(one, RowProcessor))
    return found


def _load_adapters(engine: "LLMEngine", options: EngineOptions) -> dict[str, Any]:
    """Loads every LoRA adapter now. Raises ``ModelError``."""
    from vllm.lora.request import LoRARequest

    from shards.engines.vllm_setup import one_line

    adapters = {}
    for number, (name, folder) in enumerate(options.adapters, start=1):
        adapters[name] = LoRARequest(name, number, str(folder))
        try:
            engine.add_lora(adapters[name])
        except Exception as error:
            raise ModelError(f"adapter {name}: {folder}: {one_line(error)}") from error
    return adapters


def load(options: EngineOptions, progress: Progress) -> VllmEngine:
    """Makes the engine; see ``shards.engines``."""
    return VllmEngine(options, progress)
