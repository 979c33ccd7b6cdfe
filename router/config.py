"""Every limit and setting of the router, with the names that TGI's users know.

``Settings`` is checked once, when it is made: all faults are reported together, each with the name
of the setting and its unit, in one ``ConfigError``.

Two settings of TGI are accepted and have **no effect** here: ``waiting_served_ratio`` and
``max_waiting_tokens``. They decide when TGI may interrupt running answers for a new prefill. This
router computes prompts in chunks beside the running answers, in the same step, so that nothing is
interrupted and there is nothing to decide. (TGI itself ignores both where it computes in chunks.)
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from itertools import combinations
from pathlib import Path

from tls.files import Files, cluster_files, incomplete


class ConfigError(ValueError):
    """Settings that cannot work. ``faults`` holds one line for each, all of them."""

    def __init__(self, faults: Iterable[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("; ".join(self.faults))


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """The workers that hold one replica of a model.

    ``addresses`` has one entry per rank, in any order: ``unix:///path`` or ``host:port``. ``model``
    is the name that clients use; None means: as the workers call it.
    """

    name: str
    model: str | None
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Settings:
    """What the router allows and where it listens. None means: as the workers' limits allow."""

    # Requests that may be open at once, waiting ones included. One more is answered "overloaded".
    max_concurrent_requests: int = 128
    # The largest best_of of a request; each candidate counts as a request of its own.
    max_best_of: int = 2
    # Stop strings in one request.
    max_stop_sequences: int = 4
    # The most likely alternatives that a request may ask for at each token.
    max_top_n_tokens: int = 5
    # Tokens of a prompt, after truncation. None: max_total_tokens - 1.
    max_input_tokens: int | None = None
    # Tokens of prompt and answer together. None: what the model and its KV cache hold.
    max_total_tokens: int | None = None
    # Tokens that one step may compute, running answers included. In TGI it bounds a prefill; under
    # chunked prefill the two are one budget, so a long prompt is never refused for it.
    max_batch_prefill_tokens: int | None = None
    # Tokens that a group may hold resident. None: the KV cache of its workers.
    max_batch_total_tokens: int | None = None
    # Sequences that a group may run at once.
    max_batch_size: int | None = None
    # No effect: see the module.
    waiting_served_ratio: float = 0.3
    # No effect: see the module.
    max_waiting_tokens: int = 20
    # Prompts in one call of /v1/completions.
    max_client_batch_size: int = 4
    # Bytes of a request body.
    payload_limit: int = 2_000_000
    # Refuse requests whose answer must match a grammar or a schema.
    disable_grammar_support: bool = False
    # Of answers whose request asks for a watermark: the share of the vocabulary that is favoured at
    # each token, what is added to its logits, and which of all marks it is; docs/watermark.md.
    watermark_gamma: float = 0.5
    watermark_delta: float = 2.0
    watermark_key: int = 15_485_863

    # Plans that a group may hold at once: 2 keeps its device busy while an outcome travels.
    plans_in_flight_max: int = 2
    # A worker that has not answered a plan for so many seconds is given up and reconnected.
    step_deadline_s: float = 60.0
    # Seconds that an answer may take, waiting included. None: no limit but the request's own.
    request_deadline_s: float | None = None
    # Times that a request may be started, the first included, when its workers are lost in a row.
    # One that has gained tokens since its last loss, 16 at least, begins to count anew.
    attempts_max: int = 3
    # Continue an answer of which the client has seen a part when its worker is lost.
    resume_streams: bool = True
    # Seconds for which such an answer waits while no group that serves its model is up, and for
    # which requests that only a lost group can run wait for that one.
    resume_timeout_s: float = 300.0
    # Seconds that running answers may take to end after a first SIGTERM or SIGINT.
    graceful_termination_timeout_s: float = 90.0

    # Address of the REST and gRPC listeners.
    host: str = "0.0.0.0"  # noqa: S104
    # Port of REST. 0: any free one.
    port: int = 3000
    # Port of gRPC. 0: any free one.
    grpc_port: int = 50051
    # What clients must send as a bearer token. None: nothing.
    api_key: str | None = None
    # Files with the certificate and the key of both ports, and the CA that the certificates of
    # clients must come from. None: nothing is encrypted, and clients need no certificate.
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_client_ca: str | None = None
    # Files with the CA of the cluster, and with this process's own certificate and key: for what
    # is said with workers and gateways over TCP. None: that is not encrypted.
    cluster_ca: str | None = None
    cluster_cert: str | None = None
    cluster_key: str | None = None
    # Port where gateways attach by such a certificate, and nowhere else. None: there is none.
    cluster_port: int | None = None
    # Origins that browsers may call from. Empty: any.
    cors_allow_origin: tuple[str, ...] = ()
    # Where traces go, http://HOST:PORT of a collector of OpenTelemetry, and what the process is
    # called there. None: as the variables of OpenTelemetry say; without those there are no traces.
    otlp_endpoint: str | None = None
    otlp_service_name: str | None = None
    # Log lines as JSON objects.
    json_output: bool = False
    # The least severe level that is logged: debug, info, warning or error.
    log_level: str = "info"

    def __post_init__(self) -> None:
        """Raises ``ConfigError`` with every fault there is."""
        faults = _faults(self)
        if faults:
            raise ConfigError(faults)

    @property
    def tls(self) -> Files | None:
        """The files of the public ports."""
        if not self.tls_cert or not self.tls_key:
            return None
        ca = Path(self.tls_client_ca) if self.tls_client_ca else None
        return Files(Path(self.tls_cert), Path(self.tls_key), ca)

    @property
    def cluster(self) -> Files | None:
        """The files of the links to workers and gateways."""
        return cluster_files(self.cluster_ca, self.cluster_cert, self.cluster_key)


