from __future__ import annotations

import errno
import json
import os
from dataclasses import fields, replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from probes import TablePolicy
from roadvla import cli
from roadvla.errors import UserError
from roadvla.policy import BACKBONE_FOLDER
from roadvla.train.demonstrations import Demonstrations, load_demonstrations, save_demonstrations


def demonstrations() -> Demonstrations:
    generator = torch.Generator().manual_seed(0)
    return Demonstrations(
        image=torch.randint(0, 256, (5, 4, 4, 3), generator=generator).to(torch.uint8),
        action=torch.arange(35.0).view(5, 7) % 4,
        episode_index=torch.tensor([0, 0, 0, 1, 1]),
        step_index=torch.tensor([0, 1, 2, 0, 1]),
        instructions=("put a on b", "ça et là"),
        origin={"env": "E", "gain": [0.5, 0.8]},
    )


def test_what_is_saved_is_read_back(tmp_path):
    path = tmp_path / "new" / "file.safetensors"
    save_demonstrations(demonstrations(), path)
    got, expected = load_demonstrations(path), demonstrations()
    for field in fields(Demonstrations):
        a, b = getattr(got, field.name), getattr(expected, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert [p.name for p in path.parent.iterdir()] == ["file.safetensors"]


def test_steps_come_with_their_own_instruction_and_tokens():
    class Telling(TablePolicy):
        def tokenize(self, instructions):
            return torch.tensor([[len(text)] for text in instructions])

    observation, tokens = demonstrations().select(Telling(), torch.tensor([4, 1]))
    assert observation.prompt.tolist() == [[8], [10]]
    assert torch.equal(observation.image, demonstrations().image[[4, 1]])
    assert torch.equal(tokens, demonstrations().action[[4, 1]].long())


def test_sampling_follows_its_generator():
    def draw(seed):
        return demonstrations().sample(TablePolicy(), 100, torch.Generator().manual_seed(seed))

    assert torch.equal(draw(0).action_tokens, draw(0).action_tokens)
    assert not torch.equal(draw(0).action_tokens, draw(1).action_tokens)
    assert len({tuple(row) for row in draw(0).action_tokens.tolist()}) == 4


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no demonstrations at .*gone"):
        load_demonstrations(tmp_path / "gone")


@pytest.mark.parametrize("size", [0, 3, 60, -1])
def test_a_truncated_file_is_refused(tmp_path, size):
    path = tmp_path / "file"
    save_demonstrations(demonstrations(), path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"damaged.*roadvla warmup"):
        load_demonstrations(path)


ABOUT = {"format": 1, "instructions": ["a", "b"], "origin": {}}


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        (None, "not a file of demonstrations"),
        ({"demonstrations": "{"}, "not a file of demonstrations"),
        ({"demonstrations": "[]"}, "not a file of demonstrations"),
        ({"demonstrations": json.dumps({**ABOUT, "instructions": 3})}, "not a file of"),
        ({"demonstrations": json.dumps({**ABOUT, "format": 2})}, "format 2, expected 1"),
        (
            {"demonstrations": json.dumps({**ABOUT, "instructions": ["a"]})},
            "none of the 1 episodes",
        ),
    ],
)
def test_a_wrong_header_is_refused(tmp_path, metadata, says):
    path = tmp_path / "file"
    save_demonstrations(demonstrations(), path)
    save_file(load_file(path), path, metadata=metadata)
    with pytest.raises(UserError, match=says):
        load_demonstrations(path)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("image", None, "image is missing"),
        ("image", torch.zeros(5, 4, 4, 3), "not torch.uint8"),
        ("action", torch.zeros(5, 6), "7 finite numbers"),
        ("action", torch.full((5, 7), float("nan")), "7 finite numbers"),
        ("action", torch.zeros(4, 7), "different numbers of steps"),
        ("episode_index", torch.tensor([0, 0, 0, 1, 2]), "none of the 2 episodes"),
        ("episode_index", torch.tensor([0, 0, 0, 1, -1]), "none of the 2 episodes"),
        ("step_index", torch.zeros(5), "not torch.int64"),
        ("image", torch.zeros(5, 4, 4, 5, dtype=torch.uint8), r"its frames are \(4, 4, 5\)"),
        ("image", torch.zeros(5, 0, 0, 3, dtype=torch.uint8), r"its frames are \(0, 0, 3\)"),
        ("action", torch.tensor(1.0), "action is missing or not torch.float32 2-D"),
        ("zzz", torch.tensor(1.0), "holds 'zzz', which demonstrations do not have"),
        ("x\n" * 50, torch.ones(5), "which demonstrations do not have"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_tensors_that_do_not_fit_are_refused(tmp_path, name, value, says):
    path = tmp_path / "file"
    save_demonstrations(demonstrations(), path)
    tensors = load_file(path)
    tensors.pop(name, None)
    if value is not None:
        tensors[name] = value
    save_file(tensors, path, metadata={"demonstrations": json.dumps(ABOUT)})
    with pytest.raises(UserError, match=says) as caught:
        load_demonstrations(path)
    assert "\n" not in str(caught.value)


def test_what_is_no_plain_file_or_too_large_is_not_opened(tmp_path, monkeypatch):
    for name in ("file", "part-000000.safetensors"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(UserError, match="not a plain file"):
            load_demonstrations(tmp_path / name)
    with pytest.raises(UserError, match="not a plain file"):
        load_demonstrations(tmp_path)
    large = tmp_path / "large"
    save_demonstrations(demonstrations(), large)
    os.truncate(large, 110 << 30)
    with pytest.raises(UserError, match=r"damaged \(it has 118,\d+,\d+,\d+ bytes, more than the"):
        load_demonstrations(large)


def test_a_part_that_is_no_plain_file_is_not_opened(tmp_path):
    save_demonstrations(demonstrations(), tmp_path / "part-000000.safetensors")
    os.mkfifo(tmp_path / "part-000001.safetensors")
    with pytest.raises(UserError, match=r"part-000001.*not a plain file"):
        load_demonstrations(tmp_path)


@pytest.mark.parametrize("side", [8, 96])
def test_frames_of_another_size_than_the_policy_s_are_told(side, tmp_path, capsys):
    path = tmp_path / "file"
    save_demonstrations(
        replace(demonstrations(), image=torch.zeros(5, side, side, 3, dtype=torch.uint8)), path
    )
    line = ["train", "debug", "--algo", "sft", "--init", str(BACKBONE_FOLDER)]
    line += ["--demonstrations", str(path), "--output", str(tmp_path / "run")]
    assert cli.main(line) == 2
    said = capsys.readouterr().err
    assert f"has frames of {side} by {side}, the policy sees 48 by 48" in said
    assert said.count("\n") == 1


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    save_demonstrations(demonstrations(), path)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    changed = replace(demonstrations(), instructions=("x", "y"))
    with pytest.raises(UserError, match="No space left"):
        save_demonstrations(changed, path)
    assert load_demonstrations(path).instructions == demonstrations().instructions
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
