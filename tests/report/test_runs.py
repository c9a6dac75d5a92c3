from __future__ import annotations

import json
import re

import pytest
from factory import make_run

from roadvla.errors import UserError
from roadvla.report.runs import read_metrics, read_runs


def small(folder, **changes):
    settings = {"name": "ppo-seed0", "algo": "ppo", "iterations": 3, "episodes": 8, **changes}
    return make_run(folder, **settings)


def test_runs_are_found_at_any_depth_and_once(tmp_path):
    small(tmp_path / "study" / "a" / "ppo")
    small(tmp_path / "study" / "road", name="road_seed4", algo="road", seed=4)
    # Neither what lies in checkpoints nor a configuration alone is a run.
    small(tmp_path / "study" / "road" / "checkpoints" / "old", name="x")
    (tmp_path / "study" / "config.json").write_text("{}")
    runs = read_runs([tmp_path / "study", tmp_path / "study" / "a" / ".." / "road"])
    assert [(run.method, run.seed, run.algo) for run in runs] == [
        ("ppo", 0, "ppo"),
        ("road", 4, "road"),
    ]
    assert set(runs[0].evaluations) == {("VR-UnseenTable", "train"), ("VR-UnseenTable", "test")}
    assert [row["iteration"] for row in runs[0].metrics] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("demo-ppo-seed12", "demo-ppo"),
        ("demo ppo seed=3", "demo ppo"),
        ("road_s1", "road"),
        ("ppo-epochs3", "ppo-epochs3"),
        ("seed7", "seed7"),
    ],
)
def test_method_is_the_name_without_its_seed(tmp_path, name, method):
    small(tmp_path / "run", name=name)
    assert read_runs([tmp_path])[0].method == method


def test_a_warmup_needs_no_metrics(tmp_path):
    small(tmp_path / "warmup", name="warmup", algo="sft", film=2)
    (run,) = read_runs([tmp_path])
    assert run.is_warmup
    assert run.metrics == ()
    assert run.films["VR-UnseenTable", "test"].name == "VR-UnseenTable_test_frames.npz"


def test_a_line_cut_short_at_the_end_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"iteration": i, "env_steps": 10 * i} for i in range(3)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for cut in (1, 2, 15):
        path.write_text(text[:-cut] if cut > 1 else text + '{"iter')
        assert len(read_metrics(path)) == (3 if cut == 1 else 2)
    path.write_text("")
    assert read_metrics(path) == ()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"iteration": 1, "env', "line 2 is not valid JSON"),
        ("[1]", "line 2 is not a JSON object"),
        ('{"iteration": 1}', "line 2: 'env_steps' is not a whole number"),
        ('{"iteration": 0, "env_steps": 5}', "line 2: iteration 0 does not follow 0"),
    ],
)
def test_other_damage_is_named_with_its_line(tmp_path, line, message):
    path = tmp_path / "metrics.jsonl"
    good = '{"iteration": %d, "env_steps": 5}\n'
    path.write_text(good % 0 + line + "\n" + good % 2)
    with pytest.raises(UserError, match=re.escape(f"metrics.jsonl {message}")):
        read_metrics(path)


def test_a_damaged_last_line_that_was_finished_is_damage(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 0, "env_st\n')
    with pytest.raises(UserError, match="line 1"):
        read_metrics(path)


def test_bad_places_are_named(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a folder"):
        read_runs([tmp_path / "nowhere"])
    with pytest.raises(UserError, match="no run in"):
        read_runs([tmp_path])
    with pytest.raises(UserError, match="no run given"):
        read_runs([])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "does not hold a configuration"),
        ('{"name": ""}', "name is ''"),
        ('{"seed": "1"}', "seed is '1'"),
        ('{"env": 3}', "env is 3"),
    ],
)
def test_a_damaged_configuration_is_named(tmp_path, config, message):
    path = small(tmp_path / "run") / "config.json"
    path.write_text(config)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        read_runs([tmp_path])
    assert "config.json" in str(caught.value)


def test_a_damaged_evaluation_is_named(tmp_path):
    path = small(tmp_path / "run") / "evaluation" / "VR-UnseenTable_test.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(UserError, match=r"VR-UnseenTable_test\.json is not valid JSON"):
        read_runs([tmp_path])


def test_two_files_of_one_evaluation_are_refused(tmp_path):
    path = small(tmp_path / "run") / "evaluation" / "VR-UnseenTable_test.json"
    path.with_name("copy.json").write_text(path.read_text())
    with pytest.raises(UserError, match="two evaluations of VR-UnseenTable test"):
        read_runs([tmp_path])


def test_the_same_method_and_seed_twice_is_refused(tmp_path):
    small(tmp_path / "a")
    small(tmp_path / "b")
    with pytest.raises(UserError, match="both 'ppo' with seed 0: leave one out"):
        read_runs([tmp_path])


def test_one_name_for_different_settings_is_refused(tmp_path):
    small(tmp_path / "a")
    small(tmp_path / "b", seed=1, algorithm={"algo": "ppo", "alpha": 0.9})
    with pytest.raises(UserError, match=r"algorithm\.alpha is 0\.5 and 0\.9: give one another"):
        read_runs([tmp_path])


def test_seeds_may_differ_in_where_they_ran_and_started(tmp_path):
    algorithm = {"algo": "road", "reference_critic": "ppo-0"}
    small(tmp_path / "a", algo="road", algorithm=algorithm, init="warmup-0")
    algorithm = {"algo": "road", "reference_critic": "ppo-1"}
    small(tmp_path / "b", algo="road", seed=1, algorithm=algorithm, machine="else", init="warmup-1")
    assert [run.seed for run in read_runs([tmp_path])] == [0, 1]


def test_series_leaves_out_what_was_not_logged_or_is_not_finite(tmp_path):
    folder = small(tmp_path / "run")
    values = [0.5, None, float("nan"), True, 2]
    rows = [{"iteration": i, "env_steps": 10 * i, "x": v} for i, v in enumerate(values)]
    rows.append({"iteration": 9, "env_steps": 90})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps, series = read_runs([folder])[0].series("x")
    assert steps.tolist() == [0, 40]
    assert series.tolist() == [0.5, 2]
    assert [len(part) for part in read_runs([folder])[0].series("y")] == [0, 0]
