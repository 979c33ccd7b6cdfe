"""What is looked up in the source of each engine's package: see ``record``."""

Wanted = dict[str, dict[str, list[str]]]

_SRT = "sglang/srt/"
_FIELDS = "sglang/srt/arg_groups/fields/"
_OPTIMUM = "optimum/neuron/models/inference/"
_NXDI = "src/neuronx_distributed_inference/"
_WORKER = "vllm_neuron/worker/neuronx_distributed_model_"
_RUNNER = "NeuronxDistributedModelRunner"
WANTED: dict[str, Wanted] = {
    "sglang": {
        "sglang/__init__.py": {"names": ["Engine", "__version__"]},
        _SRT + "entrypoints/engine.py": {
            "functions": [
                "Engine.__init__",
                "Engine.async_generate",
                "Engine.get_server_info",
                "Engine.shutdown",
            ],
            "keys": ["Engine.get_server_info"],
        },
        _SRT + "sampling/sampling_params.py": {"classes": ["SamplingParams"]},
        _SRT + "managers/io_struct.py": {"classes": ["GenerateReqInput"]},
        _SRT + "managers/scheduler.py": {"keys": ["Scheduler.get_init_info"]},
        _SRT + "managers/scheduler_components/internal_state.py": {
            "keys": ["SchedulerInternalStateController._add_topology"]
        },
        _SRT + "managers/tokenizer_manager.py": {
            "functions": ["TokenizerManager.abort_request", "TokenizerManager.generate_request"],
            "keys": [
                "TokenizerManager._handle_batch_output",
                "TokenizerManager.add_logprob_to_meta_info",
            ],
        },
        _SRT + "managers/schedule_batch.py": {
            "keys": [
                "FINISH_ABORT.to_json",
                "FINISH_LENGTH.to_json",
                "FINISH_MATCHED_TOKEN.to_json",
            ]
        },
        _SRT + "layers/sampler.py": {"names": ["SGLANG_RETURN_ORIGINAL_LOGPROB"]},
        _FIELDS + "model.py": {"classes": ["Model"]},
        _FIELDS + "schedule.py": {"classes": ["Schedule"]},
        _FIELDS + "serving.py": {"classes": ["Serving"]},
        _FIELDS + "lora.py": {"classes": ["Lora"]},
        _FIELDS + "device.py": {"classes": ["Device"]},
        _FIELDS + "memory.py": {"classes": ["Memory"]},
        _FIELDS + "parallel.py": {"classes": ["Parallel"]},
        _FIELDS + "exec_.py": {"classes": ["ExecDeterministic"]},
    },
    "optimum": {
        "optimum/neuron/__init__.py": {"names": ["NeuronModelForCausalLM"]},
        _OPTIMUM + "modeling_utils.py": {
            "functions": [
                "NeuronPreTrainedModel.from_pretrained",
                # How to compile a model: docs/engines/neuron.md.
                "NeuronPreTrainedModel.get_neuron_config",
                "NeuronPreTrainedModel.export",
            ]
        },
        _OPTIMUM + "backend/config.py": {"functions": ["NxDNeuronConfig.__init__"]},
        _OPTIMUM + "backend/modules/decoder/modeling_decoder.py": {
            "functions": ["NxDModelForCausalLM.forward"]
        },
        _OPTIMUM + "backend/modules/decoder/decoder_wrappers.py": {
            "functions": [
                "NxDDecoderWrapperForCausalLM.forward",
                "NxDDecoderWrapperForCausalLM._forward_with_pad",
            ]
        },
    },
    "nxdi": {
        _NXDI + "utils/constants.py": {"names": ["MODEL_TYPES"], "keys": ["MODEL_TYPES"]},
        _NXDI + "models/config.py": {"options": ["NeuronConfig.__init__"]},
        _NXDI + "models/application_base.py": {
            "functions": ["NeuronApplicationBase.__init__", "NeuronApplicationBase.load"],
            "attributes": ["NeuronApplicationBase.__init__"],
        },
        _NXDI + "models/model_base.py": {
            "functions": [
                "NeuronBaseForCausalLM.forward",
                # Whether an input is taken for a prompt: a position 0 anywhere.
                "NeuronBaseForCausalLM._is_prefill",
            ],
            "attributes": ["NeuronBaseForCausalLM.enable_token_generation"],
            "calls": [
                "NeuronBaseForCausalLM._get_model_outputs.token_generation_model",
                "NeuronBaseForCausalLM._get_model_outputs._is_prefill",
            ],
            "keywords": ["NeuronBaseForCausalLM._construct_output"],
        },
        _NXDI + "models/model_wrapper.py": {
            "functions": [
                "ModelWrapper.forward",
                "ModelWrapper._get_seq_bucket",
                "ModelWrapper.pad_inputs",
            ]
        },
    },
    # The public engine API of the release that vllm-neuron asks for.
    "vllm-0.11": {
        "vllm/__init__.py": {
            "names": ["LLMEngine", "EngineArgs", "SamplingParams", "TokensPrompt"]
        },
        "vllm/envs.py": {"names": ["VLLM_ENABLE_V1_MULTIPROCESSING"]},
        "vllm/engine/arg_utils.py": {"classes": ["EngineArgs"]},
        "vllm/inputs/data.py": {"classes": ["TokensPrompt"]},
        "vllm/sampling_params.py": {
            "classes": ["SamplingParams"],
            "names": ["RequestOutputKind", "DELTA"],
        },
        "vllm/outputs.py": {
            "classes": ["CompletionOutput"],
            "functions": ["RequestOutput.__init__"],
            "attributes": ["RequestOutput.__init__"],
        },
        "vllm/logprobs.py": {"classes": ["Logprob"]},
        "vllm/platforms/__init__.py": {"names": ["current_platform"]},
        "vllm/platforms/interface.py": {"classes": ["Platform"]},
        "vllm/v1/engine/llm_engine.py": {
            "functions": [
                "LLMEngine.from_engine_args",
                "LLMEngine.add_request",
                "LLMEngine.abort_request",
                "LLMEngine.has_unfinished_requests",
                "LLMEngine.step",
            ],
            "attributes": ["LLMEngine.__init__"],
        },
        "vllm/v1/engine/core_client.py": {
            "functions": ["InprocClient.get_output", "InprocClient.shutdown"]
        },
        # Without processors of logits, neither bias nor min_p nor min_tokens have an effect.
        "vllm/v1/worker/gpu_input_batch.py": {
            "functions": ["InputBatch.__init__"],
            "classes": ["CachedRequestState"],
        },
    },
    "vllm-neuron": {
        "vllm_neuron/__init__.py": {"functions": ["register"]},
        "vllm_neuron/platform.py": {
            "classes": ["NeuronPlatform"],
            "names": ["DISABLE_NEURON_CUSTOM_SCHEDULER", "NEURON_RT_VISIBLE_CORES"],
        },
        "vllm_neuron/core/scheduler.py": {
            "functions": ["ContinuousBatchingNeuronScheduler.schedule"]
        },
        _WORKER + "loader.py": {
            "functions": ["get_neuron_model", "NeuronModelBase._get_compiled_model_path"],
            "keys": ["_get_default_neuron_config"],
            "names": [
                "override_neuron_config",
                "NEURON_COMPILED_ARTIFACTS",
                "NEURON_ON_DEVICE_SAMPLING_DISABLED",
            ],
        },
        _WORKER + "runner.py": {
            "functions": [f"{_RUNNER}._cpu_sample", f"{_RUNNER}.get_nxd_sampling_params"],
            "keywords": [f"{_RUNNER}.__init__", f"{_RUNNER}._update_states"],
            # Why seeds are not offered.
            "constants": [f"{_RUNNER}._update_states.generator"],
        },
    },
    "trtllm": {
        "tensorrt_llm/llmapi/__init__.py": {
            "names": ["LLM", "SamplingParams", "KvCacheConfig", "LoRARequest", "RequestError"]
        },
        "tensorrt_llm/llmapi/llm.py": {"functions": ["BaseLLM.__init__", "BaseLLM.generate_async"]},
        "tensorrt_llm/llmapi/llm_args.py": {
            "classes": ["BaseLlmArgs", "TorchLlmArgs", "KvCacheConfig"],
            "names": ["LoraConfig"],
        },
        "tensorrt_llm/lora_helper.py": {"classes": ["LoraConfig"]},
        "tensorrt_llm/sampling_params.py": {"classes": ["SamplingParams"]},
        "tensorrt_llm/executor/request.py": {"classes": ["LoRARequest"]},
        "tensorrt_llm/executor/result.py": {
            "classes": ["CompletionOutput", "Logprob"],
            "functions": [
                "GenerationResult.abort",
                "GenerationResult.finished",
                "GenerationResult.__aiter__",
                "GenerationResult.__anext__",
                "GenerationResultBase.outputs",
            ],
        },
    },
}
