"""One chat: lay out the conversation, generate, and read the answer as text, thoughts and calls.

Every protocol's chat comes through here, as every generation comes through ``router/service.py``.
What the modes of tools mean is in ``docs/chat.md``.
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

from router.ask import Ask, Chunk, Constraint, Finish
from router.conversation import ChatAsk, ChatChunk, ChatFinish, Tool, ToolMode
from router.core.events import Reason
from router.errors import Fault, RequestError
from router.fleet import ModelCard
from router.generation import Generation
from router.service import Service
from router.text import constraints
from router.text.answer import AnswerReader
from router.text.messages import for_template, is_shallow, laid_open, speaks_of_tools
from router.text.reasoning import DEFAULT, Thoughts, ThoughtSplitter, thoughts_of
from router.text.template import ChatTemplate
from router.text.tokenizer import Tokenizer
from router.text.tools.formats import PLAIN, ToolFormat, format_of
from router.text.tools.grammar import GrammarWriter, Thinking
from router.text.tools.reader import ToolReader
from router.text.tools.rules import schema_of
from router.text.tools.telling import text_of, with_tools
from router.tracing import CALL

TOOLS_MAX = 256
NAME_CHARS_MAX = 128
_NAME = re.compile(rf"[\w.-]{{1,{NAME_CHARS_MAX}}}")
_PARTS: tuple[tuple[str, type, str], ...] = (
    ("properties", Mapping, "an object"),
    ("required", list, "a list"),
)
_CUT = "CUT_THE_PROMPT_HERE"
_RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "bos_token", "eos_token"})


@dataclass(frozen=True, slots=True)
class Laid:
    """A conversation as the model is given it.

    ``form`` is how the model writes calls. ``opened`` says that the prompt ends within thoughts,
    ``closed`` that it has ended them; ``named`` that the template speaks of thoughts at all.
    """

    card: ModelCard
    prompt: str
    form: ToolFormat
    thoughts: Thoughts
    opened: bool
    closed: bool
    named: bool


class _NotShownError(RequestError):
    """A message is to be continued that the template leaves out or rewrites."""

    def __init__(self) -> None:
        text = "the chat template does not show the last message, so it cannot be continued"
        super().__init__(Fault.TEMPLATE, text, "continue_final_message")


class ChatService:
    """Answers conversations by means of a service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def chat(self, ask: ChatAsk) -> "ChatGeneration":
        """Checks, lays out and submits a chat.

        Raises RequestError as ``Service.generate`` and ``Service.render_chat`` do, with OpenAI's
        names of the fields at fault.
        """
        CALL.get().chats()
        try:
            return await self._chat(ask)
        except RequestError as error:
            self._service.refused(error)
            raise

    async def _chat(self, ask: ChatAsk) -> "ChatGeneration":
        laid = await self._lay_out(ask)
        tokenizer = laid.card.tokenizer
        marks = _marks(ask, laid, tokenizer)
        params = replace(
            ask.params,
            constraint=_constraint(ask, laid),
            kept_tokens=frozenset(marks.values()) | ask.params.kept_tokens,
        )
        answer = await self._service.generate(
            Ask(
                prompt=laid.prompt,
                params=params,
                model=ask.model,
                add_special_tokens=False,
                priority=ask.priority,
                deadline_s=ask.deadline_s,
                adapter=ask.adapter,
            )
        )
        return ChatGeneration(answer, laid.card, _reader(ask, laid, marks))

    async def render(self, ask: ChatAsk) -> tuple[ModelCard, str]:
        """The model and the prompt of a chat, which is to be encoded without special tokens.

        Raises RequestError as ``chat`` does.
        """
        laid = await self._lay_out(ask)
        return laid.card, laid.prompt

    async def _lay_out(self, ask: ChatAsk) -> Laid:
        """Raises RequestError. Finds out whether to go on with the last message if nobody says."""
        if ask.continuing is not None:
            return await self._lay_out_as(ask)
        if _has_begun(ask):
            with suppress(_NotShownError):
                return await self._lay_out_as(replace(ask, continuing=True))
        return await self._lay_out_as(replace(ask, continuing=False))

    async def _lay_out_as(self, ask: ChatAsk) -> Laid:
        _check(ask)
        card = self._service.card(ask.model)
        messages = laid_open(ask.messages)
        tokenizer = card.tokenizer
        about_tools = bool(ask.tools) or speaks_of_tools(messages)
        template = tokenizer.template(ask.template, tools=about_tools)
        if ask.template is not None and template is None:
            raise _invalid(f"the model has no chat template {ask.template[:64]!r}", "chat_template")
        name = next((n for n, other in tokenizer.templates.items() if other is template), None)
        form = _form(template)
        native = form is not PLAIN or template is None
        shown = for_template(messages, template, form, native=native)
        entries = [tool.entry for tool in _offered(ask)]
        if entries and not native:
            shown = with_tools(
                shown,
                entries,
                several=ask.parallel_calls and ask.tool is None,
                must=ask.mode is ToolMode.REQUIRED,
                system=template is not None and template.takes_system,
            )
        variables: dict[str, Any] = {
            **ask.variables,
            "add_generation_prompt": ask.opening and not ask.continuing,
            **({"tools": entries} if entries and native else {}),
        }
        if ask.continuing:
            shown = [*shown[:-1], _marked(shown[-1])]
        prompt = await self._service.render_chat(card, shown, *_given(name), **variables)
        if ask.continuing:
            prompt = _cut_behind(prompt, text_of(shown[-1]["content"]))
        return _laid(ask, card, prompt, template, form)


