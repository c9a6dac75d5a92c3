"""OpenVLA through the commands: warm-up, PPO, ROAD, evaluation, report, export, and bad input.

The checkpoint is random and tiny, so that nothing is learned; frames are resized for it as a real
one's are.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from roadvla import cli
from roadvla.evaluation.files import read_evaluation
from roadvla.policy import load_policy
from roadvla.policy.openvla.policy import OpenVLAPolicy, load_openvla, make_openvla
from roadvla.policy.openvla.tiny_checkpoint import TinySizes, TinyTower, write_tiny_checkpoint
from roadvla.policy.settings import OpenVLASettings
from roadvla.train import trainer as trainers
from roadvla.train.demonstrations import load_demonstrations
from roadvla.train.metrics import read_metrics
from roadvla.train.run_folder import load_experiment
from roadvla.train.trainer import Trainer
from roadvla.types import Observation

SIZES = TinySizes(
    dino=TinyTower(width=16, depth=2, heads=2),
    siglip=TinyTower(width=16, depth=2, heads=2),
    hidden=32,
    intermediate=48,
    layers=2,
    heads=4,
    kv_heads=2,
    image_size=56,
)
LORA = ("--dtype", "float32", "--lora-rank", 4, "--lora-alpha", 8, "--inference-batch", 2)
# Three iterations of 2 × 24 steps, the first for the value head alone.
SMALL = (
    *("--num-envs", 2, "--total-env-steps", 144, "--minibatch", 9, "--accumulation", 2),
    *("--epochs", 1, "--value-only-iterations", 1, "--learning-rate", 1e-3),
    *("--checkpoint-every", 1, "--keep-checkpoints", "all"),
    *("--evaluation.every", 0, "--evaluation.final-episodes", 2),
)
LAST = "checkpoints/iteration_000003"
ADAPTER, HEAD = "adapter_model.safetensors", "value_head.safetensors"
# The inference batch does not divide these.
EVAL = ("--env", "VR-UnseenTable", "--episodes", 3)

Run = Callable[..., str]


def roadvla(*arguments: object) -> None:
    assert cli.main([str(argument) for argument in arguments]) == 0


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command that must be refused, and return its one line."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert cli.main([str(argument) for argument in arguments]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("roadvla: error: ")
        assert len(line) < 500
        return line

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a warm-up, a PPO run and a ROAD run from it with the PPO run's critic."""
    folder = tmp_path_factory.mktemp("openvla")
    write_tiny_checkpoint(folder / "base", sizes=SIZES)
    flags = ("--episodes", 4, "--steps", 4, "--batch", 8, "--minibatch", 3, "--learning-rate", 1e-2)
    start = ("--policy", "openvla", "--checkpoint", folder / "base", *LORA)
    roadvla("warmup", *start, *flags, "--output", folder / "warmup")
    flags = (*start, "--init", folder / "warmup", *SMALL)
    roadvla("train", "tabletop-ppo", *flags, "--output", folder / "ppo")
    critic = ("--reference-critic", folder / "ppo")
    roadvla("train", "tabletop-road", *flags, *critic, "--output", folder / "road")
    return folder


def train_flags(folder: Path, output: Path) -> tuple[object, ...]:
    base = ("--policy", "openvla", "--checkpoint", folder / "base")
    return (*base, *LORA, "--init", folder / "warmup", *SMALL, "--output", output)


def rows(run: Path) -> list[dict[str, Any]]:
    """The course of a run without what depends on the machine."""
    measured = ("time/", "memory/")
    return [
        {name: value for name, value in row.items() if not name.startswith(measured)}
        for row in read_metrics(run)
    ]


def same(a: Path, b: Path) -> bool:
    mine, theirs = load_file(a), load_file(b)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def seen(policy: OpenVLAPolicy, folder: Path) -> Observation:
    steps = load_demonstrations(folder / "warmup" / "demonstrations.safetensors")
    return steps.select(policy, torch.arange(0, 30, 5))[0]


# The whole path.


def test_the_warm_up_leaves_an_adapter_and_not_the_base(folder: Path) -> None:
    warm = folder / "warmup"
    assert {path.name for path in warm.iterdir()} == {
        *("policy.json", ADAPTER, "adapter_config.json", HEAD),
        *("config.json", "demonstrations.safetensors", "warmup.json"),
    }
    description = json.loads((warm / "policy.json").read_text())
    assert (description["kind"], description["checkpoint"]) == ("openvla", str(folder / "base"))
    assert description["settings"]["lora_rank"] == 4
    history = json.loads((warm / "warmup.json").read_text())
    assert history[-1]["loss/total"] < history[0]["loss/total"]


