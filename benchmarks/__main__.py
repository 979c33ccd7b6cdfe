"""``python -m benchmarks``: measures, prints a table, and ends with one line of JSON."""

import argparse
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from time import monotonic

from benchmarks import report, vllm_scenarios
from benchmarks.bare import bare
from benchmarks.baseline import tune
from benchmarks.constrained_scenario import constrained
from benchmarks.engine_scenarios import contended, decode, shared_prefix
from benchmarks.gateway_scenario import gateways
from benchmarks.jobs import LoadError, raise_file_limit
from benchmarks.llama_server import BuildError
from benchmarks.loads import say
from benchmarks.processes import StartError, wait_calm
from benchmarks.router_scenarios import cpu_per_token, streams_1000, ttft_overhead
from benchmarks.rows import Row
from benchmarks.sampling_scenario import sampling
from benchmarks.selfcheck import selfcheck
from benchmarks.tuned_scenario import tuned

SCENARIOS: dict[str, Callable[[bool], list[Row]]] = {
    "selfcheck": selfcheck,
    "ttft_overhead": ttft_overhead,
    "cpu_per_token": cpu_per_token,
    "streams_1000": streams_1000,
    "gateway": gateways,
    "decode_c1": partial(decode, 1),
    "decode_c8": partial(decode, 8),
    "decode_c32": partial(decode, 32),
    "shared_prefix": shared_prefix,
    "contended": contended,
    "constrained": constrained,
    "sampling": sampling,
    "bare": bare,
}
# A scenario starts when other programs leave the machine alone, or after waiting so long.
CALM_CORES, CALM_WAIT_S = 0.2, 30.0
EXTRA: dict[str, Callable[[bool], list[Row]]] = {
    "tune": tune,
    "vllm_c8": partial(vllm_scenarios.decode, 8),
    "vllm_c32": partial(vllm_scenarios.decode, 32),
    "vllm_prefix": vllm_scenarios.shared_prefix,
    "tuned_c32": partial(tuned, 32),
}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=f"Measures Roundhouse; without a name, all but {', '.join(EXTRA)}.",
        epilog="Progress goes to stderr. The last line of stdout is one JSON object.",
    )
    names = [*SCENARIOS, *EXTRA]
    parser.add_argument("scenario", nargs="*", help=f"any of: {', '.join(names)}")
    parser.add_argument("--quick", action="store_true", help="fewer rounds; numbers are rough")
    parser.add_argument("--record", action="store_true", help="add the result to RESULTS.md")
    given = parser.parse_args()
    if unknown := set(given.scenario) - set(names):
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}; there are {names}")
    return given


def measure(name: str, quick: bool) -> tuple[list[Row], bool]:
    """Runs one scenario; what goes wrong becomes a row. Says whether it went well."""
    say(f"{name} ...")
    busy = wait_calm(CALM_CORES, CALM_WAIT_S)
    if busy >= CALM_CORES:
        say(f"  warning: others keep {busy:.1f} cores busy; the numbers will not mean much")
    began = monotonic()
    try:
        rows, well = (SCENARIOS | EXTRA)[name](quick), True
    except (LoadError, StartError, BuildError, subprocess.TimeoutExpired) as error:
        say(f"  failed: {error}")
        note = " ".join(str(error).split())[:300]
        rows, well = [Row(name, f"{name} failed", 0.0, None, None, None, False, note=note)], False
    say(f"  {monotonic() - began:.0f} s")
    if busy >= CALM_CORES:
        noise = f"others kept {busy:.1f} cores busy at the start"
        rows = [replace(row, note="; ".join(filter(None, (row.note, noise)))) for row in rows]
    return rows, well


def main() -> int:
    """Returns the exit status: 1 if a scenario could not be run. A bar missed is no failure."""
    given = arguments()
    # Leaves through every "with", which ends what was started.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    raise_file_limit()
    names = given.scenario or list(SCENARIOS)
    rows: list[Row] = []
    well = True
    for name in names:
        more, went_well = measure(name, given.quick)
        rows += more
        well = well and went_well
    command = " ".join(["python -m benchmarks", *sys.argv[1:]])
    print(report.table(rows))
    if report.plot(rows, report.PLOT):
        say(f"plot: {report.PLOT}")
    if given.record:
        report.record(rows, command)
    print(report.closing_line(rows, command), flush=True)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
