"""Checksums made anew over odd moments, generators and counters: refused in one line."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import SETTINGS, save, trained

from probes import BINS, COLOURS, PARTS, TOKENS, load_table, probe_experiment
from roadvla.errors import UserError
from roadvla.privileged.mcts import SuccessTree
from roadvla.train import trainer
from roadvla.train.checkpoint import good_checkpoint, read_progress, restore_optimizer
from roadvla.train.listed import DamagedError
from roadvla.train.loop import train
from roadvla.train.update import make_optimizer
from sealing import reseal

SHAPE = (COLOURS, TOKENS, BINS)
STATE = torch.Generator().get_state()


def changed(folder, **changes):
    path = folder / "optimizer.safetensors"
    tensors = {**load_file(path), **changes}
    save_file({name: value for name, value in tensors.items() if value is not None}, path)
    reseal(folder)


def restore(folder, *, amsgrad=False):
    policy = load_table(folder)
    optimizer = make_optimizer(policy, SETTINGS)
    for group in optimizer.param_groups:
        group["amsgrad"] = amsgrad
    generator = torch.Generator().manual_seed(7)
    before = generator.get_state()
    try:
        restore_optimizer(folder, policy, optimizer, generator)
    except UserError:
        assert not optimizer.state
        assert torch.equal(generator.get_state(), before)
        raise
    return optimizer


ODD = {
    "no generator": {"generator": None},
    "a short generator": {"generator": STATE[:5].clone()},
    "an empty generator": {"generator": STATE[:0].clone()},
    "a generator of floats": {"generator": STATE.float()},
    "a generator of another kind": {"generator": STATE.view(2, -1).clone()},
    "a generator of noise": {"generator": torch.full_like(STATE, 255)},
    "a missing moment": {"table.exp_avg": None},
    "a missing square": {"table.exp_avg_sq": None},
    "a missing step": {"table.step": None},
    "a step of three": {"table.step": torch.ones(3)},
    "a step of one": {"table.step": torch.ones(1)},
    "a whole step": {"table.step": torch.tensor(3)},
    "a step that is none": {"table.step": torch.tensor(float("nan"))},
    "a negative step": {"table.step": torch.tensor(-1.0)},
    "an unknown moment": {"table.zzz": torch.zeros(SHAPE)},
    "a moment that is not used": {"table.max_exp_avg_sq": torch.zeros(SHAPE)},
    "no moment's name": {"table.": torch.zeros(SHAPE)},
    "no name": {"exp_avg": torch.zeros(3)},
    "another weight": {"other.exp_avg": torch.zeros(3)},
    "another shape": {"table.exp_avg": torch.zeros(3)},
    "other numbers": {"table.exp_avg": torch.zeros(*SHAPE, dtype=torch.float64)},
    "truth values": {"table.exp_avg": torch.zeros(*SHAPE, dtype=torch.bool)},
    "complex numbers": {"table.exp_avg": torch.zeros(*SHAPE, dtype=torch.complex64)},
    "infinity": {"table.exp_avg": torch.full(SHAPE, float("inf"))},
    "a negative square": {"table.exp_avg_sq": torch.full(SHAPE, -1.0)},
}


@pytest.mark.parametrize("changes", ODD.values(), ids=ODD)
def test_odd_tensors_are_refused_and_nothing_is_touched(tmp_path, changes):
    folder = save(tmp_path, trained())
    changed(folder, **changes)
    with pytest.raises(DamagedError, match=r"optimizer\.safetensors .*does not") as error:
        restore(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["F8_E8M0", "F4", "F6_E2M3"])
def test_numbers_of_an_unknown_kind_are_refused(tmp_path, kind):
    folder = save(tmp_path, trained())
    header = json.dumps({"x": {"dtype": kind, "shape": [4], "data_offsets": [0, 4]}}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(4)
    (folder / "optimizer.safetensors").write_bytes(data)
    reseal(folder)
    with pytest.raises(DamagedError, match="optimizer"):
        restore(folder)


def test_the_largest_square_belongs_to_amsgrad(tmp_path):
    folder = save(tmp_path, trained())
    with pytest.raises(DamagedError, match="max_exp_avg_sq"):
        restore(folder, amsgrad=True)
    tensors = load_file(folder / "optimizer.safetensors")
    squares = {n: t for n, t in tensors.items() if n.endswith(".exp_avg_sq")}
    named = {n.replace(".exp_avg_sq", ".max_exp_avg_sq"): t for n, t in squares.items()}
    changed(folder, **named)
    states = restore(folder, amsgrad=True).state.values()
    assert all("max_exp_avg_sq" in state for state in states)


@pytest.mark.parametrize("name", ["iteration", "env_steps", "episodes"])
@pytest.mark.parametrize("value", [-1, -(2**50), True, 1.0, "1", None, []])
def test_counters_count(tmp_path, name, value):
    before, folder = save(tmp_path, trained(), 1), save(tmp_path, trained(), 2)
    data = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**data, name: value}))
    reseal(folder)
    with pytest.raises(DamagedError, match=f"{name} is .*, expected a count"):
        read_progress(folder)
    assert good_checkpoint(tmp_path)[0] == before


@pytest.mark.parametrize("text", ["[]", "3", "null", "", "{", "\udcff", '"' + "x" * 99])
def test_a_state_that_is_no_object_is_refused(tmp_path, text):
    folder = save(tmp_path, trained())
    (folder / "state.json").write_bytes(text.encode(errors="surrogateescape"))
    reseal(folder)
    with pytest.raises(DamagedError, match=r"state\.json"):
        read_progress(folder)


@pytest.mark.parametrize("changes", [{"generator": STATE[:5].clone()}, {"table.exp_avg": None}])
def test_a_run_that_cannot_go_on_says_why(tmp_path, monkeypatch, changes):
    real, calls = trainer.update, []

    def interrupted(*args, **options):
        calls.append(0)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(trainer, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(probe_experiment(tmp_path / "run"), parts=PARTS)
    monkeypatch.undo()
    folder, _ = good_checkpoint(tmp_path / "run/checkpoints")
    changed(folder, **changes)
    with pytest.raises(DamagedError, match="does not"):
        train(probe_experiment(tmp_path / "run"), resume=True, parts=PARTS)


def test_odd_trees_are_refused():
    tree = SuccessTree.empty().grow(torch.zeros(2, 8), torch.zeros(2, 7), torch.ones(2)).tensors()
    assert SuccessTree.from_tensors(tree).growths == 1
    odd = {
        "q": [torch.tensor(1.0), torch.ones(1, 1), torch.full((1,), float("nan"))],
        "visits": [torch.zeros(1, dtype=torch.int64), torch.ones(1)],
        "growths": [torch.tensor([-1]), torch.tensor(1)],
        "features": [torch.zeros(1, 7), torch.full((1, 8), float("inf"))],
    }
    for name, values in odd.items():
        for value in values:
            with pytest.raises(ValueError, match=r"is|holds"):
                SuccessTree.from_tensors({**tree, name: value})
