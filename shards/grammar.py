"""Constraints compiled for one model: what of each is kept, and what may be asked of the compiler.

A ``Grammar`` holds llguidance's view of the model's tokenizer, and the constraints that were
compiled for it. Compiling is a function of the constraint: what is kept changes nothing but time.
Each new constraint goes through a process of its own first (``grammar_probe``): one that cannot be
compiled, or not within bounds, costs that process and not the worker.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from llguidance import LLMatcher, LLTokenizer

from shards import grammar_probe
from shards.engines.base import Constraint, Engine

TOKENIZER = "tokenizer.json"
FEATURE = "grammar"
KEPT_MAX = 256
"""Constraints that are kept, refused ones among them; the one that was used least lately goes."""
TEXT_BYTES_MAX = 256 * 1024
"""As the router has it (``router/text/constraints.py``)."""
READY_S = 60.0
CHECK_S = 30.0
"""Seconds that a check may take; its process ends itself much sooner on a machine that is idle."""
PROBES_IDLE_MAX = 2
STACK_BYTES = 16 << 20
_stack_lock = threading.Lock()


class ConstraintError(Exception):
    """A constraint cannot be compiled; the text says in one line what is wrong, and where."""


class TokenizerError(Exception):
    """llguidance cannot work with the model's tokenizer; the text is one line."""


