"""Success of a policy on a fixed, numbered set of episodes.

Every method is evaluated on the same episode ids, so that two methods can be compared episode by
episode. Actions are sampled from generators of their own: neither training nor an earlier
evaluation changes the outcome.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor
from torch.nn.functional import pad

from roadvla import envs
from roadvla.envs.base import Privileged, VectorEnv
from roadvla.envs.suite import SETTINGS
from roadvla.errors import UserError, WorkerError
from roadvla.evaluation.definition import failure_definition
from roadvla.evaluation.failures import EVENTS, EventLog, as_lists
from roadvla.evaluation.machine import describe_machine
from roadvla.evaluation.stats import wilson
from roadvla.policy.base import Policy
from roadvla.policy.sampling import draw_uniform
from roadvla.policy.temperature import check_temperature
from roadvla.types import Observation
from roadvla.world import World

SPLITS = ("train", "test")
_OUTCOMES = ("success", "success_once", "grasped")
_TRIES = 3
"""Times that a batch is run when a simulation dies in it: its episodes are the same each time."""


@dataclass(frozen=True)
class Film:
    """Frames of the first episodes of an evaluation.

    Attributes:
        frames: The first frame and the one after each action.
        success: Success at the last step.
        instructions: What each episode asked for.
        episode_ids: Which episodes these are.
    """

    frames: UInt8[Tensor, "n frames H W 3"]
    success: Bool[Tensor, " n"]
    instructions: tuple[str, ...]
    episode_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Outcome of every episode, and what is needed to run them again.

    Attributes:
        split: ``train`` (in distribution) or ``test`` (out of distribution).
        horizon: Actions per episode.
        seed: Of the action sampling.
        episode_ids: In the order of the outcomes.
        success: At the last step.
        success_once: At any step.
        grasped: The right object was held at any step.
        seconds: Wall time.
        machine: Processor, cores, torch.
        date: ISO 8601, UTC.
        torch: Version.
        checkpoint: Where the policy came from; the caller fills it in.
        iteration: Training iteration of the policy; the caller fills it in.
        env_steps: Environment steps the policy was trained for; the caller fills it in.
        simulator: How it simulated, where there is a choice: ``stand_ins`` and the like.
        modes: How each episode ended, as indices into ``failures.MODES``; empty where the
            environment does not say where things are.
        events: What happened on the way, by the names of ``failures.EVENTS``; likewise.
        judged_by: Hash of the code that named the modes; ``""`` if there are none or it was not
            noted.
        film: Frames of the first episodes, when they were asked for.
    """

    env: str
    split: str
    sim: str
    temperature: float
    horizon: int
    seed: int
    episode_ids: tuple[int, ...]
    success: tuple[bool, ...]
    success_once: tuple[bool, ...]
    grasped: tuple[bool, ...]
    seconds: float
    machine: str
    date: str
    torch: str
    checkpoint: str | None = None
    iteration: int | None = None
    env_steps: int | None = None
    simulator: dict[str, Any] = field(default_factory=dict)
    modes: tuple[int, ...] = ()
    events: dict[str, tuple[int, ...]] = field(default_factory=dict)
    judged_by: str = ""
    film: Film | None = None

    @property
    def episodes(self) -> int:
        """How many episodes were run."""
        return len(self.episode_ids)

    @property
    def success_rate(self) -> float:
        """Share of episodes with success at the last step."""
        return sum(self.success) / self.episodes

    @property
    def success_low(self) -> float:
        """Lower end of the Wilson 95 % interval of ``success_rate``."""
        return wilson(sum(self.success), self.episodes)[0]

    @property
    def success_high(self) -> float:
        """Upper end of the Wilson 95 % interval of ``success_rate``."""
        return wilson(sum(self.success), self.episodes)[1]

    @property
    def success_once_rate(self) -> float:
        """Share of episodes with success at any step."""
        return sum(self.success_once) / self.episodes

    @property
    def grasp_rate(self) -> float:
        """Share of episodes in which the right object was ever held."""
        return sum(self.grasped) / self.episodes


