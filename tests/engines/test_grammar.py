"""Compiling constraints: what is refused and where, what is kept, what must not harm a worker."""

import gc
import json
import os
import threading
import time
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest

from shards import grammar_masks, grammar_probe
from shards.allowed import GuideError, members
from shards.engines import load
from shards.engines.base import Constraint, ConstraintKind, Engine, EngineLost, EngineOptions
from shards.grammar import KEPT_MAX, ConstraintError, Grammar, TokenizerError, grammar_for
from shards.grammar_masks import Masks

NAMES = ["".join(letters) for letters in product("abcdefghijklmnopqrstuvwxyz", repeat=3)]
# Some releases of the compiler cannot bound white space that may vary.
LOOSE = "whitespace_pattern" in grammar_probe.json_options()


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load("scripted", EngineOptions(None, "m", 4096, 8, 256), lambda _fraction: None)


@pytest.fixture(scope="module")
def grammar(engine: Engine) -> Iterator[Grammar]:
    made = grammar_for(engine, engine.tokenizer_files())
    yield made
    made.close()


def schema(**entries: Any) -> Constraint:
    return Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(entries))


def regex(pattern: str) -> Constraint:
    return Constraint(ConstraintKind.REGEX, pattern)


def lark(text: str) -> Constraint:
    return Constraint(ConstraintKind.LARK, text)