class ChatGeneration:
    """An answer on its way; to be used as ``Generation`` is."""

    def __init__(self, answer: Generation, model: ModelCard, reader: AnswerReader) -> None:
        self._answer = answer
        self._reader = reader
        self._thought = 0
        self.model = model
        self.prompt_ids = answer.prompt_ids
        self.prompt_tokens = answer.prompt_tokens

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> ChatChunk:
        """Waits for what comes next."""
        chunk: Chunk = await self._answer.__anext__()
        if chunk.finish is None and self._reader.settled:
            # Almost every token of almost every chat: there is nothing to be read in it.
            self._reader.keep(chunk.text)
            return ChatChunk(chunk.tokens, chunk.text)
        thinking = self._reader.thinking
        parts = self._reader.push(chunk.text, last=chunk.finish is not None)
        if thinking or self._reader.thinking or parts.reasoning:
            self._thought += len(chunk.tokens)
        finish = None if chunk.finish is None else self._finish(chunk.finish)
        return ChatChunk(chunk.tokens, parts.text, parts.reasoning, tuple(parts.calls), finish)

    async def __aenter__(self) -> Self:
        await self._answer.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._answer.__aexit__(kind, error, trace)

    def _finish(self, finish: Finish) -> ChatFinish:
        reader = self._reader
        calls = reader.calls
        in_order = reader.whole and finish.reason is not Reason.LENGTH
        called = bool(calls) and in_order
        return ChatFinish(finish, reader.text, reader.reasoning, calls, called, self._thought)


def _check(ask: ChatAsk) -> None:
    reserved = sorted(_RESERVED & ask.variables.keys())
    if reserved:
        raise _invalid(f"chat_template_kwargs cannot set {reserved[0]}", "chat_template_kwargs")
    if not is_shallow(ask.variables):
        raise _invalid("chat_template_kwargs is nested too deeply", "chat_template_kwargs")
    _check_tools(ask.tools)
    names = {tool.name for tool in ask.tools}
    if ask.tool is not None and ask.tool not in names:
        raise _invalid(f"`tool_choice` names {ask.tool[:64]!r}, which is no tool", "tool_choice")
    if ask.mode is not ToolMode.REQUIRED:
        return
    if not ask.tools:
        raise _invalid("`tool_choice` asks for a call, but there are no `tools`", "tool_choice")
    if ask.params.constraint is not None:
        field = ask.params.constraint.field
        raise _invalid(f"`{field}` cannot be used where `tool_choice` asks for a call", field)


def _check_tools(tools: tuple[Tool, ...]) -> None:
    if len(tools) > TOOLS_MAX:
        raise _invalid(f"`tools` may have up to {TOOLS_MAX} tools. Given: {len(tools)}", "tools")
    seen: set[str] = set()
    for number, tool in enumerate(tools):
        where = f"tools.{number}.function"
        if not _NAME.fullmatch(tool.name):
            text = f"must be 1 to {NAME_CHARS_MAX} letters, digits, `_`, `-` or `.`"
            raise _invalid(f"`{where}.name` {text}", f"{where}.name")
        if tool.name in seen:
            raise _invalid(f"two tools have the name {tool.name}", f"{where}.name")
        seen.add(tool.name)
        constraints.json_schema(tool.parameters, f"{where}.parameters")
        if tool.parameters.get("type", "object") != "object":
            text = f"`{where}.parameters` must be the schema of an object"
            raise _invalid(text, f"{where}.parameters")
        for part, kind, name in _PARTS:
            if not isinstance(tool.parameters.get(part), kind | None):
                field = f"{where}.parameters.{part}"
                raise _invalid(f"`{field}` must be {name}", field)
        if not is_shallow(tool.entry):
            raise _invalid(f"`tools.{number}` is nested too deeply", f"tools.{number}")


def _offered(ask: ChatAsk) -> tuple[Tool, ...]:
    """The tools that the model is told of: with the mode NONE it need not know of any."""
    return () if ask.mode is ToolMode.NONE else ask.tools


