from __future__ import annotations

import json
import re

import numpy as np
import pytest
from factory import make_run

from roadvla.errors import UserError
from roadvla.report.figures import smooth
from roadvla.report.page import write_report


def test_report_shows_everything_from_two_seeds(tmp_path):
    runs = tmp_path / "runs"
    make_run(runs / "warmup", name="warmup", algo="sft", rates=(0.35, 0.25))
    for seed in (0, 1):
        make_run(runs / f"ppo{seed}", name=f"ppo-seed{seed}", algo="ppo", seed=seed)
        make_run(
            runs / f"road{seed}",
            name=f"road-seed{seed}",
            algo="road",
            seed=seed,
            film=1 - seed,
        )
    output = tmp_path / "report"
    summary = write_report([runs], output, command="roadvla report runs")
    page = (output / "report.md").read_text()
    images = re.findall(r"!\[[^]]+\]\(([^)]+)\)", page)
    assert images == [
        "figures/VR-UnseenTable_adaptation.png",
        "figures/VR-UnseenTable_diagnostics.png",
        "figures/VR-UnseenTable_train_road_film.png",
        "figures/VR-UnseenTable_test_road_film.png",
        "figures/cost.png",
    ]
    for image in images:
        assert (output / image).read_bytes().startswith(b"\x89PNG")
    for fact in (
        "by `roadvla report runs`",
        "road against ppo, ID: **no difference established**",
        "Some CPU, 2 cores, torch 2.13.0",
        "Evaluated: 2026-01-02",
        "`../runs/road1`",
        "`roadvla train road-seed1 --seed 1`",
        "sampling temperature: 0.6",
        "2 seeds of 256 episodes",
    ):
        assert fact in page
    assert str(tmp_path) not in page
    assert "| road | 2 | 256 |" in (output / "table.md").read_text()
    table = json.loads((output / "table.json").read_text())
    assert [row["method"] for row in table["settings"]["VR-UnseenTable"]] == [
        row.method for row in summary.rows["VR-UnseenTable"]
    ]


def test_a_running_job_has_a_page_without_numbers(tmp_path):
    run = make_run(tmp_path / "run", name="ppo", algo="ppo", iterations=4)
    for path in (run / "evaluation").iterdir():
        path.unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 5, "env')
    summary = write_report([run], tmp_path / "out")
    assert summary.rows == {}
    assert "adaptation.png" in (tmp_path / "out" / "report.md").read_text()


def test_an_output_that_is_a_file_is_refused(tmp_path):
    run = make_run(tmp_path / "warmup", name="warmup", algo="sft", episodes=8)
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="cannot write the report to"):
        write_report([run], tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_smoothing_keeps_lines_and_averages_noise():
    line = np.arange(9.0)
    assert smooth(line, 5) == pytest.approx(line)
    # Windows of 1 3 3 3 1: (0 3 0) → 1, (3 0 3) → 2, (0 3 0) → 1
    assert smooth(np.array([0.0, 3.0, 0.0, 3.0, 0.0]), 3) == pytest.approx([0, 1, 2, 1, 0])
    assert smooth(np.array([]), 3).shape == (0,)
