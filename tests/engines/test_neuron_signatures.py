"""What Neuron's adapters and their page use of the libraries, against the recorded signatures."""

import ast
import re
from pathlib import Path

import pytest

from shards.engines import neuron_vllm
from shards.engines.neuron_compiled import VARIABLE
from tests.engines.signatures import fake_vllm_neuron
from tests.engines.signatures.fake_neuron import TOKEN_CALL
from tests.engines.signatures.fake_vllm_neuron import PLUGIN, VLLM
from tests.engines.signatures.record import load as load_recorded
from tests.engines.signatures.strict import fields, recorded
from tests.engines.signatures.uses import call_keywords, keys_of, names_read, tree_of

VLLM_ADAPTER = "neuron_vllm"


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


# Through vLLM -------------------------------------------------------------------------------------


def test_every_argument_and_field_is_vllms() -> None:
    nested = {"override_neuron_config", "on_device_sampling_config", "save_sharded_checkpoint"}
    arguments = keys_of(VLLM_ADAPTER, "_arguments")
    assert nested < arguments
    assert arguments - nested <= set(fields(VLLM, "EngineArgs"))
    assert keys_of(VLLM_ADAPTER, "_sampling") <= set(fields(VLLM, "SamplingParams"))
    assert call_keywords(VLLM_ADAPTER, "TokensPrompt") <= set(fields(VLLM, "TokensPrompt"))
    for name in names_read(VLLM_ADAPTER, "_engine") - {"engine_core"}:
        assert recorded(VLLM, "functions", f"LLMEngine.{name}")
    assert "engine_core" in recorded(VLLM, "attributes", "LLMEngine.__init__")
    assert names_read(VLLM_ADAPTER, "engine_core") == {"shutdown"}
    assert recorded(VLLM, "functions", "InprocClient.shutdown")["positional"] == ["self"]
    for name in names_read(VLLM_ADAPTER, "_vllm") | names_read(VLLM_ADAPTER, "_sampling_params"):
        assert recorded(VLLM, "names", name)
    told = recorded(VLLM, "attributes", "RequestOutput.__init__")
    assert names_read(VLLM_ADAPTER, "said") | names_read(VLLM_ADAPTER, "output") <= set(told)
    assert names_read(VLLM_ADAPTER, "piece") <= set(fields(VLLM, "CompletionOutput"))


def test_the_plugin_has_the_settings_that_the_adapter_makes() -> None:
    for name in (*neuron_vllm._ENVIRONMENT, VARIABLE, "override_neuron_config", neuron_vllm._CORES):
        package = VLLM if name.startswith("VLLM") else PLUGIN
        assert recorded(package, "names", name)
    compared = keys_of(VLLM_ADAPTER, "_choose_compiled") | {"on_device_sampling_config"}
    assert compared <= set(recorded(PLUGIN, "keys", "_get_default_neuron_config"))
    options = set(recorded("nxdi", "options", "NeuronConfig.__init__"))
    assert compared | {"save_sharded_checkpoint"} <= options


def test_why_seeds_bias_and_min_p_are_not_offered() -> None:
    """A release that brings them would be noticed here."""
    runner = "NeuronxDistributedModelRunner"
    batch = recorded(VLLM, "functions", "InputBatch.__init__")["positional"]
    assert "logitsprocs" in batch
    assert "logitsprocs" not in recorded(PLUGIN, "keywords", f"{runner}.__init__")
    assert set(recorded(PLUGIN, "keywords", f"{runner}.__init__")) <= set(batch)
    states = recorded(PLUGIN, "keywords", f"{runner}._update_states")
    assert set(states) <= set(fields(VLLM, "CachedRequestState"))
    assert "generator" in states
    assert recorded(PLUGIN, "constants", f"{runner}._update_states.generator") == "None"


def test_an_argument_that_vllm_does_not_have_is_noticed() -> None:
    with pytest.raises(TypeError, match="unexpected keyword"):
        fake_vllm_neuron.EngineArgs(no_such_argument=1)
    with pytest.raises(TypeError, match="unexpected keyword"):
        fake_vllm_neuron.SamplingParams(no_such_field=1)
