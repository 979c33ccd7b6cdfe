"""SGLang: ``sglang.Engine`` in this process, its scheduler and ranks in processes of its own.

The adapter is written against 0.5.23 and has not been run on a device; ``docs/engines/sglang.md``
says what has been checked, and how. Requests go in as token ids, so no tokenizer is loaded there.

Engine options (``--engine-option key=value``):

- ``tp``: tensor-parallel ranks, which SGLang starts itself.
- ``deterministic=1``: batch-invariant kernels and draws that depend on (seed, position) alone.
  Without it seeds have no effect, and the feature "seed" is not offered. Costs speed.
- ``lease_tokens``: tokens that SGLang may run ahead of the router; see ``self_scheduled``.
- ``answer_s``: a step that waits longer for SGLang's tokens gives it up.
- ``memory_share``: share of the device's memory for weights and cache; default: SGLang's choice.
- ``prefix_cache``: ``on`` (default) or ``off``; SGLang's own, which needs no word of the router.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, Sequence
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
    kv_budget,
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

# Low enough to bar a token under any bias that a client may give, and finite, so that adding it to
# a barred logit makes no NaN.
_BARRED = -1e9
_INT64 = 1 << 64
_ABORT = "abort"


class SglangBackend(Backend):
    """See the module."""

    def __init__(self, options: EngineOptions, extras: Extras, folder: Folder) -> None:
        self._options = options
        self._folder = folder
        self._sequences_max = options.sequences_max or SEQUENCES_MAX
        self._step_tokens_max = options.step_tokens_max or STEP_TOKENS_MAX
        self._ranks = extras.whole("tp", 1) or 1
        self._exact = extras.whole("deterministic", 0) > 0
        self._memory_share = extras.number("memory_share", 0.0)
        self._prefix_cache = extras.choice("prefix_cache", "on", ("on", "off")) == "on"
        self.lease_tokens = extras.whole("lease_tokens", LEASE_TOKENS) or LEASE_TOKENS
        self.answer_s = extras.number("answer_s", ANSWER_S) or ANSWER_S
        extras.finish()
        self._engine: Any = None

    @property
    def _ahead_tokens(self) -> int:
        return self._sequences_max * self.lease_tokens

    def start(self, loop: asyncio.AbstractEventLoop) -> EngineInfo:
        """See ``Backend``."""
        # Log probabilities before temperature; read by the scheduler's process when it starts.
        os.environ["SGLANG_RETURN_ORIGINAL_LOGPROB"] = "1"
        sglang = load_package("sglang", "sglang", "roundhouse engines install sglang")
        try:
            self._engine = sglang.Engine(**self._arguments())
            return self._describe(self._engine.get_server_info())
        except Exception as error:
            # Its processes hold the device's memory. What is told is why they are to end.
            with suppress(Exception):
                self.stop()
            if isinstance(error, ModelError):
                raise
            raise ModelError(f"sglang: did not start: {one_line(error)}") from error

    def _arguments(self) -> dict[str, Any]:
        options = self._options
        given: dict[str, Any] = {
            "model_path": str(self._folder.path),
            "skip_tokenizer_init": True,
            "tp_size": self._ranks,
            "max_running_requests": self._sequences_max,
            "chunked_prefill_size": self._step_tokens_max,
            "stream_interval": 1,
            "schedule_policy": "fcfs",
            "disable_radix_cache": not self._prefix_cache,
            "enable_deterministic_inference": self._exact,
            "random_seed": 0,
            "sleep_on_idle": True,
        }
        if options.kv_tokens:
            given["max_total_tokens"] = options.kv_tokens + self._ahead_tokens
        if options.dtype:
            given["dtype"] = options.dtype
        if options.device:
            given["device"] = options.device
        if self._memory_share:
            given["mem_fraction_static"] = self._memory_share
        if options.adapters:
            given["lora_paths"] = {name: str(path) for name, path in options.adapters}
            # One more than there are, for sequences without: none ever waits for a place.
            given["max_loras_per_batch"] = len(options.adapters) + 1
        return given

    def _describe(self, facts: dict[str, Any]) -> EngineInfo:
        page = int(facts.get("page_size") or 1)
        pool = int(facts["max_total_num_tokens"])
        running = int(facts["internal_states"][0]["effective_max_running_requests_per_dp"])
        begun = self._sequences_max * page if page > 1 else 0
        kv_tokens = kv_budget("sglang", pool, page, self._ahead_tokens + begun)
        features = ["logprobs", "logit_bias", "min_tokens"]
        if self._exact:
            features.append("seed")
        if self._options.adapters:
            features.append("lora")
        return EngineInfo(
            engine="sglang",
            engine_version=installed_version("sglang"),
            device=str(facts["device"]),
            model_id=self._options.model_id,
            dtype=str(facts["dtype"]),
            scheduling=Scheduling.SELF,
            kv_tokens=kv_tokens,
            page_tokens=page,
            sequences_max=min(self._sequences_max, running),
            step_tokens_max=self._step_tokens_max,
            # SGLang takes prompts that are shorter than this, and draws at least one token more.
            length_max=min(int(facts["max_req_input_len"]) - 1, kv_tokens),
            vocab_size=self._folder.vocab_size,
            eos_token_ids=self._folder.eos_token_ids,
            features=tuple(features),
            adapters=tuple(name for name, _ in self._options.adapters),
        )

    def unable(self, sampling: SamplingParams) -> str:
        """See ``Backend``. SGLang adds the bias before it takes the log probabilities."""
        if skews_logprobs(sampling):
            return "sglang has no raw log probabilities beside logit_bias or min_tokens"
        return ""

    async def generate(self, ask: Ask) -> AsyncGenerator[list[Token], None]:
        """See ``Backend``."""
        sampling = ask.sampling
        stream = await self._engine.async_generate(
            input_ids=list(ask.tokens),
            sampling_params=self._sampling(ask),
            return_logprob=sampling.logprobs,
            logprob_start_len=-1,
            top_logprobs_num=sampling.top_logprobs,
            lora_path=ask.adapter or None,
            stream=True,
            rid=ask.key,
        )
        made = 0
        try:
            # What a piece says is cumulative.
            async for piece in stream:
                ids = piece["output_ids"]
                meta = piece["meta_info"]
                fresh = range(made, len(ids))
                made = len(ids)
                if fresh:
                    yield [_token(ids, meta, index, sampling) for index in fresh]
                reason = meta["finish_reason"] or {}
                if reason.get("type") == _ABORT:
                    raise RequestFailed(f"sglang aborted the request: {reason.get('message', '')}")
        except ValueError as error:
            raise RequestFailed(f"sglang refused the request: {one_line(error)}") from error
        finally:
            # A stream that is closed before its end aborts its request.
            await stream.aclose()

    def _sampling(self, ask: Ask) -> dict[str, Any]:
        """The request's parameters in SGLang's words."""
        sampling = ask.sampling
        given: dict[str, Any] = {
            "max_new_tokens": ask.count,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p if sampling.top_p > 0.0 else 1.0,
            "top_k": sampling.top_k or -1,
            "min_p": sampling.min_p,
        }
        if self._exact:
            # Unsigned on the wire, signed there; the bits are what counts.
            seed = sampling.seed
            given["sampling_seed"] = seed if seed < _INT64 // 2 else seed - _INT64
        bias = dict(sampling.logit_bias)
        size = self._folder.vocab_size
        bias.update({token: _BARRED for token in ask.barred if token < size})
        if bias:
            given["logit_bias"] = {str(token): value for token, value in bias.items()}
        if sampling.stop_tokens and not ask.barred:
            given["stop_token_ids"] = list(sampling.stop_tokens)
        else:
            # Only the tokens that the router names end a sequence. This would switch them off, too.
            given["ignore_eos"] = True
        return given

    def stop(self) -> None:
        """See ``Backend``."""
        if self._engine is not None:
            self._engine.shutdown()


def _token(ids: Sequence[int], meta: dict[str, Any], index: int, sampling: SamplingParams) -> Token:
    if not sampling.logprobs:
        return Token(ids[index])
    try:
        logprob = float(meta["output_token_logprobs"][index][0])
        tops = meta["output_top_logprobs"][index] if sampling.top_logprobs else None
    except (IndexError, KeyError) as error:
        raise RequestFailed("sglang gave no log probability of the token it drew") from error
    best = sorted(tops or (), key=lambda top: (-top[0], top[1]))
    return Token(
        ids[index], Logprobs(logprob, [top[1] for top in best], [float(top[0]) for top in best])
    )


def load(options: EngineOptions, progress: Progress) -> Engine:
    """Makes the engine; see ``shards.engines``."""
    folder = open_folder("sglang", options)
    backend = SglangBackend(options, Extras("sglang", options.extra), folder)
    engine = SelfScheduledEngine(
        backend,
        partial(tokenizer_files, folder.path),
        lease_tokens=backend.lease_tokens,
        answer_s=backend.answer_s,
    )
    progress(1.0)
    return engine
