"""Pretraining data of the tiny VLA: random tabletop states, a primitive prompt, the right action.

The states are drawn independently of each other, so there are no trajectories, no rewards and no
demonstration of the suite's task: the prompts ask to reach, pick or touch named things. Three
batches in 13 add a hint, true of the state, of the kinds that text-guided teachers are given, so
that hints can be read at all. In part of them the frame shows nothing: the hint is all there is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from roadvla.envs.base import Snapshot
from roadvla.envs.suite import Distribution
from roadvla.envs.tabletop.dynamics import (
    MAX_ROTATION,
    MAX_TRANSLATION,
    State,
    initial_state,
    yaw_error,
)
from roadvla.envs.tabletop.noise import uniform
from roadvla.envs.tabletop.render import Frame, Renderer, quantize
from roadvla.envs.tabletop.scene import COLOURS, ELONGATED, NUM_TABLES, SHAPES, Scene, sample_scene
from roadvla.envs.tabletop.shifts import crop_overlays
from roadvla.envs.tabletop.textures import overlays
from roadvla.privileged.hints import join
from roadvla.privileged.plan import plan_hints
from roadvla.privileged.relspatial import relspatial_hints
from roadvla.privileged.verbalise import action_hints

_STREAM = 9000
_OVERLAY_SEED = 70  # not the suite's: its overlays stay unseen
_APPROACH = 0.10
_HOVER = 0.09
_LIMITS = (MAX_TRANSLATION,) * 3 + (MAX_ROTATION,) * 3
_GAIN = 0.7
_BLANK = 0.3  # share of a hinted batch whose frames show nothing
_HINT_NOISE = 0.15  # of a hinted action, in fractions of its limits

_GRAY = 128

HINTS = ("relspatial", "plan", "action")
CYCLE = 13
"""Batches after which the kinds of hints repeat; no factor of the distributions' cycle of 16."""
HINTED: dict[int, str] = dict(zip((4, 8, 12), HINTS, strict=True))
"""Which of ``CYCLE`` batches have hints."""

# Which things may stand beside the named ones; any colour and shape is allowed.
_DISTRIBUTIONS = tuple(
    Distribution(
        unseen_objects=unseen,
        unseen_receptacles=other,
        distractor_objects=objects,
        distractor_receptacles=receptacles,
        shifted_pose=True,
    )
    for unseen in (False, True)
    for other in (False, True)
    for objects, receptacles in ((0, 0), (1, 0), (0, 1), (1, 1))
)


@dataclass(frozen=True)
class Primitives:
    """A batch of states with prompts and labels.

    Attributes:
        image: Frames.
        prompts: One per frame.
        action: The action that carries the prompt out: metres, radians, gripper in [0, 1].
        geometry: Tip to object (3) and to receptacle (2) in decimetres; whether the object is held;
            sine and cosine of twice the yaw error, of twice the object's yaw and of the gripper's.
        named: Which of these prompt and frame decide: nothing about what is not named, no yaw of
            what looks the same from all sides.
        pixel: Row and column of the object and of the receptacle.
    """

    image: UInt8[Tensor, "B H W 3"]
    prompts: list[str]
    action: Float[Tensor, "B 7"]
    geometry: Float[Tensor, "B 12"]
    named: Bool[Tensor, "B 12"]
    pixel: Float[Tensor, "B 2 2"]


