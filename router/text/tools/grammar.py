"""Grammars that force tool calls in a model's own format, or let calls and thoughts beside text.

In llguidance's dialect of Lark (github.com/guidance-ai/llguidance, ``docs/syntax.md``): ``%json``
holds a JSON schema, ``<[7]>`` is the token 7. A tool's schema has a rule to itself, so that what it
refers to (``#/$defs/...``) stays where it is.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from router.ask import Constraint, ConstraintKind
from router.conversation import Tool
from router.errors import Fault, RequestError
from router.text import constraints
from router.text.reasoning import Thoughts
from router.text.tools.formats import MISTRAL_ID_CHARS, ToolFormat
from router.text.tools.rules import literal, schema_rule, tag_rules

CALLS_MAX = 16
"""Calls that a forced answer can have: a small model might never see a reason to end."""
TokenOf = Callable[[str], int | None]
"""The id of a text that is one token by itself, or None."""

_START = re.compile(r"^start(?=\s*[:\[])", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Thinking:
    """That an answer may begin with thoughts, or does because the prompt has ``opened`` them."""

    markers: Thoughts
    opened: bool


class GrammarWriter:
    """Writes the grammars of one model."""

    def __init__(self, form: ToolFormat, token_of: TokenOf) -> None:
        self._form = form
        self._token_of = token_of

    def calls(
        self, tools: Sequence[Tool], field: str, *, several: bool, thinking: Thinking | None
    ) -> Constraint:
        """Calls and nothing else: one, or with ``several`` up to CALLS_MAX.

        Raises RequestError, VALIDATION, if all schemas together are too large.
        """
        rules = [self._start("calls", thinking), *self._calls(tools, several=several)]
        return constraints.grammar("\n".join(rules) + "\n", field)

    def answer(
        self,
        wanted: Constraint,
        tools: Sequence[Tool],
        *,
        several: bool,
        thinking: Thinking | None,
    ) -> Constraint:
        """A constrained text, with thoughts before it or calls instead of it.

        Raises RequestError, UNSUPPORTED, if the two cannot be told apart.
        """
        if not tools and thinking is None:
            return wanted
        rules = [self._start("answer | calls" if tools else "answer", thinking), _answer(wanted)]
        if tools:
            self._check_apart(wanted)
            rules += self._calls(tools, several=several, marked=True)
        return constraints.grammar("\n".join(rules) + "\n", wanted.field)

    def _start(self, what: str, thinking: Thinking | None) -> str:
        if thinking is None:
            return f"start: {what}"
        opener, closer = thinking.markers.opener, thinking.markers.closer
        token = self._token_of(closer)
        end = "thought" if token is None else f"/(?s:.*)/ <[{token}]>"
        rules = [f"start: thoughts ({what})" if thinking.opened else f"start: thoughts? ({what})"]
        head = "" if thinking.opened else f"{self._terms(opener)} "
        rules.append(f"thoughts: {head}{end} /\\s{{0,2}}/")
        if token is None:
            rules.append(f"thought[suffix={literal(closer)}]: /(?s:.*)/")
        return "\n".join(rules)

    def _calls(self, tools: Sequence[Tool], *, several: bool, marked: bool = False) -> list[str]:
        """The rule ``calls`` and those that it needs; ``marked`` calls begin as no object does."""
        numbers = range(len(tools))
        rules = [
            f"calls: {self._sequence(several=several and self._form.several, marked=marked)}",
            "call: " + " | ".join(f"call{number}" for number in numbers),
        ]
        if self._form.tags:
            return [
                *rules,
                *(rule for number in numbers for rule in tag_rules(tools[number], number)),
            ]
        rules += [f"call{number}: {self._call(tools[number], number)}" for number in numbers]
        rules += [
            f"arguments{number}: {schema_rule(tools[number].parameters)}" for number in numbers
        ]
        return rules

    def _sequence(self, *, several: bool, marked: bool) -> str:
        form = self._form
        opener, more = self._terms(form.opener), CALLS_MAX - 1
        if form.tagged:
            return f"({opener} call){{1,{CALLS_MAX if several else 1}}}"
        if form.closer:
            one = f'{opener} "\\n" call "\\n" {self._terms(form.closer)}'
            return f"{one} ({literal(form.separator)} {one}){{0,{more}}}" if several else one
        rest = f" ({literal(form.separator)} call){{0,{more}}}" if several else ""
        listed = f'"[" call{rest} "]"'
        if not form.bare:
            return f'{opener} " "? {listed}'
        if marked:
            return f"{opener} call" if form.opener else listed
        return f"call | {listed}" if several else "call"

    def _call(self, tool: Tool, number: int) -> str:
        if self._form.tagged:
            middle = self._terms("[ARGS]")
            if self._form.numbered:
                given = f"/[a-zA-Z0-9]{{{MISTRAL_ID_CHARS}}}/"
                middle = f"{self._terms('[CALL_ID]')} {given} {middle}"
            return f"{literal(tool.name)} {middle} arguments{number}"
        name = json.dumps(tool.name, ensure_ascii=False)
        head = f'{{"name": {name}, "{self._form.key}": '
        return f'{literal(head)} arguments{number} "}}"'

    def _terms(self, marker: str) -> str:
        """A marker: the token that it is, or else its text."""
        token = self._token_of(marker)
        return literal(marker) if token is None else f"<[{token}]>"

    def _check_apart(self, wanted: Constraint) -> None:
        """Calls without a marker are told from an answer by their first character alone."""
        if self._form.opener:
            return
        if wanted.kind is ConstraintKind.JSON_SCHEMA:
            schema = json.loads(wanted.text)
            if isinstance(schema, dict) and schema.get("type") == "object":
                return
        raise RequestError(
            Fault.UNSUPPORTED,
            f"this model can have tools together with `{wanted.field}` only if that is a JSON"
            " schema of an object: leave one of them out, or set tool_choice",
            wanted.field,
        )


def _answer(wanted: Constraint) -> str:
    """The rule ``answer``, and those that it needs."""
    match wanted.kind:
        case ConstraintKind.JSON_SCHEMA:
            schema = json.loads(wanted.text)
            if not isinstance(schema, dict):
                schema = {} if schema else {"not": {}}
            return f"answer: %json {json.dumps(schema, ensure_ascii=False)}"
        case ConstraintKind.REGEX:
            return f"answer: ANSWER\nANSWER: {_regex(wanted.text)}"
        case ConstraintKind.LARK:
            # Names the grammar's own start otherwise; one that names it elsewhere, or is no Lark
            # at all, cannot be made part of another.
            text, found = _START.subn("answer", wanted.text)
            if found == 1 and len(re.findall(r"\bstart\b", wanted.text)) == 1:
                return text
    raise RequestError(
        Fault.UNSUPPORTED,
        f"`{wanted.field}` cannot be used together with tools or with a model's thoughts: write it"
        " in Lark with a rule `start` that no other rule names, or leave the tools out",
        wanted.field,
    )


def _regex(pattern: str) -> str:
    """A regular expression between slashes."""
    escaped = re.sub(r"\\.|/", lambda m: r"\/" if m[0] == "/" else m[0], pattern, flags=re.DOTALL)
    return "/" + escaped.replace("\n", r"\n") + "/"
