"""Recorded episodes: reading them, and the arithmetic of the comparison, without a simulator."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ms_recorded import ASSETS, EPISODES, needs_assets, needs_episodes

from roadvla.envs.maniskill import golden_run
from roadvla.envs.maniskill.episodes import total
from roadvla.envs.maniskill.golden import Comparison, Quantity, Recording, read_recording
from roadvla.envs.maniskill.golden_run import _EPISODE_ARRAYS, _groups, _totals, compare
from roadvla.envs.maniskill.settings import PREFIX, variant
from roadvla.errors import UserError

MAIN, SINGLE = PREFIX + "Main-v3", PREFIX + "Single-v1"

# Reading


class Alarm:
    """Rings when it is unpickled."""

    rung = False

    def __reduce__(self) -> tuple[Any, ...]:
        return _ring, ()


def _ring() -> None:
    Alarm.rung = True


def folder(place: Path, facts: object | None = None, **arrays: np.ndarray) -> Path:
    if facts is None:
        facts = {"episodes": [], "actions": [], "image_steps": []}
    place.mkdir(exist_ok=True)
    (place / "episodes.json").write_text(json.dumps(facts), encoding="utf-8")
    np.savez(place / "arrays.npz", **arrays)
    return place


def refusal(place: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_recording(place)
    message = str(caught.value)
    assert str(place) in message
    assert "\n" not in message
    return message


def test_a_recording(tmp_path: Path) -> None:
    episodes, actions = [{"env_id": MAIN}], [[0.0] * 7]
    facts = {"episodes": episodes, "actions": actions, "image_steps": [0], "more": "é"}
    place = folder(tmp_path, facts, actions=np.eye(7), flags=np.ones((1, 2), np.uint8))
    found = read_recording(place)
    assert found.facts == facts
    assert sorted(found.arrays) == ["actions", "flags"]
    np.testing.assert_array_equal(found.arrays["actions"], np.eye(7))
    assert found.arrays["flags"].dtype == np.uint8


@pytest.mark.parametrize("missing", ["episodes.json", "arrays.npz", "both"])
def test_files_that_are_missing(tmp_path: Path, missing: str) -> None:
    place = tmp_path / "recording"
    if missing != "both":
        (folder(place) / missing).unlink()
    message = refusal(place)
    assert "No such file or directory" in message
    assert "a folder with episodes.json and arrays.npz is needed" in message


def test_a_file_instead_of_a_folder(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("x")
    assert "Not a directory" in refusal(place)


@pytest.mark.parametrize("text", ["", "{", '{"episodes": [], "actions"', "\x00"])
def test_broken_json(tmp_path: Path, text: str) -> None:
    place = folder(tmp_path)
    (place / "episodes.json").write_text(text)
    assert "holds no recorded episodes in this layout" in refusal(place)


def test_json_in_another_encoding(tmp_path: Path) -> None:
    place = folder(tmp_path)
    (place / "episodes.json").write_bytes(b'{"episodes": "\xff"}')
    assert "in this layout" in refusal(place)


@pytest.mark.parametrize("missing", ["episodes", "actions", "image_steps"])
def test_facts_that_are_missing(tmp_path: Path, missing: str) -> None:
    facts = {"episodes": [], "actions": [], "image_steps": []}
    del facts[missing]
    message = refusal(folder(tmp_path, facts))
    assert "in this layout" in message
    assert repr(missing) in message


@pytest.mark.parametrize("facts", [{}, [], [1], "episodes", 3])
def test_other_layouts(tmp_path: Path, facts: object) -> None:
    assert "in this layout" in refusal(folder(tmp_path, facts))


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    place = folder(tmp_path, actions=np.array([Alarm()], dtype=object))
    assert "in this layout" in refusal(place)
    (place / "arrays.npz").write_bytes(pickle.dumps(Alarm()))
    assert "in this layout" in refusal(place)
    assert not Alarm.rung
    pickle.loads((place / "arrays.npz").read_bytes())
    assert Alarm.rung  # it does ring


def test_one_array_instead_of_several(tmp_path: Path) -> None:
    place = folder(tmp_path)
    with (place / "arrays.npz").open("wb") as file:
        np.save(file, np.eye(3))
    assert "in this layout" in refusal(place)


# Quantities


def quantity(tolerance: float = 1.0) -> Quantity:
    return Quantity("name", tolerance, "mm")


def test_deviations_are_counted() -> None:
    row = quantity()
    row.add(np.array([[0.5, -1.0], [1.5, -2.0]]), "first")
    assert (row.compared, row.failed, row.worst, row.where) == (4, 2, 2.0, "first")
    row.add(-0.25, "second")
    assert (row.compared, row.failed, row.worst, row.where) == (5, 2, 2.0, "first")
    row.add(np.array([3]), "third")
    assert (row.compared, row.failed, row.worst, row.where) == (6, 3, 3.0, "third")


def test_the_tolerance_itself_is_within() -> None:
    row = quantity(0.1)
    row.add(np.array([0.1, -0.1, math.nextafter(0.1, 1)]), "here")
    assert row.failed == 1
    exact = quantity(0.0)
    exact.add(0.0, "here")
    exact.add(np.zeros(3), "there")
    assert (exact.compared, exact.failed, exact.worst, exact.where) == (4, 0, 0.0, "here")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("tolerance", [0.0, 1.0, 1e300])
def test_what_is_not_finite_is_beyond_any_tolerance(value: float, tolerance: float) -> None:
    row = quantity(tolerance)
    row.add(np.array([0.0, value], dtype=np.float32), "here")
    assert (row.compared, row.failed, row.where) == (2, 1, "here")
    assert row.worst > 1e300


def test_nothing_to_compare() -> None:
    row = quantity()
    row.add(np.empty((0, 3)), "here")
    assert row == quantity()


deviations = st.lists(st.floats(-3, 3) | st.just(math.nan), max_size=4)


def infinite(value: float) -> float:
    return math.inf if math.isnan(value) else abs(value)


@given(st.lists(deviations, max_size=5))
def test_quantities_against_plain_python(parts: list[list[float]]) -> None:
    row = quantity()
    for k, part in enumerate(parts):
        row.add(np.array(part), str(k))
    everything = [(infinite(value), str(k)) for k, part in enumerate(parts) for value in part]
    assert row.compared == len(everything)
    assert row.failed == sum(value > 1 for value, _ in everything)
    worst = max((value for value, _ in everything), default=0.0)
    assert row.worst == worst
    assert row.where == next((where for value, where in everything if value == worst), "")


# Comparisons


def test_rows_are_made_once() -> None:
    result = Comparison()
    row = result.row("pose", 1e-3, "m")
    assert (row.name, row.tolerance, row.unit) == ("pose", 1e-3, "m")
    assert result.row("pose", 1e-3, "m") is row
    assert list(result.rows) == ["pose"]


def test_values_that_must_be_equal() -> None:
    result = Comparison()
    result.same("names", ["a", 1], ["a", 1], "first")
    result.same("names", {"a": 1}, {"a": 2}, "second")
    result.same("names", None, False, "third")
    (row,) = result.rows.values()
    assert (row.compared, row.failed, row.worst, row.where) == (3, 2, 1.0, "second")
    assert (row.tolerance, row.unit) == (0.0, "differences")


def test_passing() -> None:
    result = Comparison()
    assert not result.passed  # nothing was compared
    result.row("empty", 1.0, "m").add(np.empty(0), "here")
    assert not result.passed
    result.row("fine", 1.0, "m").add(1.0, "here")
    assert result.passed
    result.row("wrong", 1.0, "m").add(1.1, "here")
    assert not result.passed


entries = st.lists(
    st.tuples(
        st.sampled_from("abc"),
        st.sampled_from([0.0, 0.5, 1.0, 2.0]),
        st.sampled_from(["one", "two", "three"]),
    ),
    max_size=12,
)


def collected(entries: list[tuple[str, float, str]]) -> Comparison:
    result = Comparison()
    for name, value, where in entries:
        result.row(name, 1.0, "m").add(value, where)
    return result


@given(entries, entries)
def test_merging_is_as_if_it_had_been_one(first: Any, second: Any) -> None:
    merged, other = collected(first), collected(second)
    merged.merge(other)
    assert merged == collected(first + second)
    assert other == collected(second)
    merged.row("a", 1.0, "m").add(9.0, "later")
    assert other == collected(second)  # rows are not shared


def test_merging_keeps_tolerances_and_failures() -> None:
    other, result = Comparison(), Comparison()
    other.row("pose", 0.5, "m").add(0.7, "there")
    other.row("exact", 0.5, "m").add(0.0, "there")
    result.merge(other)
    assert result.rows == {
        "pose": Quantity("pose", 0.5, "m", 1, 0.7, "there", 1),
        "exact": Quantity("exact", 0.5, "m", 1, 0.0, "there", 0),
    }
    assert not result.passed


# What is played


def recorded(env_ids: Sequence[str], grasps: Sequence[str] = ()) -> Recording:
    """Episodes whose numbers are k, of ids that take turns; stored in reverse order."""
    count = len(env_ids)
    facts = {
        "actions": [],
        "image_steps": [0, 6],
        "episodes": [
            {"env_id": env_id, "index": count - 1 - k, "episode_id": k}
            for k, env_id in enumerate(env_ids)
        ],
        "grasps": [
            {"env_id": env_id, "k": k, "image_steps": [0, k]} for k, env_id in enumerate(grasps)
        ],
    }
    arrays = {name: np.arange(count)[::-1, None] for name in _EPISODE_ARRAYS}
    arrays["actions"] = np.full((2, 7), 0.5)
    for k in range(len(grasps)):
        arrays[f"grasp_{k}_actions"] = np.full((3, 7), k)
        arrays[f"grasp_{k}_flags"] = np.full(4, k)
    return Recording(facts, arrays)


def numbers(groups: list[Any]) -> dict[str, list[int]]:
    return {jobs[0][0]["env_id"]: [job[0]["episode_id"] for job in jobs] for jobs in groups}


def test_groups_are_ids_the_longest_first() -> None:
    groups = _groups(recorded(["a", "b", "b", "a", "b", "c"]), set(), 1)
    assert list(numbers(groups).items()) == [("b", [1, 2, 4]), ("a", [0, 3]), ("c", [5])]
    for jobs in groups:
        for entry, rows, steps in jobs:
            assert sorted(rows) == sorted([*_EPISODE_ARRAYS, "actions"])
            assert {rows[name].item() for name in _EPISODE_ARRAYS} == {entry["episode_id"]}
            assert rows["actions"].shape == (2, 7)
            assert steps == [0, 6]


def test_groups_of_chosen_ids() -> None:
    recording = recorded(["a", "b", "b", "a", "b", "c"])
    assert numbers(_groups(recording, {"a", "c", "d"}, 1)) == {"a": [0, 3], "c": [5]}
    assert _groups(recording, {"d"}, 1) == []


def test_every_n_th_episode_and_grasp() -> None:
    recording = recorded(["a", "b", "b", "a", "b", "c", "a"], ["b"] * 3)
    (b, a) = _groups(recording, set(), 2)
    assert [job[0].get("episode_id") for job in b] == [2, 4, None, None]
    assert [job[0].get("k") for job in b] == [None, None, 0, 2]
    assert [job[0]["episode_id"] for job in a] == [0, 6]


def test_grasps_have_numbers_of_their_own() -> None:
    (jobs,) = _groups(recorded([], ["a"] * 12), set(), 1)
    assert len(jobs) == 12
    for k, (entry, rows, steps) in enumerate(jobs):
        assert entry["k"] == k
        assert sorted(rows) == ["actions", "flags"]  # of 1, not of 10 and 11 as well
        assert rows["flags"].tolist() == [k] * 4
        assert steps == [0, k]


def test_totals() -> None:
    right = {name: total(variant(MAIN), name) for name in ("train", "test", "all")}
    recording = Recording({"totals": {MAIN: right, SINGLE: {"train": 3135, "test": 3136}}}, {})
    result = Comparison()
    _totals(recording, set(), result)
    (row,) = result.rows.values()
    assert (row.compared, row.failed, row.where) == (5, 1, f"{SINGLE} train")
    result = Comparison()
    _totals(recording, {MAIN}, result)
    assert result.row("totals").compared == 3
    assert result.passed
    result = Comparison()
    _totals(Recording({}, {}), set(), result)
    assert result.rows == {}


def test_ids_that_were_not_recorded() -> None:
    with pytest.raises(UserError) as caught:
        compare(recorded([MAIN, SINGLE, MAIN]), env_ids=[PREFIX + "Plate-v1"])
    assert str(caught.value) == (
        f"no recorded episode of ['{PREFIX}Plate-v1']: there are {MAIN}, {SINGLE}"
    )


@pytest.mark.parametrize(
    "spoil",
    [
        lambda recording: recording.arrays.pop("flags"),
        lambda recording: recording.arrays.pop("actions"),
        lambda recording: recording.facts.pop("image_steps"),
        lambda recording: recording.facts["episodes"][1].pop("env_id"),
        lambda recording: recording.facts["episodes"][0].update(index=2),
        lambda recording: recording.facts["episodes"].append("episode"),
        lambda recording: recording.facts.update(episodes=None),
        lambda recording: recording.facts["grasps"][0].pop("k"),
    ],
)
def test_recordings_that_lack_something(spoil: Any) -> None:
    recording = recorded([MAIN, SINGLE], [MAIN])
    spoil(recording)
    with pytest.raises(UserError, match="the recorded episodes are not in the known layout"):
        compare(recording)


class Now:
    """A pool of one process, this one."""

    def __init__(self, workers: int, **_: Any) -> None:
        self.workers = workers
        Now.last = self

    def __enter__(self) -> Now:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, function: Any, *arguments: Any) -> Any:
        future: Future[Any] = Future()
        future.set_result(function(*arguments))
        return future


def test_all_groups_are_played_and_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    played, told = [], []

    def play(jobs: list[Any], pictures: bool, stand_ins: bool) -> Comparison:
        played.append((jobs[0][0]["env_id"], len(jobs), pictures, stand_ins))
        result = Comparison()
        result.row("pose", 0.5, "m").add(np.array([0.1 * len(jobs)]), jobs[0][0]["env_id"])
        return result

    monkeypatch.setattr(golden_run, "_play", play)
    monkeypatch.setattr(golden_run, "ProcessPoolExecutor", Now)
    result = compare(
        recorded([MAIN, SINGLE, MAIN], [MAIN]),
        pictures=False,
        stand_ins=True,
        processes=8,
        progress=lambda done, of: told.append((done, of)),
    )
    assert sorted(played) == [(MAIN, 3, False, True), (SINGLE, 1, False, True)]
    assert Now.last.workers == 2  # no more than there are groups
    assert told[-1] == (4, 4)
    assert sorted(done for done, _ in told) in ([1, 4], [3, 4])
    assert result.rows["pose"].compared == 2
    assert result.rows["pose"].worst == pytest.approx(0.3)
    assert result.rows["pose"].where == MAIN
    assert result.passed


# The recording that this checkout may have


@needs_episodes
def test_groups_of_a_real_recording() -> None:
    recording = read_recording(EPISODES)
    groups = _groups(recording, set(), 1)
    assert len(groups) == 17
    count = sum(len(jobs) for jobs in groups)
    assert count == len(recording.facts["episodes"]) + len(recording.facts["grasps"])
    result = Comparison()
    _totals(recording, set(), result)
    assert result.passed


@needs_episodes
@needs_assets
def test_overlays_of_a_real_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROADVLA_ASSETS", str(ASSETS))
    recording = read_recording(EPISODES)
    case = recording.facts["composites"][0]
    result = Comparison()
    golden_run._composites(recording, {case["env_id"]}, result)
    assert result.passed
    assert result.rows["overlay arithmetic"].compared == 240 * 320 * 3
    recording.arrays[f"composite_{case['k']}_out"][0, 0, 0] ^= 0x80
    result = Comparison()
    golden_run._composites(recording, {case["env_id"]}, result)
    assert result.rows["overlay arithmetic"].failed == 1
    assert result.rows["overlay arithmetic"].where == f"composite {case['k']}"
