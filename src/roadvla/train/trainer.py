"""The training loop: collect, judge, update, measure, save (Algorithm 1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from roadvla.envs import close
from roadvla.errors import UserError
from roadvla.evaluation.evaluate import SPLITS, Evaluation, evaluate
from roadvla.evaluation.files import evaluation_path, read_evaluation, write_evaluation
from roadvla.evaluation.machine import usable_device
from roadvla.train.checkpoint import (
    Progress,
    latest_checkpoint,
    read_progress,
    restore_memory,
    restore_optimizer,
    save_checkpoint,
)
from roadvla.train.config import Experiment
from roadvla.train.demonstrations import Demonstrations, load_demonstrations
from roadvla.train.distributed import joined
from roadvla.train.divergence import (
    TrainingDivergedError,
    check_alike,
    check_same_settings,
    refuse_divergence,
)
from roadvla.train.guidance import guide
from roadvla.train.hinting import Hinter, make_hinter
from roadvla.train.interrupt import (
    catch_interrupts,
    raise_interrupt,
    raise_queue_signals,
    stopped,
)
from roadvla.train.lock import check_free, locked
from roadvla.train.memory import acting_sizes, update_sizes, within_memory
from roadvla.train.metrics import (
    MetricsWriter,
    Stopwatch,
    evaluation_metrics,
    peak_memory,
    to_floats,
)
from roadvla.train.notes import add_note
from roadvla.train.parts import Parts, load_policies, make_envs, parts_of
from roadvla.train.progress import Display
from roadvla.train.resume import agreed_checkpoint
from roadvla.train.rollout import collect, reference_values, training_episode_ids
from roadvla.train.run_folder import (
    check_claimable,
    check_resumable,
    create_run_folder,
    resume_command,
    sources_of,
)
from roadvla.train.serialize import fingerprint
from roadvla.train.share import Share
from roadvla.train.update import make_optimizer, set_learning_rates, update
from roadvla.types import Batch
from roadvla.world import World

__all__ = ["Parts", "Trainer", "TrainingDivergedError", "train"]

_FILMED = 6


def train(
    experiment: Experiment, *, resume: bool = False, force: bool = False, parts: Parts | None = None
) -> Path:
    """Run an experiment to its end, or go on with it.

    Ctrl-C, SIGTERM and SIGUSR1 let the iteration finish, save and stop; a second one stops at once.
    A resumed run continues from its last good checkpoint exactly as if it had never stopped (bit
    for bit on a CPU). No other process can write into the folder meanwhile.

    Args:
        experiment: What to do.
        resume: Go on with the run in ``experiment.output``, whose settings must be the same.
        force: Replace a run, a warm-up or a policy that is already there.
        parts: Environment and policy; the package's, of the experiment's kind, unless given.

    Returns:
        The run folder.

    Raises:
        UserError: If the input is unusable or the disk is full; nothing already saved is lost.
        TrainingDivergedError: If a metric is not finite.
        Interrupted: After Ctrl-C, ``Preempted`` after SIGTERM or SIGUSR1; the message says how to
            go on.
    """
    folder, begun = Path(experiment.output), resume
    try:
        with raise_queue_signals(), ExitStack() as held:
            experiment.check_complete()
            world = held.enter_context(joined(experiment.device))
            resume = begun = bool(world.follow(int(resume)))
            check_same_settings(experiment, world)
            checkpoint, passed_over = None, ""
            if resume:
                if world.is_first:
                    held.enter_context(locked(check_resumable(experiment)))
                checkpoint, passed_over = agreed_checkpoint(folder / "checkpoints", world)
            elif world.is_first:
                check_free(folder)
                check_claimable(folder, force=force, sources=sources_of(experiment))
            world.wait()
            trainer = held.enter_context(closing(Trainer(experiment, parts, checkpoint, world)))
            if not resume:
                if world.is_first:
                    # Locked only now: what is refused until here leaves no trace on the disk.
                    held.enter_context(locked(folder))
                    create_run_folder(experiment, force=force)
                world.wait()
                begun = True
            _loop(trainer, folder, passed_over)
    except KeyboardInterrupt as error:
        said = _stopped(folder) if begun else "stopped before the run began"
        raise stopped(error, said) from error
    return folder


def _loop(trainer: Trainer, folder: Path, passed_over: str) -> None:
    """Iterate to the end, saving when it is time, then evaluate."""
    experiment, total, world = trainer.experiment, trainer.iterations, trainer.world
    title = f"{experiment.name} on {experiment.env}"
    start = trainer.progress
    writer = None
    if world.is_first:
        writer = MetricsWriter(folder, iteration=start.iteration, env_steps=start.env_steps)
    console = None if world.is_first else Console(quiet=True)
    with Display(title, total, done=start.iteration, console=console) as display:
        if passed_over and world.is_first:
            said = f"going on from iteration {start.iteration}, the last good one: {passed_over}"
            display.say(f"warning: {said}")
            add_note(folder, start.iteration, said)
        if start.iteration == 0 and experiment.evaluation.every:
            display.say("evaluation before the first iteration, in and out of distribution")
            metrics = evaluation_metrics(trainer.measure(experiment.evaluation.episodes))
            if writer is not None:
                writer.write(0, 0, metrics)
        with catch_interrupts() as interrupts:
            stopping = world.most(interrupts.kind)
            while trainer.progress.iteration < total and not stopping:
                metrics = trainer.iterate()
                done = trainer.progress
                if writer is not None:
                    writer.write(done.iteration, done.env_steps, metrics)
                display.advance(metrics)
                due = done.iteration % experiment.checkpoint_every == 0
                due = due or done.iteration in experiment.kept_iterations
                stopping = world.most(interrupts.kind)
                if due or done.iteration == total or stopping:
                    trainer.save(folder)
        raise_interrupt(stopping)
        if trainer.silent:
            display.say(f"warning: {trainer.silent}")
        results = folder / "evaluation"
        # A run that fell back behind its end has the files, but not their numbers among its own.
        finished = start.iteration == total and world.is_first and trainer.is_evaluated(results)
        if experiment.evaluation.final_episodes and not world.any(finished):
            display.say("final evaluation, in and out of distribution")
            final = trainer.measure(experiment.evaluation.final_episodes, record=_FILMED)
            metrics = evaluation_metrics(final)
            if writer is not None:
                # The files come last: once they are there, nothing is left to do.
                writer.amend(metrics)
                for result in final:
                    write_evaluation(result, results)
            display.advance(metrics, steps=0)


def _stopped(folder: Path) -> str:
    found = latest_checkpoint(folder / "checkpoints")
    where = "before the first checkpoint" if found is None else f"saved at {found.name}"
    return f"stopped, {where}; go on with `{resume_command(folder)}`"


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
            WorkerError: If the processes' weights are not the same.
        """
        check_alike(self.optimizer, self.world, self.progress.iteration, self._kept)
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
