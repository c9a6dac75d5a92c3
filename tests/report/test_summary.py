from __future__ import annotations

import io
import json

import numpy as np
import pytest
from factory import make_evaluation, make_run
from rich.console import Console

from roadvla.errors import UserError
from roadvla.evaluation.files import write_evaluation
from roadvla.evaluation.stats import paired_difference, seed_interval, unpaired_difference
from roadvla.report.runs import read_runs
from roadvla.report.summary import order_methods, summarize
from roadvla.report.tables import (
    format_rate,
    markdown_table,
    print_table,
    sentences,
    table_json,
    verdict,
)

ENV = "VR-UnseenTable"


def add(root, name, algo, seed, train, test, **changes):
    """A run whose outcomes are given."""
    folder = make_run(
        root / f"{name}-{seed}", name=name, algo=algo, seed=seed, iterations=2, episodes=8
    )
    for split, outcomes in (("train", train), ("test", test)):
        evaluation = make_evaluation(ENV, split, outcomes, **changes)
        write_evaluation(evaluation, folder / "evaluation")
    return folder


def draw(seed, rate, count=200):
    return np.random.default_rng(seed).random(count) < rate


@pytest.fixture
def study(tmp_path):
    """PPO and ROAD with two seeds; ROAD is the better one out of distribution only."""
    for seed in (0, 1):
        train, test = draw(seed, 0.7), draw(10 + seed, 0.5)
        add(tmp_path, "ppo", "ppo", seed, train, test)
        add(tmp_path, "road", "road", seed, np.roll(train, 7), test | draw(30 + seed, 0.35))
    add(tmp_path, "start", "sft", 0, draw(40, 0.35), draw(41, 0.25))
    return tmp_path


def tables_of(study, method, split):
    runs = [run for run in read_runs([study]) if run.method == method]
    return np.array([run.evaluations[ENV, split].success for run in runs]).astype(float)


def test_rows_hold_what_the_statistics_say(study):
    summary = summarize(read_runs([study]))
    assert summary.baseline == "ppo"
    rows = {row.method: row for row in summary.rows[ENV]}
    assert list(rows) == ["start", "ppo", "road"]
    ppo, road = (
        {split: tables_of(study, method, split) for split in ("train", "test")}
        for method in ("ppo", "road")
    )
    assert rows["road"].rates["test"] == seed_interval(road["test"])
    assert rows["road"].gap == unpaired_difference(road["train"], road["test"])
    assert rows["road"].versus["test"] == paired_difference(road["test"], ppo["test"])
    assert rows["road"].versus["train"] == paired_difference(road["train"], ppo["train"])
    assert rows["ppo"].versus == {}
    assert (rows["ppo"].seeds, rows["start"].seeds) == ((0, 1), (0,))
    assert rows["road"].once["test"] == pytest.approx(road["test"].mean())
    assert rows["road"].grasped == {"train": 1.0, "test": 1.0}


def test_the_one_warmup_is_compared_with_every_seed(study):
    start = summarize(read_runs([study])).rows[ENV][0]
    table = tables_of(study, "start", "test").repeat(2, axis=0)
    assert start.versus["test"] == paired_difference(table, tables_of(study, "ppo", "test"))


def test_only_common_seeds_are_compared(study):
    add(study, "ppo", "ppo", 5, draw(50, 0.9), draw(51, 0.9))
    rows = {row.method: row for row in summarize(read_runs([study])).rows[ENV]}
    assert rows["road"].versus["test"].seeds == 2
    assert rows["ppo"].rates["test"].seeds == 3


def test_only_common_episodes_are_compared(tmp_path):
    ours, theirs = [True, False, True, True], [True, False, False, False]
    add(tmp_path, "road", "road", 0, ours, ours)
    add(tmp_path, "ppo", "ppo", 0, theirs, theirs, episode_ids=(2, 3, 0, 9))
    rows = summarize(read_runs([tmp_path])).rows[ENV]
    # ids 0, 2 and 3: road 1 1 1, ppo 0 1 0
    versus = rows[1].versus["test"]
    assert (versus.episodes, versus.mean) == (3, pytest.approx(2 / 3))


def test_no_common_seed_is_no_comparison(tmp_path):
    add(tmp_path, "road", "road", 0, [True] * 4, [True] * 4)
    add(tmp_path, "ppo", "ppo", 1, [True] * 4, [True] * 4)
    summary = summarize(read_runs([tmp_path]))
    assert summary.rows[ENV][1].versus == {}
    assert sentences(summary, ENV) == []


def test_words_follow_from_the_intervals(study):
    for folder in study.glob("*-1"):
        (folder / "config.json").rename(folder / "unused.json")
    summary = summarize(read_runs([study]))
    road = summary.rows[ENV][2]
    assert verdict(road, summary, "train") == "no difference established"
    assert verdict(road, summary, "test") == "road better"
    assert verdict(summary.rows[ENV][0], summary, "test") == "ppo better"
    said = [line for line in sentences(summary, ENV) if line.startswith("road")]
    assert said[0].startswith("road against ppo, ID: **no difference established** (")
    assert said[1].startswith("road against ppo, OOD: **road better** (+")
    assert said[1].endswith("; 1 seed of 200 episodes).")
    lines = markdown_table(summary, ENV).splitlines()
    assert len(lines) == 5
    assert {line.count("|") for line in lines} == {9}
    assert [line.count("▲") for line in lines[2:]] == [0, 0, 1]
    assert [line.count("▼") for line in lines[2:]] == [2, 0, 0]
    assert lines[4].split("|")[8].strip().endswith("▲**")


