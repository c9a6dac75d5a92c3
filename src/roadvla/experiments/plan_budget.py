"""Memory and time of a planned run: the counts of ``policy.openvla`` times the run's schedule."""

from __future__ import annotations

from dataclasses import dataclass

from roadvla.evaluation.evaluate import SPLITS
from roadvla.experiments.plan_settings import Plan, parse_size
from roadvla.experiments.presets import PAPER
from roadvla.policy.openvla.architecture import Architecture
from roadvla.policy.openvla.cost import (
    decode_flops,
    prefill_flops,
    prefill_tokens,
    training_flops,
    training_tokens,
    update_flops,
)
from roadvla.policy.openvla.memory import (
    Resident,
    cache_bytes,
    decode_bytes,
    resident,
    saved_bytes,
    working_bytes,
)

PROBE = 128
"""Transitions on which an update measures its KL, before and after."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on each GPU.

    Attributes:
        resident: Weights, gradients, optimiser.
        reference: ROAD's reference critic: a second adapter and value head.
        frames: The rollout's camera frames, uint8.
        environment: The simulator's, as stated.
        cache: Keys and values of one observation.
        acting: One observation's passing tensors while acting.
        sample: One sample of an update: saved activations and passing tensors.
        inference_batch: Observations acted on at once.
        reserve: Left free.
        capacity: The GPU's.
    """

    resident: Resident
    reference: int
    frames: int
    environment: int
    cache: int
    acting: int
    sample: int
    inference_batch: int
    reserve: int
    capacity: int

    @property
    def fixed(self) -> int:
        """What stays from iteration to iteration."""
        return self.resident.total + self.reference + self.frames + self.environment

    @property
    def rollout(self) -> int:
        """On top of that, while acting."""
        return self.inference_batch * (self.cache + self.acting)

    @property
    def least(self) -> int:
        """What the run needs at least: with micro-batches of one sample."""
        return self.fixed + self.reserve + max(self.rollout, self.sample)

    @property
    def fits(self) -> int:
        """The largest micro-batch that fits; 0 if the run does not fit at all."""
        if self.least > self.capacity:
            return 0
        return (self.capacity - self.fixed - self.reserve) // self.sample


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of an iteration.

    Attributes:
        name: What it does.
        flops: Per environment step.
        seconds: On each GPU, per iteration, at the full rates.
    """

    name: str
    flops: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Time:
    """What an iteration takes on each GPU.

    Attributes:
        ppo: Its pieces for PPO.
        reference: What ROAD adds.
        evaluation: The evaluations of the whole run, spread over its iterations.
        environment: Seconds in the simulator; they do not shrink with the GPU's rate.
        iterations: Of the run.
        mfu: Share of the rates that is reached.
    """

    ppo: tuple[Piece, ...]
    reference: Piece
    evaluation: Piece | None
    environment: float
    iterations: int
    mfu: float

    def seconds(self, *, road: bool, mfu: float) -> float:
        """Seconds of an iteration, evaluations left out."""
        pieces = [*self.ppo, *([self.reference] if road else [])]
        return sum(piece.seconds for piece in pieces) / mfu + self.environment

    def hours(self, *, road: bool, mfu: float) -> float:
        """Hours of the run, with its evaluations where they are counted."""
        measured = 0.0 if self.evaluation is None else self.evaluation.seconds / mfu
        return self.iterations * (self.seconds(road=road, mfu=mfu) + measured) / 3600

    @property
    def overhead(self) -> float:
        """Share that ROAD adds to PPO's iteration."""
        return self.seconds(road=True, mfu=self.mfu) / self.seconds(road=False, mfu=self.mfu) - 1


