"""``python -m tests.sim``: simulates many worlds, hunts mutants, or replays one world."""

import argparse
import os
import subprocess
import sys
import time
from collections import Counter

from tests.sim.coverage import missing
from tests.sim.mutants import MUTANTS
from tests.sim.mutation import hunt
from tests.sim.simulation import Simulation

TRACED = 50
TWINS = 20
MUTANT_SEEDS = 1500
COVERED = 1000


def main() -> int:
    """Does what the command line says; 0 if the core has done no wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, metavar="N", help="worlds to simulate")
    parser.add_argument("--start", type=int, default=0, metavar="S", help="first seed")
    parser.add_argument("--mutants", action="store_true", help="check that damages are noticed")
    parser.add_argument("--replay", type=int, metavar="SEED", help="print one world's events")
    parser.add_argument("--digests", action="store_true", help="print a hash of each world's trace")
    options = parser.parse_args()
    seeds = range(options.start, options.start + options.seeds)
    if options.replay is not None:
        return 0 if simulate(options.replay, Counter(), keep=None) else 1
    if options.digests:
        print(digests(seeds))
        return 0
    sound = simulate_all(seeds) and twins(seeds[:TWINS])
    if options.mutants:
        # On a core that fails by itself every mutant would count as caught.
        sound = sound and hunt_all()
    return 0 if sound else 1


def simulate_all(seeds: range) -> bool:
    """Simulates the worlds; prints a line for each hundred, and stops at the first that fails."""
    seen: Counter[str] = Counter()
    began_s = time.perf_counter()
    for done, seed in enumerate(seeds, start=1):
        if not simulate(seed, seen):
            return False
        if done % 100 == 0:
            took_s = time.perf_counter() - began_s
            print(f"{done} worlds, {seen['events']} events, {took_s:.1f} s", flush=True)
    width = max(map(len, seen), default=0)
    print("\n".join(f"  {kind:{width}} {count}" for kind, count in sorted(seen.items())))
    blind = missing(seen) if len(seeds) >= COVERED else []
    if blind:
        print(f"these never happened: {', '.join(blind)}")
    return not blind


def simulate(seed: int, seen: Counter[str], keep: int | None = TRACED) -> bool:
    """Simulates a world; if it fails, or if all is to be kept, prints the last events."""
    simulation = Simulation(seed, keep=keep)
    try:
        simulation.run()
    except Exception as error:  # noqa: BLE001 - whatever is raised is a finding
        fault = f"{type(error).__name__}: {error}"
    else:
        fault = ""
    seen.update(simulation.seen)
    seen["events"] += simulation.events
    if fault or keep is None:
        print(simulation.world)
        for at_ms, what in simulation.trace:
            print(f"{at_ms:6} ms  {what}")
    if fault:
        print(f"seed {seed}: {fault}\nreplay: make replay SEED={seed}")
    return not fault


def digests(seeds: range) -> str:
    """A hash of the trace of each world."""
    found = []
    for seed in seeds:
        simulation = Simulation(seed)
        simulation.run()
        found.append(f"{simulation.digest:08x}")
    return " ".join(found)


def twins(seeds: range) -> bool:
    """Whether the worlds go the same way again, and in processes that hash differently."""
    command = [sys.executable, "-m", "tests.sim", "--digests"]
    command += ["--start", str(seeds.start), "--seeds", str(len(seeds))]
    expected = digests(seeds)
    for hash_seed in ("1", "2"):
        again = subprocess.run(
            command,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        if again != expected:
            print("the same seed went two ways")
            return False
    print(f"{len(seeds)} worlds went the same way in three processes")
    return True


def hunt_all() -> bool:
    """Checks that each mutant is caught; prints the seed that showed it."""
    began_s = time.perf_counter()
    missed = 0
    for mutant in MUTANTS:
        caught = hunt(mutant, range(MUTANT_SEEDS))
        missed += caught is None
        how = "NOT CAUGHT" if caught is None else f"seed {caught[0]}: {caught[1]}"
        print(f"  {mutant.file}: {mutant.why} - {how}", flush=True)
    took_s = time.perf_counter() - began_s
    print(f"{len(MUTANTS) - missed} of {len(MUTANTS)} mutants caught, {took_s:.1f} s")
    return missed == 0


if __name__ == "__main__":
    sys.exit(main())
