"""The units before ``systemd-analyze``, which is in Debian's ``systemd``."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.operations.test_units import ALL, INSTANCE, UNITS

# Tenths of what systemd-analyze calls exposure: 0 to 10, where below 2.5 nothing is remarked on.
EXPOSURE_MAX = 25


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units, with a program that is there."""
    program = Path(sys.executable).with_name("roundhouse")
    assert program.exists()
    for name in ALL:
        text = (UNITS / name).read_text().replace("/opt/roundhouse/bin/roundhouse", str(program))
        (tmp_path / name).write_text(text)
    return tmp_path


def analyze(units: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    found = shutil.which("systemd-analyze")
    assert found, "systemd-analyze is missing: apt-get install systemd"
    env = os.environ | {"SYSTEMD_UNIT_PATH": f"{units}:"}
    return subprocess.run([found, *arguments], env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ALL)
def test_systemd_has_nothing_to_remark(units: Path, name: str) -> None:
    instance = name.replace("@", f"@{INSTANCE}")
    seen = analyze(units, "verify", "--man=no", instance)
    assert (seen.returncode, seen.stderr) == (0, "")
    limit = f"--threshold={EXPOSURE_MAX}"
    seen = analyze(units, "security", "--offline=true", limit, instance)
    assert seen.returncode == 0, seen.stdout[-200:]


def test_a_key_that_does_not_exist_is_noticed(units: Path) -> None:
    path = units / "roundhouse.service"
    path.write_text(path.read_text().replace("KillMode=", "KillWay="))
    assert "Unknown key" in analyze(units, "verify", "--man=no", path.name).stderr
