from __future__ import annotations

import pytest
import torch

from probes import PARTS, TablePolicy, probe_experiment, save_table
from roadvla.errors import UserError
from roadvla.policy.settings import OpenVLASettings
from roadvla.train.config import Algorithm, EvaluationConfig, Optimizer
from roadvla.train.loop import train
from roadvla.train.memory import (
    acting_sizes,
    is_exhaustion,
    learning_sizes,
    loading_sizes,
    update_sizes,
    within_memory,
)


@pytest.mark.parametrize("allocate", [lambda: torch.empty(2**50), lambda: bytearray(2**62)])
def test_what_the_machine_really_raises_is_recognised(allocate):
    with pytest.raises((RuntimeError, MemoryError)) as raised:
        allocate()
    assert is_exhaustion(raised.value)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_other_errors_are_left_alone(error, expected):
    assert is_exhaustion(error) == expected
    wanted = UserError if expected else type(error)
    with pytest.raises(wanted), within_memory("the update", "minibatch 8", ["--minibatch 4"]):
        raise error


def test_the_line_names_work_sizes_what_to_try_and_what_is_left():
    asked = []

    def kept():
        asked.append(0)
        return "the last checkpoint is X"

    with within_memory("the update", "minibatch 8", [], kept=kept):
        pass
    assert not asked
    with pytest.raises(UserError) as raised, within_memory("it", "n 1", ["--a", "--b"], kept=kept):
        raise MemoryError
    assert str(raised.value) == (
        "out of memory in it (n 1): try --a, or --b; the last checkpoint is X"
    )
    with pytest.raises(UserError, match="more memory"), within_memory("it", "n 1", []):
        raise MemoryError


def test_smaller_passes_of_the_same_steps_are_advised(tmp_path):
    def tries(minibatch, accumulation, **changes):
        optimizer = Optimizer(minibatch=minibatch, accumulation=accumulation)
        return update_sizes(probe_experiment(tmp_path, optimizer=optimizer, **changes))[1]

    assert tries(8, 20) == ["--minibatch 4 --accumulation 40"]
    assert tries(5, 2) == ["--minibatch 2 --accumulation 5"]
    assert tries(3, 1) == ["--minibatch 1 --accumulation 3"]
    assert tries(1, 160) == []
    flagged = {"policy": "openvla", "checkpoint": "x"}
    assert tries(1, 160, **flagged) == ["--activation-checkpointing"]
    recompute = OpenVLASettings(activation_checkpointing=True)
    assert tries(1, 160, **flagged, openvla=recompute) == []


def test_sizes_of_the_other_passes():
    settings = OpenVLASettings(inference_batch=32)
    assert acting_sizes(64, "tiny", settings) == ("num_envs 64", ["--num-envs 32"])
    described, tries = acting_sizes(64, "openvla", settings)
    assert described == "inference_batch 32, num_envs 64"
    assert tries == ["--inference-batch 16", "--num-envs 32"]
    # A batch above the number of environments is not what fills the memory.
    assert acting_sizes(8, "openvla", settings)[1][0] == "--inference-batch 4"
    assert acting_sizes(1, "openvla", settings)[1] == []
    assert learning_sizes("n", ["--x"], "tiny", settings) == ("n", ["--x"])
    assert (
        "--dtype bfloat16" in loading_sizes("cpu", "openvla", OpenVLASettings(dtype="float32"))[1]
    )
    assert "--dtype bfloat16" not in loading_sizes("cpu", "openvla", settings)[1]


def exhaust(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize(
    ("method", "every", "said"),
    [
        ("act", 0, "the rollout (num_envs 16): try --num-envs 8"),
        ("act", 4, "the evaluation (num_envs 16): try --num-envs 8"),
        ("value", 0, "the reference pass (num_envs 16)"),
        ("evaluate", 0, "the update (minibatch 32, accumulation 1): try --minibatch 16"),
    ],
)
def test_every_phase_explains_itself(tmp_path, monkeypatch, method, every, said):
    save_table(TablePolicy(), tmp_path / "critic")
    algorithm = Algorithm(algo="road", reference_critic=str(tmp_path / "critic"), entropy_coef=0.0)
    evaluation = EvaluationConfig(every=every, final_episodes=0)
    experiment = probe_experiment(tmp_path / "run", algorithm=algorithm, evaluation=evaluation)
    monkeypatch.setattr(TablePolicy, method, exhaust)
    with pytest.raises(UserError, match=r"^[^\n]*$") as raised:
        train(experiment, parts=PARTS)
    assert f"out of memory in {said}" in str(raised.value)
    assert "there is no checkpoint yet" in str(raised.value)


def test_the_last_checkpoint_is_named(tmp_path, monkeypatch):
    real, calls = TablePolicy.act, []

    def act(self, *args, **options):
        calls.append(0)
        if len(calls) > 4 * 5:  # in the sixth iteration of four steps
            exhaust()
        return real(self, *args, **options)

    monkeypatch.setattr(TablePolicy, "act", act)
    evaluation = EvaluationConfig(every=0, final_episodes=0)
    with pytest.raises(UserError) as raised:
        train(probe_experiment(tmp_path / "run", evaluation=evaluation), parts=PARTS)
    last = tmp_path / "run" / "checkpoints" / "iteration_000003"
    assert f"the last checkpoint is {last}: go on from it with --init" in str(raised.value)
