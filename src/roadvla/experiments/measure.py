"""``roadvla eval``: the success of one policy, or of a bare OpenVLA checkpoint, on one set."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import Progress

from roadvla import envs
from roadvla.envs import ManiSkillSettings
from roadvla.errors import UserError, unknown_name
from roadvla.evaluation.evaluate import Evaluation, check_request, evaluate
from roadvla.evaluation.files import (
    count_filmed,
    evaluation_path,
    find_evaluation,
    lost_by,
    write_evaluation,
)
from roadvla.evaluation.machine import usable_device
from roadvla.experiments.serving import connect
from roadvla.experiments.stages import attribute, trained
from roadvla.files import read_json
from roadvla.policy import Policy, load_policy, policy_kind
from roadvla.policy.settings import OpenVLASettings, Precision, Preprocess
from roadvla.policy.weights import KINDS
from roadvla.train.checkpoint import policy_folder
from roadvla.train.checks import check_simulator
from roadvla.train.memory import loading_sizes, within_memory
from roadvla.train.parts import maker_of
from roadvla.train.run_folder import CONFIG, about, clear_folder, write_json

_NUM_ENVS = 64
_REMOTE = "remote://"
_OVERRIDES = ("norm_key", "dtype", "preprocess", "inference_batch", "compile")
_DECISIVE = ("norm_key", "dtype", "preprocess")


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Measure a policy's success on numbered episodes, the same for every policy.

    Attributes:
        source: Policy folder, checkpoint, run folder (its latest checkpoint), or RL4VLA adapter.
        env: Setting of Table 3; with ``--sim maniskill`` any of RL4VLA's ids.
        sim: ``tabletop`` or ``maniskill``.
        split: Its training set (in distribution) or its test set (out of distribution).
        episodes: How many; ids 0, 1, 2, …
        temperature: Of the action sampling: 0 is greedy, or at least 0.001.
        record: Keep the frames of this many episodes; if it was filmed before, of no fewer.
        output: Folder for the result; SOURCE/evaluation unless given, or runs/eval-NAME for a
            checkpoint of that name.
        force: Replace an earlier result of more episodes, another temperature or iteration.
        device: Where policy and environments live.
        policy: ``tiny`` or ``openvla``, where it is to be made sure; without SOURCE
            ``remote://HOST:PORT`` for one that ``roadvla serve`` serves.
        checkpoint: Without SOURCE: the OpenVLA to measure, a folder in HF format or the hub's
            ``owner/name``. With it: the base, if it is elsewhere than SOURCE says.
        norm_key: Action statistics of an OpenVLA, if not as trained, or not the only ones.
        dtype: Of an OpenVLA's base and activations, if not as trained, or not bfloat16.
        preprocess: An OpenVLA's image path, if not as trained, or not ``tensor``.
        inference_batch: Observations per pass, if not as trained, or not 32.
        compile: Compile an OpenVLA's blocks with ``torch.compile``.
        maniskill: How ManiSkill simulates.
    """

    source: tyro.conf.Positional[Annotated[Path | None, tyro.conf.arg(metavar="SOURCE")]] = None
    env: str
    sim: str = "tabletop"
    split: Annotated[Literal["train", "test"], tyro.conf.arg(name="set")] = "test"
    episodes: int = 512
    temperature: float = 0.6
    record: int = 0
    output: Path | None = None
    force: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    device: str = "cpu"
    policy: str | None = None
    checkpoint: str | None = None
    norm_key: str | None = None
    dtype: Precision | None = None
    preprocess: Preprocess | None = None
    inference_batch: int | None = None
    compile: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    maniskill: tyro.conf.OmitArgPrefixes[ManiSkillSettings] = field(
        default_factory=ManiSkillSettings
    )

    def __post_init__(self) -> None:
        """Refuse values out of range, and nothing to measure."""
        check_request(
            self.split, self.episodes, self.temperature, _NUM_ENVS, seed=0, record=self.record
        )
        check_simulator(self)
        if self.policy not in (None, *KINDS) and not self.is_remote:
            raise unknown_name("policy", str(self.policy), (*KINDS, f"{_REMOTE}HOST:PORT"))
        if self.is_remote:
            self._check_remote()
        elif self.source is None and self.checkpoint is None:
            raise UserError(
                "no policy is named: roadvla eval RUN --env ENV, or roadvla eval --policy openvla "
                "--checkpoint FOLDER_OR_HUB_ID --env ENV"
            )
        if self.policy == "tiny" and self.source is None:
            raise UserError(
                f"checkpoint {self.checkpoint!r} is an OpenVLA's: drop it or pass --policy openvla"
            )

    def _check_remote(self) -> None:
        given = {"source": self.source, "checkpoint": self.checkpoint} | self.overrides
        for name, value in given.items():
            if value is not None:
                raise UserError(
                    f"{name} {value!r} would not be used: {self.policy} is served as its server "
                    f"was told, drop it"
                )

    @property
    def is_remote(self) -> bool:
        """Whether the policy is a served one."""
        return str(self.policy).startswith(_REMOTE)

    @property
    def overrides(self) -> dict[str, Any]:
        """The OpenVLA settings that were given."""
        chosen = {name: getattr(self, name) for name in _OVERRIDES}
        return {name: value for name, value in chosen.items() if value not in (None, False)}