def test_another_baseline_can_be_named(study):
    summary = summarize(read_runs([study]), baseline="road")
    assert [len(row.versus) for row in summary.rows[ENV]] == [2, 2, 0]
    with pytest.raises(UserError, match="unknown method 'raod': did you mean 'road'"):
        summarize(read_runs([study]), baseline="raod")


def test_plain_ppo_is_the_baseline_among_ppos(tmp_path):
    outcomes = [True, False]
    for name, surrogate in (("a", "mix"), ("plain-ppo", "int")):
        folder = add(tmp_path, name, "ppo", 0, outcomes, outcomes)
        config = json.loads((folder / "config.json").read_text())
        config["algorithm"]["surrogate_advantage"] = surrogate
        (folder / "config.json").write_text(json.dumps(config))
    add(tmp_path, "grpo", "grpo", 0, outcomes, outcomes)
    add(tmp_path, "road", "road", 0, outcomes, outcomes)
    runs = read_runs([tmp_path])
    assert order_methods(runs) == ("plain-ppo", "a", "road", "grpo")
    assert summarize(runs).baseline == "plain-ppo"


def test_without_ppo_there_is_no_comparison(tmp_path):
    add(tmp_path, "road", "road", 0, [True, False], [True, False])
    summary = summarize(read_runs([tmp_path]))
    assert summary.baseline is None
    assert summary.rows[ENV][0].versus == {}
    assert len(markdown_table(summary, ENV).splitlines()[0].split("|")) == 8


@pytest.mark.parametrize(("name", "value"), [("temperature", 1.0), ("horizon", 30), ("sim", "x")])
def test_evaluations_that_are_not_alike_are_refused(tmp_path, name, value):
    add(tmp_path, "ppo", "ppo", 0, [True, False], [True, False])
    add(tmp_path, "road", "road", 0, [True, False], [True, False], **{name: value})
    with pytest.raises(UserError, match=f"{name} .* evaluate them alike"):
        summarize(read_runs([tmp_path]))


def test_runs_adapted_on_the_setting_go_before_others(tmp_path):
    here = add(tmp_path, "ppo", "ppo", 0, [True] * 4, [True] * 4)
    away = make_run(
        tmp_path / "away", name="ppo", algo="ppo", env="VR-DynamicNoise", iterations=2, episodes=8
    )
    for split in ("train", "test"):
        write_evaluation(make_evaluation(ENV, split, [False] * 4), away / "evaluation")
    rows = summarize(read_runs([tmp_path])).rows
    assert rows[ENV][0].rates["test"].mean == 1.0
    assert rows[ENV][0].trained_on is None
    assert rows["VR-DynamicNoise"][0].trained_on is None
    (here / "config.json").unlink()
    row = summarize(read_runs([tmp_path])).rows[ENV][0]
    assert (row.rates["test"].mean, row.trained_on) == (0.0, "VR-DynamicNoise")
    assert "adapted on VR-DynamicNoise" in markdown_table(summarize(read_runs([tmp_path])), ENV)


def test_a_split_that_was_not_evaluated_stays_empty(study):
    for path in study.glob("road-*/evaluation/*_test.json"):
        path.unlink()
    summary = summarize(read_runs([study]))
    road = summary.rows[ENV][2]
    assert (set(road.rates), road.gap, set(road.versus)) == ({"train"}, None, {"train"})
    assert markdown_table(summary, ENV).splitlines()[4].count("–") == 4


def test_json_holds_the_numbers(study):
    data = json.loads(json.dumps(table_json(summarize(read_runs([study])))))
    row = data["settings"][ENV][2]
    assert row["method"] == "road"
    assert row["rates"]["test"]["seeds"] == 2
    assert row["verdict"]["train"] == "no difference established"


def test_terminal_table_fits_80_columns(study):
    out = io.StringIO()
    print_table(summarize(read_runs([study])), Console(file=out, width=80))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    rows = summarize(read_runs([study])).rows[ENV]
    row, text = rows[2], out.getvalue()
    assert format_rate(row.rates["train"]) in text
    assert format_rate(row.versus["test"], signed=True) in text
    signs = [estimate.sign for each in rows for estimate in each.versus.values()]
    assert (text.count("▲"), text.count("▼")) == (signs.count(1), signs.count(-1)) == (1, 1)


def test_rates_are_written_in_percent():
    estimate = seed_interval(np.array([[1.0, 0.0]]))
    # Wilson at 1 of 2: 0.5 ± z/2 · sqrt(1/(2+z²)) = 0.5 ± 0.405470
    assert format_rate(estimate) == "50.0 [9.5, 90.5]"
    assert format_rate(estimate, signed=True) == "+50.0 [+9.5, +90.5]"
    assert format_rate(None) == "–"
