"""A collection of demonstrations: how it is made, and the record of what there is of it.

``collection.json`` in its folder, beside the parts ``part-000000.safetensors``, …:

    format        1
    settings      all fields of ``Collection``
    simulator     what decides episodes and frames beyond them: stand-ins and the like
    image_shape   of the frames
    finished      when (ISO 8601, UTC); null until then
    parts         one per batch of episodes, see ``Part``
    roadvla_version, command, started, machine
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from roadvla.envs import ManiSkillSettings
from roadvla.envs.base import VectorEnv
from roadvla.errors import UserError
from roadvla.files import read_json
from roadvla.train.checks import check_choices, check_simulator
from roadvla.train.demonstrations import COLLECTION
from roadvla.train.run_folder import write_json

FORMAT = 1
_NO_MATTER = ("output", "maniskill.processes")
"""Settings that change neither episodes nor frames."""


@dataclass(frozen=True, kw_only=True)
class Collection:
    """Collect demonstrations of the simulator's scripted expert, or go on with it.

    Attributes:
        env: Setting of Table 3; with ``--sim maniskill`` any of RL4VLA's ids.
        sim: ``tabletop`` or ``maniskill``.
        split: Set that is demonstrated; ``all``, both, on ManiSkill only.
        seed: Decides episodes and the expert's noise.
        device: Where environments live.
        episodes: Successful demonstrations to collect.
        output: Folder for them; what is finished in it is kept.
        num_envs: Episodes run at once, and kept in memory until they are written.
        gain: Range of the expert's gain, drawn once per episode.
        noise: Standard deviation of the expert's noise, in fractions of the action limits.
        tail: Steps kept after the first success with the gripper open.
        drop_small: Leave out steps that move by 1 cm and turn by 0.06 rad or less, unless the
            gripper changes, as RL4VLA does.
        maniskill: How ManiSkill simulates.
    """

    env: str = "VR-UnseenTable"
    sim: str = "tabletop"
    split: Annotated[Literal["train", "test", "all"], tyro.conf.arg(name="set")] = "train"
    seed: int = 0
    device: str = "cpu"
    episodes: int = 140
    output: str = "runs/demonstrations"
    num_envs: int = 16
    gain: tuple[float, float] = (0.55, 0.8)
    noise: float = 0.1
    tail: int = 6
    drop_small: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    maniskill: tyro.conf.OmitArgPrefixes[ManiSkillSettings] = field(
        default_factory=ManiSkillSettings
    )

    def __post_init__(self) -> None:
        """Refuse values out of range and settings that contradict each other."""
        check_choices(self)
        check_simulator(self)
        if self.split == "all" and self.sim != "maniskill":
            raise UserError(f"set 'all' is not known to sim {self.sim!r}: use 'train' or 'test'")
        for name in ("episodes", "num_envs"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: at least 1 is needed")
        if self.seed < 0 or self.tail < 0:
            raise UserError(f"seed is {self.seed}, tail {self.tail}: expected 0 or more")
        if not 0 < self.gain[0] <= self.gain[1] <= 1:
            raise UserError(f"gain is {self.gain}: expected a range within (0, 1]")
        if not 0 <= self.noise < math.inf:
            raise UserError(f"noise is {self.noise}: expected 0 or more")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One batch of episodes that were tried.

    Attributes:
        file: With the demonstrations; ``None`` if there are none.
        sha256: Of the file; ``""`` without one.
        size: Of the file, bytes.
        first_id: Episodes ``first_id``, ``first_id`` + 1, … were tried,
        attempts: this many.
        succeeded: Those that had succeeded at their last step.
        kept: Those whose demonstrations are in the file, in its order.
        frames: Steps in the file.
    """

    file: str | None
    sha256: str
    size: int
    first_id: int
    attempts: int
    succeeded: list[int]
    kept: list[int]
    frames: int

    def intact(self, folder: Path) -> bool:
        """Whether the file is as it was written."""
        if self.file is None:
            return True
        path = folder / self.file
        try:
            return path.stat().st_size == self.size and checksum(path) == self.sha256
        except OSError:
            return False


