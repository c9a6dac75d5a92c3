"""The ``roadvla`` command: one function per subcommand.

Modules that load torch are imported inside the functions, so that help comes at once. Whatever a
person can mend ends as one line on stderr and exit code 2.
"""

from __future__ import annotations

import itertools
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from roadvla import __version__
from roadvla.errors import FailedCheckError, UserError, WorkerError, unknown_name
from roadvla.experiments.asset_commands import assets, fetch_vulkan
from roadvla.experiments.demonstration_commands import demos
from roadvla.experiments.doctor import doctor
from roadvla.experiments.training_command import train
from roadvla.flags import bound, form_of, parse, value_of
from roadvla.train.interrupt import raise_queue_signals

Split = Literal["train", "test"]
Precision = Literal["bfloat16", "float32"]


def pretrain(arguments: list[str]) -> None:
    """Make the small backbone that the package ships."""
    from roadvla.policy import save_policy
    from roadvla.train.pretrain import PretrainConfig
    from roadvla.train.pretrain import pretrain as run
    from roadvla.train.run_folder import check_claimable, claim_folder

    form = form_of(
        PretrainConfig(),
        output=(Path, Path("runs/backbone"), "Folder for the policy."),
        force=(bool, False, "Replace the policy in the output folder."),
    )
    chosen = parse(form, "pretrain", arguments)
    check_claimable(chosen.output, force=chosen.force)
    config = value_of(PretrainConfig, chosen)
    policy = run(config, report=lambda progress: print(progress, flush=True))
    claim_folder(chosen.output, force=chosen.force)
    save_policy(policy, chosen.output)
    print(chosen.output)


def warmup(arguments: list[str]) -> None:
    """Fine-tune the backbone on demonstrations of the scripted expert."""
    from roadvla.experiments.stages import continued_by
    from roadvla.train.warmup import WarmUp, run_warm_up

    form = form_of(
        WarmUp(),
        short=("openvla", "maniskill"),
        force=(bool, False, "Replace the warm-up in the output folder."),
    )
    chosen = parse(form, "warmup", arguments)
    with continued_by(shlex.join(["roadvla", "warmup", *arguments])):
        print(run_warm_up(value_of(WarmUp, chosen), force=chosen.force))


def evaluate(arguments: list[str]) -> None:
    """Measure a policy's success on numbered episodes, the same for every policy."""
    from roadvla.experiments.measure import Measurement, measure
    from roadvla.experiments.stages import continued_by

    wanted = parse(Measurement, "eval", arguments)
    with continued_by(shlex.join(["roadvla", "eval", *arguments])):
        result, path = measure(wanted)
    print(f"{result.env} {result.split}, {result.episodes} episodes, ", end="")
    print(f"temperature {result.temperature:g}")
    low, high = 100 * result.success_low, 100 * result.success_high
    print(
        f"  success at the last step  {100 * result.success_rate:5.1f} %  ({low:.1f} to {high:.1f})"
    )
    print(f"  success at any step       {100 * result.success_once_rate:5.1f} %")
    print(f"  grasped                   {100 * result.grasp_rate:5.1f} %")
    print(path)


def serve(
    source: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="SOURCE")]],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token_file: Path | None = None,
    device: str = "cpu",
    max_batch: int = 64,
    max_wait_ms: float = 2.0,
    max_waiting: int = 256,
    max_clients: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
) -> None:
    """Serve a policy to robots and other simulators, over WebSocket.

    Args:
        source: Policy folder, checkpoint, or run (its latest checkpoint).
        host: Interface to listen on; any other than this machine's own needs a token.
        port: 0 for any that is free.
        token_file: File with the secret that clients must present; ROADVLA_TOKEN unless given.
        device: Where the policy lives.
        max_batch: Most frames of a pass, and of a request.
        max_wait_ms: Milliseconds that a request may wait for others to share a pass.
        max_waiting: Requests that may wait; more are told that the server is busy.
        max_clients: Connections at a time; more are refused.
        temperature: Of the sampling, unless a request says otherwise; 0 is greedy, or
            0.001 to 100.
        seed: Of the sampling, where a request does not bring its own numbers.
    """
    from roadvla.experiments.serving import serve as run
    from roadvla.serving.settings import Serving

    settings = Serving(
        host=host,
        port=port,
        device=device,
        max_batch=max_batch,
        max_wait_ms=max_wait_ms,
        max_waiting=max_waiting,
        max_clients=max_clients,
        temperature=temperature,
        seed=seed,
    )
    run(source, settings, token_file=token_file)


