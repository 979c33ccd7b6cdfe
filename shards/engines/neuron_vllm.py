"""AWS Neuron through vLLM: its public engine API in this process, with the vllm-neuron plugin.

The adapter is written for vLLM 0.11.0 and vllm-neuron 0.2.0, and has not been run on a device;
``docs/engines/neuron.md`` says what has been checked, and how. One ``LLMEngine`` lives on the
loop's thread, and is stepped there as long as it has requests. Requests go in as token ids, so no
tokenizer is loaded there.

Sampling is vLLM's own, on the host: the plugin's sampling on the device takes the first token of a
request with the parameters of another one. A sequence has a slot of its own in the cache, so its
lease is the rest of its answer unless one is asked for.

Engine options (``--engine-option key=value``), beside ``library=vllm``:

- ``tp``: Neuron cores, all driven by this process.
- ``length_max``: tokens of a slot; a sequence has one less. Default: what the model is trained for.
- ``prefix_cache``: ``on`` or ``off`` (default); the plugin's own, without a word of the router.
- ``compiled``: folder of the compiled model; made if it is not there.
- ``lease_tokens``, ``answer_s``: see ``self_scheduled``.
"""

import asyncio
import logging
import os
from collections.abc import AsyncGenerator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from shards.engines import neuron_compiled
from shards.engines.base import (
    Engine,
    EngineInfo,
    EngineOptions,
    Logprobs,
    ModelError,
    SamplingParams,
    Scheduling,
)
from shards.engines.self_model import Folder, installed_version, load_package, one_line
from shards.engines.self_scheduled import (
    ANSWER_S,
    Ask,
    Backend,
    RequestFailed,
    SelfScheduledEngine,
    Token,
)
from shards.extras import Extras
from shards.hf_folder import tokenizer_files
from shards.pages import page

DEVICES = Path("/dev")
SEQUENCES_MAX = 8
# Of the prefix cache; what a slot has must be a multiple.
PAGE_TOKENS = 32
# The plugin computes a prompt in one step, whose budget it sets to this.
LENGTH_MAX = 131072
# NxD Inference finds the end of a prompt at its largest position, and pads with position 1.
PROMPT_MIN = 3
# vLLM raises a lower temperature to this, but for 0.
TEMPERATURE_MIN = 0.01
WRITTEN_FOR = "0.11."
_CORES = "NEURON_RT_VISIBLE_CORES"
_ENVIRONMENT = {
    # The engine lives in this process.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # The plugin's scheduler computes prompts whole; without it the plugin wants another model.
    "DISABLE_NEURON_CUSTOM_SCHEDULER": "0",
    # Not the way to switch it off: the plugin then calls a module.
    "NEURON_ON_DEVICE_SAMPLING_DISABLED": "0",
}
_ABORT = "abort"
_TRIAL = "roundhouse-trial"
_TRIAL_STEPS = 8