class PrimitiveSampler:
    """Draws batches of primitives; batch ``index`` is the same on every call.

    Args:
        batch: States per batch.
        device: Where they live.
    """

    def __init__(self, batch: int, device: torch.device) -> None:
        self.batch = batch
        self.device = device
        self._renderer = Renderer(device)
        self._overlays = overlays(_OVERLAY_SEED).to(device)

    def sample(self, index: int) -> Primitives:
        """Draw one batch; of every 13 one has hints of each kind."""
        batch, scene, state = self._plain(index)
        kind = HINTED.get(index % CYCLE)
        return batch if kind is None else self._hinted(batch, scene, state, kind, index)

    def hinted(self, index: int, kind: str) -> tuple[Primitives, Primitives]:
        """Draw one batch without hints, and the same with them; nothing is blanked.

        Args:
            index: Of the batch.
            kind: One of ``HINTS``.
        """
        batch, scene, state = self._plain(index)
        hints = self._hints(batch, scene, state, kind, index)
        prompts = [join(p, hint) for p, hint in zip(batch.prompts, hints, strict=True)]
        return batch, replace(batch, prompts=prompts)

    def _hinted(
        self, batch: Primitives, scene: Scene, state: State, kind: str, index: int
    ) -> Primitives:
        """Add the hints; where the frame is covered, nothing in it can be asked for."""
        hints = self._hints(batch, scene, state, kind, index)
        blank = uniform(self._ids(index), _STREAM + 3, 1)[:, 0] < _BLANK
        return replace(
            batch,
            prompts=[join(p, hint) for p, hint in zip(batch.prompts, hints, strict=True)],
            image=torch.where(blank[:, None, None, None], _GRAY, batch.image),
            named=batch.named & ~blank[:, None],
        )

    def _hints(
        self, batch: Primitives, scene: Scene, state: State, kind: str, index: int
    ) -> list[str]:
        if kind == "action":
            u = uniform(self._ids(index), _STREAM + 4, 7)
            limits = batch.action.new_tensor(_LIMITS)
            noise = (u[:, :6] - 0.5) * 2 * _HINT_NOISE * limits
            action = torch.cat([batch.action[:, :6] + noise, batch.action[:, 6:]], 1)
            return action_hints(action, u[:, 6] * 1.2)
        snapshot = Snapshot(
            tip=state.gripper[:, :3],
            objects=state.object_position,
            receptacles=torch.nn.functional.pad(scene.receptacle_xy, (0, 1)),
            held=state.held,
            is_open=state.is_open,
            usual_place=torch.zeros(2, device=self.device),
        )
        write = plan_hints if kind == "plan" else relspatial_hints
        return write(snapshot, scene.instructions())

    def _ids(self, index: int) -> Tensor:
        return torch.arange(self.batch, device=self.device) + (1 << 40) + index * self.batch

    def _plain(self, index: int) -> tuple[Primitives, Scene, State]:
        ids = self._ids(index)
        scene = sample_scene(ids, _DISTRIBUTIONS[index % len(_DISTRIBUTIONS)])
        scene = replace(scene, table=scene.table % NUM_TABLES)
        state = _random_state(scene, ids)
        self._renderer.bake(scene)
        image = self._augment(self._renderer.render(state, scene), ids, index)
        verb = (uniform(ids, _STREAM, 1)[:, 0] * len(_VERBS)).long()
        reach, go, pick = _reach(state, scene), _go(state, scene), _pick(state, scene)
        touch = torch.where((state.held == 0)[:, None], go, reach)
        actions = torch.stack([reach, go, pick, touch], 1)
        batch = Primitives(
            image=quantize(image),
            prompts=_prompts(scene, verb),
            action=grid(actions.gather(1, verb[:, None, None].expand(-1, 1, 7))[:, 0]),
            geometry=_geometry(state, scene),
            named=self._named(scene, verb),
            pixel=self._project(state, scene),
        )
        return batch, scene, state

    def _named(self, scene: Scene, verb: Tensor) -> Tensor:
        named = torch.tensor(_NAMED, device=self.device)[verb]
        round_ = ~ELONGATED.to(self.device)[scene.shape[:, 0]]
        named[:, 6:10] &= ~round_[:, None]
        return named

    def _project(self, state: State, scene: Scene) -> Tensor:
        place = torch.nn.functional.pad(scene.receptacle_xy[:, 0], (0, 1))
        return self._renderer.camera.project(torch.stack([state.object_position[:, 0], place], 1))

    def _augment(self, frame: Frame, ids: Tensor, index: int) -> Tensor:
        """Lay foreign textures over frame, things or table, and jitter brightness and colour."""
        u = uniform(ids, _STREAM + 1, 12)
        texture_index = (u[:, 0] * len(self._overlays)).long()
        mode = u[:, 4, None]
        scales = (0.5, 4.0) if index % 2 else (0.5, 1.5)
        texture = crop_overlays(self._overlays, texture_index, u[:, 1:4], scales)
        everywhere = torch.ones_like(frame.foreground)
        where = torch.where(mode < 0.12, everywhere, frame.foreground)
        where = torch.where(mode > 0.24, ~frame.foreground, where)
        strength = torch.where(mode < 0.24, 0.55, 1.0) * u[:, 5, None]
        strength = torch.where(mode < 0.55, strength, 0.0)
        colour = torch.lerp(frame.colour, texture, (strength * where)[..., None])
        gain = 1 + 0.3 * (u[:, 6:9] - 0.5)
        return ((colour - 0.5) * gain[:, None] + 0.5 + 0.16 * (u[:, 9:12] - 0.5)[:, None]).clamp(
            0, 1
        )


def _random_state(scene: Scene, ids: Tensor) -> State:
    """Gripper anywhere, often near the object or receptacle; a third hold the named object."""
    u = uniform(ids, _STREAM + 2, 17)
    state = initial_state(scene)
    anywhere = torch.stack(
        [(u[:, 0] - 0.5) * 0.30, (u[:, 1] - 0.5) * 0.38, 0.015 + u[:, 2] * 0.175], 1
    )
    near = torch.where(u[:, 3, None] < 0.7, scene.object_xy[:, 0], scene.receptacle_xy[:, 0])
    near = near + (u[:, 4:6] - 0.5) * 0.09
    tip = torch.where((u[:, 6] < 0.6)[:, None], torch.cat([near, anywhere[:, 2:]], 1), anywhere)
    tilt = (u[:, 7:9] - 0.5) * 0.5
    turn = torch.where(u[:, 16:17] < 0.6, 0.5, 2.2) * (u[:, 9:10] - 0.5)
    gripper = torch.cat([tip, tilt, turn], 1)
    holding = u[:, 10] < 0.33
    offset = torch.cat([(u[:, 11:13] - 0.5) * 0.03, -u[:, 13:14] * 0.015], 1)
    position, yaw = state.object_position.clone(), state.object_yaw.clone()
    position[:, 0] = torch.where(holding[:, None], tip + offset, position[:, 0])
    yaw[:, 0] = torch.where(holding, gripper[:, 5] + (u[:, 14] - 0.5), yaw[:, 0])
    placed = ~holding & (u[:, 15] < 0.12)
    position[:, 0, :2] = torch.where(
        placed[:, None], scene.receptacle_xy[:, 0] + offset[:, :2], position[:, 0, :2]
    )
    is_open = torch.where(holding, False, u[:, 12] < 0.8)
    return replace(
        state,
        gripper=gripper,
        is_open=is_open,
        held=torch.where(holding, 0, -1),
        object_position=position,
        object_yaw=yaw,
    )


