"""Files that appear whole or not at all, and what killed writers leave."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from roadvla import files
from roadvla.evaluation.evaluate import evaluate
from roadvla.evaluation.files import write_evaluation
from roadvla.files import write_whole, written_beside
from roadvla.policy import load_backbone
from roadvla.train.demonstrations import Demonstrations, save_demonstrations
from roadvla.train.diagnosis import write_diagnosis
from roadvla.train.notes import NOTES, add_note
from roadvla.train.run_folder import clear_folder, write_json

_KILLED = """
import os, signal, sys
from pathlib import Path
from roadvla.files import write_whole, written_beside
def killed(file):
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
with written_beside(Path(sys.argv[1]), killed):
    pass
"""


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_a_file_that_is_not_finished_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "a[1].json"
    write_whole(path, b"old")

    def half(file) -> None:
        file.write(b"half")
        assert path.read_bytes() == b"old"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), written_beside(path, half):
        raise AssertionError("nothing is to be renamed")
    assert path.read_bytes() == b"old"
    assert hidden(tmp_path) == []
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path: Path) -> None:
    path, other = tmp_path / "a[1].json", tmp_path / "b.json"
    for target in (path, path, other):
        process = subprocess.run([sys.executable, "-c", _KILLED, str(target)], check=False)
        assert process.returncode == -9
    # The second attempt removed what the first one left.
    assert [name.split(".")[1] for name in hidden(tmp_path)] == ["a[1]", "b"]
    write_whole(path, b"new")
    assert [name.split(".")[1] for name in hidden(tmp_path)] == ["b"]


def test_what_another_is_writing_stays(tmp_path: Path) -> None:
    path, started, finish = tmp_path / "a.json", threading.Event(), threading.Event()

    def slow() -> None:
        with written_beside(path, lambda file: file.write(b"slow")) as temporary:
            started.set()
            assert finish.wait(20)
            temporary.replace(path)

    thread = threading.Thread(target=slow)
    thread.start()
    assert started.wait(20)
    write_whole(path, b"fast")
    assert len(hidden(tmp_path)) == 1
    finish.set()
    thread.join()
    assert path.read_bytes() == b"slow"
    assert hidden(tmp_path) == []


def test_a_file_taken_for_left_before_it_was_locked_is_begun_again(tmp_path, monkeypatch) -> None:
    real, locks = files.fcntl.flock, []

    def late(file, operation) -> None:
        locks.append(file.name)
        if len(locks) == 1:
            Path(file.name).unlink()
        real(file, operation)

    monkeypatch.setattr(files.fcntl, "flock", late)
    write_whole(tmp_path / "a.json", b"new")
    assert len(set(locks)) == 2
    assert (tmp_path / "a.json").read_bytes() == b"new"
    assert hidden(tmp_path) == []


def test_without_locks_files_are_written_and_nothing_is_removed(tmp_path, monkeypatch) -> None:
    (tmp_path / ".a.json.0.tmp").write_bytes(b"perhaps another's")

    def none(*_) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", none)
    write_whole(tmp_path / "a.json", b"new")
    assert (tmp_path / "a.json").read_bytes() == b"new"
    assert hidden(tmp_path) == [".a.json.0.tmp"]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("write", ["write_whole", "write_json", "save", "evaluation"])
def test_the_name_is_put_on_disk_after_the_renaming(write, tmp_path, monkeypatch) -> None:
    path, real = tmp_path / "VR-UnseenTable_test.json", os.fsync
    seen: list[tuple[bool, bool]] = []

    def watched(descriptor: int) -> None:
        seen.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), path.exists()))
        real(descriptor)

    if write == "evaluation":
        found = evaluate(load_backbone("cpu"), env="VR-UnseenTable", split="test", episodes=1)
    monkeypatch.setattr(os, "fsync", watched)
    if write == "write_whole":
        write_whole(path, b"x")
    elif write == "write_json":
        write_json(path, {})
    elif write == "evaluation":
        write_evaluation(found, tmp_path)
    else:
        zero = torch.zeros(1, dtype=torch.int64)
        frame, action = torch.zeros(1, 4, 4, 3, dtype=torch.uint8), torch.zeros(1, 7)
        save_demonstrations(Demonstrations(frame, action, zero, zero.clone(), ("a",), {}), path)
    assert seen == [(False, False), (True, True)]


def test_a_note_after_one_that_was_cut_off(tmp_path) -> None:
    add_note(tmp_path, 1, "first é")
    whole = (tmp_path / NOTES).read_bytes()
    add_note(tmp_path, 2, "second")
    for size in range(len(whole), len((tmp_path / NOTES).read_bytes())):
        os.truncate(tmp_path / NOTES, size)
        add_note(tmp_path, 3, "third")
        rows = [json.loads(line) for line in (tmp_path / NOTES).read_text().splitlines()]
        assert [row["note"] for row in rows] == ["first é", "third"]
        (tmp_path / NOTES).write_bytes(whole)
        add_note(tmp_path, 2, "second")


def test_a_diagnosis_is_whole_and_goes_with_its_run(tmp_path) -> None:
    about = {"iteration": 3, "reason": "x", "metrics": {}, "parameters": {}, "batch": None}
    path = write_diagnosis(tmp_path, **about, about={})
    assert json.loads(path.read_text())["reason"] == "x"
    os.link(path, tmp_path / "other")  # replaced, not written into
    write_diagnosis(tmp_path, **{**about, "reason": "y"}, about={})
    assert json.loads((tmp_path / "other").read_text())["reason"] == "x"
    (tmp_path / "mine").write_text("stays")
    clear_folder(tmp_path)
    assert sorted(found.name for found in tmp_path.iterdir()) == ["mine", "other"]
