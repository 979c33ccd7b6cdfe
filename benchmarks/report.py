"""What a run leaves: a table, a plot, an entry in RESULTS.md, and one line of JSON."""

import json
import math
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from benchmarks.rows import Row

FOLDER = Path(__file__).parent
PLOT = FOLDER / "out" / "results.png"
RECORDED_PLOT = FOLDER / "results.png"
RESULTS = FOLDER / "RESULTS.md"
TITLE = """# Results

Newest first. Ratios compare systems that took turns in one run on one machine; absolute numbers of
different entries do not compare. `make bench` measures again; `ARGS=--record` adds an entry here.
"""
MARKS = {True: "yes", False: "**no**", None: "-"}
HEADINGS = ("what", "ours", "baseline", "ratio", "bar", "reached")
COLUMNS = 4
OURS, BASELINE, BAR = "#3b6ea5", "#b8b8b8", "#c44e52"


def machine() -> str:
    """CPU, cores and memory of this machine, and the engine's version."""
    cpu = "unknown CPU"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(": ")[2]
            break
    kib = int(Path("/proc/meminfo").read_text().split(maxsplit=2)[1])
    flags = set(Path("/proc/cpuinfo").read_text().split())
    isa = ", ".join(flag for flag in ("avx2", "avx512_vnni", "amx_int8") if flag in flags)
    return (
        f"{cpu} ({isa}), {os.cpu_count()} cores, {kib / 2**20:.0f} GiB; "
        f"llama-cpp-python {version('llama-cpp-python')}"
    )


def number(value: float | None) -> str:
    """Three digits, or more if they are whole."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def cells(row: Row) -> tuple[str, ...]:
    """The texts of one line of the table."""
    unit = f" {row.unit}" if row.unit else ""
    sign = "≥" if row.at_least else "≤"
    times = " x" if row.baseline is not None else unit
    return (
        row.what,
        number(row.ours) + unit,
        number(row.baseline) + (unit if row.baseline is not None else ""),
        number(row.ratio),
        "-" if row.bar is None else f"{sign} {row.bar:g}{times}",
        MARKS[row.passed],
    )


def table(rows: Sequence[Row]) -> str:
    """A table that reads well as text and as Markdown."""
    lines = [HEADINGS, *(cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    texts = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
    texts.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(texts)


def plot(rows: Sequence[Row], path: Path) -> bool:
    """One panel for each row: ours, the baseline if there is one, and the bar as a line.

    Says whether there was anything to draw.
    """
    shown = [row for row in rows if row.ours or row.baseline]
    if not shown:
        return False
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(COLUMNS, len(shown))
    lines = math.ceil(len(shown) / columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(3.4 * columns, 2.9 * lines), squeeze=False, layout="constrained"
    )
    for index, axes in enumerate(grid.flat):
        if index >= len(shown):
            axes.set_axis_off()
            continue
        row = shown[index]
        bars = {"ours": row.ours} | ({} if row.baseline is None else {"baseline": row.baseline})
        drawn = axes.bar(list(bars), list(bars.values()), color=[OURS, BASELINE], width=0.6)
        axes.bar_label(drawn, [number(value) for value in bars.values()], fontsize=8)
        if row.bar is not None:
            level = row.bar * (1.0 if row.baseline is None else row.baseline)
            axes.axhline(level, color=BAR, linestyle="--", linewidth=1.2)
        axes.margins(y=0.2)
        axes.set_title(row.what, fontsize=7, wrap=True)
        axes.set_ylabel(row.unit, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.set_xlim(-0.8, len(bars) - 0.2)
    figure.suptitle("Roundhouse; the dashed line is the bar", fontsize=10)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def record(rows: Sequence[Row], command: str) -> None:
    """Puts an entry at the top of RESULTS.md, and the plot beside it."""
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    notes = [f"- {row.what}: {row.note}" for row in rows if row.note]
    entry = "\n".join(
        [f"\n## {date}\n", f"{machine()}\n", f"`{command}`\n", table(rows), "", *notes, ""]
    )
    text = RESULTS.read_text() if RESULTS.exists() else TITLE
    head, mark, older = text.partition("\n## ")
    RESULTS.write_text(head.rstrip() + "\n" + entry + (mark + older if mark else ""))
    plot(rows, RECORDED_PLOT)


def closing_line(rows: Sequence[Row], command: str) -> str:
    """The whole result as one line of JSON."""
    judged = [row for row in rows if row.passed is not None]
    return json.dumps(
        {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "command": command,
            "bars": len(judged),
            "bars_reached": sum(row.passed is True for row in judged),
            "rows": [row.as_json() for row in rows],
        },
        ensure_ascii=False,
    )
