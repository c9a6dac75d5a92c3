"""``roadvla plan``: counts against the survey of peers, what fits, and bad input."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from roadvla.cli import main
from roadvla.errors import UserError
from roadvla.experiments.plan import architecture_of, run
from roadvla.experiments.plan_budget import Memory, Time, memory_of, micro_batch, time_of
from roadvla.experiments.plan_settings import Plan, parse_size
from roadvla.experiments.presets import PAPER
from roadvla.policy.openvla.cost import OPENVLA_7B, parameters
from roadvla.policy.openvla.tiny_checkpoint import write_tiny_checkpoint

COST_PAGE = Path(__file__).parents[2] / "docs" / "cost.md"


def memory(**changes: object) -> Memory:
    return memory_of(Plan(**changes), OPENVLA_7B)  # type: ignore[arg-type]


def time(**changes: object) -> Time:
    return time_of(Plan(**changes), OPENVLA_7B)  # type: ignore[arg-type]


def said(plan: Plan) -> str:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    run(plan, console=console)
    return console.export_text()


def test_defaults_are_the_papers() -> None:
    plan = Plan()
    assert (plan.steps, plan.num_envs, plan.horizon, plan.epochs) == (850_000, 64, 80, 1)
    assert plan.batch == PAPER.optimizer.minibatch * PAPER.optimizer.accumulation == 160
    assert (plan.lora_rank, plan.inference_batch) == (32, 32)
    assert plan.iterations == 166


def test_seconds_agree_with_the_survey_of_peers() -> None:
    # One PPO iteration at 790 TFLOP/s and 4.3 TB/s with decoding in batches of 64: 85.7 s, of which
    # 27.3 prefill, 2.5 decode, 55.6 update, 0.34 for a bootstrap that the paper's setting has not.
    # They count the towers' last blocks and the whole last layer, which is never computed here.
    pieces = {piece.name: piece.seconds for piece in time(inference_batch=64).ppo}
    assert pieces["rollout: prefill"] == pytest.approx(27.3, rel=0.035)
    assert pieces["rollout: decode"] == pytest.approx(2.5, rel=0.05)
    assert pieces["update"] == pytest.approx(55.6, rel=0.03)
    # Before and after an update, 128 of the 5,120 transitions are evaluated once more.
    probe = pieces.pop("KL of the update")
    assert probe == pytest.approx(pieces["update"] * 2 * 128 / 5120 / 2.03, rel=0.01)
    assert sum(pieces.values()) == pytest.approx(85.7 - 0.34, rel=0.03)
    assert 166 * sum(pieces.values()) / 3600 == pytest.approx(3.95, rel=0.03)
    assert time().reference.seconds * 166 / 3600 == pytest.approx(1.26, rel=0.04)


def test_checkpointing_costs_another_forward_pass() -> None:
    plain = {piece.name: piece.seconds for piece in time().ppo}
    again = {piece.name: piece.seconds for piece in time(activation_checkpointing=True).ppo}
    assert again["update"] == pytest.approx(83.4, rel=0.03)
    del plain["update"], again["update"]
    assert plain == again


def test_half_the_rates_take_twice_the_time_but_for_the_simulator() -> None:
    timed = time(mfu=0.5)
    full, half = (timed.seconds(road=False, mfu=mfu) for mfu in (1.0, 0.5))
    assert half == pytest.approx(2 * full)
    waiting = time(env_seconds=0.25)
    assert waiting.environment == 0.25 * 80
    assert waiting.seconds(road=False, mfu=0.5) == pytest.approx(half + 20)
    assert waiting.hours(road=False, mfu=0.5) == pytest.approx(166 * (half + 20) / 3600)


def test_road_adds_one_prefill_per_observation() -> None:
    timed = time()
    difference = timed.seconds(road=True, mfu=1.0) - timed.seconds(road=False, mfu=1.0)
    assert difference == pytest.approx(timed.ppo[0].seconds)
    assert timed.overhead == pytest.approx(0.306, abs=0.002)
    assert time(env_seconds=1.0).overhead < timed.overhead


def test_evaluations_are_counted_on_request() -> None:
    assert time().evaluation is None
    timed = time(evaluate=True)
    # 64 episodes of 2 sets before the start and after iterations 10, 20, …, 160; 128 at the end.
    episodes = 2 * (17 * 64 + 128)
    acting = timed.ppo[0].seconds + timed.ppo[1].seconds
    added = timed.hours(road=False, mfu=1.0) - time().hours(road=False, mfu=1.0)
    assert added == pytest.approx(episodes / 64 * acting / 3600)


def test_gpus_share_environments_and_transitions() -> None:
    one, four = time(), time(gpus=4)
    for alone, shared in zip(one.ppo, four.ppo, strict=True):
        if alone.name not in ("KL of the update", "rollout: decode"):
            assert shared.seconds == pytest.approx(alone.seconds / 4)
    assert memory(gpus=4).frames == memory().frames // 4
    assert memory(gpus=4).resident == memory().resident
    assert memory(gpus=4).inference_batch == 16
    assert micro_batch(Plan(gpus=4), 1000) == (40, 4)


def test_decoding_waits_for_the_weights_once_per_batch() -> None:
    whole, halves, odd = (time(inference_batch=n).ppo[1].seconds for n in (64, 32, 48))
    assert whole < halves == pytest.approx(odd)  # 32 + 32 and 48 + 16 read the same
    slow = time(inference_batch=64, tflops=1.0).ppo[1]
    assert slow.seconds == pytest.approx(slow.flops * 5120 / 1e12)  # arithmetic decides


def test_frames_and_reserve() -> None:
    found = memory(gpu="80GB", reserve=0.1, env_memory="3GB")
    assert found.frames == 64 * 80 * 480 * 640 * 3
    assert (found.reserve, found.environment) == (8 * 10**9, 3 * 10**9)
    assert found.reference == found.resident.adapters


def test_the_micro_batch_fits_and_one_more_does_not() -> None:
    found = memory(gpu="80GB")
    room = found.capacity - found.reserve - found.fixed
    assert found.fits * found.sample <= room < (found.fits + 1) * found.sample
    assert micro_batch(Plan(), found.fits) == (20, 8)
    assert micro_batch(Plan(), 39) == (32, 5)
    assert micro_batch(Plan(), 1) == (1, 160)
    assert micro_batch(Plan(batch=8), 39) == (8, 1)


def test_a_larger_gpu_and_checkpointing_fit_more() -> None:
    plain = memory().fits
    assert memory(gpu="141GB").fits > plain
    assert memory(activation_checkpointing=True).fits > 5 * plain
    assert memory(dtype="float32").fits < plain


def test_the_least_memory_named_is_the_least(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="too small") as caught:
        run(Plan(gpu="24GB"))
    needs, least = (float(size) for size in re.findall(r"([\d.]+) GB", str(caught.value)))
    assert least < 24 < needs
    assert memory(gpu=f"{needs}GB").fits >= 1
    assert memory(gpu=f"{needs - 0.2:.1f}GB").fits == 0
    assert str(caught.value).endswith(
        "with --activation-checkpointing --inference-batch 8 --lora-rank 8"
    )
    eased = {"inference_batch": 8, "lora_rank": 8, "activation_checkpointing": True}
    assert memory(gpu="24GB", **eased).fits >= 1
    assert memory(gpu=f"{least}GB", **eased).fits >= 1
    assert memory(gpu=f"{least - 0.2:.1f}GB", **eased).fits == 0
    for name in eased:  # none of them is idle
        fewer = {key: value for key, value in eased.items() if key != name}
        assert memory(gpu="24GB", **fewer).fits == 0
    with pytest.raises(UserError, match=r"but only 26\.\d GB with --inference-batch 8$"):
        run(Plan(gpu="27GB"))


def test_a_gpu_that_nothing_helps() -> None:
    with pytest.raises(UserError, match=r"too small.* and still .*: take a larger GPU"):
        run(Plan(gpu="16GB"))
    eased = Plan(
        gpu="16GB", inference_batch=1, lora_rank=1, activation_checkpointing=True, frame=(1, 1)
    )
    with pytest.raises(UserError, match="no flag lowers it"):
        run(eased)


def test_activation_checkpointing_is_proposed_where_it_is_what_helps() -> None:
    plan = Plan(gpu="32GB", inference_batch=1, prompt_tokens=1700)
    with pytest.raises(UserError, match=r"but only .* with --activation-checkpointing$"):
        run(plan)
    assert memory_of(replace(plan, activation_checkpointing=True), OPENVLA_7B).fits


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("80GB", 80 * 10**9),
        ("80 gb", 80 * 10**9),
        ("80", 80 * 10**9),
        ("79.5GiB", int(79.5 * 2**30)),
        ("1.5TB", 15 * 10**11),
        ("0GB", 0),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, "gpu") == size


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"gpu": "lots"}, r"--gpu is 'lots': expected a size such as 80GB"),
        ({"gpu": "-80GB"}, "--gpu is '-80GB'"),
        ({"gpu": "80MB"}, "--gpu is '80MB'"),
        ({"gpu": "0GB"}, "expected a size above 0"),
        ({"env_memory": "some"}, "--env-memory is 'some'"),
        ({"gpus": 3}, "--num-envs 64 does not divide evenly among 3 GPUs"),
        ({"gpus": 64}, "--batch 160 does not divide evenly among 64 GPUs"),
        ({"gpus": 0}, "--gpus is 0: expected 1 or more"),
        ({"lora_rank": 0}, "--lora-rank is 0"),
        ({"frame": (480, 0)}, "--frame is"),
        ({"steps": 5119}, "raise it to 5120 or more"),
        ({"batch": 5121}, "--batch 5121 exceeds the 5120 transitions"),
        ({"tflops": 0.0}, "--tflops is 0"),
        ({"bandwidth": float("nan")}, "--bandwidth is nan"),
        ({"mfu": 1.01}, "--mfu is 1.01: expected a number above 0 and at most 1"),
        ({"reserve": 1.0}, "--reserve is 1"),
        ({"env_seconds": -1.0}, "--env-seconds is -1"),
    ],
)
def test_bad_numbers_are_refused(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        Plan(**changes)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"policy": "openvla-8b"}, "unknown policy 'openvla-8b': did you mean 'openvla-7b'"),
        ({"policy": "openvla"}, "add --checkpoint DIR"),
        ({"checkpoint": "openvla/openvla-7b"}, "no such folder; plan downloads nothing"),
        ({"prompt_tokens": 1786}, "at most 1785"),
    ],
)
def test_unusable_policies_are_refused(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        architecture_of(Plan(**changes))  # type: ignore[arg-type]


def test_sizes_come_from_a_checkpoint(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "tiny")
    plan = Plan(policy="openvla", checkpoint=str(folder), gpu="8GB")
    counts = parameters(architecture_of(plan))
    text = said(plan)
    assert f"{counts.stored:,}" in text
    assert str(folder)[:20] in text.replace("\n", "")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"config\.json"):
        run(Plan(checkpoint=str(tmp_path / "empty")))


def test_what_is_printed() -> None:
    text = said(Plan(gpus=2, evaluate=True, activation_checkpointing=True, env_seconds=0.5))
    assert "110,828,288" in text  # RL4VLA's list
    assert re.search(r"adapters, r 32, with lm_head ← +109,126,400", text)
    flags = "--minibatch 80 --accumulation 2 --nproc 2 --blocks 2 --activation-checkpointing"
    assert flags in text
    assert "GB of gradients per optimiser step among 2 GPUs is not counted" in text
    assert "of that, evaluations" in text
    assert "not counted: measure it" not in text
    assert max(map(len, text.splitlines()[:-2])) <= 80


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--gpu", "24GB"]) == 2
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1
    assert "roadvla: error: --gpu 24GB is too small" in complaint
    assert main(["plan", "--policy", "openvla-7b", "--gpu", "141GB", "--lora-rank", "16"]) == 0
    assert "adapters, r 16" in capsys.readouterr().out


def test_the_page_shows_what_the_command_prints() -> None:
    page = COST_PAGE.read_text(encoding="utf-8")
    assert "```\nroadvla plan --policy openvla-7b --gpu 80GB\n```" in page
    shown = [line.strip() for line in page.splitlines() if line.strip()]
    for line in said(Plan()).splitlines():
        if line.strip():
            assert line.strip() in shown


def test_the_page_shows_the_micro_batches() -> None:
    page = COST_PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+GB) \| (.*) \| (.*) \|$", page, re.MULTILINE)
    assert len(rows) == 5
    for gpu, *cells in rows:
        for cell, checkpointing in zip(cells, (False, True), strict=True):
            plan = Plan(gpu=gpu, activation_checkpointing=checkpointing)
            size, times = micro_batch(plan, memory_of(plan, OPENVLA_7B).fits)
            assert cell == f"{size} × {times}"