@pytest.mark.parametrize("name", ["ppo", "road"])
def test_a_run_leaves_what_it_should(folder: Path, name: str) -> None:
    run = folder / name
    assert [row["env_steps"] for row in rows(run)] == [48, 96, 144]
    assert {path.name for path in (run / LAST).iterdir()} == {
        *("policy.json", ADAPTER, "adapter_config.json", HEAD),
        *("optimizer.safetensors", "state.json", "manifest.json"),
    }
    config = json.loads((run / "config.json").read_text())
    assert (config["policy"], config["openvla"]["lora_rank"]) == ("openvla", 4)
    assert rows(run)[-1]["policy/kl"] > 0
    for split in ("train", "test"):
        result = read_evaluation(run / f"evaluation/VR-UnseenTable_{split}.json")
        assert (result.iteration, result.checkpoint) == (3, LAST)


def test_value_only_iterations_leave_the_adapter_alone(folder: Path) -> None:
    first = folder / "ppo" / "checkpoints" / "iteration_000001"
    assert same(first / ADAPTER, folder / "warmup" / ADAPTER)
    assert not same(first / HEAD, folder / "warmup" / HEAD)
    assert rows(folder / "ppo")[0]["policy/kl"] == 0.0
    assert not same(folder / "ppo" / LAST / ADAPTER, first / ADAPTER)


def test_only_road_consults_the_reference_critic(folder: Path) -> None:
    ppo, road = rows(folder / "ppo"), rows(folder / "road")
    assert not any("guidance/agreement" in row or "loss/agd" in row for row in ppo)
    assert all(0 <= row["guidance/agreement"] <= 1 for row in road)
    assert all(row["loss/agd"] > 0 for row in road[1:])
    assert road[0]["rollout/return"] == ppo[0]["rollout/return"]
    assert not same(folder / "road" / LAST / ADAPTER, folder / "ppo" / LAST / ADAPTER)


