"""The limit of open files: raised as far as it may be, and told if that is too little."""

import subprocess
import sys

import pytest

from router.open_files import OWN_FILES

ASK = """
import logging, resource, sys
from router.open_files import allow_files
logging.basicConfig(format="%(message)s")
allow_files(int(sys.argv[1]), 2000)
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(
    ("soft", "hard", "requests", "becomes"),
    [
        (100, 4000, 1000, 2000),
        (100, 1500, 1000, 1500),
        (3000, 4000, 1000, 3000),
        (100, 4000, 3000, 3000 + OWN_FILES),
        (100, 500, 400, 500),
        (100, 100, 400, 100),
    ],
)
def test_the_limit_becomes_what_connections_take(
    soft: int, hard: int, requests: int, becomes: int
) -> None:
    asked = subprocess.run(
        ["prlimit", f"--nofile={soft}:{hard}", sys.executable, "-c", ASK, str(requests)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert asked.stdout.split() == [str(becomes), str(hard)]
    short = becomes < requests + OWN_FILES
    assert (f"may open {becomes} files, fewer than {requests} requests" in asked.stderr) is short
