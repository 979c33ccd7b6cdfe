"""Records or compares a package's promises from its public repository, at one commit or tag.

    python -m tests.engines.signatures.origin nxdi                   # compares, at its commit
    python -m tests.engines.signatures.origin trtllm v1.2.1          # shows what differs there
    python -m tests.engines.signatures.origin trtllm v1.2.1 --write  # records it, with hashes

For the engines whose packages the public index does not have. It needs git, and a way to the
repository; of that only the files that are looked into are fetched.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.engines.signatures import record

FETCH_S = 300
REPOSITORIES = {
    "nxdi": "https://github.com/aws-neuron/neuronx-distributed-inference",
    "trtllm": "https://github.com/NVIDIA/TensorRT-LLM",
    "vllm-neuron": "https://github.com/vllm-project/vllm-neuron",
}


class OriginError(Exception):
    """The repository cannot be had, or lacks a file. One line."""


def fetch(url: str, ref: str, paths: list[str], root: Path) -> str:
    """Writes files of a repository, as they are at ``ref``, under ``root``; returns the commit."""
    bare = root / ".git"
    _git(root, "init", "--quiet", "--bare", str(bare))
    for key, value in (("url", url), ("promisor", "true"), ("partialclonefilter", "blob:none")):
        _git(bare, "config", f"remote.origin.{key}", value)
    _git(bare, "fetch", "--quiet", "--depth=1", "--filter=blob:none", "origin", ref)
    for path in paths:
        place = root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(_git(bare, "show", f"FETCH_HEAD:{path}"))
    return _git(bare, "rev-parse", "FETCH_HEAD^{commit}").decode().strip()


def _git(folder: Path, *arguments: str) -> bytes:
    command = ["git", "-c", "protocol.version=2", *arguments]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, timeout=FETCH_S, check=True)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        raise OriginError(f"git {arguments[0]}: {lines[-1] if lines else error}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise OriginError(f"git {arguments[0]}: {error}") from error
    return done.stdout


def main(arguments: list[str]) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("engine", choices=sorted(REPOSITORIES))
    parser.add_argument("ref", nargs="?", default="")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args(arguments)
    old = record.load(given.engine)
    ref = given.ref or old.get("commit", "")
    if not ref:
        parser.error(f"no commit of {given.engine} is recorded: name a tag or a commit")
    with tempfile.TemporaryDirectory() as folder:
        try:
            paths = list(record.WANTED[given.engine])
            commit = fetch(REPOSITORIES[given.engine], ref, paths, Path(folder))
            new = record.record(given.engine, Path(folder))
        except (OriginError, LookupError) as error:
            sys.stderr.write(f"{given.engine}: {error}\n")
            return 2
    lines = record.differences(old["files"], new)
    sys.stdout.write(("\n".join(lines) or "as recorded") + f"\nat {commit}\n")
    if not given.write:
        return 1 if lines else 0
    source = f"repository {REPOSITORIES[given.engine].partition('github.com/')[2]}, {ref}"
    told = {**old, "version": ref.removeprefix("v") if given.ref else old["version"]}
    text = json.dumps({**told, "source": source, "commit": commit, "files": new}, indent=1)
    (record.HERE / f"{given.engine}.json").write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
