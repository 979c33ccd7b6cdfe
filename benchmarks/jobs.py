"""What a load generator is asked to do and what it saw.

Generators run in their own processes: a ``Job`` goes in as JSON on stdin, a ``Seen`` comes back as
JSON on stdout. Times are in seconds.
"""

import json
import resource
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import quantiles

FILES_WANTED = 8192


@dataclass(frozen=True, slots=True)
class Job:
    """A closed loop: ``clients`` streams at once, until every request has been answered.

    ``bodies`` are JSON texts for HTTP, and serialised messages in hexadecimal for gRPC. Each answer
    must have exactly ``tokens`` tokens by the server's own count. ``think_s`` is how long a client
    pauses after each answer, in seconds. ``streams_per_connection`` is for gRPC only.
    """

    port: int
    path: str
    bodies: list[str]
    clients: int
    tokens: int
    host: str = "127.0.0.1"
    deadline_s: float = 300.0
    think_s: float = 0.0
    streams_per_connection: int = 8


@dataclass(frozen=True, slots=True)
class Seen:
    """One run. Latencies are lists over all requests; gaps are between arrivals of one stream.

    ``wall_s`` runs from the first request's departure to the last answer's end, ``cpu_s`` is what
    the generator itself used in that time. ``events`` counts messages that carried tokens.
    """

    wall_s: float
    cpu_s: float
    tokens: int
    events: int
    requests: int
    first_s: list[float]
    total_s: list[float]
    gaps_s: list[float]
    cached_tokens: int = 0
    errors: list[str] = field(default_factory=list)
    error_count: int = 0

    @property
    def rate(self) -> float:
        """Tokens per second over all streams."""
        return self.tokens / self.wall_s if self.wall_s else 0.0

    @property
    def generator_us(self) -> float:
        """CPU of the generator, in microseconds per token."""
        return self.cpu_s / self.tokens * 1e6 if self.tokens else 0.0

    def raise_errors(self) -> "Seen":
        """Returns self. Raises ``LoadError`` with the first errors if a request failed."""
        if self.error_count:
            some = "; ".join(self.errors)
            raise LoadError(f"{self.error_count} of {self.requests} requests failed: {some}")
        return self


class LoadError(Exception):
    """The run is not valid: a request failed, or the generator did."""


def percentile(values: list[float], percent: int) -> float:
    """The value below which ``percent`` of the values lie; 0 if there are none."""
    if len(values) < 2:
        return values[0] if values else 0.0
    return quantiles(values, n=100, method="inclusive")[percent - 1]


def run_job(module: str, job: Job) -> Seen:
    """Runs ``benchmarks.<module>`` as a generator process. Raises ``LoadError``."""
    command = [sys.executable, "-m", f"benchmarks.{module}"]
    done = subprocess.run(  # which ends the process when this one is told to leave
        command,
        input=json.dumps(asdict(job)),
        capture_output=True,
        text=True,
        timeout=job.deadline_s + 60,
        check=False,
    )
    if done.returncode != 0:
        raise LoadError(f"{' '.join(command)} failed: {done.stderr.strip()[-2000:]}")
    return Seen(**json.loads(done.stdout))


def raise_file_limit() -> None:
    """Lets this process and its children open enough sockets for 1,000 streams and more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES_WANTED if hard == resource.RLIM_INFINITY else min(FILES_WANTED, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def read_job() -> Job:
    """The job on stdin."""
    fields: Mapping[str, object] = json.load(sys.stdin)
    return Job(**fields)  # type: ignore[arg-type]


def write_seen(seen: Seen) -> None:
    """Writes the result to stdout."""
    json.dump(asdict(seen), sys.stdout)
