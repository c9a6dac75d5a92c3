"""What it cost, and where every number comes from."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from roadvla.evaluation.records import RunRecord
from roadvla.evaluation.results import Results, StudyRecord
from roadvla.report.site import html
from roadvla.report.site.numbers import cells
from roadvla.report.site.plots import draw

_PHASES = ("rollout", "reference", "update")
_PHASE_COLOURS = ("#56B4E9", "#CC79A7", "#E69F00")


def cost(results: Results, study: StudyRecord, folder: Path) -> str:
    """Median seconds of an iteration by phase, and the ratio to the baseline."""
    setting = study.settings[0]
    rows = []
    for method in study.methods:
        found = cells(results, study, method, setting)
        if found:
            rows.append((method, found, {p: _median(found.values(), f"time/{p}") for p in _PHASES}))
    if not rows:
        return html.paragraph("Not run yet: nothing here says what a method costs.", "note")

    def paint(axes: np.ndarray) -> None:
        axis = axes[0, 0]
        left = np.zeros(len(rows))
        names = [method for method, *_ in rows]
        for phase, colour in zip(_PHASES, _PHASE_COLOURS, strict=True):
            widths = np.array([times[phase] or 0.0 for *_, times in rows])
            axis.barh(names, widths, left=left, color=colour, label=phase)
            left += widths
        axis.invert_yaxis()
        axis.set_xlabel("seconds per iteration, median")
        axis.grid(visible=False, axis="y")
        axis.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=9)

    svg, files = draw(f"{study.name}-phases", (1, 1), (7.5, 0.5 * len(rows) + 1.5), paint, folder)
    base = _median(rows[0][1].values(), "time/iteration")
    head = ["Method", *(f"{p}, s" for p in _PHASES), "iteration, s", "ratio", "peak memory, MB"]
    body = []
    for method, found, times in rows:
        whole = _median(found.values(), "time/iteration")
        ratio = "–" if not whole or not base else f"{whole / base:.2f}"
        peak = _median(found.values(), "memory/peak_mb", last=True)
        body.append(
            [
                html.text(method),
                *(_seconds(times[p]) for p in _PHASES),
                _seconds(whole),
                ratio,
                "–" if peak is None else f"{peak:,.0f}",
            ]
        )
    caption = (
        f"Cost of an iteration on {setting}: medians over iterations and seeds. These runs had the "
        f"machine to themselves; the paper reports a ratio of 1.6."
    )
    return html.figure(svg, caption, html.table("Cost", head, body), files)


def warnings(results: Results) -> list[str]:
    """What a reader should know before trusting the page."""
    said = []
    by_command: dict[str, list[str]] = {}
    for study in results.studies.values():
        missing = len(results.missing(study))
        if missing:
            names = {n for e in study.cells.values() for s in e.values() for n in s.values()}
            line = f"{study.name} ({missing} of {len(names) + 1} cells missing)"
            by_command.setdefault(study.command, []).append(line)
    for command, lines in by_command.items():
        said.append(
            f"Not finished: {', '.join(lines)}. Nothing stands in for what is missing. To finish: "
            f"{command}"
        )
    records = results.records.values()
    for what, label in (("version", "versions of roadvla"), ("commit", "commits")):
        values = sorted({getattr(r, what) or "unknown" for r in records})
        if len(values) > 1:
            said.append(f"The runs were made by several {label}: {', '.join(values)}.")
    mixed = sorted({r.method for r in records if len(_commits(records, r.method)) > 1})
    if mixed:
        said.append(f"Seeds of one method by several commits: {', '.join(mixed)}.")
    if any(r.commit.endswith("+") for r in records):
        said.append("Some runs were made by a source tree with changes that no commit holds (+).")
    machines = {r.machine for r in records}
    if len(machines) > 1:
        said.append(
            f"The runs were made on {len(machines)} machines: sums round differently there, so a "
            f"run repeated elsewhere agrees in distribution, not bit for bit."
        )
    return said


def provenance(results: Results) -> str:
    """One line per record: what it is, who made it, with what, when, and on how many episodes."""
    rows = []
    for record in sorted(results.records.values(), key=lambda r: r.name):
        episodes = sorted({outcome.episodes for outcome in record.outcomes})
        rows.append(
            [
                html.text(record.name),
                html.text(record.seed),
                f"{record.env_steps:,}",
                html.text(", ".join(map(str, episodes)) or "–"),
                html.text(record.commit or "–"),
                html.text(record.machine),
                html.text(record.started[:16].replace("T", " ")),
                f"<code>{html.text(record.command or '–')}</code>",
                f"<details><summary>settings</summary><pre>{html.text(_config(record))}</pre></details>",
            ]
        )
    head = [
        "Record", "Seed", "Steps", "Episodes a set", "Commit", "Machine", "Started (UTC)",
        "Command", "Configuration",
    ]  # fmt: skip
    return html.table("Every run behind this page", head, rows, sortable=True)


def summary(results: Results) -> list[str]:
    """The same in a few lines."""
    records = list(results.records.values())
    commands = sorted({s.command for s in results.studies.values()})
    dates = sorted(r.started[:10] for r in records if r.started)
    alike = {(o.temperature, o.horizon) for r in records for o in r.outcomes}
    lines = [f"Command: {command}" for command in commands]
    lines += [f"Machine: {machine}" for machine in sorted({r.machine for r in records})]
    if dates:
        span = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
        lines.append(f"Trained: {span}; roadvla {', '.join(sorted({r.version for r in records}))}")
    if records:
        temperatures = ", ".join(sorted({f"{t:g}" for t, _ in alike}))
        horizons = ", ".join(sorted({str(h) for _, h in alike}))
        lines.append(
            f"Simulator: {records[0].sim}, definition {records[0].definition}; sampling "
            f"temperature of the evaluations: {temperatures}; horizons: {horizons} steps"
        )
    return lines


def _commits(records: Iterable[RunRecord], method: str) -> set[str]:
    return {record.commit for record in records if record.method == method}


def _config(record: RunRecord) -> str:
    return json.dumps(record.config, indent=1, sort_keys=True)


def _median(records: Iterable[RunRecord], metric: str, *, last: bool = False) -> float | None:
    values: list[float] = []
    for record in records:
        known = [value for value in record.series.get(metric, ()) if value is not None]
        values += known[-1:] if last else known
    return float(np.median(values)) if values else None


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
