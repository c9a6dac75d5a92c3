"""Whether and where a run goes on: chosen by the first of its processes, for all of them.

Processes on several machines may see a shared disk at different moments. Were each to choose for
itself, they could go on from different checkpoints.
"""

from __future__ import annotations

from pathlib import Path

import torch

from roadvla.errors import UserError, WorkerError
from roadvla.train.checkpoint import checkpoint_folder, good_checkpoint
from roadvla.train.launched import launch_id, was_restarted
from roadvla.train.manifest import seal
from roadvla.train.run_folder import is_begun
from roadvla.world import World

_NONE, _UNREADABLE = -1, -1


def agreed_start(
    folder: Path, world: World, *, resume: bool, if_begun: bool, force: bool
) -> tuple[bool, bool]:
    """Decide whether to go on with the run in a folder, and whether it may be replaced.

    Processes that are started again get the arguments of the first time. So a run that this very
    launch began is gone on with, and never replaced. A launch without a name is known by having
    been restarted, which on several machines not every process may know.

    Args:
        folder: Of the run.
        world: The processes.
        resume: What was asked for.
        if_begun: The same, if there is a run.
        force: Replace a run that is there.

    Returns:
        Whether to go on, and whether to replace.

    Raises:
        LostContactError: If another process does not take part.
    """
    launch, restarted = launch_id(), world.any(was_restarted())
    ours = is_begun(folder, launch) if launch is not None else restarted and is_begun(folder)
    resume = is_begun(folder) if if_begun else resume or ours
    return bool(world.follow(int(resume))), bool(world.follow(int(force and not ours)))


def agreed_checkpoint(root: Path, world: World) -> tuple[Path | None, str]:
    """Let the first process find the newest good checkpoint, and make sure all others see it.

    Only the first reads every file. The others compare names, sizes and recorded checksums here,
    and what they load with those checksums later.

    Args:
        root: The run's ``checkpoints`` folder.
        world: The processes of the run.

    Returns:
        The checkpoint, ``None`` if the run has none yet; and, in the first process, why newer ones
        were passed over, if any were.

    Raises:
        UserError: In the first process, if there are checkpoints and none is good.
        WorkerError: In every process, if one does not see the checkpoint as the first does.
        LostContactError: If another process does not take part.
    """
    found, passed_over, number = None, "", _NONE
    if world.is_first:
        found, passed_over = good_checkpoint(root)
        number = _NONE if found is None else int(found.name.rpartition("_")[2])
    if world.size == 1:
        return found, passed_over
    number = world.follow(number)
    if number == _NONE:
        return None, ""
    folder = checkpoint_folder(root, number)
    reason = ""
    try:
        mine = seal(folder)
    except UserError as error:
        mine, reason = _UNREADABLE, f" ({error})"
    seals = world.gather(torch.tensor([mine])).tolist()
    blind = [rank for rank, one in enumerate(seals) if one == _UNREADABLE or one != seals[0]]
    if blind:
        who = ", ".join(map(str, blind))
        raise WorkerError(
            f"process {who} of {world.size} does not see {folder} as it is, from which process 0 "
            f"would go on{reason}: the output folder must be on a disk that all processes see"
        )
    return folder, passed_over
