"""Demonstrations on disk: one safetensors file, no pickle.

Tensors, S steps of E episodes:

    image          uint8    [S, H, W, 3]   frame before the action
    action         float32  [S, 7]         metres, radians, gripper in [0, 1] (1 opens)
    episode_index  int64    [S]            0 to E − 1, ascending
    step_index     int64    [S]            0, 1, … within each episode

The header's metadata holds ``demonstrations``, a JSON object: ``format`` (1), ``instructions`` (one
per episode), ``origin`` (environment, split, expert settings: for people).
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from roadvla.errors import UserError
from roadvla.policy.base import Policy
from roadvla.types import Batch, Observation

FORMAT = 1
_KEY = "demonstrations"
_TENSORS = {
    "image": (torch.uint8, 4),
    "action": (torch.float32, 2),
    "episode_index": (torch.int64, 1),
    "step_index": (torch.int64, 1),
}
_AGAIN = "make it again with `roadvla warmup`"


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
        prompts = policy.tokenize(self.instructions)
        device = prompts.device
        observation = Observation(
            image=self.image[index].to(device),
            prompt=prompts[self.episode_index[index].to(device)],
        )
        return observation, tokens.to(device)

    def sample(self, policy: Policy, count: int, generator: torch.Generator) -> Batch:
        """Draw steps with replacement, as a batch for supervised fine-tuning."""
        index = torch.randint(
            len(self.action), (count,), generator=generator, device=generator.device
        )
        observation, tokens = self.select(policy, index)
        zero = torch.zeros(count, device=tokens.device)
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
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another folder"
        ) from error


def load_demonstrations(path: Path) -> Demonstrations:
    """Read a file of demonstrations, refusing one that is damaged.

    Raises:
        UserError: If it is missing, damaged, or its parts do not fit together.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise UserError(f"no demonstrations at {path}: {_AGAIN}, or check the path") from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged ({error}): {_AGAIN}") from error
    try:
        about = json.loads(metadata[_KEY])
        instructions = tuple(str(text) for text in about["instructions"])
        found, origin = about["format"], dict(about["origin"])
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not a file of demonstrations: {_AGAIN}") from error
    if found != FORMAT:
        raise UserError(f"{path} has format {found!r}, expected {FORMAT}: {_AGAIN}")
    _check(path, tensors, len(instructions))
    return Demonstrations(
        image=tensors["image"],
        action=tensors["action"],
        episode_index=tensors["episode_index"],
        step_index=tensors["step_index"],
        instructions=instructions,
        origin=origin,
    )


def _check(path: Path, tensors: dict[str, Tensor], episodes: int) -> None:
    for name, (dtype, dimensions) in _TENSORS.items():
        tensor = tensors.get(name)
        if tensor is None or tensor.dtype != dtype or tensor.dim() != dimensions:
            raise UserError(f"{path}: {name} is missing or not {dtype} {dimensions}-D: {_AGAIN}")
    if len({len(tensor) for tensor in tensors.values()}) != 1 or not len(tensors["action"]):
        raise UserError(f"{path}: its tensors have different numbers of steps, or none: {_AGAIN}")
    action, index = tensors["action"], tensors["episode_index"]
    if action.shape[1] != 7 or not bool(torch.isfinite(action).all()):
        raise UserError(f"{path}: actions are not 7 finite numbers each: {_AGAIN}")
    if int(index.min()) < 0 or int(index.max()) >= episodes:
        raise UserError(f"{path}: a step belongs to none of the {episodes} episodes: {_AGAIN}")
