"""How the suite is simulated on ManiSkill, apart from its code: loads without mani_skill."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from roadvla.envs.maniskill.settings import Fixes
from roadvla.errors import UserError, unknown_name

Shader = Literal["one_pass", "lambert", "default"]
"""``default`` is SAPIEN's, for GPUs. ``one_pass`` is ours, for processors, and looks the same.
``lambert`` leaves out reflections and bumps: recorded episodes were drawn so."""
SHADERS: tuple[Shader, ...] = get_args(Shader)

HEIGHT, WIDTH = 480, 640
_SMALLEST, _LARGEST = 16, 4096


@dataclass(frozen=True, kw_only=True)
class ManiSkillSettings:
    """How the suite is simulated on ManiSkill; ``sim maniskill`` only.

    Attributes:
        image_size: Height and width of frames in pixels; ``None`` for what the policy sees, or 480
            and 640, RL4VLA's. The camera always sees the same.
        shader: What draws them; ``None`` for ``default`` on a GPU and ``one_pass`` on a processor.
        processes: Worker processes without a GPU; ``None`` for one per core.
        stand_ins: Let plain shapes replace meshes that are missing. Results say so.
        distinct_distractors: MultiCarrot's distractor is never the target.
        seen_tables: MultiPlate keeps to the 16 tables of training in every set.
        batch_texture_box: Stretch textures to the largest box in the batch, as RL4VLA does. An
            episode then looks different in another batch.
    """

    image_size: tuple[int, int] | None = None
    shader: Shader | None = None
    processes: int | None = None
    stand_ins: bool = False
    distinct_distractors: bool = False
    seen_tables: bool = False
    batch_texture_box: bool = False

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.shader is not None and self.shader not in SHADERS:
            raise unknown_name("shader", self.shader, SHADERS)
        if self.processes is not None and self.processes < 1:
            raise UserError(f"processes is {self.processes}: at least 1 is needed")
        sides = self.image_size or (HEIGHT, WIDTH)
        if len(sides) != 2 or not all(_SMALLEST <= side <= _LARGEST for side in sides):
            raise UserError(
                f"image_size is {self.image_size}: expected height and width of {_SMALLEST} to "
                f"{_LARGEST} pixels"
            )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of frames."""
        return self.image_size or (HEIGHT, WIDTH)

    @property
    def fixes(self) -> Fixes:
        """The oddities of RL4VLA that are put right."""
        return Fixes(
            distinct_distractors=self.distinct_distractors,
            seen_tables=self.seen_tables,
            own_texture_box=not self.batch_texture_box,
        )

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the episodes and their frames, for results."""
        facts = {**asdict(self), "image_size": list(self.size)}
        del facts["processes"]
        return facts
