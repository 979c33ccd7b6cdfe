"""The pages of engines say what the code does: their options, and which engine is taken when."""

import ast
import re
from pathlib import Path

import pytest

from deploy.declared import declared, name_of
from deploy.engines import ENGINES, GGUF, PREFERENCES, SAFETENSORS

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "engines"
# Where the options of an engine are read, if not in a file that is called as the engine is.
SETTINGS = {"llamacpp": "llama_settings", "vllm": "vllm_setup"}
# Where there are further ones.
FURTHER = {"neuron": "neuron_vllm"}
KINDS = {
    "NVIDIA": "cuda",
    "AMD": "rocm",
    "Intel GPU": "xpu",
    "Gaudi": "hpu",
    "TPU": "tpu",
    "Neuron": "neuron",
    "Apple": "metal",
    "CPU": "cpu",
}
WITH_PAGES = [name for name, facts in ENGINES.items() if facts.module]


def options_of(name: str) -> set[str]:
    """The engine options that an engine's source reads."""
    folder = ROOT / "shards" / "engines"
    modules = (SETTINGS.get(name, name), f"{name}_engine")
    paths = [path for one in modules if (path := folder / f"{one}.py").is_file()][:1]
    paths += [folder / f"{FURTHER[name]}.py"] if name in FURTHER else []
    found = set()
    for node in (node for path in paths for node in ast.walk(ast.parse(path.read_text()))):
        match node:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="extras"), attr=attr),
                args=[ast.Constant(value=str(key)), *_],
            ) if attr in ("text", "number", "whole", "choice"):
                found.add(key)
    return found


@pytest.mark.parametrize("name", WITH_PAGES)
def test_a_page_has_every_option_how_to_install_it_and_what_is_verified(name: str) -> None:
    text = (ROOT / ENGINES[name].page).read_text()
    options = options_of(name)
    assert options
    told = set(re.findall(r"(?:`|--engine-option )(\w+)=", text))
    assert options <= told
    heads = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert "Install" in heads
    assert any("erified" in head for head in heads)


def test_the_table_of_auto_is_what_is_done() -> None:
    text = (PAGES / "README.md").read_text()
    table = text.partition("| device | GGUF | safetensors |\n|---|---|---|\n")[2]
    told = {}
    for line in table.partition("\n\n")[0].splitlines():
        kind, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        names = [tuple(filter(None, cell.split(", "))) for cell in cells]
        told[KINDS[kind]] = dict(zip((GGUF, SAFETENSORS), names, strict=True))
    done = {
        kind: {one: by_format.get(one, ()) for one in (GGUF, SAFETENSORS)}
        for kind, by_format in PREFERENCES.items()
    }
    assert told == done


def test_the_first_table_names_every_engine_and_its_page() -> None:
    text = (PAGES / "README.md").read_text()
    for name in WITH_PAGES:
        assert f"| [`{name}`]({name}.md) |" in text


def test_neurons_page_names_what_a_worker_needs_beside_vllms_own_pins() -> None:
    text = (PAGES / "neuron.md").read_text()
    needs = {name_of(one): one for one in declared().worker_needs()}
    # The plugin and vLLM bring these, in other versions.
    others = {"llguidance", "numpy"}
    assert others < needs.keys()
    assert all(f'"{one}"' in text for name, one in needs.items() if name not in others)
