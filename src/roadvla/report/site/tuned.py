"""Every reading against a PPO that was tuned: of as many own steps, and of as many steps in all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from roadvla.evaluation.aggregate import holm, p_value
from roadvla.evaluation.evaluate import SPLITS
from roadvla.evaluation.records import RunRecord
from roadvla.evaluation.results import Results, StudyRecord
from roadvla.evaluation.stats import Estimate, paired_difference
from roadvla.report.site import html
from roadvla.report.site.numbers import Entry, cells, paired
from roadvla.report.site.tables import NAMES, difference, plain_difference

_PLAIN = {"algo": "ppo", "surrogate_advantage": "int", "control": "none", "reference_critic": None}


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A reading beside the best plain PPO of some number of steps.

    Attributes:
        setting: By paper alias.
        method: The reading.
        against: The PPO.
        steps: Of the comparison.
        versus: Difference on the same episodes by split.
        p: Of it, by split, not adjusted.
        adjusted: p by split, after Holm's correction over all rows of the table.
    """

    setting: str
    method: str
    against: str
    steps: int
    versus: dict[str, Estimate]
    p: dict[str, float]
    adjusted: dict[str, float] = field(default_factory=dict)


def rivals(
    results: Results, study: StudyRecord, rows: Sequence[Entry], *, in_all: bool
) -> list[Rival]:
    """Compare each finished method that is no plain PPO with the best plain PPO of as many steps.

    Best is by success out of distribution on the very episodes that are compared, which favours
    PPO: a reading that wins against it wins against PPO tuned with hindsight.

    Args:
        results: All records.
        study: Which.
        rows: Its rows, as ``entries`` has them.
        in_all: Whether steps that a critic or start had taken before count, on both sides.
    """
    found: list[Rival] = []
    for setting in study.settings:
        done = {row.method: row for row in rows if row.setting == setting and row.complete}
        records = {name: cells(results, study, name, setting) for name in done}
        steps = {name: _steps(row, in_all=in_all) for name, row in done.items()}
        plain = [n for n, runs in records.items() if all(map(_is_plain, runs.values()))]
        best = {
            steps[name]: name
            for name in sorted(plain, key=lambda name: done[name].rate["test"].mean)
        }
        for name, count in steps.items():
            if name in plain or count not in best:
                continue
            seeds = sorted(records[name])
            pairs = {
                split: paired(records[name], records[best[count]], seeds, setting, split)
                for split in SPLITS
            }
            rival = Rival(
                setting=setting,
                method=name,
                against=best[count],
                steps=count,
                versus={split: paired_difference(*pair) for split, pair in pairs.items()},
                p={split: p_value(*pair) for split, pair in pairs.items()},
            )
            found.append(rival)
    for split in SPLITS:
        for rival, p in zip(found, holm([rival.p[split] for rival in found]), strict=True):
            rival.adjusted[split] = p
    return found


def tuned_table(rows: Sequence[Rival], *, in_all: bool) -> str:
    """The comparison as a table, and in a sentence what it establishes."""
    if not rows:
        return ""
    body = [
        [
            f"{html.text(row.setting)}, <b>{html.text(row.method)}</b>",
            html.text(row.against),
            f"{row.steps:,}",
            *(difference(row.versus[split], row.adjusted[split]) for split in SPLITS),
        ]
        for row in rows
    ]
    counted = "in all, those of its critic or start with them" if in_all else "of its own training"
    about = (
        f"Each reading − the best plain PPO of as many steps {counted}. The PPO (epochs, rate, KL "
        f"stop, length) is chosen by these same episodes out of distribution, which favours it."
    )
    caption = (
        "Differences in points. ▲ and ▼: the 95 % interval excludes zero; p is Holm-adjusted over "
        "the rows."
    )
    head = ["Setting, method", "PPO", "Steps", *(NAMES[split] for split in SPLITS)]
    table = html.table(caption, head, body, sortable=True)
    return (
        html.paragraph(about)
        + html.paragraph(said(rows))
        + f"<details><summary>All {len(rows)} rows</summary>{table}</details>"
    )


def said(rows: Sequence[Rival]) -> str:
    """Count what the intervals establish, with and without the correction."""
    parts = []
    for split, where in (("test", "out of distribution"), ("train", "in distribution")):
        up = [row for row in rows if row.versus[split].sign > 0]
        down = [row for row in rows if row.versus[split].sign < 0]
        kept = [row.method for row in up if row.adjusted[split] <= 0.05]
        names = f" ({', '.join(row.method for row in up)})" if up else ""
        parts.append(
            f"{where} {len(up)} better{names}, of which {len(kept)} after Holm's correction, and "
            f"{len(down)} worse"
        )
    return f"Of {len(rows)} readings, {'; '.join(parts)}."


def tuned_markdown(rows: Sequence[Rival]) -> str:
    """The same as Markdown."""
    lines = ["| Setting | Method | PPO | Steps | ID | OOD |", "|---" * 6 + "|"]
    for row in rows:
        values = [plain_difference(row.versus[split], row.adjusted[split]) for split in SPLITS]
        about = f"{row.setting} | {row.method} | {row.against} | {row.steps:,}"
        lines.append(f"| {about} | {' | '.join(values)} |")
    return "\n".join([*lines, "", said(rows)]) + "\n"


def _is_plain(record: RunRecord) -> bool:
    algorithm = record.config.get("algorithm", {})
    return all(algorithm.get(name) == value for name, value in _PLAIN.items())


def _steps(entry: Entry, *, in_all: bool) -> int:
    return entry.env_steps + (entry.extra_env_steps if in_all else 0)
