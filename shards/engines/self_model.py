"""What engines that read a Hugging Face folder themselves still have to be told about it."""

from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

from shards.engines.base import EngineOptions, ModelError, SamplingParams
from shards.hf_folder import eos_token_ids, is_hf_folder, read_config

SEQUENCES_MAX = 64
STEP_TOKENS_MAX = 2048


@dataclass(frozen=True, slots=True)
class Folder:
    """A model's folder, and what its configuration says."""

    path: Path
    vocab_size: int
    length_trained: int
    eos_token_ids: tuple[int, ...]


def open_folder(engine: str, options: EngineOptions, ranks: str = "--engine-option tp=N") -> Folder:
    """Reads the configuration. Raises ``ModelError`` if there is none, or if ranks are asked for.

    These engines start the processes of their own ranks, so a group of them is one worker;
    ``ranks`` is how to ask for them.
    """
    if options.world > 1:
        raise ModelError(f"{engine}: starts its own ranks: take --num-shard 1, and {ranks}")
    if options.model is None:
        raise ModelError(f"{engine}: --model PATH is missing")
    if not is_hf_folder(options.model):
        raise ModelError(
            f"{engine}: {options.model} is not a model folder in Hugging Face format (config.json)"
        )
    config = read_config(options.model)
    text = config.get("text_config", config)
    try:
        vocab_size, length = int(text["vocab_size"]), int(text["max_position_embeddings"])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"model file {options.model / 'config.json'}: lacks {error}") from error
    return Folder(options.model, vocab_size, length, eos_token_ids(options.model, config))


def load_package(engine: str, package: str, hint: str) -> ModuleType:
    """Imports the engine's own package. Raises ``ModelError`` that says how to get it."""
    try:
        return import_module(package)
    except ModuleNotFoundError as missing:
        if missing.name and not package.startswith(missing.name):
            hint = f"it is not complete: {missing.name} is missing"
        raise ModelError(f"engine {engine} needs the package {package}: {hint}") from missing
    except Exception as error:
        raise ModelError(f"{engine}: {package} cannot be imported: {one_line(error)}") from error


def installed_version(distribution: str) -> str:
    """The version of an installed distribution, as far as it says one."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"


def one_line(error: BaseException) -> str:
    """The first line that an error says, or its kind."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def skews_logprobs(sampling: SamplingParams) -> bool:
    """Whether an engine that reports log probabilities behind a bias cannot report raw ones."""
    bars = sampling.min_tokens > 0 and bool(sampling.stop_tokens)
    return sampling.logprobs and (bool(sampling.logit_bias) or bars)


def kv_budget(engine: str, pool_tokens: int, page_tokens: int, ahead_tokens: int) -> int:
    """Tokens of KV cache that the router may use: what is left beside what runs ahead of it.

    ``ahead_tokens`` is what all sequences together may hold beyond what the router knows of.
    """
    left = (pool_tokens - ahead_tokens) // page_tokens * page_tokens
    if left < page_tokens:
        raise ModelError(
            f"{engine}: {pool_tokens} tokens of KV cache are too few beside {ahead_tokens} that"
            " sequences may run ahead; lower --sequences-max or --engine-option lease_tokens=N"
        )
    return left