def evaluate(
    policy: Policy,
    *,
    env: str,
    split: str,
    sim: str = "tabletop",
    episodes: int = 512,
    temperature: float = 0.6,
    num_envs: int = 64,
    seed: int = 0,
    device: str = "cpu",
    record: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
    make_env: Callable[..., VectorEnv] | None = None,
    ranks: World | None = None,
) -> Evaluation:
    """Run the policy on episodes 0 to ``episodes - 1`` and note every outcome.

    The last batch is filled up with further ids whose outcome is dropped, so more episodes with
    the same ``num_envs`` repeat the outcomes of fewer and add to them.

    Args:
        policy: On ``device``.
        env: Setting of the suite, by paper alias or RL4VLA id; the alias is what is kept.
        split: ``train`` (in distribution) or ``test`` (out of distribution).
        sim: Simulator.
        episodes: How many.
        temperature: Of the action sampling; 0 is greedy.
        num_envs: Episodes run at once; the sampled actions depend on it.
        seed: Of the action sampling.
        device: Where the environments live.
        record: Keep the frames of this many first episodes.
        on_progress: Called after each batch with the episodes finished and successes among them.
        make_env: Builds the environments; ``roadvla.envs.make_env`` unless given.
        ranks: The processes that share each batch, all of which get the result; this one alone
            unless given. Only the first one's episodes are filmed.

    Raises:
        UserError: If there is no such setting, split or simulator, or a number is out of range.
    """
    ranks = ranks or World()
    drawn = min(num_envs, episodes)
    # Processes with nothing left to do run further episodes, whose outcome is dropped.
    num_envs = min(num_envs, ranks.size * -(-episodes // ranks.size))
    check_request(split, episodes, temperature, num_envs, seed=seed, record=record)
    if make_env is None:
        env, make_env = envs.canonical(env, sim), envs.make_env
    begun = time.perf_counter()
    own = ranks.share(num_envs)
    world = make_env(env, split=split, num_envs=own, sim=sim, device=device)
    moved = SETTINGS[env].distribution(split).reposition_step if env in SETTINGS else 0
    plan = _Plan(episodes, temperature, seed, record, ranks, drawn, moved)
    try:
        found, film = _run_all(policy, world, plan, on_progress)
    finally:
        envs.close(world)
    return Evaluation(
        env=env,
        split=split,
        sim=sim,
        temperature=float(temperature),
        horizon=world.horizon,
        seed=seed,
        episode_ids=tuple(range(episodes)),
        success=tuple(map(bool, found["success"])),
        success_once=tuple(map(bool, found["success_once"])),
        grasped=tuple(map(bool, found["grasped"])),
        seconds=time.perf_counter() - begun,
        machine=describe_machine(device),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        torch=str(torch.__version__),
        simulator=dict(getattr(world, "facts", {})),
        judged_by=failure_definition() if "mode" in found else "",
        modes=tuple(found.get("mode", ())),
        events={name: tuple(found[name]) for name in EVENTS if name in found},
        film=film,
    )


@dataclass(frozen=True)
class _Plan:
    """Which episodes are run, how, and by whom.

    Attributes:
        drawn: For how many episodes of a batch numbers are drawn, whatever the number of processes.
    """

    episodes: int
    temperature: float
    seed: int
    record: int
    ranks: World
    drawn: int
    repositioned: int


def _run_all(
    policy: Policy,
    world: VectorEnv,
    plan: _Plan,
    on_progress: Callable[[int, int], None] | None,
) -> tuple[dict[str, list[int]], Film | None]:
    """Run batch after batch; outcomes, mode and events of every episode by name."""
    found: dict[str, list[int]] = {}
    films: list[Film] = []
    ranks, size = plan.ranks, plan.ranks.size * world.num_envs
    for batch, start in enumerate(range(0, plan.episodes, size)):
        ids = torch.arange(start, start + size, device=world.device)[ranks.rows(size)]
        filmed = max(0, min(world.num_envs, plan.record - start)) if ranks.is_first else 0
        for _ in range(_TRIES):
            generator = _generator(plan.seed, batch, world.device)
            columns, film = _run_batch(policy, world, ids, plan, generator, filmed)
            outcomes = as_lists(columns, ranks)
            if not any(outcomes.pop("lost", ())[: plan.episodes - start]):
                break
        else:
            raise WorkerError(
                f"episodes {start} to {start + size - 1} were lost {_TRIES} times: their "
                f"simulation dies, see the warnings above"
            )
        for name, values in outcomes.items():
            found.setdefault(name, []).extend(values[: plan.episodes - start])
        if film is not None:
            films.append(film)
        if on_progress is not None:
            on_progress(len(found["success"]), sum(found["success"]))
    return found, _join(films)


def _run_batch(
    policy: Policy,
    world: VectorEnv,
    episode_ids: Int[Tensor, " B"],
    plan: _Plan,
    generator: torch.Generator,
    filmed: int,
) -> tuple[dict[str, Tensor], Film | None]:
    """Run one batch of episodes to the horizon; nothing is read from the device on the way."""
    ranks = plan.ranks
    image = world.reset(episode_ids)
    prompt = policy.tokenize(world.instructions)
    instructions = tuple(world.instructions[:filmed])
    frames = [image[:filmed].clone()]
    info: dict[str, Tensor] = {}
    watched = world if isinstance(world, Privileged) else None
    log = None if watched is None else EventLog(watched.snapshot(), plan.repositioned)
    for _ in range(world.horizon):
        uniform = None
        if ranks.size > 1:
            size = ranks.size * len(image)
            uniform = draw_uniform(plan.drawn, policy.num_tokens, generator)
            uniform = pad(uniform, (0, 0, 0, size - plan.drawn))[ranks.rows(size)]
        output = policy.act(
            Observation(image=image, prompt=prompt),
            temperature=plan.temperature,
            generator=generator,
            uniform=uniform,
        )
        step = world.step(policy.decode(output.action_tokens))
        image, info = step.image, step.info
        if log is not None and watched is not None:
            log.note(watched.snapshot(), info["success"])
        if filmed:
            frames.append(image[:filmed].clone())
    columns = {name: info[name] for name in (*_OUTCOMES, "lost") if name in info}
    if log is not None:
        columns["mode"], events = log.outcome(info["success"], info["success_once"])
        columns |= events
    if not filmed:
        return columns, None
    film = Film(
        frames=torch.stack(frames, dim=1).cpu(),
        success=info["success"][:filmed].cpu(),
        instructions=instructions,
        episode_ids=tuple(episode_ids[:filmed].tolist()),
    )
    return columns, film


def _generator(seed: int, batch: int, device: torch.device) -> torch.Generator:
    """Make the generator of one batch; different pairs give unrelated streams."""
    state = np.random.SeedSequence([seed, batch]).generate_state(1, np.uint64)[0]
    return torch.Generator(device=device).manual_seed(int(state) >> 1)


def _join(films: list[Film]) -> Film | None:
    if not films:
        return None
    return Film(
        frames=torch.cat([film.frames for film in films]),
        success=torch.cat([film.success for film in films]),
        instructions=tuple(text for film in films for text in film.instructions),
        episode_ids=tuple(i for film in films for i in film.episode_ids),
    )


def check_request(
    split: str, episodes: int, temperature: float, num_envs: int, *, seed: int, record: int
) -> None:
    """Refuse an evaluation whose numbers are out of range.

    Args:
        split: As ``evaluate``'s, like the rest.
        episodes: At least 1.
        temperature: 0 or at least 0.001.
        num_envs: At least 1.
        seed: At least 0.
        record: At most ``episodes``.

    Raises:
        UserError: If one is.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}: use 'train' or 'test'")
    if episodes < 1:
        raise UserError(f"episodes is {episodes}: at least 1 is needed")
    if num_envs < 1:
        raise UserError(f"num_envs is {num_envs}: at least 1 is needed")
    check_temperature(temperature)
    if seed < 0:
        raise UserError(f"seed is {seed}: expected 0 or more")
    if not 0 <= record <= episodes:
        raise UserError(f"record is {record}: expected 0 to {episodes}, the number of episodes")
