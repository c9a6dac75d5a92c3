"""Steps that demo and studies are made of; each is skipped when its result is already there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from roadvla.envs.suite import SETTINGS
from roadvla.evaluation.evaluate import SPLITS, evaluate
from roadvla.evaluation.files import evaluation_path, write_evaluation
from roadvla.policy import load_policy
from roadvla.train.checkpoint import policy_folder
from roadvla.train.config import Experiment
from roadvla.train.progress import Display
from roadvla.train.run_folder import CONFIG
from roadvla.train.trainer import train
from roadvla.train.warmup import WarmUp, run_warm_up

_NUM_ENVS = 64


def ensure_warm_up(settings: WarmUp) -> Path:
    """Warm up unless the folder already holds a policy."""
    folder = Path(settings.output)
    return folder if (folder / "policy.json").exists() else run_warm_up(settings)


def ensure_run(experiment: Experiment) -> Path:
    """Train, or go on where an earlier attempt stopped; a finished run returns at once."""
    folder = Path(experiment.output)
    return train(experiment, resume=(folder / CONFIG).exists())


def ensure_evaluations(run: Path, *, episodes: int, seed: int = 0, record: int = 0) -> None:
    """Evaluate a policy on every setting's two splits, but for those already measured.

    The four settings that share one training distribution are measured in distribution once.

    Args:
        run: Run or policy folder; results go to its ``evaluation`` folder.
        episodes: Of each split.
        seed: Of the action sampling.
        record: Episodes of each out-of-distribution split to film.
    """
    measured: set[object] = set()
    todo: list[tuple[str, str]] = []
    for alias, row in SETTINGS.items():
        for split in SPLITS:
            distribution = row.distribution(split)
            if distribution not in measured:
                measured.add(distribution)
                todo.append((alias, split))
    folder = run / "evaluation"
    todo = [job for job in todo if not evaluation_path(folder, *job).exists()]
    policy = load_policy(policy_folder(run))
    with Display(f"evaluate {run.name}", len(todo)) as display:
        for alias, split in todo:
            result = evaluate(
                policy,
                env=alias,
                split=split,
                episodes=episodes,
                num_envs=min(_NUM_ENVS, episodes),
                seed=seed,
                record=record if split == "test" else 0,
            )
            write_evaluation(replace(result, checkpoint=str(policy_folder(run))), folder)
            display.advance({f"eval/{split}/success_rate": result.success_rate})
