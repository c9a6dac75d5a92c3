"""A plan as three tables on the terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from roadvla.experiments.plan_budget import Memory, Time
from roadvla.experiments.plan_settings import Plan
from roadvla.policy.openvla.architecture import TOWERS, Architecture
from roadvla.policy.openvla.cost import adapter_parameters, parameters
from roadvla.policy.openvla.memory import FLOAT32, trained_parameters

_NAMES = 42  # so that tables of one plan line up, within 80 columns


def print_plan(
    plan: Plan,
    architecture: Architecture,
    memory: Memory,
    chosen: tuple[int, int],
    time: Time,
    console: Console | None = None,
) -> None:
    """Print parameters, memory, time, and what to pass to ``roadvla train``.

    Args:
        plan: What was asked.
        architecture: Of the policy.
        memory: On each GPU.
        chosen: Micro-batch and accumulation.
        time: On each GPU.
        console: Where to; stdout unless given.
    """
    console = console or Console()
    console.print(_parameter_table(plan, architecture))
    console.print(_memory_table(plan, memory, chosen))
    console.print(_time_table(plan, time))
    console.print(_hours_table(plan, time))
    for line in _remarks(plan, architecture, chosen, time):
        console.print(line, highlight=False, soft_wrap=True)


def _parameter_table(plan: Plan, architecture: Architecture) -> Table:
    table = _table(f"Parameters of {plan.checkpoint or plan.policy}", "", "count")
    counts, rank = parameters(architecture), plan.lora_rank
    for name, count in zip(TOWERS, counts.towers, strict=False):
        table.add_row(f"vision tower ({name})", f"{count:,}")
    table.add_row("projector", f"{counts.projector:,}")
    table.add_row("language model", f"{counts.language_model:,}")
    table.add_row("checkpoint", f"{counts.stored:,}")
    table.add_row("of that dead, not loaded", f"{counts.dead:,}", end_section=True)
    for head in (True, False):
        for dead in (False, True):
            count = adapter_parameters(architecture, rank, lm_head=head, dead=dead)
            where = "with lm_head" if head else "without lm_head"
            named = f"adapters, r {rank}, {where}" + ", dead ones too" * dead
            mark = " ←" if (head, dead) == (plan.lora_lm_head, False) else ""
            table.add_row(named + mark, f"{count:,}")
    table.add_row("value head", f"{counts.value_head:,}")
    return table


def _memory_table(plan: Plan, memory: Memory, chosen: tuple[int, int]) -> Table:
    stays = memory.resident
    table = _table(f"Memory of each GPU, of {memory.capacity / 1e9:.4g} GB", "", "GB")
    rows = [
        (f"frozen base, {plan.dtype}", stays.base),
        ("adapters and value head, float32", stays.adapters),
        ("their gradients", stays.gradients),
        ("their AdamW moments", stays.moments),
        ("adapters in bfloat16, during updates", stays.casts),
        ("ROAD's reference critic", memory.reference),
        (f"frames of a rollout, {plan.frame[0]}×{plan.frame[1]}", memory.frames),
        ("simulator, as stated", memory.environment),
    ]
    for name, size in rows:
        if size:
            table.add_row(name, _gb(size))
    table.add_row("fixed", _gb(memory.fixed), end_section=True)
    table.add_row("acting, per observation: KV cache", _gb(memory.cache))
    table.add_row("acting, per observation: passing", _gb(memory.acting))
    table.add_row(f"acting on {memory.inference_batch} observations", _gb(memory.rollout))
    table.add_row("update, per sample", _gb(memory.sample))
    table.add_row(f"update, micro-batch {chosen[0]}", _gb(chosen[0] * memory.sample))
    table.add_row(f"reserve, {plan.reserve:.0%}", _gb(memory.reserve), end_section=True)
    used = memory.fixed + max(memory.rollout, chosen[0] * memory.sample)
    table.add_row("peak, without the reserve", _gb(used))
    return table


def _time_table(plan: Plan, time: Time) -> Table:
    rollout = f"{plan.num_envs} × {plan.horizon} steps"
    title = f"An iteration of {rollout}: TFLOP per env step, seconds on each GPU"
    table = _table(title, "", "TFLOP", "at 100 %", f"at {100 * plan.mfu:g} %")
    for piece in (*time.ppo, time.reference):
        name = piece.name + " (ROAD only)" * (piece is time.reference)
        cells = [f"{piece.flops / 1e12:.3f}", f"{piece.seconds:.1f}"]
        table.add_row(name, *cells, f"{piece.seconds / plan.mfu:.1f}")
    waited = "?" if plan.env_seconds is None else f"{time.environment:.1f}"
    table.add_row("environment", "", waited, waited, end_section=True)
    for name, road in (("PPO", False), ("ROAD", True)):
        seconds = [time.seconds(road=road, mfu=mfu) for mfu in (1.0, plan.mfu)]
        table.add_row(name, "", *(f"{each:.1f}" for each in seconds))
    return table


def _hours_table(plan: Plan, time: Time) -> Table:
    title = f"{plan.steps:,} environment steps, {time.iterations} iterations, hours"
    table = _table(title, "", "at 100 %", f"at {100 * plan.mfu:g} %")
    for name, road in (("PPO", False), ("ROAD", True)):
        hours = [time.hours(road=road, mfu=mfu) for mfu in (1.0, plan.mfu)]
        table.add_row(name, *(f"{each:.2f}" for each in hours))
    if time.evaluation is not None:
        hours = [time.iterations * time.evaluation.seconds / mfu / 3600 for mfu in (1.0, plan.mfu)]
        table.add_row("of that, evaluations", *(f"{each:.2f}" for each in hours))
    return table


def _remarks(
    plan: Plan, architecture: Architecture, chosen: tuple[int, int], time: Time
) -> list[str]:
    rates = f"{plan.tflops:g} TFLOP/s and {plan.bandwidth:g} TB/s"
    lines = [
        f"ROAD adds {100 * time.overhead:.1f} % to PPO's iteration.",
        f"100 % is {rates}: a floor, not a forecast.",
        f"Flags: --minibatch {chosen[0]} --accumulation {chosen[1]}"
        + f" --nproc {plan.gpus} --blocks {plan.gpus}" * (plan.gpus > 1)
        + " --activation-checkpointing" * plan.activation_checkpointing,
    ]
    if plan.env_seconds is None:
        lines.append("The simulator's time is not counted: measure it and pass --env-seconds.")
    if plan.gpus > 1:
        lm_head = plan.lora_lm_head
        shared = FLOAT32 * trained_parameters(architecture, plan.lora_rank, lm_head=lm_head)
        lines.append(
            f"The exchange of {_gb(shared)} GB of gradients per optimiser step among {plan.gpus} "
            f"GPUs is not counted: see docs/scaling.md."
        )
    return lines


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(columns[0], min_width=_NAMES)
    for name in columns[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _gb(size: int) -> str:
    return f"{size / 1e9:.3f}"
