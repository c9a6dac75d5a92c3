from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from test_update import make_batch

from probes import TablePolicy, load_table, save_table
from roadvla.errors import UserError
from roadvla.policy import load_backbone, load_tiny, save_policy
from roadvla.train.checkpoint import (
    Progress,
    good_checkpoint,
    latest_checkpoint,
    policy_folder,
    read_progress,
    restore_optimizer,
    save_checkpoint,
)
from roadvla.train.config import Algorithm, Optimizer
from roadvla.train.update import make_optimizer, update

FORMAT_1 = Path(__file__).parents[1] / "golden/checkpoint_format_1/checkpoints"
SETTINGS = Optimizer(learning_rate=0.05, minibatch=16)


def progress(iteration=3):
    return Progress(iteration=iteration, env_steps=64 * iteration, episodes=16, config="abc")


def trained(*, value_only=False):
    policy = TablePolicy()
    optimizer = make_optimizer(policy, SETTINGS)
    generator = torch.Generator().manual_seed(5)
    _go_on(policy, optimizer, generator, value_only=value_only)
    return policy, optimizer, generator


def _go_on(policy, optimizer, generator, *, value_only=False):
    update(
        policy,
        optimizer,
        make_batch(),
        Algorithm(),
        SETTINGS,
        temperature=1.0,
        generator=generator,
        value_only=value_only,
    )


def save(root, state, iteration=3, **options):
    return save_checkpoint(root, progress(iteration), *state, save_policy=save_table, **options)


@pytest.mark.parametrize("value_only", [False, True])
def test_a_restored_run_goes_on_bit_for_bit(tmp_path, value_only):
    state = trained(value_only=value_only)
    folder = save(tmp_path, state)
    policy, generator = load_table(folder), torch.Generator()
    optimizer = make_optimizer(policy, SETTINGS)
    restore_optimizer(folder, policy, optimizer, generator)
    _go_on(*state)
    _go_on(policy, optimizer, generator)
    assert torch.equal(policy.table, state[0].table)
    assert torch.equal(policy.value_head, state[0].value_head)
    assert torch.equal(generator.get_state(), state[2].get_state())
    for mine, theirs in zip(policy.parameters(), state[0].parameters(), strict=True):
        a, b = optimizer.state[mine], state[1].state[theirs]
        assert a.keys() == b.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert read_progress(folder) == progress()


