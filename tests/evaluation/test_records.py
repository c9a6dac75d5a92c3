"""Result files: what is written is read, what was changed is refused."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roadvla.errors import UserError
from roadvla.evaluation.definition import _meaning, definition
from roadvla.evaluation.records import check_comparable, read_record, write_record
from roadvla.evaluation.results import is_results, read_results, read_study, write_study
from roadvla.evaluation.sealed import read_sealed, write_sealed

sys.path.insert(0, str(Path(__file__).parents[1] / "report"))
from results_factory import outcomes, record, study, write_results

RECORD = record("ppo", "VR-UnseenTable", 0, (0.6, 0.4))


def test_a_record_is_read_as_it_was_written(tmp_path):
    path = write_record(RECORD, tmp_path)
    again = read_record(path)
    for ours, theirs in zip(RECORD.outcomes, again.outcomes, strict=True):
        for name in ("success", "success_once", "grasped"):
            assert np.array_equal(getattr(ours, name), getattr(theirs, name))
        assert ours.modes == theirs.modes
    assert replace(again, outcomes=()) == replace(RECORD, outcomes=())
    assert path.stat().st_size < 8000


@settings(max_examples=30)
@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_bits_keep_every_episode(tmp_path_factory, success):
    made = outcomes("VR-UnseenTable", "test", 0.5, 0, episodes=len(success))
    bits = np.array(success)
    made = replace(made, success=bits, success_once=bits, grasped=~bits, modes=(), mode_names=())
    folder = tmp_path_factory.mktemp("records")
    again = read_record(write_record(replace(RECORD, outcomes=(made,)), folder)).outcomes[0]
    assert again.success.tolist() == success
    assert again.grasped.tolist() == [not x for x in success]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d.update(seed=5), "was changed after it was written"),
        (lambda d: d["outcomes"][0].update(success="AAAA"), "was changed after it was written"),
        (lambda d: d.pop("sha256"), "no checksum"),
    ],
)
def test_a_record_edited_by_hand_is_refused(tmp_path, change, says):
    path = write_record(RECORD, tmp_path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=says):
        read_record(path)


def resealed(path, change):
    data = read_sealed(path)
    change(data)
    return write_sealed(path, data)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["outcomes"][0].update(episodes=900),
        lambda d: d["outcomes"][0].update(episodes=0),
        lambda d: d["outcomes"][0].update(success="%%%"),
        lambda d: d["outcomes"][0].update(split="val"),
        lambda d: d["outcomes"][0].update(modes="zz"),
        lambda d: d["outcomes"][0].update(modes="aa"),
        lambda d: d.pop("curve"),
        lambda d: d.update(more=1),
        lambda d: d.update(curve=[{"env": "x"}]),
    ],
)
def test_a_sealed_file_that_is_no_record_is_refused(tmp_path, change):
    path = resealed(write_record(RECORD, tmp_path), change)
    with pytest.raises(UserError, match="is not a result file"):
        read_record(path)


def test_a_renamed_record_is_refused(tmp_path):
    path = write_record(RECORD, tmp_path)
    with pytest.raises(UserError, match="it was renamed"):
        read_record(path.rename(tmp_path / "other.json"))


@pytest.mark.parametrize("content", ["{", "[]", '{"sha256": 1}', "\x00"])
def test_damaged_files_are_one_line(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        read_sealed(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot read"):
        read_sealed(tmp_path / "none.json")


def test_a_file_of_a_later_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("roadvla.evaluation.sealed.FORMAT", 99)
    path = write_sealed(tmp_path / "x.json", {"a": 1})
    monkeypatch.undo()
    with pytest.raises(UserError, match="another format than 1"):
        read_sealed(path)


def test_writing_is_all_or_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_record(RECORD, tmp_path / "file")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_results_of_different_versions_are_not_mixed(tmp_path):
    other = replace(RECORD, name="other", definition="fedcba987654")
    with pytest.raises(UserError, match="made by different versions of the environments"):
        check_comparable([RECORD, other])
    cooler = tuple(replace(o, temperature=0.0) for o in RECORD.outcomes)
    with pytest.raises(UserError, match=r"with temperature 0.6 and 0.0"):
        check_comparable([RECORD, replace(RECORD, name="cool", outcomes=cooler)])
    write_results(tmp_path)
    write_record(other, tmp_path / "records")
    with pytest.raises(UserError, match="run the study again in another folder"):
        read_results(tmp_path)


def test_a_results_folder_knows_what_is_missing(tmp_path):
    left_out = "road-CR-MultiObject-seed1"
    root = write_results(tmp_path, leave_out=(left_out,))
    assert is_results(root)
    results = read_results(root)
    assert results.missing(results.studies["table1"]) == [left_out]
    assert not is_results(tmp_path / "records")
    with pytest.raises(UserError, match="no study in"):
        read_results(tmp_path / "records")


def test_a_study_is_read_as_it_was_written(tmp_path):
    assert read_study(write_study(study(), tmp_path)) == study()
    path = resealed(write_study(study(), tmp_path), lambda d: d.pop("cells"))
    with pytest.raises(UserError, match="does not describe a study"):
        read_study(path)


def test_a_definition_follows_the_code_and_not_its_comments():
    code = 'def f(x):\n    """Says."""\n    return x + 1  # one more\n'
    assert _meaning(code) == _meaning("def f(x):\n\n    return (x + 1)\n")
    assert _meaning(code) != _meaning(code.replace("+ 1", "+ 2"))
    assert definition("tabletop") != definition("maniskill")
    assert len(definition("tabletop")) == 12
