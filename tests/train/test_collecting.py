from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from roadvla.envs import ManiSkillSettings, make_env
from roadvla.envs.base import Step
from roadvla.errors import UserError
from roadvla.experiments.demonstration_commands import demos
from roadvla.train import collecting
from roadvla.train.collecting import collect, describe
from roadvla.train.collection import Collection, Record, read_record
from roadvla.train.demonstrations import Demonstrations, load_demonstrations, save_demonstrations
from roadvla.train.experts import expert_of
from roadvla.train.interrupt import Preempted
from roadvla.train.lock import locked
from roadvla.train.trajectories import act_out, keeps

FIRST = 1_000_000_000_000


class Lift:
    """Ten steps; an object is on its plate from step 2 on, held until the gripper opens."""

    horizon, image_shape, device = 10, (2, 2, 3), torch.device("cpu")

    def __init__(self, num_envs):
        self.num_envs = num_envs
        self.instructions = [f"lift {b}" for b in range(num_envs)]
        self.lost = torch.zeros(num_envs, dtype=torch.bool)

    def reset(self, episode_ids):
        self.ids, self.t = episode_ids, 0
        return self._image()

    def step(self, action):
        self.t += 1
        success = torch.full((self.num_envs,), self.t > 2)
        success &= ~(self.lost & (torch.tensor(self.t) == self.horizon))
        info = {"success": success}
        none = torch.zeros(self.num_envs, dtype=torch.bool)
        return Step(self._image(), none.float(), none, none, info)

    def _image(self):
        levels = (self.ids % 16 * 16 + self.t).to(torch.uint8)
        return levels[:, None, None, None].expand(-1, 2, 2, 3).contiguous()


def opening_at(*when):
    """Open in the steps given, per environment; never if ``None``."""

    def act(env, gain, generator):
        action = torch.zeros(env.num_envs, 7)
        action[:, 0] = 0.02
        for b, step in enumerate(when):
            action[b, 6] = step is not None and env.t >= step
        return action

    return act


def run(act, *, tail=2, drop_small=False, lost=()):
    env = Lift(3)
    env.lost[list(lost)] = True
    generator, gain = torch.Generator(), torch.ones(3)
    ids = torch.arange(100, 103)
    return act_out(env, ids, act, gain, generator, tail=tail, drop_small=drop_small)


def test_an_episode_is_cut_some_steps_after_success_with_the_gripper_open():
    succeeded, kept = run(opening_at(0, 5, 9))
    assert succeeded == [100, 101, 102]
    # success is there after action 2; opened before it, in action 5, and in the last, action 9
    assert [len(each.action) for each in kept] == [3 + 2, 6 + 2, 10]
    assert [each.episode_id for each in kept] == [100, 101, 102]
    assert [each.instruction for each in kept] == ["lift 0", "lift 1", "lift 2"]
    assert kept[1].image[:, 0, 0, 0].tolist() == [(101 % 16) * 16 + t for t in range(8)]
    assert kept[1].action[:, 6].tolist() == [0] * 5 + [1] * 3
    assert [len(each.action) for each in run(opening_at(0, 5, 9), tail=0)[1]] == [3, 6, 10]


def test_success_that_is_lost_and_objects_never_let_go_of_are_left_out():
    succeeded, kept = run(opening_at(0, None, 5), lost=[0])
    assert succeeded == [101, 102]
    assert [each.episode_id for each in kept] == [102]


def test_the_tabletop_is_cut_as_the_warm_up_cuts_it():
    env = make_env("VR-UnseenTable", split="train", num_envs=8)
    ids, gain = torch.arange(8), torch.full((8,), 0.7)
    act = expert_of("tabletop", 0.1)
    _, kept = act_out(
        env, ids, act, gain, torch.Generator().manual_seed(3), tail=4, drop_small=False
    )
    env.reset(ids)
    generator, successes = torch.Generator().manual_seed(3), []
    for _ in range(env.horizon):
        successes.append(env.step(act(env, gain, generator)).info["success"].clone())
    success = torch.stack(successes)
    lasting = success[-1].nonzero().flatten().tolist()
    assert len(lasting) > 4
    first = success.int().argmax(0)
    assert [len(each.action) for each in kept] == [int(first[b]) + 1 + 4 for b in lasting]


