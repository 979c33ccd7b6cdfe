"""Compiles a constraint once in a process of its own, to see whether it can be compiled at all.

llguidance bounds most of what a constraint can cost, but not all: a chain of thousands of rules
overflows its stack, and intersections of a few dozen regular expressions take for ever. Neither may
happen in a worker, so each new constraint is compiled here first, where the operating system ends
what takes too long. This file is run as a program: one line of JSON in, ``{"kind", "text"}``, one
line out, ``{"grammar"}`` as ``LLMatcher`` takes it, or ``{"error"}`` in one line. The very first
line in is ``{"vocab_size", "ends", "special"}``, of the model; that out is empty, ``{}``.
"""

import json
import re
import resource
import signal
import string
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

CPU_S = 5
"""Seconds of processor time that one constraint may take."""
ALARM_S = 60
"""Seconds after which a check ends whatever the machine does otherwise."""
MEMORY_BYTES = 4 << 30
STACK_BYTES = 4 << 20
"""Less than the threads of the worker have that compile what passed here."""
# One space, or a new line with its indentation: what models were trained on. The compiler's own
# default has no bound, and a small model can go on with it for ever.
_SPACES: "JsonCompileOptions" = {"whitespace_pattern": r" |\n {0,24}"}
# Where the compiler lets the pattern repeat itself, as some releases do: always the same spaces.
_FIXED: "JsonCompileOptions" = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}
ERROR_CHARS_MAX = 400
# Attempts to find the part of a schema that is at fault.
PARTS_MAX = 200
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_SINGLES = ("items", "additionalProperties", "additionalItems", "contains", "propertyNames", "not")
_NAMED = {9: r"\t", 10: r"\n", 13: r"\r"}
# Characters without a meaning of their own within quotes or brackets.
_PLAIN = frozenset(string.ascii_letters + string.digits + " !#$%&'()*+,./:;<=>?@_`{|}~")
_WORDS = {
    "NoExtensionBias": "no text can match it",
    "lexer error: too many expressions constructed": "it is too large or has too many repetitions",
}
# What is said of a bound that was reached.
_COSTS = ("too many", "too big", "fuel", "limit", "max is")
_GBNF = re.compile(r"^[\w-]+\s*::=", re.MULTILINE)


def limits() -> LLParserLimits:
    """What compiling, and one step of a sequence, may cost.

    The bounds on the lexer are a fifth of llguidance's own: with those a step of a hostile pattern
    took 1.4 s, with these 0.1 s. One row may have more items: a schema with 500 optional properties
    needs 2,000.
    """
    return LLParserLimits(
        initial_lexer_fuel=200_000,
        step_lexer_fuel=50_000,
        step_max_items=50_000,
        max_items_in_row=10_000,
        max_lexer_states=20_000,
        verbose_errors=False,
    )


def grammar_of(kind: str, text: str) -> str:
    """The constraint as ``LLMatcher`` takes it. Raises ``ValueError``, ``RecursionError``."""
    if kind == "json_schema":
        return _json_grammar(text)
    if kind == "regex":
        if (len(text) - len(text.rstrip("\\"))) % 2:
            raise ValueError("it ends in the middle of an escape")
        # As in JSON schemas and most tools, \d is 0 to 9, and not the digits of all scripts.
        return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(text, 'd')}/")
    return LLMatcher.grammar_from_lark(_converted(text) if _GBNF.search(text) else _spaced(text))


@cache
def json_options() -> "JsonCompileOptions":
    """What white space there may be between the tokens of JSON, unless a schema says so itself."""
    tokenizer = LLTokenizer(_Bytes(257, [256], {256: "<end>"}))  # type: ignore[arg-type]
    grammar = LLMatcher.grammar_from_json_schema('{"type":"object"}', defaults=_SPACES)
    repeats = LLMatcher(tokenizer, grammar, log_level=0).try_consume_tokens(list(b"{  ")) == 3
    return _FIXED if repeats else _SPACES