def plan(arguments: list[str]) -> None:
    """Tell what a run of OpenVLA needs and takes, before it is started."""
    from roadvla.experiments.plan import run
    from roadvla.experiments.plan_settings import Plan

    run(value_of(Plan, parse(form_of(Plan()), "plan", arguments)))


def export(
    source: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="SOURCE")]],
    *,
    to: Path,
    checkpoint: str | None = None,
    dtype: Precision | None = None,
    force: bool = False,
) -> None:
    """Merge an OpenVLA run's adapters into its base: a checkpoint in HF format.

    Args:
        source: Run, checkpoint of one, warm-up, or RL4VLA adapter.
        to: Folder to write.
        checkpoint: The base, if it is elsewhere than SOURCE says.
        dtype: Of all weights; as the base stores them unless given.
        force: Replace what is in the folder.
    """
    from roadvla.policy import policy_kind
    from roadvla.train.checkpoint import policy_folder

    folder = policy_folder(source)
    if policy_kind(folder) != "openvla":
        raise UserError(f"{folder} holds a tiny policy: only those of OpenVLA can be exported")
    from roadvla.policy.openvla.export import export_checkpoint, stores_half

    written = export_checkpoint(folder, to, checkpoint=checkpoint, dtype=dtype, force=force)
    if dtype is None and stores_half(written):
        print(
            "merged into bfloat16, as the base is stored, which rounds the adapter's changes; "
            "--dtype float32 keeps them exactly",
            file=sys.stderr,
        )
    print(written)


def make_tiny_openvla(
    folder: tyro.conf.Positional[Path], *, seed: int = 0, force: bool = False
) -> None:
    """Write a small random OpenVLA checkpoint, complete, to try commands on.

    Args:
        folder: Where; empty unless --force.
        seed: Of the weights.
        force: Replace the checkpoint in the folder.
    """
    from roadvla.policy.openvla.tiny_checkpoint import write_tiny_checkpoint

    print(write_tiny_checkpoint(folder, seed=seed, force=force))


def report(
    runs: tyro.conf.Positional[tuple[Path, ...]],
    *,
    output: Path | None = None,
    baseline: str | None = None,
) -> None:
    """Make tables, curves and film strips of finished runs, or the page of finished studies.

    Args:
        runs: Run folders, or folders that hold some; or one folder of studies.
        output: Folder for the report; ``report`` in the folder that holds all runs unless given.
        baseline: Method to compare with; plain PPO unless given. Studies bring their own.
    """
    from roadvla.evaluation.results import is_results, read_results
    from roadvla.report.page import write_report
    from roadvla.report.site import write_page

    if not runs:
        raise UserError("no run is named: roadvla report RUN [RUN ...]")
    folder = output or Path(os.path.commonpath([run.resolve() for run in runs])) / "report"
    command = shlex.join(
        ["roadvla", "report", *map(str, runs)]
        + (["--output", str(output)] if output else [])
        + (["--baseline", baseline] if baseline else [])
    )
    studies = [run for run in runs if is_results(run)]
    if not studies:
        write_report(runs, folder, baseline=baseline, command=command)
        print(folder / "report.md")
        return
    if len(runs) > 1:
        raise UserError(f"{studies[0]} holds studies: report on it by itself")
    if baseline is not None:
        raise UserError(f"--baseline {baseline} would not be used: a study has its own, drop it")
    print(write_page(read_results(studies[0]), folder, command=command))


def check_env(arguments: list[str]) -> None:
    """Put environments through the contract, or compare them with recorded episodes."""
    from roadvla.experiments.conformance import Conformance, check

    wanted = parse(Conformance, "check-env", arguments)
    broken = check(wanted)
    if broken:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise FailedCheckError(f"{broken[0]}{more}")


