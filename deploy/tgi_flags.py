"""The flags of TGI's launcher (text-generation-inference 3.3.7, launcher/src/main.rs, ``Args``).

Each is a row that says what becomes of it here. Every flag has an environment variable: its name in
capitals, with underscores. What is typed wins over it.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any

import click

from deploy.options import MODEL, SectionedOption
from router.options import BATCH, FAILURES, LIMITS, LISTEN, MARK, OUTPUT

IGNORED, REFUSED = "Accepted, without effect", "Refused"
SECTIONS = (MODEL, LISTEN, LIMITS, MARK, BATCH, FAILURES, OUTPUT, IGNORED, REFUSED)


class Fate(Enum):
    """What becomes of a flag."""

    PASSED = "passed to the option of `roundhouse serve` of the same name"
    TRANSLATED = "means something else there; see tgi_launcher"
    MET = "asks for what is always so"
    IGNORED = "only tunes; named in a warning"
    REFUSED = "would change answers, or what is reached how; the launcher ends"


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag. ``metavar`` "" is a switch; ``reason`` says why it is refused and what to do."""

    name: str
    metavar: str
    fate: Fate
    section: str
    help: str
    reason: str = ""
    short: str = ""
    choices: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Its name among parsed values."""
        return self.name.replace("-", "_")

    @property
    def env(self) -> str:
        """Its environment variable."""
        return self.key.upper()

    def option(self) -> click.Option:
        """The option of a command."""
        names = [f"--{self.name}", *([f"-{self.short}"] if self.short else ())]
        more: dict[str, Any] = {"is_flag": True, "default": False}
        if self.metavar:
            more = {"metavar": self.metavar, "type": _TYPES.get(self.metavar, str)}
        if self.choices:
            more = {"type": click.Choice(self.choices, case_sensitive=False)}
        if self.name == "cors-allow-origin":
            more["multiple"] = True
        variable = None if self.name == "env" else self.env
        return SectionedOption(
            names, section=self.section, help=self.help, envvar=variable, show_envvar=True, **more
        )


_TYPES = {"true|false": click.BOOL, "SHARDS": click.IntRange(1)}


def _passed(section: str, name: str, metavar: str, text: str) -> Flag:
    return Flag(name, metavar, Fate.PASSED, section, text)


def _own(section: str, name: str, metavar: str, text: str, **more: Any) -> Flag:
    return Flag(name, metavar, Fate.TRANSLATED, section, text, **more)


def _ignored(name: str, metavar: str, text: str, **more: Any) -> Flag:
    return Flag(name, metavar, Fate.IGNORED, IGNORED, text, **more)


def _refused(name: str, metavar: str, reason: str, **more: Any) -> Flag:
    text = f"{reason[0].upper()}{reason[1:]}."
    return Flag(name, metavar, Fate.REFUSED, REFUSED, text, reason, **more)


_ROPE = "the scaling of positions is the model's own: set rope_scaling in its config.json"
_NGROK = "no tunnel is opened from here: run `ngrok http PORT` beside the server"
FLAGS = (
    _own(
        MODEL, "model-id", "ID",
        "A hub id, a folder, or a GGUF file. Without it the small embedded model is served.",
    ),
    _passed(MODEL, "revision", "REV", "Branch, tag or commit on the hub."),
    _own(
        MODEL, "sharded", "true|false",
        "True: the model is spread over all visible devices. False: over num-shard, or one.",
    ),
    _own(
        MODEL, "num-shard", "SHARDS",
        "Ranks that hold the model together. Default: as many as CUDA_VISIBLE_DEVICES, "
        "NVIDIA_VISIBLE_DEVICES or ZE_AFFINITY_MASK names, else one.",
    ),
    _own(
        MODEL, "dtype", "TYPE", "Element type of weights and cache; a GGUF file has its own.",
        choices=("float16", "bfloat16"),
    ),
    _own(
        MODEL, "quantize", "METHOD",
        "How weights are quantised: by vLLM alone. GGUF files and vLLM need no flag for a model "
        "that is quantised already.",
        choices=(
            *("awq", "compressed-tensors", "eetq", "exl2", "gptq", "marlin", "bitsandbytes"),
            *("bitsandbytes-nf4", "bitsandbytes-fp4", "fp8"),
        ),
    ),
    _own(
        MODEL, "kv-cache-dtype", "TYPE", "8-bit numbers in the cache, with llama.cpp as q8_0.",
        choices=("fp8_e4m3fn", "fp8_e5m2"),
    ),
    _own(
        MODEL, "cuda-memory-fraction", "SHARE",
        "Share of a device's memory to use: with vLLM; the other engines take what they need.",
    ),
    _passed(MODEL, "lora-adapters", "LIST", "LoRA adapters: ID, ID@REV or NAME=PATH, with commas."),
    _own(
        MODEL, "tokenizer-config-path", "FILE",
        "A tokenizer_config.json whose chat_template takes the place of the model's own.",
    ),
    _own(MODEL, "huggingface-hub-cache", "FOLDER", "Where models from the hub are kept."),
    _own(
        LISTEN, "hostname", "ADDRESS",
        "Address to listen on. A HOSTNAME that is no address, as containers have it, is passed "
        "over. Default: 0.0.0.0.",
    ),
    Flag("port", "PORT", Fate.PASSED, LISTEN, "Port of REST. Default: 3000.", short="p"),
    _passed(LISTEN, "api-key", "KEY", "Bearer token that clients must send."),
    _passed(LISTEN, "cors-allow-origin", "ORIGIN", "Origin that browsers may call from."),
    _passed(LISTEN, "payload-limit", "BYTES", "Largest request body. Default: 2000000."),
    _passed(LIMITS, "max-concurrent-requests", "N", "Requests open at once. Default: 128."),
    _passed(LIMITS, "max-best-of", "N", "Largest best_of. Default: 2."),
    _passed(LIMITS, "max-stop-sequences", "N", "Stop strings in a request. Default: 4."),
    _passed(LIMITS, "max-top-n-tokens", "N", "Largest top_n_tokens. Default: 5."),
    _passed(LIMITS, "max-input-tokens", "TOKENS", "Longest prompt."),
    _own(LIMITS, "max-input-length", "TOKENS", "The former name of max-input-tokens."),
    _passed(LIMITS, "max-total-tokens", "TOKENS", "Longest prompt and answer together."),
    _passed(LIMITS, "max-client-batch-size", "N", "Prompts in one /v1/completions. Default: 4."),
    Flag(
        "disable-grammar-support", "", Fate.PASSED, LIMITS,
        "Refuses requests for structured output.",
    ),
    Flag(
        "enable-prefill-logprobs", "", Fate.MET, LIMITS,
        "Always on: asking for prompt log probabilities costs those who ask.",
    ),
    _passed(MARK, "watermark-gamma", "SHARE", "Of the vocabulary, at each token. Default: 0.5."),
    _passed(MARK, "watermark-delta", "DELTA", "Added to the logits of that share. Default: 2.0."),
    _passed(BATCH, "max-batch-prefill-tokens", "TOKENS", "Tokens computed in one step."),
    _passed(BATCH, "max-batch-total-tokens", "TOKENS", "Tokens held in memory over all requests."),
    _passed(BATCH, "max-batch-size", "N", "Requests computed at once."),
    Flag(
        "graceful-termination-timeout", "SECONDS", Fate.PASSED, FAILURES,
        "Time for running answers to end after SIGTERM. Default: 90.", short="g",
    ),
    _passed(OUTPUT, "json-output", "", "Log lines as JSON objects."),
    _passed(OUTPUT, "otlp-endpoint", "URL", "Collector that gets traces: gRPC, http://HOST:4317."),
    _own(
        OUTPUT, "otlp-service-name", "NAME",
        "What the server is called there. Default: text-generation-inference.router.",
    ),
    _own(OUTPUT, "env", "", "Shows the environment before it starts.", short="e"),
    Flag(
        "usage-stats", "LEVEL", Fate.MET, OUTPUT, "Always off: nothing is sent to anybody.",
        choices=("on", "off", "no-stack"),
    ),
    _ignored("validation-workers", "N", "The tokenizer runs in threads as they are needed."),
    _ignored("waiting-served-ratio", "RATIO", "Prompts go in chunks beside running answers."),
    _ignored("max-waiting-tokens", "TOKENS", "For the same reason."),
    _ignored("speculate", "N", "No tokens are guessed ahead; answers are the same without."),
    _ignored("cuda-graphs", "SIZES", "Engines capture the sizes that they need."),
    _ignored("disable-custom-kernels", "", "Engines choose their kernels."),
    _ignored("prometheus-port", "PORT", "Metrics are at /metrics on the port of REST, as in TGI."),
    _ignored("shard-uds-path", "PATH", "Workers' sockets are in a new folder each time."),
    _ignored("master-addr", "ADDRESS", "Ranks meet by themselves."),
    _ignored("master-port", "PORT", "Likewise."),
    _refused(
        "trust-remote-code", "",
        "code from the hub is never run: take an engine that knows the model by itself",
    ),
    _refused("rope-scaling", "KIND", _ROPE, choices=("linear", "dynamic")),
    _refused("rope-factor", "FACTOR", _ROPE),
    _refused(
        "weights-cache-override", "FOLDER",
        "weights and tokenizer come from one place: give the folder as --model-id",
    ),
    _refused("ngrok", "", _NGROK),
    _refused("ngrok-authtoken", "TOKEN", _NGROK),
    _refused("ngrok-edge", "EDGE", _NGROK),
)  # fmt: skip
BY_KEY = {flag.key: flag for flag in FLAGS}

# Variables that TGI reads and that have no flag; all of them only tune.
IGNORED_VARIABLES = (
    *("ATTENTION", "PREFIX_CACHING", "PREFILL_CHUNKING", "USE_FLASH_ATTENTION", "TGI_WIGGLE_ROOM"),
    *("EXLLAMA_VERSION", "REQUEST_LOGPROBS", "LOG_COLORIZE", "MAX_IMAGE_FETCH_SIZE"),
    "COMPUTE_TYPE",
)
