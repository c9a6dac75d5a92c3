"""The run that ``roadvla plan`` is asked about."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields

from roadvla.errors import UserError
from roadvla.experiments.presets import ELSEWHERE, PAPER
from roadvla.policy.settings import Precision

_UNITS = {"gb": 10**9, "gib": 2**30, "tb": 10**12, "tib": 2**40}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run of OpenVLA needs and takes, before it is started; the defaults are the paper's.

    Attributes:
        policy: ``openvla-7b``, or ``openvla`` for the sizes of ``--checkpoint``.
        checkpoint: Folder of an HF-format OpenVLA to take the sizes from; only headers are read.
        gpu: Memory of one GPU, such as 80GB (10⁹ bytes) or 80GiB (2³⁰ bytes).
        gpus: How many; environments and transitions are divided evenly among them.
        tflops: Rate of bfloat16 matrix products on one GPU, TFLOP/s.
        bandwidth: Memory bandwidth of one GPU, TB/s.
        mfu: Share of both rates that is really reached.
        steps: Environment steps of the run.
        num_envs: Environments, all GPUs together.
        horizon: Steps of an episode.
        frame: Height and width of a camera frame, pixels.
        prompt_tokens: Length of the prompt.
        batch: Transitions per optimiser step, all GPUs together.
        epochs: Passes over each rollout.
        lora_rank: r of the adapters.
        lora_lm_head: Adapt the output layer too, as RL4VLA does.
        dtype: Of the frozen base and the activations.
        inference_batch: Observations per pass without gradient.
        activation_checkpointing: Recompute each block's activations in the backward pass.
        reserve: Share of the memory left to CUDA, its libraries and fragmentation.
        env_seconds: Seconds that one step of a GPU's environments takes, as you measured it.
        env_memory: Memory that the simulator takes on each GPU, such as 4GB.
        evaluate: Count the evaluations of the preset ``paper`` too.
    """

    policy: str = "openvla-7b"
    checkpoint: str | None = None
    gpu: str = "80GB"
    gpus: int = 1
    tflops: float = 790.0
    bandwidth: float = 4.3
    mfu: float = 0.5
    steps: int = PAPER.rollout.total_env_steps
    num_envs: int = PAPER.rollout.num_envs
    horizon: int = int(ELSEWHERE["Episode length (steps)"].printed)
    frame: tuple[int, int] = (480, 640)
    prompt_tokens: int = 30
    batch: int = PAPER.optimizer.minibatch * PAPER.optimizer.accumulation
    epochs: int = PAPER.algorithm.epochs
    lora_rank: int = PAPER.openvla.lora_rank
    lora_lm_head: bool = PAPER.openvla.lora_lm_head
    dtype: Precision = PAPER.openvla.dtype
    inference_batch: int = PAPER.openvla.inference_batch
    activation_checkpointing: bool = PAPER.openvla.activation_checkpointing
    reserve: float = 0.08
    env_seconds: float | None = None
    env_memory: str = "0GB"
    evaluate: bool = False

    def __post_init__(self) -> None:
        """Refuse values out of range and shares that do not come out even."""
        self._check_numbers()
        if self.capacity <= 0:
            raise UserError(f"--gpu is {self.gpu!r}: expected a size above 0, such as 80GB")
        parse_size(self.env_memory, "env-memory")
        for name in ("num_envs", "batch"):
            if getattr(self, name) % self.gpus:
                raise UserError(
                    f"--{_flag(name)} {getattr(self, name)} does not divide evenly among "
                    f"{self.gpus} GPUs: change one of them"
                )
        if self.steps < self.rollout:
            raise UserError(
                f"--steps {self.steps} is less than one rollout of {self.num_envs} envs × "
                f"{self.horizon} steps: raise it to {self.rollout} or more, or lower --num-envs"
            )
        if self.batch > self.rollout:
            raise UserError(
                f"--batch {self.batch} exceeds the {self.rollout} transitions of a rollout: "
                f"lower it or raise --num-envs"
            )

    @property
    def capacity(self) -> int:
        """Bytes of one GPU."""
        return parse_size(self.gpu, "gpu")

    @property
    def half(self) -> bool:
        """Whether base and activations are bfloat16."""
        return self.dtype == "bfloat16"

    @property
    def rollout(self) -> int:
        """Transitions of an iteration, all GPUs together."""
        return self.num_envs * self.horizon

    @property
    def iterations(self) -> int:
        """Whole rollouts within the budget."""
        return self.steps // self.rollout

    def _check_numbers(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise UserError(f"--{_flag(item.name)} is {value}: expected 1 or more")
        if min(self.frame) < 1:
            raise UserError(f"--frame is {self.frame}: expected height and width in pixels")
        for name, most in (("tflops", math.inf), ("bandwidth", math.inf), ("mfu", 1.0)):
            self._check_above_zero(name, most)
        if self.env_seconds is not None:
            self._check_above_zero("env_seconds", math.inf)
        if not 0 <= self.reserve < 1:
            raise UserError(f"--reserve is {self.reserve:g}: expected a share, 0 to below 1")

    def _check_above_zero(self, name: str, most: float) -> None:
        value = getattr(self, name)
        if not (math.isfinite(value) and 0 < value <= most):
            ceiling = f" and at most {most:g}" if most < math.inf else ""
            raise UserError(f"--{_flag(name)} is {value:g}: expected a number above 0{ceiling}")


def parse_size(text: str, flag: str) -> int:
    """Read a number of bytes.

    Args:
        text: Such as 80GB, 79.6GiB or 1.5TB; a bare number is in GB.
        flag: Named in errors.

    Raises:
        UserError: If it is no size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([GT]i?B)?\s*", text, re.IGNORECASE)
    if found is None:
        raise UserError(f"--{flag} is {text!r}: expected a size such as 80GB or 79.6GiB")
    number, unit = found.groups(default="GB")
    return int(float(number) * _UNITS[unit.lower()])


def _flag(name: str) -> str:
    return name.replace("_", "-")
