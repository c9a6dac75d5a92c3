"""How episodes fail (App. D.1): shares of modes, and what became of PPO's failures under ROAD."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from roadvla.evaluation.definition import failure_definition
from roadvla.evaluation.failures import MODES, confusion
from roadvla.evaluation.records import RunRecord
from roadvla.evaluation.results import Results, StudyRecord
from roadvla.report.site import html
from roadvla.report.site.numbers import cells
from roadvla.report.site.plots import FAILURE_COLOURS, draw

WORDS = {
    "success": "success",
    "lost": "placed, then lost",
    "wrong_receptacle": "wrong receptacle",
    "drift": "grasped, then drifted",
    "held": "still held",
    "drop": "dropped",
    "wrong_object": "wrong object",
    "no_grasp": "no grasp",
}


def shares(records: dict[int, RunRecord], setting: str, split: str) -> dict[str, float] | None:
    """Share of each mode over all seeds; ``None`` if no episode's mode is known."""
    modes = [
        mode
        for record in records.values()
        if (outcome := record.outcome(setting, split)) is not None
        for mode in outcome.modes
    ]
    if not modes:
        return None
    counts = np.bincount(modes, minlength=len(MODES))
    return dict(zip(MODES, (counts / len(modes)).tolist(), strict=True))


def caution(results: Results, study: StudyRecord) -> tuple[str, bool]:
    """Say what stands between a study's modes and today's definition, and whether to show them.

    Modes that several versions of the definition named are not put beside each other.
    """
    judged = {
        outcome.judged_by
        for setting in study.settings
        for method in study.methods
        for record in cells(results, study, method, setting).values()
        for outcome in record.outcomes
        if outcome.env == setting and outcome.modes
    }
    if len(judged) > 1:
        return (
            "How these episodes failed was judged by several versions of the definition, so it is "
            "not shown: evaluate the older runs again.",
            False,
        )
    if judged and judged != {failure_definition()}:
        return (
            "How these episodes failed was judged by an earlier definition than docs/failures.md "
            "has now.",
            True,
        )
    return "", True


def bars(results: Results, study: StudyRecord, folder: Path, split: str = "test") -> str:
    """Stacked bars, one per setting and method."""
    rows = []
    for setting in study.settings:
        for method in study.methods:
            found = shares(cells(results, study, method, setting), setting, split)
            if found is not None:
                rows.append((setting, method, found))
    if not rows:
        return ""

    def paint(axes: np.ndarray) -> None:
        axis = axes[0, 0]
        places, place = [], 0.0
        for number, (setting, _, _) in enumerate(rows):
            place += 1.0 if number and setting == rows[number - 1][0] else 1.5
            places.append(place)
        left = np.zeros(len(rows))
        for mode in MODES:
            widths = np.array([100 * found[mode] for *_, found in rows])
            if widths.any():
                colour = FAILURE_COLOURS[mode]
                axis.barh(places, widths, left=left, color=colour, label=WORDS[mode])
            left += widths
        axis.set_yticks(places, [f"{setting}, {method}" for setting, method, _ in rows])
        axis.invert_yaxis()
        axis.set_xlim(0, 100)
        axis.set_xlabel("share of episodes, %")
        axis.grid(visible=False, axis="y")
        axis.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.4, 1.0), fontsize=9)

    svg, files = draw(
        f"{study.name}-modes-{split}", (1, 1), (9.5, 0.36 * len(rows) + 1.6), paint, folder
    )
    head = ["Setting, method", *(WORDS[mode] for mode in MODES)]
    body = [
        [html.text(f"{setting}, {method}"), *(f"{100 * found[mode]:.1f}" for mode in MODES)]
        for setting, method, found in rows
    ]
    where = "out of distribution" if split == "test" else "in distribution"
    caption = f"How episodes end {where}, over all seeds; docs/failures.md defines the modes."
    return html.figure(svg, caption, html.table("Share of episodes, %", head, body), files)


def fates(results: Results, study: StudyRecord, ours: str, theirs: str, setting: str) -> str:
    """Confusion of modes on paired episodes: rows are one method's, columns the other's."""
    first, second = (cells(results, study, m, setting) for m in (theirs, ours))
    total = np.zeros((len(MODES), len(MODES)), dtype=int)
    for seed in sorted(set(first) & set(second)):
        a, b = (_modes(records[seed], setting) for records in (first, second))
        if a and len(a) == len(b):
            total += confusion(a, b)
    if not total.sum():
        return ""
    used = [i for i in range(len(MODES)) if total[i].any() or total[:, i].any()]
    head = [f"{theirs} ↓  {ours} →", *(WORDS[MODES[i]] for i in used), "all"]
    rows = [
        [
            html.text(WORDS[MODES[i]]),
            *(_count(int(total[i, j]), same=i == j) for j in used),
            str(total[i].sum()),
        ]
        for i in used
    ]
    rows.append(["all", *(str(total[:, j].sum()) for j in used), str(total.sum())])
    caption = f"{setting}: the same episodes under {theirs} (rows) and {ours} (columns), all seeds."
    return html.table(caption, head, rows)


def told(results: Results, study: StudyRecord, methods: Sequence[str]) -> list[str]:
    """Name the commonest failure of each method in each setting."""
    lines = []
    for setting in study.settings:
        parts = []
        for method in methods:
            found = shares(cells(results, study, method, setting), setting, "test")
            if found is not None:
                failed = {mode: share for mode, share in found.items() if mode != "success"}
                share, worst = max((s, m) for m, s in failed.items())
                of_failures = 100 * share / sum(failed.values()) if share else 0
                parts.append(f"{method} {WORDS[worst]} ({of_failures:.0f} %)")
        if parts:
            lines.append(
                f"{setting}: the commonest failure, and its share of all failures: "
                f"{'; '.join(parts)}."
            )
    return lines


def _modes(record: RunRecord, setting: str) -> tuple[int, ...]:
    outcome = record.outcome(setting, "test")
    return () if outcome is None else outcome.modes


def _count(value: int, *, same: bool) -> str:
    return f"<b>{value}</b>" if same else str(value)
