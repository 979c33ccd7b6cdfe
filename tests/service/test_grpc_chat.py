"""``router.v1.Inference.Chat``: conversations in, text, thoughts and tool calls out."""

from typing import Any

import grpc
import pytest

from router.ask import Finish, TokenOut
from router.conversation import Call, CallDelta, ChatChunk, ChatFinish, Tool, ToolMode
from router.core.events import Reason
from router.errors import Fault, RequestError
from router.v1 import router_pb2 as pb
from tests.service.fake_service import FakeService
from tests.service.grpc_rig import FakeChats, failure, field_of, read, stub_of

USER = {"role": "user", "content": "Hi"}
CALLS = (Call("c1", "sum", '{"a":1}'), Call("c2", "now", "{}"))


def answer(called: bool = True, reason: Reason = Reason.EOS) -> list[ChatChunk]:
    """Thoughts, text, and two calls in pieces; a token with each."""
    finish = ChatFinish(
        Finish(reason, "raw", 7, 4, 2, 5), "So:", "Hm", CALLS if called else (), called, 1
    )
    token = TokenOut(1, "x")
    return [
        ChatChunk((token,), reasoning="Hm"),
        ChatChunk((token,), text="So:"),
        ChatChunk((token,), calls=(CallDelta(0, "c1", "sum", '{"a"'),)),
        ChatChunk(
            (token,),
            calls=(CallDelta(0, None, None, ":1}"), CallDelta(1, "c2", "now", "{}")),
            finish=finish,
        ),
    ]


async def chat(chats: FakeChats, **fields: Any) -> list[pb.GenerateResponse]:
    async with stub_of(FakeService(), chats) as stub:
        fields = {"messages": [USER], **fields}
        return list(await read(stub.Chat(pb.ChatRequest(**fields))))


async def test_parts_of_an_answer_come_apart() -> None:
    messages = await chat(FakeChats(*answer()))
    assert [message.reasoning for message in messages] == ["Hm", "", "", ""]
    assert [message.text for message in messages] == ["", "So:", "", ""]
    deltas = [delta for message in messages for delta in message.tool_calls]
    assert deltas == [
        pb.ToolCallDelta(index=0, id="c1", name="sum", arguments='{"a"'),
        pb.ToolCallDelta(index=0, arguments=":1}"),
        pb.ToolCallDelta(index=1, id="c2", name="now", arguments="{}"),
    ]
    finish = messages[-1].finish
    assert finish.reason == pb.FINISH_REASON_TOOL_CALLS
    assert (finish.prompt_tokens, finish.generated_tokens, finish.seed) == (7, 4, 5)
    assert finish.reasoning_tokens == 1
    assert list(finish.tool_calls) == [
        pb.ToolCall(id="c1", name="sum", arguments='{"a":1}'),
        pb.ToolCall(id="c2", name="now", arguments="{}"),
    ]


async def test_an_answer_without_calls_has_its_own_reason() -> None:
    messages = await chat(FakeChats(*answer(called=False, reason=Reason.LENGTH)))
    assert messages[-1].finish.reason == pb.FINISH_REASON_LENGTH
    assert not messages[-1].finish.tool_calls


async def test_messages_are_collected() -> None:
    (message,) = await chat(FakeChats(*answer()), parameters={"stream_tokens": 9})
    assert (message.reasoning, message.text) == ("Hm", "So:")
    assert len(message.token_ids) == 4
    assert len(message.tool_calls) == 3


async def test_what_came_is_sent_before_a_failure() -> None:
    chats = FakeChats(answer()[0], RequestError(Fault.ENGINE_FAILED, "broke"))
    async with stub_of(FakeService(), chats) as stub:
        request = pb.ChatRequest(messages=[USER], parameters={"stream_tokens": 9})
        call = stub.Chat(request)
        assert (await call.read()).reasoning == "Hm"
        assert (await failure(call.read())).code() is grpc.StatusCode.INTERNAL


async def test_conversations_arrive_in_the_shape_of_templates() -> None:
    chats = FakeChats(*answer())
    messages = [
        pb.ChatMessage(role="developer", content="Be brief."),
        pb.ChatMessage(role="user", parts=[{"text": "1+"}, {"text": "2?"}], name="Ann"),
        pb.ChatMessage(
            role="assistant",
            reasoning="Easy.",
            tool_calls=[{"id": "c0", "name": "sum", "arguments": '{"b":2,"a":1.0}'}],
        ),
        pb.ChatMessage(role="tool", content="3", tool_call_id="c0", name="sum"),
    ]
    await chat(chats, messages=messages)
    developer, user, assistant, tool = chats.asks[0].messages
    assert developer == {"role": "developer", "content": "Be brief."}
    assert user == {
        "role": "user",
        "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "2?"}],
        "name": "Ann",
    }
    function = {"name": "sum", "arguments": '{"b":2,"a":1.0}'}
    assert assistant == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "Easy.",
        "tool_calls": [{"id": "c0", "type": "function", "function": function}],
    }
    assert tool == {"role": "tool", "content": "3", "tool_call_id": "c0", "name": "sum"}


