"""Putting the page together: what is there is shown, what is not is said."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from roadvla.errors import UserError
from roadvla.evaluation.results import Results, StudyRecord
from roadvla.report.site import html
from roadvla.report.site.curves import adaptation, dynamics, settled
from roadvla.report.site.failing import bars, caution, fates, told
from roadvla.report.site.films import players
from roadvla.report.site.numbers import Entry, Overall, entries, established, overall, verdict
from roadvla.report.site.origins import cost, provenance, summary, warnings
from roadvla.report.site.plots import Look
from roadvla.report.site.tables import markdown, overall_table, readings_table, study_table
from roadvla.report.site.tuned import Rival, rivals, tuned_markdown, tuned_table

_ORDER = (
    *("table1", "table2", "table5", "alpha", "reference", "dynamics", "grasp"),
    *("failures", "readings", "cost"),
)
_FATES = ("ER-Repositioning", "VR-DynamicTexture")
_DYNAMICS = ("VR-UnseenTable", "CR-MultiObject", "ER-Repositioning")


def write_page(results: Results, output: Path, *, command: str | None = None) -> Path:
    """Write ``report.html``, ``figures/`` and ``tables/``.

    The HTML file stands alone: it needs no other file, no server and no network.

    Args:
        results: Studies and records.
        output: Folder; an earlier page in it is replaced.
        command: What was typed, to be quoted.

    Returns:
        The HTML file.

    Raises:
        UserError: If the folder cannot be written.
    """
    page = output / "report.html"
    try:
        output.mkdir(parents=True, exist_ok=True)
        builder = _Builder(results, output)
        text = builder.page(command)
        page.write_text(text, encoding="utf-8")
        builder.write_tables()
    except OSError as error:
        raise UserError(
            f"cannot write the page to {output}: {error.strerror or error}; choose another folder"
        ) from error
    return page


class _Builder:
    """Computes each study's numbers once, and shows them."""

    def __init__(self, results: Results, output: Path) -> None:
        self._results, self._output = results, output
        self._look = Look(["ppo", "road"])
        self._studies = sorted(
            results.studies.values(),
            key=lambda s: (_ORDER.index(s.name) if s.name in _ORDER else len(_ORDER), s.name),
        )
        studies = self._studies
        self._entries: dict[str, list[Entry]] = {
            study.name: entries(results, study, p_values=study.name == "table1")
            for study in studies
        }
        self._overall: dict[str, list[Overall]] = {
            study.name: overall(results, study) if len(study.settings) > 1 else []
            for study in studies
        }

        self._rivals: dict[str, dict[bool, list[Rival]]] = {
            study.name: {
                in_all: rivals(results, study, self._entries[study.name], in_all=in_all)
                for in_all in (False, True)
            }
            for study in studies
            if study.name == "readings"
        }

    def page(self, command: str | None) -> str:
        """The whole file."""
        sections = [
            html.section("In short", *self._headline(), name="in-short"),
            *(self._section(study) for study in self._studies),
            html.section("How to read the numbers", *_READING, name="statistics"),
            html.section(
                "Where they come from",
                html.listing(summary(self._results)),
                provenance(self._results),
                name="provenance",
            ),
        ]
        shown = [part for part in sections if part]
        sim = next((r.sim for r in self._results.records.values()), "")
        title = f"ROAD-VLA against PPO on {sim or 'no simulator yet'}"
        now = (
            datetime.now(UTC)
            .isoformat(timespec="minutes")
            .replace("T", " ")
            .replace("+00:00", " UTC")
        )
        written = f"Written {now}" + (f" by {command}" if command else "")
        return _TEMPLATE.format(
            title=html.text(title),
            css=_asset("page.css"),
            js=_asset("page.js"),
            written=html.text(written),
            toc=_contents(shown),
            warnings=_warned(warnings(self._results)),
            sections="\n".join(shown),
        )

    def write_tables(self) -> None:
        """The tables as Markdown, and all numbers as JSON."""
        folder = self._output / "tables"
        folder.mkdir(parents=True, exist_ok=True)
        numbers = {}
        for name, study in self._results.studies.items():
            rows, total = self._entries[name], self._overall[name]
            text = markdown(rows, total, study.baseline)
            (folder / f"{name}.md").write_text(f"{study.title}\n\n{text}", encoding="utf-8")
            for in_all, found in self._rivals.get(name, {}).items():
                path = folder / f"{name}-tuned-{'all' if in_all else 'own'}-steps.md"
                path.write_text(tuned_markdown(found), encoding="utf-8")
            numbers[name] = {
                "entries": [asdict(row) for row in rows],
                "overall": [asdict(row) for row in total],
            }
        text = json.dumps(_without_nan(numbers), indent=1, allow_nan=False)
        (folder / "tables.json").write_text(f"{text}\n", encoding="utf-8")

    def _headline(self) -> list[str]:
        """Say what the first study that spans several settings establishes about ROAD."""
        study = next((s for s in self._studies if self._overall[s.name]), None)
        total = {} if study is None else {row.method: row for row in self._overall[study.name]}
        ours = "road" if "road" in total else next(reversed(total), "")
        if study is None or ours in ("", study.baseline):
            return [html.paragraph("No comparison over several settings is finished yet.")]
        base, versus = study.baseline, total[ours].versus
        compared = [e for e in self._entries[study.name] if e.method == ours]
        won, lost = (
            [e.setting for e in compared if "test" in e.versus and e.versus["test"].sign == sign]
            for sign in (1, -1)
        )
        return [
            *(
                html.paragraph(f"{where}: {verdict(versus.get(split), ours, base)}.", "verdict")
                for split, where in (("test", "Out of distribution"), ("train", "In distribution"))
            ),
            html.paragraph(
                f"Means over {len(study.settings)} settings; {len(study.seeds)} "
                f"{'seeds' if len(study.seeds) > 1 else 'seed'}, {study.episodes} episodes of each "
                f"set. Out of distribution {ours} is established as better than {base} in "
                f"{_named(won)} and as worse in {_named(lost)} of the settings."
            ),
            overall_table(self._overall[study.name], base),
        ]

    def _section(self, study: StudyRecord) -> str:
        show = _SHOWN.get(study.name, _Builder._table)
        title = f"{study.title}" + (f" ({study.paper})" if study.paper else "")
        claim = f"The paper: {study.claim}" if study.claim else ""
        return html.section(
            title, html.paragraph(claim, "paper"), *show(self, study), name=study.name
        )

    def _table(self, study: StudyRecord) -> list[str]:
        made = study_table(study.name, study.title + ".", self._entries[study.name], study.baseline)
        return [self._found(study), made, *self._curves(study)]

    def _found(self, study: StudyRecord) -> str:
        return html.paragraph(established(self._entries[study.name], study.baseline))

    def _curves(self, study: StudyRecord) -> list[str]:
        return [adaptation(self._results, study, self._look, self._output)]

    def _table1(self, study: StudyRecord) -> list[str]:
        return [
            *self._table(study),
            adaptation(self._results, study, self._look, self._output, split="train"),
            settled(self._results, study),
        ]

    def _dynamics(self, study: StudyRecord) -> list[str]:
        return [dynamics(self._results, study, self._look, self._output, _DYNAMICS)]

    def _grasp(self, study: StudyRecord) -> list[str]:
        return [
            adaptation(self._results, study, self._look, self._output, split=split, what="grasped")
            for split in ("test", "train")
        ]

    def _readings(self, study: StudyRecord) -> list[str]:
        return [
            self._found(study),
            readings_table(self._entries[study.name], study.baseline),
            *(
                tuned_table(found, in_all=in_all)
                for in_all, found in self._rivals[study.name].items()
            ),
        ]

    def _failures(self, study: StudyRecord) -> list[str]:
        crossed = [
            fates(self._results, study, study.methods[1], study.methods[0], setting)
            for setting in _FATES
            if setting in study.settings and len(study.methods) == 2
        ]
        warned, shown = caution(self._results, study)
        note = [html.paragraph(warned, "note")] if warned else []
        if not shown:
            return [*note, players(self._results, study, study.methods)]
        return [
            *note,
            html.listing(told(self._results, study, study.methods)),
            bars(self._results, study, self._output),
            bars(self._results, study, self._output, split="train"),
            *crossed,
            players(self._results, study, study.methods),
        ]

    def _cost(self, study: StudyRecord) -> list[str]:
        return [cost(self._results, study, self._output)]