REFUSED = {
    "unknown keyword": (
        schema(properties={"a/b": {"anyOf": [{}, {"uniqueItems": True}]}}),
        ["uniqueItems", "#/properties/a~1b/anyOf/1"],
    ),
    "inside a definition": (
        schema(**{"$defs": {"d": {"items": {"not": {}}}}, "$ref": "#/$defs/d"}),
        ['"not"', "(at #/$defs/d/items)"],
    ),
    "unknown type": (schema(type="thing"), ["thing", "(at #)"]),
    "no such definition": (schema(items={"$ref": "#/$defs/x"}), ["/$defs/x", "#/items"]),
    "pattern": (
        schema(properties={"a": {"type": "string", "pattern": "ab(?=c)"}}),
        ["look-ahead", "character 3", "#/properties/a"],
    ),
    "nothing is valid": (schema(type="integer", minimum=3, maximum=1), ["minimum", "maximum"]),
    "no JSON": (Constraint(ConstraintKind.JSON_SCHEMA, "{"), ["line 1 column 2"]),
    "false": (Constraint(ConstraintKind.JSON_SCHEMA, "false"), ["the schema is false"]),
    "no schema": (Constraint(ConstraintKind.JSON_SCHEMA, "[1]"), ["an object or a boolean"]),
    "regex": (regex("ab["), ["unclosed", "character 3"]),
    "backreference": (regex(r"(a)\1"), ["backreferences", "character 4"]),
    "anchor inside": (regex("a^b"), ["lookarounds"]),
    "escape": (regex("ab\\"), ["escape"]),
    "unknown rule": (lark("start: a\na: b"), ["line 2, column 4", '"b"']),
    "no start": (lark('a: "b"'), ["start"]),
    "syntax": (lark('start: "a'), ["line 1"]),
    "no text": (lark("start: start"), ["no text"]),
    "GBNF": (lark('root ::= "a" ('), ["GBNF", "line 1"]),
    "nested GBNF": (lark("root ::= " + "(" * 9000 + '"a"' + ")" * 9000), ["nested"]),
    "long": (regex("a" * (256 * 1024 + 1)), ["bytes"]),
    # What llguidance itself has no bound for: these would end or hold up the process.
    "chain of rules": (
        lark(
            "start: r0\n"
            + "".join(f"r{n}: r{n + 1} r{n + 1}\n" for n in range(9000))
            + 'r9000: "a"'
        ),
        ["nested too deeply"],
    ),
    "chain of references": (
        schema(
            **{
                "$ref": "#/$defs/d0",
                "$defs": {f"d{n}": {"items": {"$ref": f"#/$defs/d{n + 1}"}} for n in range(5000)}
                | {"d5000": {}},
            }
        ),
        ["nested too deeply"],
    ),
    "repetitions": (regex("(a{1000}){1000}"), ["repetitions"]),
    "repetitions later": (regex("x(a{1000}){1000}"), ["repetitions"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_says_what_cannot_be_compiled_and_where(grammar: Grammar, case: str) -> None:
    constraint, words = REFUSED[case]
    with pytest.raises(ConstraintError) as caught:
        grammar.matcher(constraint)
    told = str(caught.value)
    assert all(word in told for word in words), told
    assert "\n" not in told
    assert len(told) < 600


def test_what_never_ends_is_ended(grammar: Grammar, monkeypatch: pytest.MonkeyPatch) -> None:
    endless = lark("start: A\nA: " + " & ".join(f"/(.*{name}.*)/" for name in NAMES[:300]))
    began = time.process_time()
    with pytest.raises(ConstraintError, match=r"more than 5 s|too long"):
        grammar.matcher(endless)
    assert time.process_time() - began < 2, "the work was done in this process"
    # The next one finds a new process; and the refusal is remembered.
    grammar.matcher(regex("after the endless one"))
    monkeypatch.setattr(grammar, "_compile", None)
    with pytest.raises(ConstraintError):
        grammar.matcher(endless)


def test_a_process_that_was_ended_while_it_waited_harms_nobody(engine: Engine) -> None:
    grammar = grammar_for(engine, engine.tokenizer_files())
    grammar.matcher(regex("one"))
    (probe,) = grammar._probes._idle
    probe._process.kill()
    probe._process.wait()
    assert grammar.matcher(regex("two"))
    assert grammar._probes._idle != [probe]
    grammar.close()


def test_keeps_what_was_used_lately(engine: Engine) -> None:
    grammar = grammar_for(engine, engine.tokenizer_files())
    compiled: list[Constraint] = []
    honest = grammar._compile
    grammar._compile = lambda constraint: compiled.append(constraint) or honest(constraint)  # type: ignore[method-assign,func-returns-value]
    first = regex("first")
    for number in range(KEPT_MAX + 1):
        grammar.matcher(regex(f"number {number}"))
        grammar.matcher(first)
    assert compiled.count(first) == 1
    assert grammar.knows(first)
    assert not grammar.knows(regex("number 0"))
    assert grammar.knows(regex("number 1")) is False or len(grammar._kept) == KEPT_MAX
    grammar.close()


def test_matchers_of_one_constraint_are_independent(grammar: Grammar) -> None:
    one, other = (grammar.matcher(regex("[ab]c")) for _ in range(2))
    assert one.consume_token(ord_token(grammar, "a"))
    assert one.compute_bitmask() != other.compute_bitmask()


def ord_token(grammar: Grammar, char: str) -> int:
    (token,) = grammar._tokenizer.tokenize_str(char)
    return token


def allowed_texts(engine: Engine, constraint: Constraint) -> set[str]:
    masks = Masks()
    guide = masks.guide(constraint, engine)
    masks.begin([Row(guide)])
    tokenizer = masks.grammar._tokenizer  # type: ignore[union-attr]
    return {tokenizer.decode_str([int(token)]) for token in members(guide.allowed())}


class Row:
    def __init__(self, guide: Any, tokens: tuple[int, ...] = (1, 2), prompt_len: int = 2) -> None:
        self.guide, self.tokens, self.prompt_len = guide, list(tokens), prompt_len


def test_digits_are_those_of_ascii(engine: Engine) -> None:
    assert allowed_texts(engine, regex(r"\d")) == set("0123456789")


def test_gbnf_is_converted_with_its_escapes(engine: Engine) -> None:
    text = 'root ::= first "\\u00e9"\nfirst ::= [x-z] | "\\U0001F682" | "\\x21"\n'
    grammar = grammar_for(engine, engine.tokenizer_files())
    for answer, whole in (("xé", True), ("🚂é", True), ("!é", True), ("aé", False), ("x", False)):
        matcher = grammar.matcher(lark(text))
        tokens = grammar._tokenizer.tokenize_str(answer)
        assert (
            matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()
        ) is whole
    grammar.close()


def test_special_tokens_are_known_by_name_and_number(engine: Engine) -> None:
    """Also to the process that checks, which has a tokenizer of its own."""
    vocab = engine.describe().vocab_size
    grammar = grammar_for(engine, engine.tokenizer_files())
    (start,) = grammar._tokenizer.tokenize_str("<|im_start|>", parse_special=True)
    for text in ("start: <|im_start|>", f"start: <[{start}]>", f"start: <[{start}-{vocab - 1}]>"):
        assert grammar.matcher(lark(text)).consume_token(start)
    for text in ("start: <|nothing|>", f"start: <[{vocab}]>"):
        with pytest.raises(ConstraintError, match="line 1, column 8"):
            grammar.matcher(lark(text))
    grammar.close()


def test_white_space_between_json_tokens_is_bounded(engine: Engine) -> None:
    grammar = grammar_for(engine, engine.tokenizer_files())

    def fits(text: str, **more: Any) -> bool:
        matcher = grammar.matcher(schema(properties={"a": {"type": "integer"}}, **more))
        tokens = grammar._tokenizer.tokenize_str(text)
        return matcher.try_consume_tokens(tokens) == len(tokens)

    assert fits('{"a": 1}')
    grammar.matcher(Constraint(ConstraintKind.JSON_SCHEMA, "true"))
    if LOOSE:
        assert fits('{"a":1}')
        assert fits('{ "a": 1 }')
        assert fits('{\n  "a": 1\n}')
    assert not fits(' {"a":1}')
    assert not fits('{"a":1} ')
    assert not fits('{  "a"')
    assert not fits("{\n\n")
    assert not fits("{\n" + " " * 25)
    # A client may choose for itself; it is its own answer.
    assert not fits('{ "a": 1 }', **{"x-guidance": {"whitespace_flexible": False}})
    grammar.close()


@pytest.mark.parametrize(
    ("text", "good", "bad"),
    [
        ('start: "x" %json {"type": "object"} "y"', 'x{"a": 1}y', "x{  "),
        ('start: %json {} | b\nb: %json\n{"type": "array"}', '[1, "%json {"]', "[\n\n"),
        ('start: "%json {}"', "%json {}", '%json {"'),
        ('start: %json {"x-guidance": {"whitespace_flexible": true}}', "[  1  ]", "]"),
    ],
)
def test_white_space_is_bounded_in_schemas_within_grammars_too(
    engine: Engine, text: str, good: str, bad: str
) -> None:
    grammar = grammar_for(engine, engine.tokenizer_files())
    for answer, fits in ((good, True), (bad, False)):
        tokens = grammar._tokenizer.tokenize_str(answer)
        assert (grammar.matcher(lark(text)).try_consume_tokens(tokens) == len(tokens)) is fits
    grammar.close()


def test_a_tokenizer_that_cannot_be_used_is_told_in_one_line() -> None:
    with pytest.raises(TokenizerError) as caught:
        Grammar('{"model": {}}', 10, (1,))
    assert "\n" not in str(caught.value)


def test_every_end_of_the_model_ends_an_answer(engine: Engine) -> None:
    files, info = engine.tokenizer_files(), engine.describe()
    ends = (info.eos_token_ids[0], info.eos_token_ids[0] - 1)
    grammar = Grammar(files["tokenizer.json"].decode(), info.vocab_size, ends)
    masks = Masks()
    masks.grammar = grammar
    guide = masks.guide(regex("a"), engine)
    row = Row(guide)
    for drawn in ([ord_token(grammar, "a")], [ends[1]], [ends[0]], [ends[1]]):
        row.tokens += drawn
        masks.begin([row])
        assert set(members(guide.allowed()).tolist()) == set(ends)
    grammar.close()


def test_what_becomes_too_expensive_fails_and_says_so(engine: Engine) -> None:
    """Its start is cheap, so it can be compiled."""
    masks = Masks()
    guide = masks.guide(regex("(x{0,9}y){40}(a{300}){300}"), engine)
    row = Row(guide)
    assert not guide.fault

    def follow(text: str) -> None:
        for char in text:
            row.tokens.append(ord_token(masks.grammar, char))  # type: ignore[arg-type]
            masks.begin([row])
            guide.allowed()

    follow("xy" * 40)
    with pytest.raises(GuideError, match="too expensive"):
        follow("a" * 400)


# --- masks that do not come to an end


class Endless:
    """A matcher whose mask does not come until it is let go."""

    def __init__(self) -> None:
        self.gate = threading.Event()

    def is_stopped(self) -> bool:
        return False

    def consume_tokens(self, _tokens: list[int]) -> bool:
        return True

    def unsafe_compute_mask_ptr(self, _pointer: int, _size: int) -> None:
        self.gate.wait(30)

    def is_error(self) -> bool:
        return False


def hang(masks: Masks, engine: Engine) -> tuple[Row, Endless]:
    row = Row(masks.guide(regex("a"), engine))
    row.guide._matcher = endless = Endless()
    return row, endless


def test_one_endless_mask_fails_and_the_others_come(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_masks, "MASK_S", 0.2)
    masks = Masks()
    before, after = (Row(masks.guide(regex("b"), engine)) for _ in range(2))
    row, endless = hang(masks, engine)
    rows = [before, row, after]
    masks.begin(rows)
    assert len(members(after.guide.allowed())) == 1
    assert len(members(before.guide.allowed())) == 1
    with pytest.raises(GuideError, match=r"0\.2 s"):
        row.guide.allowed()
    endless.gate.set()
    for other in (before, after):
        other.tokens.append(ord_token(masks.grammar, "b"))  # type: ignore[arg-type]
    masks.begin([before, after])
    assert all(len(members(other.guide.allowed())) == 1 for other in (before, after))
    assert row.guide.fault


def test_too_many_endless_masks_lose_the_engine(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_masks, "MASK_S", 0.05)
    masks = Masks()
    gates = []
    for _ in range(grammar_masks.STUCK_MAX):
        row, endless = hang(masks, engine)
        gates.append(endless.gate)
        masks.begin([row])
        with pytest.raises(GuideError):
            row.guide.allowed()
    row, endless = hang(masks, engine)
    gates.append(endless.gate)
    masks.begin([row])
    with pytest.raises(EngineLost, match="do not come to an end"):
        row.guide.allowed()
    for gate in gates:
        gate.set()


def test_threads_and_processes_end_with_their_owners(engine: Engine) -> None:
    masks = Masks()
    guide = masks.guide(regex("ab"), engine)
    masks.begin([Row(guide)])
    guide.allowed()
    assert masks._worker is not None
    assert masks.grammar is not None
    thread = masks._worker.thread
    (probe,) = masks.grammar._probes._idle
    pid = probe._process.pid
    del masks, guide, probe
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_check_allows_less_stack_than_the_worker_has() -> None:
    from shards.grammar import STACK_BYTES

    assert grammar_probe.STACK_BYTES * 2 <= STACK_BYTES


@pytest.mark.parametrize("words", [[0, 0], [1, 0], [0, 0x80000000], [0xFFFFFFFF, 5]])
def test_members_are_the_bits_that_are_set(words: list[int]) -> None:
    found = members(np.array(words, np.uint32)).tolist()
    assert found == [n for n in range(64) if words[n // 32] >> (n % 32) & 1]
