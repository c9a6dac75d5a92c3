"""Tables of the page and of the files beside it: what was measured, with the paper's figures."""

from __future__ import annotations

import math
from collections.abc import Sequence

from roadvla.evaluation.aggregate import EVEN
from roadvla.evaluation.evaluate import SPLITS
from roadvla.evaluation.stats import Estimate
from roadvla.report.paper import PRINTED, Cell
from roadvla.report.site import html
from roadvla.report.site.numbers import Entry, Overall, interval

NAMES = {"train": "ID", "test": "OOD"}


def study_table(study: str, caption: str, entries: Sequence[Entry], baseline: str) -> str:
    """Rates with deviation and interval, Δ, and differences to the baseline, setting by setting.

    Args:
        study: Its name, to find the paper's figures.
        caption: Of the table.
        entries: In order.
        baseline: What the others are compared with.
    """
    printed = PRINTED.get(study, {})
    adjusted = any(entry.adjusted for entry in entries)
    rows = []
    for entry in entries:
        row = [_heading(entry), *(_rate(entry, split) for split in SPLITS), _unmarked(entry.gap)]
        row += [_versus(entry, split) for split in SPLITS]
        if printed:
            told = printed.get(entry.setting, {}).get(entry.method, {})
            row += [_printed(told.get(split)) for split in SPLITS]
        rows.append(row)
    head = ["Setting, method", "ID, %", "OOD, %", "Δ = ID − OOD", "ID", "OOD"]
    groups = [("", 1), ("Measured here", 3), (f"Difference to {baseline}, points", 2)]
    if printed:
        head += ["ID, %", "OOD, %"]
        groups.append(("The paper's (OpenVLA-7B, ManiSkill)", 2))
    note = (
        " p is Holm-adjusted over the settings." if adjusted else ""
    ) + " ▲ and ▼ mark a paired difference whose 95 % interval excludes zero."
    return html.table(caption + note, head, rows, groups=groups)


def overall_table(rows: Sequence[Overall], baseline: str) -> str:
    """Means over settings, interquartile means, and how likely a run is better."""
    body = []
    for row in rows:
        line = [html.text(row.method)]
        line += [_spread(row.mean[split]) for split in SPLITS]
        line += [_estimate(row.iqm[split]) for split in SPLITS]
        line += [difference(row.versus.get(split)) for split in SPLITS]
        line += [difference(row.iqm_versus.get(split)) for split in SPLITS]
        line += [_improvement(row.improvement.get(split)) for split in SPLITS]
        body.append(line)
    head = ["Method", *(NAMES[split] for _ in range(5) for split in SPLITS)]
    groups = [
        ("", 1),
        ("Mean over settings, % (± deviation over seeds)", 2),
        ("Interquartile mean, %", 2),
        (f"Mean − {baseline}'s, points", 2),
        (f"IQM − {baseline}'s, points", 2),
        (f"Probability of improving on {baseline}, %", 2),
    ]
    caption = (
        "Over all settings. Brackets are 95 % intervals: of means, over seeds and episodes drawn "
        "in pairs; of interquartile means and improvement, over seeds, drawn once for settings "
        "that share their runs. ▲ and ▼ mark an interval that excludes what no difference would "
        "give: 0 points, or 50 % for improvement."
    )
    return html.table(caption, head, body, groups=groups)


def readings_table(entries: Sequence[Entry], baseline: str) -> str:
    """Every variant on one line, to be sorted; steps tell which comparisons are of equal cost."""
    base = next((e for e in entries if e.method == baseline), None)
    rows = []
    for entry in entries:
        if not entry.rate:
            continue
        steps = entry.env_steps + entry.extra_env_steps
        equal = base is not None and steps == base.env_steps + base.extra_env_steps
        label = f"{entry.env_steps:,}" + (
            f" + {entry.extra_env_steps:,}" if entry.extra_env_steps else ""
        )
        rows.append(
            [
                _heading(entry, setting=False),
                *(_rate(entry, split) for split in SPLITS),
                *(_versus(entry, split) for split in SPLITS),
                f'<span data-sort="{steps}">{label}{" =" if equal else ""}</span>',
            ]
        )
    head = ["Method", "ID, %", "OOD, %", f"ID − {baseline}'s", f"OOD − {baseline}'s", "Steps"]
    caption = (
        f"Steps are the run's own + those that its critic or start had taken before; = marks the "
        f"same sum as {baseline}'s. ▲ and ▼: the 95 % interval of the paired difference excludes "
        f"zero; no correction is made for the number of rows, so about one in twenty such marks "
        f"would appear without any difference."
    )
    left = [entry.method for entry in entries if not entry.rate]
    said = f"Not run: {', '.join(left)}." if left else ""
    return html.table(caption, head, rows, sortable=True) + html.paragraph(said, "note")


def _heading(entry: Entry, *, setting: bool = True) -> str:
    seeds = (
        ""
        if entry.complete
        else f' <span class="short">{len(entry.seeds)} of {entry.wanted} seeds</span>'
    )
    where = f"{html.text(entry.setting)}, " if setting else ""
    return f"{where}<b>{html.text(entry.method)}</b>{seeds}"


