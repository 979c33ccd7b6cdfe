"""Pages of the documentation that messages name are where an installed release has them, too."""

import tomllib
from pathlib import Path

import pytest

from deploy.engines import ENGINES
from shards import pages

ROOT = Path(__file__).resolve().parents[2]


def shipped() -> dict[str, list[str]]:
    """Folders below an installation's, and the patterns of what goes there."""
    text = (ROOT / "pyproject.toml").read_text()
    table: dict[str, list[str]] = tomllib.loads(text)["tool"]["setuptools"]["data-files"]
    return table


@pytest.mark.parametrize(
    "name",
    [
        "tgi-compatibility.md",
        *(f"engines/{name}.md" for name, facts in ENGINES.items() if facts.module),
    ],
)
def test_a_page_is_named_as_the_checkout_has_it(name: str) -> None:
    if not (ROOT / "docs" / name).exists():
        pytest.fail(f"docs/{name} is named by messages, and there is none")
    assert pages.page(name) == f"docs/{name}"


def test_all_pages_are_shipped_where_they_are_looked_for() -> None:
    base = str(pages._INSTALLED)
    found = {
        str(Path(folder) / path.name)
        for folder, patterns in shipped().items()
        for pattern in patterns
        for path in ROOT.glob(pattern)
    }
    docs = [path for folder in ("docs", "docs/engines") for path in (ROOT / folder).glob("*.md")]
    wanted = {pages._INSTALLED / path.relative_to(ROOT / "docs") for path in docs}
    assert {f"{base.removesuffix('share/doc/roundhouse-llm')}{one}" for one in found} == {
        str(one) for one in wanted
    }


def test_an_installed_release_names_its_own_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "share" / "engines" / "trtllm.md"
    copy.parent.mkdir(parents=True)
    copy.write_text("# TensorRT-LLM")
    monkeypatch.setattr(pages, "_CHECKOUT", tmp_path / "site-packages")
    monkeypatch.setattr(pages, "_INSTALLED", tmp_path / "share")
    assert pages.page("engines/trtllm.md") == str(copy)
    assert pages.page("engines/other.md") == "docs/engines/other.md"
