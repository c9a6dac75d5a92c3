"""An OpenVLA whose base is spread over processes learns what a whole one does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from meeting import meet
from safetensors.torch import load_file
from torch import distributed, multiprocessing

from roadvla.policy.openvla.tiny_checkpoint import TinySizes, TinyTower, write_tiny_checkpoint
from roadvla.policy.settings import OpenVLASettings
from roadvla.train.config import (
    Algorithm,
    EvaluationConfig,
    Experiment,
    Optimizer,
    RolloutConfig,
)
from roadvla.train.loop import train
from roadvla.train.metrics import read_metrics
from roadvla.train.parts import parts_of
from roadvla.train.trainer import Trainer
from roadvla.world import World

SIZES = TinySizes(
    dino=TinyTower(width=16, depth=2, heads=2),
    siglip=TinyTower(width=16, depth=2, heads=2),
    hidden=32,
    intermediate=48,
    layers=2,
    heads=4,
    kv_heads=2,
    image_size=56,
)
OPENVLA = OpenVLASettings(dtype="float32", lora_rank=4, lora_alpha=8, inference_batch=2)
LAST = "checkpoints/iteration_000002"


def experiment(folder: Path, name: str, **openvla: object) -> Experiment:
    return Experiment(
        name=name,
        policy="openvla",
        checkpoint=str(folder / "base"),
        output=str(folder / name),
        openvla=replace(OPENVLA, **openvla),
        # Groups of 7 of 96 transitions, by chance: often one process has less than the other.
        optimizer=Optimizer(minibatch=3, accumulation=2, learning_rate=1e-3),
        rollout=RolloutConfig(num_envs=4, total_env_steps=192),
        evaluation=EvaluationConfig(every=0, final_episodes=0),
        checkpoint_every=1,
    )


def runs(folder: Path, critic: Path, **openvla: object) -> None:
    train(experiment(folder, "ppo", **openvla))
    road = Algorithm(algo="road", reference_critic=str(critic))
    train(replace(experiment(folder, "road", **openvla), algorithm=road))


def _together(rank: int, size: int, folder: Path, critic: Path) -> None:
    meet(folder / "meeting", rank, size)
    runs(folder, critic, shard=True)
    trainer = Trainer(
        wanted := experiment(folder, "looked-at", shard=True),
        parts_of("openvla", wanted.checkpoint, wanted.openvla, wanted.maniskill),
        None,
        World.current(),
    )
    held = sum(
        p.to_local().numel() if hasattr(p, "to_local") else p.numel()
        for name, p in trainer.policy.model.named_parameters()
        if ".layers." in name and ".lora_" not in name
    )
    torch.save(torch.tensor(held), folder / f"held-{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    alone, together = (tmp_path_factory.mktemp(name) for name in ("alone", "together"))
    for folder in (alone, together):
        write_tiny_checkpoint(folder / "base", seed=0, sizes=SIZES)
    runs(alone, alone / "ppo")
    multiprocessing.spawn(_together, (2, together, alone / "ppo"), nprocs=2)
    return alone, together


@pytest.mark.parametrize("name", ["ppo", "road"])
def test_a_spread_base_gives_the_same_adapters(both: tuple[Path, Path], name: str) -> None:
    mine, theirs = (folder / name for folder in both)
    for file in ("adapter_model.safetensors", "value_head.safetensors"):
        expected, found = load_file(mine / LAST / file), load_file(theirs / LAST / file)
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=2e-4)
    for row, other in zip(read_metrics(mine), read_metrics(theirs), strict=True):
        for key, value in row.items():
            if key.startswith(("rollout/", "guidance/", "loss/", "policy/")):
                assert other[key] == pytest.approx(value, rel=2e-2, abs=1e-3), key


def test_each_process_holds_half_of_the_decoder(both: tuple[Path, Path]) -> None:
    whole = sum(
        tensor.numel()
        for name, tensor in load_file(next(both[0].glob("base/*.safetensors"))).items()
        if ".layers." in name
    )
    held = [int(torch.load(both[1] / f"held-{rank}.pt", weights_only=True)) for rank in (0, 1)]
    assert sum(held) == whole
    assert max(held) < 0.6 * whole
