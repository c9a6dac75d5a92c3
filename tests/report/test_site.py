"""The page: numbers by hand, nothing unescaped, nothing hidden, and it works in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from factory import make_run
from results_factory import SEEDS, SETTINGS, outcomes, record, study, write_results

from roadvla.cli import main
from roadvla.evaluation.aggregate import iqm_interval
from roadvla.evaluation.definition import failure_definition
from roadvla.evaluation.records import read_record, write_record
from roadvla.evaluation.results import read_results, write_study
from roadvla.evaluation.stats import Estimate
from roadvla.report.site import write_page
from roadvla.report.site.failing import shares, told
from roadvla.report.site.numbers import (
    Entry,
    _pooled,
    cells,
    entries,
    established,
    overall,
    verdict,
)
from roadvla.report.site.tables import overall_table
from roadvla.report.site.tuned import rivals, said

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ALL = ("table1", "table2", "alpha", "dynamics", "grasp", "failures", "readings", "cost")


class Reader(HTMLParser):
    """Collects ids, links, sources and tags that were opened and never closed."""

    VOID = ("meta", "link", "input", "br", "img", "path", "use", "rect", "line", "circle", "image")

    def __init__(self):
        super().__init__()
        self.ids, self.links, self.open, self.sources = [], [], [], []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if "id" in found:
            self.ids.append(found["id"])
        if "href" in found:
            self.links.append(found["href"])
        self.sources += [found[name] for name in ("src", "srcset") if name in found]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    root = write_results(tmp_path_factory.mktemp("results"), studies=[study(n) for n in ALL])
    return write_page(read_results(root), root / "report", command="roadvla report results")


def test_the_page_stands_alone(page):
    text = page.read_text()
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert reader.sources == []
    assert len(set(reader.ids)) == len(reader.ids)
    outside = [link for link in reader.links if not link.startswith(("#", "data:", "figures/"))]
    assert outside == []
    for link in reader.links:
        if link.startswith("#"):
            assert link[1:] in reader.ids
        elif link.startswith("figures/"):
            assert (page.parent / link).stat().st_size > 1000
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert page.stat().st_size < 15e6


def test_every_table_and_figure_can_be_read_aloud(page):
    text = page.read_text()
    assert text.count("<table") == text.count("<caption>")
    assert text.count("<figure>") == text.count("<summary>The numbers in words</summary>")
    assert "<th>" not in text  # each says of what it is the heading
    assert 'lang="en"' in text
    assert 'class="skip"' in text


def test_every_study_has_its_section_and_the_papers_claim(page):
    text = page.read_text()
    for name in ALL:
        assert f'<section id="{name}"' in text
        assert f'<a href="#{name}">' in text
    assert "The paper: A claim." in text
    drawing = text[text.index('<section id="dynamics"') :].split("</svg>")[0]
    assert ">VR-UnseenTable</text>" in drawing
    assert "The paper&#x27;s (OpenVLA-7B, ManiSkill)" in text


# PPO: 200 episodes, harder ones fail for all; so ROAD solves what PPO does and a tenth more.
def test_numbers_are_those_of_the_records(page):
    results = read_results(page.parents[1])
    found = entries(results, results.studies["table1"], p_values=True)
    road = next(e for e in found if (e.method, e.setting) == ("road", "CR-MultiObject"))
    rates = [
        {m: results.records[f"{m}-CR-MultiObject-seed{s}"].outcome("CR-MultiObject", "test")
         for m in ("ppo", "road")}
        for s in SEEDS
    ]  # fmt: skip
    means = {m: [r[m].success.mean() for r in rates] for m in ("ppo", "road")}
    assert road.spread["test"] == (
        pytest.approx(np.mean(means["road"])),
        pytest.approx(np.std(means["road"], ddof=1)),
    )
    assert road.versus["test"].mean == pytest.approx(np.mean(means["road"]) - np.mean(means["ppo"]))
    assert road.versus["test"].sign == 1
    assert road.p["test"] <= road.adjusted["test"] <= 3 * road.p["test"] + 1e-12
    assert (road.env_steps, road.extra_env_steps) == (10_000, 10_000)
    text = page.read_text()
    assert f"{100 * np.mean(means['road']):.1f} ± " in text


def test_the_average_is_over_settings_and_common_seeds(tmp_path):
    root = write_results(tmp_path, leave_out=("road-CR-MultiObject-seed1",))
    results = read_results(root)
    _, road = overall(results, results.studies["table1"])
    expected = np.mean(
        [
            results.records[f"road-{e}-seed{s}"].outcome(e, "test").success.mean()
            for e in SETTINGS
            for s in (0, 2)
        ]
    )
    assert road.mean["test"][0] == pytest.approx(expected)
    assert road.improvement["test"].mean == 1.0


def test_settings_that_share_runs_are_one_group(tmp_path):
    first, second, _ = SETTINGS
    root = write_results(tmp_path)
    for method in ("ppo", "road"):
        for seed in SEEDS:
            rates = [record(method, env, seed, (0.6, 0.4)) for env in (first, second)]
            both = tuple(outcome for made in rates for outcome in made.outcomes)
            write_record(replace(rates[0], envs=(first, second), outcomes=both), root / "records")
    cells = {m: {**e, second: e[first]} for m, e in study().cells.items()}
    results = read_results(root)
    shared = overall(results, study(cells=cells))[1]
    found = np.array([
        [results.records[cells["road"][e][str(s)]].outcome(e, "test").success.mean() for s in SEEDS]
        for e in SETTINGS
    ])  # fmt: skip
    assert shared.iqm["test"] == iqm_interval(found, (0, 0, 2))
    assert shared.iqm["test"] != iqm_interval(found, (0, 1, 2))


@pytest.mark.parametrize("gain", [0.3, 0.0])
def test_marks_over_settings_are_given_as_all_others(tmp_path, gain):
    results = read_results(write_results(tmp_path, gain=gain))
    text = overall_table(overall(results, results.studies["table1"]), "ppo")
    road = text[text.index("road") :]
    assert road.count('title="better"') == (6 if gain else 0)
    assert 'title="worse"' not in road
    swapped = replace(study(), baseline="road", methods=("road", "ppo"))
    text = overall_table(overall(results, swapped), "road")
    assert text.count('title="worse"') == (6 if gain else 0)


@pytest.mark.parametrize(
    ("gain", "says"), [(0.1, "road better ("), (0.0, "no difference established (")]
)
def test_the_verdict_is_what_the_interval_establishes(tmp_path, gain, says):
    results = read_results(write_results(tmp_path, gain=gain))
    text = write_page(results, tmp_path / "report").read_text()
    head = text[text.index('id="in-short"') : text.index('<section id="table1"')]
    assert says in head
    assert verdict(None, "road", "ppo") == "not measured yet"
    table = text[text.index('<section id="table1"') :].split("</table>")[0]
    assert ('title="better"' in table) == (gain > 0)
    made = entries(results, results.studies["table1"], p_values=False)
    sentence = established(made, "ppo")
    assert sentence in table
    ups, downs = (
        [e for e in made if e.versus and e.versus["test"].sign == sign] for sign in (1, -1)
    )
    assert (len(ups) == 3, downs) == (gain > 0, [])
    named = ", ".join(f"road on {e.setting}" for e in ups)
    assert (
        f"distribution {f'3 ({named}) are' if gain else 'none is'} better and none is" in sentence
    )


def test_many_comparisons_are_counted_but_not_named():
    versus = {
        s: Estimate(mean=-0.1, low=-0.2, high=-0.05, seeds=1, episodes=9) for s in ("train", "test")
    }
    made = [
        Entry(method=f"m{i}", setting="s", seeds=(0,), wanted=1, versus=versus) for i in range(5)
    ]
    assert established(made, "ppo") == (
        "Here: of 5 comparisons with ppo, not corrected for their number, out of distribution none "
        "is better and 5 are worse; in distribution none is better and 5 are worse."
    )
    assert "1 (m0 on s) is worse" in established(made[:1], "ppo")
    assert established([], "ppo") == ""


def test_what_is_missing_is_said_and_never_averaged(tmp_path):
    root = write_results(tmp_path, leave_out=("road-CR-MultiObject-seed1",))
    text = write_page(read_results(root), tmp_path / "report").read_text()
    assert "Not finished: table1 (1 of 19 cells missing)" in text
    assert "To finish: roadvla study table1" in text
    assert "2 of 3 seeds" in text
    shutil.rmtree(root / "records")
    (root / "records").mkdir()
    text = write_page(read_results(root), tmp_path / "report").read_text()
    assert "No comparison over several settings is finished yet" in text
    assert "not run" in text


def test_a_record_of_other_episodes_stands_for_nothing(tmp_path):
    root = write_results(tmp_path)
    for seed in SEEDS:
        made = record("road", "CR-MultiObject", seed, (0.7, 0.5))
        fewer = tuple(outcomes(o.env, o.split, 0.7, seed, episodes=100) for o in made.outcomes)
        write_record(replace(made, outcomes=fewer), root / "records")
    results = read_results(root)
    assert results.missing(study()) == [f"road-CR-MultiObject-seed{s}" for s in SEEDS]
    (entry,) = (
        e for e in entries(results, study()) if (e.method, e.setting) == ("road", "CR-MultiObject")
    )
    assert (entry.seeds, entry.rate, entry.versus) == ((), {}, {})
    text = write_page(results, tmp_path / "report").read_text()
    assert "Not finished: table1 (3 of 19 cells missing)" in text


def test_a_record_that_was_only_needed_is_not_measured(tmp_path):
    root = write_results(tmp_path)
    made = record("ppo", "CR-MultiObject", 0, (0.6, 0.4), outcomes=())
    write_record(made, root / "records")
    assert read_results(root).missing(study()) == ["ppo-CR-MultiObject-seed0"]


def _readings(tmp_path, methods):
    """A study of one setting: rate, own steps, steps before, and whether it is plain PPO."""
    for name, (rate, steps, before, plain) in methods.items():
        algorithm = {
            "algo": "ppo", "surrogate_advantage": "int", "control": "none",
            "reference_critic": None if plain else "somewhere",
        }  # fmt: skip
        for seed in SEEDS:
            made = record(name, SETTINGS[0], seed, (rate, rate), config={"algorithm": algorithm})
            made = replace(made, env_steps=steps, extra_env_steps=before)
            write_record(made, tmp_path / "records")
    cells_of = {
        m: {SETTINGS[0]: {str(s): f"{m}-{SETTINGS[0]}-seed{s}" for s in SEEDS}} for m in methods
    }
    asked = study("readings", methods=tuple(methods), settings=SETTINGS[:1], cells=cells_of)
    write_study(asked, tmp_path / "studies")
    return read_results(tmp_path), asked


def test_readings_meet_the_best_ppo_of_as_many_steps(tmp_path):
    results, asked = _readings(
        tmp_path,
        {
            "ppo": (0.40, 100, 0, True),
            "ppo-rate": (0.45, 100, 0, True),
            "ppo-double": (0.60, 200, 0, True),
            "mix": (0.65, 100, 100, False),
            "start": (0.30, 60, 40, False),
        },
    )
    rows = entries(results, asked)
    own = {row.method: row for row in rivals(results, asked, rows, in_all=False)}
    assert {m: (r.against, r.steps) for m, r in own.items()} == {"mix": ("ppo-rate", 100)}
    in_all = {row.method: row for row in rivals(results, asked, rows, in_all=True)}
    assert {m: (r.against, r.steps) for m, r in in_all.items()} == {
        "mix": ("ppo-double", 200),
        "start": ("ppo-rate", 100),
    }
    assert in_all["mix"].versus["test"].mean == pytest.approx(0.05, abs=0.04)
    assert in_all["start"].versus["test"].sign == -1
    # Two rows: the smaller p counts twice.
    p = {
        e.method: e.p["test"]
        for e in entries(results, replace(asked, baseline="ppo-rate"), p_values=True)
        if e.p
    }
    assert in_all["start"].adjusted["test"] >= min(1, 2 * p["start"]) - 1e-9
    assert "of 2 readings" in said(list(in_all.values())).lower()
    page = write_page(results, tmp_path / "report")
    assert "best plain PPO of as many steps in all" in page.read_text()
    told = (tmp_path / "report" / "tables" / "readings-tuned-all-steps.md").read_text()
    assert "| mix | ppo-double | 200 |" in told


def test_a_method_of_two_versions_is_refused_and_of_two_commits_told(tmp_path, capsys):
    root = write_results(tmp_path)
    other = record("road", "CR-MultiObject", 1, (0.7, 0.5))
    write_record(replace(other, commit="fedcba654321"), root / "records")
    text = write_page(read_results(root), tmp_path / "report").read_text()
    assert "Seeds of one method by several commits: road." in text
    write_record(replace(other, version="0.2.0"), root / "records")
    assert main(["report", str(root)]) == 2
    assert "are runs of one method by roadvla 0.1.0 and 0.2.0" in capsys.readouterr().err


def test_runs_that_several_settings_share_are_one_measurement():
    ours, theirs = np.ones((2, 10), bool), np.zeros((2, 10), bool)
    other = np.eye(2, 10, dtype=bool)
    differences, weights = _pooled([ours, ours, other], [theirs, theirs, theirs], [0, 0, 2])
    assert weights == [2 / 3, 1 / 3]
    assert [d.mean() for d in differences] == [1.0, 0.1]
    # Settings that share runs but not episodes, and runs that only look alike, stay apart.
    assert _pooled([ours, other], [theirs, theirs], [0, 0])[1] == [0.5, 0.5]
    assert _pooled([ours, ours], [theirs, theirs], [0, 1])[1] == [0.5, 0.5]


def test_the_commonest_failure_is_a_share_of_the_failures(tmp_path):
    root = write_results(tmp_path)
    results = read_results(root)
    modes = shares(cells(results, study(), "ppo", SETTINGS[0]), SETTINGS[0], "test")
    assert modes is not None
    wanted = 100 * modes["no_grasp"] / (1 - modes["success"])
    assert f"ppo no grasp ({wanted:.0f} %)" in told(results, study(), ["ppo"])[0]


def _judged(root, name, by):
    for path in (root / "records").glob(f"{name}*.json"):
        made = read_record(path)
        write_record(
            replace(made, outcomes=tuple(replace(o, judged_by=by) for o in made.outcomes)),
            root / "records",
        )


def test_modes_of_several_definitions_are_not_compared(tmp_path):
    root = write_results(tmp_path, studies=[study(), study("failures")])
    said = "judged by an earlier definition"
    assert said in write_page(read_results(root), tmp_path / "report").read_text()
    for name in ("ppo", "road", "warmup"):
        _judged(root, name, failure_definition())
    text = write_page(read_results(root), tmp_path / "report").read_text()
    assert said not in text
    assert "How episodes end out of distribution" in text
    _judged(root, "ppo", "0123456789ab")
    text = write_page(read_results(root), tmp_path / "report").read_text()
    assert "judged by several versions of the definition" in text
    assert "How episodes end out of distribution" not in text


def test_cost_that_was_not_measured_is_said_to_be(tmp_path):
    root = write_results(tmp_path, studies=[study(), study("cost", methods=("ppo-timed",))])
    assert "Not run yet" in write_page(read_results(root), tmp_path / "report").read_text()


def test_one_seed_claims_nothing_over_settings(tmp_path):
    first = study(seeds=(0,), cells={
        m: {e: {"0": f"{m}-{e}-seed0"} for e in SETTINGS} for m in ("ppo", "road")
    })  # fmt: skip
    page = write_page(read_results(write_results(tmp_path, studies=[first])), tmp_path / "report")
    text = page.read_text()
    assert "one seed: unknown" in text
    shown = re.sub(r"data:[^\"]*|<script>.*?</script>", "", text, flags=re.DOTALL)
    assert re.search(r"\bnan\b", shown.lower()) is None
    numbers = (page.parent / "tables" / "tables.json").read_text()
    assert "NaN" not in numbers
    assert json.loads(numbers)["table1"]["overall"][1]["iqm_versus"]["test"]["low"] is None


def test_what_files_say_is_escaped(tmp_path):
    root = write_results(tmp_path, studies=[study(title="<script>alert(1)</script>")])
    evil = record("ppo", "VR-UnseenTable", 0, (0.6, 0.4), machine='<img src=x onerror="1">')
    write_record(replace(evil, config={"a": "</pre><b>"}), root / "records")
    text = write_page(read_results(root), tmp_path / "report", command="<i>").read_text()
    for bad in ("<script>alert", "<img", "</pre><b>", "<i>"):
        assert bad not in text


def test_tables_are_files_too(page):
    text = (page.parent / "tables" / "table1.md").read_text()
    assert "| CR-MultiObject | road | 3 of 3 |" in text
    assert "| mean | road |" in text
    numbers = json.loads((page.parent / "tables" / "tables.json").read_text())
    assert set(numbers) == set(ALL)


def test_a_results_folder_is_reported_by_the_command(tmp_path, capsys):
    root = write_results(tmp_path / "results")
    assert main(["report", str(root)]) == 0
    assert capsys.readouterr().out.strip() == str(root / "report" / "report.html")
    path = root / "records" / "ppo-CR-MultiObject-seed0.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1', 1))
    assert main(["report", str(root)]) == 2
    said = capsys.readouterr().err
    assert "was changed after it was written" in said
    assert said.count("\n") == 1
    assert main(["report", str(root), str(root)]) == 2
    assert main(["report", str(root), "--baseline", "ppo"]) == 2


def test_run_folders_get_the_page_too(tmp_path):
    for name, algo in (("ppo", "ppo"), ("road", "road")):
        make_run(tmp_path / name, name=name, algo=algo, film=2)
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.html").read_text()
    assert "Success in every setting" in text
    assert 'class="film"' in text
    assert "VR-UnseenTable, <b>road</b>" in text


needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--enable-logging=stderr", "--log-level=0", "--virtual-time-budget=4000"),
)
_PROBE = """
<script>
addEventListener("load", () => {
  const wide = document.documentElement.scrollWidth > innerWidth + 1;
  const before = getComputedStyle(document.body).backgroundColor;
  const toggle = document.querySelector("button.theme");
  toggle.click();
  const after = getComputedStyle(document.body).backgroundColor;
  const probe = document.querySelector("#probe");
  const order = [...probe.querySelectorAll("th button")].map((button, column) => {
    button.click();
    return [...probe.tBodies[0].rows].map((row) => row.cells[column].textContent);
  });
  const sorter = document.querySelector("table.sortable th button");
  sorter.click();
  const hidden = [...document.querySelectorAll("figure svg")].filter(
    (svg) => svg.getBoundingClientRect().height < 50).length;
  const film = document.querySelector("figure.film");
  let moved = "none";
  if (film) {
    const slider = film.querySelector("input");
    slider.value = 2;
    slider.dispatchEvent(new Event("input"));
    moved = film.querySelector(".frame").style.backgroundPositionX;
  }
  const captions = [...document.querySelectorAll("caption span")].filter(
    (span) => span.getBoundingClientRect().right > innerWidth).length;
  probe.remove();
  document.title = JSON.stringify({
    order,
    captions, contents: document.querySelector("nav details").open,
    wide, theme: before !== after, hidden, moved,
    figures: document.querySelectorAll("figure svg").length,
    sorted: sorter.closest("th").getAttribute("aria-sort"),
  });
});
</script></body>"""


_TABLE = """<table class="sortable" id="probe">
<thead><tr><th>Started</th><th>Commit</th><th>Steps</th><th>Rate</th></tr></thead><tbody>
<tr><td>2026-11-26 19:42</td><td>4fb21f</td><td>9,600</td><td>10 %</td></tr>
<tr><td>2026-11-27 06:59</td><td>9089b6</td><td>76,800</td><td>not run</td></tr>
<tr><td>2026-11-26 20:01</td><td>a0b1c2</td><td>153,600</td><td>9 %</td></tr>
</tbody></table></main>"""


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (360, False), (1280, True)])
def test_the_page_works_in_a_browser(page, tmp_path, width, dark):
    probed = tmp_path / "report.html"
    probed.write_text(page.read_text().replace("</main>", _TABLE).replace("</body>", _PROBE))
    flags = [*_FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900"]
    flags += ["--force-dark-mode"] if dark else []
    command = [str(CHROMIUM), *flags, "--dump-dom", f"file://{probed}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    found = json.loads(re.search(r"<title>(.*?)</title>", done.stdout)[1].replace("&quot;", '"'))
    assert found["order"] == [
        ["2026-11-27 06:59", "2026-11-26 20:01", "2026-11-26 19:42"],
        ["a0b1c2", "9089b6", "4fb21f"],
        ["153,600", "76,800", "9,600"],
        ["10 %", "9 %", "not run"],
    ]
    assert found["wide"] is False
    assert found["theme"] is True
    assert found["hidden"] == 0
    assert found["captions"] == 0
    assert found["contents"] is (width > 960)
    assert found["figures"] >= 9
    assert found["sorted"] == "descending"
