"""Steps that demo and studies are made of; each is skipped when its result is already there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from roadvla.envs.suite import SETTINGS
from roadvla.errors import UserError
from roadvla.evaluation.evaluate import SPLITS, Evaluation, evaluate
from roadvla.evaluation.files import count_filmed, find_evaluation, write_evaluation
from roadvla.files import read_json
from roadvla.policy import load_policy
from roadvla.train.checkpoint import policy_folder, read_progress
from roadvla.train.config import EvaluationConfig, Experiment
from roadvla.train.interrupt import raise_queue_signals, stopped
from roadvla.train.loop import train
from roadvla.train.progress import Display
from roadvla.train.run_folder import CONFIG
from roadvla.train.warmup import WarmUp, run_warm_up

_NUM_ENVS = 64
_TEMPERATURE = EvaluationConfig().temperature


@contextmanager
def continued_by(command: str) -> Iterator[None]:
    """Answer Ctrl-C or a queue's signal in the block with the command that goes on from there.

    Raises:
        Interrupted: After Ctrl-C, ``Preempted`` after SIGTERM or SIGUSR1.
    """
    try:
        with raise_queue_signals():
            yield
    except KeyboardInterrupt as error:
        raise stopped(error, f"stopped; go on with the same command: {command}") from error


def ensure_warm_up(settings: WarmUp) -> Path:
    """Warm up unless the folder already holds the policy of these settings.

    Raises:
        UserError: If it holds something made with others, or with unknown ones.
    """
    folder = Path(settings.output)
    done = (folder / "policy.json").exists()
    if not done and not (folder / CONFIG).exists():
        return run_warm_up(settings)
    _check_warm_up(folder, settings)
    # The policy is written last: without it, the same warm-up was cut off while it was saved.
    return folder if done else run_warm_up(settings, force=True)


def ensure_run(experiment: Experiment) -> Path:
    """Train, or go on where an earlier attempt stopped; a finished run returns at once."""
    folder = Path(experiment.output)
    return train(experiment, resume=(folder / CONFIG).exists())


def trained(policy: Path) -> tuple[int | None, int | None]:
    """Read how far a policy was trained: iteration and environment steps, of a warm-up neither."""
    if not (policy / "state.json").exists():
        return None, None
    progress = read_progress(policy)
    return progress.iteration, progress.env_steps


def attribute(result: Evaluation, policy: Path, *, base: Path | None = None) -> Evaluation:
    """Note whose evaluation it is: the policy's folder, and how far it was trained.

    Args:
        result: Of that policy.
        policy: A policy folder or a checkpoint.
        base: Folder that the policy's is named relative to; as it stands unless given.
    """
    named = policy if base is None else policy.relative_to(base)
    iteration, env_steps = trained(policy)
    return replace(result, checkpoint=str(named), iteration=iteration, env_steps=env_steps)


def ensure_evaluations(
    run: Path,
    *,
    episodes: int,
    more: Mapping[str, int] | None = None,
    seed: int = 0,
    record: int = 0,
) -> None:
    """Evaluate a policy on every setting's two splits, but for those already measured.

    The four settings that share one training distribution are measured in distribution once, and
    the result is noted under each. A result counts as measured if it is of the policy as it is
    now, sampled alike, and of no fewer episodes.

    Args:
        run: Run or policy folder; results go to its ``evaluation`` folder.
        episodes: Of each split.
        more: Settings that need more episodes than that, and how many.
        seed: Of the action sampling.
        record: Episodes of each out-of-distribution split to film.
    """
    folder, checkpoint = run / "evaluation", policy_folder(run)
    iteration, _ = trained(checkpoint)
    todo = [
        (alias, split, count)
        for alias, split, count in _wanted(episodes, more or {})
        if not _is_measured(find_evaluation(folder, alias, split), count, iteration, seed)
    ]
    policy = load_policy(checkpoint)
    with Display(f"evaluate {run.name}", len(todo)) as display:
        for alias, split, count in todo:
            # A set that was filmed is filmed again: the earlier film goes with its numbers.
            filmed = max(count_filmed(folder, alias, split), record if split == "test" else 0)
            result = evaluate(
                policy,
                env=alias,
                split=split,
                episodes=count,
                temperature=_TEMPERATURE,
                num_envs=min(_NUM_ENVS, count),
                seed=seed,
                record=min(filmed, count),
            )
            write_evaluation(attribute(result, checkpoint, base=run), folder)
            display.advance({f"eval/{split}/success_rate": result.success_rate})
    _copy_shared(folder, iteration, seed)


def _copy_shared(folder: Path, iteration: int | None, seed: int) -> None:
    """Note a result under every setting that shares its distribution and has none as good.

    The episodes and the sampling are the same, so measuring again would give the same outcomes.
    """
    first: dict[object, tuple[str, str]] = {}
    for alias, row in SETTINGS.items():
        for split in SPLITS:
            source = first.setdefault(row.distribution(split), (alias, split))
            result = find_evaluation(folder, *source)
            if source[0] == alias or result is None:
                continue
            known = find_evaluation(folder, alias, split)
            if not _is_measured(known, result.episodes, iteration, seed):
                write_evaluation(replace(result, env=alias), folder)


def _check_warm_up(folder: Path, settings: WarmUp) -> None:
    """Refuse a warm-up whose recorded settings are others; only its folder may have moved."""
    mend = "choose another --output or delete it"
    try:
        recorded = read_json(folder / CONFIG)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} holds a policy, but {CONFIG}, which says how it was made, is missing or "
            f"damaged: {mend}"
        ) from error
    if not isinstance(recorded, dict):
        raise UserError(f"{folder / CONFIG} does not hold a configuration: {mend}")
    wanted = json.loads(json.dumps(asdict(settings)))  # tuples as the lists they are in the file
    others = [
        f"{name} {recorded.get(name)}, not {value}"
        for name, value in wanted.items()
        if name != "output" and recorded.get(name) != value
    ]
    if others:
        raise UserError(
            f"{folder} holds a warm-up made with other settings ({'; '.join(others)}): {mend}"
        )


def _wanted(episodes: int, more: Mapping[str, int]) -> list[tuple[str, str, int]]:
    """Name one setting and split per distribution, and the most episodes asked of it."""
    names: dict[object, tuple[str, str]] = {}
    counts: dict[object, int] = {}
    for alias, row in SETTINGS.items():
        for split in SPLITS:
            distribution = row.distribution(split)
            names.setdefault(distribution, (alias, split))
            asked = max(episodes, more.get(alias, 0))
            counts[distribution] = max(counts.get(distribution, 0), asked)
    return [(*names[distribution], count) for distribution, count in counts.items()]


def _is_measured(found: Evaluation | None, episodes: int, iteration: int | None, seed: int) -> bool:
    """Whether a stored result is what a new evaluation would give, or more of it."""
    return (
        found is not None
        and (found.iteration, found.temperature, found.seed) == (iteration, _TEMPERATURE, seed)
        and found.episodes >= episodes
    )