def _form(template: ChatTemplate | None) -> ToolFormat:
    if template is None or not template.takes_tools:
        return PLAIN
    return format_of(template.source)


def _given(name: str | None) -> tuple[str, ...]:
    return () if name is None else (name,)


def _laid(
    ask: ChatAsk, card: ModelCard, prompt: str, template: ChatTemplate | None, form: ToolFormat
) -> Laid:
    named = thoughts_of(None if template is None else template.source)
    thoughts = named or DEFAULT
    if ask.continuing:
        last = text_of(ask.messages[-1].get("content"))
        opened = last.rfind(thoughts.opener) > last.rfind(thoughts.closer)
        return Laid(card, prompt, form, thoughts, opened, not opened, named is not None)
    opened = ask.opening and thoughts.opened_by(prompt)
    closed = not ask.opening or thoughts.closed_by(prompt)
    return Laid(card, prompt, form, thoughts, opened, closed, named is not None)


def _marks(ask: ChatAsk, laid: Laid, tokenizer: Tokenizer) -> dict[str, int]:
    """The markers that the answer is read by and that are special tokens, with their ids."""
    texts = laid.form.markers() if _offered(ask) else ()
    if ask.reasoning:
        texts = (*texts, laid.thoughts.opener, laid.thoughts.closer)
    found = {text: tokenizer.token_id(text) for text in texts}
    return {
        text: token
        for text, token in found.items()
        if token is not None and tokenizer.is_special(token)
    }


def _constraint(ask: ChatAsk, laid: Laid) -> Constraint | None:
    """What the whole output must match, thoughts and calls included."""
    wanted = ask.params.constraint
    forced = ask.mode is ToolMode.REQUIRED
    if wanted is None and not forced:
        return None
    thinking = None
    if ask.reasoning and (laid.opened or (laid.named and not laid.closed)):
        thinking = Thinking(laid.thoughts, laid.opened)
    writer = GrammarWriter(laid.form, laid.card.tokenizer.token_id)
    several = ask.parallel_calls and ask.tool is None
    if forced:
        tools = [tool for tool in ask.tools if ask.tool in (None, tool.name)]
        made = writer.calls(tools, "tool_choice", several=several, thinking=thinking)
    else:
        assert wanted is not None
        made = writer.answer(wanted, _offered(ask), several=several, thinking=thinking)
    return made if made is wanted else replace(made, parts=_parts(ask))


def _parts(ask: ChatAsk) -> tuple[Constraint, ...]:
    """What the client wrote of a constraint that is made of several."""
    wanted = () if ask.params.constraint is None else (ask.params.constraint,)
    parameters = (
        constraints.json_schema(schema_of(tool.parameters), f"tools.{number}.function.parameters")
        for number, tool in enumerate(_offered(ask))
        if ask.tool in (None, tool.name)
    )
    return (*wanted, *parameters)


def _reader(ask: ChatAsk, laid: Laid, marks: Mapping[str, int]) -> AnswerReader:
    splitter = ThoughtSplitter(laid.thoughts, laid.opened) if ask.reasoning else None
    schemas = {
        tool.name: tool.parameters for tool in _offered(ask) if ask.tool in (None, tool.name)
    }
    tools = None
    if schemas:
        limit = None if ask.parallel_calls and ask.tool is None else 1
        hidden = marks.keys() & set(laid.form.markers())
        forced = ask.mode is ToolMode.REQUIRED
        tools = ToolReader(laid.form, schemas, hidden=hidden, limit=limit, forced=forced)
    return AnswerReader(splitter, tools)


def _has_begun(ask: ChatAsk) -> bool:
    """Whether the last message is an answer that the model can go on with."""
    last = ask.messages[-1] if ask.messages else {}
    return last.get("role") == "assistant" and not last.get("tool_calls")


def _marked(last: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message with a mark behind its text, whose end is then found for sure.

    The text itself may be found in what closes the message, too: `<` or `end` in `<|im_end|>`.
    Raises _NotShownError if there is no text.
    """
    text = text_of(last["content"]).rstrip()
    if not text:
        raise _NotShownError
    marked: Any = text + _CUT
    if isinstance(last["content"], list):
        marked = [{"type": "text", "text": marked}]
    return {**last, "content": marked}


def _cut_behind(text: str, last: str) -> str:
    """A laid out conversation up to the end of its last message's text, which ends in the mark.

    Raises _NotShownError if it is not there.
    """
    at = text.rfind(last.strip())
    if at < 0:
        raise _NotShownError
    return text[: at + len(last.strip()) - len(_CUT)]


def _invalid(message: str, field: str) -> RequestError:
    return RequestError(Fault.VALIDATION, message, field)
