"""Studies are grids of ordinary runs: what their cells resolve to, and that nothing runs twice."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console

from roadvla.errors import UserError
from roadvla.evaluation.evaluate import Evaluation
from roadvla.evaluation.files import evaluation_path, read_evaluation, write_evaluation
from roadvla.experiments import stages, studies
from roadvla.experiments.studies import EPOCHS, FIRST_RESULTS, STUDIES
from roadvla.train.interrupt import Interrupted
from roadvla.train.serialize import difference

OUT = Path("out")


class _BrokenPool:
    """A pool whose processes were killed."""

    def __init__(self, **_: object) -> None:
        pass

    def submit(self, *_: object) -> Future[str]:
        future: Future[str] = Future()
        future.set_exception(BrokenProcessPool("terminated abruptly"))
        return future

    def shutdown(self, **_: object) -> None:
        pass


def _write_warm_up(folder: Path, settings: stages.WarmUp) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "policy.json").write_text("{}")
    (folder / "config.json").write_text(json.dumps({"name": "warm-up", **asdict(settings)}))


def _write_checkpoint(run: Path, iteration: int) -> Path:
    """A run as far as evaluations look at it."""
    name = f"iteration_{iteration:06d}"
    folder = run / "checkpoints" / name
    folder.mkdir(parents=True)
    (run / "checkpoints" / "latest.json").write_text(json.dumps({"folder": name}))
    (folder / "policy.json").write_text("{}")
    counters = {"iteration": iteration, "env_steps": 10 * iteration, "episodes": 1}
    state = {"format": 1, **counters, "config": "", "sha256": ""}
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def _count_evaluations(monkeypatch) -> list[tuple[str, str, int]]:
    """Put a stand-in for the evaluation and note what it is asked for."""
    made: list[tuple[str, str, int]] = []

    def evaluate(policy, *, env, split, episodes, temperature, seed, **_) -> Evaluation:
        made.append((env, split, episodes))
        outcomes = (True,) * episodes
        return Evaluation(
            env=env,
            split=split,
            sim="tabletop",
            horizon=24,
            seed=seed,
            **dict.fromkeys(("success", "success_once", "grasped"), outcomes),
            **dict.fromkeys(("machine", "date", "torch"), "-"),
            temperature=temperature,
            episode_ids=tuple(range(episodes)),
            seconds=1.0,
        )

    monkeypatch.setattr(stages, "evaluate", evaluate)
    monkeypatch.setattr(stages, "load_policy", lambda folder: None)
    return made


def test_every_cell_resolves_and_has_a_name_of_its_own() -> None:
    for cells in STUDIES.values():
        experiments = [cell.experiment(OUT, 3) for cell in cells]
        assert len({e.output for e in experiments}) == len(cells)
        for experiment in experiments:
            experiment.check_complete()
            assert experiment.seed == 3
            assert experiment.init == "out/warmup"


def test_references_are_finished_before_they_are_needed() -> None:
    for cells in STUDIES.values():
        alone = {cell.name for cell in cells if cell.reference is None}
        assert {cell.reference for cell in cells if cell.reference is not None} <= alone


def test_the_first_results_compare_like_with_like() -> None:
    ppo, *others = (cell.experiment(OUT, 0) for cell in FIRST_RESULTS)
    free = {"name", "output", "algorithm.reference_critic"}
    names = {
        "road-add": {"algorithm.algo"},
        "road-replace": {
            *("algorithm.algo", "algorithm.combine"),
            *("algorithm.distill_coef", "algorithm.entropy_coef"),
        },
        "ppo-mix": {"algorithm.surrogate_advantage"},
        "agd-odd": {
            *("algorithm.algo", "algorithm.combine", "algorithm.distill_coef"),
            *("algorithm.entropy_coef", "algorithm.teacher", "algorithm.token_weighting"),
            "algorithm.distill_reduction",
        },
    }
    assert {other.name for other in others} == set(names)
    for other in others:
        assert set(difference(ppo, other)) - free == names[other.name]
        assert other.algorithm.reference_critic == "out/ppo-seed0"
        assert other.algorithm.epochs == ppo.algorithm.epochs


def test_the_epochs_study_varies_epochs_alone() -> None:
    first, *others = (cell.experiment(OUT, 0) for cell in EPOCHS)
    for other in others:
        assert set(difference(first, other)) == {"name", "output", "algorithm.epochs"}


def test_a_failing_cell_is_named_and_does_not_raise(tmp_path, monkeypatch) -> None:
    def fail(experiment):
        raise UserError("no luck")

    monkeypatch.setattr(studies, "ensure_run", fail)
    experiment = FIRST_RESULTS[0].experiment(tmp_path, 0)
    message = studies._run_cell(experiment, 8)
    assert message.startswith("no luck (see ")
    assert (tmp_path / "ppo-seed0.log").exists()


def test_a_full_disk_fails_the_cell_alone(tmp_path, monkeypatch) -> None:
    def fail(experiment):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(studies, "ensure_run", fail)
    message = studies._run_cell(FIRST_RESULTS[0].experiment(tmp_path, 0), 8)
    assert "No space left on device (see " in message
    (tmp_path / "file").write_text("")
    message = studies._run_cell(FIRST_RESULTS[0].experiment(tmp_path / "file", 0), 8)
    assert "file" in message


def test_after_ctrl_c_a_worker_starts_no_cell(tmp_path, monkeypatch) -> None:
    started = []

    def stop(experiment):
        started.append(experiment.name)
        raise Interrupted("stopped, saved at iteration_000002")

    monkeypatch.setattr(studies, "_STOP", studies._Stop())
    monkeypatch.setattr(studies, "ensure_run", stop)
    cells = [cell.experiment(tmp_path, 0) for cell in FIRST_RESULTS[:2]]
    assert studies._run_cell(cells[0], 8) == "stopped, saved at iteration_000002"
    assert studies._run_cell(cells[1], 8) == "stopped"
    assert started == ["ppo"]


def test_ctrl_c_between_cells_is_kept_for_the_next() -> None:
    stop = studies._Stop()
    stop.request()
    with pytest.raises(KeyboardInterrupt), stop.heeded():
        pytest.fail("entered")
    stop = studies._Stop()
    with pytest.raises(KeyboardInterrupt), stop.heeded():
        stop.request()


def test_a_worker_that_dies_is_one_line(tmp_path, monkeypatch) -> None:
    experiment = FIRST_RESULTS[0].experiment(tmp_path, 0)
    monkeypatch.setattr(studies, "ProcessPoolExecutor", _BrokenPool)
    with pytest.raises(UserError, match="process died, perhaps for want of memory"):
        studies._run_all([experiment], 1, 8, Console(file=io.StringIO()))
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_an_unknown_study_is_named(tmp_path) -> None:
    with pytest.raises(UserError, match="did you mean 'epochs'"):
        studies.run_study("epoch", output=tmp_path, seeds=[0], jobs=1, episodes=8)


def test_a_warm_up_is_made_once(tmp_path, monkeypatch) -> None:
    calls = []

    def run_warm_up(settings: stages.WarmUp, **flags: bool) -> Path:
        calls.append((settings, flags))
        return Path(settings.output)

    monkeypatch.setattr(stages, "run_warm_up", run_warm_up)
    settings = stages.WarmUp(output=str(tmp_path / "warm"))
    stages.ensure_warm_up(settings)
    assert calls == [(settings, {})]
    _write_warm_up(tmp_path / "warm", settings)
    assert stages.ensure_warm_up(settings) == tmp_path / "warm"
    assert len(calls) == 1
    # Cut off before the policy was written: made again.
    (tmp_path / "warm" / "policy.json").unlink()
    stages.ensure_warm_up(settings)
    assert calls[1:] == [(settings, {"force": True})]


def test_a_warm_up_with_other_settings_is_refused(tmp_path) -> None:
    settings = stages.WarmUp(output=str(tmp_path / "warm"))
    _write_warm_up(tmp_path / "warm", replace(settings, steps=10, output="elsewhere"))
    with pytest.raises(UserError, match=r"other settings \(steps 10, not 110\): choose another"):
        stages.ensure_warm_up(settings)
    _write_warm_up(tmp_path / "warm", replace(settings, gain=(0.5, 0.8)))
    with pytest.raises(UserError, match=r"\(gain \[0.5, 0.8\], not \[0.55, 0.8\]\)"):
        stages.ensure_warm_up(settings)
    for content in ("{", "[]", None):
        config = tmp_path / "warm" / "config.json"
        config.unlink() if content is None else config.write_text(content)
        with pytest.raises(UserError, match=r"choose another --output or delete it"):
            stages.ensure_warm_up(settings)


def test_an_evaluation_is_repeated_only_if_it_is_stale(tmp_path, monkeypatch) -> None:
    made = _count_evaluations(monkeypatch)
    run = tmp_path / "run"
    checkpoint = _write_checkpoint(run, iteration=60)
    stages.ensure_evaluations(run, episodes=8)
    assert len(made) == 11
    assert len({key[:2] for key in made}) == 11
    stored = read_evaluation(evaluation_path(run / "evaluation", "VR-UnseenTable", "test"))
    assert stored.checkpoint == "checkpoints/iteration_000060"
    assert (stored.iteration, stored.env_steps) == (60, 600)
    made.clear()

    stages.ensure_evaluations(run, episodes=7)
    stages.ensure_evaluations(run, episodes=8, more={"VR-UnseenTable": 8})
    assert made == []
    # Of too few episodes; four settings share the training distribution of VR-DynamicNoise.
    stages.ensure_evaluations(run, episodes=8, more={"VR-DynamicNoise": 9})
    assert made == [("VR-UnseenTable", "train", 9), ("VR-DynamicNoise", "test", 9)]
    made.clear()
    # At another temperature, of another iteration, with another seed, damaged.
    folder = run / "evaluation"
    for change in ({"temperature": 0.0}, {"iteration": 59}, {"iteration": None}, {"seed": 1}):
        write_evaluation(replace(stored, **change), folder)
        stages.ensure_evaluations(run, episodes=8)
    evaluation_path(folder, "VR-UnseenTable", "test").write_text("{")
    stages.ensure_evaluations(run, episodes=8)
    assert made == [("VR-UnseenTable", "test", 8)] * 5
    made.clear()
    # The policy was trained further.
    shutil.rmtree(checkpoint)
    _write_checkpoint(run, iteration=61)
    stages.ensure_evaluations(run, episodes=8)
    assert len(made) == 11


def test_a_warm_up_has_no_iteration(tmp_path, monkeypatch) -> None:
    made = _count_evaluations(monkeypatch)
    (tmp_path / "policy.json").write_text("{}")
    for _ in range(2):
        stages.ensure_evaluations(tmp_path, episodes=2, more={"VR-UnseenTable": 4})
    assert sorted(count for *_, count in made) == [2] * 9 + [4] * 2
    stored = read_evaluation(evaluation_path(tmp_path / "evaluation", "VR-UnseenTable", "test"))
    assert (stored.checkpoint, stored.iteration, stored.env_steps) == (".", None, None)


@pytest.mark.slow
def test_the_demo_runs_and_a_second_call_repeats_nothing(tmp_path, capsys) -> None:
    from roadvla.cli import main

    assert main(["demo", "--fast", "--output", str(tmp_path / "demo")]) == 0
    folder = tmp_path / "demo"
    report = (folder / "report" / "report.md").read_text()
    for alias in ("VR-UnseenTable", "VR-DynamicNoise", "ER-Repositioning"):
        assert f"## {alias}" in report

    def files() -> list[Path]:
        """What took time to make: policies, and the evaluations with their films."""
        results = folder.glob("*/evaluation/*")
        return [*folder.rglob("*.safetensors"), *results]

    written = {path: path.stat().st_mtime_ns for path in files()}
    last = "checkpoints/iteration_000003"
    assert {str(path.relative_to(folder)) for path in written if path.suffix == ".safetensors"} == {
        *("warmup/policy.safetensors", "warmup/demonstrations.safetensors"),
        *(f"ppo/{last}/policy.safetensors", f"ppo/{last}/optimizer.safetensors"),
        *(f"road/{last}/policy.safetensors", f"road/{last}/optimizer.safetensors"),
    }
    assert main(["demo", "--fast", "--output", str(tmp_path / "demo")]) == 0
    assert {path: path.stat().st_mtime_ns for path in files()} == written
    assert "road" in capsys.readouterr().out
