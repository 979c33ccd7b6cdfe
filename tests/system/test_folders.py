"""Folders of a run: gone at its end, and, if it was killed, when the next one begins."""

import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deploy.folders import folder_for_run
from tests.system.server import serving

HOLDER = """
import sys
from deploy.folders import folder_for_run
with folder_for_run(sys.argv[1]) as folder:
    (folder / "a.sock").touch()
    print(folder, flush=True)
    sys.stdin.read()
"""


@contextmanager
def held(place: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that has a folder until its input ends."""
    command = [sys.executable, "-c", HOLDER, str(place)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())


def test_it_is_ones_own_and_gone_at_the_end(tmp_path: Path) -> None:
    with folder_for_run(str(tmp_path)) as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "a.sock").touch()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_removed_by_the_next_and_nobody_elses(tmp_path: Path) -> None:
    with held(tmp_path) as (living, its), held(tmp_path) as (killed, left):
        killed.kill()
        killed.wait()
        assert left.exists()
        with folder_for_run(str(tmp_path)) as mine:
            assert sorted(tmp_path.iterdir()) == sorted((its, mine))
            with folder_for_run(str(tmp_path)):  # one process may have several
                assert mine.exists()
        living.communicate("")
    assert not list(tmp_path.iterdir())


def test_what_only_looks_alike_stays(tmp_path: Path) -> None:
    (tmp_path / "roundhouse-1000").mkdir()
    (tmp_path / "roundhouse-file.run").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "roundhouse-link.run").symlink_to(tmp_path / "elsewhere")
    before = sorted(tmp_path.iterdir())
    with folder_for_run(str(tmp_path)):
        pass
    assert sorted(tmp_path.iterdir()) == before


def test_another_users_folder_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = tmp_path / "roundhouse-theirs.run"
    theirs.mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: theirs.stat().st_uid + 1)
    with folder_for_run(str(tmp_path)):
        assert theirs.exists()


@pytest.mark.parametrize("again", [False, True])
def test_one_that_is_taken_away_before_it_is_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    """By another process, to which it looked stale. ``again``: after it was opened."""
    make, lock, taken = tempfile.mkdtemp, os.open, list[str]()

    def made(*arguments: str) -> str:
        path = make(*arguments)
        if not taken and not again:
            Path(path).rmdir()
        taken.append(path)
        return path

    def opened(path: Path, flags: int) -> int:
        number = lock(path, flags)
        if again and len(taken) == 1:
            path.rmdir()
        return number

    monkeypatch.setattr(tempfile, "mkdtemp", made)
    monkeypatch.setattr(os, "open", opened)
    with folder_for_run(str(tmp_path)) as folder:
        assert list(tmp_path.iterdir()) == [folder]
    assert len(taken) == 2


def test_a_server_that_is_killed_leaves_nothing_behind_the_next() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as short:  # where sockets have room for a name
        place = Path(short)
        with serving(place, "--engine", "scripted") as server:
            server.signal(signal.SIGKILL)
            server.wait()
            (left,) = place.glob("roundhouse-*.run")
        with serving(place, "--engine", "scripted"):
            assert not left.exists()
        assert not list(place.glob("roundhouse-*.run"))
