"""What ``roundhouse tune`` leaves: a table, a plot, and the winner as a file for ``serve``."""

import json
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from deploy.tune_search import Candidate, Numbers, Result

if TYPE_CHECKING:
    from deploy.tune import Subject

# The router's own bound on open requests; see ``router.config.Settings``.
REQUESTS_DEFAULT = 128
ROW, LEFT_MIN, BARS, RIGHT, TOP = 26, 200, 420, 330, 64
# About the width of a letter in the plot; the longest name decides where the bars begin.
LETTER = 7
_COUNTS = ("threads", "step-tokens-max", "kv-tokens", "sequences-max", "num-shard")


def config_text(subject: "Subject", candidate: Candidate, comment: str = "") -> str:
    """The TOML file that makes ``serve --config`` serve the model as this candidate did."""
    lines = [f"# {line}".rstrip() for line in comment.splitlines()]
    if model := candidate.model or subject.model:
        lines.append(f"model = {_text(model)}")
    if subject.file and not candidate.model:
        lines.append(f"file = {_text(subject.file)}")
    lines.append(f"engine = {_text(candidate.engine)}")
    for option, value in candidate.settings:
        if option not in ("engine-option", "model"):
            lines.append(f"{option} = {value if option in _COUNTS else _text(value)}")
    own = [value for option, value in candidate.settings if option == "engine-option"]
    if own:
        lines.append(f"engine-option = [{', '.join(map(_text, own))}]")
    if subject.shape.concurrency > REQUESTS_DEFAULT:
        lines.append(f"max-concurrent-requests = {subject.shape.concurrency}")
    return "\n".join(lines) + "\n"


def _text(value: str) -> str:
    """A text as TOML has it: JSON's escapes are a part of TOML's."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def ranked(results: Sequence[Result]) -> list[Result]:
    """The measured ones, fastest first; then those without numbers, as they came."""
    return sorted(results, key=lambda result: -result.score)


def table(results: Sequence[Result], best: Result | None) -> list[str]:
    """Rows for people; the winner is marked."""
    heads = ("", "candidate", "tokens/s", "first token p50", "gap p50", "gap p99", "")
    rows = [heads]
    for result in ranked(results):
        mark = "*" if result is best else ""
        numbers = result.numbers
        cells = _cells(numbers) if numbers else ("-", "-", "-", "-")
        told = result.problem or ("measured before" if result.cached else "")
        rows.append((mark, str(result.candidate), *cells, told))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(_aligned(row, widths)).rstrip() for row in rows]


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Numbers to the right, words to the left."""
    return [
        cell.rjust(width) if 2 <= column <= 5 else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]


def _cells(numbers: Numbers) -> tuple[str, str, str, str]:
    return (
        f"{numbers.tokens_s:.1f}",
        f"{numbers.first_p50_ms:.0f} ms",
        f"{numbers.gap_p50_ms:.1f} ms",
        f"{numbers.gap_p99_ms:.1f} ms",
    )


def comment(subject: "Subject", best: Result) -> str:
    """What a config file says about where its values come from."""
    numbers = best.numbers
    assert numbers is not None, "a winner has been measured"
    tokens, first, gap, gap_p99 = _cells(numbers)
    return (
        f"Chosen by 'roundhouse tune': {best.candidate}\n"
        f"  traffic: {subject.shape}\n"
        f"  machine: {subject.machine}\n"
        f"  {tokens} output tokens/s, first token {first} (p50),"
        f" gap between tokens {gap} (p50), {gap_p99} (p99)\n"
        "Serve it with: roundhouse serve --config FILE\n"
    )


def svg(subject: "Subject", results: Sequence[Result], best: Result | None) -> str:
    """Bars of tokens/s, fastest first, with the times that a client feels beside them."""
    shown = [result for result in ranked(results) if result.numbers]
    top = max((result.score for result in shown), default=1.0)
    names = [str(result.candidate) for result in shown]
    left = max(LEFT_MIN, 24 + LETTER * max(map(len, names), default=0))
    width, height = left + BARS + RIGHT, TOP + ROW * len(shown) + 12
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
        ' font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="12" y="24" font-size="15">{escape(title(subject))}</text>',
        f'<text x="12" y="46" fill="#666">{escape(subject.machine)}</text>',
    ]
    for row, result in enumerate(shown):
        y = TOP + ROW * row
        length = BARS * result.score / top
        fill = "#2a6f97" if result is best else "#a9c6d9"
        tokens, first, gap, gap_p99 = _cells(result.numbers) if result.numbers else ("",) * 4
        label = f"{tokens} tok/s; first {first}, gap {gap}, p99 {gap_p99}"
        parts += [
            f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{escape(names[row])}</text>',
            f'<rect x="{left}" y="{y + 2}" width="{length:.1f}" height="{ROW - 8}" fill="{fill}"/>',
            f'<text x="{left + length + 6:.1f}" y="{y + 15}">{escape(label)}</text>',
        ]
    return "\n".join([*parts, "</svg>\n"])


def title(subject: "Subject") -> str:
    """The plot's headline."""
    return f"{subject.name}: {subject.shape}"
