"""The command line: what it says to bad input, and one short run of each command."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from roadvla import cli
from roadvla.evaluation import evaluate as evaluations
from roadvla.evaluation import files as evaluation_files
from roadvla.evaluation.files import film_path, read_evaluation, read_film, write_evaluation
from roadvla.experiments.presets import PRESETS
from roadvla.flags import form_of, parse, value_of
from roadvla.policy import TinyVLA, save_policy
from roadvla.policy.settings import OpenVLASettings
from roadvla.train import warmup as warmups
from roadvla.train.config import Experiment
from roadvla.train.warmup import WarmUp

Run = Callable[..., str]


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("policy")
    save_policy(TinyVLA(), folder)
    return folder


@pytest.fixture
def broken(policy: Path, tmp_path: Path) -> Path:
    """A copy of the policy, for the test to damage."""
    return Path(shutil.copytree(policy, tmp_path / "broken"))


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command that must be refused, and return its one line."""

    def run(*arguments: object) -> str:
        assert cli.main([str(argument) for argument in arguments]) == 2
        line = capsys.readouterr().err
        assert line.startswith("roadvla: error: ")
        assert line.count("\n") == 1
        assert len(line) < 500
        return line

    return run


def _roadvla(*arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "roadvla", *map(str, arguments)]
    environment = {**os.environ, **more}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("tran tabletop-road", "did you mean 'train'?"),
        ("train tabletop-raod", "unknown preset 'tabletop-raod': did you mean 'tabletop-road'?"),
        ("train --seed 3 debug", "'--seed' stands where the preset should"),
        ("train debug --algo raod", "unknown --algo 'raod': did you mean 'road'?"),
        ("train debug --eat 1", "perhaps you meant: --eta"),
        ("train debug --eta", "missing value for argument '--eta'"),
        ("train debug --eta much", "to float: 'much'; see roadvla train debug --help"),
        ("train debug --learning-rate 0", "learning_rate is 0.0"),
        ("train debug --num-envs 0", "num_envs is 0"),
        ("train debug --eta -1", "eta is -1.0: expected a number above 0"),
        ("train debug --evaluation.temperature -1", "temperature is -1.0"),
        ("train debug --combine replace", "set algo to 'road' or combine to 'add'"),
        ("train debug --reference-critic runs/ppo", "would not be used by algo 'ppo'"),
        ("train tabletop-road --output {tmp}/run", "pass --reference-critic"),
        ("train --resume {tmp}/none", "holds no run"),
        ("train debug --init {tmp}/none --output {tmp}/run", "none is not a folder"),
        ("train debug --env VR-UnseenTabel --output {tmp}/run", "did you mean 'VR-UnseenTable'?"),
        ("eval {tmp}/none --env VR-UnseenTable", "none is not a folder"),
        ("eval {tmp}", "missing from roadvla eval: --env"),
        ("eval {tmp} --env VR-UnseenTable", "holds no policy.json"),
        ("eval {policy} --env VR-UnseenTabel", "did you mean 'VR-UnseenTable'?"),
        ("eval {policy} --env VR-UnseenTable --set tset", "did you mean 'test'?"),
        ("eval {policy} --env VR-UnseenTable --episodes 0", "episodes is 0"),
        ("eval {policy} --env VR-UnseenTable --device cuda:9", "is not available here"),
        ("eval {policy} --env VR-UnseenTable --dtype float32", "would not be used by the tiny"),
        ("eval {policy} --env VR-UnseenTable --checkpoint x", "would not be used by the tiny"),
        ("eval {policy} --env VR-UnseenTable --policy openvla", "pass --policy tiny"),
        ("eval --env VR-UnseenTable", "no policy is named"),
        ("eval --env VR-UnseenTable --policy tiny --checkpoint x", "pass --policy openvla"),
        ("train debug --policy openvla --output {tmp}/run", "pass --checkpoint"),
        ("train debug --checkpoint x --output {tmp}/run", "would not be used by policy 'tiny'"),
        ("train debug --lora-rank 8 --output {tmp}/run", "would not be used by policy 'tiny'"),
        ("warmup --policy openvla --output {tmp}/run", "pass --checkpoint"),
        ("warmup --device cuda:9 --output {tmp}/run", "is not available here"),
        ("export {policy} --to {tmp}/run", "only those of OpenVLA can be exported"),
        ("export {tmp}/none --to {tmp}/run", "none is not a folder"),
        ("make-tiny-openvla {policy}", "is not empty"),
        ("plan --gpus 0", "gpus"),
        ("check-env VR-DynamicNose", "did you mean 'VR-DynamicNoise'?"),
        ("check-env nowhere:make", "No module named 'nowhere'"),
        ("report", "no run is named"),
        ("report {tmp}/none", "none is not a folder"),
        ("warmup --episodes 0", "episodes is 0"),
        ("warmup --output {policy}", "already holds a warm-up"),
        ("pretrain --output {policy}", "already holds a warm-up or another policy"),
    ],
)
def test_bad_input(command: str, said: str, refused: Run, policy: Path, tmp_path: Path) -> None:
    arguments = [part.format(tmp=tmp_path, policy=policy) for part in command.split()]
    assert said.casefold() in refused(*arguments).casefold()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("size", [0, 7, 1000, -1])
