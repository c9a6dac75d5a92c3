"""Contact sheets: the frames they hold, what they say, and what they refuse."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from roadvla.envs import SETTINGS, ManiSkillSettings, make_env
from roadvla.envs.maniskill.settings import PREFIX, VARIANTS
from roadvla.errors import UserError
from roadvla.flags import parse
from roadvla.report import gallery
from roadvla.report.gallery import Gallery, write_gallery

SHARED_ASSETS = Path(__file__).parents[2].parent / "shared" / "assets"
SIDE = 144  # 48 pixels, three times as large


def frames(env: str, split: str, episodes: int, steps: int) -> list[np.ndarray]:
    """The tabletop's frames after so many actions that move nothing, enlarged pixel by pixel."""
    running = make_env(env, split=split, num_envs=episodes)
    image = running.reset(torch.arange(episodes))
    still = torch.tensor([[0.0] * 6 + [1.0]] * episodes)
    for _ in range(steps):
        image = running.step(still).image
    return [np.kron(frame, np.ones((3, 3, 1), np.uint8)) for frame in image.numpy()]


def read(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.array(picture.convert("RGB"))


def tops(sheet: np.ndarray, left: int, frame: np.ndarray) -> list[int]:
    """Where a frame stands in a column of the sheet."""
    column = sheet[:, left : left + SIDE]
    rows = range(len(column) - SIDE + 1)
    return [top for top in rows if np.array_equal(column[top : top + SIDE], frame)]


# 144 pixels wide frames: the gap is 4, the margin 8, and 12 more part the halves. So one column
# makes 8 + 144 + 4 + 12 + 144 + 8 = 320 pixels, and the halves start at 8 and 8 + 144 + 16 = 168.
def test_sheet_holds_the_very_frames(tmp_path: Path) -> None:
    path = write_gallery(Gallery(envs=("VR-UnseenTable",), columns=1, output=tmp_path / "a.png"))
    sheet = read(path)
    assert sheet.shape[1] == 320
    [seen], [unseen] = (frames("VR-UnseenTable", split, 1, 0) for split in ("train", "test"))
    assert not np.array_equal(seen, unseen)
    top = tops(sheet, 8, seen)
    assert len(top) == 1
    assert tops(sheet, 168, unseen) == top
    assert tops(sheet, 168, seen) == tops(sheet, 8, unseen) == []
    below = sheet[top[0] + SIDE :]
    assert below[:, :160].min() < 100  # its instruction, in ink
    assert below[:, 160:].min() < 100


# Two columns: the halves start at 8 and 8 + 2·148 + 12 = 316.
def test_episodes_are_numbered_from_nought(tmp_path: Path) -> None:
    wanted = Gallery(envs=("CR-MultiObject",), columns=2, output=tmp_path / "a.png")
    sheet = read(write_gallery(wanted))
    assert sheet.shape[1] == 316 + 148 + 144 + 8
    for split, start in (("train", 8), ("test", 316)):
        first, second = frames("CR-MultiObject", split, 2, 0)
        assert len(tops(sheet, start, first)) == len(tops(sheet, start + 148, second)) == 1


@pytest.mark.parametrize(("env", "steps"), [("ER-Repositioning", 5), ("VR-DynamicNoise", 1)])
def test_a_shift_that_comes_later_has_a_second_line(tmp_path: Path, env: str, steps: int) -> None:
    sheet = read(write_gallery(Gallery(envs=(env,), columns=1, output=tmp_path / "a.png")))
    [seen] = frames(env, "train", 1, 0)
    [before], [after] = (frames(env, "test", 1, count) for count in (0, steps))
    assert not np.array_equal(before, after)
    upper, lower = tops(sheet, 8, seen)  # without the shift nothing changes
    assert lower - upper > SIDE
    # An ER-Repositioning episode starts alike in both sets.
    assert tops(sheet, 168, before) == [upper]
    assert tops(sheet, 168, after) == [lower]


def test_same_settings_same_file_and_a_line_each(tmp_path: Path) -> None:
    lines: list[str] = []
    envs = ("VR-UnseenTable", "PutOnPlateInScene25EEPose-v1")
    for name in ("a.png", "deeper/b.png"):
        write_gallery(Gallery(envs=envs, columns=1, output=tmp_path / name), report=lines.append)
    assert lines == 2 * ["1/2 VR-UnseenTable", "2/2 ER-InitPose"]
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "deeper/b.png").read_bytes()


def test_every_setting_has_a_row_that_says_what_shifts() -> None:
    assert Gallery().rows == tuple(SETTINGS)
    rows = Gallery(sim="maniskill", all=True).rows
    assert rows[:7] == tuple(SETTINGS)
    others = set(VARIANTS) - {row.rl4vla_id for row in SETTINGS.values()}
    assert len(rows) == 17
    assert set(rows[7:]) == others
    assert {name.removeprefix(PREFIX) for name in rows} == set(gallery._SHIFTS)