class Grammar:
    """The compiler for one model. May be used by several threads.

    ``tokenizer`` is the text of its ``tokenizer.json``, ``vocab_size`` the width of its logits.
    Loading takes up to some seconds during which no other thread of the process runs. Raises
    ``TokenizerError``.
    """

    def __init__(self, tokenizer: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        ends = [token for token in eos_token_ids if token < vocab_size]
        try:
            self._tokenizer = LLTokenizer(tokenizer, n_vocab=vocab_size, eos_token=ends)
        except Exception as error:
            raise TokenizerError(" ".join(str(error).split())) from error
        self.vocab_size = vocab_size
        self._limits = grammar_probe.limits()
        self._kept: OrderedDict[Constraint, LLMatcher | ConstraintError] = OrderedDict()
        self._lock = threading.Lock()
        special = [token for token in range(vocab_size) if self._tokenizer.is_special_token(token)]
        names = {str(token): self._tokenizer.decode_str([token]) for token in special}
        self._probes = _Probes({"vocab_size": vocab_size, "ends": ends, "special": names})

    def close(self) -> None:
        """Ends the processes that check constraints."""
        self._probes.close()

    def knows(self, constraint: Constraint) -> bool:
        """Whether the constraint is kept, so that ``matcher`` answers at once."""
        with self._lock:
            return constraint in self._kept

    def matcher(self, constraint: Constraint) -> LLMatcher:
        """A matcher at its start, for one sequence. Raises ``ConstraintError``.

        Compiles the constraint if it is not kept, which may take seconds; ``OSError`` says that the
        process for that could not be started.
        """
        with self._lock:
            found = self._kept.get(constraint)
            if found is not None:
                self._kept.move_to_end(constraint)
        if found is None:
            found = self._compile(constraint)
            with self._lock:
                self._kept[constraint] = found
                while len(self._kept) > KEPT_MAX:
                    self._kept.popitem(last=False)
        if isinstance(found, ConstraintError):
            raise found
        return found.deep_copy()

    def _compile(self, constraint: Constraint) -> LLMatcher | ConstraintError:
        kind, text = constraint.kind.value, constraint.text
        if len(text.encode()) > TEXT_BYTES_MAX:
            return ConstraintError(f"it has more than {TEXT_BYTES_MAX} bytes")
        try:
            grammar = self._probes.check(kind, text)
        except ConstraintError as error:
            return error
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        if not matcher.is_error():
            # The first mask costs more than others: its work is kept, and copies share it.
            matcher.compute_bitmask()
        if matcher.is_error():
            return ConstraintError(grammar_probe.one_line(matcher.get_error(), kind))
        return matcher


def grammar_for(engine: Engine, files: dict[str, bytes]) -> Grammar:
    """The compiler for an engine's model, with these tokenizer files. Raises ``TokenizerError``."""
    if TOKENIZER not in files:
        raise TokenizerError(f"the model has no {TOKENIZER}")
    info = engine.describe()
    text = files[TOKENIZER].decode(errors="replace")
    return Grammar(text, info.vocab_size, info.eos_token_ids)


def start_thread(target: Callable[..., None], *args: object, name: str) -> threading.Thread:
    """Starts a daemon thread whose stack has room for what passed a check."""
    thread = threading.Thread(target=target, args=args, name=name, daemon=True)
    with _stack_lock:
        before = threading.stack_size(STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    return thread


class _Probes:
    """The processes that check constraints: as many as are asked at once, a few of them kept."""

    def __init__(self, model: dict[str, object]) -> None:
        self._model = model
        self._idle: list[_Probe] = []
        self._closed = False
        self._lock = threading.Lock()
        weakref.finalize(self, _end, self._idle)

    def check(self, kind: str, text: str) -> str:
        """The constraint as ``LLMatcher`` takes it. Raises ``ConstraintError``, ``OSError``."""
        probe = self._waiting() or _Probe(self._model)
        try:
            answer = probe.ask({"kind": kind, "text": text})
        except BaseException:
            probe.end()
            raise
        self._keep(probe)
        if "error" in answer:
            raise ConstraintError(answer["error"])
        return answer["grammar"]

    def _waiting(self) -> "_Probe | None":
        """One that waits, if there is one; those that have ended meanwhile are let go."""
        with self._lock:
            while self._idle:
                probe = self._idle.pop()
                if probe.alive():
                    return probe
                probe.end()
        return None

    def _keep(self, probe: "_Probe") -> None:
        with self._lock:
            if len(self._idle) < PROBES_IDLE_MAX and not self._closed:
                self._idle.append(probe)
                return
        probe.end()

    def close(self) -> None:
        """Ends those that wait; one that is at work is ended when it has answered."""
        with self._lock:
            self._closed = True
            _end(self._idle)


def _end(probes: "list[_Probe]") -> None:
    while probes:
        probes.pop().end()


class _Probe:
    """One process of ``grammar_probe``; ``model`` is what it is told first."""

    def __init__(self, model: dict[str, object]) -> None:
        program = str(Path(grammar_probe.__file__))
        self._process = subprocess.Popen(
            [sys.executable, "-P", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # what a client sent must not get into a log
            bufsize=0,
        )
        try:
            self._write(model)
            self._read(READY_S)
        except ConstraintError as error:
            self.end()
            raise OSError(f"the check of constraints does not start: {error}") from error

    def ask(self, request: dict[str, str]) -> dict[str, str]:
        """The answer. Raises ``ConstraintError`` if the process ended or had to be ended."""
        self._write(request)
        return self._read(CHECK_S)

    def _write(self, message: Mapping[str, object]) -> None:
        assert self._process.stdin is not None
        line = json.dumps(message).encode() + b"\n"
        with contextlib.suppress(BrokenPipeError):  # it has ended: reading tells why
            while line:
                line = line[self._process.stdin.write(line) or 0 :]

    def _read(self, timeout_s: float) -> dict[str, str]:
        assert self._process.stdout is not None
        file, until, got = self._process.stdout.fileno(), time.monotonic() + timeout_s, b""
        while not got.endswith(b"\n"):
            left_s = until - time.monotonic()
            if left_s <= 0 or not select.select([file], [], [], left_s)[0]:
                raise ConstraintError("it takes too long to compile")
            piece = os.read(file, 1 << 16)
            if not piece:
                raise ConstraintError(_ended(self._process.wait()))
            got += piece
        answer: dict[str, str] = json.loads(got)
        return answer

    def alive(self) -> bool:
        """Whether the process is there."""
        return self._process.poll() is None

    def end(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()


def _ended(code: int) -> str:
    """Why a process ended while it compiled."""
    if code in (-signal.SIGXCPU, -signal.SIGALRM):
        return f"it takes more than {grammar_probe.CPU_S} s to compile"
    return "it is too large or nested too deeply to compile"
