"""Compares whole folders of recorded episodes, in several processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch

from roadvla.envs.maniskill.assets import asset_folders
from roadvla.envs.maniskill.episodes import total
from roadvla.envs.maniskill.frames import Frames
from roadvla.envs.maniskill.golden import Comparison, Recording
from roadvla.envs.maniskill.settings import variant
from roadvla.errors import UserError

_EPISODE_ARRAYS = (
    "spawn",
    "settled",
    "teleport",
    "obj_rec_half_sizes",
    "qpos",
    "ee_world",
    "ee_target_base",
    "body_poses",
    "flags",
    "dists",
    "images",
    "seg",
)

Job = tuple[dict[str, Any], dict[str, np.ndarray], list[int]]
"""Facts of an episode, its numbers, and the steps at which pictures were stored."""


def compare(
    recording: Recording,
    *,
    env_ids: Iterable[str] = (),
    every: int = 1,
    pictures: bool = True,
    stand_ins: bool = False,
    processes: int | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Comparison:
    """Play recorded episodes and grasps, and compose the overlay cases.

    Bodies are all built, and built anew for every episode, as when the recording was made: PhysX
    orders contacts by what there is, and what rolls shows it.

    Args:
        recording: From ``read_recording``.
        env_ids: Compare these ids of RL4VLA's only; all unless given.
        every: Play every n-th episode and every n-th grasp.
        pictures: Whether there is something to draw with; without, what needs pictures is left out.
        stand_ins: Whether plain shapes may replace missing meshes.
        processes: How many; one per core unless given.
        progress: Told how many episodes have been played, of how many.

    Raises:
        UserError: If the folder holds no such episodes or lacks some of their numbers.
    """
    wanted = set(env_ids)
    try:
        groups = _groups(recording, wanted, every)
        result = Comparison()
        _totals(recording, wanted, result)
        _composites(recording, wanted, result)
    except (KeyError, IndexError, TypeError) as error:
        raise UserError(f"the recorded episodes are not in the known layout: {error!r}") from error
    count = sum(len(group) for group in groups)
    if not count:
        entries = [*recording.facts["episodes"], *recording.facts.get("grasps", [])]
        known = ", ".join(sorted({entry["env_id"] for entry in entries})) or "none at all"
        raise UserError(f"no recorded episode of {sorted(wanted) or 'any id'}: there are {known}")
    done = 0
    workers = min(processes or len(os.sched_getaffinity(0)), len(groups))
    defaults = _defaults(recording, wanted, every) if pictures else []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(_play, group, pictures, stand_ins): len(group) for group in groups}
        if defaults:
            running[pool.submit(_draw, defaults, stand_ins)] = 0
        try:
            for future in as_completed(running):
                result.merge(future.result())
                done += running[future]
                progress(done, count)
        except (KeyError, IndexError, ValueError, BrokenProcessPool) as error:
            pool.shutdown(cancel_futures=True)
            raise UserError(f"an episode could not be compared: {error!r}") from error
    return result


def _groups(recording: Recording, wanted: set[str], every: int) -> list[list[Job]]:
    """Sort jobs by id, the longest first."""
    groups: dict[str, list[Job]] = {}
    facts, arrays = recording.facts, recording.arrays
    for entry in _chosen(facts["episodes"], wanted, every):
        rows = {name: arrays[name][entry["index"]] for name in _EPISODE_ARRAYS}
        job = (entry, {**rows, "actions": arrays["actions"]}, facts["image_steps"])
        groups.setdefault(entry["env_id"], []).append(job)
    for entry in _chosen(facts.get("grasps", []), wanted, every):
        prefix = f"grasp_{entry['k']}_"
        rows = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
        groups.setdefault(entry["env_id"], []).append((entry, rows, entry["image_steps"]))
    return sorted(groups.values(), key=len, reverse=True)


def _chosen(entries: list[dict[str, Any]], wanted: set[str], every: int) -> list[dict[str, Any]]:
    return [entry for entry in entries if not wanted or entry["env_id"] in wanted][::every]


def _play(jobs: list[Job], pictures: bool, stand_ins: bool) -> Comparison:
    """Play the episodes of one id, in a process of its own."""
    torch.set_num_threads(1)
    from roadvla.envs.maniskill.golden_play import Play
    from roadvla.envs.maniskill.scene import PutOnPlateScene

    result = Comparison()
    scene = PutOnPlateScene(
        setting=jobs[0][0]["env_id"],
        build="all",
        shader="lambert" if pictures else None,
        stand_ins=stand_ins,
    )
    for entry, arrays, steps in jobs:
        Play(scene, entry, arrays, steps, result, pictures=pictures).run()
    scene.close()
    return result


def _defaults(recording: Recording, wanted: set[str], every: int) -> list[Job]:
    """First frames that were also recorded with SAPIEN's default shader."""
    facts, arrays = recording.facts, recording.arrays
    by_index = {entry["index"]: entry for entry in facts["episodes"]}
    jobs = [
        (by_index[int(index)], {"image": arrays["default_shader_images"][row]}, [0])
        for row, index in enumerate(arrays.get("default_shader_index", ()))
        if int(index) in by_index
    ]
    return [job for job in jobs if not wanted or job[0]["env_id"] in wanted][::every]


