"""Whatever an adapter reads of its engine's objects is in the recorded signature of that engine."""

import ast

import pytest

from tests.engines.signatures.record import load
from tests.engines.signatures.uses import touched, tree_of

# The language's own, of dictionaries and asynchronous generators.
PYTHON = {"get", "aclose"}
# PyTorch's own, which the heavy tests of Neuron and of the torch engine call for real.
TORCH = {
    *("cuda", "is_available", "get_device_name", "zeros", "float32", "int64"),
    *("from_numpy", "no_grad", "to", "numpy", "reshape", "shape"),
}
ADAPTERS = {
    "sglang_engine": ("sglang",),
    "trtllm": ("trtllm",),
    "neuron_graphs": ("optimum", "nxdi"),
    "neuron_vllm": ("vllm-0.11",),
}
SOURCE = """
class Backend:
    def start(self, loop: Loop):
        load = partial(load_package, "x", hint="")
        package = load_package("x", "y", "")
        self._engine = package.Engine(one=1)
        self._late = load("z").lately
        return self.facts()["size"] + self.own.thing

    def facts(self) -> dict[str, Any]:
        return self._engine.info()

    async def generate(self, ask):
        stream = await self._engine.stream(ask.tokens)
        async for piece in stream:
            meta = piece["meta"] or {}
            print(meta.get("reason"), [each.end for each in piece.parts], self._late.by)

    def tell(self, output: Any, own: Own):
        return output.text + own.text_of_its_own
"""


def known(engine: str) -> set[str]:
    """Every name that is recorded of an engine: of modules, methods, fields, keys and options."""
    recorded = load(engine)
    found = {
        name for one in recorded.get("references", {}).values() for name in one.get("methods", ())
    }
    for entry in recorded["files"].values():
        for kind in ("names", "functions", "calls"):
            found |= {name.rpartition(".")[2] for name in entry.get(kind, {})}
        for kind in ("classes", "keys", "options", "attributes", "keywords"):
            found |= {name for names in entry.get(kind, {}).values() for name in names}
        # A configuration keeps what it is made with.
        for name, given in entry.get("functions", {}).items():
            found |= set(given["positional"]) if name.endswith("Config.__init__") else set()
    return found


@pytest.mark.parametrize("module", ADAPTERS)
def test_whatever_an_adapter_touches_is_recorded(module: str) -> None:
    recorded = {name for engine in ADAPTERS[module] for name in known(engine)}
    found = touched(tree_of(module))
    assert len(found) > 10
    assert found - recorded <= PYTHON | TORCH


def test_finds_what_is_touched_of_foreign_objects_only() -> None:
    found = touched(ast.parse(SOURCE))
    assert found == {
        *("Engine", "lately", "size", "info", "stream", "meta", "get", "reason", "parts", "end"),
        *("by", "text"),
    }
