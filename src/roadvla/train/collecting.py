"""Collecting demonstrations: batch by batch, each a file, so that it can be interrupted.

What a batch contains follows from the settings and its number alone: its episodes are numbered,
and the expert's randomness is seeded with both. So a collection that was interrupted and gone on
with has the same files, byte for byte, as one that was not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from roadvla import envs
from roadvla.envs.base import VectorEnv
from roadvla.errors import UserError
from roadvla.evaluation.machine import usable_device
from roadvla.evaluation.stats import wilson
from roadvla.train.collection import (
    Collection,
    Part,
    Record,
    check_same,
    checksum,
    note_simulator,
    read_record,
    settings_of,
)
from roadvla.train.demonstrations import PART, Demonstrations, save_demonstrations
from roadvla.train.experts import Expert, expert_of
from roadvla.train.interrupt import raise_queue_signals
from roadvla.train.lock import locked
from roadvla.train.memory import within_memory
from roadvla.train.progress import Display
from roadvla.train.run_folder import about, check_claimable
from roadvla.train.trajectories import Trajectory, act_out

_FIRST_ID = 1_000_000_000_000
"""Beyond the episodes of evaluations, warm-ups and training runs."""
_EPISODES_PER_SEED = 1_000_000


def collect(
    settings: Collection,
    *,
    act: Expert | None = None,
    make_env: Callable[..., VectorEnv] = envs.make_env,
) -> Path:
    """Let the expert act until there are enough successful episodes; go on where that stopped.

    Args:
        settings: What to collect.
        act: The expert; the simulator's unless given.
        make_env: Environments, as ``roadvla.envs.make_env``.

    Returns:
        The folder. A part in it that is missing or damaged has been made again.

    Raises:
        UserError: If the folder holds something else, is in use or cannot be written, or the expert
            fails too often.
        Preempted: After SIGTERM or SIGUSR1; finished parts are kept.
    """
    folder = Path(settings.output)
    usable_device(settings.device)
    check_claimable(folder, force=False)
    with raise_queue_signals(), locked(folder):
        return _collect(settings, folder, act, make_env)


def _collect(
    settings: Collection,
    folder: Path,
    act: Expert | None,
    make_env: Callable[..., VectorEnv],
) -> Path:
    """Go on with a folder that no other process writes into."""
    record = _begin(settings, folder)
    act = act or expert_of(settings.sim, settings.noise)
    half = settings.num_envs // 2
    env: VectorEnv | None = None
    with Display("collecting", settings.episodes, done=record.kept) as display:
        if record.parts:
            state = "finished" if record.finished else "unfinished"
            display.say(f"{folder} is {state}: {record.kept} of {settings.episodes} are there")
        try:
            for number in _missing(record, settings, folder):
                with within_memory(
                    "collecting",
                    f"num_envs {settings.num_envs}",
                    [f"--num-envs {half} with another --output"] if half else [],
                ):
                    if env is None:
                        env = _make(settings, make_env)
                        note_simulator(record, env, folder)
                    before = record.kept
                    _run(env, number, settings, act, record, folder)
                rate = record.succeeded / record.attempts
                display.advance({"rollout/success_rate": rate}, steps=record.kept - before)
        finally:
            if env is not None:
                envs.close(env)
    if record.finished is None:
        record.finished = datetime.now(UTC).isoformat(timespec="seconds")
        record.write(folder)
    return folder


def describe(record: Record) -> list[str]:
    """Say in lines what a collection has and how often the expert succeeded."""
    asked, kept = record.settings, record.kept
    state = "finished" if record.finished else "unfinished"
    low, high = asked["gain"]
    small = ", small motions left out" if asked["drop_small"] else ""
    lines = [
        f"{asked['env']} {asked['split']} on {asked['sim']}, seed {asked['seed']}: "
        f"{kept} of {asked['episodes']} demonstrations, {state}",
        f"  expert      gain {low:g} to {high:g}, noise {asked['noise']:g}, tail {asked['tail']}"
        f"{small}",
    ]
    if record.attempts:
        rate = record.succeeded / record.attempts
        low, high = wilson(record.succeeded, record.attempts)
        lines.append(
            f"  success     {100 * rate:.1f} % ({100 * low:.1f} to {100 * high:.1f}): "
            f"{record.succeeded} of {record.attempts} attempts"
        )
    if kept:
        height, width, _ = record.image_shape
        files = [part for part in record.parts if part.file is not None]
        megabytes = sum(part.size for part in files) / 1e6
        lines += [
            f"  frames      {record.frames} of {height} x {width}, {record.frames / kept:.1f} "
            f"per demonstration",
            f"  on disk     {megabytes:.1f} MB in {len(files)} parts",
        ]
    lines.append(f"  made on     {record.about['machine']}, {record.about['started']}")
    if stand_ins := record.simulator.get("stand_in_files"):
        lines.append(f"  stand-ins   plain shapes in place of {len(stand_ins)} of the assets")
    return lines


def _begin(settings: Collection, folder: Path) -> Record:
    """Find the collection to go on with, or begin one, before anything is simulated."""
    record = read_record(folder)
    if record is not None:
        check_same(record, settings, folder)
        return record
    if any(folder.glob("part-*.safetensors")):
        raise UserError(
            f"{folder} holds parts of a collection whose record is missing: choose another --output"
        )
    record = Record(settings=settings_of(settings), about=about(settings.device))
    record.write(folder)
    return record


def _missing(record: Record, settings: Collection, folder: Path) -> Iterator[int]:
    """Number the batches to run: those whose files are damaged, then as many as are needed."""
    for number, part in enumerate(record.parts):
        if not part.intact(folder):
            yield number
    while record.kept < settings.episodes:
        if record.attempts >= 4 * settings.episodes + settings.num_envs:
            raise UserError(
                f"the expert solved only {record.succeeded} of {record.attempts} episodes of "
                f"{settings.env}: lower noise {settings.noise:g} or raise gain {settings.gain}, "
                f"with another --output"
            )
        yield len(record.parts)


def _make(settings: Collection, make_env: Callable[..., VectorEnv]) -> VectorEnv:
    return make_env(
        settings.env,
        split=settings.split,
        num_envs=settings.num_envs,
        sim=settings.sim,
        device=settings.device,
        maniskill=settings.maniskill,
    )


def _run(
    env: VectorEnv,
    number: int,
    settings: Collection,
    act: Expert,
    record: Record,
    folder: Path,
) -> None:
    """Run one batch, write its file, then its entry in the record."""
    count, (low, high) = settings.num_envs, settings.gain
    first = _FIRST_ID + _EPISODES_PER_SEED * settings.seed + number * count
    ids = torch.arange(first, first + count, device=env.device)
    generator = torch.Generator(env.device).manual_seed(_seed(settings.seed, number))
    gain = low + (high - low) * torch.rand(count, generator=generator, device=env.device)
    succeeded, found = act_out(
        env,
        ids,
        act,
        gain,
        generator,
        tail=settings.tail,
        drop_small=settings.drop_small,
    )
    others = sum(len(part.kept) for part in record.parts[:number])
    found = found[: settings.episodes - others]
    path = folder / PART.format(number)
    if found:
        save_demonstrations(_joined(found, record), path)
    part = Part(
        file=path.name if found else None,
        sha256=checksum(path) if found else "",
        size=path.stat().st_size if found else 0,
        first_id=first,
        attempts=count,
        succeeded=succeeded,
        kept=[trajectory.episode_id for trajectory in found],
        frames=sum(len(trajectory.action) for trajectory in found),
    )
    record.parts[number : number + 1] = [part]
    record.write(folder)


def _joined(trajectories: list[Trajectory], record: Record) -> Demonstrations:
    """Put trajectories one after the other; nothing in them says when or where they were made."""
    lengths = [len(trajectory.action) for trajectory in trajectories]
    unneeded = ("output", "episodes", "device", "maniskill")
    return Demonstrations(
        image=torch.cat([trajectory.image for trajectory in trajectories]),
        action=torch.cat([trajectory.action for trajectory in trajectories]),
        episode_index=torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)),
        step_index=torch.cat([torch.arange(length) for length in lengths]),
        instructions=tuple(trajectory.instruction for trajectory in trajectories),
        origin={
            **{name: value for name, value in record.settings.items() if name not in unneeded},
            "simulator": record.simulator,
        },
    )


def _seed(seed: int, number: int) -> int:
    """Mix a collection's seed and a batch's number, so that no two batches share their noise."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0] >> 1)