def _draw(jobs: list[Job], stand_ins: bool) -> Comparison:
    """Draw first frames with our own shader, beside what SAPIEN's default made of them."""
    torch.set_num_threads(1)
    from roadvla.envs.maniskill.golden_play import blocks
    from roadvla.envs.maniskill.scene import PutOnPlateScene

    result = Comparison()
    for entry, arrays, _ in jobs:
        scene = PutOnPlateScene(
            setting=entry["env_id"], build="all", obs_mode="none", stand_ins=stand_ins
        )
        ids = torch.tensor([entry["episode_id"]], dtype=torch.int64)
        options = {"obj_set": entry["obj_set"], "episode_id": ids, "reconfigure": True}
        scene.reset(seed=0, options=options)
        off = np.abs(blocks(scene.capture()[0].numpy()) - arrays["image"])
        where = f"{entry['env_id']} {entry['obj_set']} {entry['episode_id']}"
        result.row("one_pass beside default, mean", 1.5, "of 255").add(off.mean(), where)
        result.row("one_pass beside default, block", 60.0, "of 255").add(off.max(), where)
        scene.close()
    return result


def _totals(recording: Recording, wanted: set[str], result: Comparison) -> None:
    for env_id, sets in recording.facts.get("totals", {}).items():
        for name, count in sets.items() if not wanted or env_id in wanted else ():
            result.same("totals", total(variant(env_id), name), count, f"{env_id} {name}")


def _composites(recording: Recording, wanted: set[str], result: Comparison) -> None:
    """Overlay arithmetic on recorded renders, without a renderer."""
    for case in recording.facts.get("composites", ()):
        if wanted and case["env_id"] not in wanted:
            continue
        arrays, k = recording.arrays, case["k"]
        mask = np.unpackbits(arrays[f"composite_{k}_mask"], axis=1).astype(np.int64)
        row = variant(case["env_id"])
        frames = Frames(row, asset_folders(), mask.shape, torch.device("cpu"))
        texture = case["texture_index"] or 0
        frames.choose(torch.tensor([case["table_index"]]), torch.tensor([texture]))
        out = frames.compose(
            torch.from_numpy(arrays[f"composite_{k}_rgb"])[None],
            torch.from_numpy(mask)[None],
            torch.tensor([False, True]),
        )
        off = out[0, ::2, ::2].int().numpy() - arrays[f"composite_{k}_out"].astype(np.int32)
        result.row("overlay arithmetic", 1.0, "of 255").add(off, f"composite {k}")