def test_text_is_broken_where_it_is_too_wide() -> None:
    font = gallery._Layout(1, 144, 144).plain
    text = "take the kitchen shovel and put it on the gramophone disk incomprehensibilities"
    lines = gallery._wrap(text, font, 100)
    assert " ".join(lines) == text
    assert all(font.getlength(line) <= 100 for line in lines[:-1])
    # Greedy: no line has room for the next one's first word.
    for line, following in itertools.pairwise(lines):
        assert font.getlength(f"{line} {following.split()[0]}") > 100
    assert gallery._wrap("two words", font, 1000) == ["two words"]


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--columns 0", "columns is 0: expected 1 to 12"),
        ("--columns 13", "columns is 13"),
        ("--output a.gif", "ending in .png or .jpg"),
        ("--sim mujoco", "unknown simulator 'mujoco'"),
        ("--all", "pass --sim maniskill"),
        ("--sim maniskill --all --envs VR-UnseenTable", "drop one of them"),
        ("--stand-ins", "would not be used by sim 'tabletop'"),
        ("--envs VR-UnseenTabel", "did you mean 'VR-UnseenTable'"),
        ("--envs PutOnPlateInScene25Main-v3", "unknown environment"),
        ("--device tpu", "unknown device"),
    ],
)
def test_refusals_come_before_any_simulation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str, complaint: str
) -> None:
    _simulate_nothing(monkeypatch)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=complaint):
        write_gallery(parse(Gallery, "gallery", flags.split()))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["folder.png", "file/a.png"])
def test_unwritable_places_are_found_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    _simulate_nothing(monkeypatch)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write the gallery to .*choose another file"):
        write_gallery(Gallery(output=tmp_path / name))


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match=r"a\.png: No space left on device"):
        write_gallery(Gallery(envs=("ER-InitPose",), columns=1, output=tmp_path / "a.png"))


def test_notes_name_licence_and_stand_ins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert gallery._notes("tabletop") == []
    monkeypatch.setenv("MS_ASSET_DIR", str(tmp_path))
    monkeypatch.delenv("ROADVLA_ASSETS", raising=False)
    rl4vla = tmp_path / "data" / "tasks" / "rl4vla"
    for model in ("more_carrot/001_carrot_simpler", "more_plate/001_plate_simpler"):
        (rl4vla / model).mkdir(parents=True)
        (rl4vla / model / "textured.glb").touch()
    licence, plain = gallery._notes("maniskill")
    assert "CC BY-NC 4.0" in licence
    named = plain.removesuffix(".").split(": ")[1].split(", ")
    assert len(named) == 24 + 16 + 1
    assert named[0] == "kitchen shovel"
    assert "plate" not in named
    assert named[-1] == "the stage (never in view)"


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")  # a runtime check reads instructions before the first reset
def test_maniskill_sheet_shows_the_teleport(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _needs_maniskill(monkeypatch)
    path = tmp_path / "a.png"
    wanted = Gallery(
        sim="maniskill",
        envs=("ER-Repositioning",),
        columns=1,
        output=path,
        maniskill=ManiSkillSettings(image_size=(96, SIDE), stand_ins=True),
    )
    sheet = read(write_gallery(wanted))
    assert sheet.shape[1] == 320
    bands = _bands(sheet)
    assert len(bands) == 2  # the sets start alike, and one of them goes on differently
    (top, _), (later, _) = bands
    ours, theirs = (
        [sheet[row : row + 96, left : left + SIDE].astype(int) for row in (top, later)]
        for left in (8, 168)
    )
    assert np.abs(ours[0] - theirs[0]).mean() < 1
    assert np.abs(ours[0] - ours[1]).mean() < 1
    changed = np.abs(theirs[0] - theirs[1]).max(axis=-1) > 30
    assert 20 < changed.sum() < 0.2 * changed.size


def _bands(sheet: np.ndarray) -> list[tuple[int, int]]:
    """Rows in which frames fill a column from edge to edge: no paper shows, nor the name's bar."""
    column = sheet[:, 8 : 8 + SIDE].astype(int)
    full = (np.abs(column - column[:, :1]).max(axis=-1) > 0).mean(axis=1) > 0.5
    edges = np.flatnonzero(np.diff(np.pad(full.astype(int), 1)))
    return [(a, b) for a, b in edges.reshape(-1, 2).tolist() if b - a > 48]


def _simulate_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("an environment was made")

    monkeypatch.setattr(gallery, "make_env", fail)


def _needs_maniskill(monkeypatch: pytest.MonkeyPatch) -> None:
    """Find the assets and something to draw with, in a process that a driver may crash; or skip."""
    pytest.importorskip("mani_skill")
    root = Path(os.environ.get("MS_ASSET_DIR") or SHARED_ASSETS)
    if not (root / "data" / "tasks" / "rl4vla" / "more_carrot" / "model_db.json").exists():
        pytest.skip(f"no assets in {root}")
    monkeypatch.setenv("MS_ASSET_DIR", str(root))
    draw = "import sapien; sapien.render.RenderSystem().device"
    if subprocess.run([sys.executable, "-c", draw], capture_output=True, check=False).returncode:
        pytest.skip("nothing to draw with")
