"""A run in memory, and one iteration of it: collect, judge, update, measure (Algorithm 1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from roadvla.envs import close
from roadvla.errors import UserError
from roadvla.evaluation.evaluate import SPLITS, Evaluation, evaluate
from roadvla.evaluation.files import evaluation_path, read_evaluation
from roadvla.evaluation.machine import usable_device
from roadvla.train.checkpoint import (
    Progress,
    latest_checkpoint,
    read_progress,
    restore_memory,
    restore_optimizer,
    retire_checkpoints,
    save_checkpoint,
)
from roadvla.train.config import Experiment
from roadvla.train.demonstrations import Demonstrations, check_frames, load_demonstrations
from roadvla.train.divergence import (
    check_alike,
    refuse_divergence,
)
from roadvla.train.guidance import guide
from roadvla.train.hinting import Hinter, make_hinter
from roadvla.train.memory import acting_sizes, update_sizes, within_memory
from roadvla.train.metrics import (
    Stopwatch,
    evaluation_metrics,
    peak_memory,
    to_floats,
)
from roadvla.train.parts import Parts, load_policies, make_envs, parts_of
from roadvla.train.rollout import collect, reference_values, training_episode_ids
from roadvla.train.serialize import fingerprint
from roadvla.train.share import Share
from roadvla.train.update import make_optimizer, set_learning_rates, update
from roadvla.types import Batch
from roadvla.world import World

__all__ = ["Parts", "Trainer"]


class Trainer:
    """A run in memory: the policy and all that changes with it.

    Args:
        experiment: Settings.
        parts: Environment and policy; the package's, of the experiment's kind, if ``None``.
        checkpoint: Where to go on; ``None`` to begin.
        world: The processes that run it together; this one alone unless given.

    Raises:
        UserError: If a file does not load, or settings do not fit the environment.
    """

    def __init__(
        self,
        experiment: Experiment,
        parts: Parts | None,
        checkpoint: Path | None,
        world: World | None = None,
    ) -> None:
        self.experiment, self.world = experiment, world or World()
        self._device = usable_device(experiment.device)
        self._parts = parts or parts_of(
            experiment.policy, experiment.checkpoint, experiment.openvla, experiment.maniskill
        )
        self._envs = make_envs(self._parts, experiment, self.world)
        self._env = self._envs[0]
        self.iterations = experiment.iterations(self._env.horizon)
        _check_minibatch(experiment, self._env.horizon)
        self._hinter: Hinter | None = None
        if experiment.algorithm.hints != "none":
            gamma = experiment.algorithm.gamma
            self._hinter = make_hinter(experiment.algorithm.hints, self._env, gamma=gamma)
        self._demonstrations: Demonstrations | None = None
        if experiment.demonstrations is not None:
            self._demonstrations = load_demonstrations(Path(experiment.demonstrations))
        # Policies come last: they may take minutes to load.
        source = checkpoint or experiment.init
        loaded = load_policies(self._parts, experiment, source, self._device, self.world)
        self.policy, self._reference = loaded
        if self._demonstrations is not None:
            side = getattr(self.policy, "image_size", None)
            check_frames(self._demonstrations, side, Path(str(experiment.demonstrations)))
        critic = self._reference
        self._share_vision = critic is not None and critic.shares_vision(self.policy)
        self.optimizer = make_optimizer(self.policy, experiment.optimizer)
        self.generator = torch.Generator(self._device).manual_seed(experiment.seed)
        config = fingerprint(experiment)
        self.progress = Progress(iteration=0, env_steps=0, episodes=0, config=config)
        if checkpoint is not None:
            self.progress = read_progress(checkpoint)
            if self.progress.config != config:
                raise UserError(
                    f"{checkpoint} belongs to another configuration than {experiment.output}: "
                    f"start a new run with --init {checkpoint}"
                )
            memory = restore_optimizer(checkpoint, self.policy, self.optimizer, self.generator)
            restore_memory(checkpoint, self._hinter, memory)

    def iterate(self) -> dict[str, float]:
        """Do one iteration: collect, judge, update and, when it is time, evaluate.

        Raises:
            TrainingDivergedError: If a metric is not finite.
        """
        experiment, iteration = self.experiment, self.progress.iteration
        watch = Stopwatch(self._device)
        batch, share, metrics = self._gather(watch)
        if not len(share):
            self._refuse_divergence(to_floats(metrics), batch)
        rate = set_learning_rates(self.optimizer, experiment.optimizer, iteration, self.iterations)
        with watch.phase("update"), self._within("the update", update_sizes(experiment)):
            metrics |= update(
                self.policy,
                self.optimizer,
                batch,
                experiment.algorithm,
                experiment.optimizer,
                temperature=experiment.rollout.temperature,
                generator=self.generator,
                value_only=iteration < experiment.algorithm.critic_only_iterations,
                share=share,
            )
            values = to_floats(metrics)
        self._refuse_divergence(values, batch)
        steps = experiment.rollout.num_envs * self._env.horizon
        speeds = {f"{key}_steps_per_second": steps / took for key, took in watch.seconds.items()}
        speeds["time/steps_per_second"] = steps / watch.total()
        self.progress = dataclasses.replace(
            self.progress, iteration=iteration + 1, env_steps=self.progress.env_steps + steps
        )
        if experiment.evaluation.due(iteration + 1) and iteration + 1 < self.iterations:
            with watch.phase("evaluation"):
                values |= evaluation_metrics(self.measure(experiment.evaluation.episodes))
        return {
            **values,
            "policy/learning_rate": rate,
            **watch.seconds,
            "time/iteration": watch.total(),
            **speeds,
            "memory/peak_mb": peak_memory(self._device),
        }

    def measure(self, episodes: int, *, record: int = 0) -> tuple[Evaluation, Evaluation]:
        """Evaluate in and out of distribution.

        Args:
            episodes: Of each split.
            record: Episodes of each split to film.
        """
        experiment, progress = self.experiment, self.progress
        with self._within("the evaluation", self._acting):
            results = [
                evaluate(
                    self.policy,
                    env=experiment.env,
                    split=split,
                    sim=experiment.sim,
                    episodes=episodes,
                    temperature=experiment.evaluation.temperature,
                    num_envs=experiment.rollout.num_envs,
                    device=experiment.device,
                    record=min(record, episodes),
                    make_env=self._parts.make_env,
                    ranks=self.world,
                )
                for split in SPLITS
            ]
        checkpoint = f"checkpoints/iteration_{progress.iteration:06d}"
        train_split, test_split = (
            dataclasses.replace(
                result,
                checkpoint=checkpoint,
                iteration=progress.iteration,
                env_steps=progress.env_steps,
            )
            for result in results
        )
        return train_split, test_split

    @property
    def silent(self) -> str:
        """Why a text-guided teacher had nothing to say; ``""`` if it had, or if there is none."""
        return "" if self._hinter is None else self._hinter.silent

    def close(self) -> None:
        """Free what the environments hold."""
        for env in self._envs:
            close(env)

    def is_evaluated(self, folder: Path) -> bool:
        """Whether the folder holds evaluations of the policy as it is now."""
        try:
            found = [
                read_evaluation(evaluation_path(folder, self.experiment.env, split)).iteration
                for split in SPLITS
            ]
        except UserError:
            return False
        return found == [self.progress.iteration] * len(SPLITS)

    def save(self, folder: Path) -> None:
        """Write a checkpoint into the run folder; of several processes the first does.

        Raises:
            WorkerError: If the processes do not hold the same.
        """
        iteration = self.progress.iteration
        check_alike(self.optimizer, self.generator, self.world, iteration, self._kept)
        if not self.world.is_first:
            return
        save_checkpoint(
            folder / "checkpoints",
            self.progress,
            self.policy,
            self.optimizer,
            self.generator,
            save_policy=self._parts.save_policy,
            keep_all=self.experiment.keep_checkpoints == "all",
            kept=self.experiment.kept_iterations,
            memory={} if self._hinter is None else self._hinter.tensors(),
        )

    def retire(self, folder: Path) -> None:
        """Drop the checkpoints that the last save was killed before it could drop."""
        if self.world.is_first:
            retire_checkpoints(
                folder / "checkpoints",
                self.progress.iteration,
                keep_all=self.experiment.keep_checkpoints == "all",
                kept=self.experiment.kept_iterations,
            )

    def _gather(self, watch: Stopwatch) -> tuple[Batch, Share, dict[str, Tensor]]:
        """Make the iteration's batch: from demonstrations, or by acting and judging."""
        experiment, algorithm, world = self.experiment, self.experiment.algorithm, self.world
        count = experiment.rollout.num_envs
        if self._demonstrations is not None:
            size = count * self._env.horizon
            batch = self._demonstrations.sample(self.policy, size, self.generator, world)
            return batch, self._in_step(Share.of_rows(size, world)), {}
        repeats = algorithm.group_size if algorithm.algo == "grpo" else 1
        ids = training_episode_ids(
            experiment.seed, self.progress.episodes, count, repeats=repeats, device=self._device
        )
        with watch.phase("rollout"), self._within("the rollout", self._acting):
            rollout = collect(
                self.policy,
                self._envs,
                ids[world.rows(count)],
                temperature=experiment.rollout.temperature,
                generator=self.generator,
                keep_logits=algorithm.teacher_logits == "rollout",
                bootstrap=algorithm.bootstrap_truncated,
                observe=None if self._hinter is None else self._hinter.observe,
                world=world,
            )
            if self._hinter is not None:
                rollout = self._hinter.hinted(rollout, self.policy, world)
        self.progress = dataclasses.replace(
            self.progress, episodes=self.progress.episodes + count // repeats
        )
        reference = None
        if self._reference is not None:
            with watch.phase("reference"), self._within("the reference pass", self._acting):
                reference = reference_values(
                    self._reference, rollout, share_vision=self._share_vision
                )
        batch, metrics = guide(rollout, algorithm, reference, generator=self.generator, world=world)
        blocks = experiment.optimizer.blocks
        share = Share.of_rollout(rollout.active, world, blocks=blocks)
        return batch, self._in_step(share), metrics

    def _refuse_divergence(self, values: dict[str, float], batch: Batch) -> None:
        number = self.progress.iteration + 1
        refuse_divergence(
            self.experiment, self.policy, batch, values, iteration=number, world=self.world
        )

    def _in_step(self, share: Share) -> Share:
        """Ask for as many passes in every process, if they hold the policy together."""
        spread = self.world.size > 1 and self._parts.spread is not None
        return dataclasses.replace(share, in_step=spread)

    @property
    def _acting(self) -> tuple[str, list[str]]:
        experiment = self.experiment
        share = self.world.share(experiment.rollout.num_envs)
        return acting_sizes(share, experiment.policy, experiment.openvla)

    @contextmanager
    def _within(self, work: str, sizes: tuple[str, Sequence[str]]) -> Iterator[None]:
        """Explain it if memory runs out, and name the checkpoint to go on from."""
        with within_memory(work, *sizes, kept=self._kept):
            yield

    def _kept(self) -> str:
        found = latest_checkpoint(Path(self.experiment.output) / "checkpoints")
        if found is None:
            return "there is no checkpoint yet"
        return f"the last checkpoint is {found}: go on from it with --init and another --output"


def _check_minibatch(experiment: Experiment, horizon: int) -> None:
    optimizer, steps = experiment.optimizer, experiment.rollout.num_envs * horizon
    wanted = optimizer.minibatch * optimizer.accumulation
    if wanted > steps:
        raise UserError(
            f"minibatch {optimizer.minibatch} × accumulation {optimizer.accumulation} = {wanted} "
            f"exceeds the {steps} steps of a rollout: lower one of them or raise num_envs"
        )
