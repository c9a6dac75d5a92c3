"""What studies compare: methods as departures from the PPO that they start from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

_SAME: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to adapt a policy, to be repeated over settings and seeds.

    Attributes:
        name: Label in tables and part of folder names.
        algorithm: Settings of the algorithm that differ from PPO's.
        optimizer: Settings of the optimiser that differ.
        critic: How far the PPO run of the same setting and seed was when its critic was frozen, as
            a share of its iterations; ``None`` for a method without a reference critic.
        start: How far that run was when this one takes its policy over; ``None`` to start from the
            warm-up.
        steps: Environment steps, as a share of the budget.
        alone: Whether it runs with nothing beside it, because its times are the result.
    """

    name: str
    algorithm: Mapping[str, Any] = field(default_factory=lambda: _SAME)
    optimizer: Mapping[str, Any] = field(default_factory=lambda: _SAME)
    critic: float | None = None
    start: float | None = None
    steps: float = 1.0
    alone: bool = False

    def but(self, name: str, **algorithm: Any) -> Method:
        """Derive a method that differs in some of the algorithm's settings."""
        return replace(self, name=name, algorithm={**self.algorithm, **algorithm})


PPO = Method(name="ppo")
ROAD = Method(name="road", algorithm={"algo": "road"}, critic=1.0)
"""The paper's method as we read it: the PPO surrogate plus 0.5 · AGD (reading R1)."""

# Table 2.
ROAD_RELSPATIAL = Method(
    name="road-relspatial", algorithm={"algo": "road", "hints": "relspatial", "divergence": "jsd"}
)
ROAD_PLAN = ROAD_RELSPATIAL.but("road-plan", hints="plan")
ROAD_MCTS = ROAD_RELSPATIAL.but("road-mcts", hints="mcts")
ROAD_JSD = ROAD.but("road-jsd", divergence="jsd")
ROAD_UNGATED = ROAD.but("road-ungated", gate=False)

# Table 5, Fig. 7, Fig. 8.
ROAD_POSITIVE = ROAD.but("road-positive", positive_only=True)
ROAD_ALPHA_0 = replace(ROAD.but("road-alpha-0", alpha=0.0), critic=None)
ROAD_ALPHA_1 = ROAD.but("road-alpha-1", alpha=1.0)
CRITIC_SHARES = (0.24, 0.48, 0.72, 0.96)
"""When the paper's earlier critics were frozen: episodes 39, 79, 119 and 159 of 165 (App. D.3)."""
ROAD_EARLIER = tuple(
    replace(ROAD, name=f"road-critic-{100 * share:.0f}", critic=share) for share in CRITIC_SHARES
)

# Readings.
PPO_MIX = replace(PPO.but("ppo-mix", surrogate_advantage="mix"), critic=1.0)
"""PPO on Eq. 8's advantage: what the reference critic is worth without AGD."""
PPO_DOUBLE = replace(PPO, name="ppo-double", steps=2.0)
"""As many steps as ROAD and the PPO run that made its critic took together."""
ROAD_CONTINUED = replace(ROAD, name="road-continued", critic=0.24, start=0.24, steps=0.76)
"""PPO first, then ROAD with the critic of that moment: no step more than PPO alone."""
MIX_CONTINUED = replace(PPO_MIX, name="mix-continued", critic=0.24, start=0.24, steps=0.76)
GRPO = PPO.but("grpo", algo="grpo")

_COMBINE: dict[str, dict[str, Any]] = {
    "add": {"combine": "add"},
    # Algorithm 1 has neither coefficient nor entropy bonus.
    "replace": {"combine": "replace", "distill_coef": 1.0, "entropy_coef": 0.0},
}
_TEACHERS: dict[str, dict[str, Any]] = {
    "exp": {"teacher": "exponential"},
    "odd": {"teacher": "odd"},
    "lin": {"teacher": "linear", "eta": 0.5},
}
_WEIGHTINGS: dict[str, dict[str, Any]] = {
    "": {"token_weighting": "none"},
    "-invp": {"token_weighting": "inverse_prob", "delta": 0.03},
}

VARIANTS = tuple(
    ROAD.but(
        f"{combine}-{logits}-{teacher}{weighting}",
        **_COMBINE[combine],
        teacher_logits=logits,
        **_TEACHERS[teacher],
        **_WEIGHTINGS[weighting],
        distill_reduction="sum",
    )
    for combine in _COMBINE
    for logits in ("live", "rollout")
    for teacher in _TEACHERS
    for weighting in _WEIGHTINGS
    if (logits, teacher) != ("rollout", "odd")
)
"""combine × teacher_logits × teacher × token_weighting, as far as defined; AGD summed over tokens,
for its mean is small beside the joint policy gradient (reading R12)."""

_BY_NAME = {method.name: method for method in VARIANTS}
ADD_SUM = _BY_NAME["add-live-exp"]
ALGORITHM_1 = _BY_NAME["replace-live-exp"]
ODD = _BY_NAME["replace-live-odd-invp"]

EPOCHS = tuple(
    method.but(f"{method.name}-epochs-{epochs}", epochs=epochs)
    for method in (PPO, PPO_MIX, ROAD, ADD_SUM)
    for epochs in (1, 4)
)
RATES = tuple(
    replace(PPO, name=f"ppo-rate-{rate:g}", optimizer={"learning_rate": rate})
    for rate in (5e-5, 2e-4)
)
KL_MATCHED = tuple(
    method.but(f"{method.name}-kl", kl_stop=0.02)
    for method in (PPO, PPO_MIX, ADD_SUM, ALGORITHM_1, ODD, _BY_NAME["replace-rollout-lin-invp"])
)
"""Updates that end when the policy has moved as far as PPO does in an iteration."""
CENTRED = tuple(
    method.but(f"{method.name}-centred", control="time_centred")
    for method in (PPO, PPO_MIX, ADD_SUM, ALGORITHM_1, ODD)
)
DIVERGENCES = (
    ADD_SUM.but("add-live-exp-reverse", divergence="reverse_kl"),
    ALGORITHM_1.but("replace-live-exp-reverse", divergence="reverse_kl"),
)
CONTROLS = tuple(
    method.but(f"{method.name}-{control}", control=control)
    for method in (PPO, PPO_MIX, *VARIANTS)
    for control in ("shuffled", "uniform")
)
"""What is left when ω says nothing about the step it is attached to."""

PPO_TIMED = replace(PPO, name="ppo-timed", alone=True)
ROAD_TIMED = replace(ROAD, name="road-timed", alone=True)
