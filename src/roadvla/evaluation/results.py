"""A folder of results: what studies consist of, and the records of their finished runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from roadvla.errors import UserError
from roadvla.evaluation.evaluate import SPLITS
from roadvla.evaluation.records import RunRecord, check_comparable, read_record
from roadvla.evaluation.sealed import AGAIN, read_sealed, write_sealed
from roadvla.evaluation.typed import check_fields


@dataclass(frozen=True, kw_only=True)
class StudyRecord:
    """What a study consists of, whether or not its cells are finished.

    Attributes:
        name: Of the study and of its file.
        title: What it shows.
        paper: Where the paper shows it, e.g. ``Table 1, Fig. 2``; ``""`` for nowhere.
        claim: What the paper says it found there, in our words; ``""`` if nothing.
        baseline: Method that the others are compared with.
        methods: In the order of the table.
        settings: By paper alias, in the order of the table.
        seeds: One run of each method on each training distribution per seed.
        budget: Name of the budget.
        episodes: Of each set in the final evaluations; 0 for as many as each run has.
        command: What runs all of it.
        cells: Names of the records it needs, by method, setting and seed:
            ``cells[method][setting][seed as text]``.
        warmup: Name of the record of the policy all runs start from.
    """

    name: str
    title: str
    paper: str
    claim: str
    baseline: str
    methods: tuple[str, ...]
    settings: tuple[str, ...]
    seeds: tuple[int, ...]
    budget: str
    episodes: int
    command: str
    cells: dict[str, dict[str, dict[str, str]]]
    warmup: str


def write_study(study: StudyRecord, folder: Path) -> Path:
    """Write ``NAME.json``, atomically.

    Raises:
        UserError: If the folder cannot be written.
    """
    return write_sealed(folder / f"{study.name}.json", asdict(study))


def read_study(path: Path) -> StudyRecord:
    """Read a study.

    Raises:
        UserError: If the file is missing, damaged, changed, or of another format.
    """
    data = read_sealed(path)
    try:
        for name in ("methods", "settings", "seeds"):
            data[name] = tuple(data[name])
        check_fields(StudyRecord, data)
        return StudyRecord(**data)
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{path} does not describe a study ({error}): {AGAIN}") from error


@dataclass(frozen=True)
class Results:
    """A results folder: ``studies/*.json``, ``records/*.json`` and ``films/*.npz``.

    Attributes:
        folder: Where it lies.
        studies: By name.
        records: By name, all of the same episodes.
        films: First out-of-distribution episodes, by record and setting.
    """

    folder: Path
    studies: dict[str, StudyRecord]
    records: dict[str, RunRecord]
    films: dict[tuple[str, str], Path] = field(default_factory=dict)

    def missing(self, study: StudyRecord) -> list[str]:
        """Name the cells of a study that are not finished in all of its settings."""
        wanted = [
            (name, env)
            for by_env in study.cells.values()
            for env, by_seed in by_env.items()
            for name in by_seed.values()
        ]
        wanted += [(study.warmup, env) for env in study.settings]
        return list(
            dict.fromkeys(name for name, env in wanted if self.measured(study, name, env) is None)
        )

    def measured(self, study: StudyRecord, name: str, env: str) -> RunRecord | None:
        """Find the record of a cell if it was measured in a setting, on the study's episodes.

        Numbers of other episodes are not compared, so such a record stands for nothing here.
        """
        record = self.records.get(name)
        found = [] if record is None else [record.outcome(env, split) for split in SPLITS]
        if not found or any(
            outcomes is None or (study.episodes and outcomes.episodes != study.episodes)
            for outcomes in found
        ):
            return None
        return record


def is_results(folder: Path) -> bool:
    """Whether a folder holds the results of studies."""
    return (folder / "studies").is_dir() and (folder / "records").is_dir()


def read_results(folder: Path) -> Results:
    """Read all studies and records of a results folder.

    Raises:
        UserError: If there is none, a file is damaged or changed by hand, or the records are not
            of the same episodes.
    """
    studies = [read_study(path) for path in _files(folder / "studies")]
    if not studies:
        raise UserError(f"no study in {folder}: `roadvla study NAME` makes one")
    records = [read_record(path) for path in _files(folder / "records")]
    check_comparable(records)
    films = {}
    for path in sorted((folder / "films").glob("*.npz")):
        record, _, env = path.stem.rpartition("_")
        films[record, env] = path
    return Results(folder, {s.name: s for s in studies}, {r.name: r for r in records}, films)


def _files(folder: Path) -> Sequence[Path]:
    return sorted(path for path in folder.glob("*.json") if not path.name.startswith("."))