def measure(wanted: Measurement) -> tuple[Evaluation, Path]:
    """Run the episodes and write the result.

    Returns:
        The result and its file.

    Raises:
        UserError: If the policy does not load, a better result would be lost, or memory runs out.
    """
    env = envs.canonical(wanted.env, wanted.sim)
    usable_device(wanted.device)
    wanted = replace(wanted, env=env)
    if wanted.is_remote:
        return _measure_served(wanted, str(wanted.policy))
    if wanted.source is None and (Path(str(wanted.checkpoint)) / "adapter_config.json").is_file():
        wanted = replace(wanted, source=Path(str(wanted.checkpoint)), checkpoint=None)
    if wanted.source is None:
        return _measure_base(wanted, str(wanted.checkpoint))
    folder = policy_folder(wanted.source)
    settings = _settings_of(folder, wanted)
    results = wanted.output or wanted.source / "evaluation"
    _refuse_loss(wanted, results, iteration=trained(folder)[0])
    with within_memory("loading the policy", *_loading(wanted, settings)):
        policy = _load(folder, wanted, settings)
    result = _run(policy, wanted, results, settings)
    result = attribute(result, folder, base=None if wanted.output else wanted.source)
    return result, write_evaluation(result, results)


def _measure_served(wanted: Measurement, address: str) -> tuple[Evaluation, Path]:
    """Measure a policy that another process holds."""
    with closing(connect(address)) as policy:
        kind, iteration = policy.about.get("policy"), policy.about.get("iteration")
        results = wanted.output or Path("runs/eval-remote/evaluation")
        _refuse_loss(wanted, results, iteration=iteration)
        settings = None if kind == "tiny" else OpenVLASettings()
        result = _run(policy, wanted, results, settings)
        result = replace(
            result,
            checkpoint=str(policy.about.get("checkpoint")),
            iteration=iteration,
            env_steps=policy.about.get("env_steps"),
        )
    return result, write_evaluation(result, results)


def _measure_base(wanted: Measurement, checkpoint: str) -> tuple[Evaluation, Path]:
    """Measure a checkpoint that nothing here has trained."""
    from roadvla.policy.openvla.policy import make_openvla

    # Fresh adapters change nothing; the fewest cost the least.
    settings = replace(
        OpenVLASettings(lora_rank=1, lora_alpha=1, lora_lm_head=False), **wanted.overrides
    )
    name = Path(checkpoint).resolve().name
    folder = Path("runs") / f"eval-{name}"
    results = wanted.output or folder / "evaluation"
    about_it = {
        "name": name,
        "policy": "openvla",
        "checkpoint": checkpoint,
        "openvla": {key: getattr(settings, key) for key in _DECISIVE},
    }
    if wanted.output is None:
        _refuse_others(folder, about_it, force=wanted.force)
    _refuse_loss(wanted, results, iteration=None)
    with within_memory("loading the policy", *_loading(wanted, settings)):
        policy = make_openvla(checkpoint, settings, wanted.device)
    result = replace(_run(policy, wanted, results, settings), checkpoint=checkpoint)
    if wanted.output is None:
        if not _is_of(folder, about_it):
            clear_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CONFIG, {**about_it, **about(wanted.device)})
    return result, write_evaluation(result, results)


