"""Run folders as training leaves them, made of made-up but plausible numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch

from roadvla.evaluation.evaluate import Evaluation, Film
from roadvla.evaluation.files import write_evaluation


def make_run(
    folder: Path,
    *,
    name: str,
    algo: str,
    seed: int = 0,
    env: str = "VR-UnseenTable",
    rates: tuple[float, float] = (0.7, 0.5),
    start: tuple[float, float] = (0.35, 0.25),
    iterations: int = 40,
    episodes: int = 256,
    film: int = 0,
    **config,
) -> Path:
    """Write one run whose success climbs from ``start`` to ``rates``, both (train, test)."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng([seed, *name.encode()])
    settings = {
        "name": name,
        "env": env,
        "seed": seed,
        "algorithm": {"algo": algo, "surrogate_advantage": "int", "alpha": 0.5},
        "output": str(folder),
        "roadvla_version": "0.1.0",
        "command": f"roadvla train {name} --seed {seed}",
        "started": "2026-01-02T03:04:05+00:00",
        "machine": "Some CPU, 2 cores, torch 2.13.0",
        **config,
    }
    (folder / "config.json").write_text(json.dumps(settings, indent=1))
    if algo != "sft":
        rows = [_metrics(rng, i, iterations, start, rates, algo) for i in range(iterations + 1)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for place, split in enumerate(("train", "test")):
        # Hard episodes are hard for every method and seed.
        hardness = np.random.default_rng(place).random(episodes)
        noise = 0.5 * rng.random(episodes) + 0.5 * hardness
        evaluation = make_evaluation(
            env, split, noise <= np.quantile(noise, rates[place]), film=film
        )
        write_evaluation(evaluation, folder / "evaluation")
    return folder


def make_evaluation(env, split, success, *, film: int = 0, **changes) -> Evaluation:
    success = tuple(bool(x) for x in success)
    fields = {
        "env": env,
        "split": split,
        "sim": "tabletop",
        "temperature": 0.6,
        "horizon": 24,
        "seed": 0,
        "episode_ids": tuple(range(len(success))),
        "success": success,
        "success_once": success,
        "grasped": tuple(True for _ in success),
        "seconds": 1.5,
        "machine": "Some CPU, 2 cores, torch 2.13.0",
        "date": "2026-01-02T03:34:05+00:00",
        "torch": "2.13.0",
        "film": make_film(success[:film]) if film else None,
        **changes,
    }
    return Evaluation(**fields)


def make_film(success) -> Film:
    """A square that wanders towards a disc and gets there if the episode succeeds."""
    frames = torch.full((len(success), 25, 48, 48, 3), 205, dtype=torch.uint8)
    ys, xs = torch.meshgrid(torch.arange(48), torch.arange(48), indexing="ij")
    disc = (xs - 36) ** 2 + (ys - 30) ** 2 < 64
    for n, reached in enumerate(success):
        for t in range(25):
            frames[n, t][disc] = torch.tensor([240, 240, 255], dtype=torch.uint8)
            x = int(6 + (30 if reached else 18) * t / 24)
            y = int(10 + 20 * t / 24 + 3 * math.sin(n + t / 4))
            frames[n, t, y - 3 : y + 4, x - 3 : x + 4] = torch.tensor(
                [200, 60 + 40 * (n % 4), 40], dtype=torch.uint8
            )
    names = ("red cube", "green star", "blue cylinder", "yellow block")
    return Film(
        frames=frames,
        success=torch.tensor(success),
        instructions=tuple(
            f"put the {names[n % 4]} on the white plate" for n in range(len(success))
        ),
        episode_ids=tuple(range(len(success))),
    )


def _metrics(rng, iteration, iterations, start, rates, algo) -> dict:
    progress = 1 - math.exp(-3 * iteration / iterations)
    train, test = (a + (b - a) * progress for a, b in zip(start, rates, strict=True))
    rollout = float(np.clip(train - 0.1 + 0.06 * rng.standard_normal(), 0, 1))
    times = {"rollout": 1.2, "reference": 0.1 * (algo == "road"), "update": 2.0, "evaluation": 0.0}
    row = {"iteration": iteration, "env_steps": iteration * 1536}
    if iteration % 8 == 0 or iteration == iterations:
        times["evaluation"] = 3.0
        for split, rate in (("train", train), ("test", test)):
            measured = float(rng.binomial(128, rate)) / 128
            row[f"eval/{split}/success_rate"] = measured
            row[f"eval/{split}/episodes"] = 128
    if iteration == 0:
        return row
    row |= {
        "rollout/success_rate": rollout,
        "policy/entropy": 2.2 - 0.8 * progress + 0.03 * rng.standard_normal(),
        "policy/kl": 0.01 + 0.004 * abs(rng.standard_normal()),
        "critic/explained_variance": 0.2 + 0.6 * progress + 0.05 * rng.standard_normal(),
        **{f"time/{phase}": seconds for phase, seconds in times.items()},
        "time/iteration": sum(times.values()) + 0.2,
    }
    if algo == "road":
        row |= {
            "guidance/weight_mean": 0.02 * rng.standard_normal(),
            "guidance/agreement": 0.7 + 0.1 * progress + 0.02 * rng.standard_normal(),
            "guidance/time_step_share": 0.4 + 0.02 * rng.standard_normal(),
        }
    else:
        row["guidance/weight_mean"] = None
    return row
