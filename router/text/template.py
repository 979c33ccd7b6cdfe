"""Chat templates: the model's own Jinja template, in a sandbox, with bounds.

The dialect is that of ``transformers.utils.chat_template_utils``: trimmed blocks, ``break`` and
``continue``, ``tojson`` without HTML escapes, ``raise_exception``, ``strftime_now`` and
``{% generation %}`` blocks, whose bounds matter in training only.

A template comes with the weights of a model, so it is not trusted: it cannot reach Python's
internals, cannot change the messages, and is stopped when it takes too long or makes too much
(``template_bounds.py``, ``template_compare.py``).
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from router.errors import Fault, RequestError
from router.text import template_bounds as bounds
from router.text import template_compare as compare

SOURCE_CHARS_MAX = 1 << 20
OUTPUT_CHARS_MAX = 1 << 23
RENDER_S_MAX = 2.0
TRY_S_MAX = 0.25
_RESERVED = frozenset({"messages", "bos_token", "eos_token"})


class ChatTemplate:
    """A compiled template with the model's special tokens.

    A template that cannot be compiled is reported when it is used: the model may still serve
    requests that need none.
    """

    def __init__(self, source: str, bos_token: str | None, eos_token: str | None) -> None:
        self.source = source
        tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._tokens = {name: text for name, text in tokens.items() if text is not None}
        self._template = self._compile()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any] | None = None,
        *,
        output_chars_max: int = OUTPUT_CHARS_MAX,
        seconds_max: float = RENDER_S_MAX,
    ) -> str:
        """Lays out a conversation as one prompt.

        ``variables`` are what the template may read beside the messages: ``tools``, ``documents``,
        ``add_generation_prompt`` (true unless given) and the model's own switches.

        Raises RequestError: VALIDATION for a variable that is not the caller's to set, TEMPLATE
        for everything that the template objects to, with its own words.
        """
        given = variables or {}
        for name in _RESERVED.intersection(given):
            raise RequestError(
                Fault.VALIDATION, f"the chat template variable `{name}` cannot be set", name
            )
        values: dict[str, Any] = {
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            **self._tokens,
            "messages": messages,
            **given,
        }
        if isinstance(self._template, RequestError):
            raise _fault(self._template.message)
        try:
            with bounds.bounded(seconds_max):
                return _join(self._template.generate(values), output_chars_max)
        except Exception as error:  # a template calls methods of the values it gets
            raise _fault(_line(error)) from error

    def try_out(self) -> None:
        """Finds out what the template can do, so that no request has to wait for it."""
        _ = self.takes_parts, self.takes_system, self.takes_systems
        _ = self.takes_tools, self.takes_calls, self.takes_arguments

    @cached_property
    def takes_parts(self) -> bool:
        """Whether a message's content may be a list of typed parts: tried out, not guessed."""
        shown = self._try(_asked([{"type": "text", "text": _PROBE}]))
        # A template that expects text writes the list down as Python would.
        listed = "'type': 'text'", '"type": "text"'
        return _PROBE in shown and not any(text in shown for text in listed)

    @cached_property
    def takes_system(self) -> bool:
        """Whether a conversation may begin with a system message."""
        return _PROBE in self._try(({"role": "system", "content": _PROBE}, *_asked("a")))

    @cached_property
    def takes_systems(self) -> bool:
        """Whether it may begin with two of them."""
        system = [{"role": "system", "content": text} for text in ("a", _PROBE)]
        return _PROBE in self._try((*system, *_asked("a")))

    @cached_property
    def takes_tools(self) -> bool:
        """Whether the model is shown the tools."""
        return _PROBE in self._try(_asked("a"), tools=[_tool(_PROBE)])

    @cached_property
    def takes_calls(self) -> bool:
        """Whether the model is shown the calls that it made; a few templates leave them out."""
        return any(_PROBE in self._try(_called(given)) for given in ({"a": 1}, '{"a": 1}'))

    @cached_property
    def takes_arguments(self) -> bool:
        """Whether calls may have their arguments as objects; a few templates expect JSON text."""
        return bool(self._try(_called({_PROBE: 1}))) or not self._try(_called('{"a": 1}'))

    def _try(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """What the template makes of a conversation; "" if it objects, with tools and without."""
        for more in ({}, {"tools": [_tool("f")]}):
            with suppress(RequestError):
                return self.render(messages, {**more, **variables}, seconds_max=TRY_S_MAX)
        return ""

    def _compile(self) -> "jinja2.Template | RequestError":
        if len(self.source) > SOURCE_CHARS_MAX:
            return _fault(f"the chat template is longer than {SOURCE_CHARS_MAX} characters")
        try:
            with bounds.bounded(RENDER_S_MAX):  # what is constant is computed now
                return _ENVIRONMENT.from_string(self.source)
        except Exception as error:  # noqa: BLE001 -- Python compiles it in its turn, with its limits
            return _fault(_line(error))


_PROBE = "probe_of_the_template"


def _tool(name: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {}, "required": []}
    function = {"name": name, "description": "", "parameters": parameters}
    return {"type": "function", "function": function}


def _asked(content: Any) -> tuple[dict[str, Any]]:
    return ({"role": "user", "content": content},)


def _called(arguments: Any) -> tuple[dict[str, Any], ...]:
    """A conversation in which a tool was called. The id is one that every template takes."""
    function = {"name": _PROBE, "arguments": arguments}
    call = {"id": "abcdefghi", "type": "function", "function": function}
    return (*_asked("a"), {"role": "assistant", "content": "", "tool_calls": [call]})


def _fault(message: str) -> RequestError:
    return RequestError(Fault.TEMPLATE, message, "messages")


def _line(error: Exception) -> str:
    """One line for a person. What the template itself says comes through as it is."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"the model's chat template is broken, line {error.lineno}: {error.message}"
    text = " ".join(str(error).split())
    if type(error) is jinja2.TemplateError or isinstance(error, bounds.BoundError):
        return text
    if isinstance(error, RecursionError | SyntaxError | MemoryError):
        return "the chat template nests too deeply"
    return f"the chat template cannot lay out these messages: {type(error).__name__}: {text}"


def _join(pieces: Iterator[str], chars_max: int) -> str:
    taken, size = [], 0
    for piece in pieces:
        size += len(piece)
        if size > chars_max:
            raise bounds.BoundError(f"the chat template gives more than {chars_max} characters")
        bounds.check_time()
        taken.append(piece)
    return "".join(taken)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with bounds on loops, calls, operators and filters."""

    intercepted_binops = frozenset({"*", "**", "+", "%", "//"})
    concat = staticmethod(bounds.joined)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return compare.in_loops(compare.AsFilters().visit(super()._parse(source, name, filename)))

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        args = bounds.check_call(obj, args, kwargs.values())
        return bounds.made(super().call(context, obj, *args, **kwargs))

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Measures what is hashed to find an item."""
        return super().getitem(obj, bounds.comparable(argument))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Refuses operators by which one short expression can fill the memory."""
        if operator == "+" and type(left) is str and type(right) is str:
            bounds.spend(len(left) + len(right))  # almost all there are: the shortest way
            return left + right
        bounds.check_operator(operator, left, right)
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """``{% generation %}...{% endgeneration %}``: the assistant's words. Nothing to do here."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    # Local time without a zone, as transformers gives it: models were trained on that.
    return datetime.now().strftime(pattern)  # noqa: DTZ005 - see above


def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
        cache_size=0,
        finalize=bounds.finalize,
    )
    own: dict[str, Callable[..., Any]] = {"tojson": _to_json}
    environment.filters = {**bounds.filters(own), **compare.filters()}
    environment.tests = compare.tests()
    del environment.globals["lipsum"]
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment


_ENVIRONMENT = _environment()