def _run(
    policy: Policy, wanted: Measurement, results: Path, settings: OpenVLASettings | None
) -> Evaluation:
    # The earlier film goes with its numbers, so it is made again.
    filmed = min(count_filmed(results, wanted.env, wanted.split), wanted.episodes)
    console = Console(stderr=True)
    sizes = f"num_envs {min(_NUM_ENVS, wanted.episodes)}"
    tries = []
    if settings is not None:
        sizes = f"inference_batch {settings.inference_batch}, {sizes}"
        half = min(settings.inference_batch, wanted.episodes) // 2
        tries = [f"--inference-batch {half}"] if half else []
    with (
        within_memory("the evaluation", sizes, tries),
        Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task(f"{wanted.env} {wanted.split}", total=wanted.episodes)
        return evaluate(
            policy,
            env=wanted.env,
            split=wanted.split,
            sim=wanted.sim,
            episodes=wanted.episodes,
            temperature=wanted.temperature,
            num_envs=_NUM_ENVS,
            device=wanted.device,
            record=max(wanted.record, filmed),
            on_progress=lambda done, _: progress.update(task, completed=done),
            make_env=maker_of("tiny" if settings is None else "openvla", wanted.maniskill),
        )


def _load(folder: Path, wanted: Measurement, settings: OpenVLASettings | None) -> Policy:
    if settings is None:
        return load_policy(folder, device=wanted.device)
    from roadvla.policy.openvla.policy import load_openvla

    return load_openvla(folder, wanted.device, settings=settings, checkpoint=wanted.checkpoint)


def _loading(wanted: Measurement, settings: OpenVLASettings | None) -> tuple[str, list[str]]:
    kind = "tiny" if settings is None else "openvla"
    return loading_sizes(wanted.device, kind, settings or OpenVLASettings())


def _settings_of(folder: Path, wanted: Measurement) -> OpenVLASettings | None:
    """Settings that an OpenVLA's folder records, with what was asked for; ``None`` if tiny."""
    kind = policy_kind(folder)
    if wanted.policy not in (None, kind):
        raise UserError(f"{folder} holds a policy of kind {kind!r}: pass --policy {kind}")
    if kind == "openvla":
        from roadvla.policy.openvla.policy import recorded_settings

        return replace(recorded_settings(folder), **wanted.overrides)
    given = {"checkpoint": wanted.checkpoint} if wanted.checkpoint else {}
    for name, value in (given | wanted.overrides).items():
        raise UserError(f"{name} {value!r} would not be used by the tiny policy {folder}: drop it")
    return None


def _refuse_loss(wanted: Measurement, results: Path, *, iteration: int | None) -> None:
    """Refuse to replace an evaluation by one that does not repeat or extend it."""
    found = find_evaluation(results, wanted.env, wanted.split)
    if found is None or wanted.force:
        return
    lost = lost_by(
        found,
        sim=wanted.sim,
        episodes=wanted.episodes,
        temperature=wanted.temperature,
        iteration=iteration,
    )
    lost = lost or _other_frames(found, wanted)
    if wanted.source is None and found.checkpoint != wanted.checkpoint:
        lost = f"{found.checkpoint}, not {wanted.checkpoint}"
    if lost:
        path = evaluation_path(results, wanted.env, wanted.split)
        raise UserError(
            f"{path} holds an evaluation of {lost}: choose another --output or pass --force to "
            f"replace it"
        )


def _other_frames(found: Evaluation, wanted: Measurement) -> str:
    """Say how the simulator was set for a stored evaluation, if it was set otherwise."""
    facts = wanted.maniskill.facts
    open_ones = ("image_size", "shader")  # what the policy and the device decide unless given
    for name in open_ones:
        if getattr(wanted.maniskill, name) is None:
            del facts[name]
    for name, value in facts.items() if found.simulator else ():
        if found.simulator.get(name) != value:
            return f"{name} {found.simulator.get(name)}, not {value}"
    return ""


def _refuse_others(folder: Path, about_it: dict[str, Any], *, force: bool) -> None:
    """Refuse a folder with results of another checkpoint, or of other settings."""
    if (folder / CONFIG).exists() and not force and not _is_of(folder, about_it):
        raise UserError(
            f"{folder} holds evaluations of another checkpoint, or with another --norm-key, "
            f"--dtype or --preprocess: choose another --output or pass --force to replace them"
        )


def _is_of(folder: Path, about_it: dict[str, Any]) -> bool:
    try:
        recorded = read_json(folder / CONFIG)
        return all(recorded.get(name) == value for name, value in about_it.items())
    except (OSError, ValueError, AttributeError):
        return False
