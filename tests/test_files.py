"""Files that appear whole or not at all, and what killed writers leave."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from roadvla import files
from roadvla.files import write_whole, written_beside

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
