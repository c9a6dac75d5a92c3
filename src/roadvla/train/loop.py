"""The training loop: from the folder and its lock to the last evaluation."""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path

from rich.console import Console

from roadvla.errors import UserError
from roadvla.evaluation.files import write_evaluation
from roadvla.train.checkpoint import latest_checkpoint
from roadvla.train.config import Experiment
from roadvla.train.distributed import joined
from roadvla.train.divergence import check_same_settings
from roadvla.train.interrupt import (
    catch_interrupts,
    raise_interrupt,
    raise_queue_signals,
    stopped,
)
from roadvla.train.lock import check_free, locked
from roadvla.train.metrics import MetricsWriter, evaluation_metrics
from roadvla.train.notes import add_note
from roadvla.train.parts import Parts
from roadvla.train.progress import Display
from roadvla.train.resume import agreed_checkpoint, agreed_start
from roadvla.train.run_folder import (
    check_claimable,
    check_resumable,
    create_run_folder,
    resume_command,
    sources_of,
)
from roadvla.train.sources import check_sources, sources_now
from roadvla.train.trainer import Trainer

_FILMED = 6


def train(
    experiment: Experiment,
    *,
    resume: bool = False,
    if_begun: bool = False,
    force: bool = False,
    parts: Parts | None = None,
) -> Path:
    """Run an experiment to its end, or go on with it.

    Ctrl-C, SIGTERM and SIGUSR1 let the iteration finish, save and stop; a second one stops at once,
    but a queue's only where there are no other processes.
    A resumed run continues from its last good checkpoint exactly as if it had never stopped (bit
    for bit on a CPU). No other process can write into the folder meanwhile.

    Args:
        experiment: What to do.
        resume: Go on with the run in ``experiment.output``, whose settings must be the same.
        if_begun: The same if there is one; begin it if not.
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
            resume, force = agreed_start(
                folder, world, resume=resume, if_begun=if_begun, force=force
            )
            begun = resume
            check_same_settings(experiment, world)
            checkpoint, passed_over = None, ""
            if resume:
                if world.is_first:
                    held.enter_context(locked(check_resumable(experiment)))
                    check_sources(experiment)
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
                    create_run_folder(experiment, force=force, sources=sources_now(experiment))
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
        if stopping:
            world.wait()  # whoever leaves first has the others ended: the save must be over
        raise_interrupt(stopping)
        if start.iteration == total:
            trainer.retire(folder)
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
    try:
        found = latest_checkpoint(folder / "checkpoints")
    except UserError:  # for the next start to find out; this one was stopped
        return f"stopped; go on with `{resume_command(folder)}`"
    where = "before the first checkpoint" if found is None else f"saved at {found.name}"
    return f"stopped, {where}; go on with `{resume_command(folder)}`"
