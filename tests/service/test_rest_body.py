"""Bodies that are wrong all over are refused at the first fault: to list them all takes seconds."""

from typing import Any

import pytest
from pydantic import ValidationError

from router.api.rest.body import Body
from router.api.rest.models_anthropic import MessagesRequest
from router.api.rest.models_chat import ChatRequest
from router.api.rest.models_completions import CompletionRequest, EmbeddingRequest
from router.api.rest.models_responses import ResponsesRequest
from router.api.rest.models_tgi import GenerateRequest

SAID = [{"role": "user", "content": "Hi"}]
CLAUDE = {"model": "m", "max_tokens": 1}
CALL = {"type": "function", "function": {}}
TYPES_MAX = 4
"""Types that one field may have, each of which tells its own first fault."""


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (ChatRequest, {"messages": [{}] * 100}),
        (ChatRequest, {"messages": [0] * 100}),
        (ChatRequest, {"messages": [{"role": "user", "content": [0] * 100}]}),
        (ChatRequest, {"messages": [{"role": "assistant", "tool_calls": [CALL] * 100}]}),
        (ChatRequest, {"messages": SAID, "stop": [0] * 100}),
        (ChatRequest, {"messages": SAID, "tools": [0] * 100}),
        (ChatRequest, {"messages": SAID, "structured_outputs": {"choice": [0] * 100}}),
        (CompletionRequest, {"prompt": [True] * 100}),
        (CompletionRequest, {"prompt": [[True] * 10] * 100}),
        (EmbeddingRequest, {"input": [None] * 100}),
        (ResponsesRequest, {"input": [0] * 100}),
        (MessagesRequest, {**CLAUDE, "messages": [{}] * 100}),
        (MessagesRequest, {**CLAUDE, "messages": SAID, "tools": [{}] * 100}),
        (GenerateRequest, {"inputs": "x", "parameters": {"stop": [0] * 100}}),
    ],
)
def test_one_fault_of_a_list_is_enough(model: type[Body], body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    assert 1 <= caught.value.error_count() <= TYPES_MAX
