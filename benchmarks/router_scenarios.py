"""Scenarios on the scripted engine: what the router itself costs."""

import json
import subprocess
from contextlib import ExitStack
from statistics import median

from benchmarks import direct, prompts
from benchmarks.jobs import LoadError, Seen, percentile
from benchmarks.loads import say
from benchmarks.processes import cpu_seconds, free_port
from benchmarks.rows import Row
from benchmarks.systems import System, completion, grpc_request, roundhouse, scripted, worker

# ttft_overhead: step time and pause in milliseconds. The pause lets the engine's clock start anew.
TTFT_STEP_MS, TTFT_THINK_S, TTFT_TOKENS, TTFT_REQUESTS, TTFT_BAR_MS = 5.0, 0.02, 4, 100, 2.0
TTFT_ROUNDS = 3
TTFT_TEXT = "The quick brown fox jumps over the lazy dog, and number {} looks on in wonder."
TTFT_PROMPT = 32
CPU_STREAMS, CPU_TOKENS, CPU_STEP_MS = 64, 400, 10.0
CPU_BARS_US = {"REST": 25.0, "gRPC": 15.0}
# streams_1000: as fast as it goes, so that no pace hides a cost that grows with the streams.
MANY, FEW, MANY_REQUESTS, MANY_TOKENS, MANY_BAR = 1000, 50, 2000, 64, 0.85
PROMPT = 32


def ttft_overhead(quick: bool) -> list[Row]:
    """Time to the first token over REST, above that of a client of the worker; c=1."""
    requests = TTFT_REQUESTS // 4 if quick else TTFT_REQUESTS
    address = f"127.0.0.1:{free_port()}"
    rest: list[float] = []
    floor: list[float] = []
    with ExitStack() as stack:
        stack.enter_context(worker(address, step_ms=TTFT_STEP_MS))
        system = stack.enter_context(roundhouse(*scripted(step_ms=TTFT_STEP_MS)))
        for number in range(TTFT_ROUNDS):
            names = [number * requests + index for index in range(requests)]
            floor += worker_first_s(address, requests)
            bodies = [completion(TTFT_TEXT.format(name), TTFT_TOKENS) for name in names]
            seen = system.load(bodies, 1, TTFT_TOKENS, think_s=TTFT_THINK_S).raise_errors()
            rest += seen.first_s
    added = {
        percent: percentile(rest, percent) - percentile(floor, percent) for percent in (50, 99)
    }
    note = (
        f"REST {percentile(rest, 50) * 1e3:.2f} ms, worker directly "
        f"{percentile(floor, 50) * 1e3:.2f} ms, step {TTFT_STEP_MS:g} ms; p99 adds "
        f"{added[99] * 1e3:.2f} ms"
    )
    what = "added time to first token, REST, c=1, p50"
    return [Row.at_most("ttft_overhead", what, added[50] * 1e3, TTFT_BAR_MS, unit="ms", note=note)]


def worker_first_s(address: str, requests: int) -> list[float]:
    """First-token times of a client that speaks to the worker. Raises ``LoadError``."""
    asked = prompts.scripted(requests, TTFT_PROMPT, 0)
    job = direct.Direct(address, asked, TTFT_TOKENS, TTFT_THINK_S)
    done = subprocess.run(
        direct.command(),
        input=direct.encode(job),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode != 0:
        raise LoadError(f"the client of the worker failed: {done.stderr[-2000:]}")
    times: list[float] = json.loads(done.stdout)
    return times


def cpu_per_token(quick: bool) -> list[Row]:
    """CPU of the router's process for each streamed token, paced and as fast as it goes."""
    rows = []
    for step_ms in (CPU_STEP_MS, 0.0):
        with roundhouse(*scripted(step_ms=step_ms)) as system:
            for face, bar in CPU_BARS_US.items():
                rows.append(cpu_row(system, face, step_ms, bar, quick))
    return rows


def cpu_row(system: System, face: str, step_ms: float, bar_us: float, quick: bool) -> Row:
    """One face at one pace: median over the runs."""
    costs, runs = [], []
    for number in range(1 if quick else 3):
        before = cpu_seconds(system.pid)
        seen = stream(system, face, 2 * CPU_STREAMS, CPU_STREAMS, CPU_TOKENS, number)
        costs.append((cpu_seconds(system.pid) - before) / seen.tokens * 1e6)
        runs.append(seen)
        say(f"  {face}, step {step_ms:g} ms: {costs[-1]:.1f} µs, {seen.rate:,.0f} tokens/s")
    pace = f"a step of {step_ms:g} ms" if step_ms else "as fast as it goes"
    speed = median(run.rate for run in runs)
    messages = sum(run.events for run in runs) / sum(run.tokens for run in runs)
    note = f"{speed:,.0f} tokens/s, {messages:.2f} messages per token"
    what = f"router CPU per token, {face}, {CPU_STREAMS} streams, {pace}"
    return Row.at_most("cpu_per_token", what, median(costs), bar_us, unit="µs", note=note)


def stream(system: System, face: str, requests: int, clients: int, tokens: int, seed: int) -> Seen:
    """A closed loop over one of the faces. Raises ``LoadError`` if any request fails."""
    asked = prompts.scripted(requests, PROMPT, seed)
    if face == "gRPC":
        bodies = [grpc_request(prompt, tokens) for prompt in asked]
        return system.load_grpc(bodies, clients, tokens).raise_errors()
    bodies = [completion(prompt, tokens) for prompt in asked]
    return system.load(bodies, clients, tokens).raise_errors()


def streams_1000(quick: bool) -> list[Row]:
    """Tokens/s with 1,000 streams open at once beside 50; the same requests, no error allowed."""
    requests = MANY if quick else MANY_REQUESTS
    rows = []
    with roundhouse(*scripted()) as system:
        for face, bar in (("REST", MANY_BAR), ("gRPC", None)):
            rates: dict[int, list[float]] = {FEW: [], MANY: []}
            for number in range(1 if quick else 3):
                for clients, seen in rates.items():
                    one = stream(system, face, requests, clients, MANY_TOKENS, number)
                    say(f"  {face}, {clients} streams: {one.rate:,.0f} tokens/s")
                    seen.append(one.rate)
            what = f"{face}: tokens/s at {MANY} streams / at {FEW}, no errors, step 0 ms"
            many, few = median(rates[MANY]), median(rates[FEW])
            rows.append(Row.against("streams_1000", what, many, few, bar))
    return rows
