"""What studies resolve to: cells of their own, shared where they are the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from roadvla.errors import UserError
from roadvla.experiments.budgets import BUDGETS, FULL, SMOKE, base_experiment
from roadvla.experiments.grid import Grid, build_grid
from roadvla.experiments.methods import CONTROLS, PPO, ROAD, VARIANTS
from roadvla.experiments.paper_studies import STUDIES, Study
from roadvla.train.serialize import difference

ROOT = Path("/root-of-a-study")


def base(budget=FULL, *, sim="tabletop"):
    return base_experiment(budget, sim=sim, policy="tiny", checkpoint=None, device="cpu")


def grid(*names: str, budget=FULL, seeds=(0, 1, 2), sim="tabletop", **choice) -> Grid:
    return build_grid(
        [STUDIES[name] for name in names],
        base=base(budget, sim=sim),
        budget=budget,
        seeds=seeds,
        root=ROOT,
        command="roadvla study",
        **choice,
    )


def runs(made: Grid):
    return [cell for cell in made.cells.values() if cell.experiment is not None]


def test_settings_that_share_a_training_distribution_share_runs():
    made = grid("table1")
    # 4 distributions x 2 methods x 3 seeds, and the warm-up
    assert len(made.cells) == 25
    shared = [c for c in runs(made) if len(c.envs) == 4]
    assert len(shared) == 6
    assert shared[0].envs == (
        *("VR-UnseenTable", "VR-DynamicTexture", "VR-DynamicNoise", "ER-InitPose"),
    )
    cells = made.studies[0].cells["road"]
    assert cells["VR-UnseenTable"] == cells["ER-InitPose"] != cells["ER-Repositioning"]


def test_studies_share_what_is_the_same():
    together = grid("table1", "table2", "alpha")
    ppo = [c for c in runs(together) if c.method == "ppo"]
    assert len(ppo) == 12
    names = {s.name: s.cells["ppo"]["VR-UnseenTable"]["0"] for s in together.studies}
    assert len(set(names.values())) == 1
    assert names["table1"] == grid("table5", "alpha").studies[1].cells["ppo"]["VR-UnseenTable"]["0"]


@pytest.mark.parametrize("sim", ["tabletop", "maniskill"])
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=lambda b: b.name)
def test_every_study_resolves(sim, budget):
    made = grid(*STUDIES, budget=budget, seeds=budget.seeds, sim=sim)
    folders = [cell.experiment.output for cell in runs(made)]
    assert len(folders) == len(set(folders))
    if budget != SMOKE:  # whose few iterations leave no room between the critics' shares
        assert len({cell.identity for cell in made.cells.values()}) == len(made.cells)
    for cell in runs(made):
        cell.experiment.check_complete()
        assert set(cell.needs) <= made.cells.keys()
        assert cell.curve[-1] == cell.experiment.iterations(
            {"tabletop": 30 if cell.experiment.env == "ER-Repositioning" else 24}.get(sim, 80)
        )
        assert set(cell.curve) <= set(cell.experiment.kept_iterations)
    for study in made.studies:
        assert study.warmup in made.cells
        for by_env in study.cells.values():
            assert set(by_env) == set(study.settings)


def test_a_reference_critic_is_a_checkpoint_that_is_saved():
    made = grid("reference", "readings")
    for cell in runs(made):
        for path in (cell.experiment.init, cell.experiment.algorithm.reference_critic):
            if path is None or "warmup" in path:
                continue
            run, checkpoint = Path(path).parts[-3], Path(path).name
            source = made.cells[run].experiment
            iteration = int(checkpoint.removeprefix("iteration_"))
            assert iteration in source.kept_iterations
            assert run in cell.needs
            assert source.seed == cell.seed


def test_critics_are_frozen_where_the_paper_froze_them():
    made = grid("reference", seeds=(0,))
    at = {
        cell.method: int(str(cell.experiment.algorithm.reference_critic)[-6:])
        for cell in runs(made)
        if cell.experiment.env == "VR-UnseenTable" and cell.method != "ppo"
    }
    assert at == {
        "road-critic-24": 12,
        "road-critic-48": 24,
        "road-critic-72": 36,
        "road-critic-96": 48,
        "road": 50,
    }
    extra = {c.method: c.extra_env_steps for c in runs(made) if len(c.envs) and c.seed == 0}
    assert extra["ppo"] == 0


def test_steps_taken_before_are_counted():
    cells = {c.method: c for c in runs(grid("readings", seeds=(0,)))}
    step = 64 * 24
    assert cells["road"].extra_env_steps == 50 * step
    assert cells["ppo-double"].extra_env_steps == 0
    assert cells["ppo-double"].experiment.rollout.total_env_steps == 100 * step
    continued = cells["road-continued"]
    total = continued.experiment.rollout.total_env_steps + continued.extra_env_steps
    assert total == 50 * step
    assert str(continued.experiment.init) == continued.experiment.algorithm.reference_critic


def test_methods_differ_from_ppo_in_what_they_say_alone():
    cells = {
        c.method: c.experiment
        for c in runs(grid("readings", "table2", "alpha", seeds=(0,), settings=("VR-UnseenTable",)))
    }
    free = {"name", "output", "algorithm.reference_critic", "kept_iterations"}
    said = {
        "road": {"algorithm.algo"},
        "ppo-mix": {"algorithm.surrogate_advantage"},
        "road-alpha-0": {"algorithm.algo", "algorithm.alpha"},
        "road-ungated": {"algorithm.algo", "algorithm.gate"},
        "ppo-rate-0.0002": {"optimizer.learning_rate"},
        "ppo-epochs-1": {"algorithm.epochs"},
        "ppo-shuffled": {"algorithm.control"},
        "grpo": {"algorithm.algo"},
    }
    for name, differs in said.items():
        assert set(difference(cells["ppo"], cells[name])) - free == differs, name


def test_every_defined_variant_is_there_once_and_has_its_controls():
    assert len(VARIANTS) == 20
    assert len({tuple(sorted(v.algorithm.items())) for v in VARIANTS}) == 20
    assert len(CONTROLS) == 2 * (2 + 20)
    names = [method.name for method in STUDIES["readings"].methods]
    assert len(names) == len(set(names))


def test_an_identity_follows_what_decides_the_outcome(monkeypatch):
    def name(**changes) -> str:
        made = build_grid(
            [Study(name="s", title="", methods=(PPO, ROAD), settings=("VR-UnseenTable",))],
            base=replace(base(), **changes),
            budget=FULL,
            seeds=(0,),
            root=ROOT,
            command="",
        )
        return made.studies[0].cells["road"]["VR-UnseenTable"]["0"]

    assert name() == name(device="cuda", name="other", keep_checkpoints="last")
    optimizer = replace(base().optimizer, learning_rate=2e-4)
    assert name() != name(optimizer=optimizer)
    before = name()
    monkeypatch.setattr("roadvla.experiments.grid.definition", lambda sim: "other")
    assert name() != before


def test_a_choice_runs_less_and_leaves_the_study_as_it_is():
    whole = grid("alpha")
    part = grid("alpha", only=("road-alpha-*",), settings=("VR-UnseenTable",))
    assert part.studies == whole.studies
    evaluated = {cell.method for cell in runs(part) if cell.envs}
    assert evaluated == {"road-alpha-0", "road-alpha-1"}
    assert part.cells[part.studies[0].warmup].envs == ("VR-UnseenTable",)
    assert whole.cells[whole.studies[0].warmup].envs == ("VR-UnseenTable", "ER-Repositioning")
    # PPO is trained, for its critic is needed, but not measured.
    assert {cell.method for cell in runs(part)} == {*evaluated, "ppo"}


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ({"only": ("rod*",)}, "unknown method 'rod\\*'"),
        ({"settings": ("CR-MultiObject",)}, "unknown setting 'CR-MultiObject'"),
    ],
)
def test_a_choice_that_fits_nothing_is_refused(choice, says):
    with pytest.raises(UserError, match=says):
        grid("alpha", **choice)


def test_smoke_takes_few_steps():
    made = grid("table1", budget=SMOKE, seeds=(0,))
    steps = sum(cell.experiment.rollout.total_env_steps for cell in runs(made))
    assert steps < 10_000