def _json_grammar(text: str) -> str:
    schema = json.loads(text)
    if schema is False:
        raise ValueError("no text can match it: the schema is false")
    if schema is True:
        schema = {}
    elif not isinstance(schema, dict):
        raise ValueError("it is no JSON schema: an object or a boolean")
    # The compiler's own extension, by which a client may choose white space and separators.
    own = schema.get("x-guidance")
    chosen = isinstance(own, dict) and any(key.startswith("whitespace_") for key in own)
    options = None if chosen else json_options()
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=options)


def _spaced(text: str) -> str:
    """The grammar with our bound on white space in each JSON schema that it embeds."""
    decoder, done, at, end = json.JSONDecoder(), [], 0, 0
    for found in re.finditer(r"%json\s*(?=\{)", text):
        start = found.end()
        line = text[text.rfind("\n", 0, found.start()) + 1 : found.start()]
        if start < end or line.replace('\\"', "").count('"') % 2:
            continue  # within a schema, or within a string
        try:
            schema, end = decoder.raw_decode(text, start)
        except ValueError:
            continue  # the compiler says what is wrong with it
        if "x-guidance" not in schema:
            own = f'"x-guidance":{json.dumps(json_options())}'
            done += [text[at : start + 1], own, "," if schema else ""]
            at = start + 1
    return "".join((*done, text[at:]))


def _converted(text: str) -> str:
    """Lark for a grammar in llama.cpp's GBNF."""
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return gbnf_to_lark(_escapes(text))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except Exception as error:
        raise ValueError(f"as GBNF: {error}") from error


def _escapes(text: str) -> str:
    """Escapes by number as the characters that they mean, which the conversion garbles.

    What has a meaning of its own in GBNF or Lark, and what is no character, stays as it is.
    """

    def put(found: re.Match[str]) -> str:
        code = int(found[1] or found[2] or found[3], 16)
        if code in _NAMED:
            return _NAMED[code]
        if code >= 0x110000 or 0xD800 <= code < 0xE000:
            return found[0]
        return chr(code) if code >= 0x80 or chr(code) in _PLAIN else found[0]

    return re.sub(r"\\x([0-9A-Fa-f]{2})|\\u([0-9A-Fa-f]{4})|\\U([0-9A-Fa-f]{8})", put, text)


def one_line(error: str, kind: str) -> str:
    """What the compiler says of a constraint, in one line that says where."""
    lines = error.replace("<non-verbose/>", "").strip().splitlines() or ["it cannot be compiled"]
    place = re.match(r"(?:at )?(\d+)\((\d+)\): ", lines[0])
    told = lines[0][place.end() :] if place else lines[0]
    inner = next((line[7:] for line in lines if line.startswith("error: ")), "")
    carets = next((line for line in lines if line.strip() and not line.strip(" ^")), "")
    if inner and carets:
        told = f"{inner} (at character {carets.index('^') - 3} of the pattern)"
    if kind == "regex":
        told = told.rpartition(" (in regex): ")[2]
    elif kind == "lark" and place:
        told = f"line {place[1]}, column {place[2]}: {told}"
    told = " ".join(_WORDS.get(told, told).split())
    return told if len(told) <= ERROR_CHARS_MAX else told[:ERROR_CHARS_MAX] + "…"


def is_cost(error: str) -> bool:
    """Whether the compiler speaks of a bound that was reached."""
    return any(word in error for word in _COSTS)