def test_the_filter_keeps_what_moves_turns_or_grips():
    action = torch.zeros(8, 7)
    action[1, 0] = 0.0101  # moves
    action[2, 1] = 0.0099
    action[3, :3] = torch.tensor([0.006, 0.006, 0.006])  # together 0.0104
    action[4, 5] = 0.0601  # turns
    action[5, 3:6] = torch.tensor([0.03, 0.03, 0.03])  # together 0.052
    action[6:, 6] = 1  # opens in step 6, stays open in step 7
    assert keeps(action).tolist() == [False, True, False, True, True, False, True, False]
    assert not bool(keeps(torch.ones(1, 7) * torch.tensor([0.0] * 6 + [1])).any())


def test_filtered_steps_take_their_frames_with_them():
    def act(env, gain, generator):
        action = opening_at(5, 5, 5)(env, gain, generator)
        action[:, 0] = 0.02 * (env.t % 2)
        return action

    _, kept = run(act, drop_small=True)
    # of steps 0 to 7 the odd ones move; in step 5 the gripper opens too
    assert (kept[0].image[:, 0, 0, 0] % 16).tolist() == [1, 3, 5, 7]


def settings(folder, **changes):
    plain = Collection(episodes=20, num_envs=8, output=str(folder), tail=2, noise=0.3)
    return replace(plain, **changes)


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("part-*"))}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A collection that nothing interrupted: parts of 8, 8 and 4 demonstrations, at most."""
    return collect(settings(tmp_path_factory.mktemp("whole") / "demos"))


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def again(folder, **changes):
    return collect(settings(folder, **changes))


def test_a_collection_has_what_was_asked_for(whole):
    got, record = load_demonstrations(whole), read_record(whole)
    assert len(got.instructions) == record.kept == 20
    assert got.image.shape == (len(got.action), 48, 48, 3)
    assert record.frames == len(got.action)
    assert record.finished is not None
    assert [part.first_id for part in record.parts[:3]] == [FIRST, FIRST + 8, FIRST + 16]
    assert all(set(part.kept) <= set(part.succeeded) for part in record.parts)
    assert all(
        set(part.succeeded) <= set(range(part.first_id, part.first_id + part.attempts))
        for part in record.parts
    )
    assert len({episode for part in record.parts for episode in part.kept}) == 20
    assert record.settings["noise"] == 0.3
    assert "torch" in record.about["machine"]


def test_its_actions_lead_to_its_frames(whole):
    got, record = load_demonstrations(whole), read_record(whole)
    env = make_env("VR-UnseenTable", split="train", num_envs=1)
    for number, episode in list(enumerate(e for part in record.parts for e in part.kept))[::7]:
        frame = env.reset(torch.tensor([episode]))
        assert got.instructions[number] == env.instructions[0]
        steps = got.episode_index == number
        for image, action in zip(got.image[steps], got.action[steps], strict=True):
            assert torch.equal(image, frame[0])
            frame = env.step(action[None]).image


def test_a_collection_that_another_process_works_on_is_refused(tmp_path):
    folder = tmp_path / "held"
    with locked(folder), pytest.raises(UserError, match="is in use by another process"):
        collect(settings(folder))
    assert list(folder.iterdir()) == []


def test_a_queue_s_signal_interrupts_a_collection(tmp_path):
    def stopped(env, gain, generator):
        os.kill(os.getpid(), signal.SIGTERM)
        return expert_of("tabletop", 0.3)(env, gain, generator)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="stopped by SIGTERM") as said:
        collect(settings(tmp_path / "demos"), act=stopped)
    assert said.value.code == 75
    assert signal.getsignal(signal.SIGTERM) is before
    assert [path.name for path in (tmp_path / "demos").iterdir()] == ["collection.json"]


def test_an_interrupted_collection_ends_as_if_it_had_not_been(whole, tmp_path):
    steps = 0

    def stopped(env, gain, generator):
        nonlocal steps
        steps += 1
        if steps == 2 * env.horizon - 3:  # in the second batch
            raise KeyboardInterrupt
        return expert_of("tabletop", 0.3)(env, gain, generator)

    folder = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        collect(settings(folder), act=stopped)
    assert sorted(files(folder)) == ["part-000000.safetensors"]
    assert read_record(folder).finished is None
    with pytest.raises(UserError, match="is unfinished: go on"):
        load_demonstrations(folder)
    again(folder)
    assert files(folder) == files(whole)
    assert read_record(folder).parts == read_record(whole).parts


def test_a_part_that_was_written_but_not_recorded_is_made_again(whole, tmp_path, monkeypatch):
    real = Record.write

    def killed(record, folder):
        if len(record.parts) == 2:
            raise KeyboardInterrupt
        real(record, folder)

    folder = tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(Record, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            again(folder)
    assert len(files(folder)) == 2
    assert len(read_record(folder).parts) == 1
    (folder / "part-000001.safetensors").write_bytes(b"cut off")
    again(folder)
    assert files(folder) == files(whole)


@pytest.mark.parametrize("number", [0, -1])
@pytest.mark.parametrize("harm", ["cut", "changed", "removed"])
def test_a_damaged_part_is_made_again_and_no_other(whole, copy, number, harm):
    parts = sorted(copy.glob("part-*"))
    path, data = parts[number], parts[number].read_bytes()
    if harm == "removed":
        path.unlink()
    else:
        path.write_bytes(data[:-7] if harm == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    others = {part: part.stat().st_mtime_ns for part in parts if part != path}
    if harm == "cut":
        with pytest.raises(UserError, match=rf"{path.name} is damaged.*demos collect"):
            load_demonstrations(copy)
    again(copy)
    assert files(copy) == files(whole)
    assert read_record(copy).parts == read_record(whole).parts
    assert {part: part.stat().st_mtime_ns for part in others} == others


def test_a_finished_collection_is_left_alone(copy, capsys):
    def forbidden(*_, **__):
        raise AssertionError("nothing is to be simulated")

    before = (copy / "collection.json").read_bytes()
    assert collect(settings(copy), make_env=forbidden) == copy
    assert (copy / "collection.json").read_bytes() == before
    assert "is finished: 20 of 20 are there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": 1}, "seed 0, not 1"),
        ({"episodes": 21}, "episodes 20, not 21"),
        ({"num_envs": 4}, "num_envs 8, not 4"),
        ({"split": "test"}, "split 'train', not 'test'"),
        ({"gain": (0.5, 0.8)}, r"gain \[0.55, 0.8\], not \[0.5, 0.8\]"),
        ({"drop_small": True}, "drop_small False, not True"),
        (
            {"sim": "maniskill", "maniskill": ManiSkillSettings(stand_ins=True)},
            "sim 'tabletop', not 'maniskill'",
        ),
    ],
)
def test_other_settings_do_not_go_on_with_it(copy, changes, says):
    before = files(copy)
    with pytest.raises(UserError, match=says + ": use that, or choose another --output"):
        again(copy, **changes)
    assert files(copy) == before


def test_settings_of_the_simulator_are_compared_too(copy):
    path = copy / "collection.json"
    data = json.loads(path.read_text())
    data["settings"]["maniskill"]["stand_ins"] = True
    data["settings"]["maniskill"]["processes"] = 7  # does not matter
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match="with stand_ins True, not False"):
        again(copy)


def test_a_simulator_that_has_changed_is_named(copy):
    def changed(*names, **settings):
        env = make_env(*names, split=settings["split"], num_envs=settings["num_envs"])
        env.facts = {"shader": "one_pass", "stand_in_files": ("plate",)}
        return env

    folder = copy.parent / "marked"
    collect(settings(folder), make_env=changed)
    assert read_record(folder).simulator["stand_in_files"] == ["plate"]
    assert "in place of 1 of the assets" in describe(read_record(folder))[-1]
    sorted(folder.glob("part-*"))[-1].unlink()
    sorted(copy.glob("part-*"))[-1].unlink()
    with pytest.raises(UserError, match=r"with shader None, now it would be 'one_pass'"):
        collect(settings(copy), make_env=changed)
    collect(settings(folder), make_env=changed)
    assert len(files(folder)) == len(read_record(folder).parts)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 1}', '{"format": 1, "parts": [3]}', "3"]
)
def test_a_damaged_record_is_refused(copy, text):
    (copy / "collection.json").write_text(text)
    for attempt in (again, read_record, load_demonstrations):
        with pytest.raises(UserError, match=r"collection.json is damaged"):
            attempt(copy)


def test_a_record_of_another_format_is_refused(copy):
    data = json.loads((copy / "collection.json").read_text())
    (copy / "collection.json").write_text(json.dumps({**data, "format": 2}))
    with pytest.raises(UserError, match="format 2, expected 1"):
        again(copy)


def test_folders_of_others_are_spared(copy, tmp_path):
    (copy / "collection.json").unlink()
    with pytest.raises(UserError, match="whose record is missing"):
        again(copy)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="already holds a run"):
        again(tmp_path / "run")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot write"):
        again(tmp_path / "file")


def test_batches_have_episodes_gains_and_noise_of_their_own(tmp_path):
    batches = []

    def act(env, gain, generator):
        batches.append((env, gain, generator.get_state()))
        return expert_of("tabletop", 0.3)(env, gain, generator)

    for seed in (0, 1):
        collect(settings(tmp_path / str(seed), seed=seed, episodes=12), act=act)
    horizon = batches[0][0].horizon
    starts = batches[::horizon]
    assert len(starts) >= 4
    gains = torch.stack([gain for _, gain, _ in starts])
    assert 0.55 <= float(gains.min()) < float(gains.max()) <= 0.8
    assert len(gains.flatten().unique()) == gains.numel()
    assert len({bytes(state.tolist()) for _, _, state in starts}) == len(starts)
    assert all(torch.equal(gain, gains[0]) for _, gain, _ in batches[:horizon])
    seeds = {collecting._seed(seed, number) for seed in range(20) for number in range(50)}
    assert len(seeds) == 1000
    assert min(seeds) >= 0


def test_an_expert_that_fails_is_reported_and_batches_without_success_have_no_file(tmp_path):
    def idle(env, gain, generator):
        return torch.zeros(env.num_envs, 7)

    short = settings(tmp_path / "idle", episodes=2)
    with pytest.raises(UserError, match="solved only 0 of 16 episodes of VR-UnseenTable"):
        collect(short, act=idle)
    assert [part.file for part in read_record(tmp_path / "idle").parts] == [None, None]
    assert files(tmp_path / "idle") == {}


def test_the_report_counts_attempts(whole):
    record = read_record(whole)
    lines = "\n".join(describe(record))
    assert f"of {record.attempts} attempts" in lines
    assert "20 of 20 demonstrations, finished" in lines
    record.parts[0].succeeded[:] = []
    low = sum(len(part.succeeded) for part in record.parts) / record.attempts
    assert f"{100 * low:.1f} %" in "\n".join(describe(record))
    empty = Record(settings=record.settings, about=record.about)
    assert "0 of 20 demonstrations, unfinished" in describe(empty)[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"episodes": 0},
        {"num_envs": 0},
        {"seed": -1},
        {"tail": -1},
        {"gain": (0.0, 0.5)},
        {"gain": (0.8, 0.5)},
        {"gain": (0.5, 1.5)},
        {"noise": float("nan")},
        {"sim": "tabletp"},
        {"split": "all"},
        {"maniskill": ManiSkillSettings(stand_ins=True)},
    ],
)
def test_values_out_of_range_are_refused(tmp_path, changes):
    with pytest.raises(UserError, match=r"^[^\n]*$"):
        settings(tmp_path, **changes)


def test_a_folder_is_read_as_its_parts_joined(whole):
    parts = [load_demonstrations(path) for path in sorted(whole.glob("part-*"))]
    got = load_demonstrations(whole)
    assert torch.equal(got.image, torch.cat([part.image for part in parts]))
    assert torch.equal(got.action, torch.cat([part.action for part in parts]))
    assert torch.equal(got.step_index, torch.cat([part.step_index for part in parts]))
    assert got.instructions == sum((part.instructions for part in parts), ())
    assert got.origin == parts[0].origin
    starts = got.step_index == 0
    assert got.episode_index[starts].tolist() == list(range(20))
    second = len(parts[0].instructions)
    assert got.instructions[second] == parts[1].instructions[0]
    assert int(got.episode_index[len(parts[0].action)]) == second


def test_a_warm_up_s_folder_is_read_as_its_file(whole, tmp_path):
    part = load_demonstrations(sorted(whole.glob("part-*"))[0])
    save_demonstrations(part, tmp_path / "demonstrations.safetensors")
    assert torch.equal(load_demonstrations(tmp_path).image, part.image)


def test_folders_without_demonstrations_and_mixtures_are_refused(copy, tmp_path):
    with pytest.raises(UserError, match=r"no demonstrations at .*roadvla demos collect"):
        load_demonstrations(tmp_path)
    path = copy / "part-000001.safetensors"
    part = load_demonstrations(path)
    save_demonstrations(replace(part, origin={"env": "other"}), path)
    with pytest.raises(UserError, match=r"part-000001\.safetensors was made with other settings"):
        load_demonstrations(copy)
    small = Demonstrations(
        image=part.image[:, :4, :4].contiguous(),
        action=part.action,
        episode_index=part.episode_index,
        step_index=part.step_index,
        instructions=part.instructions,
        origin=part.origin,
    )
    save_demonstrations(small, path)
    with pytest.raises(UserError, match=r"part-000001\.safetensors was made with other settings"):
        load_demonstrations(copy)


def test_the_command_collects_goes_on_and_tells(tmp_path, capsys):
    flags = ["--episodes", "3", "--num-envs", "4", "--output", str(tmp_path / "demos")]
    demos(["collect", *flags])
    told = capsys.readouterr()
    assert "3 of 3 demonstrations, finished" in told.out
    assert told.out.endswith(f"{tmp_path / 'demos'}\n")
    demos(["info", str(tmp_path / "demos")])
    assert capsys.readouterr().out in told.out
    demos(["info", str(tmp_path / "demos" / "part-000000.safetensors")])
    assert capsys.readouterr().out.startswith("3 demonstrations: env VR-UnseenTable, sim tabletop")
    with pytest.raises(UserError, match="did you mean 'collect'"):
        demos(["colect"])
    with pytest.raises(UserError, match="no demonstrations at"):
        demos(["info", str(tmp_path / "gone")])
    demos([])
    assert "collect" in capsys.readouterr().out


ASSETS = Path(
    os.environ.get("MS_ASSET_DIR") or Path(__file__).parents[2].parent / "shared" / "assets"
)
DRAWS = any(os.environ.get(name) for name in ("VK_ICD_FILENAMES", "VK_DRIVER_FILES"))


@pytest.mark.sim
@pytest.mark.skipif(importlib.util.find_spec("mani_skill") is None, reason="no mani_skill")
@pytest.mark.skipif(
    not (DRAWS or shutil.which("nvidia-smi")), reason="no GPU, and no other Vulkan device is named"
)
@pytest.mark.skipif(
    not (ASSETS / "data" / "tasks" / "rl4vla" / "more_carrot" / "model_db.json").exists(),
    reason=f"no assets in {ASSETS}",
)
def test_maniskill_s_parts_follow_from_their_number_too(tmp_path, monkeypatch):
    monkeypatch.setenv("MS_ASSET_DIR", str(ASSETS))
    wanted = Collection(
        env="Single-v1",
        sim="maniskill",
        episodes=2,
        num_envs=1,
        output=str(tmp_path / "demos"),
        drop_small=True,
        maniskill=ManiSkillSettings(image_size=(48, 64)),
    )
    folder = collect(wanted)
    before, record = files(folder), read_record(folder)
    assert record.simulator["stand_ins"] is False
    got = load_demonstrations(folder)
    assert got.image.shape[1:] == (48, 64, 3)
    assert got.instructions[0] == "put carrot on plate"
    assert int(torch.bincount(got.episode_index).min()) > 10
    assert bool((got.action[:, 6] == 0).any())
    (folder / record.parts[-1].file).unlink()
    # In new workers, and as their first batch.
    assert files(collect(wanted)) == before
