from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from probes import PARTS, probe_experiment
from roadvla.errors import UserError
from roadvla.train.config import Algorithm
from roadvla.train.loop import train
from roadvla.train.metrics import MetricsWriter, Stopwatch, read_metrics, to_floats
from roadvla.train.progress import Display

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"


def documented() -> set[str]:
    rows = [line for line in DOCS.read_text(encoding="utf-8").splitlines() if line[:3] == "| `"]
    return {name for row in rows for name in re.findall("`([^`]+)`", row.split("|")[1])}


def write(folder, iterations, *, start=0):
    writer = MetricsWriter(folder, iteration=start, env_steps=10 * start)
    for i in iterations:
        writer.write(i, 10 * i, {"loss/total": float(i)})


def test_every_key_is_documented_and_every_documented_key_is_logged(tmp_path):
    ppo = train(probe_experiment(tmp_path / "ppo"), parts=PARTS)
    road = Algorithm(algo="road", reference_critic=str(ppo))
    run = train(probe_experiment(tmp_path / "road", algorithm=road), parts=PARTS)
    logged = {key for row in read_metrics(ppo) + read_metrics(run) for key in row}
    assert logged <= documented()
    told = {"loss/self_distillation", "guidance/hinted"}  # text-guided teachers', in test_hinting
    assert documented() - logged == {"policy/accuracy", *told}  # sft's


def test_rows_beyond_the_checkpoint_are_dropped(tmp_path):
    write(tmp_path, range(6))
    write(tmp_path, [4], start=3)
    assert [row["iteration"] for row in read_metrics(tmp_path)] == [0, 1, 2, 3, 4]


def test_a_run_that_starts_over_keeps_nothing(tmp_path):
    write(tmp_path, range(3))
    write(tmp_path, [0])
    assert [row["iteration"] for row in read_metrics(tmp_path)] == [0]


def test_a_row_cut_off_in_writing_is_dropped_and_a_damaged_one_refused(tmp_path):
    write(tmp_path, range(3))
    path = tmp_path / "metrics.jsonl"
    text = path.read_text()
    path.write_text(text[:-5])
    assert [row["iteration"] for row in read_metrics(tmp_path)] == [0, 1]
    path.write_text("{broken\n" + text)
    with pytest.raises(UserError, match="line 1 is damaged"):
        read_metrics(tmp_path)


def test_bytes_that_are_no_text_are_damage(tmp_path):
    write(tmp_path, range(3))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1].replace(b"loss", b"\xff") + lines[2])
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2 is damaged"):
        read_metrics(tmp_path)
    path.write_bytes(lines[0] + lines[1] + b"\xff")
    assert [row["iteration"] for row in read_metrics(tmp_path)] == [0, 1]


def test_the_last_row_can_be_amended(tmp_path):
    writer = MetricsWriter(tmp_path, iteration=0, env_steps=0)
    writer.write(1, 10, {"a": 1.0})
    writer.amend({"b": 2.0})
    assert read_metrics(tmp_path) == [{"iteration": 1, "env_steps": 10, "a": 1.0, "b": 2.0}]


def test_tensorboard_holds_the_same_numbers(tmp_path):
    write(tmp_path, range(3))
    assert shown(tmp_path) == [(0, 0.0), (10, 1.0), (20, 2.0)]


@pytest.mark.parametrize(("start", "again"), [(0, range(4)), (1, range(2, 4)), (2, range(3, 4))])
def test_tensorboard_shows_no_step_twice_after_a_resume(tmp_path, start, again):
    write(tmp_path, range(3))
    write(tmp_path, again, start=start)
    assert shown(tmp_path) == [(0, 0.0), (10, 1.0), (20, 2.0), (30, 3.0)]


def shown(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(event.step, event.value) for event in board.Scalars("loss/total")]


_FULL_DISK = """
import resource, signal, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from probes import PARTS, probe_experiment
from roadvla import cli
from roadvla.train.loop import train
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for size in (0, 40, 1500, 2500, 5000):
    folder = {output!r} + "/" + str(size)
    cli._CONFIGURED["train"] = lambda _: print(train(probe_experiment(folder), parts=PARTS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    print("exit", cli.main(["train"]))
"""


def test_a_full_disk_is_one_line_wherever_it_strikes(tmp_path):
    code = _FULL_DISK.format(tests=str(Path(__file__).parents[1]), output=str(tmp_path))
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["exit 2"] * 5
    progress = ("probe on ", "evaluation before ")
    lines = [line for line in done.stderr.splitlines() if not line.startswith(progress)]
    assert len(lines) == 5
    assert all(re.fullmatch("roadvla: error: cannot write .*File too large; .*", x) for x in lines)
    assert any("metrics.jsonl" in line and "--resume" in line for line in lines)


@pytest.mark.parametrize("full", ["board", "rows"])
def test_a_full_disk_under_the_metrics_says_how_to_go_on(tmp_path, monkeypatch, full):
    monkeypatch.setattr(time, "time_ns", lambda: 7)
    writer = MetricsWriter(tmp_path, iteration=0, env_steps=0)
    path = tmp_path / "metrics.jsonl"
    if full == "board":
        path = tmp_path / "tensorboard" / "events.out.tfevents.7"
    path.unlink()
    path.symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"^cannot write [^\n]*No space left[^\n]*--resume$"):
        writer.write(1, 10, {"loss/total": 1.0})
    assert threading.active_count() == 1


def test_an_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "metrics.partial").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        MetricsWriter(tmp_path, iteration=0, env_steps=0)


def test_scalars_keep_their_names():
    values = {"a": torch.tensor(1.5), "b": torch.tensor([2.0]), "c": torch.tensor(3)}
    assert to_floats(values) == {"a": 1.5, "b": 2.0, "c": 3.0}
    assert to_floats({}) == {}


def test_phases_add_up():
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with watch.phase("update"):
            pass
    assert watch.seconds.keys() == {"time/update"}
    assert 0 < watch.seconds["time/update"] < watch.total()


def test_without_a_terminal_there_is_a_line_now_and_then(capsys):
    console = Console(force_terminal=False, stderr=True)
    with Display("run", 100, console=console) as display:
        for _ in range(100):
            display.advance({"rollout/success_rate": 0.5, "unknown": 1.0})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 20
    assert lines[0] == "run 5/100  success 50%"


def test_with_a_terminal_there_is_a_bar(capsys):
    console = Console(force_terminal=True, stderr=True, width=120)
    with Display("run", 2, console=console) as display:
        display.advance({"policy/entropy": 1.25})
    assert "entropy 1.25" in capsys.readouterr().err
