"""A contact sheet: a few episodes of every setting, in distribution left, out of it right.

One row is one setting. Where the shift comes later than the first frame, or comes anew, a second
line of the row shows the same episodes then; until then the arm stands still with open fingers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated

import matplotlib as mpl
import numpy as np
import torch
import tyro
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from roadvla.envs import SETTINGS, ManiSkillSettings, canonical, close, make_env, setting
from roadvla.envs.maniskill.assets import asset_folders, visual_of
from roadvla.envs.maniskill.inspection import stand_ins_in
from roadvla.envs.maniskill.objects import OBJECTS, RECEPTACLES
from roadvla.envs.maniskill.settings import PREFIX, VARIANTS, variant
from roadvla.errors import UserError
from roadvla.evaluation.machine import usable_device
from roadvla.train.checks import check_simulator

_MOST = 12
_SPLITS = {"train": "In distribution (ID)", "test": "Out of distribution (OOD)"}
_FRAME = (240, 320)
_ENLARGED = 3
_PAPER, _INK, _FAINT, _BAR = "#ffffff", "#111111", "#555555", "#e8edf2"
_FORMATS = (".png", ".jpg", ".jpeg")
_USUAL = {"tabletop": ".png", "maniskill": ".jpg"}
_QUALITY = 82
"""Of JPEG, which takes a quarter of PNG's space where tables are photographs."""
_SHIFTS = {
    "VR-UnseenTable": "table tops never seen in training",
    "VR-DynamicTexture": "a texture over object, receptacle and arm, opacity 0.5",
    "VR-DynamicNoise": "a texture over the whole frame, opacity 0.5",
    "CR-MultiObject": "objects never seen in training; in both, a second one lies there",
    "CR-MultiReceptacle": "receptacles never seen in training; in both, a second one lies there",
    "ER-InitPose": "the arm starts in another pose",
    "ER-Repositioning": "the object is moved to another place",
    "Main-v3": "objects and table tops never seen in training",
    "Single-v1": "nothing: the same carrot, plate and table in both",
    "MainCarrot-v3": "objects never seen in training, all on one table",
    "MainImage-v3": "table tops never seen in training, always the carrot",
    "VisionTexture03-v1": "a texture over object, receptacle and arm, opacity 0.3",
    "VisionWhole03-v1": "a texture over the whole frame, opacity 0.3",
    "Carrot-v1": "objects never seen in training",
    "Instruct-v1": "wordings never seen in training",
    "Plate-v1": "receptacles never seen in training",
    "Position-v1": "object and receptacle on a ring around the training area, other yaws",
}
"""What the test set shifts, by the setting's name, without RL4VLA's prefix."""
_LICENCE = "Objects, receptacles, tables and textures: RL4VLA's assets, CC BY-NC 4.0."


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Draw episodes of every setting, in distribution and out of it, on one picture.

    Attributes:
        sim: ``tabletop`` or ``maniskill``.
        envs: Settings of Table 3, all of them unless given; with ``--sim maniskill`` any of
            RL4VLA's ids.
        all: RL4VLA's ten other ids too; ``--sim maniskill`` only.
        columns: Episodes of each set: ids 0, 1, 2, …
        output: Picture to write: .png is exact, .jpg small where tables are photographs;
            gallery-tabletop.png or gallery-maniskill.jpg unless given.
        device: Where the environments live.
        maniskill: How ManiSkill simulates; frames are 240 by 320 unless given.
    """

    sim: str = "tabletop"
    envs: tuple[str, ...] = ()
    all: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    columns: int = 4
    output: Path | None = None
    device: str = "cpu"
    maniskill: tyro.conf.OmitArgPrefixes[ManiSkillSettings] = field(
        default_factory=ManiSkillSettings
    )

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn or written, before anything is simulated."""
        check_simulator(self)
        if not 1 <= self.columns <= _MOST:
            raise UserError(f"columns is {self.columns}: expected 1 to {_MOST}")
        if self.all and self.sim != "maniskill":
            raise UserError("all asks for RL4VLA's other ids: pass --sim maniskill too, or drop it")
        if self.all and self.envs:
            raise UserError("envs and all are both given: drop one of them")
        if self.path.suffix.lower() not in _FORMATS:
            raise UserError(f"output is {str(self.path)!r}: expected a name ending in .png or .jpg")

    @property
    def path(self) -> Path:
        """The picture's file."""
        return self.output or Path(f"gallery-{self.sim}{_USUAL[self.sim]}")

    @property
    def rows(self) -> tuple[str, ...]:
        """The settings by the names under which results are kept.

        Raises:
            UserError: If there is no such setting.
        """
        chosen = self.envs or (*SETTINGS, *(VARIANTS if self.all else ()))
        # Seven of RL4VLA's ids are settings of Table 3 by another name.
        return tuple(dict.fromkeys(canonical(name, self.sim) for name in chosen))


