"""`roadvla study`, as it is typed: small grids from nothing to the page, and what goes wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from roadvla.cli import main
from roadvla.evaluation.results import read_results
from roadvla.experiments.methods import PPO
from roadvla.experiments.studies import StudyRequest, _command
from roadvla.train.lock import locked

SMALL = ("--budget", "smoke", "--settings", "VR-UnseenTable")


def study(*words: object) -> int:
    return main(["study", *map(str, words)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("study")
    words = ("alpha", *SMALL, "--only", "road-alpha-0", "ppo", "--jobs", 2, "--output", root)
    assert study(*words) == 0
    return root


def test_a_study_ends_in_records_and_a_page(finished):
    results = read_results(finished)
    (ppo,) = (r for r in results.records.values() if r.method == "ppo")
    assert [(o.env, o.split, o.episodes) for o in ppo.outcomes] == [
        ("VR-UnseenTable", "train", 8),
        ("VR-UnseenTable", "test", 8),
    ]
    assert {point.iteration for point in ppo.curve} == {2, 5}
    assert len(ppo.series["policy/entropy"]) == 5
    assert ppo.outcomes[0].modes
    assert str(finished) not in json.dumps(ppo.config)
    assert (ppo.env_steps, ppo.extra_env_steps) == (5 * 8 * 24, 0)
    text = (finished / "report" / "report.html").read_text()
    assert "Not finished: alpha" in text
    assert len(results.films) == 2
    (start,) = (r for r in results.records.values() if r.method == "warm-up")
    assert {o.env for o in start.outcomes} == {"VR-UnseenTable"}


def test_what_is_finished_is_not_made_again(finished, capsys):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*.safetensors")}
    records = {p: p.read_bytes() for p in (finished / "records").iterdir()}
    assert study("alpha", *SMALL, "--only", "road-alpha-0", "ppo", "--output", finished) == 0
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*.safetensors")} == before
    assert {p: p.read_bytes() for p in (finished / "records").iterdir()} == records
    assert "3 of 3 cells are finished already" in capsys.readouterr().err


def test_another_study_takes_over_what_it_shares(finished, capsys):
    assert study("table2", *SMALL, "--only", "ppo", "--output", finished) == 0
    assert "2 of 2 cells are finished already" in capsys.readouterr().err
    assert set(read_results(finished).studies) == {"alpha", "table2"}


def test_another_study_keeps_what_was_measured(finished, tmp_path):
    """The PPO run of four settings is shared: what one study measured on it stays."""
    root = tmp_path / "copy"
    shutil.copytree(finished, root)
    words = ("--budget", "smoke", "--settings", "ER-InitPose", "--only", "ppo")
    assert study("table1", *words, "--output", root) == 0
    results = read_results(root)
    (ppo,) = (r for r in results.records.values() if r.method == "ppo")
    assert {o.env for o in ppo.outcomes} == {"VR-UnseenTable", "ER-InitPose"}
    assert {p.env for p in ppo.curve} == {"VR-UnseenTable", "ER-InitPose"}
    (start,) = (r for r in results.records.values() if r.method == "warm-up")
    assert {o.env for o in start.outcomes} == {"VR-UnseenTable", "ER-InitPose"}


def test_fewer_episodes_do_not_replace_more(finished, tmp_path, capsys):
    root = tmp_path / "copy"
    shutil.copytree(finished, root)
    before = {path: path.read_bytes() for path in root.rglob("*.json")}
    assert study("alpha", *SMALL, "--only", "ppo", "--episodes", 4, "--output", root) == 2
    said = capsys.readouterr().err
    assert "holds 8 episodes of a set and 4 are asked for: ask for --episodes 8" in said
    assert {path: path.read_bytes() for path in root.rglob("*.json")} == before


def test_more_episodes_replace_fewer_and_are_not_mixed_with_them(finished, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(finished, root)
    words = ("--only", "ppo", "--episodes", 16, "--output", root)
    assert study("table5", "--budget", "smoke", *words) == 0
    assert study("table2", *SMALL, *words) == 0
    results = read_results(root)
    (road,) = (n for n, r in results.records.items() if r.method == "road-alpha-0")
    (ppo,) = (
        n for n, r in results.records.items() if r.method == "ppo" and r.env == "VR-UnseenTable"
    )
    assert {o.episodes for o in results.records[ppo].outcomes} == {16}
    alpha, table2 = results.studies["alpha"], results.studies["table2"]
    assert ppo in results.missing(alpha)
    assert road not in results.missing(alpha)
    assert ppo not in results.missing(table2)


def test_the_page_says_how_to_finish_all_of_a_study(finished):
    text = (finished / "report" / "report.html").read_text()
    (command,) = re.findall(r"To finish: (roadvla study alpha [^<]*)<", text)
    assert command.endswith(f"--output {finished}")
    assert "--only" not in command
    assert "--settings" not in command


def test_a_folder_that_was_moved_is_continued(finished, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(finished, root)
    (record,) = (root / "records").glob("road-alpha-0-*")
    made = record.read_bytes()
    record.unlink()
    assert study("alpha", *SMALL, "--only", "road-alpha-0", "--output", root) == 0
    assert len(record.read_bytes()) == pytest.approx(len(made), rel=0.2)


def test_a_checkpoint_that_is_gone_is_named(finished, tmp_path, capsys):
    root = tmp_path / "copy"
    shutil.copytree(finished, root)
    (run,) = (root / "runs").glob("ppo-*")
    shutil.rmtree(run / "checkpoints")
    assert study("alpha", *SMALL, "--only", "road", "--output", root) == 2
    said = capsys.readouterr().err
    assert "which is gone: delete" in said
    assert f"records/{run.name}.json" in said
    assert "Traceback" not in said


def test_a_record_edited_by_hand_stops_everything(finished, tmp_path, capsys):
    root = tmp_path / "copy"
    shutil.copytree(finished, root)
    (path,) = (root / "records").glob("ppo-*")
    path.write_text(path.read_text().replace('"method": "ppo"', '"method": "better"'))
    assert study("alpha", *SMALL, "--only", "ppo", "--output", root) == 2
    assert "was changed after it was written" in capsys.readouterr().err


def test_a_folder_that_another_study_works_in_is_refused(tmp_path, capsys):
    with locked(tmp_path):
        assert study("alpha", *SMALL, "--output", tmp_path) == 2
    assert f"{tmp_path} is in use by another process" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("tabel1",), "unknown study 'tabel1': did you mean 'table1'?"),
        (("--budget", "smoke"), "no study is named"),
        (("table1", "--budget", "smoke", "--only", "rod"), "unknown method 'rod'"),
        (("table1", "--budget", "smoke", "--settings", "VR"), "unknown setting 'VR'"),
        (("table1", "--budget", "smoke", "--jobs", "0"), "jobs is 0"),
        (("table1", "--budget", "small"), "small"),
        (("table1", "--names", "table2"), "--names"),
        (("table1", "--budget", "smoke", "--device", "cuda:99"), "not available here"),
        (("table1", "--budget", "smoke", "--sim", "mujoco"), "unknown simulator"),
        (("table1", "--budget", "smoke", "--episodes", "0"), "episodes is 0"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, capsys, words, says):
    root = tmp_path / "out"
    assert study(*words, "--output", root) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    assert not root.exists()


def test_help_lists_the_studies(capsys):
    assert main(["study"]) == 0
    said = capsys.readouterr().out
    for name in ("table1", "alpha", "readings"):
        assert f"\n  {name}" in said
    assert "Table 1, Fig. 2" in said


def test_the_command_is_quoted_as_it_can_be_typed():
    request = StudyRequest(names=("table1",), budget="smoke", seeds=(1, 2), only=("ppo*",))
    assert _command(request, Path("out")) == (
        "roadvla study table1 --budget smoke --seeds 1 2 --only 'ppo*' --output out"
    )


@pytest.mark.slow
def test_a_killed_cell_and_ctrl_c_lose_nothing(tmp_path):
    words = [sys.executable, "-m", "roadvla", "study", "alpha", *SMALL, "--jobs", "2"]
    words += ["--output", str(tmp_path / "out")]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    runs = tmp_path / "out" / "runs"
    deadline = time.monotonic() + 120
    while not list(runs.glob(f"{PPO.name}-*/metrics.jsonl")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "go on with the same command: roadvla study alpha" in said
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    results = read_results(tmp_path / "out")
    missing = results.missing(results.studies["alpha"])
    assert all(name.startswith("warmup") or "ER-Repositioning" in name for name in missing)
    assert os.listdir(tmp_path / "out" / "report")