@dataclass(frozen=True, slots=True)
class _Range:
    """The whole or real numbers that a setting may take, both ends included."""

    unit: str
    low: float
    high: float = 2**31 - 1
    whole: bool = True
    optional: bool = False


_RANGES = {
    "max_concurrent_requests": _Range("requests", 1, 1_000_000),
    "max_best_of": _Range("sequences", 1, 1024),
    "max_stop_sequences": _Range("strings", 0, 1024),
    "max_top_n_tokens": _Range("tokens", 0, 1024),
    "max_input_tokens": _Range("tokens", 1, optional=True),
    "max_total_tokens": _Range("tokens", 2, optional=True),
    "max_batch_prefill_tokens": _Range("tokens", 1, optional=True),
    "max_batch_total_tokens": _Range("tokens", 2, optional=True),
    "max_batch_size": _Range("sequences", 1, optional=True),
    "waiting_served_ratio": _Range("ratio", 0, 1_000_000, whole=False),
    "max_waiting_tokens": _Range("tokens", 0),
    "max_client_batch_size": _Range("prompts", 1, 1_000_000),
    "payload_limit": _Range("bytes", 1),
    "watermark_gamma": _Range("share of the vocabulary", 0.001, 0.999, whole=False),
    "watermark_delta": _Range("added to logits", 0, 100, whole=False),
    "watermark_key": _Range("key", 0, 2**63 - 1),
    "plans_in_flight_max": _Range("plans", 1, 16),
    "step_deadline_s": _Range("seconds", 0.001, 86_400, whole=False),
    "request_deadline_s": _Range("seconds", 0.001, 31_536_000, whole=False, optional=True),
    "attempts_max": _Range("attempts", 1, 1000),
    "resume_timeout_s": _Range("seconds", 0, 86_400, whole=False),
    "graceful_termination_timeout_s": _Range("seconds", 0, 86_400, whole=False),
    "port": _Range("TCP port", 0, 65_535),
    "grpc_port": _Range("TCP port", 0, 65_535),
    "cluster_port": _Range("TCP port", 1, 65_535, optional=True),
}
_SWITCHES = ("resume_streams", "json_output", "disable_grammar_support")
_LEVELS = ("debug", "info", "warning", "error")


