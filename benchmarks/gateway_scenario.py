"""What a gateway process costs and spares: REST before the router beside REST in it."""

from collections.abc import Sequence
from contextlib import ExitStack
from statistics import median

from benchmarks.jobs import percentile
from benchmarks.loads import say
from benchmarks.processes import cpu_seconds, free_port
from benchmarks.router_scenarios import (
    CPU_STEP_MS,
    CPU_STREAMS,
    CPU_TOKENS,
    TTFT_REQUESTS,
    TTFT_STEP_MS,
    TTFT_TEXT,
    TTFT_THINK_S,
    TTFT_TOKENS,
    stream,
)
from benchmarks.rows import Row
from benchmarks.systems import System, completion, gateway, roundhouse, scripted

ADDED_BAR_MS = 1.0
ROUNDS = 4
GATEWAYS = (1, 2)
"""How many share the port while the router's CPU is read."""


def gateways(quick: bool) -> list[Row]:
    """Added time to the first token, and the CPU of a token in each process."""
    return [first_token(quick), *cpu(quick)]


def first_token(quick: bool) -> Row:
    """REST by a gateway beside REST by its router, one request at a time, in turns."""
    requests = TTFT_REQUESTS // 4 if quick else TTFT_REQUESTS
    seen: dict[str, list[float]] = {"router": [], "gateway": []}
    with ExitStack() as stack:
        router = stack.enter_context(roundhouse(*scripted(step_ms=TTFT_STEP_MS)))
        before = stack.enter_context(gateway(router, free_port()))
        for number in range(ROUNDS):
            bodies = [
                completion(TTFT_TEXT.format(number * requests + index), TTFT_TOKENS)
                for index in range(requests)
            ]
            # Who goes second finds prompts that are resident already, so they take turns at that.
            pair = (("router", router), ("gateway", before))
            for name, system in pair if number % 2 else pair[::-1]:
                load = system.load(bodies, 1, TTFT_TOKENS, think_s=TTFT_THINK_S)
                seen[name] += load.raise_errors().first_s
    middle = {name: percentile(times, 50) * 1e3 for name, times in seen.items()}
    tail = {name: percentile(times, 99) * 1e3 for name, times in seen.items()}
    note = (
        f"gateway {middle['gateway']:.2f} ms, router {middle['router']:.2f} ms, step "
        f"{TTFT_STEP_MS:g} ms; p99 adds {tail['gateway'] - tail['router']:.2f} ms"
    )
    what = "added time to first token by a gateway process, c=1, p50"
    added = middle["gateway"] - middle["router"]
    return Row.at_most("gateway", what, added, ADDED_BAR_MS, unit="ms", note=note)


def cpu(quick: bool) -> list[Row]:
    """CPU of a token in the router, without gateways and with some, and in the gateways."""
    rows = []
    runs = 1 if quick else 3
    with ExitStack() as stack:
        router = stack.enter_context(roundhouse(*scripted(step_ms=CPU_STEP_MS)))
        own, _ = cost(router, router, [], runs)
        port = free_port()
        before: list[System] = []
        for number in GATEWAYS:
            while len(before) < number:
                before.append(stack.enter_context(gateway(router, port)))
            spent, outside = cost(router, before[0], before, runs)
            plural = "s" if number > 1 else ""
            what = f"router CPU per token, {CPU_STREAMS} REST streams by {number} gateway{plural}"
            note = (
                f"{own:.1f} µs where the router serves them; in the gateways {outside:.1f} µs; "
                f"a step of {CPU_STEP_MS:g} ms"
            )
            rows.append(Row.fact("gateway", what, spent, unit="µs", note=note))
    return rows


def cost(router: System, front: System, before: Sequence[System], runs: int) -> tuple[float, float]:
    """Microseconds of CPU for a token in the router, and in all gateways; median of the runs."""
    inside, outside = [], []
    for number in range(runs):
        began = cpu_seconds(router.pid), sum(cpu_seconds(one.pid) for one in before)
        seen = stream(front, "REST", 2 * CPU_STREAMS, CPU_STREAMS, CPU_TOKENS, number)
        inside.append((cpu_seconds(router.pid) - began[0]) / seen.tokens * 1e6)
        spent = sum(cpu_seconds(one.pid) for one in before) - began[1]
        outside.append(spent / seen.tokens * 1e6)
        say(f"  {len(before)} gateways: {inside[-1]:.1f} µs inside, {outside[-1]:.1f} µs outside")
    return median(inside), median(outside)
