"""Engines by name. A module is imported only when its engine was asked for."""

import math
from collections.abc import Callable
from importlib import import_module

from shards.engines.base import Engine, EngineOptions, ModelError, Progress
from shards.pages import page

_MODULES = {
    "jax": "shards.engines.jax_engine",
    "llamacpp": "shards.engines.llamacpp",
    "neuron": "shards.engines.neuron",
    "scripted": "shards.engines.scripted",
    "sglang": "shards.engines.sglang_engine",
    "torch": "shards.engines.torch_engine",
    "trtllm": "shards.engines.trtllm",
    "vllm": "shards.engines.vllm_engine",
}
# Engines whose packages ``roundhouse engines install`` does not bring, and what to do instead.
_OTHERWISE = {
    "neuron": f"see {page('engines/neuron.md')}",
    "scripted": "try: pip install numpy tokenizers",
    "trtllm": f"see {page('engines/trtllm.md')}",
}
NAMES = tuple(sorted(_MODULES))


def lacking(name: str, package: str) -> str:
    """That an engine's package is not installed, and what to do, in one line."""
    mend = _OTHERWISE.get(name, f"try: roundhouse engines install {name}")
    return f"engine {name} needs the package {package}, which is not installed; {mend}"


def own_types(name: str, dtype: str) -> str:
    """That an engine cannot be told in which type it is to compute, and what to do, in one line."""
    return (
        f"{name}: --dtype {dtype}: the GGUF file says which types its weights have: leave --dtype "
        "out, or choose another file with --file, such as --file Q8_0; the type of the KV cache is "
        "--engine-option cache=TYPE"
    )


def other_ranks(*counts: int) -> str:
    """What to do where these cannot be dealt out evenly over as many ranks as were asked for."""
    most = math.gcd(*counts)
    good = [str(ranks) for ranks in range(1, most + 1) if most % ranks == 0]
    return f"--num-shard can be {', '.join(good)}"


def load(name: str, options: EngineOptions, progress: Progress) -> Engine:
    """Makes the engine of that name, loaded. Raises ``ModelError`` with one line if it cannot."""
    if name not in _MODULES:
        raise ModelError(f"no engine is called {name}; there is {', '.join(NAMES)}")
    try:
        module = import_module(_MODULES[name])
    except ModuleNotFoundError as missing:
        raise ModelError(lacking(name, str(missing.name))) from missing
    names = [adapter for adapter, _ in options.adapters]
    twice = [adapter for adapter in names if names.count(adapter) > 1]
    if twice:
        raise ModelError(f"two adapters are called {twice[0]}: give them different names")
    make: Callable[[EngineOptions, Progress], Engine] = module.load
    engine = make(options, progress)
    if set(names) - set(engine.describe().adapters):
        engine.close()
        raise ModelError(f"engine {name} has no LoRA adapters here: leave out --adapter {names[0]}")
    return engine
