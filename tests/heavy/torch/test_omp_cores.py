"""Where compute threads may run: each on a core of its own while there are as many as cores."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shards.engines import omp_cores
from shards.engines.base import Admit, Plan, SamplingParams
from shards.engines.omp_cores import Cores
from shards.engines.threads import Choice, ThreadControl
from shards.engines.torch_engine import TorchEngine
from tests.heavy.models import tiny_llama_folder
from tests.heavy.torch.made import make

CORES = sorted(os.sched_getaffinity(0))
ALL = set(CORES)
several = pytest.mark.skipif(len(CORES) < 2, reason="one core, which all threads share")


@pytest.fixture(autouse=True)
def unbound(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As many threads as cores, none of which stays bound behind a test."""
    for name in omp_cores._DECIDED:
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    yield
    for task in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(task.name), ALL)
    torch.set_num_threads(before)


def where() -> list[set[int]]:
    """Where each of this thread's compute threads may run, in the order of their numbers."""
    library = omp_cores._library()
    assert library is not None
    seen: dict[int, set[int]] = {}
    omp_cores._in_each(library, len(CORES), lambda n: seen.update({n: os.sched_getaffinity(0)}))
    return [seen[number] for number in range(len(CORES))]


def steps(engine: TorchEngine, count: int) -> None:
    engine.step(Plan(admits=(Admit(1, [5, 6, 7], 3, SamplingParams()),), work=((1, 3),)))
    for _ in range(count - 1):
        engine.step(Plan(work=((1, 1),)))
    engine.step(Plan(drops=(1,)))


@several
def test_each_thread_has_a_core_and_all_have_all_again() -> None:
    cores = Cores()
    cores.follow(len(CORES))
    assert where() == [{core} for core in CORES]
    cores.follow(len(CORES) - 1)
    assert where() == [ALL] * len(CORES)


@several
def test_a_choice_of_the_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_PROC_BIND", "false")
    Cores().follow(len(CORES))
    assert where() == [ALL] * len(CORES)


@several
def test_an_engine_computes_bound_while_it_has_every_core(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(tiny_llama_folder(), threads=len(CORES))
    steps(engine, 2)
    assert where() == [{core} for core in CORES]
    fewer = ThreadControl(len(CORES))
    fewer._choice = Choice(len(CORES) - 1)  # as beside a busy program
    monkeypatch.setattr(engine, "_control", fewer)
    steps(engine, 2)
    assert where() == [ALL] * len(CORES)
    engine.close()


@several
def test_an_engine_that_ends_lets_go_of_the_threads() -> None:
    engine = make(tiny_llama_folder(), threads=len(CORES))
    steps(engine, 2)
    engine.close()
    assert where() == [ALL] * len(CORES)


@several
def test_threads_that_loading_starts_are_not_bound() -> None:
    engine = make(tiny_llama_folder(), threads=len(CORES))
    assert where() == [ALL] * len(CORES)
    engine.close()


def test_without_one_openmp_nothing_is_bound(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    maps = tmp_path / "maps"
    maps.write_text("7f r-xp 0 08:01 1 /usr/lib/libm.so.6\n7f r-xp 0 08:01 2 [heap]\n")
    monkeypatch.setattr(omp_cores, "_MAPS", maps)
    cores = Cores()
    cores.follow(len(CORES))
    assert cores._library is None
