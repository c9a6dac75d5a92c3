"""The batched backend: needs a CUDA device, and has not run without one."""

from __future__ import annotations

import pytest
import torch
from ms_sim import simulator  # noqa: F401

from roadvla.envs.maniskill import expert
from roadvla.envs.maniskill.env import ManiSkillEnv
from roadvla.envs.maniskill.options import ManiSkillSettings
from roadvla.envs.maniskill.settings import PREFIX, VARIANTS

pytestmark = [
    pytest.mark.sim,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SMALL = ManiSkillSettings(stand_ins=True, image_size=(120, 160))


@pytest.mark.parametrize("setting", [env_id.removeprefix(PREFIX) for env_id in VARIANTS])
def test_every_setting_runs_in_one_batch(setting):
    env = ManiSkillEnv(setting, split="test", num_envs=16, device="cuda", settings=SMALL)
    image = env.reset(torch.arange(16))
    assert image.device.type == "cuda"
    assert image.float().std(dim=(1, 2, 3)).min() > 15
    bodies = env.state.bodies[:, :2]
    assert bool(torch.isfinite(bodies).all())
    assert bool((bodies[..., 2] > 0.86).all())
    for _ in range(7):
        step = env.step(torch.tensor([[0.0] * 6 + [1.0]], device="cuda").expand(16, 7))
    assert not bool(step.info["success_once"].any())
    env.close()


def test_the_expert_solves_a_batch():
    env = ManiSkillEnv("Single-v1", split="train", num_envs=64, device="cuda", settings=SMALL)
    env.reset(torch.arange(64))
    for _ in range(env.horizon):
        step = env.step(expert.act(env))
    assert step.info["success"].float().mean() >= 0.95
    env.close()
