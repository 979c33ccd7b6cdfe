"""Chats on a scripted service: templates as real models have them, much shortened, and answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HfTokenizer

from router.ask import Chunk, Finish
from router.chat import ChatService
from router.conversation import ChatAsk, ChatFinish, Tool
from router.core.events import Reason
from router.service import Service
from router.text.tokenizer import Tokenizer
from tests.service.fake_service import FakeFleet, FakeService, Step

SPECIALS = ("<|im_end|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>")
ADDED = ("<tool_call>", "</tool_call>", "<think>", "</think>")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""No word of tools, and contents must be texts."""

HERMES = (
    "{% if tools %}<|im_start|>system\n<tools>{% for t in tools %}\n{{ t | tojson }}{% endfor %}\n"
    "</tools><|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}"
    "{% for c in m.tool_calls %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As Qwen and Hermes, and contents may be lists."""

THINKER = HERMES.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
"""The prompt opens the thoughts, as for DeepSeek R1 and QwQ."""

MAY_THINK = HERMES + "{# between <think> and </think> #}"
"""The model opens its thoughts itself, as Qwen 3."""

MISTRAL = (
    "{{ bos_token }}{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]"
    "{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% elif m.tool_calls %}[TOOL_CALLS][{% for c in m.tool_calls %}"
    "{% if c.id | length != 9 %}{{ raise_exception('ids have length 9') }}{% endif %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, '
    '"id": "{{ c.id }}"}{% endfor %}]'
    "{% elif m.role == 'tool' %}"
    "{% if m.tool_call_id | length != 9 %}{{ raise_exception('ids have length 9') }}{% endif %}"
    "[TOOL_RESULTS]{{ m.content }} {{ m.tool_call_id }}[/TOOL_RESULTS]"
    "{% elif m.role == 'assistant' %}{{ m.content }}"
    "{% else %}{{ raise_exception('Only user, assistant and tool roles') }}{% endif %}{% endfor %}"
)

LLAMA = (
    "{{ bos_token }}{% if tools %}<|start_header_id|>system<|end_header_id|>{% for t in tools %}"
    "{{ t | tojson(indent=4) }}{% endfor %}<|eot_id|>{% endif %}{% for m in messages %}"
    "{% if m.tool_calls %}<|python_tag|>"
    '{"name": "{{ m.tool_calls[0].function.name }}", '
    '"parameters": {{ m.tool_calls[0].function.arguments | tojson }}}<|eot_id|>{% else %}'
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}


def tool(name: str, parameters: Mapping[str, Any] = WEATHER) -> Tool:
    function = {"name": name, "description": f"does {name}", "parameters": dict(parameters)}
    return Tool(name, parameters, {"type": "function", "function": function})


TOOLS = (tool("get_weather"), tool("now", {"type": "object", "properties": {}}))
USER = ({"role": "user", "content": "How is the weather?"},)


@lru_cache
def tokenizer(template: str, more: tuple[tuple[str, str], ...] = ()) -> Tokenizer:
    """One token for each byte, and one for each marker."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = HfTokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(text, special=True) for text in SPECIALS])
    made.add_tokens([AddedToken(text, special=False) for text in ADDED])
    files = {
        "tokenizer.json": made.to_str().encode(),
        "tokenizer_config.json": b'{"bos_token": "<s>", "eos_token": "</s>"}',
        "chat_template.jinja": template.encode(),
    }
    files |= {f"additional_chat_templates/{name}.jinja": text.encode() for name, text in more}
    return Tokenizer.from_files(files)


class TemplateService(FakeService):
    """A fake service that lays conversations out with the model's own template."""

    render_chat = Service.render_chat  # type: ignore[assignment]


def chats(
    template: str, *scripts: Sequence[Step], more: tuple[tuple[str, str], ...] = ()
) -> tuple[ChatService, TemplateService]:
    """A chat service on a model with this template, and the service below it."""
    service = TemplateService(*scripts)
    service.fleet = FakeFleet()
    service.fleet.tokenizer = tokenizer(template, more)
    return ChatService(service), service  # type: ignore[arg-type]


def said(*pieces: str, reason: Reason = Reason.EOS) -> list[Step]:
    """An answer that comes in these pieces."""
    finish = Finish(reason, "".join(pieces), 7, len(pieces))
    last = len(pieces) - 1
    return [
        Chunk((), piece, finish if number == last else None) for number, piece in enumerate(pieces)
    ]


@dataclass
class Answer:
    """What a client puts together from the chunks of an answer."""

    text: str = ""
    reasoning: str = ""
    calls: list[list[str]] = field(default_factory=list)  # id, name, arguments
    texts: list[str] = field(default_factory=list)
    finish: ChatFinish | None = None

    @property
    def named(self) -> list[tuple[str, str]]:
        return [(name, arguments) for _, name, arguments in self.calls]


async def answer(chat: ChatService, ask: ChatAsk) -> Answer:
    """Runs a chat, and checks that its chunks add up to what its finish says."""
    got = Answer()
    async with await chat.chat(ask) as generation:
        async for chunk in generation:
            got.text += chunk.text
            got.texts.append(chunk.text)
            got.reasoning += chunk.reasoning
            for delta in chunk.calls:
                if delta.index == len(got.calls):
                    assert delta.id is not None
                    assert delta.name is not None
                    got.calls.append([delta.id, delta.name, ""])
                else:
                    assert (delta.id, delta.name) == (None, None)
                got.calls[delta.index][2] += delta.arguments
            got.finish = chunk.finish
    assert got.finish is not None
    whole = [[call.id, call.name, call.arguments] for call in got.finish.calls]
    assert (got.finish.text, got.finish.reasoning, whole) == (got.text, got.reasoning, got.calls)
    return got