def test_moments_lie_in_memory_as_their_parameters_do(tmp_path):
    """The fused optimiser pairs them by their place in memory, whatever their strides say."""

    def step(policy, optimizer, seed):
        torch.manual_seed(seed)
        for parameter in (*policy.policy_parameters(), *policy.value_parameters()):
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()

    policy = load_backbone()
    optimizer, generator = make_optimizer(policy, SETTINGS), torch.Generator()
    assert not all(parameter.is_contiguous() for parameter in policy.policy_parameters())
    step(policy, optimizer, 0)
    state = policy, optimizer, generator
    folder = save_checkpoint(tmp_path, progress(), *state, save_policy=save_policy)
    again = load_tiny(folder)
    restored = make_optimizer(again, SETTINGS)
    restore_optimizer(folder, again, restored, generator)
    step(policy, optimizer, 1)
    step(again, restored, 1)
    for (name, mine), theirs in zip(policy.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_nothing_is_left_but_the_last_two_checkpoints(tmp_path):
    state = trained()
    for iteration in (1, 2, 3):
        save(tmp_path, state, iteration)
    left = ["iteration_000002", "iteration_000003", "latest.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == left
    assert json.loads((tmp_path / "latest.json").read_text()) == {
        "iteration": 3,
        "folder": "iteration_000003",
    }
    assert sorted(p.name for p in (tmp_path / "iteration_000003").iterdir()) == [
        "manifest.json",
        "optimizer.safetensors",
        "policy.json",
        "policy.safetensors",
        "state.json",
    ]


def test_all_checkpoints_are_kept_when_asked(tmp_path):
    state = trained()
    save(tmp_path, state, 1, keep_all=True)
    save(tmp_path, state, 2, keep_all=True)
    assert latest_checkpoint(tmp_path) == tmp_path / "iteration_000002"
    assert (tmp_path / "iteration_000001").is_dir()


def test_chosen_checkpoints_are_kept(tmp_path):
    state = trained()
    for iteration in range(1, 6):
        save(tmp_path, state, iteration, kept=(2, 7))
    assert sorted(p.name for p in tmp_path.glob("iteration_*")) == [
        *("iteration_000002", "iteration_000004", "iteration_000005"),
    ]


def test_an_abandoned_folder_is_replaced(tmp_path):
    state = trained()
    save(tmp_path, state, 1)
    for name in ("iteration_000002", ".iteration_000002.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rubbish").write_text("x")
    folder = save(tmp_path, state, 2)
    assert not (folder / "rubbish").exists()


@pytest.mark.parametrize("keep_all", [False, True])
def test_what_an_interrupted_save_left_goes_with_the_next(tmp_path, keep_all):
    state = trained()
    abandoned = tmp_path / ".iteration_000001.partial"
    abandoned.mkdir()
    (abandoned / "policy.safetensors").write_text("half")
    save(tmp_path, state, 2, keep_all=keep_all)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iteration_000002", "latest.json"]


@pytest.mark.parametrize("call", range(10))  # nine writes reach the disk; the tenth is none
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, call):
    state = trained()
    kept = save(tmp_path, state, 1)
    calls = []
    real = os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == call + 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    if call < 9:
        with pytest.raises(UserError, match=r"No space left on device.*intact.*--resume"):
            save(tmp_path, state, 2)
    else:
        save(tmp_path, state, 2)
    monkeypatch.undo()
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    assert read_progress(latest).iteration in (1, 2)
    assert call >= 8 or latest == kept
    found, passed_over = good_checkpoint(tmp_path)
    assert found is not None
    assert passed_over == ""
    assert read_progress(found).iteration == (1 if call < 6 else 2)
    policy = load_table(latest)
    restore_optimizer(latest, policy, make_optimizer(policy, SETTINGS), torch.Generator())
    assert not list(tmp_path.glob(".*partial*/*"))


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_truncated_optimiser_is_refused(tmp_path, size):
    folder = save(tmp_path, trained())
    path = folder / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    _refused(folder, "damaged")


def test_a_flipped_bit_is_noticed(tmp_path):
    folder = save(tmp_path, trained())
    path = folder / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    _refused(folder, "checksum")


def test_missing_files_are_named(tmp_path):
    folder = save(tmp_path, trained())
    (folder / "optimizer.safetensors").unlink()
    _refused(folder, r"optimizer\.safetensors")
    (folder / "state.json").unlink()
    with pytest.raises(UserError, match=r"state\.json is missing"):
        read_progress(folder)


def test_another_policy_s_optimiser_is_refused(tmp_path):
    class Wider(TablePolicy):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(torch.zeros(4, 7, 9))

    class Renamed(TablePolicy):
        def __init__(self):
            super().__init__()
            self.other, self.table = self.table, None

        def policy_parameters(self):
            return [self.other]

    folder = save(tmp_path, trained())
    for policy in (Wider(), Renamed()):
        with pytest.raises(UserError, match="does not fit the policy"):
            restore_optimizer(folder, policy, make_optimizer(policy, SETTINGS), torch.Generator())


def _refused(folder, says):
    policy = TablePolicy()
    with pytest.raises(UserError, match=says):
        restore_optimizer(folder, policy, make_optimizer(policy, SETTINGS), torch.Generator())


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("format", 3, r"format 3, expected one of \[1, 2\]: if a newer roadvla"),
        ("format", None, "format None"),
        ("format", 2, r"manifest\.json is missing"),
        ("iteration", "3", "iteration is '3'"),
        ("episodes", None, "episodes is None"),
        ("env_steps", True, "env_steps is True"),
        ("config", None, "config is None"),
    ],
)
def test_a_damaged_state_of_format_1_is_refused(tmp_path, name, value, says):
    """Later formats have a checksum for it."""
    folder = Path(shutil.copytree(FORMAT_1, tmp_path / "checkpoints")) / "iteration_000006"
    data = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**data, name: value}))
    with pytest.raises(UserError, match=says):
        read_progress(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"folder": "iteration_9"}', '{"folder": 3}'])
def test_a_damaged_pointer_is_refused(tmp_path, text):
    (tmp_path / "latest.json").write_text(text)
    with pytest.raises(UserError, match=r"latest\.json"):
        latest_checkpoint(tmp_path)


def test_people_may_point_at_a_policy_a_checkpoint_or_a_run(tmp_path):
    run = tmp_path / "run"
    folder = save(run / "checkpoints", trained())
    assert policy_folder(run) == policy_folder(run / "checkpoints") == policy_folder(folder)
    with pytest.raises(UserError, match="is not a folder"):
        policy_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"runs/ppo is not a folder \(seen from /.*\): expected"):
        policy_folder(Path("runs/ppo"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no policy\.json"):
        policy_folder(tmp_path / "empty")
