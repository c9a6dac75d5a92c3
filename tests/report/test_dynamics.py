"""The table of what was logged: first and last tenth, means over seeds, gaps left open."""

from __future__ import annotations

from pathlib import Path

from roadvla.report.dynamics import dynamics_table
from roadvla.report.runs import Run


def run(method: str, seed: int, rows: list[dict[str, float]], algo: str = "ppo") -> Run:
    metrics = tuple({"iteration": i, "env_steps": 10 * i, **row} for i, row in enumerate(rows))
    return Run(
        folder=Path("x"),
        method=method,
        seed=seed,
        env="VR-UnseenTable",
        config={"algorithm": {"algo": algo}},
        metrics=metrics,
        evaluations={},
        films={},
    )


# 20 rows, so a tenth is 2: seed 0 goes from (0+1)/2 = 0.5 to (18+19)/2 = 18.5, seed 1 one higher;
# the means over the seeds are 1 and 19. KL: mean of 0..19 is 9.5, of 1..20 is 10.5: 10.
def test_first_and_last_tenth_averaged_over_seeds() -> None:
    first = run("ppo", 0, [{"policy/entropy": i, "policy/kl": i} for i in range(20)])
    second = run("ppo", 1, [{"policy/entropy": i + 1, "policy/kl": i + 1} for i in range(20)])
    table = dynamics_table([first, second])
    row = next(line for line in table.splitlines() if line.startswith("| ppo |"))
    assert row.split(" | ")[1] == "1.00 → 19.00"
    assert row.split(" | ")[2] == "10.000"
    assert row.split(" | ")[3] == "–"


def test_without_metrics_there_is_no_table() -> None:
    assert dynamics_table([run("warm-up", 0, [], algo="sft")]) == ""
