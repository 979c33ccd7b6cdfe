"""The recorded signatures against the packages themselves, as far as a package index has them.

``make test-contracts`` runs it: two wheels and a source distribution, 50 MB, are downloaded and
read, not installed.
"""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.engines.signatures.record import WANTED, differences, load, main, record

DOWNLOAD_S = 300
# SGLang's wheels differ by platform; the recorded one is this.
PLATFORM = (
    *("--python-version", "3.11", "--implementation", "cp", "--abi", "cp311"),
    *("--platform", "manylinux_2_34_x86_64", "--platform", "any"),
)


WHEELS = ("sglang", "optimum")
# Its wheel has 400 MB.
SDISTS = ("vllm-0.11",)


@pytest.fixture(scope="module", params=[*WHEELS, *SDISTS])
def engine(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def wheel(engine: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    facts = load(engine)
    folder = tmp_path_factory.mktemp(engine)
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), *PLATFORM]
    command += [f"{facts['package']}=={facts['version']}"]
    subprocess.run(command, check=True, timeout=DOWNLOAD_S)
    (found,) = folder.glob("*.whl")
    return found


def unpacked(engine: str, root: Path) -> Path:
    """A source distribution, whose hash pip compares before it unpacks it.

    Then pip asks for its metadata, in vain: building it starts with torch, which is not here. What
    it has unpacked stays.
    """
    facts = load(engine)
    pinned = f"{facts['package']}=={facts['version']} --hash=sha256:{facts['sdist_sha256']}"
    (root / "needs.txt").write_text(pinned)
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet"]
    command += ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--no-clean"]
    command += ["--require-hashes", "--requirement", "needs.txt", "--dest", "."]
    surroundings = {**os.environ, "TMPDIR": str(root)}
    done = subprocess.run(
        command, cwd=root, env=surroundings, capture_output=True, timeout=DOWNLOAD_S, check=False
    )
    found = list(root.glob(f"pip-download-*/{facts['package']}_*"))
    assert len(found) == 1, done.stderr.decode(errors="replace")
    return found[0]


@pytest.fixture(scope="module")
def source(
    engine: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    root = tmp_path_factory.mktemp(f"{engine}-source")
    if engine in SDISTS:
        return unpacked(engine, root)
    wheel = request.getfixturevalue("wheel")
    with zipfile.ZipFile(wheel) as archive:
        for path in WANTED[engine]:
            archive.extract(path, root)
    return root


@pytest.mark.parametrize("engine", WHEELS, indirect=True, scope="module")
def test_the_wheel_is_the_recorded_one(engine: str, wheel: Path) -> None:
    facts = load(engine)
    assert facts["source"] == f"wheel {wheel.name}"
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() == facts["wheel_sha256"]


def test_its_source_says_what_is_recorded(engine: str, source: Path) -> None:
    assert differences(load(engine)["files"], record(engine, source)) == []
    assert main([engine, str(source)]) == 0


def test_a_change_would_be_noticed(engine: str, source: Path) -> None:
    path = source / next(iter(WANTED[engine]))
    before = path.read_bytes()
    try:
        path.write_bytes(before + b"\n# changed\n")
        (line,) = differences(load(engine)["files"], record(engine, source))
        assert "sha256" in line
    finally:
        path.write_bytes(before)
