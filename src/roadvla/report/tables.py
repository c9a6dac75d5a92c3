"""The result table as Markdown, JSON, terminal output, and words."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from roadvla.evaluation.evaluate import SPLITS
from roadvla.evaluation.stats import Estimate
from roadvla.report.summary import Row, Summary

SPLIT_NAMES = {"train": "ID", "test": "OOD"}
_NONE = "–"


def markdown_table(summary: Summary, setting: str) -> str:
    """Build one setting's table; differences whose interval excludes 0 are bold and marked."""
    head = _head(summary)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in summary.rows[setting]:
        cells = _cells(row, summary)
        cells = [f"**{cell}**" if cell[-1] in "▲▼" else cell for cell in cells]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table_json(summary: Summary) -> dict[str, Any]:
    """Every number of the table, as fractions."""
    return {
        "level": 0.95,
        "baseline": summary.baseline,
        "settings": {
            setting: [
                {
                    **dataclasses.asdict(row),
                    "verdict": {s: verdict(row, summary, s) for s in row.versus},
                }
                for row in rows
            ]
            for setting, rows in summary.rows.items()
        },
    }


def print_table(summary: Summary, console: Console | None = None) -> None:
    """Print every setting's table to the terminal, three lines per method: ID, OOD and Δ."""
    console = console or Console()
    for setting, rows in summary.rows.items():
        table = Table(
            title=f"{setting}: success in %, 95 % intervals (seeds×episodes)",
            title_justify="left",
            box=SIMPLE_HEAD,
            pad_edge=False,
        )
        table.add_column("Method", overflow="fold")
        for name in ("Set", "Count", "Success"):
            table.add_column(name, no_wrap=True)
        if summary.baseline is not None:
            table.add_column(f"Minus {summary.baseline}'s", no_wrap=True)
        for row in rows:
            for number, split in enumerate(SPLITS):
                rate = row.rates.get(split)
                counts = f"{rate.seeds}×{rate.episodes}" if rate else _NONE
                cells = [_label(row) if number == 0 else "", SPLIT_NAMES[split], counts]
                cells.append(format_rate(rate))
                if summary.baseline is not None:
                    cells.append(_difference(row.versus.get(split)))
                table.add_row(*(_styled(cell) for cell in cells))
            table.add_row("", "Δ", "", Text(format_rate(row.gap, signed=True)), end_section=True)
        console.print(table)


def verdict(row: Row, summary: Summary, split: str) -> str:
    """Say who is better in one split, as far as the interval allows."""
    sign = row.versus[split].sign
    if sign == 0:
        return "no difference established"
    return f"{row.method if sign > 0 else summary.baseline} better"


def sentences(summary: Summary, setting: str) -> list[str]:
    """One sentence per method and split: the verdict and the numbers it rests on."""
    lines = []
    for row in summary.rows[setting]:
        for split in SPLITS:
            if split not in row.versus:
                continue
            estimate = row.versus[split]
            lines.append(
                f"{row.method} against {summary.baseline}, {SPLIT_NAMES[split]}: "
                f"**{verdict(row, summary, split)}** ({100 * estimate.mean:+.1f} points, 95 % "
                f"interval {100 * estimate.low:+.1f} to {100 * estimate.high:+.1f}; "
                f"{_count(estimate.seeds, 'seed')} of {_count(estimate.episodes, 'episode')})."
            )
    return lines


def format_rate(estimate: Estimate | None, *, signed: bool = False) -> str:
    """Write an estimate in percent: ``71.3 [67.2, 75.0]``."""
    if estimate is None:
        return _NONE
    mean, low, high = (100 * x for x in (estimate.mean, estimate.low, estimate.high))
    sign = "+" if signed else ""
    return f"{mean:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def _head(summary: Summary) -> list[str]:
    head = ["Method", "Seeds", "Episodes per seed", "ID", "OOD", "Δ = ID − OOD"]
    if summary.baseline is not None:
        head += [f"ID − {summary.baseline}'s", f"OOD − {summary.baseline}'s"]
    return head


def _cells(row: Row, summary: Summary) -> list[str]:
    episodes = [str(row.rates[s].episodes) if s in row.rates else _NONE for s in SPLITS]
    cells = [
        _label(row),
        str(len(row.seeds)),
        episodes[0] if episodes[0] == episodes[1] else " / ".join(episodes),
        *(format_rate(row.rates.get(split)) for split in SPLITS),
        format_rate(row.gap, signed=True),
    ]
    if summary.baseline is not None:
        cells += [_difference(row.versus.get(split)) for split in SPLITS]
    return cells


def _label(row: Row) -> str:
    return row.method + (f" (adapted on {row.trained_on})" if row.trained_on else "")


def _difference(estimate: Estimate | None) -> str:
    """Write a difference, marked where its interval excludes 0."""
    mark = {1: " ▲", 0: "", -1: " ▼"}[estimate.sign] if estimate else ""
    return format_rate(estimate, signed=True) + mark


def _styled(cell: str) -> Text:
    return Text(cell, style={"▲": "bold green", "▼": "bold red"}.get(cell[-1:], ""))


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}" + ("" if number == 1 else "s")