async def test_unset_switches_have_their_defaults() -> None:
    chats = FakeChats(*answer())
    await chat(chats)
    ask = chats.asks[0]
    assert (ask.tools, ask.mode, ask.tool, ask.parallel_calls) == ((), ToolMode.AUTO, None, True)
    assert (ask.opening, ask.continuing, ask.reasoning) == (True, False, True)
    assert (ask.variables, ask.template, ask.model, ask.priority) == ({}, None, None, 1)
    await chat(chats, continuing=True)
    assert (chats.asks[1].opening, chats.asks[1].continuing) == (False, True)


async def test_what_a_chat_may_say_arrives() -> None:
    chats = FakeChats(*answer())
    request = pb.ChatRequest(
        parallel_tool_calls=False,
        opening=False,
        template="tool_use",
        reasoning=False,
        model="m/one",
        adapter="poet",
        priority=0,
        parameters={"max_tokens": 4, "constraint": {"regex": "a"}},
    )
    request.template_variables.update({"enable_thinking": False, "depth": 3, "list": ["a"]})
    fields = {field.name: value for field, value in request.ListFields()}
    await chat(chats, **fields)
    ask = chats.asks[0]
    assert not ask.parallel_calls
    assert not ask.opening
    assert not ask.reasoning
    assert (ask.template, ask.model, ask.adapter, ask.priority) == ("tool_use", "m/one", "poet", 0)
    assert ask.variables == {"enable_thinking": False, "depth": 3, "list": ["a"]}
    assert isinstance(ask.variables["depth"], int)  # which a template writes as 3, not 3.0
    assert ask.params.max_tokens == 4
    assert ask.params.constraint is not None


PARAMETERS = '{"type":"object","properties":{"z":{},"a":{}}}'


@pytest.mark.parametrize(
    ("choice", "mode", "tool"),
    [
        ({"mode": pb.TOOL_MODE_AUTO}, ToolMode.AUTO, None),
        ({"mode": pb.TOOL_MODE_NONE}, ToolMode.NONE, None),
        ({"mode": pb.TOOL_MODE_REQUIRED}, ToolMode.REQUIRED, None),
        ({"name": "sum"}, ToolMode.REQUIRED, "sum"),
    ],
)
async def test_tools_arrive(choice: dict[str, Any], mode: ToolMode, tool: str | None) -> None:
    chats = FakeChats(*answer())
    tools = [
        pb.Tool(name="sum", description="Adds.", parameters=PARAMETERS),
        pb.Tool(name="now"),
    ]
    await chat(chats, tools=tools, tool_choice=choice)
    ask = chats.asks[0]
    assert (ask.mode, ask.tool) == (mode, tool)
    first, second = ask.tools
    assert isinstance(first, Tool)
    assert list(first.parameters["properties"]) == ["z", "a"]
    assert first.entry == {
        "type": "function",
        "function": {"name": "sum", "description": "Adds.", "parameters": first.parameters},
    }
    assert second.parameters == {"type": "object", "properties": {}}
    assert "description" not in second.entry["function"]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"messages": [{"role": "king"}]}, "messages[0].role"),
        ({"messages": [USER, {"role": "user", "parts": [{}]}]}, "messages[1].parts[0]"),
        (
            {"messages": [{"role": "user", "content": "a", "parts": [{"text": "b"}]}]},
            "messages[0].parts",
        ),
        ({"tools": [{"name": "f", "parameters": "{"}]}, "tools[0].parameters"),
        ({"tools": [{"name": "f", "parameters": "[]"}]}, "tools[0].parameters"),
        ({"tool_choice": {"mode": 9}}, "tool_choice.mode"),
        ({"opening": True, "continuing": True}, "opening"),
    ],
)
async def test_faults_name_their_field(fields: dict[str, Any], field: str) -> None:
    chats = FakeChats(*answer())
    async with stub_of(FakeService(), chats) as stub:
        error = await failure(stub.Chat(pb.ChatRequest(**{"messages": [USER], **fields})))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert field_of(error) == field
    assert chats.asks == []


@pytest.mark.parametrize(
    ("inside", "outside"),
    [
        ("messages.0.tool_calls.1.function.arguments", "messages[0].tool_calls[1].arguments"),
        ("tools.2.function.name", "tools[2].name"),
        ("chat_template_kwargs", "template_variables"),
        ("chat_template", "template"),
        ("continue_final_message", "continuing"),
        ("temperature", "temperature"),
    ],
)
async def test_faults_from_inside_are_named_as_here(inside: str, outside: str) -> None:
    chats = FakeChats()
    chats.refusal = RequestError(Fault.VALIDATION, "no", inside)
    async with stub_of(FakeService(), chats) as stub:
        for n in (1, 2):
            request = pb.ChatRequest(messages=[USER], parameters={"n": n})
            assert field_of(await failure(stub.Chat(request))) == outside
