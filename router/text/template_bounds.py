"""What one layout of a chat template may use: time, and the size of what it makes.

A loop is stopped by a look at the clock. One expression can take as long, or fill the memory,
before the next look; so what can make much of little is measured before, and all that is made is
counted. How values are compared is in ``template_compare.py``.
"""

import os
import re
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import jinja2.filters
from jinja2 import Undefined

VALUE_MAX = 1 << 23
"""Characters or items of one value."""
TOTAL_MAX = 1 << 30
"""The same of all values that one layout makes."""
NUMBER_MAX = 1 << 20
"""What an argument may be, as it may be a width or a count."""
POWER_MAX = 1024
BITS_MAX = 1 << 16
_LOOK_EVERY = 4096
MADE_BETWEEN = 1 << 24
"""What may be made between two looks at the memory."""
MEMORY_MAX = 1 << 28
"""Bytes by which the process may grow from the first of these looks on."""

INDENT_MAX = 64
UNUSED = frozenset({"pprint", "striptags", "urlize", "wordwrap", "xmlattr"})
"""Filters that no chat template needs, and that can take long."""
WRITERS = frozenset(
    {"capitalize", "center", "e", "escape", "format", "indent", "join", "lower", "replace", "safe"}
    | {"string", "title", "tojson", "trim", "truncate", "upper", "urlencode", "wordcount"}
)
"""Filters that write their value down, whatever it is."""
COMPARERS = frozenset({"dictsort", "groupby", "max", "min", "sort", "unique"})
"""Filters that compare or hash the parts of their value."""
_NUMBERS_OF_MEMORY = Path("/proc/self/statm")
_NUMBERS = re.compile(r"\d+")

_TOO_LONG = "the chat template takes too long for these messages"
_NO_METHOD = "the chat template calls a method that templates do not have"
_TOO_MUCH = "the chat template makes too much of these messages"


class BoundError(Exception):
    """A bound was passed."""


@dataclass(slots=True)
class _Budget:
    ends: float
    left: int
    looks_at: int
    """What is left at the next look at the memory."""
    resident: int | None = None


SCALARS = (str, bytes, int, float, type(None), Undefined)
"""Types of values that hold no others."""
_LISTED = (list, tuple, KeysView, ValuesView, ItemsView)

_BUDGET: ContextVar[_Budget | None] = ContextVar("template_budget", default=None)


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """What happens within has so much time, and may make TOTAL_MAX."""
    token = _BUDGET.set(_Budget(time.monotonic() + seconds, TOTAL_MAX, TOTAL_MAX - MADE_BETWEEN))
    try:
        yield
    finally:
        _BUDGET.reset(token)


def check_time() -> None:
    """Raises BoundError when the time is over."""
    budget = _BUDGET.get()
    if budget is not None and time.monotonic() > budget.ends:
        raise BoundError(_TOO_LONG)


def spend(size: int) -> None:
    """Counts a value that is made, before it is if that can be. Raises BoundError."""
    budget = _BUDGET.get()
    left = TOTAL_MAX
    if budget is not None:
        left = budget.left = budget.left - size
        if time.monotonic() > budget.ends:
            raise BoundError(_TOO_LONG)
        if left < budget.looks_at:
            _check_memory(budget)
    if size > VALUE_MAX or left < 0:
        raise BoundError(_TOO_MUCH)


def _check_memory(budget: _Budget) -> None:
    """What was made may be gone again, or all be there still."""
    budget.looks_at = budget.left - MADE_BETWEEN
    now = _resident()
    if budget.resident is None:
        budget.resident = now
    if now - budget.resident > MEMORY_MAX:
        raise BoundError(_TOO_MUCH)


