"""The options that set a router: TGI's names, what each does, and the field of ``Settings``.

They take their defaults from there, and are not judged here: a value that does not parse is passed
on as it is, so that all faults come back together.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from router.config import Settings
from router.identities import check_files

LISTEN, ENCRYPTION, LIMITS, MARK, BATCH, FAILURES, OUTPUT = (
    "Listening",
    "Encryption",
    "Limits of a request",
    "Watermarks",
    "Limits of a batch",
    "Failures",
    "Output",
)


@dataclass(frozen=True, slots=True)
class Knob:
    """One option: where help shows it, its name, the field of ``Settings``, and what it does."""

    section: str
    name: str
    metavar: str
    help: str
    field: str = ""
    env: str = ""
    text: bool = False  # though its setting has no default that would say so

    @property
    def setting(self) -> str:
        """The field of ``Settings`` that this option fills."""
        return self.field or self.name.replace("-", "_")

    @property
    def envvar(self) -> str:
        """The environment variable: the name in capitals, as TGI has it."""
        return self.env or self.name.upper().replace("-", "_")


KNOBS = (
    Knob(
        LISTEN,
        "hostname",
        "ADDRESS",
        "Address to listen on. (HOSTNAME itself is not read: containers set it to their name.)",
        field="host",
        env="ROUNDHOUSE_HOSTNAME",
    ),
    Knob(LISTEN, "port", "PORT", "Port of REST; 0 takes a free one."),
    Knob(LISTEN, "grpc-port", "PORT", "Port of gRPC; 0 takes a free one."),
    Knob(LISTEN, "api-key", "KEY", "Bearer token that clients must send. None: open.", text=True),
    Knob(LISTEN, "cors-allow-origin", "ORIGIN", "Origin that browsers may call from; repeatable."),
    Knob(LISTEN, "payload-limit", "BYTES", "Largest request body."),
    Knob(
        ENCRYPTION,
        "tls-cert",
        "FILE",
        "Certificate of the public ports, which speak TLS then. Replaced files are used at once.",
        text=True,
    ),
    Knob(ENCRYPTION, "tls-key", "FILE", "Its private key.", text=True),
    Knob(
        ENCRYPTION,
        "tls-client-ca",
        "FILE",
        "CA that signs the certificates of clients, who must show one then.",
        text=True,
    ),
    Knob(
        ENCRYPTION,
        "cluster-ca",
        "FILE",
        "CA of the cluster: router, workers and gateways on other machines believe its "
        "certificates, and nobody else.",
        text=True,
    ),
    Knob(ENCRYPTION, "cluster-cert", "FILE", "Certificate of this process by that CA.", text=True),
    Knob(ENCRYPTION, "cluster-key", "FILE", "Its private key.", text=True),
    Knob(
        ENCRYPTION,
        "cluster-port",
        "PORT",
        "Port of gRPC for gateways with a certificate of the cluster. Default: none.",
        # Kubernetes sets CLUSTER_PORT beside a service that is called "cluster".
        env="ROUNDHOUSE_CLUSTER_PORT",
    ),
    Knob(LIMITS, "max-concurrent-requests", "N", "Requests open at once; one more gets a 429."),
    Knob(LIMITS, "max-input-tokens", "TOKENS", "Longest prompt. Default: max-total-tokens - 1."),
    Knob(LIMITS, "max-total-tokens", "TOKENS", "Prompt and answer. Default: what the model holds."),
    Knob(LIMITS, "max-best-of", "N", "Largest best_of; each candidate counts as a request."),
    Knob(LIMITS, "max-stop-sequences", "N", "Stop strings in one request."),
    Knob(LIMITS, "max-top-n-tokens", "N", "Alternatives reported at each token."),
    Knob(LIMITS, "max-client-batch-size", "N", "Prompts in one call of /v1/completions."),
    Knob(LIMITS, "disable-grammar-support", "", "Refuse structured output: grammars and schemas."),
    Knob(MARK, "watermark-gamma", "SHARE", "Share of the vocabulary that is favoured at a token."),
    Knob(MARK, "watermark-delta", "DELTA", "Added to its logits; more is easier to detect."),
    Knob(MARK, "watermark-key", "KEY", "Which of all marks it is; who knows it can detect it."),
    Knob(
        BATCH,
        "max-batch-prefill-tokens",
        "TOKENS",
        "Tokens computed in one step. Long prompts are computed in chunks of at most this.",
    ),
    Knob(
        BATCH,
        "max-batch-total-tokens",
        "TOKENS",
        "Tokens held in memory over all requests. Default: what the worker's cache holds.",
    ),
    Knob(BATCH, "max-batch-size", "N", "Requests computed at once. Default: what the worker can."),
    Knob(BATCH, "waiting-served-ratio", "RATIO", "Accepted, no effect: prompts go in chunks here."),
    Knob(BATCH, "max-waiting-tokens", "TOKENS", "Accepted, no effect, for the same reason."),
    Knob(
        FAILURES,
        "request-deadline",
        "SECONDS",
        "Longest time for an answer, waiting included. Default: no limit.",
        field="request_deadline_s",
    ),
    Knob(
        FAILURES,
        "step-deadline",
        "SECONDS",
        "A worker silent for so long is given up and reconnected.",
        field="step_deadline_s",
    ),
    Knob(
        FAILURES,
        "attempts-max",
        "N",
        "Starts of one request when workers are lost in a row; anew once it has gained 16 tokens.",
    ),
    Knob(
        FAILURES,
        "resume-streams",
        "",
        "Continue an answer that the client has seen a part of when its worker is lost, or end it.",
    ),
    Knob(
        FAILURES,
        "resume-timeout",
        "SECONDS",
        "How long such an answer waits for a worker while there is none, and what only a lost "
        "worker can do for that one.",
        field="resume_timeout_s",
    ),
    Knob(
        FAILURES,
        "graceful-termination-timeout",
        "SECONDS",
        "Time for running answers to end after SIGTERM or Ctrl-C; a second one ends at once.",
        field="graceful_termination_timeout_s",
    ),
    Knob(
        OUTPUT,
        "otlp-endpoint",
        "URL",
        "Collector that gets traces, as http://HOST:4317; OpenTelemetry's variables hold, too.",
        text=True,
    ),
    Knob(OUTPUT, "otlp-service-name", "NAME", "What this process is called there.", text=True),
    Knob(OUTPUT, "json-output", "", "Log lines, and the ready line, as JSON objects."),
    Knob(OUTPUT, "log-level", "LEVEL", "debug, info, warning or error."),
)
DEFAULTS: Mapping[str, object] = {
    field.name: None if field.default is MISSING else field.default for field in fields(Settings)
}


def number(text: str | float) -> int | float | str:
    """A whole or real number; anything else is left for ``Settings`` to judge.

    A number, as the default of an option is one, stays as it is: 0.5 would be cut to 0.
    """
    if not isinstance(text, str):
        return text
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def settings_from(values: Mapping[str, Any]) -> Settings:
    """Makes the settings of parsed options; those that a command lacks have their defaults.

    Raises ``ConfigError`` with every fault, of files that they name, too.
    """
    chosen = {knob.setting: values[knob.setting] for knob in KNOBS if knob.setting in values}
    chosen["cors_allow_origin"] = tuple(
        origin for text in chosen["cors_allow_origin"] for origin in text.split(",") if origin
    )
    settings = Settings(**chosen)
    check_files(settings)
    return settings
