"""TensorRT-LLM: ``tensorrt_llm.LLM`` with its PyTorch backend, whose executor schedules by itself.

The adapter is written for the LLM API that the 1.x releases keep stable, and has not been run on a
device; ``docs/engines/trtllm.md`` says what has been checked, and how. Requests go in as token ids,
so no tokenizer is loaded there.

Engine options (``--engine-option key=value``):

- ``tp``: tensor-parallel ranks, which TensorRT-LLM starts itself, over MPI.
- ``lease_tokens``: tokens that it may run ahead of the router; see ``self_scheduled``.
- ``answer_s``: a step that waits longer for its tokens gives it up.
- ``length_max``: tokens of prompt and answer; default: what the model was trained for.
- ``memory_share``: share of the free device memory that the cache may take; default 0.9.
- ``logprobs=1``: offer log probabilities. Some releases report the likeliest tokens only; a
  sequence that draws another one then fails, by name.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from functools import partial
from typing import Any

from shards.engines.base import (
    Engine,
    EngineInfo,
    EngineOptions,
    Logprobs,
    ModelError,
    Progress,
    SamplingParams,
    Scheduling,
)
from shards.engines.self_model import (
    SEQUENCES_MAX,
    STEP_TOKENS_MAX,
    Folder,
    installed_version,
    load_package,
    one_line,
    open_folder,
    skews_logprobs,
)
from shards.engines.self_scheduled import (
    ANSWER_S,
    LEASE_TOKENS,
    Ask,
    Backend,
    RequestFailed,
    SelfScheduledEngine,
    Token,
)
from shards.extras import Extras
from shards.hf_folder import tokenizer_files
from shards.pages import page

# A logit plus this is below every other under any bias that a client may give, and still finite.
_BARRED = -1e9
MEMORY_SHARE = 0.9
# The engine's own default.
PAGE_TOKENS = 32
_ENDED_WELL = ("stop", "length", None)


class TrtllmBackend(Backend):
    """See the module."""

    def __init__(self, options: EngineOptions, extras: Extras, folder: Folder) -> None:
        if not options.kv_tokens:
            raise ModelError(
                "trtllm: --kv-tokens N is needed: TensorRT-LLM does not say how many tokens of KV"
                " cache it has made room for"
            )
        if options.device not in ("", "cuda"):
            raise ModelError(
                f"trtllm: --device {options.device}: it takes the GPUs that CUDA_VISIBLE_DEVICES"
                " names; leave --device out"
            )
        self._options = options
        self._folder = folder
        self._sequences_max = options.sequences_max or SEQUENCES_MAX
        self._step_tokens_max = options.step_tokens_max or STEP_TOKENS_MAX
        self._kv_tokens = options.kv_tokens // PAGE_TOKENS * PAGE_TOKENS
        if not self._kv_tokens:
            raise ModelError(f"trtllm: --kv-tokens must be at least {PAGE_TOKENS}")
        self._ranks = extras.whole("tp", 1) or 1
        self._length_max = min(
            extras.whole("length_max", folder.length_trained) or folder.length_trained,
            self._kv_tokens,
        )
        self._memory_share = extras.number("memory_share", MEMORY_SHARE)
        self._logprobs = extras.whole("logprobs", 0) > 0
        self.lease_tokens = extras.whole("lease_tokens", LEASE_TOKENS) or LEASE_TOKENS
        self.answer_s = extras.number("answer_s", ANSWER_S) or ANSWER_S
        extras.finish()
        self._llm: Any = None
        self._llmapi: Any = None
        self._torch: Any = None
        self._adapters: dict[str, Any] = {}

    def start(self, loop: asyncio.AbstractEventLoop) -> EngineInfo:
        """See ``Backend``."""
        hint = (
            f"see {page('engines/trtllm.md')}; it needs an NVIDIA GPU, and comes from NVIDIA's own"
            " index"
        )
        load = partial(load_package, "trtllm", hint=hint)
        self._llmapi = load("tensorrt_llm.llmapi")
        self._torch = load("torch")
        if not self._torch.cuda.is_available():
            raise ModelError("trtllm: no NVIDIA GPU: torch.cuda.is_available() says so")
        try:
            self._llm = self._llmapi.LLM(**self._arguments())
            self._adapters = {
                name: self._llmapi.LoRARequest(
                    lora_name=name, lora_int_id=number, lora_path=str(path)
                )
                for number, (name, path) in enumerate(self._options.adapters, start=1)
            }
        except Exception as error:
            # Its processes hold the device's memory. What is told is why they are to end.
            with suppress(Exception):
                self.stop()
            raise ModelError(f"trtllm: did not start: {one_line(error)}") from error
        return self._describe()

    def _arguments(self) -> dict[str, Any]:
        options = self._options
        ahead = self._sequences_max * self.lease_tokens
        given: dict[str, Any] = {
            "model": str(self._folder.path),
            "skip_tokenizer_init": True,
            "tensor_parallel_size": self._ranks,
            "max_batch_size": self._sequences_max,
            "max_num_tokens": self._step_tokens_max,
            # A sequence of the greatest length can still draw a token.
            "max_seq_len": self._length_max + 1,
            "enable_chunked_prefill": True,
            "stream_interval": 1,
            "kv_cache_config": self._llmapi.KvCacheConfig(
                # Beside what the router uses: one lease, and one page begun, for each sequence.
                max_tokens=self._kv_tokens + ahead + self._sequences_max * PAGE_TOKENS,
                free_gpu_memory_fraction=self._memory_share,
                enable_block_reuse=True,
            ),
        }
        if options.dtype:
            given["dtype"] = options.dtype
        if options.adapters:
            given["enable_lora"] = True
            llm_args = load_package("trtllm", "tensorrt_llm.llmapi.llm_args", "")
            given["lora_config"] = llm_args.LoraConfig(
                lora_dir=[str(path) for _, path in options.adapters],
                max_loras=len(options.adapters),
                # None is ever pushed out of the host's memory; by default four are kept.
                max_cpu_loras=len(options.adapters),
            )
        return given

    def _describe(self) -> EngineInfo:
        # No penalties, since a new lease forgets them. No seeds, since the PyTorch sampler draws
        # for all requests from one generator.
        features = ["logit_bias", "min_tokens"]
        if self._logprobs:
            features.append("logprobs")
        if self._options.adapters:
            features.append("lora")
        return EngineInfo(
            engine="trtllm",
            engine_version=installed_version("tensorrt_llm"),
            device=str(self._torch.cuda.get_device_name(0)),
            model_id=self._options.model_id,
            dtype=self._options.dtype or "auto",
            scheduling=Scheduling.SELF,
            kv_tokens=self._kv_tokens,
            page_tokens=PAGE_TOKENS,
            sequences_max=self._sequences_max,
            step_tokens_max=self._step_tokens_max,
            length_max=self._length_max,
            vocab_size=self._folder.vocab_size,
            eos_token_ids=self._folder.eos_token_ids,
            features=tuple(features),
            adapters=tuple(self._adapters),
        )

    def unable(self, sampling: SamplingParams) -> str:
        """See ``Backend``. The PyTorch sampler has no min_p, and would say nothing."""
        if sampling.min_p > 0.0 and sampling.temperature > 0.0:
            return "trtllm does not support min_p"
        if skews_logprobs(sampling):
            return "trtllm has no raw log probabilities beside logit_bias or min_tokens"
        return ""

    async def generate(self, ask: Ask) -> AsyncGenerator[list[Token], None]:
        """See ``Backend``."""
        try:
            result = self._llm.generate_async(
                list(ask.tokens),
                sampling_params=self._llmapi.SamplingParams(**self._sampling(ask)),
                lora_request=self._adapters.get(ask.adapter),
                streaming=True,
            )
        except (ValueError, self._llmapi.RequestError) as error:
            raise RequestFailed(f"trtllm refused the request: {one_line(error)}") from error
        made = 0
        try:
            async for _ in result:
                output = result.outputs[0]
                fresh = range(made, len(output.token_ids))
                made = len(output.token_ids)
                if fresh:
                    yield [_token(output, index, ask.sampling) for index in fresh]
                _check_end(output)
        except self._llmapi.RequestError as error:
            # There is nothing to abort any more, though it does not count as finished.
            raise RequestFailed(f"trtllm failed the request: {one_line(error)}") from error
        except (RequestFailed, asyncio.CancelledError, GeneratorExit):
            # It would go on for nobody.
            if not result.finished:
                result.abort()
            raise

    def _sampling(self, ask: Ask) -> dict[str, Any]:
        """The request's parameters in TensorRT-LLM's words."""
        sampling = ask.sampling
        given: dict[str, Any] = {
            "max_tokens": ask.count,
            # Needed without a tokenizer, and without effect: the router says which tokens end.
            "end_id": self._folder.eos_token_ids[0],
            "ignore_eos": True,
            "detokenize": False,
        }
        if sampling.temperature > 0.0:
            given["temperature"] = sampling.temperature
            # Both are given: without them it takes the request for greedy. 0 is all tokens.
            given["top_k"] = sampling.top_k
            given["top_p"] = sampling.top_p if sampling.top_p > 0.0 else 1.0
        else:
            given["top_k"] = 1
        if sampling.logprobs:
            given["logprobs"] = max(1, sampling.top_logprobs)
        if sampling.stop_tokens and not ask.barred:
            given["stop_token_ids"] = list(sampling.stop_tokens)
            given["include_stop_str_in_output"] = True
        if sampling.logit_bias or ask.barred:
            given["embedding_bias"] = self._bias(ask)
        return given

    def _bias(self, ask: Ask) -> Any:
        """One float32 per token of the vocabulary, added to its logit."""
        bias = self._torch.zeros(self._folder.vocab_size, dtype=self._torch.float32)
        for token, value in ask.sampling.logit_bias:
            bias[token] += value
        for token in ask.barred:
            if token < self._folder.vocab_size:
                bias[token] = _BARRED
        return bias

    def stop(self) -> None:
        """See ``Backend``."""
        if self._llm is not None:
            self._llm.shutdown()


def _check_end(output: Any) -> None:
    """Raises ``RequestFailed`` if the request was ended before its time."""
    if output.finish_reason not in _ENDED_WELL:
        raise RequestFailed(f"trtllm ended the request: {output.finish_reason}")


def _token(output: Any, index: int, sampling: SamplingParams) -> Token:
    token = int(output.token_ids[index])
    if not sampling.logprobs:
        return Token(token)
    # One mapping per position: the likeliest tokens, and the drawn one in most releases.
    found = output.logprobs[index] if index < len(output.logprobs) else {}
    if token not in found:
        raise RequestFailed("trtllm gave no log probability of the token it drew")
    ranked = sorted(found, key=lambda other: (-found[other].logprob, other))
    best = ranked[: sampling.top_logprobs]
    return Token(
        token, Logprobs(found[token].logprob, best, [found[other].logprob for other in best])
    )


def load(options: EngineOptions, progress: Progress) -> Engine:
    """Makes the engine; see ``shards.engines``."""
    folder = open_folder("trtllm", options)
    backend = TrtllmBackend(options, Extras("trtllm", options.extra), folder)
    engine = SelfScheduledEngine(
        backend,
        partial(tokenizer_files, folder.path),
        lease_tokens=backend.lease_tokens,
        answer_s=backend.answer_s,
    )
    progress(1.0)
    return engine
