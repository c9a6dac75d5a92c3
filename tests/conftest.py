"""One thread, one seed, and a way past the shape checks."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import jaxtyping
import pytest
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("quick", deadline=None, max_examples=40, derandomize=True)
hypothesis.settings.load_profile("quick")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Switch the run-time shape checks off, to reach a function's own ``ValueError``."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
