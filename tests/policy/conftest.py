"""A tiny VLA with livelier weights than fresh ones, and a few frames and prompts for it."""

from __future__ import annotations

import pytest
import torch

from roadvla.policy import TinyVLA
from roadvla.types import Observation

INSTRUCTIONS = ("put red ball on blue plate", "put green cube on red plate", "lift the carrot")


@pytest.fixture
def policy() -> TinyVLA:
    torch.manual_seed(7)
    policy = TinyVLA()
    with torch.no_grad():
        policy.bins.head.mul_(10.0)
        policy.value_head[2].weight.mul_(10.0)
    return policy


@pytest.fixture
def observation(policy: TinyVLA) -> Observation:
    generator = torch.Generator().manual_seed(3)
    texts = [INSTRUCTIONS[index % 3] for index in range(6)]
    image = torch.randint(0, 256, (6, 48, 48, 3), dtype=torch.uint8, generator=generator)
    return Observation(image, policy.tokenize(texts))
