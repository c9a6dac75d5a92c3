"""Studies are grids of ordinary runs: what their cells resolve to, and that nothing runs twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from roadvla.errors import UserError
from roadvla.experiments import stages, studies
from roadvla.experiments.studies import EPOCHS, FIRST_RESULTS, STUDIES
from roadvla.train.config import difference

OUT = Path("out")


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


def test_a_warm_up_is_made_once(tmp_path, monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(stages, "run_warm_up", lambda settings: calls.append(settings))
    settings = stages.WarmUp(output=str(tmp_path / "warm"))
    stages.ensure_warm_up(settings)
    assert calls == [settings]
    (tmp_path / "warm").mkdir()
    (tmp_path / "warm" / "policy.json").write_text("{}")
    assert stages.ensure_warm_up(settings) == tmp_path / "warm"
    assert len(calls) == 1


@pytest.mark.slow
def test_the_demo_runs_and_a_second_call_repeats_nothing(tmp_path, capsys) -> None:
    from roadvla.cli import main

    assert main(["demo", "--fast", "--output", str(tmp_path / "demo")]) == 0
    folder = tmp_path / "demo"
    report = (folder / "report" / "report.md").read_text()
    for alias in ("VR-UnseenTable", "VR-DynamicNoise", "ER-Repositioning"):
        assert f"## {alias}" in report
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    assert len(written) >= 7
    assert main(["demo", "--fast", "--output", str(tmp_path / "demo")]) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == written
    assert "road" in capsys.readouterr().out