@dataclass(frozen=True, kw_only=True)
class Episodes:
    """What one set of one setting looks like.

    Attributes:
        first: First frames.
        later: Frames in which the shift has come, if the first ones do not show it all.
        step: After how many actions that is; 0 if there are none.
        instructions: What each episode asks for.
    """

    first: UInt8[np.ndarray, "N H W 3"]
    later: UInt8[np.ndarray, "N H W 3"] | None
    step: int
    instructions: tuple[str, ...]


def write_gallery(wanted: Gallery, *, report: Callable[[str], None] = lambda line: None) -> Path:
    """Simulate the episodes and write the picture.

    Args:
        wanted: Which ones, and where to.
        report: Gets one line per setting.

    Returns:
        The picture's file.

    Raises:
        UserError: If there is no such setting or device, packages or assets are missing, or the
            file cannot be written.
    """
    names, path = wanted.rows, wanted.path
    usable_device(wanted.device)
    _check_writable(path)
    played: dict[str, list[Episodes]] = {}
    for number, name in enumerate(names, start=1):
        report(f"{number}/{len(names)} {name}")
        played[name] = [_play(wanted, name, split) for split in _SPLITS]
    _save(_draw_sheet(played, _notes(wanted.sim)), path)
    return path


def _check_writable(path: Path) -> None:
    """Find out before minutes of simulation, not after them."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise PermissionError(None, "it is write-protected")
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write the gallery to {path}: {error.strerror or error}; choose another file"
    )


def _later_step(name: str, sim: str) -> int:
    """After how many actions the shift shows, or shows anew; 0 if the first frame shows it all."""
    if sim == "maniskill":  # its overlays follow the arm, which stands still here
        return variant(name).reposition_step("test")
    test = setting(name).test
    return test.reposition_step or int(test.overlay != "none")


def _play(wanted: Gallery, name: str, split: str) -> Episodes:
    """Start the episodes, and let the arm stand still until the shift has come."""
    options, later = wanted.maniskill, _later_step(name, wanted.sim)
    env = make_env(
        name,
        split=split,
        num_envs=wanted.columns,
        sim=wanted.sim,
        device=wanted.device,
        maniskill=replace(options, image_size=options.image_size or _FRAME),
    )
    still = torch.zeros(wanted.columns, 7)
    still[:, 6] = 1.0  # fingers open
    try:
        frames = [env.reset(torch.arange(wanted.columns)).cpu().numpy()]
        frames += [env.step(still.to(env.device)).image.cpu().numpy() for _ in range(later)]
        instructions = tuple(env.instructions)
    finally:
        close(env)
    if wanted.sim == "tabletop":
        frames = [np.repeat(np.repeat(batch, _ENLARGED, 1), _ENLARGED, 2) for batch in frames]
    return Episodes(
        first=frames[0],
        later=frames[-1] if later else None,
        step=later,
        instructions=instructions,
    )


@dataclass(frozen=True)
class _Layout:
    """Where things stand on the sheet, in pixels; text grows with the frames."""

    columns: int
    height: int
    width: int

    @property
    def gap(self) -> int:
        return max(4, self.width // 50)

    @property
    def sheet(self) -> int:
        return self.left(2 * self.columns - 1) + self.width + 2 * self.gap

    def left(self, place: int) -> int:
        """Left edge of a frame; places count through both halves, which stand apart."""
        apart = 3 * self.gap if place >= self.columns else 0
        return 2 * self.gap + place * (self.width + self.gap) + apart

    @cached_property
    def plain(self) -> ImageFont.FreeTypeFont:
        return _font("DejaVuSans.ttf", max(11, self.width // 16))

    @cached_property
    def bold(self) -> ImageFont.FreeTypeFont:
        return _font("DejaVuSans-Bold.ttf", max(13, self.width // 13))


def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """Matplotlib brings its fonts along, so text looks the same on every machine."""
    return ImageFont.truetype(Path(mpl.get_data_path()) / "fonts" / "ttf" / name, size)


def _notes(sim: str) -> list[str]:
    """What must be said about the pictures wherever they go."""
    if sim != "maniskill":
        return []
    folders = asset_folders()
    known = {finding.path.parent for finding in stand_ins_in(folders)}
    bodies = [(folders.objects / model.folder, model.name) for model in OBJECTS]
    bodies += [(folders.receptacles / model.folder, model.name) for model in RECEPTACLES]
    plain = [name for place, name in bodies if place in known or visual_of(place) is None]
    if folders.stage.parent in known or not folders.stage.is_file():
        plain.append("the stage (never in view)")
    return [_LICENCE, *([f"Plain shapes stand in for: {', '.join(plain)}."] if plain else [])]


def _draw_sheet(played: dict[str, list[Episodes]], notes: Sequence[str]) -> Image.Image:
    """Stack heads, rows and notes."""
    first = next(iter(played.values()))[0].first
    layout = _Layout(*first.shape[:3])
    strips = [_space(layout), *_head(layout)]
    for name, halves in played.items():
        strips += [*_row(layout, name, halves), _space(layout)]
    strips += [_line(layout, note, _FAINT) for note in notes]
    strips.append(_space(layout))
    sheet = Image.new("RGB", (layout.sheet, sum(strip.height for strip in strips)), _PAPER)
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    return sheet


def _head(layout: _Layout) -> list[Image.Image]:
    """Name the halves and number the episodes."""
    n = layout.columns
    titles = dict(zip((0, n), _SPLITS.values(), strict=True))
    numbers = {place: f"episode {place % n}" for place in range(2 * n)}
    half = layout.left(n - 1) + layout.width - layout.left(0)
    return [
        _texts(layout, titles, layout.bold, width=half),
        _texts(layout, numbers, layout.plain, colour=_FAINT),
    ]


def _row(layout: _Layout, name: str, halves: Sequence[Episodes]) -> list[Image.Image]:
    """Draw one setting: name and shift, first frames, instructions, later frames if any."""
    short = name.removeprefix(PREFIX)
    everything = layout.sheet - 2 * layout.left(0)
    captions = [text for half in halves for text in half.instructions]
    strips = [
        _texts(layout, {0: short}, layout.bold, width=everything, paper=_BAR),
        _line(layout, f"Shift: {_SHIFTS[short]}"),
        _frames(layout, [half.first for half in halves]),
        _texts(layout, dict(enumerate(captions)), layout.plain),
    ]
    later = [half.later for half in halves if half.later is not None]
    if later:
        actions = "1 action" if halves[-1].step == 1 else f"{halves[-1].step} actions"
        note = f"The same episodes after {actions} in which the arm stood still:"
        strips += [_line(layout, note), _frames(layout, later)]
    return strips


def _frames(layout: _Layout, halves: Sequence[UInt8[np.ndarray, "N H W 3"]]) -> Image.Image:
    strip = Image.new("RGB", (layout.sheet, layout.height), _PAPER)
    for place, frame in enumerate(frame for half in halves for frame in half):
        strip.paste(Image.fromarray(frame), (layout.left(place), 0))
    return strip


def _space(layout: _Layout) -> Image.Image:
    return Image.new("RGB", (layout.sheet, 2 * layout.gap), _PAPER)


def _line(layout: _Layout, text: str, colour: str = _INK) -> Image.Image:
    """Write over the whole width."""
    width = layout.sheet - 2 * layout.left(0)
    return _texts(layout, {0: text}, layout.plain, width=width, colour=colour)


def _texts(
    layout: _Layout,
    texts: Mapping[int, str],
    font: ImageFont.FreeTypeFont,
    *,
    width: int | None = None,
    colour: str = _INK,
    paper: str = _PAPER,
) -> Image.Image:
    """Write texts at the left edges of places, each in as many lines as it takes."""
    wrapped = {
        place: _wrap(text, font, width or layout.width - layout.gap)
        for place, text in texts.items()
    }
    pitch = sum(font.getmetrics())
    height = pitch * max(len(lines) for lines in wrapped.values()) + layout.gap
    strip = Image.new("RGB", (layout.sheet, height), paper)
    draw = ImageDraw.Draw(strip)
    for place, lines in wrapped.items():
        for number, line in enumerate(lines):
            where = (layout.left(place), layout.gap // 2 + pitch * number)
            draw.text(where, line, colour, font)
    return strip


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break between words; a word that is too long alone stays whole."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _save(sheet: Image.Image, path: Path) -> None:
    """Write every pixel as it is, or as JPEG."""
    try:
        sheet.save(path, quality=_QUALITY, optimize=True)  # PNG has no quality and ignores it
    except OSError as error:
        raise _unwritable(path, error) from error