def _geometry(state: State, scene: Scene) -> Tensor:
    tip = state.gripper[:, :3]
    to_object = (state.object_position[:, 0] - tip) * 10
    to_receptacle = (scene.receptacle_xy[:, 0] - tip[:, :2]) * 10
    held = (state.held == 0).float()[:, None]
    angles = [2 * _yaw(state, scene), 2 * state.object_yaw[:, 0], state.gripper[:, 5]]
    turns = [f(angle) for angle in angles for f in (torch.sin, torch.cos)]
    return torch.cat([to_object, to_receptacle, held, torch.stack(turns, 1)], 1)


def _yaw(state: State, scene: Scene) -> Tensor:
    """Yaw error of an elongated object, 0 for the others, which look the same from two sides."""
    error = yaw_error(state.object_yaw, state.gripper[:, 5:])[:, 0]
    return torch.where(ELONGATED.to(error.device)[scene.shape[:, 0]], error, 0.0)


def _motion(state: State, delta: Tensor, turn: Tensor, opened: Tensor) -> Tensor:
    rotation = torch.stack([-state.gripper[:, 3], -state.gripper[:, 4], turn], 1)
    limits = delta.new_tensor(_LIMITS)
    motion = (torch.cat([delta, rotation], 1) * _GAIN).clamp(-limits, limits)
    return torch.cat([motion, opened.float()[:, None]], 1)


def _reach(state: State, scene: Scene) -> Tensor:
    """Go straight to the object with the gripper open."""
    delta = state.object_position[:, 0] - state.gripper[:, :3]
    return _motion(state, delta, _yaw(state, scene), torch.ones_like(state.is_open))


def _go(state: State, scene: Scene) -> Tensor:
    """Go above the receptacle and leave the fingers as they are."""
    to_receptacle = scene.receptacle_xy[:, 0] - state.gripper[:, :2]
    delta = torch.cat([to_receptacle, _HOVER - state.gripper[:, 2:3]], 1)
    return _motion(state, delta, torch.zeros_like(delta[:, 0]), state.is_open)


def _pick(state: State, scene: Scene) -> Tensor:
    """Approach from above, close on the object, and lift what is held."""
    tip, target = state.gripper[:, :3], state.object_position[:, 0]
    delta, yaw = target - tip, _yaw(state, scene)
    distance = delta[:, :2].square().sum(1).sqrt()
    aligned = yaw.abs() < 0.35
    above = (target[:, 2] + _APPROACH - tip[:, 2])[:, None]
    descend = ((distance < 0.025) & aligned)[:, None]
    holding = state.held == 0
    z = torch.where(descend, delta[:, 2:], above)
    z = torch.where(holding[:, None], _HOVER - tip[:, 2:3], z)
    xy = torch.where(holding[:, None], 0.0, delta[:, :2])
    close = (distance < 0.015) & (delta[:, 2].abs() < 0.02) & aligned
    turn = torch.where(holding, 0.0, yaw)
    return _motion(state, torch.cat([xy, z], 1), turn, ~(close | holding))


_VERBS = ("reach", "go", "pick", "touch")
# Object (o), receptacle (r) or gripper (g): what each number of the geometry is about.
_NAMED = tuple(
    tuple(thing in things for thing in "ooorrooooogg") for things in ("og", "rg", "og", "org")
)


def _prompts(scene: Scene, verb: Tensor) -> list[str]:
    columns = [verb, scene.colour[:, 0], scene.shape[:, 0], scene.receptacle_colour[:, 0]]
    prompts = []
    for v, c, s, r in torch.stack(columns, 1).tolist():
        thing, receptacle = f"{COLOURS[c]} {SHAPES[s]}", f"{COLOURS[r]} plate"
        text = {0: f"reach {thing}", 1: f"go to {receptacle}", 2: f"pick {thing}"}
        prompts.append(text.get(v, f"touch {thing} then {receptacle}"))
    return prompts


def grid(action: Float[Tensor, "B 7"], levels: int = 8) -> Float[Tensor, "B 7"]:
    """Round the six motions to multiples of 1/levels of their limits."""
    limits = action.new_tensor(_LIMITS)
    rounded = torch.round(action[:, :6] / limits * levels) / levels * limits
    return torch.cat([rounded, action[:, 6:]], 1)
