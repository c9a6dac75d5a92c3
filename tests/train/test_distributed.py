"""The same global batch gives the same learning, however many processes share it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from meeting import meet
from safetensors.torch import load_file
from torch import distributed, multiprocessing

from probes import PARTS, probe_experiment, prompt_batch
from roadvla.errors import UserError, WorkerError
from roadvla.evaluation.files import read_evaluation
from roadvla.policy import load_backbone, load_policy, save_policy
from roadvla.train.checkpoint import Progress, restore_optimizer, save_checkpoint
from roadvla.train.config import Algorithm, EvaluationConfig, Optimizer, RolloutConfig
from roadvla.train.digest import hashed, summed
from roadvla.train.divergence import check_alike
from roadvla.train.gradients import Gradients
from roadvla.train.loop import train
from roadvla.train.metrics import read_metrics
from roadvla.train.share import Share
from roadvla.train.update import make_optimizer, update
from roadvla.world import World

OPTIMIZER = Optimizer(learning_rate=0.1, value_learning_rate=0.05, minibatch=8, accumulation=2)
ROLLOUT = RolloutConfig(num_envs=16, total_env_steps=6 * 64)
PLAIN = Algorithm(epochs=2, entropy_coef=0.0)
ENDING = replace(ROLLOUT, end_on_success=True)

# What is not in the list of a scenario is as in ``probe_experiment``.
SCENARIOS = {
    "ppo": {},
    "ending": {"rollout": ENDING},
    "blocks": {"rollout": ENDING, "optimizer": replace(OPTIMIZER, blocks=4)},
    "overlap": {"rollout": replace(ROLLOUT, overlap=True)},
    "road": {"algorithm": replace(PLAIN, algo="road", alpha=0.0, teacher_logits="rollout")},
    "shuffled": {"algorithm": replace(PLAIN, control="shuffled")},
    "grpo": {"algorithm": replace(PLAIN, algo="grpo", group_size=8)},
    "kl-stop": {"algorithm": replace(PLAIN, kl_stop=0.02), "rollout": ENDING},
    "value-only": {"algorithm": replace(PLAIN, value_only_iterations=3)},
}


def perform(folder: Path, name: str) -> Path:
    changes = {
        "optimizer": OPTIMIZER,
        "rollout": ROLLOUT,
        "algorithm": PLAIN,
        "evaluation": EvaluationConfig(every=2, episodes=16, final_episodes=12),
        **SCENARIOS[name],
    }
    return train(probe_experiment(folder / name, **changes), parts=PARTS)


def _perform_all(rank: int, size: int, folder: Path, names: tuple[str, ...]) -> None:
    meet(folder / "meeting", rank, size)
    for name in names:
        perform(folder, name)
    distributed.destroy_process_group()


def spawn(size: int, folder: Path, names: tuple[str, ...]) -> Path:
    folder.mkdir()
    multiprocessing.spawn(_perform_all, (size, folder, names), nprocs=size)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    for name in SCENARIOS:
        perform(folder, name)
    return folder


@pytest.fixture(scope="module", params=[2, 4])
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("together")
    return spawn(request.param, root / "runs", tuple(SCENARIOS))


def last(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("iteration_*"))[-1]


def _counters(state: str) -> dict[str, object]:
    counters = ("iteration", "env_steps", "episodes", "config")
    return {name: value for name, value in json.loads(state).items() if name in counters}


@pytest.mark.parametrize("name", SCENARIOS)
def test_any_number_of_processes_learns_the_same(alone: Path, together: Path, name: str) -> None:
    mine, theirs = alone / name, together / name
    for file in ("policy.safetensors", "optimizer.safetensors"):
        expected, found = load_file(last(mine) / file), load_file(last(theirs) / file)
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=2e-4, atol=2e-5)
    for row, other in zip(read_metrics(mine), read_metrics(theirs), strict=True):
        assert row.keys() == other.keys()
        for key, value in row.items():
            if not key.startswith(("time/", "memory/")):
                assert other[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
    for split in ("train", "test"):
        name = f"evaluation/VR-UnseenTable_{split}.json"
        assert read_evaluation(mine / name).success == read_evaluation(theirs / name).success
    assert (last(mine) / "state.json").stat().st_size == (
        last(theirs) / "state.json"
    ).stat().st_size


def test_half_batches_are_the_whole_batch(alone: Path) -> None:
    expected = load_file(last(alone / "ppo") / "policy.safetensors")
    found = load_file(last(alone / "overlap") / "policy.safetensors")
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor)


# Who holds what, and in which order it is used.


def test_every_group_has_its_part_of_every_block() -> None:
    active = torch.ones(6, 16, dtype=torch.bool)
    active[3:, ::3] = False
    share = Share.of_rollout(active, World(), blocks=4)
    assert share.block is not None
    generator = torch.Generator().manual_seed(0)
    groups = list(share.groups(20, generator=generator, device=torch.device("cpu")))
    assert torch.cat(groups).sort().values.tolist() == list(range(int(active.sum())))
    assert max(map(len, groups)) <= 20
    sizes = share.block.bincount()
    for group in groups:
        expected = sizes * len(group) / len(share)
        assert (share.block[group].bincount(minlength=4) - expected).abs().max() <= 1


def test_blocks_are_shuffled_within() -> None:
    share = Share.of_rollout(torch.ones(8, 8, dtype=torch.bool), World(), blocks=2)
    device = torch.device("cpu")
    first = list(share.groups(16, generator=torch.Generator().manual_seed(0), device=device))
    second = list(share.groups(16, generator=torch.Generator().manual_seed(1), device=device))
    assert not torch.equal(first[0], second[0])


def test_environments_that_cannot_be_shared_are_refused() -> None:
    with pytest.raises(UserError, match="6 environments cannot be shared equally by 4 processes"):
        World(0, 4).rows(6)


# Parameters that do not lie in memory in the order of their indices.


def test_gradients_lie_in_memory_as_their_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "all_reduce", lambda *_, **__: _Done())
    monkeypatch.setattr(World, "total", lambda _, tensor: tensor)
    turned = torch.nn.Parameter(torch.randn(3, 4).t())
    plain = torch.nn.Parameter(torch.randn(5))
    unused = torch.nn.Parameter(torch.randn(2))
    gradients = Gradients([turned, plain, unused], World(0, 2), chunk_bytes=16)
    gradients.open()
    gradients.expect(last=True)
    (turned.square().sum() + plain.sum()).backward()
    gradients.close()
    assert turned.grad is not None
    assert turned.grad.stride() == turned.stride()
    assert torch.equal(turned.grad, 2 * turned.detach())
    assert plain.grad is not None
    assert plain.grad.tolist() == [1.0] * 5
    assert unused.grad is None
    gradients.end()


class _Done:
    def wait(self) -> None: ...


def test_a_resumed_optimizer_goes_on_where_parameters_are_laid_out_otherwise(
    tmp_path: Path,
) -> None:
    """The small VLA's output table is; a fused optimiser walks memory, not indices."""
    policy = load_backbone("cpu")
    assert any(not parameter.is_contiguous() for parameter in policy.policy_parameters())
    optimizer, batch = make_optimizer(policy, Optimizer()), prompt_batch(policy, 32)
    generator = torch.Generator().manual_seed(0)
    options = {"temperature": 1.0, "generator": generator}
    update(policy, optimizer, batch, Algorithm(), Optimizer(), **options)
    progress = Progress(iteration=1, env_steps=1, episodes=1, config="")
    where = save_checkpoint(
        tmp_path, progress, policy, optimizer, generator, save_policy=save_policy
    )
    resumed = load_policy(where)
    other = make_optimizer(resumed, Optimizer())
    restored = torch.Generator()
    restore_optimizer(where, resumed, other, restored)
    update(policy, optimizer, batch, Algorithm(), Optimizer(), **options)
    update(resumed, other, batch, Algorithm(), Optimizer(), temperature=1.0, generator=restored)
    pairs = zip(policy.parameters(), resumed.parameters(), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


# Processes that do not agree.


def _compare(rank: int, folder: Path) -> None:
    world, weight = meet(folder / "meeting", rank), torch.nn.Parameter(torch.arange(5.0))
    optimizer, generator = torch.optim.AdamW([weight]), torch.Generator()
    weight.grad = torch.ones(5)
    optimizer.step()
    check_alike(optimizer, generator, world, 3, str)
    moment, place = optimizer.state[weight]["exp_avg"], torch.arange(5)
    place[:2] = torch.tensor([rank, 1 - rank])
    swapped = weight.detach()[place].clone()
    moved = weight.detach().clone()
    moved[2] += rank * torch.finfo(torch.float32).eps
    told = "of the 2 processes are no longer.*iteration 4: .*kept it"
    for values in (moved, swapped):
        before = weight.detach().clone()
        weight.data.copy_(values)
        with pytest.raises(WorkerError, match=f"the weights {told}"):
            check_alike(optimizer, generator, world, 4, lambda: "kept it")
        weight.data.copy_(before)
    moment[0] += rank
    with pytest.raises(WorkerError, match=f"the optimizer states {told}"):
        check_alike(optimizer, generator, world, 4, lambda: "kept it")
    moment[0] = 0
    torch.rand(1 + rank, generator=generator)
    with pytest.raises(WorkerError, match=f"the random generators {told}"):
        check_alike(optimizer, generator, world, 4, lambda: "kept it")
    assert world.agree(7)
    assert not world.agree(rank)
    (folder / f"told-{rank}").touch()
    distributed.destroy_process_group()


def test_processes_that_drift_apart_in_one_bit_are_noticed_by_all(tmp_path: Path) -> None:
    multiprocessing.spawn(_compare, (tmp_path,), nprocs=2)
    assert len(list(tmp_path.glob("told-*"))) == 2


@pytest.mark.parametrize("digest", [hashed, summed])
def test_a_digest_sees_bits_and_their_places(digest: Callable[..., int]) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    found = {digest([values])}
    for index in range(0, 1000, 37):
        other = values.clone()
        other.view(torch.int32)[index] ^= 1 << (index % 31)
        found.add(digest([other]))
    found |= {digest([values.flip(0)]), digest([values.roll(1)])}
    found |= {digest(values.split(500)), digest(values.split(500)[::-1])}
    found |= {digest([values.bfloat16()]), digest([values[:0]])}
    assert len(found) == 1 + 28 + 2 + 2 + 2
    assert digest([values]) == digest([values.reshape(10, 100)])


# The real thing, as people start it.

SMALL = """
    debug --num-envs 8 --total-env-steps 768 --minibatch 32 --accumulation 2 --epochs 1
    --value-only-iterations 1 --evaluation.every 0 --evaluation.final-episodes 8
    --checkpoint-every 1
"""


def start(*arguments: object, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "roadvla", "train", *map(str, arguments)]
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def assert_alike(mine: Path, theirs: Path) -> None:
    one, other = load_policy(last(mine)), load_policy(last(theirs))
    batch = prompt_batch(one, 16)
    with torch.no_grad():
        for expected, found in zip(
            one.evaluate(batch.observation, batch.action_tokens),
            other.evaluate(batch.observation, batch.action_tokens),
            strict=True,
        ):
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
    assert [row["iteration"] for row in read_metrics(mine)] == [
        row["iteration"] for row in read_metrics(theirs)
    ]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference") / "run"
    code, _, err = finish(start(*SMALL.split(), "--output", folder))
    assert code == 0, err
    return folder


def test_one_command_starts_two_processes_and_one_killed_is_made_up_for(
    reference: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = start(*SMALL.split(), "--output", folder, "--nproc", 2, "--max-restarts", 1)
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints" / "latest.json").exists():
        assert process.poll() is None, finish(process)[2]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(_child(process.pid, rank=1), signal.SIGKILL)
    code, out, err = finish(process)
    assert code == 0, err
    assert out.split() == [str(folder)]
    assert_alike(reference, folder)


@pytest.mark.parametrize(("asked", "expected"), [(signal.SIGINT, 130), (signal.SIGUSR1, 75)])
def test_a_run_goes_on_with_another_number_of_processes(
    reference: Path, tmp_path: Path, asked: signal.Signals, expected: int
) -> None:
    folder = tmp_path / "run"
    process = start(*SMALL.split(), "--output", folder, "--nproc", 2)
    while not (folder / "checkpoints" / "latest.json").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(asked)
    code, _, err = finish(process)
    assert code == expected, err
    code, _, err = finish(start("--resume", folder))
    assert code == 0, err
    assert_alike(reference, folder)


def test_a_mistake_is_told_and_ends_all_processes(tmp_path: Path) -> None:
    process = start(*SMALL.split(), "--output", tmp_path / "run", "--nproc", 3)
    code, _, err = finish(process)
    assert code == 2
    assert "roadvla: error: 8 environments cannot be shared equally by 3 processes" in err
    assert "Traceback" not in err
    assert all("roadvla: error:" in line for line in err.splitlines())


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces joined by a cable: what two machines see of each other."""
    names = tuple(f"roadvla-{os.getpid()}-{number}" for number in (1, 2))
    ends = ("roadvla1", "roadvla2")
    commands = [f"ip netns add {name}" for name in names]
    commands.append(
        f"ip link add {ends[0]} netns {names[0]} type veth peer {ends[1]} netns {names[1]}"
    )
    for number, (name, end) in enumerate(zip(names, ends, strict=True), start=1):
        commands += [
            f"ip -n {name} addr add 10.77.0.{number}/24 dev {end}",
            f"ip -n {name} link set {end} up",
            f"ip -n {name} link set lo up",
        ]
    try:
        for command in commands:
            done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"no network namespaces here: {done.stderr.strip()}")
        yield names
    except FileNotFoundError:
        pytest.skip("no network namespaces here: there is no `ip`")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def test_two_hosts_learn_what_one_does(
    reference: Path, hosts: tuple[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    processes = []
    for rank, host in enumerate(hosts):
        command = [
            *("ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run"),
            *("--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(rank)),
            *("--master-addr", "10.77.0.1", "--master-port", "29500"),
            *("-m", "roadvla", "train", *SMALL.split(), "--output", str(folder)),
        ]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": f"roadvla{rank + 1}"}
        processes.append(
            subprocess.Popen(
                command,
                env={**environment, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    results = [finish(process) for process in processes]
    assert [code for code, _, _ in results] == [0, 0], results
    assert_alike(reference, folder)


def _child(parent: int, *, rank: int) -> int:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if int(stat[1]) == parent and f"RANK={rank}".encode() in variables:
            return int(folder.name)
    raise AssertionError(f"no process of rank {rank}")