def _resident() -> int:
    """Bytes of memory that the process has; 0 where the system does not say it."""
    try:
        return int(_NUMBERS_OF_MEMORY.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def steps(items: Any) -> Iterator[Any]:
    """The items of a loop, with a look at the clock now and then."""
    for count, item in enumerate(items):
        if not count & 63:
            check_time()
        yield item


def made(value: Any) -> Any:
    """Returns a value, and counts it."""
    spend(len(value) if isinstance(value, str | bytes | list | tuple) else 1)
    return value


def written_size(value: Any) -> int:
    """About how many characters a value has when it is written down. Raises BoundError."""
    if isinstance(value, str):
        return len(value)
    size, seen, waiting = 0, 0, [value]
    while waiting:
        one = waiting.pop()
        size, seen = size + (len(one) if isinstance(one, str) else 8), seen + 1
        if not seen % _LOOK_EVERY:
            check_time()
        if isinstance(one, Mapping):
            waiting += [*one.keys(), *one.values()]
        elif isinstance(one, _LISTED):
            waiting += one
        if size + len(waiting) > VALUE_MAX:
            raise BoundError(_TOO_MUCH)
    return size


def finalize(value: Any) -> Any:
    """A value that is about to be written into the prompt."""
    if not isinstance(value, str):
        written_size(value)
    return value


def joined(parts: Any) -> str:
    """Jinja's own joining: of what blocks and macros write."""
    texts = list(steps(parts))
    spend(sum(map(len, texts)))
    return "".join(texts)


def concatenated(values: list[Any]) -> str:
    """The operator ``~``."""
    spend(sum(map(written_size, values)))
    return "".join(map(str, values))


def comparable(value: Any) -> Any:
    """A value that is about to be compared or hashed. Raises BoundError if that may not end."""
    if not isinstance(value, SCALARS):
        written_size(value)
    return value


def check_operator(sign: str, left: Any, right: Any) -> None:
    """Refuses an operator that would make too much of its operands. Raises BoundError."""
    check_time()
    numbers = isinstance(left, int) and isinstance(right, int)
    match sign:
        case "**" if max(abs(left), abs(right)) > POWER_MAX:
            raise BoundError("the chat template raises a number to too high a power")
        case "*" if numbers and left.bit_length() + right.bit_length() > BITS_MAX:
            raise BoundError("the chat template multiplies numbers that are too large")
        case "//" | "%" if numbers and left.bit_length() > BITS_MAX:
            raise BoundError("the chat template divides a number that is too large")
        case "%" if isinstance(left, bytes):
            raise BoundError(_NO_METHOD)
        case "*" if not numbers:
            for times, value in ((left, right), (right, left)):
                if isinstance(times, int) and hasattr(value, "__len__"):
                    _repeat(times * len(value))
        case "+" if hasattr(left, "__len__") and hasattr(right, "__len__"):
            spend(len(left) + len(right))
        case "%" if isinstance(left, str):
            _formatted(left, (right,))


def _repeat(size: int) -> None:
    if size > NUMBER_MAX:
        raise BoundError("the chat template repeats a value too often")
    spend(max(size, 0))


def check_call(called: Any, args: tuple[Any, ...], given: Iterable[Any]) -> tuple[Any, ...]:
    """Refuses a call of a method of texts that would make too much; ``given`` are named arguments.

    Returns the arguments, with lists for what could be gone through only once. Raises BoundError.
    """
    check_time()
    text = _text_of(called)
    if text is None:
        _check_other(called, (*args, *given))
        return args
    name = called.__name__
    if name == "join":
        args = tuple(map(_listed, args))
    everything = (*args, *given)
    if everything:
        _check_numbers(everything)
    if name in _METHODS:
        _METHODS[name](text, everything)
    return args


def _check_other(called: Any, args: tuple[Any, ...]) -> None:
    """A call of anything but a method of texts. Those of bytes and of types are not needed.

    Methods of lists compare what they are given with what is there.
    """
    owner = getattr(called, "__self__", None)
    name = getattr(called, "__name__", "")
    if name == "to_bytes" or (isinstance(owner, bytes | type) and name != "decode"):
        raise BoundError(_NO_METHOD)
    nested = [comparable(arg) for arg in args if not isinstance(arg, SCALARS)]
    if nested and isinstance(owner, list | tuple):
        written_size(owner)


def _text_of(called: Any) -> str | None:
    """The text whose method it is; the sandbox puts something of its own before two of them."""
    called = getattr(called, "__wrapped__", called)
    text = getattr(called, "__self__", None)
    return text if isinstance(text, str) else None


def _listed(value: Any) -> Any:
    return value if hasattr(value, "__len__") else list(steps(value))


def _check_numbers(args: Iterable[Any]) -> None:
    if any(isinstance(arg, int) and abs(arg) > NUMBER_MAX for arg in args):
        raise BoundError("the chat template asks for too many of something")


def _formatted(text: Any, args: tuple[Any, ...]) -> None:
    """Widths are in the format, or in the arguments."""
    text = str(text)
    widths = sum(min(int(digits[:9]), VALUE_MAX + 1) for digits in _NUMBERS.findall(text))
    places = text.count("%") + text.count("{")
    given = args[0] if len(args) == 1 and isinstance(args[0], tuple) else args
    sizes = [abs(one) if isinstance(one, int) else written_size(one) for one in given]
    spend(len(text) + widths + places * min(max(sizes, default=0), VALUE_MAX + 1))


def _replaced(text: Any, args: tuple[Any, ...]) -> None:
    old, new = (*args, "", "")[:2]
    written_size(old)
    spend(len(text) + str(text).count(str(old)) * written_size(new))


def _joined(text: str, args: tuple[Any, ...]) -> None:
    spend(sum(written_size(arg) + len(arg) * len(text) for arg in args))


def _expanded(text: str, args: tuple[Any, ...]) -> None:
    width = max((arg for arg in args if isinstance(arg, int)), default=8)
    spend(len(text) + text.count("\t") * width)


def _refused(_text: str, _args: tuple[Any, ...]) -> None:
    raise BoundError(_NO_METHOD)


_METHODS: dict[str, Callable[[str, tuple[Any, ...]], None]] = {
    "format": _formatted,
    "format_map": _formatted,
    "replace": _replaced,
    "join": _joined,
    "expandtabs": _expanded,
    "translate": _refused,
}


def _indented(text: Any, args: tuple[Any, ...]) -> None:
    width = args[0] if args else 4
    spend((str(text).count("\n") + 1) * (len(width) if isinstance(width, str) else width))


def _separated(value: Any, args: tuple[Any, ...]) -> None:
    spend(len(value) * max((len(arg) for arg in args if isinstance(arg, str)), default=0))


def _summed(_value: Any, args: tuple[Any, ...]) -> None:
    if any(isinstance(arg, list | tuple) for arg in args):
        raise BoundError("the chat template adds up lists")


def _dumped(_value: Any, args: tuple[Any, ...]) -> None:
    if any(isinstance(arg, int) and arg > INDENT_MAX for arg in args):
        raise BoundError(f"the chat template indents JSON by more than {INDENT_MAX}")


_FILTERS: dict[str, Callable[[Any, tuple[Any, ...]], None]] = {
    "format": _formatted,
    "indent": _indented,
    "join": _separated,
    "replace": _replaced,
    "sum": _summed,
    "tojson": _dumped,
}


def counting(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a filter that counts what it makes, and refuses to make too much."""
    at = 1 if hasattr(work, "jinja_pass_arg") else 0
    check, writes, compares = _FILTERS.get(name), name in WRITERS, name in COMPARERS

    @wraps(work)
    def filtered(*args: Any, **kwargs: Any) -> Any:
        value = args[at]
        if compares or name == "join":
            value = _listed(value)
            args = (*args[:at], value, *args[at + 1 :])
        if compares:
            comparable(value)
        if writes and not isinstance(value, str):
            written_size(value)
        if len(args) > at + 1 or kwargs:
            given = (*args[at + 1 :], *kwargs.values())
            _check_numbers(given)
            if check is not None:
                check(value, given)
        elif check is not None:
            check(value, ())
        return made(work(*args, **kwargs))

    return filtered


def filters(own: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Returns Jinja's filters but for the unused ones, and the dialect's own, all bounded."""
    found = {name: one for name, one in jinja2.filters.FILTERS.items() if name not in UNUSED}
    return {name: counting(name, one) for name, one in {**found, **own}.items()}
