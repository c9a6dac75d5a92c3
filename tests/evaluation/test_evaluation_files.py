from __future__ import annotations

import dataclasses
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_fakes import CountingEnv, RandomPolicy

from roadvla.errors import UserError
from roadvla.evaluation.evaluate import evaluate
from roadvla.evaluation.files import film_path, read_evaluation, read_film, write_evaluation


@pytest.fixture
def evaluation():
    result = evaluate(
        RandomPolicy(),
        env="VR-X",
        split="train",
        episodes=7,
        num_envs=3,
        record=2,
        make_env=lambda env, num_envs, **_: CountingEnv(num_envs),
    )
    return dataclasses.replace(result, checkpoint="runs/a/checkpoints/iteration_000040")


def test_round_trip_gives_the_same_evaluation_and_film(evaluation, tmp_path):
    path = write_evaluation(evaluation, tmp_path / "new" / "evaluation")
    assert path == tmp_path / "new" / "evaluation" / "VR-X_train.json"
    assert read_evaluation(path) == dataclasses.replace(evaluation, film=None)
    film = read_film(path.with_name("VR-X_train_frames.npz"))
    assert torch.equal(film.frames, evaluation.film.frames)
    assert torch.equal(film.success, evaluation.film.success)
    assert film.instructions == ("do 0", "do 1")
    assert film.episode_ids == (0, 1)
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "VR-X_train.json",
        film_path(path).name,
    ]


def test_json_says_what_the_contract_says(evaluation, tmp_path):
    evaluation = dataclasses.replace(evaluation, iteration=40, env_steps=61440)
    data = json.loads(write_evaluation(evaluation, tmp_path).read_text())
    assert data["success_rate"] == pytest.approx(3 / 7)  # ids 0 3 6
    assert (data["episodes"], data["iteration"], data["env_steps"]) == (7, 40, 61440)
    assert data["per_episode"]["episode_ids"] == list(range(7))
    assert data["per_episode"]["success"] == [1, 0, 0, 1, 0, 0, 1]
    assert data["per_episode"]["success_once"] == [1, 1, 0, 1, 1, 0, 1]
    assert data["success_low"] < data["success_rate"] < data["success_high"]


def test_a_new_evaluation_takes_the_old_film_away(evaluation, tmp_path):
    path = write_evaluation(evaluation, tmp_path)
    write_evaluation(dataclasses.replace(evaluation, film=None), tmp_path)
    assert not film_path(path).exists()


@pytest.mark.parametrize("filmed", [True, False])
def test_numbers_and_film_belong_together_wherever_a_write_is_cut_off(
    evaluation, tmp_path, monkeypatch, filmed
):
    old = dataclasses.replace(evaluation, env_steps=1)
    new = dataclasses.replace(evaluation, env_steps=2)
    if not filmed:
        new = dataclasses.replace(new, film=None)
    for call in range(1, 20):
        folder = tmp_path / str(call)
        path = write_evaluation(old, folder)
        film_path(path).write_bytes(b"the old film")
        done = _cut_off(monkeypatch, call, lambda folder=folder: write_evaluation(new, folder))
        film = film_path(path)
        if path.exists() and read_evaluation(path).env_steps == 1:
            assert film.read_bytes() == b"the old film"
        elif path.exists():
            assert film.exists() == filmed
            assert not filmed or film.read_bytes() != b"the old film"
        if done:
            assert read_evaluation(path).env_steps == 2
            break
    assert call in range(3, 19)


