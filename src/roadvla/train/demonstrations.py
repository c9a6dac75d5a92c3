"""Demonstrations on disk: safetensors files, no pickle.

A folder of a collection holds one file per batch of episodes, ``part-000000.safetensors``, …, and
``collection.json``. Tensors of a file, S steps of E episodes:

    image          uint8    [S, H, W, 3]   frame before the action
    action         float32  [S, 7]         metres, radians, gripper in [0, 1] (1 opens)
    episode_index  int64    [S]            0 to E − 1, ascending
    step_index     int64    [S]            0, 1, … within each episode

The header's metadata holds ``demonstrations``, a JSON object: ``format`` (1), ``instructions`` (one
per episode), ``origin`` (environment, split, expert settings: for people).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from roadvla.errors import UserError
from roadvla.files import MAX_TENSORS, check_plain, parse_json, read_json, write_whole
from roadvla.policy.base import Policy
from roadvla.train.run_folder import DEMONSTRATIONS
from roadvla.types import Batch, Observation
from roadvla.world import World

FORMAT = 1
PART = "part-{:06d}.safetensors"
COLLECTION = "collection.json"
_KEY = "demonstrations"
_TENSORS = {
    "image": (torch.uint8, 4),
    "action": (torch.float32, 2),
    "episode_index": (torch.int64, 1),
    "step_index": (torch.int64, 1),
}
_PARTS = "part-*.safetensors"


@dataclass(frozen=True)
class Demonstrations:
    """Steps of successful episodes, one after the other.

    Attributes:
        image: Frame before the action.
        action: Metres, radians, gripper in [0, 1] (1 opens).
        episode_index: Which of the E episodes a step belongs to.
        step_index: Its place in the episode.
        instructions: What each episode asked for.
        origin: Where they come from, for people.
    """

    image: UInt8[Tensor, "S H W 3"]
    action: Float[Tensor, "S 7"]
    episode_index: Int[Tensor, " S"]
    step_index: Int[Tensor, " S"]
    instructions: tuple[str, ...]
    origin: dict[str, Any]

    def select(
        self, policy: Policy, index: Int[Tensor, " n"]
    ) -> tuple[Observation, Int[Tensor, "n K"]]:
        """Turn some steps into what the policy sees and should have done, on the index's device."""
        index = index.cpu()
        tokens = policy.encode(self.action[index])
        # Episodes by the thousand share a few instructions. All are tokenized, so that prompts have
        # one width in every batch.
        row = {text: number for number, text in enumerate(dict.fromkeys(self.instructions))}
        prompts = policy.tokenize(list(row))
        device = prompts.device
        asked = [row[self.instructions[episode]] for episode in self.episode_index[index].tolist()]
        observation = Observation(
            image=self.image[index].to(device),
            prompt=prompts[torch.tensor(asked, device=device)],
        )
        return observation, tokens.to(device)

    def sample(
        self,
        policy: Policy,
        count: int,
        generator: torch.Generator,
        world: World | None = None,
    ) -> Batch:
        """Draw steps with replacement, as a batch for supervised fine-tuning.

        Args:
            policy: Encodes the actions.
            count: Steps that all processes draw together.
            generator: Source, the same in every process.
            world: The processes; each gets its rows. This one alone unless given.
        """
        rows = (world or World()).rows(count)
        index = torch.randint(
            len(self.action), (count,), generator=generator, device=generator.device
        )
        observation, tokens = self.select(policy, index[rows])
        zero = torch.zeros(len(tokens), device=tokens.device)
        return Batch(
            observation=observation,
            action_tokens=tokens,
            old_log_probs=torch.zeros(tokens.shape, device=tokens.device),
            old_value=zero,
            advantage=zero,
            returns=zero,
            weight=zero,
        )


def save_demonstrations(demonstrations: Demonstrations, path: Path) -> None:
    """Write the file described above; it appears whole or not at all.

    Raises:
        UserError: If it cannot be written.
    """
    about = {
        "format": FORMAT,
        "instructions": list(demonstrations.instructions),
        "origin": demonstrations.origin,
    }
    tensors = {name: getattr(demonstrations, name).cpu().contiguous() for name in _TENSORS}
    data = save(tensors, metadata={_KEY: json.dumps(about)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another folder"
        ) from error


def load_demonstrations(path: Path) -> Demonstrations:
    """Read demonstrations, refusing those that are damaged.

    Args:
        path: A file, or a folder: a warm-up's, or a collection's, whose parts are joined.

    Raises:
        UserError: If there are none, a collection is unfinished, a file is damaged, its parts do
            not fit together, or parts of a collection do not fit each other.
    """
    files = demonstration_files(path)
    return _load_file(files[0]) if len(files) == 1 else _join(files)


def check_frames(demonstrations: Demonstrations, side: int | None, path: Path) -> None:
    """Refuse demonstrations whose frames are not what the policy sees.

    Args:
        demonstrations: Whose frames.
        side: Height and width that the policy sees; ``None`` if it takes any.
        path: Where they come from.

    Raises:
        UserError: If they are of another size.
    """
    size = tuple(demonstrations.image.shape[1:3])
    if side is not None and size != (side, side):
        raise UserError(
            f"{path} has frames of {size[0]} by {size[1]}, the policy sees {side} by {side}: "
            f"collect demonstrations of that size"
        )


def demonstration_files(path: Path) -> list[Path]:
    """Name the files that ``load_demonstrations`` reads, in order.

    Raises:
        UserError: If a folder holds none, or a collection that is unfinished.
    """
    if not path.is_dir():
        return [path]
    if (path / DEMONSTRATIONS).exists():
        return [path / DEMONSTRATIONS]
    files = sorted(path.glob(_PARTS))
    if not files:
        raise UserError(
            f"no demonstrations at {path}: collect some with `roadvla demos collect`, or check the "
            f"path"
        )
    _check_finished(path)
    return files


def _check_finished(folder: Path) -> None:
    """Refuse a collection that was interrupted; parts from elsewhere come without a record."""
    path = folder / COLLECTION
    try:
        finished = read_json(path)["finished"]
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): {_again(path)}") from error
    if not finished:
        raise UserError(
            f"the collection {folder} is unfinished: go on with the same `roadvla demos collect`"
        )


