"""Adaptation curves, dynamics and grasp rates: Fig. 2, 3, 5 to 8."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from roadvla.evaluation.curves import convergence_step, late_variance, peak
from roadvla.evaluation.records import RunRecord
from roadvla.evaluation.results import Results, StudyRecord
from roadvla.report.site import html
from roadvla.report.site.numbers import cells
from roadvla.report.site.plots import Look, band, draw, percent_axis, thousands

_SPLITS = {"train": "in distribution", "test": "out of distribution"}
_DYNAMICS = (
    ("policy/entropy", "policy entropy, nats per token"),
    ("guidance/weight_mean", "mean weight ω̄"),
    ("guidance/agreement", "agreement of the critics"),
    ("policy/kl", "KL(old‖new), nats per action"),
)
_WINDOW = 5


def curve(
    results: Results, study: StudyRecord, method: str, setting: str, split: str, what: str
) -> tuple[list[int], Float[np.ndarray, "S P"]]:
    """Measured points of all seeds, from the warm-up on, as fractions.

    Args:
        results: All records.
        study: Which.
        method: Which of its methods.
        setting: Which of its settings.
        split: ``train`` or ``test``.
        what: ``success`` or ``grasped``.
    """
    start = results.records.get(study.warmup)
    begun = [] if start is None else _points(start, setting, split, what)[:1]
    lines = {}
    for seed, record in cells(results, study, method, setting).items():
        lines[seed] = begun + _points(record, setting, split, what)
    steps = [step for step, _ in next(iter(lines.values()), [])]
    kept = [line for line in lines.values() if [step for step, _ in line] == steps]
    values = np.array([[value for _, value in line] for line in kept])
    return steps, values.reshape(len(kept), len(steps))


def adaptation(
    results: Results,
    study: StudyRecord,
    look: Look,
    folder: Path,
    *,
    split: str = "test",
    what: str = "success",
) -> str:
    """Small multiples of all settings, and what the curves say in a table."""
    settings = [
        s
        for s in study.settings
        if any(curve(results, study, m, s, split, what)[0] for m in study.methods)
    ]
    if not settings:
        return ""
    columns = min(4, len(settings))
    rows = math.ceil(len(settings) / columns)

    def paint(axes: np.ndarray) -> None:
        for axis, setting in zip(axes.flat, settings, strict=False):
            for method in study.methods:
                steps, values = curve(results, study, method, setting, split, what)
                if len(values):
                    band(axis, np.array(steps) / 1000, 100 * values, method, look(method))
            axis.set_title(setting)
            percent_axis(axis, "success, %" if what == "success" else "grasped, %")
            thousands(axis)
        for axis in axes.flat[len(settings) :]:
            axis.set_axis_off()
        axes.flat[0].legend(fontsize=9)

    name = f"{study.name}-{what}-{split}"
    width = 3.3 * columns + 0.6
    svg, files = draw(name, (rows, columns), (width, 2.9 * rows), paint, folder, sharey=True)
    counts = " or ".join(map(str, sorted(_episodes(results, study, settings, split))))
    label = "Success" if what == "success" else "Episodes with a grasp of the right object"
    caption = (
        f"{label} during adaptation, {_SPLITS[split]}: mean over seeds, shaded one standard "
        f"deviation; the first point is the warm-up all start from. A point is of "
        f"{counts} episodes."
    )
    return html.figure(svg, caption, _said(results, study, settings, split, what), files)


def dynamics(
    results: Results, study: StudyRecord, look: Look, folder: Path, settings: Sequence[str]
) -> str:
    """Entropy, weight, agreement and KL against environment steps, one row per quantity."""
    shown = [s for s in settings if any(cells(results, study, m, s) for m in study.methods)]
    if not shown:
        return ""

    def paint(axes: np.ndarray) -> None:
        for row, (metric, label) in zip(axes, _DYNAMICS, strict=True):
            for axis, setting in zip(row, shown, strict=True):
                for method in study.methods:
                    steps, values = _series(results, study, method, setting, metric)
                    if len(values):
                        style = {**look(method), "marker": ""}
                        band(axis, np.array(steps) / 1000, values, method, style)
            row[0].set_ylabel(label)
        for axis, setting in zip(axes[0], shown, strict=True):
            axis.set_title(setting)
        for axis in axes[-1]:
            thousands(axis)
        axes[0, 0].legend(fontsize=9)

    size = (len(_DYNAMICS), len(shown))
    svg, files = draw(f"{study.name}-dynamics", size, (3.1 * len(shown) + 0.8, 9.2), paint, folder)
    caption = (
        f"Inside the training: running mean over {_WINDOW} iterations, averaged over seeds, shaded "
        f"one standard deviation. PPO's weight is its own advantage, clipped; it has one critic."
    )
    head = ["Setting, method", *(f"{label}: first tenth → last" for _, label in _DYNAMICS)]
    rows = [
        [
            html.text(f"{setting}, {method}"),
            *(
                _ends(_series(results, study, method, setting, metric)[1])
                for metric, _ in _DYNAMICS
            ),
        ]
        for setting in shown
        for method in study.methods
    ]
    return html.figure(svg, caption, html.table("Dynamics", head, rows), files)


def settled(results: Results, study: StudyRecord, split: str = "test") -> str:
    """Convergence step, peak and late variance of every curve (Sec. 5.3)."""
    rows = []
    for setting in study.settings:
        for method in study.methods:
            steps, values = curve(results, study, method, setting, split, "success")
            if not len(values):
                continue
            best, at = peak(steps, values)
            variance = late_variance(steps, values)
            rows.append(
                [
                    html.text(f"{setting}, {method}"),
                    f"{convergence_step(steps, values):,}",
                    f"{100 * best:.1f} at {at:,}",
                    f"{100 * values.mean(axis=0)[-1]:.1f}",
                    "–" if math.isnan(variance) else f"{variance:.1f}",
                ]
            )
    head = [
        "Setting, method", "Settled after, steps", "Peak, %", "End, %", "Late variance, points²",
    ]  # fmt: skip
    caption = (
        f"How the curves go {_SPLITS[split]}: settled is the first point from which the mean stays "
        f"within 2 points of its end; late is the last 30 % of training. The points are few, and "
        f"of fewer episodes than the final evaluations."
    )
    return html.table(caption, head, rows, sortable=True) if rows else ""


def _episodes(
    results: Results, study: StudyRecord, settings: Sequence[str], split: str
) -> set[int]:
    """How many episodes the points of the curves are of."""
    return {
        point.episodes
        for setting in settings
        for method in study.methods
        for record in cells(results, study, method, setting).values()
        for point in record.curve
        if (point.env, point.split) == (setting, split)
    }


def _points(record: RunRecord, setting: str, split: str, what: str) -> list[tuple[int, float]]:
    return [
        (point.env_steps, getattr(point, what) / point.episodes)
        for point in record.curve
        if (point.env, point.split) == (setting, split)
    ]


def _series(
    results: Results, study: StudyRecord, method: str, setting: str, metric: str
) -> tuple[list[float], np.ndarray]:
    lines, steps = [], []
    for record in cells(results, study, method, setting).values():
        values = record.series.get(metric, ())
        if values and all(value is not None for value in values):
            lines.append(_smooth(np.array(values, dtype=float)))
            steps = [float(step or 0) for step in record.series["env_steps"]]
    kept = [line for line in lines if len(line) == len(steps)]
    return steps, np.array(kept).reshape(len(kept), len(steps))


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean of each value and the ones before it, up to a window."""
    sums = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    begins = np.maximum(0, ends - _WINDOW)
    return (sums[ends] - sums[begins]) / (ends - begins)


def _ends(values: np.ndarray) -> str:
    if not values.size:
        return "–"
    tenth = max(1, values.shape[1] // 10)
    return f"{values[:, :tenth].mean():.3g} → {values[:, -tenth:].mean():.3g}"


def _said(
    results: Results, study: StudyRecord, settings: Sequence[str], split: str, what: str
) -> str:
    rows = []
    for setting in settings:
        for method in study.methods:
            steps, values = curve(results, study, method, setting, split, what)
            if len(values):
                line = ", ".join(
                    f"{100 * mean:.0f} % at {step:,}"
                    for step, mean in zip(steps, values.mean(axis=0), strict=True)
                )
                rows.append([html.text(f"{setting}, {method}"), line])
    return html.table("Mean over seeds", ["Setting, method", "Curve"], rows)