def test_truncated_weights(size: int, refused: Run, broken: Path) -> None:
    weights = broken / "policy.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    line = refused("eval", broken, "--env", "VR-UnseenTable")
    assert str(weights) in line
    assert "damaged" in line


def test_another_architecture(refused: Run, broken: Path) -> None:
    description = broken / "policy.json"
    data = json.loads(description.read_text())
    data["architecture"]["layers"] += 1
    description.write_text(json.dumps(data))
    line = refused("train", "debug", "--init", broken, "--output", broken.parent / "run")
    assert "holds another architecture's weights" in line


def test_missing_and_malformed_description(refused: Run, broken: Path) -> None:
    (broken / "policy.json").write_text("{")
    assert "is not JSON" in refused("eval", broken, "--env", "VR-UnseenTable")
    (broken / "policy.json").unlink()
    assert "holds no policy.json" in refused("eval", broken, "--env", "VR-UnseenTable")


@pytest.mark.parametrize("content", [b"", b"not a safetensors file", b"\xff" * 64])
def test_damaged_demonstrations(content: bytes, refused: Run, policy: Path, tmp_path: Path) -> None:
    file = tmp_path / "demonstrations.safetensors"
    file.write_bytes(content)
    flags = ["--init", policy, "--output", tmp_path / "run", "--demonstrations", file]
    line = refused("train", "debug", "--algo", "sft", *flags)
    assert f"{file} is damaged" in line
    assert "no demonstrations at" in refused("train", "debug", "--algo", "sft", *flags[:-1], "no")
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten(refused: Run, policy: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    line = refused("train", "debug", "--init", policy, "--output", tmp_path)
    assert "already holds a run" in line
    assert "--force" in line
    assert (tmp_path / "config.json").read_text() == "{}"


def test_a_full_disk(refused: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: list[str]) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/demo/metrics.jsonl")

    monkeypatch.setattr(cli, "_dispatch", fail)
    assert "No space left on device: 'runs/demo/metrics.jsonl'" in refused("demo")


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(_: list[str]) -> None:
        raise KeyboardInterrupt("stopped; go on\nwith --resume")

    monkeypatch.setattr(cli, "_dispatch", stop)
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == "roadvla: stopped; go on with --resume\n"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_process(encoding: str) -> None:
    done = _roadvla("eval", "runs/ppo", "--set", "tset", PYTHONIOENCODING=encoding, COLUMNS="40")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("roadvla: error: unknown --set 'tset': did you mean 'test'?")
    assert done.stderr.count("\n") == 1


def test_debugging_shows_the_traceback() -> None:
    done = _roadvla("tran", ROADVLA_DEBUG="1")
    assert done.returncode == 2
    assert done.stderr.startswith("Traceback")
    assert done.stderr.splitlines()[-1].startswith("roadvla: error: unknown command 'tran'")


def test_closed_pipe() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "roadvla", "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)
def test_a_preset_without_flags_is_itself(preset: Experiment) -> None:
    form = form_of(preset, short=("algorithm", "optimizer", "rollout", "openvla"))
    assert value_of(Experiment, parse(form, "train", [])) == preset


def test_flags_reach_their_settings() -> None:
    preset = PRESETS["tabletop-road"]
    form = form_of(preset, short=("algorithm", "optimizer", "rollout", "openvla"))
    flags = "--seed 3 --eta 0.5 --no-gate --betas 0.8 0.9 --num-envs 32 --evaluation.episodes 16"
    assert value_of(Experiment, parse(form, "train", flags.split())) == replace(
        preset,
        seed=3,
        algorithm=replace(preset.algorithm, eta=0.5, gate=False),
        optimizer=replace(preset.optimizer, betas=(0.8, 0.9)),
        rollout=replace(preset.rollout, num_envs=32),
        evaluation=replace(preset.evaluation, episodes=16),
    )


def test_openvla_s_flags_reach_their_settings() -> None:
    flags = "--policy openvla --checkpoint a/b --norm-key bridge_orig --dtype float32 --lora-rank 8"
    more = "--lora-alpha 4 --no-lora-lm-head --preprocess pil --inference-batch 5 --compile"
    settings = OpenVLASettings(
        norm_key="bridge_orig",
        dtype="float32",
        lora_rank=8,
        lora_alpha=4,
        lora_lm_head=False,
        preprocess="pil",
        inference_batch=5,
        activation_checkpointing=True,
        compile=True,
    )
    given = [*flags.split(), *more.split(), "--activation-checkpointing"]
    preset = PRESETS["tabletop-road"]
    form = form_of(preset, short=("algorithm", "optimizer", "rollout", "openvla"))
    chosen = {"policy": "openvla", "checkpoint": "a/b", "openvla": settings}
    assert value_of(Experiment, parse(form, "train", given)) == replace(preset, **chosen)
    form = form_of(WarmUp(), short=("openvla",))
    assert value_of(WarmUp, parse(form, "warmup", given)) == WarmUp(**chosen)


@pytest.mark.parametrize("command", ["", *cli._COMMANDS])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [command] * bool(command) + ["--help"]
    with contextlib.suppress(SystemExit):
        assert cli.main(arguments) == 0
    shown = capsys.readouterr()
    assert "usage" in shown.out.lower()
    assert not shown.err


def test_eval(policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--env", "VR-UnseenTable", "--set", "train", "--episodes", "4", "--record", "2"]
    assert cli.main(["eval", str(policy), *flags, "--output", str(tmp_path)]) == 0
    file = tmp_path / "VR-UnseenTable_train.json"
    result = json.loads(file.read_text())
    assert result["per_episode"]["episode_ids"] == [0, 1, 2, 3]
    assert (result["checkpoint"], result["iteration"]) == (str(policy), None)
    assert len(read_film(film_path(file)).episode_ids) == 2
    shown = capsys.readouterr().out
    assert f"{100 * result['success_rate']:.1f} %" in shown
    assert str(file) in shown


def test_eval_does_not_lose_an_earlier_result(policy: Path, refused: Run, tmp_path: Path) -> None:
    flags = ["eval", policy, "--env", "VR-UnseenTable", "--output", tmp_path, "--temperature"]

    def run(*more: object) -> None:
        assert cli.main([str(part) for part in (*flags, *more)]) == 0

    run(0.6, "--episodes", 3, "--record", 2)
    file = tmp_path / "VR-UnseenTable_test.json"
    before = (file.read_bytes(), film_path(file).read_bytes())
    line = refused(*flags, 0.6, "--episodes", 2)
    assert f"{file} holds an evaluation of 3 episodes, not 2: choose another --output" in line
    assert "--force" in line
    line = refused(*flags, 0.5, "--episodes", 3)
    assert "temperature 0.6, not 0.5" in line
    assert (file.read_bytes(), film_path(file).read_bytes()) == before
    # The same again, or more of it, loses nothing, the film included.
    run(0.6, "--episodes", 3)
    run(0.6, "--episodes", 4)
    assert read_evaluation(file).episodes == 4
    assert len(read_film(film_path(file)).episode_ids) == 2
    write_evaluation(replace(read_evaluation(file), iteration=5), tmp_path)
    assert "iteration 5, not None" in refused(*flags, 0.6, "--episodes", 4)
    run(0, "--episodes", 1, "--force")
    assert read_evaluation(file).episodes == 1


def test_check_env(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["check-env", "VR-UnseenTable"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) > 10
    assert all(line.startswith("ok ") for line in shown)


def test_check_env_of_ones_own(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(
        "from roadvla.envs import make_env\n"
        "def build(num_envs):\n"
        "    env = make_env('VR-UnseenTable', split='train', num_envs=num_envs)\n"
        "    env.image_shape = (1, 1, 3)\n"
        "    return env\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert cli.main(["check-env", "mine:build"]) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "mine:build breaks 1 of" in line
    assert "frames of the announced shape" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)]
)
def test_a_signal_saves_and_says_how_to_go_on(
    policy: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    run = tmp_path / "run"
    flags = ["--init", policy, "--output", run, "--total-env-steps", "1000000"]
    command = [sys.executable, "-m", "roadvla", "train", "debug", *flags, "--evaluation.every", "0"]
    process = subprocess.Popen([str(part) for part in command], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (run / "checkpoints" / "latest.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"roadvla train --resume {run}" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize(
    ("owner", "name", "call", "command"),
    [
        (warmups, "_accumulate", 3, "warmup --init {policy} --episodes 2 --steps 4 --output {out}"),
        (evaluations, "_run_batch", 2, "eval {policy} --env VR-UnseenTable --episodes 80 "
         "--record 2 --output {out}"),
        (evaluation_files, "_save_film", 1, "eval {policy} --env VR-UnseenTable --episodes 4 "
         "--record 2 --output {out}"),
    ],
)  # fmt: skip
def test_a_queue_s_signal_leaves_nothing_half_done(
    policy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    owner: object,
    name: str,
    call: int,
    command: str,
    number: signal.Signals,
) -> None:
    real, calls = getattr(owner, name), []

    def signalled(*args: object, **options: object) -> object:
        calls.append(0)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return real(*args, **options)

    out = tmp_path / "out"
    told = [word.format(policy=policy, out=out) for word in command.split()]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, signalled)
        assert cli.main(told) == 75
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("roadvla: stopped")
    assert "the same command" in last
    assert [path for path in out.rglob("*") if path.is_file()] == []
    assert cli.main(told) == 0
    assert [path for path in out.rglob("*") if path.name.startswith(".")] == []


def _interrupted(command: list[str], reached: Callable[[], bool]) -> tuple[int, list[str]]:
    """Start a process group, press Ctrl-C when it is time; return its code and stderr."""
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Whoever runs the tests in the background has them ignore Ctrl-C; a terminal does not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while not reached():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert "Traceback" not in stderr
    return process.returncode, stderr.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize(
    "reached",
    [
        *("warmup/policy.json", "warmup/evaluation/CR-MultiObject_test.json"),
        *("ppo/config.json", "ppo/checkpoints/latest.json"),
    ],
)
def test_ctrl_c_in_the_demo(reached: str, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    command = [sys.executable, "-m", "roadvla", "demo", "--fast", "--output", str(folder)]
    code, lines = _interrupted(command, (folder / reached).exists)
    assert code == 130, lines
    assert [line for line in lines if line.startswith("roadvla:")] == [
        "roadvla: stopped; go on with the same command: "
        f"roadvla demo --output {folder} --seed 0 --fast"
    ]


@pytest.mark.slow
def test_from_warm_up_to_report(policy: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> None:
        assert cli.main([str(argument) for argument in arguments]) == 0

    few = ["--episodes", 2, "--steps", 2]
    run("warmup", "--init", policy, "--output", tmp_path / "warmup", *few)
    start = ["--init", tmp_path / "warmup"]
    run("train", "debug", *start, "--output", tmp_path / "ppo")
    critic = ["--algo", "road", "--reference-critic", tmp_path / "ppo"]
    run("train", "debug", "--name", "road", *start, "--output", tmp_path / "road", *critic)
    again = ["eval", tmp_path / "road", "--env", "VR-UnseenTable", "--episodes"]
    run(*again, 8)
    result = json.loads((tmp_path / "road/evaluation/VR-UnseenTable_test.json").read_text())
    assert (result["iteration"], result["env_steps"]) == (3, 3 * 8 * 24)
    assert result["checkpoint"] == "checkpoints/iteration_000003"
    run("report", tmp_path / "ppo", tmp_path / "road")
    assert (tmp_path / "report" / "report.md").exists()
