from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from probe_runs import LAST, assert_same_run, rows, run
from safetensors.torch import load_file

from probes import PARTS, ColourEnv, TablePolicy, load_table, probe_experiment, save_table
from roadvla.errors import UserError
from roadvla.evaluation.files import read_evaluation
from roadvla.train import checkpoint as checkpoints
from roadvla.train import trainer as trainers
from roadvla.train.config import Algorithm, EvaluationConfig, Optimizer, RolloutConfig
from roadvla.train.demonstrations import Demonstrations, save_demonstrations
from roadvla.train.divergence import TrainingDivergedError
from roadvla.train.interrupt import Interrupted
from roadvla.train.loop import train
from roadvla.train.metrics import MetricsWriter, read_metrics
from roadvla.train.run_folder import load_experiment


def test_the_run_folder_holds_what_it_should(finished):
    assert load_experiment(finished) == probe_experiment(finished)
    config = json.loads((finished / "config.json").read_text())
    assert {"roadvla_version", "command", "started", "machine"} <= config.keys()
    table = rows(finished)
    assert [row["env_steps"] for row in table] == [64 * i for i in range(13)]
    evaluated = [row["iteration"] for row in table if "eval/test/success_rate" in row]
    assert evaluated == [0, 4, 8, 12]
    result = read_evaluation(finished / "evaluation/VR-UnseenTable_test.json")
    assert (result.iteration, result.env_steps, result.checkpoint) == (12, 768, LAST)
    assert result.success_rate == table[-1]["eval/test/success_rate"]
    assert any((finished / "tensorboard").iterdir())


def test_ppo_learns_the_colours(finished):
    assert load_table(finished / LAST).hit_rate() > TablePolicy().hit_rate() + 0.2
    table = rows(finished)
    assert table[-1]["eval/train/success_rate"] > table[0]["eval/train/success_rate"]


def test_the_same_seed_repeats_the_run_and_another_does_not(finished, tmp_path):
    again, other = run(tmp_path / "again"), run(tmp_path / "other", seed=1)
    assert rows(again) == rows(finished)
    assert rows(other) != rows(finished)


# Resuming.

_KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from probes import PARTS, probe_experiment
from roadvla.train import loop, trainer
real, calls = trainer.update, []
def update(*args, **options):
    calls.append(0)
    metrics = real(*args, **options)
    if len(calls) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return metrics
