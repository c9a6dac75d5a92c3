"""Where things are: the tabletop's snapshot follows its state."""

import torch

from roadvla.envs import make_env
from roadvla.envs.base import Privileged


def test_slot_0_is_what_the_instruction_names_and_the_gripper_takes_it_along():
    env = make_env("CR-MultiObject", split="train", num_envs=3, sim="tabletop", device="cpu")
    assert isinstance(env, Privileged)
    env.reset(torch.arange(3))
    before = env.snapshot()
    assert before.objects.shape == (3, 2, 3)
    assert before.receptacles.shape == (3, 1, 3)
    assert before.held.tolist() == [-1] * 3
    assert before.is_open.all()
    assert torch.equal(before.objects[:, :, :2], env.scene.object_xy)
    down = torch.tensor([[0.0, 0.0, -0.04, 0.0, 0.0, 0.0, 0.0]]).expand(3, 7)
    env.step(down)
    after = env.snapshot()
    torch.testing.assert_close(after.tip - before.tip, down[:, :3])
    assert not after.is_open.any()
