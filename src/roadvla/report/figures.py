"""Figures from run files: adaptation curves, diagnostics, cost, film strips.

Importing this module loads Matplotlib. Colours are Okabe and Ito's, which people with
colour-blindness can tell apart; markers and line styles repeat the distinction.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from roadvla.evaluation.evaluate import Film
from roadvla.evaluation.stats import wilson
from roadvla.report.runs import Run
from roadvla.report.summary import Summary

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"
_LINES = ("-", "--", "-.", ":")
_WARMUP_COLOUR = "#666666"
_SUCCESS, _FAILURE = "#009E73", "#D55E00"
_STYLE: dict[Any, Any] = {
    "figure.dpi": 130,
    "savefig.bbox": "tight",
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
_PHASES = ("rollout", "reference", "update", "evaluation")
_DIAGNOSTICS = (
    ("policy/entropy", "Policy entropy", "nats per token"),
    ("policy/kl", "KL, old to new policy", "nats"),
    ("critic/explained_variance", "Explained variance of returns", "share"),
    ("guidance/weight_mean", "Mean weight ω̄", "ω̄"),
    ("guidance/agreement", "Agreement of the two critics", "share of steps"),
    ("guidance/time_step_share", "ω's variance due to the step", "share"),
)


def adaptation_curves(runs: Sequence[Run], setting: str, summary: Summary, path: Path) -> bool:
    """Success against environment steps: both splits as evaluated, and the rollouts.

    Args:
        runs: Adapted on the setting; runs without metrics are left out.
        setting: The setting.
        summary: Final evaluations, drawn at the right, and the warm-up's, drawn as a line.
        path: PNG to write.

    Returns:
        Whether there was anything to draw.
    """
    groups = _groups(runs)
    if not groups:
        return False
    figure, axes = _figure(1, 3, (13.5, 4.2), sharey=True)
    panels = (
        ("eval/train/success_rate", "In distribution (ID)", "train"),
        ("eval/test/success_rate", "Out of distribution (OOD)", "test"),
        ("rollout/success_rate", "Rollouts, while learning (smoothed)", None),
    )
    several = any(len(group) > 1 for group in groups.values())
    for axis, (metric, title, split) in zip(axes.flat, panels, strict=True):
        for place, group in enumerate(groups.values()):
            if split is None:
                _draw_rollouts(axis, group, metric, place)
            else:
                _draw_evaluations(axis, group, split, place)
        if split is not None:
            _draw_finals(axis, summary, setting, split, list(groups))
        axis.set(title=title, xlabel="Environment steps", ylim=(-2, 102))
        _thousands(axis)
    axes.flat[0].set_ylabel("Success at the last step (%)")
    band = "range over seeds; thin lines: each seed" if several else "Wilson 95 % interval"
    figure.suptitle(
        f"{setting}: adaptation\nBand: {band}. Outlined marks: final evaluation, 95 % interval.",
        fontsize=12,
        y=1.06,
    )
    _legend(figure, axes)
    _save(figure, path)
    return True


def diagnostics(runs: Sequence[Run], setting: str, path: Path) -> bool:
    """Entropy, KL, critics and guidance against environment steps; False if nothing was logged."""
    groups = _groups(runs)
    names = [name for name, *_ in _DIAGNOSTICS if any(len(run.series(name)[0]) for run in runs)]
    if not groups or not names:
        return False
    figure, axes = _figure(2, 3, (13.5, 7.2))
    for axis, (name, title, unit) in zip(axes.flat, _DIAGNOSTICS, strict=True):
        for place, group in enumerate(groups.values()):
            _draw_mean(axis, [run.series(name) for run in group], group[0].method, place)
        if name not in names:
            axis.text(0.5, 0.5, "not logged", transform=axis.transAxes, ha="center", color="gray")
            axis.set(xticks=[], yticks=[])
        else:
            _thousands(axis)
        axis.set(title=title, ylabel=unit, xlabel="Environment steps")
    figure.suptitle(f"{setting}: diagnostics (mean over seeds, band: range)", fontsize=12, y=0.95)
    figure.subplots_adjust(hspace=0.42, wspace=0.36, bottom=0.07)
    _legend(figure, axes)
    _save(figure, path)
    return True


def cost_split(runs: Sequence[Run], path: Path) -> bool:
    """Seconds per iteration by phase and method; False if no times were logged."""
    groups = {m: g for m, g in _groups(runs).items() if _phase_seconds(g)["iteration"] > 0}
    if not groups:
        return False
    figure, axes = _figure(1, 1, (9.0, 1.4 + 0.6 * len(groups)))
    axis = axes.flat[0]
    seconds = {method: _phase_seconds(group) for method, group in groups.items()}
    training = {method: s["iteration"] - s["evaluation"] for method, s in seconds.items()}
    left = np.zeros(len(groups))
    for phase, colour in zip((*_PHASES, "other"), _COLOURS, strict=False):
        widths = np.array([s[phase] for s in seconds.values()])
        if widths.any():
            axis.barh(list(groups), widths, left=left, color=colour, label=phase, height=0.6)
        left += widths
    for method, end in zip(groups, left, strict=True):
        note = f" {training[method]:.2f} s without evaluation"
        axis.text(end, method, note, va="center", fontsize=10)
    axis.set(xlabel="Seconds per iteration (mean)", title="Where the time goes")
    axis.set_xlim(0, 1.6 * left.max())
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    below = (0.5, -0.55 / (0.4 + 0.6 * len(groups)))
    axis.legend(loc="upper center", bbox_to_anchor=below, ncol=5, frameon=False)
    _save(figure, path)
    return True


def film_strip(film: Film, title: str, path: Path, *, rows: int = 4) -> None:
    """Every third frame (fewer of long episodes) of the first episodes, with their outcome."""
    frames = film.frames.numpy()[:rows]
    last = frames.shape[1] - 1
    stride = max(3, math.ceil(last / 10))
    steps = [*range(0, last, stride), last]
    size, gap = frames.shape[3], max(1, frames.shape[3] // 24)
    pitch = size + gap
    height = 1.75 * len(frames) + 0.6
    figure, axes = _figure(len(frames), 1, (1.25 * len(steps) + 0.2, height))
    for row, (axis, episode) in enumerate(zip(axes.flat, frames, strict=True)):
        outcome, colour = ("✓ success", _SUCCESS) if film.success[row] else ("✗ failure", _FAILURE)
        picture = np.full((episode.shape[1], pitch * len(steps) - gap, 3), 255, dtype=np.uint8)
        for column, step in enumerate(steps):
            picture[:, pitch * column : pitch * column + size] = episode[step]
        axis.imshow(picture, interpolation="nearest", aspect="equal")
        centres = [pitch * column + size / 2 for column in range(len(steps))]
        axis.set_xticks(centres, [f"step {step}" for step in steps], fontsize=8)
        axis.set_yticks([])
        axis.tick_params(length=0, pad=2)
        axis.grid(visible=False)
        axis.spines[:].set_visible(False)
        corner = (pitch * (len(steps) - 1) - 0.5, -0.5)
        frame = Rectangle(corner, size, len(picture), fill=False, ec=colour, lw=3, clip_on=False)
        axis.add_patch(frame)
        text = textwrap.shorten(film.instructions[row], 90, placeholder="…")
        label = f"{outcome} · episode {film.episode_ids[row]}: “{text}”"
        axis.set_title(label, loc="left", fontsize=10, color=colour)
    figure.suptitle(title, fontsize=12, x=0.02, ha="left", y=1.0, va="top")
    figure.subplots_adjust(
        left=0.02, right=0.99, bottom=0.2 / height, top=1 - 0.65 / height, hspace=0.4
    )
    _save(figure, path)


def smooth(values: Float[np.ndarray, " n"], window: int) -> Float[np.ndarray, " n"]:
    """Centred moving average; the window shrinks towards both ends so as not to bend them."""
    half = window // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    reach = np.minimum(half, np.minimum(places, len(values) - 1 - places))
    return (sums[places + reach + 1] - sums[places - reach]) / (2 * reach + 1)


def _groups(runs: Sequence[Run]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.metrics and not run.is_warmup:
            groups.setdefault(run.method, []).append(run)
    return groups


def _draw_evaluations(axis: Axes, group: list[Run], split: str, place: int) -> None:
    series = [run.series(f"eval/{split}/success_rate") for run in group]
    series = [(steps, 100 * rate) for steps, rate in series]
    if len(group) > 1:
        _draw_mean(axis, series, group[0].method, place, thin=True)
        return
    steps, rate = series[0]
    if len(steps) == 0:
        return
    axis.plot(steps, rate, label=group[0].method, ms=5, **_look(place))
    counts = dict(zip(*group[0].series(f"eval/{split}/episodes"), strict=True))
    if all(step in counts for step in steps):
        ends = [
            wilson(round(share / 100 * counts[step]), int(counts[step]))
            for step, share in zip(steps, rate, strict=True)
        ]
        low, high = 100 * np.array(ends).T
        axis.fill_between(steps, low, high, color=_look(place)["color"], alpha=0.15, lw=0)


def _draw_rollouts(axis: Axes, group: list[Run], metric: str, place: int) -> None:
    series = []
    for run in group:
        steps, rate = run.series(metric)
        if len(group) == 1:
            axis.plot(steps, 100 * rate, color=_look(place)["color"], alpha=0.2, lw=1)
        series.append((steps, 100 * smooth(rate, max(3, len(rate) // 10))))
    _draw_mean(axis, series, group[0].method, place)


def _draw_mean(
    axis: Axes,
    series: list[tuple[np.ndarray, np.ndarray]],
    label: str,
    place: int,
    *,
    thin: bool = False,
) -> None:
    """Mean over seeds where all of them have a value, and the range between them."""
    series = [(steps, values) for steps, values in series if len(steps)]
    if not series:
        return
    look = _look(place)
    common = sorted(set.intersection(*(set(steps) for steps, _ in series)))
    table = np.array([[dict(zip(steps, v, strict=True))[s] for s in common] for steps, v in series])
    if len(common) > 40 or not thin:
        look = {**look, "marker": ""}
    axis.plot(common, table.mean(0), label=label, ms=5, **look)
    if len(series) > 1:
        axis.fill_between(common, table.min(0), table.max(0), color=look["color"], alpha=0.15, lw=0)
        for steps, values in series if thin else []:
            axis.plot(steps, values, color=look["color"], alpha=0.35, lw=0.8)


def _draw_finals(
    axis: Axes, summary: Summary, setting: str, split: str, methods: list[str]
) -> None:
    """The warm-up as a line, and each final evaluation with its interval at the right edge."""
    end = max((float(np.max(line.get_xdata())) for line in axis.lines), default=1.0) or 1.0
    for row in summary.rows.get(setting, ()):
        if split not in row.rates:
            continue
        mean, low, high = (
            100 * x for x in (row.rates[split].mean, row.rates[split].low, row.rates[split].high)
        )
        if row.warmup:
            axis.axhline(mean, color=_WARMUP_COLOUR, ls=":", lw=1.8, label=f"{row.method} (start)")
            axis.axhspan(low, high, color=_WARMUP_COLOUR, alpha=0.1, lw=0)
        elif row.method in methods:
            place = methods.index(row.method)
            look = {**_look(place), "ls": "none", "markeredgecolor": "black"}
            where = end * (1.05 + 0.04 * place)
            axis.errorbar(where, mean, [[mean - low], [high - mean]], capsize=3, ms=7, **look)


def _phase_seconds(group: Sequence[Run]) -> dict[str, float]:
    """Mean seconds per iteration of each phase; what no phase accounts for is ``other``."""

    def mean(name: str) -> float:
        total = sum(float(run.series(name)[1].sum()) for run in group)
        return total / max(1, sum(len(run.metrics) for run in group))

    seconds = {phase: mean(f"time/{phase}") for phase in _PHASES}
    known = sum(seconds.values())
    seconds["other"] = max(0.0, mean("time/iteration") - known)
    seconds["iteration"] = known + seconds["other"]
    return seconds


def _look(place: int) -> dict[str, Any]:
    return {
        "color": _COLOURS[place % len(_COLOURS)],
        "marker": _MARKERS[place % len(_MARKERS)],
        "ls": _LINES[place % len(_LINES)],
        "lw": 2,
    }


def _figure(
    rows: int, columns: int, size: tuple[float, float], *, sharey: bool = False
) -> tuple[Figure, np.ndarray]:
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size)
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False, sharey=sharey)
    return figure, axes


def _thousands(axis: Axes) -> None:
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1000:g}k" if x else "0"))


def _legend(figure: Figure, axes: np.ndarray) -> None:
    found: dict[str, Any] = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(
        found.values(), found, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncol=5, frameon=False
    )


def _save(figure: Figure, path: Path) -> None:
    with mpl.rc_context(_STYLE):
        figure.savefig(path, metadata={"Software": None})