def test_a_run_is_evaluated_and_reported(folder: Path, tmp_path: Path) -> None:
    roadvla("eval", folder / "road", *EVAL, "--output", tmp_path / "eval")
    result = read_evaluation(tmp_path / "eval" / "VR-UnseenTable_test.json")
    assert (result.iteration, result.checkpoint) == (3, str(folder / "road" / LAST))
    runs = (folder / "ppo", folder / "road")
    roadvla("report", *runs, "--output", tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "tabletop-ppo" in text
    assert "tabletop-road" in text


def test_an_exported_run_acts_as_the_run_does(folder: Path, tmp_path: Path) -> None:
    to = tmp_path / "merged"
    roadvla("export", folder / "road", "--to", to, "--dtype", "float32")
    run = load_openvla(folder / "road" / LAST)
    merged = make_openvla(str(to), OpenVLASettings(dtype="float32"))
    observation = seen(run, folder)
    tokens = run.act(observation, temperature=0.0).action_tokens
    for mine, theirs in zip(
        run.evaluate(observation, tokens), merged.evaluate(observation, tokens), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


# A base without adapters.


def test_a_bare_checkpoint_is_evaluated(
    folder: Path, refused: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = ("eval", "--policy", "openvla", "--checkpoint", folder / "base", *EVAL)
    roadvla(*base, "--dtype", "float32")
    run = Path("runs/eval-base")
    result = read_evaluation(run / "evaluation" / "VR-UnseenTable_test.json")
    assert (result.checkpoint, result.iteration) == (str(folder / "base"), None)
    assert json.loads((run / "config.json").read_text())["openvla"]["dtype"] == "float32"
    assert "with another --norm-key, --dtype or --preprocess" in refused(*base)
    assert "holds an evaluation of 3 episodes" in refused(
        *base, "--dtype", "float32", "--episodes", 2
    )
    roadvla(*base, "--force", "--set", "train")
    assert [path.stem for path in (run / "evaluation").iterdir()] == ["VR-UnseenTable_train"]
    roadvla("report", run)
    roadvla(*base, "--output", "elsewhere")
    roadvla(*base[:-1], 4, "--output", "elsewhere")
    other = write_tiny_checkpoint(tmp_path / "base", sizes=SIZES, seed=1)
    line = refused("eval", "--checkpoint", other, *EVAL, "--output", "elsewhere")
    assert f"{folder / 'base'}, not {other}" in line


def test_a_base_says_how_it_is_passed_and_is_not_overwritten(folder: Path, refused: Run) -> None:
    base = folder / "base"
    assert f"--policy openvla --checkpoint {base}" in refused("eval", base, *EVAL)
    flags = ("--policy", "openvla", "--checkpoint", base, *LORA)
    for command in (("warmup",), ("train", "tabletop-ppo", *SMALL)):
        line = refused(*command, *flags, "--output", base, "--force")
        assert f"{base} holds a base checkpoint: choose another --output" in line
    assert (base / "config.json").exists()


def test_force_does_not_remove_the_base(folder: Path, refused: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder / "warmup", run)
    shutil.copytree(folder / "base", run / "base")
    flags = ("--policy", "openvla", "--checkpoint", run / "base", *LORA, "--output", run)
    for command in (("warmup",), ("train", "tabletop-ppo", *SMALL)):
        line = refused(*command, *flags, "--force")
        assert f"{run / 'base'} lies in {run}" in line


# Going on.


class CrashError(Exception):
    pass


def test_a_resumed_run_equals_an_uninterrupted_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = trainers.update, []

    def crash(*args: Any, **options: Any) -> Any:
        calls.append(0)
        if len(calls) == 3:
            raise CrashError
        return real(*args, **options)

    run, critic = tmp_path / "road", ("--reference-critic", folder / "ppo")
    monkeypatch.setattr(trainers, "update", crash)
    with pytest.raises(CrashError):
        roadvla("train", "tabletop-road", *train_flags(folder, run), *critic)
    monkeypatch.undo()
    assert len(rows(run)) == 2
    roadvla("train", "--resume", run)
    for name in (ADAPTER, HEAD, "optimizer.safetensors"):
        assert same(run / LAST / name, folder / "road" / LAST / name), name
    assert (run / LAST / "state.json").read_text() == (
        folder / "road" / LAST / "state.json"
    ).read_text()
    assert rows(run) == rows(folder / "road")


# The reference critic.


def test_reference_values_are_the_ppo_run_s_own(folder: Path) -> None:
    trainer = Trainer(load_experiment(folder / "road"), None, None)
    live = trainer.policy
    assert isinstance(live, OpenVLAPolicy)
    observation = seen(live, folder)
    names = {id(p): name for name, p in live.named_parameters()}
    before = {name: p.detach().clone() for name, p in live.named_parameters()}
    mine, acted = live.value(observation), live.act(observation, temperature=0.0)
    reference = trainer._reference
    assert reference is not None
    values = reference.value(observation)
    expected = load_openvla(folder / "ppo" / LAST).value(observation)
    torch.testing.assert_close(values, expected, atol=0, rtol=0)
    assert not torch.allclose(values, mine)
    # The live policy is as it was, and what is trained is still what is trained.
    assert all(torch.equal(p, before[name]) for name, p in live.named_parameters())
    assert torch.equal(live.value(observation), mine)
    again = live.act(observation, temperature=0.0)
    assert torch.equal(again.action_tokens, acted.action_tokens)
    trained = [names[id(p)] for p in (*live.policy_parameters(), *live.value_parameters())]
    assert sorted(trained) == sorted(n for n, p in live.named_parameters() if p.requires_grad)


def test_a_critic_that_never_learned_is_no_reference(
    folder: Path, refused: Run, tmp_path: Path
) -> None:
    command = ("train", "tabletop-road", *train_flags(folder, tmp_path / "run"))
    line = refused(*command, "--reference-critic", folder / "warmup")
    assert "its value head was never trained: name a finished PPO run" in line
    adapter = rl4vla_adapter(folder, tmp_path / "adapter")
    (adapter / HEAD).unlink()
    line = refused(*command, "--reference-critic", adapter)
    assert "has no value head: name a PPO run" in line
    assert not (tmp_path / "run").exists()


# Adapters of RL4VLA's.


def rl4vla_adapter(folder: Path, to: Path) -> Path:
    """A folder as peft writes it, without this program's description."""
    to.mkdir()
    for name in (ADAPTER, "adapter_config.json", HEAD):
        shutil.copy(folder / "ppo" / LAST / name, to)
    return to


def test_an_adapter_folder_is_evaluated_and_continued(folder: Path, tmp_path: Path) -> None:
    adapter = rl4vla_adapter(folder, tmp_path / "adapter")
    roadvla("eval", adapter, *EVAL, "--dtype", "float32")
    roadvla("eval", folder / "ppo", *EVAL, "--output", tmp_path)
    mine = read_evaluation(adapter / "evaluation" / "VR-UnseenTable_test.json")
    assert mine.success == read_evaluation(tmp_path / "VR-UnseenTable_test.json").success
    flags = ("--policy", "openvla", *LORA, *SMALL, "--total-env-steps", 48)
    start = ("--init", adapter, "--output", tmp_path / "run")
    roadvla("train", "tabletop-ppo", *flags, *start)
    # One iteration, for the value head alone: the adapter is the one that was given.
    done = tmp_path / "run" / "checkpoints" / "iteration_000001"
    assert same(done / ADAPTER, adapter / ADAPTER)


# Other ways to train it.


@pytest.mark.parametrize(
    "flags",
    [
        ("--algo", "grpo", "--group-size", 2),
        pytest.param(
            ("--algo", "road", "--alpha", 0, "--teacher-logits", "rollout"), marks=pytest.mark.slow
        ),
        ("--algo", "road", "--hints", "plan", "--divergence", "jsd"),
        ("--dtype", "bfloat16"),
        ("--activation-checkpointing", "--preprocess", "pil", "--no-lora-lm-head"),
    ],
)
def test_other_settings_run_too(folder: Path, tmp_path: Path, flags: tuple[object, ...]) -> None:
    base = ("--policy", "openvla", "--checkpoint", folder / "base", *LORA)
    small = (*SMALL, "--total-env-steps", 96, "--evaluation.final-episodes", 0)
    roadvla("train", "tabletop-ppo", *base, *small, "--output", tmp_path / "run", *flags)
    last = tmp_path / "run" / "checkpoints" / "iteration_000002"
    assert all(tensor.dtype == torch.float32 for tensor in load_file(last / ADAPTER).values())
    assert isinstance(load_policy(last), OpenVLAPolicy)


@pytest.mark.slow
def test_supervised_fine_tuning_on_demonstrations(folder: Path, tmp_path: Path) -> None:
    base = ("--policy", "openvla", "--checkpoint", folder / "base", *LORA, "--algo", "sft")
    file = ("--demonstrations", folder / "warmup" / "demonstrations.safetensors")
    roadvla("train", "tabletop-ppo", *base, *SMALL, *file, "--output", tmp_path / "run")
    table = rows(tmp_path / "run")
    assert table[-1]["loss/policy"] < table[0]["loss/policy"]


# Bad input.


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--lora-rank 8", "has rank 4 and alpha 8, not 8 and 8: pass --lora-rank 4"),
        ("--no-lora-lm-head", "pass --lora-lm-head"),
        ("--norm-key bridge_orig", "no action statistics for norm key 'bridge_orig'"),
        ("--checkpoint {tmp}/other", "whose weights are not those of"),
        ("--checkpoint {tmp}/nowhere", "no checkpoint at"),
        ("--init {tmp}/nowhere", "nowhere is not a folder"),
        ("--init {backbone}", "describes a policy of kind 'tiny'"),
        ("--policy tiny", "would not be used by policy 'tiny'"),
        ("--device cuda:7", "is not available here"),
        ("--lora-rank 0", "lora_rank is 0"),
        ("--dtype float16", "unknown --dtype 'float16'"),
    ],
)
def test_bad_input(folder: Path, refused: Run, tmp_path: Path, flags: str, said: str) -> None:
    write_tiny_checkpoint(tmp_path / "other", sizes=SIZES, seed=1)
    backbone = Path(trainers.__file__).parents[1] / "policy" / "weights" / "tiny-backbone"
    more = [flag.format(tmp=tmp_path, backbone=backbone) for flag in flags.split()]
    line = refused("train", "tabletop-ppo", *train_flags(folder, tmp_path / "run"), *more)
    assert said in line
    assert not (tmp_path / "run").exists()


def test_a_tiny_run_says_that_it_is_none_of_openvla_s(folder: Path, refused: Run) -> None:
    line = refused("train", "debug", "--init", folder / "warmup")
    assert "holds a policy of kind 'openvla': pass --policy openvla" in line
    line = refused("eval", folder / "warmup", "--policy", "tiny", *EVAL)
    assert "pass --policy openvla" in line
    line = refused("eval", folder / "warmup", "--norm-key", "bridge_orig", *EVAL)
    assert "no action statistics for norm key 'bridge_orig'" in line


def test_changed_weights_under_the_same_name_are_noticed(
    folder: Path, refused: Run, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "moved", ignore=shutil.ignore_patterns("road", "ppo"))
    warm, other = tmp_path / "moved" / "warmup", tmp_path / "moved" / "base"
    roadvla("eval", warm, *EVAL, "--checkpoint", other)
    write_tiny_checkpoint(other, sizes=SIZES, seed=2, force=True)
    assert "whose weights are not those of" in refused("eval", warm, *EVAL, "--checkpoint", other)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("act", "in the rollout (inference_batch 2, num_envs 2): try --inference-batch 1, or"),
        (
            "evaluate",
            "in the update (minibatch 9, accumulation 2, activation checkpointing off): try "
            "--minibatch 4 --accumulation 4, or --activation-checkpointing",
        ),
    ],
)
def test_out_of_memory_says_what_to_try(
    folder: Path,
    refused: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    said: str,
    error: Exception,
) -> None:
    def exhaust(*_: object, **__: object) -> None:
        raise error

    run = tmp_path / "run"
    shutil.copytree(folder / "ppo", run)
    shutil.rmtree(run / "checkpoints" / "iteration_000003")
    (run / "checkpoints" / "latest.json").write_text('{"folder": "iteration_000002"}')
    monkeypatch.setattr(OpenVLAPolicy, method, exhaust)
    line = refused("train", "--resume", run)
    assert f"out of memory {said}" in line
    assert f"the last checkpoint is {run / 'checkpoints' / 'iteration_000002'}" in line