_SHOWN: dict[str, Callable[[_Builder, StudyRecord], list[str]]] = {
    "table1": _Builder._table1,
    "dynamics": _Builder._dynamics,
    "grasp": _Builder._grasp,
    "readings": _Builder._readings,
    "failures": _Builder._failures,
    "cost": _Builder._cost,
}

_READING = (
    html.paragraph(
        "Success is read at the last step of an episode. Every method meets the same numbered "
        "episodes, so two methods are compared episode by episode. Cells show mean ± standard "
        "deviation over seeds, as the paper prints them, and in brackets a 95 % interval."
    ),
    html.paragraph(
        "An interval is the widest span of three: a bootstrap that draws seeds and episodes, "
        "Student's t over the seeds' own values, and a closed form over all episodes (Wilson for "
        "rates, Bonett and Price for differences on the same episodes, Newcombe for Δ). With three "
        "seeds Student's t usually decides, and it is wide: differences of a few points between "
        "methods often cannot be established. A p-value is the level at which that interval lets "
        "go of zero; Holm's correction makes the seven settings' p-values safe to read together."
    ),
    html.paragraph(
        "The paper's figures are of a 7-billion-parameter model in another simulator. They stand "
        "beside ours for orientation; only the direction of differences can be compared."
    ),
)

_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="roadvla">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{css}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the content</a>
<div class="layout">
<nav aria-label="Contents"><details open><summary>Contents</summary><ol>{toc}</ol></details></nav>
<main id="main">
<header>
<div class="top"><h1>{title}</h1><button type="button" class="theme" hidden>Dark</button></div>
<p class="meta">{written}</p>
{warnings}
</header>
{sections}
</main>
</div>
<script>
{js}</script>
</body>
</html>
"""


def _asset(name: str) -> str:
    return (files("roadvla.report.site") / name).read_text(encoding="utf-8")


def _contents(sections: Sequence[str]) -> str:
    items = []
    for part in sections:
        key = part.split('id="', 1)[1].split('"', 1)[0]
        title = part.split("<h2", 1)[1].split(">", 1)[1].split("</h2>", 1)[0]
        items.append(f'<li><a href="#{key}">{title}</a></li>')
    return "".join(items)


def _warned(said: Sequence[str]) -> str:
    return f'<div class="warning" role="note">{html.listing(said)}</div>' if said else ""


def _without_nan(value: Any) -> Any:
    """What is unknown is ``null`` in JSON."""
    if isinstance(value, dict):
        return {name: _without_nan(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _named(settings: Sequence[str]) -> str:
    return f"{len(settings)} ({', '.join(settings)})" if settings else "none"