trainer.update = update
loop.train(probe_experiment({output!r}), parts=PARTS)
"""


def test_a_killed_run_goes_on_as_if_nothing_had_happened(finished, tmp_path):
    tests, output = str(Path(__file__).parents[1]), tmp_path / "run"
    code = _KILLED.format(tests=tests, output=str(output))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [row["iteration"] for row in read_metrics(output)] == list(range(8))
    latest = checkpoints.latest_checkpoint(output / "checkpoints")
    assert latest is not None
    assert latest.name == "iteration_000006"
    run(output, resume=True)
    assert_same_run(output, finished)


class CrashError(Exception):
    pass


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (trainers, "update", 2),  # before the first checkpoint
        (trainers, "update", 7),
        (trainers, "evaluate", 6),  # on the way, after the update
        (trainers, "evaluate", 8),  # in the final evaluation
        (ColourEnv, "step", 30),
        (MetricsWriter, "write", 8),
        (MetricsWriter, "amend", 1),
        (trainers, "save_checkpoint", 2),  # after its row was written
        (os, "replace", 5),  # while a checkpoint is put in place
        (os, "replace", 6),  # while latest.json is
    ],
)
def test_a_crash_anywhere_is_resumed_exactly(finished, tmp_path, monkeypatch, owner, name, call):
    real, calls = getattr(owner, name), []

    def crash(*args, **options):
        calls.append(0)
        if len(calls) == call:
            raise CrashError
        return real(*args, **options)

    monkeypatch.setattr(owner, name, crash)
    with pytest.raises(CrashError):
        run(tmp_path / "run")
    monkeypatch.undo()
    run(tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", finished)


@pytest.mark.parametrize("moved", [False, True])
def test_a_finished_run_is_left_alone(finished, tmp_path, moved):
    folder = run(tmp_path / "run")
    if moved:
        folder = folder.rename(tmp_path / "moved")
    before = rows(folder)
    train(load_experiment(folder), resume=True, parts=PARTS)
    assert rows(folder) == before
    assert_same_run(folder, finished)


def test_resuming_with_other_settings_names_the_first(finished):
    with pytest.raises(UserError, match=r"algorithm\.eta 0\.5.*started with 1\.0"):
        run(finished, resume=True, algorithm=Algorithm(epochs=2, entropy_coef=0.0, eta=0.5))
    with pytest.raises(UserError, match="seed 1"):
        run(finished, resume=True, seed=1)


def test_resuming_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        run(tmp_path / "nowhere", resume=True)


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path):
    folder = run(tmp_path / "run")
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, "seed": 1}))
    with pytest.raises(UserError, match="belongs to another configuration"):
        run(folder, resume=True, seed=1)


# Stopping.


def _press(monkeypatch, owner, name, calls):
    """Send Ctrl-C during some calls of a function."""
    real, count = getattr(owner, name), []

    def pressed(*args, **options):
        count.append(0)
        if len(count) in calls:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **options)

    monkeypatch.setattr(owner, name, pressed)


def test_ctrl_c_saves_says_how_to_go_on_and_loses_nothing(finished, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    _press(monkeypatch, ColourEnv, "step", {4 * 4 + 4 * 4 + 3})
    with pytest.raises(Interrupted, match=r"go on with `roadvla train --resume .*run`") as stop:
        run(folder)
    monkeypatch.undo()
    assert isinstance(stop.value, KeyboardInterrupt)
    done = len(read_metrics(folder)) - 1
    latest = checkpoints.latest_checkpoint(folder / "checkpoints")
    assert latest is not None
    assert latest.name == f"iteration_{done:06d}"
    assert f"saved at {latest.name}" in str(stop.value)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    run(folder, resume=True)
    assert_same_run(folder, finished)


def test_a_second_ctrl_c_stops_at_once(tmp_path, monkeypatch):
    _press(monkeypatch, trainers, "update", {5, 6})
    monkeypatch.setattr(trainers, "collect", _twice(trainers.collect))
    with pytest.raises(Interrupted, match="saved at iteration_000003"):
        run(tmp_path / "run")
    assert len(read_metrics(tmp_path / "run")) == 5  # 0 to 4: the fifth was abandoned


def _twice(real):
    count = []

    def collect(*args, **options):
        count.append(0)
        if len(count) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **options)

    return collect


def test_ctrl_c_in_the_final_evaluation_keeps_the_policy(finished, tmp_path, monkeypatch):
    _press(monkeypatch, trainers, "evaluate", {7})
    with pytest.raises(Interrupted, match="saved at iteration_000012"):
        run(tmp_path / "run")
    monkeypatch.undo()
    run(tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", finished)


@pytest.mark.parametrize("held", [False, True])
def test_ctrl_c_before_there_is_a_run_does_not_advise_to_resume(tmp_path, held):
    def slow(*args, **options):
        raise KeyboardInterrupt

    folder = tmp_path / "run"
    if held:
        run(folder)
    with pytest.raises(Interrupted, match=r"^stopped before the run began$"):
        run(folder, force=held, parts=replace(PARTS, load_backbone=slow))
    assert len(rows(folder)) == (13 if held else 0)


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_the_configuration_appears_whole_or_not_at_all(tmp_path, monkeypatch, name):
    def crash(*args):
        raise CrashError

    monkeypatch.setattr(os, name, crash)
    with pytest.raises(CrashError):
        run(tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
    monkeypatch.undo()
    run(tmp_path / "run")


def test_a_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    real, calls = trainers.update, []

    def update(policy, *args, **options):
        metrics = real(policy, *args, **options)
        calls.append(0)
        if len(calls) == 8:
            metrics["loss/total"] = torch.tensor(float("nan"))
        return metrics

    monkeypatch.setattr(trainers, "update", update)
    with pytest.raises(
        TrainingDivergedError,
        match=r"loss/total is nan in iteration 8.*iteration_000006.*--learning-rate",
    ):
        run(tmp_path / "run")
    assert len(read_metrics(tmp_path / "run")) == 8
    assert isinstance(TrainingDivergedError("x"), UserError)


def test_a_real_explosion_is_caught(tmp_path):
    settings = Optimizer(learning_rate=1e38, minibatch=32, grad_clip=1e38)
    with pytest.raises(TrainingDivergedError, match="no checkpoint yet"):
        run(tmp_path / "run", optimizer=settings)


# Bad input.


def test_a_run_is_never_overwritten_unless_forced(tmp_path):
    folder = run(tmp_path / "run")
    (folder / "notes.txt").write_text("mine")
    before = rows(folder)
    with pytest.raises(UserError, match=r"already holds a run.*--force"):
        run(folder)
    assert rows(folder) == before
    run(folder, force=True, seed=1)
    assert rows(folder) != before
    assert len(rows(folder)) == 13
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_taken_folder_is_refused_before_a_policy_is_loaded(tmp_path):
    def forbidden(device):
        raise AssertionError("refused before any work")

    save_table(TablePolicy(), tmp_path / "run")
    with pytest.raises(UserError, match="already holds a warm-up or another policy"):
        run(tmp_path / "run", parts=replace(PARTS, load_backbone=forbidden))


def test_force_does_not_remove_what_the_run_needs(tmp_path):
    folder = run(tmp_path / "run")
    with pytest.raises(UserError, match="would remove"):
        run(folder, force=True, init=str(folder))
    assert (folder / LAST / "policy.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"optimizer": Optimizer(minibatch=64, accumulation=2)}, "= 128 exceeds the 64 steps"),
        ({"rollout": RolloutConfig(num_envs=16, total_env_steps=63)}, "raise it to 64"),
        ({"device": "cuda:7"}, "is not available here"),
        ({"device": "tpuu"}, "unknown device"),
        ({"init": "/nowhere"}, "/nowhere is not a folder"),
        ({"algorithm": Algorithm(algo="road")}, "--reference-critic"),
        (
            {"algorithm": Algorithm(algo="road", reference_critic="/nowhere")},
            "/nowhere is not a folder",
        ),
        (
            {"algorithm": Algorithm(algo="sft"), "demonstrations": "/nowhere.safetensors"},
            "no demonstrations at /nowhere.safetensors",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, changes, says):
    with pytest.raises(UserError, match=r"^[^\n]*$") as error:
        run(tmp_path / "run", **changes)
    assert says in str(error.value)
    assert not (tmp_path / "run").exists()


def test_an_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(UserError, match="cannot write"):
        run(tmp_path / "run")


# Other algorithms through the same loop.


def test_road_takes_its_reference_from_a_finished_run_and_leaves_it_alone(finished, tmp_path):
    before = (finished / LAST / "policy.safetensors").read_bytes()
    algorithm = Algorithm(algo="road", reference_critic=str(finished), epochs=2, entropy_coef=0.0)
    folder = run(tmp_path / "road", algorithm=algorithm)
    table = rows(folder)[1:]
    assert all(0 <= row["guidance/agreement"] <= 1 for row in table)
    assert all("loss/agd" in row for row in table)
    assert load_table(folder / LAST).hit_rate() > TablePolicy().hit_rate() + 0.2
    assert (finished / LAST / "policy.safetensors").read_bytes() == before


def test_a_critic_that_never_learned_is_no_reference(finished, tmp_path):
    grpo = run(tmp_path / "grpo", algorithm=Algorithm(algo="grpo", group_size=4, entropy_coef=0.0))
    warm = tmp_path / "warm"
    save_table(TablePolicy(), warm)
    road = Algorithm(algo="road", reference_critic="")
    run(tmp_path / "bare", algorithm=replace(road, reference_critic=str(warm)))
    (warm / "warmup.json").write_text("[]")
    for source in (grpo, grpo / "checkpoints", grpo / LAST, warm):
        with pytest.raises(UserError, match=r"never trained: name a finished PPO run$") as error:
            run(tmp_path / "road", algorithm=replace(road, reference_critic=str(source)))
        assert str(source) in str(error.value)
        assert not (tmp_path / "road").exists()
    for source in (finished / LAST, tmp_path / "bare"):
        run(tmp_path / "road", algorithm=replace(road, reference_critic=str(source)), force=True)


def test_a_resume_from_elsewhere_names_the_relative_path_it_misses(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(finished.parent)
    algorithm = Algorithm(algo="road", reference_critic=finished.name)
    folder = run(tmp_path / "road", algorithm=algorithm)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"^{finished.name} is not a folder \(seen from [^\n]*$"):
        train(load_experiment(folder), resume=True, parts=PARTS)


def test_with_coefficient_zero_road_is_ppo_from_start_to_end(finished, tmp_path):
    algorithm = Algorithm(
        algo="road",
        distill_coef=0.0,
        reference_critic=str(finished),
        epochs=2,
        entropy_coef=0.0,
    )
    folder = run(tmp_path / "road", algorithm=algorithm)
    for name in ("policy.safetensors", "optimizer.safetensors"):
        mine, theirs = load_file(folder / LAST / name), load_file(finished / LAST / name)
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_the_reference_sees_features_only_if_they_are_its_own(finished, tmp_path):
    class Stranger(TablePolicy):
        def shares_vision(self, other):
            return False

    def load(folder, device="cpu"):
        policy = Stranger()
        policy.load_state_dict(load_table(folder).state_dict())
        loaded.append(policy)
        return policy

    loaded: list[TablePolicy] = []
    algorithm = Algorithm(algo="road", reference_critic=str(finished))
    run(tmp_path / "a", algorithm=algorithm, parts=replace(PARTS, load_policy=load))
    run(tmp_path / "b", algorithm=algorithm)
    assert loaded[0].looks == 12 * 64
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


def test_grpo_gives_a_group_one_episode(tmp_path, monkeypatch):
    seen, real = [], ColourEnv.reset

    def reset(self, episode_ids):
        if int(episode_ids[0]) >= 1_000_000:
            seen.append(episode_ids.tolist())
        return real(self, episode_ids)

    monkeypatch.setattr(ColourEnv, "reset", reset)
    algorithm = Algorithm(algo="grpo", group_size=4, entropy_coef=0.0, value_only_iterations=5)
    folder = run(tmp_path / "run", algorithm=algorithm)
    assert seen[0] == [1_000_000 + i // 4 for i in range(16)]
    assert seen[1][0] == 1_000_004
    assert "loss/value" not in rows(folder)[1]
    assert rows(folder)[1]["loss/policy"] != 0.0


def test_value_only_iterations_come_first(tmp_path):
    algorithm = Algorithm(value_only_iterations=2, entropy_coef=0.0)
    table = rows(run(tmp_path / "run", algorithm=algorithm))
    assert ["loss/policy" in row for row in table[1:5]] == [False, False, True, True]
    assert table[2]["policy/kl"] == 0.0 < table[3]["policy/kl"]


def test_sft_learns_from_a_file(tmp_path):
    env = ColourEnv(32)
    image = env.reset(torch.arange(32))
    action = torch.zeros(32, 7)
    action[:, 0] = env.colour().float()
    demonstrations = Demonstrations(
        image=image,
        action=action,
        episode_index=torch.arange(32),
        step_index=torch.zeros(32, dtype=torch.int64),
        instructions=tuple(env.instructions),
        origin={},
    )
    path = tmp_path / "demonstrations.safetensors"
    save_demonstrations(demonstrations, path)
    folder = run(tmp_path / "run", algorithm=Algorithm(algo="sft"), demonstrations=str(path))
    table = rows(folder)
    assert table[-1]["policy/accuracy"] > table[1]["policy/accuracy"]
    assert load_table(folder / LAST).hit_rate() > 0.6
    assert "rollout/success_rate" not in table[1]


def test_checkpoints_can_all_be_kept(tmp_path):
    folder = run(tmp_path / "run", keep_checkpoints="all")
    assert [p.name for p in sorted((folder / "checkpoints").glob("iteration_*"))] == [
        f"iteration_{i:06d}" for i in (3, 6, 9, 12)
    ]


def test_chosen_iterations_are_saved_and_kept(tmp_path):
    folder = run(tmp_path / "run", kept_iterations=(1, 6, 7))
    assert [p.name for p in sorted((folder / "checkpoints").glob("iteration_*"))] == [
        f"iteration_{i:06d}" for i in (1, 6, 7, 9, 12)
    ]
    assert load_experiment(folder).kept_iterations == (1, 6, 7)


def test_evaluation_can_be_left_out(tmp_path):
    folder = run(tmp_path / "run", evaluation=EvaluationConfig(every=0, final_episodes=0))
    assert not any("eval" in key for row in rows(folder) for key in row)
    assert not (folder / "evaluation").exists()
    assert [row["iteration"] for row in rows(folder)] == list(range(1, 13))


def test_a_policy_can_start_from_a_run(finished, tmp_path):
    folder = run(tmp_path / "run", init=str(finished))
    start = rows(folder)[0]["eval/train/success_rate"]
    assert start == rows(finished)[-1]["eval/train/success_rate"]