def test_out_of_memory_elsewhere(
    folder: Path, refused: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhaust(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("roadvla.policy.openvla.adapted.ReferenceCritic.value", exhaust)
    flags = (*train_flags(folder, tmp_path / "run"), "--reference-critic", folder / "ppo")
    line = refused("train", "tabletop-road", *flags)
    assert "out of memory in the reference pass (inference_batch 2, num_envs 2)" in line
    assert "there is no checkpoint yet" in line
    monkeypatch.setattr(OpenVLAPolicy, "evaluate", exhaust)
    base = ("--policy", "openvla", "--checkpoint", folder / "base", *LORA)
    small = ("--episodes", 1, "--steps", 1, "--batch", 8, "--output", tmp_path / "warm")
    line = refused("warmup", *base, *small)
    assert "out of memory in the warm-up (minibatch 8 of batch 8, activation checkpointing" in line
    assert "try --minibatch 4, or --activation-checkpointing" in line
    assert not (tmp_path / "warm").exists()
    monkeypatch.setattr(OpenVLAPolicy, "act", exhaust)
    line = refused("eval", folder / "ppo", *EVAL, "--output", tmp_path, "--inference-batch", 7)
    assert "out of memory in the evaluation (inference_batch 7, num_envs 3)" in line
    assert "try --inference-batch 1" in line
    monkeypatch.setattr(OpenVLAPolicy, "__init__", exhaust)
    line = refused("eval", folder / "ppo", *EVAL, "--output", tmp_path)
    assert "out of memory in loading the policy (device cpu, dtype float32" in line
    assert "try --dtype bfloat16" in line


_WITHOUT = """
import json, sys
sys.modules["transformers"] = None
from roadvla.cli import main
sys.exit(sum(main(arguments) != 2 for arguments in json.loads(sys.argv[1])))
"""


def test_without_the_extra_it_says_what_to_install(folder: Path, tmp_path: Path) -> None:
    commands = (
        ("train", "tabletop-ppo", *train_flags(folder, tmp_path / "run")),
        ("eval", folder / "ppo", *EVAL),
        ("eval", "--checkpoint", folder / "base", *EVAL),
        ("export", folder / "ppo", "--to", tmp_path / "to"),
        ("make-tiny-openvla", tmp_path / "tiny"),
    )
    given = json.dumps([[str(part) for part in command] for command in commands])
    program = [sys.executable, "-c", _WITHOUT, given]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(commands)
    assert all('pip install "roadvla[openvla]"' in line for line in lines)