class VllmNeuronBackend(Backend):
    """See the module."""

    def __init__(self, options: EngineOptions, extras: Extras, folder: Folder) -> None:
        self._options = options
        self._folder = folder
        self._slots = options.sequences_max or SEQUENCES_MAX
        self._cores = extras.whole("tp", 1) or 1
        trained = min(folder.length_trained, LENGTH_MAX)
        self._slot_tokens = extras.whole("length_max", trained) or trained
        self._prefix_cache = extras.choice("prefix_cache", "off", ("on", "off")) == "on"
        self._compiled = extras.text("compiled", os.environ.get(neuron_compiled.VARIABLE, ""))
        self.lease_tokens = extras.whole("lease_tokens", 0) or self._slot_tokens
        self.answer_s = extras.number("answer_s", ANSWER_S) or ANSWER_S
        extras.finish()
        self._check_sizes()
        self._engine: Any = None
        self._vllm: Any = None
        self._sampling_params: Any = None
        self._streams: dict[str, asyncio.Queue[Any]] = {}
        self._stepping: asyncio.Task[None] | None = None
        self._fault: Exception | None = None

    def _check_sizes(self) -> None:
        most = min(self._folder.length_trained, LENGTH_MAX)
        if not PROMPT_MIN < self._slot_tokens <= most:
            raise ModelError(
                f"neuron: engine option length_max={self._slot_tokens} must be more than"
                f" {PROMPT_MIN} and at most {most}"
            )
        if not self._prefix_cache:
            return
        if self._slot_tokens % PAGE_TOKENS:
            raise ModelError(
                f"neuron: with prefix_cache=on, length_max must be a multiple of {PAGE_TOKENS};"
                f" {self._slot_tokens} is not"
            )
        if self._slots == 1:
            # Its answers are then wrong, as its page says.
            raise ModelError("neuron: prefix_cache=on needs --sequences-max 2 or more")

    # Start --------------------------------------------------------------------------------------

    def start(self, loop: asyncio.AbstractEventLoop) -> EngineInfo:
        """See ``Backend``. Compiles the model, if it was not compiled before: up to hours."""
        os.environ.update(_ENVIRONMENT)
        load = partial(load_package, "neuron", hint=f"see {page('engines/neuron.md')}")
        load("vllm_neuron")
        if not any(DEVICES.glob("neuron*")):
            raise ModelError(f"neuron: no Neuron device: {DEVICES} has no neuron0")
        # It says for each request that there is no tokenizer.
        logging.getLogger("vllm.inputs.preprocess").setLevel(logging.ERROR)
        self._vllm = load("vllm")
        self._sampling_params = load("vllm.sampling_params")
        platforms: Any = load("vllm.platforms")
        if platforms.current_platform.device_control_env_var != _CORES:
            raise ModelError(
                "neuron: vLLM did not take its Neuron plugin: leave VLLM_PLUGINS out, or add neuron"
            )
        arguments = self._arguments()
        self._choose_compiled(arguments)
        try:
            made = self._vllm.EngineArgs(**arguments)
            self._engine = self._vllm.LLMEngine.from_engine_args(made)
            self._try()
        except Exception as error:
            # It holds the device's memory. What is told is why it is to end.
            with suppress(Exception):
                self.stop()
            if isinstance(error, ModelError):
                raise
            raise ModelError(f"neuron: vLLM did not start: {one_line(error)}") from error
        return self._describe()

    def _arguments(self) -> dict[str, Any]:
        given: dict[str, Any] = {
            "model": str(self._folder.path),
            "skip_tokenizer_init": True,
            # No tokens that end a request but those that it names.
            "generation_config": "vllm",
            "tensor_parallel_size": self._cores,
            "max_num_seqs": self._slots,
            "max_model_len": self._slot_tokens,
            "enable_prefix_caching": self._prefix_cache,
            # Room for all slots in full, so nothing is ever queued or preempted for memory.
            "num_gpu_blocks_override": self._slots,
            "max_logprobs": -1,
            "seed": 0,
            "disable_log_stats": True,
            "additional_config": {
                "override_neuron_config": {
                    "on_device_sampling_config": None,
                    # What is compiled is found again with its weights only if they are beside it.
                    "save_sharded_checkpoint": True,
                }
            },
        }
        if self._prefix_cache:
            given["block_size"] = PAGE_TOKENS
            given["num_gpu_blocks_override"] = self._slots * (self._slot_tokens // PAGE_TOKENS)
        if self._options.dtype:
            given["dtype"] = self._options.dtype
        return given

    def _choose_compiled(self, arguments: dict[str, Any]) -> None:
        """Tells the plugin which folder: by itself it deletes what it compiled the last time."""
        folder = neuron_compiled.folder_for(self._folder.path, self._compiled, arguments)
        neuron_compiled.check(
            folder,
            {
                "batch_size": (self._slots, "--sequences-max"),
                "seq_len": (self._slot_tokens, "--engine-option length_max="),
                "tp_degree": (self._cores, "--engine-option tp="),
                "is_prefix_caching": (self._prefix_cache, "--engine-option prefix_cache="),
            },
        )
        os.environ[neuron_compiled.VARIABLE] = str(folder)

    def _try(self) -> None:
        """One request through all that requests go through, before one of a client's does."""
        ask = Ask(_TRIAL, [0] * PROMPT_MIN, 1, SamplingParams(temperature=1.0, logprobs=True))
        self._add(ask)
        for _ in range(_TRIAL_STEPS):
            for output in self._engine.step():
                if output.outputs[0].logprobs is None:
                    raise ModelError(
                        "neuron: the compiled model draws on the device; name another folder with"
                        " --engine-option compiled=DIR"
                    )
            if not self._engine.has_unfinished_requests():
                return
        raise ModelError(f"neuron: vLLM drew no token in {_TRIAL_STEPS} steps")

    def _describe(self) -> EngineInfo:
        # No penalties, since a sequence that comes back has forgotten which tokens were generated.
        # The plugin makes no generator for a seed, and no processor for a bias or min_p.
        length_max = self._slot_tokens - 1
        kv_tokens = self._slots * length_max
        if self._options.kv_tokens:
            kv_tokens = min(kv_tokens, self._options.kv_tokens)
        version = installed_version("vllm")
        warnings = []
        if not version.startswith(WRITTEN_FOR):
            warnings.append(f"vLLM {version} is installed; this adapter is for {WRITTEN_FOR}x")
        return EngineInfo(
            engine="neuron",
            engine_version=installed_version("vllm-neuron"),
            device="neuron",
            model_id=self._options.model_id,
            dtype=self._options.dtype or "auto",
            scheduling=Scheduling.SELF,
            kv_tokens=kv_tokens,
            page_tokens=1,
            sequences_max=self._slots,
            step_tokens_max=self._options.step_tokens_max or max(length_max, self._slots),
            length_max=min(length_max, kv_tokens),
            vocab_size=self._folder.vocab_size,
            eos_token_ids=self._folder.eos_token_ids,
            features=("logprobs", "min_tokens"),
            warnings=tuple(warnings),
        )

    def stop(self) -> None:
        """See ``Backend``."""
        if self._engine is not None:
            self._engine.engine_core.shutdown()

    # Requests -----------------------------------------------------------------------------------

    def unable(self, sampling: SamplingParams) -> str:
        """See ``Backend``. What the plugin or vLLM would pass over, or change."""
        if sampling.temperature > 0.0 and sampling.min_p > 0.0:
            return "neuron does not support min_p through vLLM"
        if 0.0 < sampling.temperature < TEMPERATURE_MIN:
            return f"neuron draws through vLLM at temperature 0, or {TEMPERATURE_MIN} and above"
        return ""

    async def generate(self, ask: Ask) -> AsyncGenerator[list[Token], None]:
        """See ``Backend``."""
        if len(ask.tokens) < PROMPT_MIN:
            raise RequestFailed(f"neuron computes prompts of {PROMPT_MIN} tokens or more only")
        if self._fault is not None:
            raise self._fault
        # Each step brings one piece at most, and a failure is the last.
        stream = self._streams[ask.key] = asyncio.Queue(ask.count + 1)
        live = False
        try:
            self._add(ask)
            live = True
            if self._stepping is None or self._stepping.done():
                self._stepping = asyncio.get_running_loop().create_task(self._step())
            while live:
                said: Any = await stream.get()
                if isinstance(said, Exception):
                    raise said
                live = not said.finished
                piece = said.outputs[0]
                if piece.token_ids:
                    yield [_token(piece, index, ask) for index in range(len(piece.token_ids))]
                if piece.finish_reason == _ABORT:
                    raise RequestFailed("vLLM aborted the request")
        finally:
            del self._streams[ask.key]
            if live and self._fault is None:
                self._engine.abort_request([ask.key])

    async def _step(self) -> None:
        """Steps the engine while it has requests; others get their turn in between.

        What it raises is the end of the engine, whose scheduler is not to be trusted any more.
        """
        try:
            while self._engine.has_unfinished_requests():
                for output in self._engine.step():
                    self._streams[output.request_id].put_nowait(output)
                await asyncio.sleep(0)
        except Exception as error:  # noqa: BLE001 - told to all who wait
            self._fault = error
            for stream in self._streams.values():
                stream.put_nowait(error)

    def _add(self, ask: Ask) -> None:
        prompt = self._vllm.TokensPrompt(prompt_token_ids=list(ask.tokens))
        try:
            params = self._sampling_params.SamplingParams(**self._sampling(ask))
            self._engine.add_request(ask.key, prompt, params)
        except ValueError as error:
            raise RequestFailed(f"vLLM refused the request: {one_line(error)}") from error

    def _sampling(self, ask: Ask) -> dict[str, Any]:
        """The request's parameters in vLLM's words."""
        sampling = ask.sampling
        given: dict[str, Any] = {
            "max_tokens": ask.count,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p if sampling.top_p > 0.0 else 1.0,
            "ignore_eos": True,
            "detokenize": False,
            "output_kind": self._sampling_params.RequestOutputKind.DELTA,
        }
        if sampling.logprobs:
            given["logprobs"] = sampling.top_logprobs
        if sampling.stop_tokens and not ask.barred:
            given["stop_token_ids"] = list(sampling.stop_tokens)
        if ask.barred:
            # vLLM's own min_tokens needs a processor of logits, which the plugin does not make.
            barred = set(ask.barred)
            allowed = range(self._folder.vocab_size)
            given["allowed_token_ids"] = [token for token in allowed if token not in barred]
        return given


def _token(piece: Any, index: int, ask: Ask) -> Token:
    token = int(piece.token_ids[index])
    if not ask.sampling.logprobs:
        return Token(token)
    found = piece.logprobs[index]
    ranked = sorted(found, key=lambda other: (-found[other].logprob, other))
    best = ranked[: ask.sampling.top_logprobs]
    return Token(
        token, Logprobs(found[token].logprob, best, [found[other].logprob for other in best])
    )


def load(options: EngineOptions, extras: Extras, folder: Folder) -> Engine:
    """Makes the engine. Raises ``ModelError``."""
    backend = VllmNeuronBackend(options, extras, folder)
    return SelfScheduledEngine(
        backend,
        partial(tokenizer_files, folder.path),
        lease_tokens=backend.lease_tokens,
        answer_s=backend.answer_s,
    )
