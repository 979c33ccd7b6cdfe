"""Simulated worlds with faults, and damaged cores that they must notice.

`make sim` runs more of both; `make replay SEED=n` prints a world.
"""

from collections import Counter

import pytest

from tests.sim.__main__ import digests, simulate, twins
from tests.sim.mutants import MUTANTS
from tests.sim.mutation import CORE, Mutant, damaged, damaged_core, hunt
from tests.sim.simulation import Simulation
from tests.sim.worker import Violation

WORLDS = 200
# What rarer mutants need is left to `make sim`, which gives each as many worlds as it takes.
MUTANT_WORLDS = 125
RARE = 15


@pytest.mark.parametrize("start", range(0, WORLDS, 50))
def test_worlds_with_faults_keep_all_invariants(start: int) -> None:
    for seed in range(start, start + 50):
        Simulation(seed).run()


def test_a_seed_goes_the_same_way_in_every_process() -> None:
    assert twins(range(8))
    assert len(set(digests(range(8)).split())) == 8


def test_nearly_all_mutants_are_caught_soon() -> None:
    missed = [mutant.why for mutant in MUTANTS if hunt(mutant, range(MUTANT_WORLDS)) is None]
    assert len(MUTANTS) >= 100
    assert len(missed) <= RARE, missed


@pytest.mark.parametrize("file", sorted({mutant.file for mutant in MUTANTS}))
def test_every_mutant_names_one_place(file: str) -> None:
    text = (CORE / file).read_text()
    for mutant in MUTANTS:
        if mutant.file == file:
            assert damaged(mutant, text) != text


def test_every_file_with_decisions_has_mutants() -> None:
    files = {path.name for path in CORE.glob("*.py")}
    without_decisions = {"__init__.py", "effects.py", "events.py", "snapshot.py"}
    assert {mutant.file for mutant in MUTANTS} == files - without_decisions


def test_a_mutant_that_names_no_place_is_an_error() -> None:
    lost = Mutant("ledger.py", "this is not there", "", "nothing")
    with pytest.raises(ValueError, match="occurs 0 times"):
        hunt(lost, range(1))


def test_a_mutant_leaves_the_real_core_alone() -> None:
    mutant = Mutant("waiting.py", "return member\n", "return None\n", "nobody is ever first")
    with damaged_core(mutant) as core, pytest.raises(Violation):
        Simulation(0, core).run()
    Simulation(0).run()


def test_a_failure_names_the_seed_and_shows_the_last_events(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.sim.simulation.TURNS_MAX", 20)
    assert not simulate(0, Counter())
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == "seed 0: Violation: the world does not come to an end"
    assert lines[-1] == "replay: make replay SEED=0"
    events = [line for line in lines if " ms  " in line]
    assert 20 <= len(events) <= 50
    assert any("(request=" in line for line in events)
