"""Table 4, row by row, against the ``paper`` preset."""

from __future__ import annotations

import pytest

from roadvla.experiments.presets import ELSEWHERE, get_preset
from roadvla.train.serialize import setting

SHARED = {
    "Parallel environments": ("rollout.num_envs", 64),
    "Total environment steps": ("rollout.total_env_steps", 850_000),
    "PPO minibatch size": ("optimizer.minibatch", 8),
    "Gradient accumulation steps": ("optimizer.accumulation", 20),
    "PPO epochs per rollout": ("algorithm.epochs", 1),
    "GAE discount factor": ("algorithm.gamma", 0.99),
    "GAE λ": ("algorithm.lam", 0.95),
    "Policy learning rate": ("optimizer.learning_rate", 1e-4),
    "Adam β1 / β2": ("optimizer.betas", (0.9, 0.999)),
    "Entropy coefficient": ("algorithm.entropy_coef", 0.01),
    "Sampling temperature (train)": ("rollout.temperature", 1.0),
    "Sampling temperature (eval)": ("evaluation.temperature", 0.6),
}
ROAD_ONLY = {
    "Distillation loss coefficient": ("algorithm.distill_coef", 0.5),
    "Logit bump scale (η)": ("algorithm.eta", 1.0),
    "Advantage clip range (c)": ("algorithm.clip", 2.0),
    "Divergence type": ("algorithm.divergence", "forward_kl"),
    "Positive-only advantage gate": ("algorithm.positive_only", False),
    "Reference agreement gate": ("algorithm.gate", True),
    "Reference critic mixing weight (α)": ("algorithm.alpha", 0.5),
}
APPENDIX_C2 = {
    "global gradient clipping threshold": ("optimizer.grad_clip", 1.0),
    "cosine learning rate schedule": ("optimizer.schedule", "cosine"),
    "advantage-guided loss beside PPO's": ("algorithm.combine", "add"),
    "mean over tokens (Eq. 12)": ("algorithm.distill_reduction", "mean"),
    "exponential tilt (Eq. 10)": ("algorithm.teacher", "exponential"),
    "no token weight (Global token weight 1.0)": ("algorithm.token_weighting", "none"),
}


@pytest.mark.parametrize("row", [*SHARED, *ROAD_ONLY, *APPENDIX_C2])
def test_paper_preset_holds_the_number(row):
    name, value = {**SHARED, **ROAD_ONLY, **APPENDIX_C2}[row]
    assert setting(get_preset("paper"), name) == value


def test_every_row_of_the_table_is_accounted_for():
    # 15 shared rows and 10 of ROAD alone, as printed
    assert len(SHARED) + len(ROAD_ONLY) + len(ELSEWHERE) == 15 + 10
    assert not set(ELSEWHERE) & ({*SHARED} | {*ROAD_ONLY})


def test_the_budget_is_166_iterations_of_80_steps():
    # 850,000 / (64 · 80) = 166.02, so the last index is 165, the reference critic's (App. D)
    assert get_preset("paper").iterations(80) == 166