@dataclass(kw_only=True)
class Record:
    """The content of ``collection.json``.

    Attributes:
        settings: Fields of ``Collection``, as plain values.
        about: Version, command, start and machine.
        simulator: What decides episodes and frames beyond the settings.
        image_shape: Of the frames; empty before the first batch.
        finished: When; ``None`` until then.
        parts: One per batch.
    """

    settings: dict[str, Any]
    about: dict[str, str]
    simulator: dict[str, Any] = field(default_factory=dict)
    image_shape: list[int] = field(default_factory=list)
    finished: str | None = None
    parts: list[Part] = field(default_factory=list)

    @property
    def kept(self) -> int:
        """Demonstrations there are."""
        return sum(len(part.kept) for part in self.parts)

    @property
    def attempts(self) -> int:
        """Episodes tried."""
        return sum(part.attempts for part in self.parts)

    @property
    def succeeded(self) -> int:
        """Episodes that had succeeded at their last step."""
        return sum(len(part.succeeded) for part in self.parts)

    @property
    def frames(self) -> int:
        """Steps in all files."""
        return sum(part.frames for part in self.parts)

    def write(self, folder: Path) -> None:
        """Write it into its folder; it appears whole or not at all.

        Raises:
            UserError: If it cannot be written.
        """
        data = {"format": FORMAT, **asdict(self)}
        write_json(folder / COLLECTION, {**data.pop("about"), **data})


def settings_of(collection: Collection) -> dict[str, Any]:
    """Turn the settings into plain values, for JSON."""
    return json.loads(json.dumps(asdict(collection)))


def read_record(folder: Path) -> Record | None:
    """Read a folder's record; ``None`` if it has none.

    Raises:
        UserError: If it is damaged or of another format.
    """
    path = folder / COLLECTION
    if not path.exists():
        return None
    try:
        data = read_json(path)
        found = data["format"]
        if found != FORMAT:
            raise UserError(
                f"{path} has format {found!r}, expected {FORMAT}: choose another folder"
            )
        parts = [
            Part(**{item.name: part[item.name] for item in fields(Part)}) for part in data["parts"]
        ]
        own = ("settings", "simulator", "image_shape", "finished")
        about = {
            name: str(data[name]) for name in ("roadvla_version", "command", "started", "machine")
        }
        return Record(about=about, parts=parts, **{name: data[name] for name in own})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({error!r}): remove the folder, or choose another"
        ) from error


def check_same(record: Record, wanted: Collection, folder: Path) -> None:
    """Refuse to go on with a collection whose settings were others.

    Raises:
        UserError: If one differs; it is named.
    """
    found, asked = _flat(record.settings), _flat(settings_of(wanted))
    for name, value in asked.items():
        if name not in _NO_MATTER and found.get(name) != value:
            raise UserError(
                f"{folder} holds a collection with {name.rpartition('.')[2]} {found.get(name)!r}, "
                f"not {value!r}: use that, or choose another --output"
            )


def note_simulator(record: Record, env: VectorEnv, folder: Path) -> None:
    """Note what decides episodes and frames beyond the settings, or compare it with what was noted.

    Raises:
        UserError: If it has changed since the collection was begun: with originals in the place of
            stand-ins, say, the frames would differ from part to part.
    """
    facts = json.loads(json.dumps(getattr(env, "facts", {})))
    for name, value in facts.items() if record.parts else ():
        if record.simulator.get(name) != value:
            raise UserError(
                f"{folder} was begun with {name} {record.simulator.get(name)!r}, now it would be "
                f"{value!r}: choose another --output"
            )
    record.simulator, record.image_shape = facts, list(env.image_shape)


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    nested = {f"maniskill.{name}": value for name, value in settings["maniskill"].items()}
    return {name: value for name, value in settings.items() if name != "maniskill"} | nested