def _faults(settings: Settings) -> list[str]:
    """One line for each setting, or pair of settings, that cannot work."""
    given = {field.name: getattr(settings, field.name) for field in fields(settings)}
    ranges = {name: _range_fault(name, given[name], allowed) for name, allowed in _RANGES.items()}
    faults = [fault for fault in ranges.values() if fault]
    faults += [
        f"{name} must be true or false, not {given[name]!r}"
        for name in _SWITCHES
        if not isinstance(given[name], bool)
    ]
    if settings.log_level not in _LEVELS:
        faults.append(f"log_level must be one of {', '.join(_LEVELS)}, not {settings.log_level!r}")
    if not isinstance(settings.host, str) or not settings.host:
        faults.append(f"host must be an address to listen on, not {settings.host!r}")
    if settings.api_key is not None and not settings.api_key:
        faults.append("api_key must not be empty; leave it out to ask for none")
    url = settings.otlp_endpoint
    if url is not None and not re.fullmatch(r"https?://[^/\s]+(/\S*)?", url):
        faults.append(f"otlp_endpoint must be http://HOST:PORT or https://HOST:PORT, not {url!r}")
    faults += _tls_faults(settings)
    return faults + _pair_faults({name: given[name] for name in _RANGES if not ranges[name]})


def _tls_faults(settings: Settings) -> list[str]:
    """Files of which some are given and others, without which they mean nothing, are not."""
    pair = {"tls_cert": settings.tls_cert, "tls_key": settings.tls_key}
    if settings.tls_client_ca:
        pair["tls_client_ca"] = settings.tls_client_ca
    names = ("cluster_ca", "cluster_cert", "cluster_key")
    faults = [incomplete(pair), incomplete({name: getattr(settings, name) for name in names})]
    if settings.cluster_port is not None and not any(getattr(settings, name) for name in names):
        faults.append("cluster_port needs cluster_ca, cluster_cert and cluster_key")
    return list(filter(None, faults))


def _range_fault(name: str, value: object, allowed: _Range) -> str | None:
    """Says why a value is not in its range, or None."""
    if value is None and allowed.optional:
        return None
    number = isinstance(value, int if allowed.whole else int | float)
    if number and not isinstance(value, bool) and allowed.low <= value <= allowed.high:  # type: ignore[operator]
        return None  # NaN compares false
    noun = "a whole number" if allowed.whole else "a number"
    return (
        f"{name} ({allowed.unit}) must be {noun} from {allowed.low:,} to {allowed.high:,}, "
        f"not {value!r}"
    )


def _pair_faults(sound: dict[str, float | None]) -> list[str]:
    """Pairs of settings, each sound by itself, that contradict each other."""
    faults = []
    tokens_in, tokens = sound.get("max_input_tokens"), sound.get("max_total_tokens")
    if tokens_in and tokens and tokens_in >= tokens:
        faults.append(
            f"max_input_tokens ({tokens_in} tokens) must be less than max_total_tokens "
            f"({tokens} tokens): an answer needs at least one token"
        )
    held = sound.get("max_batch_total_tokens")
    if tokens and held and tokens > held:
        faults.append(
            f"max_total_tokens ({tokens} tokens) must be at most max_batch_total_tokens "
            f"({held} tokens): the longest request would never fit"
        )
    names = ("port", "grpc_port", "cluster_port")
    faults += [
        f"{one} and {other} must be two different TCP ports, not both {port}"
        for one, other in combinations(names, 2)
        if (port := sound.get(one)) and port == sound.get(other)
    ]
    return faults


def check_groups(groups: Iterable[GroupSpec]) -> tuple[GroupSpec, ...]:
    """Returns the groups if they can work together; raises ``ConfigError`` with every fault."""
    checked = tuple(groups)
    faults = [] if checked else ["at least one worker is needed"]
    names: dict[str, GroupSpec] = {}
    owners: dict[str, str] = {}
    for group in checked:
        if not group.addresses:
            faults.append(f"group {group.name} has no worker addresses")
        if names.setdefault(group.name, group) is not group:
            faults.append(f"two groups are called {group.name}")
        for address in group.addresses:
            if address in owners:
                faults.append(
                    f"worker {address} is in group {owners[address]} and again in {group.name}: "
                    "a worker serves one group"
                )
            owners[address] = group.name
            if not is_address(address):
                faults.append(f"worker {address!r} must be unix:///path or host:port")
    if faults:
        raise ConfigError(faults)
    return checked


def is_address(address: str) -> bool:
    """Tells whether this is a form of address that gRPC servers listen on."""
    if address.startswith("unix:"):
        return len(address) > len("unix:///")
    host, _, port = address.rpartition(":")
    return bool(host) and port.isdecimal() and 0 < int(port) < 65_536
