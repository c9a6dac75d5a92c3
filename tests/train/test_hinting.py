"""Text-guided teachers in training: the student is drawn to itself with a hint, nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from probes import ColourEnv
from roadvla.envs import make_env
from roadvla.errors import UserError
from roadvla.experiments.presets import DEBUG
from roadvla.objective import divergence, self_distillation_loss
from roadvla.policy import load_backbone
from roadvla.train.algorithm import Algorithm
from roadvla.train.checkpoint import latest_checkpoint, policy_folder
from roadvla.train.guidance import guide
from roadvla.train.hinting import SuccessHinter, make_hinter
from roadvla.train.loop import train
from roadvla.train.metrics import read_metrics
from roadvla.train.rollout import collect, training_episode_ids
from roadvla.train.update import losses, select
from roadvla.world import World

CPU = torch.device("cpu")


def hinted_rollout(kind, *, grown=False):
    policy = load_backbone(CPU)
    env = make_env("VR-UnseenTable", split="train", num_envs=3, sim="tabletop", device="cpu")
    hinter = make_hinter(kind, env, gamma=0.99)
    if grown:
        hinter.tree = hinter.tree.grow(torch.zeros(1, 8), torch.full((1, 7), 0.02), torch.ones(1))
    rollout = collect(
        policy,
        env,
        training_episode_ids(0, 0, 3),
        temperature=1.0,
        generator=torch.Generator().manual_seed(0),
        observe=hinter.observe,
    )
    return policy, env, hinter, hinter.hinted(rollout, policy, World())


@pytest.mark.parametrize("kind", ["relspatial", "plan"])
def test_every_step_is_described_before_its_action(kind):
    policy, env, hinter, rollout = hinted_rollout(kind)
    assert rollout.hinted_prompt.shape[:2] == (env.horizon, 3)
    assert rollout.hinted.all()
    # A second look at the first step: the environment is deterministic.
    env.reset(training_episode_ids(0, 0, 3))
    hinter.observe()
    first = policy.tokenize(hinter._prompts)
    assert torch.equal(rollout.hinted_prompt[0, :, : first.shape[1]], first)
    asked = policy.tokenize(env.instructions)
    assert torch.equal(first[:, :6], asked[:, :6])


def test_without_a_success_there_is_no_hint_and_with_one_there_is():
    *_, rollout = hinted_rollout("mcts")
    assert not rollout.hinted.any()
    policy, _, _, rollout = hinted_rollout("mcts", grown=True)
    assert rollout.hinted.all()
    said = policy.tokenize(["hint q=1.00"])[0, :2].tolist()
    assert said[0] in rollout.hinted_prompt[0, 0].tolist()


def test_successes_become_nodes_with_their_returns_to_go():
    _, env, hinter, rollout = hinted_rollout("mcts")
    reward = torch.zeros_like(rollout.reward)
    reward[-1, 1] = 1.0
    rollout = replace(
        rollout, reward=reward, outcome={"success": torch.tensor([False, True, False])}
    )
    for _ in range(env.horizon):
        hinter.observe()
    hinter.hinted(rollout, load_backbone(CPU), World())
    assert int(hinter.tree.visits.sum()) == env.horizon
    assert float(hinter.tree.q.max()) == 1.0
    # The state was the same each time: q is 0.99^k for the k steps that followed.
    total = float((hinter.tree.q * hinter.tree.visits).sum())
    assert total == pytest.approx(sum(0.99**k for k in range(env.horizon)), rel=1e-4)


def a_batch(kind="relspatial"):
    policy, _, _, rollout = hinted_rollout(kind)
    algorithm = Algorithm(algo="road", hints=kind, divergence="jsd", combine="replace",
                          distill_coef=1.0, entropy_coef=0.0, value_coef=0.0)  # fmt: skip
    batch, metrics = guide(rollout, algorithm, None)
    return policy, batch, algorithm, metrics


@pytest.mark.parametrize("kind", ["jsd", "forward_kl", "reverse_kl"])
def test_the_loss_is_eq_5_between_told_and_untold(kind):
    policy, batch, algorithm, metrics = a_batch()
    batch = select(batch, torch.arange(12))
    algorithm = replace(algorithm, divergence=kind)
    total, parts = losses(policy, batch, algorithm, temperature=0.7, value_only=False)
    with torch.no_grad():
        student, _ = policy.evaluate(batch.observation, batch.action_tokens)
        told = replace(batch.observation, prompt=batch.hinted_prompt)
        teacher, _ = policy.evaluate(told, batch.action_tokens)
    pairs = divergence(teacher / 0.7, student / 0.7, kind=kind)
    expected = sum(float(x) for x in pairs.flatten()) / pairs.numel()
    assert float(parts["loss/self_distillation"]) == pytest.approx(expected, rel=1e-4)
    assert float(total) == pytest.approx(expected, rel=1e-4)
    assert expected > 1e-3
    assert "loss/agd" not in parts
    assert float(metrics["guidance/hinted"]) == 1.0


def test_only_the_student_learns():
    teacher = torch.randn(4, 7, 16, requires_grad=True)
    student = torch.randn(4, 7, 16, requires_grad=True)
    self_distillation_loss(teacher, student, mask=torch.tensor([1, 1, 0, 0]).bool()).backward()
    assert teacher.grad is None
    assert (student.grad[:2].abs().sum((1, 2)) > 0).all()
    assert torch.equal(student.grad[2:], torch.zeros(2, 7, 16))


def test_a_mask_leaves_the_mean_over_what_is_told():
    teacher, student = torch.randn(2, 6, 7, 16)
    mask = torch.tensor([1, 0, 1, 1, 0, 0]).bool()
    expected = self_distillation_loss(teacher[mask], student[mask])
    torch.testing.assert_close(self_distillation_loss(teacher, student, mask=mask), expected)
    assert float(self_distillation_loss(teacher, student, mask=mask & False)) == 0.0


def run(folder: Path, kind: str, **changes) -> Path:
    algorithm = replace(DEBUG.algorithm, algo="road", hints=kind, value_only_iterations=1)
    experiment = replace(DEBUG, algorithm=algorithm, output=str(folder), **changes)
    return train(replace(experiment, evaluation=replace(experiment.evaluation, every=0)))


@pytest.mark.parametrize("kind", ["relspatial", "plan", "mcts"])
def test_a_run_learns_from_each_kind(tmp_path, kind, capsys):
    folder = run(tmp_path / "run", kind)
    silent = (
        "no rollout has succeeded, so the MCTS teacher never had a hint" in capsys.readouterr().err
    )
    rows = read_metrics(folder)
    assert "loss/agd" not in rows[-1]
    assert {"loss/self_distillation", "guidance/hinted"} <= set(rows[-1])
    if kind == "mcts":
        assert rows[0]["guidance/hinted"] == 0.0
        assert silent == (rows[-1]["guidance/hinted"] == 0.0)
    else:
        assert not silent
        assert rows[0]["guidance/hinted"] == 1.0
        assert rows[-1]["loss/self_distillation"] > 0.0


def test_the_tree_is_resumed_bit_for_bit(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole", "mcts")
    part = run(tmp_path / "part", "mcts", keep_checkpoints="all")
    checkpoints = part / "checkpoints"
    for name in ("iteration_000002", "iteration_000003"):
        for file in (checkpoints / name).iterdir():
            file.unlink()
        (checkpoints / name).rmdir()
    (checkpoints / "latest.json").write_text('{"iteration": 1, "folder": "iteration_000001"}')
    seen = []
    restore = SuccessHinter.restore
    monkeypatch.setattr(
        SuccessHinter, "restore", lambda self, t: (restore(self, t), seen.append(self.tree.growths))
    )
    algorithm = replace(DEBUG.algorithm, algo="road", hints="mcts", value_only_iterations=1)
    experiment = replace(DEBUG, algorithm=algorithm, output=str(part), keep_checkpoints="all")
    train(replace(experiment, evaluation=replace(experiment.evaluation, every=0)), resume=True)
    assert len(seen) == 1
    for name in ("policy.safetensors", "optimizer.safetensors"):
        ours, theirs = (policy_folder(f) / name for f in (part, whole))
        assert ours.read_bytes() == theirs.read_bytes()


def test_a_damaged_tree_ends_in_one_line(tmp_path, monkeypatch):
    folder = run(tmp_path / "run", "mcts", keep_checkpoints="all")
    assert latest_checkpoint(folder / "checkpoints") is not None

    def refuse(self, tensors):
        raise ValueError("q is missing")

    monkeypatch.setattr(SuccessHinter, "restore", refuse)
    algorithm = replace(DEBUG.algorithm, algo="road", hints="mcts", value_only_iterations=1)
    experiment = replace(DEBUG, algorithm=algorithm, output=str(folder), keep_checkpoints="all")
    with pytest.raises(UserError, match=r"holds a damaged memory \(q is missing\)"):
        train(replace(experiment, evaluation=replace(experiment.evaluation, every=0)), resume=True)


def test_an_environment_that_hides_its_state_is_refused():
    with pytest.raises(UserError, match="ColourEnv does not; set hints to 'none'"):
        make_hinter("mcts", ColourEnv(2), gamma=0.99)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"algo": "ppo"}, "are for ROAD's teacher"),
        ({"teacher": "odd"}, "teacher 'odd' would not be used"),
        ({"teacher_logits": "rollout"}, "teacher_logits 'rollout' would not be used"),
        ({"token_weighting": "inverse_prob"}, "token_weighting 'inverse_prob' would not be used"),
        ({"control": "shuffled"}, "control 'shuffled' would not be used"),
        ({"positive_only": True}, "positive_only True would not be used"),
        ({"reference_critic": "runs/ppo"}, "reference_critic 'runs/ppo' would not be used"),
    ],
)
def test_contradictions_are_refused(settings, says):
    with pytest.raises(UserError, match=says):
        Algorithm(**{"algo": "road", "hints": "plan", **settings})