def _cut_off(monkeypatch, call, work) -> bool:
    """Do the work, but end it before a change of the folder; whether it came to its end."""
    count = []

    def dying(real):
        def change(*args, **options):
            count.append(0)
            if len(count) >= call:
                raise ZeroDivisionError
            return real(*args, **options)

        return change

    with monkeypatch.context() as patch:
        for name in ("replace", "unlink"):
            patch.setattr(Path, name, dying(getattr(Path, name)))
        try:
            work()
        except ZeroDivisionError:
            return False
    return True


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(evaluation, tmp_path, monkeypatch):
    path = write_evaluation(dataclasses.replace(evaluation, film=None), tmp_path)
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left on device; free space"):
        write_evaluation(dataclasses.replace(evaluation, film=None, env_steps=5), tmp_path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def _set(*keys, value):
    def change(data):
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("horizon"), "'horizon' is missing"),
        (_set("env", value=3), "'env' is 3"),
        (_set("episodes", value=True), "'episodes' is True"),
        (_set("split", value="ood"), "split is 'ood'"),
        (_set("episodes", value=8), "episode_ids does not list 8"),
        (_set("per_episode", "grasped", value=[1]), "grasped does not list 7"),
        (_set("per_episode", "success", 1, value=2), "success holds something other than 0 and 1"),
        (_set("per_episode", "success", 1, value=0.5), "other than whole numbers"),
        (_set("per_episode", "success", 0, value=False), "other than whole numbers"),
        (_set("per_episode", "success", 2, value=1), "succeeded at its end but never"),
        (_set("per_episode", "episode_ids", 2, value=0), "occurs twice"),
        (_set("per_episode", "success", 0, value=0), "success_rate is 0.42857"),
        (_set("grasp_rate", value=0.9), "grasp_rate is 0.9"),
        (_set("success_low", value=float("nan")), "success_low is nan"),
    ],
)
def test_damage_is_named(evaluation, tmp_path, change, message):
    path = write_evaluation(evaluation, tmp_path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=message) as caught:
        read_evaluation(path)
    assert "VR-X_train.json" in str(caught.value)


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        read_evaluation(tmp_path / "none.json")
    path = tmp_path / "half.json"
    path.write_text('{"env": "VR')
    with pytest.raises(UserError, match="not valid JSON"):
        read_evaluation(path)
    path.write_text("[1]")
    with pytest.raises(UserError, match="does not hold an evaluation"):
        read_evaluation(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not valid JSON"):
        read_evaluation(path)


FILM = {
    "frames": np.zeros((2, 3, 4, 4, 3), np.uint8),
    "success": np.array([True, False]),
    "instructions": np.array(["a", "b"]),
    "episode_ids": np.array([0, 1]),
}


def header(shape: str, descr: str = "|u1") -> bytes:
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("frames", np.uint8(3)),
        ("frames", np.zeros((2, 3, 0, 0, 3), np.uint8)),
        ("frames", np.zeros((2, 0, 4, 4, 3), np.uint8)),
        ("frames", np.zeros((2, 3, 4, 4, 4), np.uint8)),
        ("frames", np.zeros((2, 3, 4, 4, 3), np.uint16)),
        ("frames", np.zeros((2, 3, 4, 12), np.uint8)),
        ("frames", b"no array"),
        ("frames", header("(100000000000000000000000,)")),
        ("frames", header("(2, 3, 4, 4, 1099511627776)")),
        ("frames", header("(" * 3000 + ")" * 3000)),
        ("frames", header("(2, 3, 4, 4, 3")),
        ("frames", header("(2,)", "|O")),
        ("success", np.bool_(1)),
        ("success", np.ones((2, 2), bool)),
        ("success", np.ones(3, bool)),
        ("success", np.ones(2)),
        ("instructions", np.array("a")),
        ("instructions", np.array([1, 2])),
        ("episode_ids", np.array([np.inf, 1.0])),
        ("episode_ids", np.array([[0], [1]])),
        ("episode_ids", np.array(["x", "y"])),
        ("episode_ids", None),
    ],
)
def test_films_of_other_arrays_are_named(tmp_path, name, value):
    path = tmp_path / "film.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for key, array in {**FILM, name: value}.items():
            if isinstance(array, bytes):
                archive.writestr(f"{key}.npy", array)
            elif array is not None:
                with archive.open(f"{key}.npy", "w") as file:
                    np.save(file, array)
    with pytest.raises(UserError, match="is not a film") as caught:
        read_film(path)
    assert "\n" not in str(caught.value)


def test_a_film_from_a_machine_of_another_byte_order_is_read(tmp_path):
    ids = FILM["episode_ids"].astype(">i8")
    np.savez(tmp_path / "film.npz", **{**FILM, "episode_ids": ids})
    assert read_film(tmp_path / "film.npz").episode_ids == (0, 1)


def test_a_pipe_is_no_film(tmp_path):
    os.mkfifo(tmp_path / "film.npz")
    with pytest.raises(UserError, match="not a plain file"):
        read_film(tmp_path / "film.npz")


def test_damaged_films_are_named(evaluation, tmp_path):
    path = film_path(write_evaluation(evaluation, tmp_path))
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"not an archive"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="not a film"):
            read_film(path)
    np.savez(path, frames=np.zeros((1, 5, 2, 2, 3), np.uint8))
    with pytest.raises(UserError, match="not a film"):
        read_film(path)
    np.savez(path, **{name: np.array([{}]) for name in ("frames", "success")})  # pickled
    with pytest.raises(UserError, match="not a film"):
        read_film(path)
    with pytest.raises(UserError, match="does not exist"):
        read_film(tmp_path / "none.npz")
