"""The report: one Markdown page, its figures, and the table as Markdown and JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from roadvla.errors import UserError
from roadvla.evaluation.evaluate import SPLITS
from roadvla.evaluation.files import read_film
from roadvla.report import figures
from roadvla.report.dynamics import dynamics_table
from roadvla.report.runs import Run, read_runs
from roadvla.report.site import write_page
from roadvla.report.site.from_runs import results_of
from roadvla.report.summary import Summary, order_methods, summarize
from roadvla.report.tables import SPLIT_NAMES, markdown_table, sentences, table_json

_STATISTICS = """\
Rates are success at the last step, in percent. Brackets are 95 % intervals. With one seed they \
cover which episodes were drawn, but not which training run: they speak of that one policy. With \
several seeds an interval is the widest span of a bootstrap over seeds and episodes, Student's t \
over the seeds' own values, and a closed form over all episodes (Wilson for rates, Bonett-Price \
for differences on the same episodes, Newcombe for Δ). Differences to another method are taken \
episode by episode, on common seeds. ▲ and ▼ mark a difference only where the interval excludes \
0. No correction is made for the number of comparisons: about one in twenty marks would appear \
without any real difference."""


_COST = """\
As logged. Runs made at different times, or side by side on one machine, slow each other unevenly: \
do not take ratios from this figure. `benchmarks/bench_iteration.py` measures them."""


def write_report(
    runs: Sequence[Path], output: Path, *, baseline: str | None = None, command: str | None = None
) -> Summary:
    """Write ``report.md``, ``report.html``, ``table.md``, ``table.json`` and ``figures/``.

    Args:
        runs: Run folders, or folders that hold some.
        output: Folder for the report; an earlier report in it is replaced.
        baseline: Label of the method to compare with; plain PPO unless given.
        command: What was typed, to be quoted.

    Returns:
        The numbers of the table.

    Raises:
        UserError: If there is no run, a file is damaged, or the folder cannot be written.
    """
    loaded = read_runs(runs)
    methods = order_methods(loaded)
    loaded = tuple(sorted(loaded, key=lambda r: (methods.index(r.method), r.env or "", r.seed)))
    summary = summarize(loaded, baseline=baseline)
    tables = "\n\n".join(f"## {s}\n\n{markdown_table(summary, s)}" for s in summary.rows)
    try:
        (output / "figures").mkdir(parents=True, exist_ok=True)
        page = _page(loaded, summary, output, command)
        numbers = json.dumps(table_json(summary), indent=1)
        for name, text in (("report.md", page), ("table.md", tables), ("table.json", numbers)):
            (output / name).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot write the report to {output}: {error.strerror or error}; choose another folder"
        ) from error
    results = results_of(loaded, summary, command=command)
    if results is not None:
        write_page(results, output, command=command)
    return summary


def _page(runs: Sequence[Run], summary: Summary, output: Path, command: str | None) -> str:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    methods = list(dict.fromkeys(run.method for run in runs))
    parts = [
        f"# {', '.join(methods)}",
        f"Written {now}" + (f" by `{command}`." if command else "."),
    ]
    trained = [run.env for run in runs if run.env and run.metrics and not run.is_warmup]
    for setting in dict.fromkeys([*summary.rows, *trained]):
        parts += [f"## {setting}", *_setting(runs, summary, setting, output)]
    cost = output / "figures" / "cost.png"
    if figures.cost_split(runs, cost):
        parts += ["## Cost", _image(cost, output, "Seconds per iteration by phase"), _COST]
    parts += ["## How to read the numbers", _STATISTICS, "## Where they come from", _sources(runs)]
    parts.append(_origins(runs, output))
    return "\n\n".join(parts)


def _setting(runs: Sequence[Run], summary: Summary, setting: str, output: Path) -> list[str]:
    parts = []
    if setting in summary.rows:
        parts.append(markdown_table(summary, setting))
        said = sentences(summary, setting)
        if said:
            parts.append("\n".join(f"- {sentence}" for sentence in said))
        elif summary.baseline is None:
            parts.append("There is no PPO run here to compare with.")
    folder = output / "figures"
    here = [run for run in runs if run.env == setting]
    curves, inner = folder / f"{setting}_adaptation.png", folder / f"{setting}_diagnostics.png"
    if figures.adaptation_curves(here, setting, summary, curves):
        parts.append(_image(curves, output, f"Adaptation curves of {setting}"))
    if figures.diagnostics(here, setting, inner):
        parts += [_image(inner, output, f"Diagnostics of {setting}"), dynamics_table(here)]
    return parts + _films(runs, setting, output)


def _films(runs: Sequence[Run], setting: str, output: Path) -> list[str]:
    """One strip per method and split: the first episodes of the first seed, never chosen ones."""
    parts = []
    for method in dict.fromkeys(run.method for run in runs):
        for split in SPLITS:
            filmed = [r for r in runs if r.method == method and (setting, split) in r.films]
            filmed = [run for run in filmed if run.env == setting] or filmed
            if not filmed:
                continue
            run = filmed[0]
            title = f"{method}, {setting}, {SPLIT_NAMES[split]}, seed {run.seed}"
            name = f"{setting}_{split}_{_file_name(method)}_film.png"
            path = output / "figures" / name
            figures.film_strip(read_film(run.films[setting, split]), title, path)
            parts.append(_image(path, output, f"First episodes of {title}"))
    return parts


def _sources(runs: Sequence[Run]) -> str:
    machines = {e.machine for run in runs for e in run.evaluations.values()}
    machines |= {str(run.config["machine"]) for run in runs if "machine" in run.config}
    dates = sorted(e.date[:10] for run in runs for e in run.evaluations.values())
    alike = [e for run in runs for e in run.evaluations.values()]
    lines = [f"- Machine: {machine}" for machine in sorted(machines)]
    if dates:
        span = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
        lines.append(f"- Evaluated: {span}")
        lines.append(
            f"- Simulator: {_list({e.sim for e in alike})}; sampling temperature: "
            f"{_list({f'{e.temperature:g}' for e in alike})}; horizon: "
            f"{_list({str(e.horizon) for e in alike})} steps"
        )
    versions = {
        str(run.config["roadvla_version"]) for run in runs if "roadvla_version" in run.config
    }
    if versions:
        lines.append(f"- roadvla {_list(versions)}")
    return "\n".join(lines)


def _origins(runs: Sequence[Run], output: Path) -> str:
    """List every run folder, relative to the report, with the command that made it."""
    lines = [
        "| Run | Method | Adapted on | Seed | Iterations | Episodes evaluated | Command |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        iterations = run.metrics[-1]["iteration"] if run.metrics else "–"
        episodes = {e.episodes for e in run.evaluations.values()}
        adapted = run.env if run.env and not run.is_warmup else "–"
        command = run.config.get("command")
        lines.append(
            f"| `{os.path.relpath(run.folder, output)}` | {run.method} | {adapted} | {run.seed} "
            f"| {iterations} | {_list({str(n) for n in episodes}) or '–'} "
            f"| {f'`{command}`' if command else '–'} |"
        )
    return "\n".join(lines)


def _image(path: Path, output: Path, text: str) -> str:
    return f"![{text}]({path.relative_to(output).as_posix()})"


def _file_name(method: str) -> str:
    return "".join(c if c.isalnum() or c in "-._" else "-" for c in method)


def _list(values: set[str]) -> str:
    return ", ".join(sorted(values))
