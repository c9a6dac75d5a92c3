"""The warm-up: expert demonstrations, then supervised fine-tuning of the pretrained policy."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from roadvla.envs import ManiSkillSettings, close
from roadvla.envs.base import VectorEnv
from roadvla.errors import UserError
from roadvla.evaluation.machine import usable_device
from roadvla.files import read_json
from roadvla.policy.base import Policy
from roadvla.policy.settings import OpenVLASettings, PolicyKind
from roadvla.train.checkpoint import policy_folder
from roadvla.train.checks import check_choices, check_policy, check_simulator
from roadvla.train.config import Algorithm, Optimizer
from roadvla.train.demonstrations import Demonstrations, save_demonstrations
from roadvla.train.divergence import TrainingDivergedError
from roadvla.train.experts import Expert, expert_of
from roadvla.train.lock import check_free, locked
from roadvla.train.memory import learning_sizes, loading_sizes, within_memory
from roadvla.train.metrics import to_floats
from roadvla.train.parts import Parts, parts_of
from roadvla.train.primitives import grid
from roadvla.train.progress import Display
from roadvla.train.run_folder import (
    CONFIG,
    DEMONSTRATIONS,
    HISTORY,
    about,
    check_claimable,
    claim_folder,
    clear_folder,
    write_json,
)
from roadvla.train.update import losses, make_optimizer, schedule_factor, select
from roadvla.types import Batch

_NUM_ENVS = 64
_FIRST_ID = 500_000  # evaluation counts from 0, training from 1,000,000


@dataclass(frozen=True, kw_only=True)
class WarmUp:
    """How the common starting point of all methods is made.

    Attributes:
        env: Setting whose training split is demonstrated.
        sim: ``tabletop`` or ``maniskill``.
        seed: Decides episodes, the expert's noise and the minibatches.
        device: Where policy and environments live.
        policy: ``tiny``, the small VLA that comes with the package, or ``openvla``.
        checkpoint: OpenVLA in HF format: a folder or the hub's ``owner/name``; ``None`` for the one
            that ``init`` was trained on.
        init: Policy to start from; ``None`` for the pretrained backbone, or fresh adapters on
            ``checkpoint``.
        output: Folder for the policy and the demonstrations.
        episodes: Successful demonstrations to collect.
        gain: Range of the expert's gain, drawn once per episode.
        noise: Standard deviation of the expert's noise, in fractions of the action limits.
        levels: Actions are rounded to 1/levels of their limits: fewer distinct tokens.
        tail: Steps kept after the first success.
        steps: Optimiser steps.
        batch: Demonstrated steps in each.
        minibatch: Demonstrated steps per forward and backward pass; ``None`` for the whole batch.
        learning_rate: Peak of a cosine.
        openvla: How an OpenVLA is run and adapted.
        maniskill: How ManiSkill simulates.
    """

    env: str = "VR-UnseenTable"
    sim: str = "tabletop"
    seed: int = 0
    device: str = "cpu"
    policy: PolicyKind = "tiny"
    checkpoint: str | None = None
    init: str | None = None
    output: str = "runs/warmup"
    episodes: int = 140
    gain: tuple[float, float] = (0.55, 0.8)
    noise: float = 0.1
    levels: int = 8
    tail: int = 6
    steps: int = 200
    batch: int = 128
    minibatch: int | None = None
    learning_rate: float = 6e-4
    openvla: OpenVLASettings = field(default_factory=OpenVLASettings)
    maniskill: ManiSkillSettings = field(default_factory=ManiSkillSettings)

    def __post_init__(self) -> None:
        """Refuse values out of range and settings that contradict each other."""
        check_choices(self)
        check_policy(self)
        check_simulator(self)
        for name in ("episodes", "levels", "steps", "batch", "minibatch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}: at least 1 is needed")
        if self.seed < 0 or self.tail < 0:
            raise UserError(f"seed is {self.seed}, tail {self.tail}: expected 0 or more")
        if not 0 < self.gain[0] <= self.gain[1] <= 1:
            raise UserError(f"gain is {self.gain}: expected a range within (0, 1]")
        if not 0 <= self.noise < math.inf or not 0 < self.learning_rate < math.inf:
            raise UserError(
                f"noise is {self.noise}, learning_rate {self.learning_rate}: expected 0 or more "
                f"and more than 0"
            )


def run_warm_up(settings: WarmUp, *, force: bool = False, parts: Parts | None = None) -> Path:
    """Collect demonstrations, fine-tune on them, and write both into a folder.

    Nothing is written, and nothing replaced, before the work is done. A signal while it is written
    leaves the folder empty; what a killed process left of the same warm-up is replaced.

    Args:
        settings: What to collect and how to learn from it.
        force: Replace a warm-up, a policy or a run that is already there.
        parts: Environment and policy; the package's, of the settings' kind, unless given.

    Returns:
        The folder: a policy to pass as ``init``, ``demonstrations.safetensors``, the settings in
        ``config.json`` and the course of the loss in ``warmup.json``.

    Raises:
        UserError: If the folder is taken, in use or cannot be written, or the expert fails too
            often.
    """
    folder, sources = Path(settings.output), (settings.init, settings.checkpoint)
    force = force or _was_cut_off(folder, settings)
    check_free(folder)
    check_claimable(folder, force=force, sources=sources)
    usable_device(settings.device)
    parts = parts or parts_of(
        settings.policy, settings.checkpoint, settings.openvla, settings.maniskill
    )
    init = None if settings.init is None else policy_folder(Path(settings.init))
    sizes = loading_sizes(settings.device, settings.policy, settings.openvla)
    with within_memory("loading the policy", *sizes):
        if init is None:
            policy = parts.load_backbone(settings.device)
        else:
            policy = parts.load_policy(init, settings.device)
    demonstrations = collect_demonstrations(settings, parts=parts)
    with within_memory("the warm-up", *_sizes(settings)):
        history = warm_up(policy, demonstrations, settings)
    with locked(folder):
        claim_folder(folder, force=force, sources=sources)
        _write(policy, demonstrations, history, settings, parts)
    return folder


def _write(
    policy: Policy,
    demonstrations: Demonstrations,
    history: list[dict[str, float]],
    settings: WarmUp,
    parts: Parts,
) -> None:
    """Fill the folder, or leave it empty, whatever stops it."""
    folder = Path(settings.output)
    try:
        config = {"name": "warm-up", **asdict(settings), **about(settings.device)}
        # The settings say whose the rest is; the policy comes last and says that it is complete.
        write_json(folder / CONFIG, config)
        save_demonstrations(demonstrations, folder / DEMONSTRATIONS)
        write_json(folder / HISTORY, history)
        parts.save_policy(policy, folder)
    except BaseException as error:  # a signal, too
        clear_folder(folder)
        if not isinstance(error, OSError):
            raise
        raise UserError(f"cannot write {folder}: {error.strerror or error}; free space") from error


def _was_cut_off(folder: Path, settings: WarmUp) -> bool:
    """Whether a folder holds what a killed warm-up of the same settings left: all but a policy."""
    try:
        recorded = read_json(folder / CONFIG)
    except (OSError, ValueError):
        return False
    if (folder / "policy.json").exists() or not isinstance(recorded, dict):
        return False
    wanted = {**json.loads(json.dumps(asdict(settings))), "name": "warm-up", "output": None}
    return {name: {**recorded, "output": None}.get(name) for name in wanted} == wanted


def collect_demonstrations(
    settings: WarmUp,
    *,
    num_envs: int | None = None,
    act: Expert | None = None,
    parts: Parts | None = None,
) -> Demonstrations:
    """Let the expert act until there are enough successful episodes.

    Each is cut ``tail`` steps after its first success; those that do not end in success are
    dropped.

    Args:
        settings: What to collect.
        num_envs: Episodes run at once; ``None`` for 64, and on ManiSkill no more than are wanted.
        act: The expert, given the environment, a gain per episode and a generator.
        parts: Environment.

    Raises:
        UserError: If the expert solves too few episodes.
    """
    if num_envs is None:
        num_envs = min(_NUM_ENVS, settings.episodes) if settings.sim == "maniskill" else _NUM_ENVS
    act, parts = act or expert_of(settings.sim, settings.noise), parts or Parts()
    env = parts.make_env(
        settings.env, split="train", num_envs=num_envs, sim=settings.sim, device=settings.device
    )
    generator = torch.Generator(env.device).manual_seed(settings.seed)
    kept: list[tuple[Tensor, Tensor, str]] = []
    tried = 0
    first = _FIRST_ID + 10_000 * (settings.seed % 50)
    try:
        while len(kept) < settings.episodes and tried < 4 * settings.episodes + num_envs:
            kept += _demonstrate(env, first + tried, settings, act, generator)
            tried += num_envs
    finally:
        close(env)
    if len(kept) < settings.episodes:
        raise UserError(
            f"the expert solved only {len(kept)} of {tried} episodes of {settings.env}: "
            f"lower noise {settings.noise:g} or raise gain {settings.gain}"
        )
    kept = kept[: settings.episodes]
    lengths = [len(action) for _, action, _ in kept]
    return Demonstrations(
        image=torch.cat([image for image, _, _ in kept]),
        action=torch.cat([action for _, action, _ in kept]),
        episode_index=torch.arange(len(kept)).repeat_interleave(torch.tensor(lengths)),
        step_index=torch.cat([torch.arange(length) for length in lengths]),
        instructions=tuple(text for _, _, text in kept),
        origin={
            name: value
            for name, value in asdict(settings).items()
            if name in ("env", "sim", "seed", "gain", "noise", "levels", "tail")
        }
        | {"split": "train", "simulator": dict(getattr(env, "facts", {}))},
    )


def warm_up(
    policy: Policy, demonstrations: Demonstrations, settings: WarmUp
) -> list[dict[str, float]]:
    """Fine-tune the policy on demonstrations, in place (Eq. 1).

    A step's gradient is that of the mean over its batch, however it is split into passes.

    Returns:
        Loss (nats per token) and accuracy, averaged over each tenth of the steps.

    Raises:
        TrainingDivergedError: If the loss is not finite.
    """
    rates = Optimizer(learning_rate=settings.learning_rate, grad_clip=1.0)
    optimizer, algorithm = make_optimizer(policy, rates), Algorithm(algo="sft")
    parameters = list(policy.policy_parameters())
    generator = torch.Generator(parameters[0].device).manual_seed(settings.seed)
    history: list[dict[str, float]] = []
    window: list[dict[str, Tensor]] = []
    every = max(1, settings.steps // 10)
    with Display("warm-up", settings.steps) as display:
        for step in range(settings.steps):
            factor = schedule_factor(rates, step, settings.steps, warmup=0)
            optimizer.param_groups[0]["lr"] = settings.learning_rate * factor
            batch = demonstrations.sample(policy, settings.batch, generator)
            optimizer.zero_grad(set_to_none=True)
            window.append(_accumulate(policy, batch, algorithm, settings.minibatch))
            torch.nn.utils.clip_grad_norm_(parameters, rates.grad_clip)
            optimizer.step()
            if (step + 1) % every == 0 or step + 1 == settings.steps:
                history.append({"step": float(step + 1), **_averages(window)})
                window = []
            display.advance(history[-1] if history else {})
    return history


def _demonstrate(
    env: VectorEnv, first: int, settings: WarmUp, act: Expert, generator: torch.Generator
) -> list[tuple[Tensor, Tensor, str]]:
    """Run one batch of episodes and return the successful ones: frames, actions, instruction."""
    ids = torch.arange(first, first + env.num_envs, device=env.device)
    frame = env.reset(ids)
    instructions = list(env.instructions)
    low, high = settings.gain
    draw = torch.rand(env.num_envs, generator=generator, device=env.device)
    gain = low + (high - low) * draw
    frames, actions, successes = [], [], []
    for _ in range(env.horizon):
        action = grid(act(env, gain, generator), settings.levels)
        frames.append(frame.to("cpu", copy=True))
        actions.append(action)
        step = env.step(action)
        frame = step.image
        success = step.info["success"]
        if settings.sim == "maniskill":
            success = success & (action[:, 6] > 0.5)  # it may be true while the object is held
        successes.append(success.clone())
    success = torch.stack(successes).cpu()
    action = torch.stack(actions, 1).cpu()
    found = []
    for b in success[-1].nonzero().flatten().tolist():
        length = int(success[:, b].int().argmax()) + 1 + settings.tail
        image = torch.stack([frame[b] for frame in frames[:length]])
        found.append((image, action[b, :length], instructions[b]))
    return found


def _accumulate(
    policy: Policy, batch: Batch, algorithm: Algorithm, minibatch: int | None
) -> dict[str, Tensor]:
    """Add up the gradient of the batch's mean loss, pass by pass, and return the loss's parts."""
    count, means = len(batch.action_tokens), {}
    index = torch.arange(count, device=batch.action_tokens.device)
    for rows in index.tensor_split(math.ceil(count / (minibatch or count))):
        part = batch if len(rows) == count else select(batch, rows)
        loss, numbers = losses(policy, part, algorithm, temperature=1.0, value_only=False)
        share = len(rows) / count
        (loss * share).backward()
        for name, value in numbers.items():
            means[name] = means.get(name, 0.0) + value * share
    return means


def _sizes(settings: WarmUp) -> tuple[str, list[str]]:
    """Describe the warm-up's passes with gradient, and name smaller ones."""
    size = min(settings.minibatch or settings.batch, settings.batch)
    smaller = [f"--minibatch {size // 2}"] if size > 1 else []
    described = f"minibatch {size} of batch {settings.batch}"
    return learning_sizes(described, smaller, settings.policy, settings.openvla)


def _averages(window: list[dict[str, Tensor]]) -> dict[str, float]:
    names = ("loss/total", "policy/accuracy", "policy/entropy")
    means = {name: torch.stack([part[name] for part in window]).mean() for name in names}
    values = to_floats(means)
    if not math.isfinite(values["loss/total"]):
        raise TrainingDivergedError(
            f"the warm-up's loss became {values['loss/total']}: lower --learning-rate"
        )
    return values