def _again(path: Path) -> str:
    """Say how to mend a file."""
    if path.match(_PARTS):
        return "the same `roadvla demos collect` makes this part again"
    if path.name == COLLECTION:
        return "make it again with `roadvla demos collect`"
    return "make it again with `roadvla warmup`"


def _load_file(path: Path) -> Demonstrations:
    try:
        check_plain(path, limit=MAX_TENSORS)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            held = set(file.keys())
            tensors = {name: file.get_tensor(name) for name in _TENSORS if name in held}
    except FileNotFoundError as error:
        raise UserError(
            f"no demonstrations at {path}: make some with `roadvla demos collect` or `roadvla "
            f"warmup`, or check the path"
        ) from error
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path} is damaged ({error}): {_again(path)}") from error
    if held - set(_TENSORS):
        raise UserError(
            f"{path} holds {min(held - set(_TENSORS))!r:.40}, which demonstrations do not have: "
            f"{_again(path)}"
        )
    try:
        about = parse_json(metadata[_KEY])
        instructions = tuple(str(text) for text in about["instructions"])
        found, origin = about["format"], dict(about["origin"])
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not a file of demonstrations: {_again(path)}") from error
    if found != FORMAT:
        raise UserError(f"{path} has format {found!r}, expected {FORMAT}: {_again(path)}")
    _check(path, tensors, len(instructions))
    return Demonstrations(
        image=tensors["image"],
        action=tensors["action"],
        episode_index=tensors["episode_index"],
        step_index=tensors["step_index"],
        instructions=instructions,
        origin=origin,
    )


def _join(files: list[Path]) -> Demonstrations:
    """Put parts one after the other, their frames straight into place: there may be many."""
    first = _load_file(files[0])
    steps = [_count_steps(file) for file in files]
    shape = tuple(first.image.shape[1:])
    image = torch.empty((sum(steps), *shape), dtype=torch.uint8)
    actions: list[Tensor] = []
    episodes: list[Tensor] = []
    places: list[Tensor] = []
    instructions: list[str] = []
    start = 0
    for file, count in zip(files, steps, strict=True):
        part = first if file == files[0] else _load_file(file)
        if tuple(part.image.shape[1:]) != shape or part.origin != first.origin:
            raise UserError(
                f"{file} was made with other settings than {files[0].name}: keep collections apart"
            )
        image[start : start + count] = part.image
        actions.append(part.action)
        episodes.append(part.episode_index + len(instructions))
        places.append(part.step_index)
        instructions += part.instructions
        start += count
    return Demonstrations(
        image=image,
        action=torch.cat(actions),
        episode_index=torch.cat(episodes),
        step_index=torch.cat(places),
        instructions=tuple(instructions),
        origin=first.origin,
    )


def _count_steps(path: Path) -> int:
    """Read how many steps a file has, without them."""
    try:
        check_plain(path, limit=MAX_TENSORS)
        with safe_open(path, framework="pt") as file:
            return int(file.get_slice("action").get_shape()[0])
    except (OSError, ValueError, SafetensorError, IndexError) as error:
        raise UserError(f"{path} is damaged ({error}): {_again(path)}") from error


def _check(path: Path, tensors: dict[str, Tensor], episodes: int) -> None:
    for name, (dtype, dimensions) in _TENSORS.items():
        tensor = tensors.get(name)
        if tensor is None or tensor.dtype != dtype or tensor.dim() != dimensions:
            raise UserError(
                f"{path}: {name} is missing or not {dtype} {dimensions}-D: {_again(path)}"
            )
    if len({len(tensor) for tensor in tensors.values()}) != 1 or not len(tensors["action"]):
        raise UserError(
            f"{path}: its tensors have different numbers of steps, or none: {_again(path)}"
        )
    image = tensors["image"]
    if image.shape[-1] != 3 or not image.numel():
        raise UserError(f"{path}: its frames are {tuple(image.shape[1:])}: {_again(path)}")
    action, index = tensors["action"], tensors["episode_index"]
    if action.shape[1] != 7 or not bool(torch.isfinite(action).all()):
        raise UserError(f"{path}: actions are not 7 finite numbers each: {_again(path)}")
    if int(index.min()) < 0 or int(index.max()) >= episodes:
        raise UserError(
            f"{path}: a step belongs to none of the {episodes} episodes: {_again(path)}"
        )
