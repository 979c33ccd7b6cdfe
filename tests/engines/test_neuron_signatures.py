"""What Neuron's adapter and its page use of both libraries, against the recorded signatures."""

import ast
import re
from pathlib import Path

from tests.engines.signatures.fake_neuron import TOKEN_CALL
from tests.engines.signatures.record import load as load_recorded
from tests.engines.signatures.strict import recorded
from tests.engines.signatures.uses import call_keywords, names_read, tree_of


def test_every_argument_and_field_is_in_the_recorded_signatures() -> None:
    called = call_keywords("neuron_graphs", "_call")
    forward = recorded("nxdi", "functions", "NeuronBaseForCausalLM.forward")["positional"]
    assert called <= set(forward)
    simple = recorded("optimum", "functions", "NxDModelForCausalLM.forward")["positional"]
    assert called - {"attention_mask"} <= set(simple)
    # Each library's configuration has the fields that are read of either.
    options = set(recorded("nxdi", "options", "NeuronConfig.__init__"))
    known = recorded("optimum", "functions", "NxDNeuronConfig.__init__")["positional"]
    assert names_read("neuron_graphs", "config") <= options | set(known)
    for engine in ("optimum", "nxdi"):
        assert load_recorded(engine)["files"]
    assert recorded("optimum", "names", "NeuronModelForCausalLM")
    assert recorded("nxdi", "names", "MODEL_TYPES")
    load = recorded("nxdi", "functions", "NeuronApplicationBase.load")["positional"]
    assert load[1] == "compiled_model_path"


def test_the_documented_way_to_compile_is_in_the_recorded_signature() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "engines" / "neuron.md"
    program = re.search(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert program is not None
    calls = {
        node.func.attr: {keyword.arg for keyword in node.keywords}
        for node in ast.walk(ast.parse(program[1]))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }
    assert calls.keys() == {"get_neuron_config", "export", "save_pretrained"}
    for name in ("get_neuron_config", "export"):
        known = recorded("optimum", "functions", f"NeuronPreTrainedModel.{name}")["positional"]
        assert calls[name] <= set(known)


def test_token_generation_is_given_what_the_library_gives_it_in_the_same_order() -> None:
    sent = recorded("nxdi", "calls", TOKEN_CALL)
    assert sent[:5] == given_in_order()
    # What follows is None, which its wrapper fills in.
    assert sent[5:] == ["prev_hidden", "adapter_ids"]
    made = "NeuronBaseForCausalLM.enable_token_generation"
    assert recorded("nxdi", "attributes", made) == ["token_generation_model"]
    # Why forward is not called: it asks this of all positions, whatever the input's width.
    assert recorded("nxdi", "calls", "NeuronBaseForCausalLM._get_model_outputs._is_prefill") == [
        "position_ids"
    ]


def given_in_order() -> list[str]:
    """Keys of the dictionary that NxD Inference's token generation is called with."""
    for node in ast.walk(tree_of("neuron_graphs")):
        match node:
            case ast.Assign(targets=[ast.Name(id="given")], value=ast.Dict(keys=keys)):
                return [key.value for key in keys if isinstance(key, ast.Constant)]
    raise AssertionError("neuron_graphs has no dictionary of that name")
