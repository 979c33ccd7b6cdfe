"""What the Open Inference Protocol tells of models: their tensors, as Triton would."""

from router.api.kserve_params import OUTPUTS, RETURNS
from router.fleet import Fleet, ModelCard
from router.kserve.v1 import inference_pb2 as pb
from router.metrics_models import Models, Sum

VERSION = "1"
"""Every model has one version."""

INPUTS = {
    "text_input": "BYTES",
    "stream": "BOOL",
    "sampling_parameters": "BYTES",
    "exclude_input_in_output": "BOOL",
    **dict.fromkeys(RETURNS, "BOOL"),
    **dict.fromkeys(("max_tokens", "min_tokens", "top_k"), "INT32"),
    **dict.fromkeys(("temperature", "top_p", "repetition_penalty"), "FP32"),
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), "FP32"),
    "random_seed": "UINT64",
    "stop_words": "BYTES",
}
"""The inputs that are listed, with their datatypes; more names are known (``kserve_params``)."""

OUTPUT_TYPES = {
    **dict.fromkeys(OUTPUTS, "FP32"),
    **dict.fromkeys(("text_output", "finish_reason", "logprobs"), "BYTES"),
    **dict.fromkeys(("num_input_tokens", "num_output_tokens"), "UINT32"),
}


def metadata_of(card: ModelCard) -> pb.ModelMetadataResponse:
    """Returns the tensors that a model takes and gives."""
    kind = pb.ModelMetadataResponse.TensorMetadata
    return pb.ModelMetadataResponse(
        name=card.id,
        versions=[VERSION],
        platform=_platform(card),
        inputs=[kind(name=name, datatype=type_, shape=[-1]) for name, type_ in INPUTS.items()],
        outputs=[
            kind(name=name, datatype=type_, shape=[-1]) for name, type_ in OUTPUT_TYPES.items()
        ],
    )


def config_of(card: ModelCard) -> pb.ModelConfigResponse:
    """Returns the configuration that Triton would have for a model."""
    config = pb.ModelConfig(
        name=card.id,
        platform=_platform(card),
        backend=_platform(card),
        input=[
            pb.ModelInput(
                name=name, data_type=_type(type_), dims=[-1], optional=name != "text_input"
            )
            for name, type_ in INPUTS.items()
        ],
        output=[
            pb.ModelOutput(name=name, data_type=_type(type_), dims=[-1])
            for name, type_ in OUTPUT_TYPES.items()
        ],
        model_transaction_policy=pb.ModelTransactionPolicy(decoupled=True),
    )
    limits = {"max_input_tokens": card.max_input_tokens, "max_total_tokens": card.max_total_tokens}
    for name, value in limits.items():
        config.parameters[name].string_value = str(value)
    return pb.ModelConfigResponse(config=config)


def statistics_of(card: ModelCard, models: Models) -> pb.ModelStatistics:
    """Returns what became of a model's requests. What is not measured apart is left out."""
    counts = models.of(card.id)
    sizes: dict[int, Sum] = {}
    for group in card.groups:
        for size, steps in models.steps(group.name).items():
            whole = sizes.setdefault(size, Sum())
            whole.count += steps.count
            whole.seconds += steps.seconds
    return pb.ModelStatistics(
        name=card.id,
        version=VERSION,
        last_inference=counts.latest_ms,
        inference_count=counts.succeeded.count,
        execution_count=sum(steps.count for steps in sizes.values()),
        inference_stats=pb.InferStatistics(
            success=_duration(counts.succeeded),
            fail=_duration(counts.failed),
            queue=_duration(counts.queued),
            compute_infer=_duration(counts.inferred),
        ),
        batch_stats=[
            pb.InferBatchStatistics(batch_size=size, compute_infer=_duration(sizes[size]))
            for size in sorted(sizes)
        ],
    )


def _duration(whole: Sum) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=whole.count, ns=round(whole.seconds * 1e9))


def index_of(fleet: Fleet, only_ready: bool) -> pb.RepositoryIndexResponse:
    """Returns the list of models."""
    response = pb.RepositoryIndexResponse()
    for card in fleet.models():
        if fleet.takes(card):
            response.models.add(name=card.id, version=VERSION, state="READY")
        elif not only_ready:
            reason = "none of its workers is up"
            response.models.add(name=card.id, version=VERSION, state="UNAVAILABLE", reason=reason)
    return response


def _platform(card: ModelCard) -> str:
    """The engine of its first group."""
    return card.groups[0].engine if card.groups else ""


def _type(datatype: str) -> str:
    """Model configurations have names of their own for the datatypes."""
    return "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"
