"""What several files of this folder begin with: certificates, and a collector of traces."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service.certs import Authority
from tests.service.collector import Collector, collecting


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    """The CA of those who belong together."""
    return Authority(tmp_path, "ours")


@pytest.fixture
def theirs(tmp_path: Path) -> Authority:
    """Another one."""
    return Authority(tmp_path, "theirs")


@pytest.fixture
def collector() -> Iterator[Collector]:
    """One for each test."""
    with collecting() as collector:
        yield collector