def _rate(entry: Entry, split: str) -> str:
    if split not in entry.rate:
        return '<span class="none">not run</span>'
    return (
        f"{_spread(entry.spread[split])} "
        f'<span class="interval">[{interval(entry.rate[split])}]</span>'
    )


def _spread(value: tuple[float, float]) -> str:
    mean, deviation = value
    spread = "" if math.isnan(deviation) else f" ± {100 * deviation:.1f}"
    return f'<span data-sort="{mean}">{100 * mean:.1f}{spread}</span>'


def _estimate(estimate: Estimate | None) -> str:
    if estimate is None:
        return "–"
    return f'{100 * estimate.mean:.1f} <span class="interval">[{interval(estimate)}]</span>'


def _improvement(estimate: Estimate | None) -> str:
    if estimate is None:
        return "–"
    over = int(estimate.low > EVEN) - int(estimate.high < EVEN)
    return (
        f"{100 * estimate.mean:.1f}{_marked(over)} "
        f'<span class="interval">[{interval(estimate)}]</span>'
    )


def _marked(sign: int) -> str:
    if not sign:
        return ""
    mark, words = (" ▲", "better") if sign > 0 else (" ▼", "worse")
    return f'<span class="mark" title="{words}">{mark}</span>'


def difference(estimate: Estimate | None, p: float | None = None) -> str:
    """Spell a paired difference in points with mark, interval and p-value, as HTML."""
    if estimate is None:
        return "–"
    tail = "" if p is None else f' <span class="p">p = {p:.2g}</span>'
    return (
        f'<span data-sort="{estimate.mean}">{100 * estimate.mean:+.1f}</span>'
        f"{_marked(estimate.sign)} "
        f'<span class="interval">[{interval(estimate, sign=True)}]</span>{tail}'
    )


def _versus(entry: Entry, split: str) -> str:
    return difference(entry.versus.get(split), entry.adjusted.get(split))


def _unmarked(estimate: Estimate | None) -> str:
    """A difference of which no mark says whether it is established, as of Δ it need not be."""
    if estimate is None:
        return "–"
    return (
        f'<span data-sort="{estimate.mean}">{100 * estimate.mean:+.1f}</span> '
        f'<span class="interval">[{interval(estimate, sign=True)}]</span>'
    )


def _printed(cell: Cell | None) -> str:
    return "–" if cell is None else f"{cell[0]:g} ± {cell[1]:g}"


def markdown(entries: Sequence[Entry], overall: Sequence[Overall], baseline: str) -> str:
    """The same as Markdown, for files and terminals."""
    lines = [
        f"| Setting | Method | Seeds | ID, % | OOD, % | Δ "
        f"| ID − {baseline}'s | OOD − {baseline}'s |",
        "|---" * 8 + "|",
    ]
    for entry in entries:
        cells = [_plain(entry.rate.get(split), entry.spread.get(split)) for split in SPLITS]
        gap = "–" if entry.gap is None else f"{100 * entry.gap.mean:+.1f}"
        versus = [_plain_difference(entry, split) for split in SPLITS]
        seeds = f"{len(entry.seeds)} of {entry.wanted}"
        lines.append(
            f"| {' | '.join([entry.setting, entry.method, seeds, *cells, gap, *versus])} |"
        )
    for row in overall:
        cells = [_plain(None, row.mean[split]) for split in SPLITS]
        versus = [
            "–" if (d := row.versus.get(split)) is None
            else f"{100 * d.mean:+.1f} [{interval(d, sign=True)}]{_mark(d)}"
            for split in SPLITS
        ]  # fmt: skip
        gap = f"{100 * (row.mean['train'][0] - row.mean['test'][0]):+.1f}"
        lines.append(f"| {' | '.join(['mean', row.method, '', *cells, gap, *versus])} |")
    return "\n".join(lines) + "\n"


def _plain(rate: Estimate | None, spread: tuple[float, float] | None) -> str:
    if spread is None:
        return "not run"
    mean, deviation = spread
    said = f"{100 * mean:.1f}" + ("" if math.isnan(deviation) else f" ± {100 * deviation:.1f}")
    return said if rate is None else f"{said} [{interval(rate)}]"


def _plain_difference(entry: Entry, split: str) -> str:
    estimate = entry.versus.get(split)
    return "–" if estimate is None else plain_difference(estimate, entry.adjusted.get(split))


def plain_difference(estimate: Estimate, p: float | None = None) -> str:
    """Spell a paired difference in points with interval, p-value and mark, as Markdown."""
    known = "" if p is None else f", p {p:.2g}"
    return f"{100 * estimate.mean:+.1f} [{interval(estimate, sign=True)}]{known}{_mark(estimate)}"


def _mark(estimate: Estimate) -> str:
    return {1: " ▲", -1: " ▼", 0: ""}[estimate.sign]
