"""How training went, as a table: a few logged quantities at its start and at its end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from roadvla.report.runs import Run

_TENTH = 10
_COLUMNS = (
    ("policy/entropy", "Entropy, nats per token", "{:.2f}"),
    ("policy/kl", "Mean KL(old‖new) per iteration, nats", "{:.3f}"),
    ("guidance/agreement", "Critic agreement", "{:.2f}"),
    ("guidance/weight_mean", "ω̄", "{:+.3f}"),
    ("guidance/time_step_share", "ω's variance due to the time step", "{:.2f}"),
    ("critic/explained_variance", "Explained variance of returns", "{:.2f}"),
)
_OVERALL = ("policy/kl",)  # 0 at both ends: the head learns alone first, the rate ends at 0


def dynamics_table(runs: Sequence[Run]) -> str:
    """Make a Markdown table of means over a run's first and last tenth, averaged over seeds.

    Args:
        runs: Those of one setting; runs without metrics, such as a warm-up, are left out.

    Returns:
        The table; empty if nothing was logged.
    """
    methods: dict[str, list[Run]] = {}
    for run in runs:
        if run.metrics and not run.is_warmup:
            methods.setdefault(run.method, []).append(run)
    if not methods:
        return ""
    head = "| Method | " + " | ".join(title for _, title, _ in _COLUMNS) + " |"
    lines = [head, "|---" * (len(_COLUMNS) + 1) + "|"]
    for method, group in methods.items():
        cells = [_cell(group, name, form) for name, _, form in _COLUMNS]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    note = "First → last tenth of the iterations (KL: all of them), averaged over seeds."
    return "\n".join(lines) + "\n\n" + note


def _cell(group: Sequence[Run], name: str, form: str) -> str:
    series = [values for _, values in (run.series(name) for run in group) if len(values)]
    if not series:
        return "–"
    if name in _OVERALL:
        return form.format(np.mean([values.mean() for values in series]))
    tenths = [max(1, len(values) // _TENTH) for values in series]
    first = np.mean([values[:n].mean() for values, n in zip(series, tenths, strict=True)])
    last = np.mean([values[-n:].mean() for values, n in zip(series, tenths, strict=True)])
    return f"{form.format(first)} → {form.format(last)}"