def gallery(arguments: list[str]) -> None:
    """Draw episodes of every setting, in and out of distribution, on one picture."""
    from roadvla.report.gallery import Gallery, write_gallery

    wanted = parse(Gallery, "gallery", arguments)
    print(write_gallery(wanted, report=lambda line: print(line, file=sys.stderr, flush=True)))


def demo(*, output: Path = Path("runs/demo"), seed: int = 0, fast: bool = False) -> None:
    """Warm up, adapt by PPO and by ROAD, evaluate, report: the whole path in small.

    Args:
        output: Folder for everything; what is finished in it is kept.
        seed: Of every random number.
        fast: A few iterations only, to see that it runs; the policies do not learn.
    """
    from roadvla.experiments.demo import run

    run(output=output, seed=seed, fast=fast)


def study(arguments: list[str]) -> None:
    """Run the paper's tables and figures as grids of runs: study NAME… [flags]."""
    from roadvla.experiments.paper_studies import STUDIES
    from roadvla.experiments.studies import StudyRequest, run_studies

    names = list(itertools.takewhile(lambda word: not word.startswith("-"), arguments))
    flags = arguments[len(names) :]
    if not arguments or (flags and flags[0] in ("-h", "--help") and not names):
        print("usage: roadvla study NAME… [flags]; roadvla study all --help lists the flags\n")
        for known in STUDIES.values():
            print(f"  {known.name:<10} {known.title}{f' ({known.paper})' if known.paper else ''}")
        return
    form = form_of(StudyRequest(names=tuple(names)), fixed=("names",))
    print(run_studies(value_of(StudyRequest, parse(form, "study", flags))))


# The flags of these are a configuration's fields, so the functions parse them themselves.
_CONFIGURED: dict[str, Callable[[list[str]], None]] = {
    "pretrain": pretrain,
    "warmup": warmup,
    "train": train,
    "eval": evaluate,
    "plan": plan,
    "check-env": check_env,
    "gallery": gallery,
    "demos": demos,
    "study": study,
}
_COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "pretrain": pretrain,
    "warmup": warmup,
    "train": train,
    "eval": evaluate,
    "report": report,
    "study": study,
    "serve": serve,
    "plan": plan,
    "export": export,
    "make-tiny-openvla": make_tiny_openvla,
    "check-env": check_env,
    "demos": demos,
    "gallery": gallery,
    "assets": assets,
    "fetch-vulkan": fetch_vulkan,
    "doctor": doctor,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return the exit code.

    Args:
        argv: Arguments without the program's name; the process's own unless given.

    Returns:
        0; 1 if a check or a worker fails; 2 for bad input or a full disk; 75 after SIGTERM or
        SIGUSR1; 130 after Ctrl-C; 141 when the reader of stdout left.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with raise_queue_signals():
            _dispatch(arguments)
        sys.stdout.flush()
    except WorkerError as error:
        print(f"roadvla: error: {error}", file=sys.stderr)  # with its traceback, as it is
        return 1
    except FailedCheckError as error:
        return _fail(str(error), 1)
    except (UserError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            # Python flushes stdout once more at exit; nobody reads it.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        return _fail(f"error: {error}", 2)
    except KeyboardInterrupt as interrupt:
        return _fail(str(interrupt) or "interrupted", getattr(interrupt, "code", 130))
    return 0


def _dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: roadvla COMMAND [flags]; roadvla COMMAND --help lists the flags\n")
        for name, command in _COMMANDS.items():
            print(f"  {name:<17} {(command.__doc__ or '').splitlines()[0]}")
        return
    name, *flags = arguments
    if name == "--version":
        print(f"roadvla {__version__}")
    elif name in _CONFIGURED:
        _CONFIGURED[name](flags)
    elif name in _COMMANDS:
        parse(bound(_COMMANDS[name]), name, flags)()
    else:
        raise unknown_name("command", name, _COMMANDS)


def _fail(message: str, code: int) -> int:
    if os.environ.get("ROADVLA_DEBUG"):
        traceback.print_exc()
    print("roadvla:", " ".join(message.split()), file=sys.stderr)
    return code