class Checker:
    """Compiles constraints for a tokenizer of single bytes: what is wrong with one shows there.

    Grammars may name special tokens, and any by its number, so these are as in the model:
    ``special`` are names by number, as JSON has them, ``ends`` numbers.
    """

    def __init__(self, vocab_size: int, ends: Sequence[int], special: Mapping[str, str]) -> None:
        made = _Bytes(vocab_size, ends, {int(token): name for token, name in special.items()})
        self._tokenizer = LLTokenizer(made)  # type: ignore[arg-type]
        self._ends = ends
        self._limits = limits()

    def check(self, kind: str, text: str) -> dict[str, str]:
        """The line that answers a request."""
        try:
            grammar = grammar_of(kind, text)
        except RecursionError:
            return {"error": "it is nested too deeply"}
        except ValueError as error:
            return {"error": one_line(str(error), kind)}
        fault = self._fault(grammar)
        if not fault:
            return {"grammar": grammar}
        told = one_line(fault, kind)
        return {"error": f"{told}{self._where(text, fault)}" if kind == "json_schema" else told}

    def _fault(self, grammar: str) -> str:
        """What is wrong with a grammar, or an empty text."""
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        if matcher.is_error():
            return matcher.get_error()
        allowed = int.from_bytes(matcher.compute_bitmask(), "little")
        if matcher.is_error():
            return matcher.get_error()
        first = (allowed & -allowed).bit_length() - 1
        if first >= 0 and first not in self._ends:
            # Some patterns only show what they cost once they have begun to match.
            matcher.consume_token(first)
            matcher.compute_bitmask()
        fault = matcher.get_error()
        return fault if is_cost(fault) else ""

    def _where(self, text: str, fault: str) -> str:
        """Which part of a schema is at fault: the smallest that alone fails with the same words."""
        root = json.loads(text)
        shared = {key: root[key] for key in ("$defs", "definitions") if key in root}
        pointer, part, tries = "#", root, 0
        while True:
            for path, child in _parts(part):
                tries += 1
                alone = {**shared, **child}
                if tries > PARTS_MAX:
                    return f" (in {pointer})"
                if alone != part and self._fault_of_schema(alone) == fault and child != root:
                    pointer, part = pointer + path, child
                    break
            else:
                return f" (at {pointer})"

    def _fault_of_schema(self, schema: dict[str, Any]) -> str:
        return self._fault(grammar_of("json_schema", json.dumps(schema)))


def _parts(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The schemas right inside a schema, each with its path from there."""
    for key in _MAPS:
        if isinstance(schema.get(key), dict):
            for name, child in schema[key].items():
                if isinstance(child, dict):
                    yield f"/{key}/{name.replace('~', '~0').replace('/', '~1')}", child
    for key in _LISTS:
        if isinstance(schema.get(key), list):
            for number, child in enumerate(schema[key]):
                if isinstance(child, dict):
                    yield f"/{key}/{number}", child
    for key in _SINGLES:
        child = schema.get(key)
        if isinstance(child, dict):
            yield f"/{key}", child


class _Bytes:
    """A tokenizer as llguidance wants it: special tokens, and one for each byte."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocab_size: int, ends: Sequence[int], special: Mapping[int, str]) -> None:
        self.eos_token_id = ends[0]
        self.special_token_ids = list(special)
        size = max(vocab_size, 256 + len(special))
        self.tokens = [special.get(token, "").encode() for token in range(size)]
        free = (token for token in range(size) if token not in special)
        self._of_byte = dict(zip(range(256), free, strict=False))
        for byte, token in self._of_byte.items():
            self.tokens[token] = bytes((byte,))

    def __call__(self, text: bytes | str) -> list[int]:
        given = text if isinstance(text, bytes) else text.encode()
        return [self._of_byte[byte] for byte in given]


def _serve() -> None:
    checker = Checker(**json.loads(sys.stdin.readline()))
    sys.stdout.write("{}\n")  # ready
    sys.stdout.flush()
    for line in sys.stdin:
        signal.alarm(ALARM_S)
        used = resource.getrusage(resource.RUSAGE_SELF)
        spent = int(used.ru_utime + used.ru_stime) + 1
        _limit(resource.RLIMIT_CPU, spent + CPU_S)
        request = json.loads(line)
        answer = checker.check(request["kind"], request["text"])
        signal.alarm(0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _limit(kind: int, most: int) -> None:
    """Lowers a limit of this process, or raises it again as far as that is allowed."""
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def main() -> None:
    """Answers until the input ends. What breaks a bound ends the process by a signal."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's: the worker ends us in its own time
    _limit(resource.RLIMIT_CORE, 0)
    if sys.platform == "linux":
        _limit(resource.RLIMIT_AS, MEMORY_BYTES)
    threading.stack_size(STACK_BYTES)
    served = threading.Thread(target=_serve)
    served.start()
    served.join()


if __name__ == "__main__":
    main()