def memory_of(plan: Plan, architecture: Architecture) -> Memory:
    """Count the bytes on each GPU."""
    rank, prompt, half = plan.lora_rank, plan.prompt_tokens, plan.half
    stays = resident(architecture, rank, lm_head=plan.lora_lm_head, half=half)
    saved = saved_bytes(
        architecture, prompt, rank, checkpointing=plan.activation_checkpointing, half=half
    )
    acting = working_bytes(architecture, prefill_tokens(architecture, prompt), half=half)
    passing = working_bytes(architecture, training_tokens(architecture, prompt), half=half)
    height, width = plan.frame
    share = plan.rollout // plan.gpus
    return Memory(
        resident=stays,
        reference=stays.adapters,
        frames=share * height * width * 3,
        environment=parse_size(plan.env_memory, "env-memory"),
        cache=cache_bytes(architecture, prompt, half=half),
        acting=acting,
        sample=saved.peak + passing,
        inference_batch=min(plan.inference_batch, plan.num_envs // plan.gpus),
        reserve=round(plan.reserve * plan.capacity),
        capacity=plan.capacity,
    )


def micro_batch(plan: Plan, fits: int) -> tuple[int, int]:
    """Choose micro-batch and accumulation that make up one optimiser step.

    Args:
        plan: The run.
        fits: The largest micro-batch that fits.

    Returns:
        The largest divisor of a GPU's share that fits, and how many of them, of all GPUs together,
        make the step: what ``--minibatch`` and ``--accumulation`` mean.
    """
    share = plan.batch // plan.gpus
    size = max(n for n in range(1, min(fits, share) + 1) if share % n == 0)
    return size, plan.batch // size


def time_of(plan: Plan, architecture: Architecture) -> Time:
    """Count the seconds on each GPU."""
    rank, prompt, rate = plan.lora_rank, plan.prompt_tokens, plan.tflops * 1e12
    share = plan.rollout // plan.gpus
    prefill = float(prefill_flops(architecture, prompt, rank).forward)
    decode = float(decode_flops(architecture, prompt, rank).forward)
    forward = training_flops(architecture, prompt, rank).forward
    update = plan.epochs * update_flops(
        architecture, prompt, rank, checkpointing=plan.activation_checkpointing
    )
    probe = 2 * min(PROBE, share) * forward / share
    decoding = _decode_seconds(plan, architecture)

    def compute(name: str, flops: float) -> Piece:
        return Piece(name=name, flops=flops, seconds=flops * share / rate)

    ppo = (
        compute("rollout: prefill", prefill),
        Piece(name="rollout: decode", flops=decode, seconds=plan.horizon * decoding),
        compute("update", update),
        compute("KL of the update", probe),
    )
    waited = 0.0 if plan.env_seconds is None else plan.env_seconds * plan.horizon
    acting = ppo[0].seconds + ppo[1].seconds
    episodes = _evaluation_episodes(plan) / (plan.num_envs * plan.iterations)
    evaluation = Piece(
        name="evaluation", flops=episodes * (prefill + decode), seconds=episodes * acting
    )
    return Time(
        ppo=ppo,
        reference=compute("reference critic", prefill),
        evaluation=evaluation if plan.evaluate else None,
        environment=waited,
        iterations=plan.iterations,
        mfu=plan.mfu,
    )


def _decode_seconds(plan: Plan, architecture: Architecture) -> float:
    """Seconds to decode one step of a GPU's environments: the slower of memory and arithmetic."""
    count = plan.num_envs // plan.gpus
    flops = decode_flops(architecture, plan.prompt_tokens, plan.lora_rank).forward
    full, rest = divmod(count, plan.inference_batch)
    total = 0.0
    for batch in [plan.inference_batch] * full + [rest] * (rest > 0):
        moved = decode_bytes(
            architecture, plan.prompt_tokens, plan.lora_rank, batch, half=plan.half
        )
        total += max(moved / (plan.bandwidth * 1e12), batch * flops / (plan.tflops * 1e12))
    return total


def _evaluation_episodes(plan: Plan) -> int:
    """Episodes of all evaluations: before the first iteration, on the way, and at the end."""
    settings = PAPER.evaluation
    times = 1 + (plan.iterations - 1) // settings.every
    return len(SPLITS) * (times * settings.episodes + settings.final_episodes)
