"""``roadvla doctor``: rows from faked probes; every one that is not ``ok`` says what to do."""

from __future__ import annotations

import json
import os
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from rich.console import Console

from roadvla.envs.maniskill.assets import AssetFolders
from roadvla.envs.maniskill.catalog import read_catalog
from roadvla.envs.maniskill.inspection import Finding, State, inspect_all
from roadvla.errors import FailedCheckError
from roadvla.experiments import doctor as doctors
from roadvla.experiments import doctor_gpu as gpu
from roadvla.experiments import doctor_machine as machine
from roadvla.experiments import doctor_simulator as simulator
from roadvla.experiments.doctor_rows import Answer, Row, ask

H100 = "NVIDIA H100 80GB HBM3, {driver}, 81559, {free}, 9.0\n"
NVIDIA = gpu.Gpu(name="NVIDIA H100", driver="570.1", total=85.5, free=80.0, capability=9.0)


def _missing(*names: str):
    """A probe of libraries that lacks these."""
    return lambda name: f"{name}: cannot open shared object file" if name in names else ""


# Rows and questions


def test_bad_news_comes_with_a_remedy() -> None:
    with pytest.raises(ValueError, match="has no fix"):
        Row(name="x", state="warn", finding="broken")


@pytest.mark.parametrize(
    ("program", "problem", "output"),
    [
        ("print('fine')", "", "fine"),
        ("import sys; print('one\\ntwo', file=sys.stderr); sys.exit(3)", "two", ""),
        ("import sys; sys.exit(3)", "exit code 3", ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashed (SIGSEGV)", ""),
        ("import time; time.sleep(60)", "no answer in 1 s", ""),
    ],
    ids=["fine", "complains", "silent", "crashes", "hangs"],
)
def test_programs_may_fail_crash_or_hang(program: str, problem: str, output: str) -> None:
    answer = ask((sys.executable, "-c", program), 1.0 if "sleep" in program else 60.0)
    assert (answer.problem, answer.output.strip()) == (problem, output)


def test_a_program_that_hangs_is_ended(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    program = f"import os, time; open({str(file)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    ask((sys.executable, "-c", program), 2.0)
    with pytest.raises(ProcessLookupError):
        os.kill(int(file.read_text()), 0)


def test_a_program_that_is_absent() -> None:
    assert ask(("no-such-program-here",), 1.0).problem == "No such file or directory"


# The machine


def test_python() -> None:
    assert machine.python_row((3, 11, 0)).state == "ok"
    assert machine.python_row((3, 10, 14)).state == "fail"


def test_packages_of_this_installation() -> None:
    assert {need.name for need in machine.requirements()} >= {"torch", "numpy", "tyro"}
    assert {need.name for need in machine.requirements("openvla")} >= {"transformers", "peft"}
    assert not {"pytest", "transformers"} & {need.name for need in machine.requirements()}
    row = machine.package_row("packages", machine.requirements(), missing="fail", fix="pip")
    assert row.state != "fail", row.finding  # of what runs this test nothing can be missing


def test_simulator_packages_are_those_of_the_extra() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    extra = project["project"]["optional-dependencies"]["maniskill"]
    assert [Requirement(line) for line in extra] == simulator.SIMULATOR


def test_packages_missing_or_of_another_version() -> None:
    gone, old = Requirement("no-such-package"), Requirement("rich<1")
    row = machine.package_row("p", [gone], missing="fail", fix="pip install it")
    assert (row.state, row.finding, row.fix) == (
        "fail",
        "no-such-package missing",
        "pip install it",
    )
    assert machine.package_row("p", [gone], missing="warn", fix="pip").state == "warn"
    row = machine.package_row("p", [old], missing="fail", fix="pip")
    assert row.state == "warn"
    assert row.finding.endswith("made for <1")


def test_disk(tmp_path: Path) -> None:
    absent = tmp_path / "not" / "yet"
    assert "GB free" in machine.disk_row("disk", absent).finding
    states = [machine.disk_row("disk", absent, free=free).state for free in (9e9, 4e9, 1e8)]
    assert states == ["ok", "warn", "fail"]
    assert machine.disk_row("disk", absent, free=1e8, grave="warn").state == "warn"
    assert not absent.exists()


def test_memory() -> None:
    row = machine.memory_row(total=64e9, limit=float("inf"), processes=16)
    assert (row.state, row.finding) == ("ok", "64.0 GB")
    row = machine.memory_row(total=64e9, limit=8e9, processes=16)
    assert row.state == "warn"
    assert "8.0 GB, this container's limit, of 64.0 GB" in row.finding
    assert "in 3 processes" in row.fix  # 3 GB and 3 × 1.6 GB
    assert "in 1 processes" in machine.memory_row(total=1e9, limit=1e10, processes=2).fix


def test_memory_limits_of_control_groups(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    own.write_text("0::/\n")
    assert machine.memory_limit(tmp_path / "none", own) == float("inf")
    assert machine.memory_limit(tmp_path / "none", tmp_path / "none") == float("inf")
    (tmp_path / "two" / "job" / "step").mkdir(parents=True)
    (tmp_path / "two" / "job" / "memory.max").write_text("5000\n")
    (tmp_path / "two" / "job" / "step" / "memory.max").write_text("max\n")
    own.write_text("0::/job/step\n")
    assert machine.memory_limit(tmp_path / "two", own) == 5000
    (tmp_path / "one" / "memory" / "job").mkdir(parents=True)
    (tmp_path / "one" / "memory" / "job" / "memory.limit_in_bytes").write_text("7000\n")
    own.write_text("4:memory:/job\n3:cpuset:/\n0::/\n")
    assert machine.memory_limit(tmp_path / "one", own) == 7000
    (tmp_path / "inside").mkdir()  # a container sees its own group as the root
    (tmp_path / "inside" / "memory.max").write_text("9000\n")
    own.write_text("0::/somewhere/outside\n")
    assert machine.memory_limit(tmp_path / "inside", own) == 9000
    assert machine.memory_limit(tmp_path / "inside", tmp_path / "none") == 9000


def test_shared_memory(tmp_path: Path) -> None:
    assert machine.shared_memory_row(tmp_path, size=2e9).state == "ok"
    row = machine.shared_memory_row(tmp_path, size=64.0 * 2**20)  # Docker's default
    assert row.state == "warn"
    assert "--shm-size" in row.fix
    assert machine.shared_memory_row(tmp_path / "none").state == "warn"


# GPU and torch


def test_gpus_from_nvidia_smi() -> None:
    gpus, problem = gpu.find_gpus(Answer(output=2 * H100.format(driver="570.86.15", free=81000)))
    assert problem == ""
    assert len(gpus) == 2
    assert gpus[0].driver == "570.86.15"
    assert gpus[0].total == pytest.approx(85.52, abs=0.01)
    assert gpus[0].capability == 9.0
    assert gpu.find_gpus(Answer(problem="crashed (SIGSEGV)")) == ([], "crashed (SIGSEGV)")
    assert gpu.find_gpus(Answer(output="")) == ([], "nvidia-smi names no GPU")
    assert (
        "says 'No devices were found'" in gpu.find_gpus(Answer(output="No devices were found"))[1]
    )


def test_driver(tmp_path: Path) -> None:
    loaded, absent = tmp_path / "nvidiactl", tmp_path / "none"
    loaded.touch()
    assert gpu.driver_row([], "", device=absent).state == "ok"
    row = gpu.driver_row([], "no answer in 60 s", device=loaded)
    assert (row.state, "no answer" in row.finding) == ("warn", True)
    for version, state in (("570.86.15", "ok"), ("535.54.03", "warn")):
        gpus, _ = gpu.find_gpus(Answer(output=H100.format(driver=version, free=81000)))
        assert gpu.driver_row(gpus, "", device=loaded).state == state


def test_gpu_memory() -> None:
    assert gpu.gpu_memory_row([]).state == "ok"
    for free, state in ((81000, "ok"), (300, "warn")):
        gpus, _ = gpu.find_gpus(Answer(output=H100.format(driver="570.1", free=free)))
        assert gpu.gpu_memory_row(gpus).state == state


def _torch(build: str | None, *devices: str) -> Answer:
    facts = {"version": "2.9.0", "build": build, "devices": devices}
    return Answer(output="noise of a driver\n" + json.dumps(facts) + "\n")


@pytest.mark.parametrize(
    ("answer", "gpus", "state", "said"),
    [
        (_torch(None), [], "ok", "without CUDA"),
        (_torch("12.8", "H100"), [NVIDIA], "ok", "built for CUDA 12.8: 1 × H100"),
        (_torch("12.8", "H100"), [NVIDIA, NVIDIA], "ok", "1 × H100"),  # CUDA_VISIBLE_DEVICES
        (_torch("12.8"), [], "ok", "built for CUDA"),
        (_torch("12.8"), [NVIDIA], "warn", "sees none of 1 GPUs"),
        (_torch(None), [NVIDIA], "warn", "without CUDA, sees none"),
        (Answer(problem="crashed (SIGSEGV)"), [], "fail", "crashed"),
        (Answer(output="nothing of use"), [], "fail", "does not load"),
    ],
)
def test_torch(answer: Answer, gpus: list[gpu.Gpu], state: str, said: str) -> None:
    row = gpu.torch_row(gpus, answer)
    assert row.state == state
    assert said in row.finding


def test_torch_without_cuda_beside_a_gpu_is_to_be_replaced() -> None:
    assert "pip install" in gpu.torch_row([NVIDIA], _torch(None)).fix
    assert "CUDA_VISIBLE_DEVICES" in gpu.torch_row([NVIDIA], _torch("12.8")).fix


def test_torch_is_really_asked() -> None:
    assert gpu.torch_row([]).state == "ok"


# The simulator


def test_libraries_are_really_loaded() -> None:
    assert simulator.library_fault("libc.so.6") == ""
    assert "cannot open" in simulator.library_fault("libno-such-library.so.1")


def test_windowing_libraries() -> None:
    assert simulator.windowing_row("fail", fault=_missing()).state == "ok"
    row = simulator.windowing_row("fail", fault=_missing("libXext.so.6"))
    assert row.state == "fail"
    assert row.finding.startswith("libXext.so.6 missing")
    assert "libxext6" in row.fix
    assert simulator.windowing_row("warn", fault=_missing("libX11.so.6")).state == "warn"


def _manifest(folder: Path, library: str) -> Path:
    file = folder / "icd.json"
    file.write_text(json.dumps({"ICD": {"library_path": library}}))
    return file


def test_vulkan_manifests(tmp_path: Path) -> None:
    folders = (tmp_path / "no such folder", tmp_path)
    library = tmp_path / "libvk.so"

    def row(*lacking: str, gpu: bool = False, **environment: str) -> Row:
        return simulator.vulkan_driver_row(
            gpu=gpu, environment=environment, folders=folders, fault=_missing(*lacking)
        )

    assert "fetch-vulkan" in row().fix
    assert "nvidia_icd.json" in row(gpu=True).fix
    assert "NVIDIA_DRIVER_CAPABILITIES" in row("libGLX_nvidia.so.0", gpu=True).fix
    file = _manifest(tmp_path, "./libvk.so")
    assert row().state == "ok"
    assert str(file) in row().finding
    assert "the system's loader" in row().finding
    assert "SAPIEN's own loader" in row("libvulkan.so.1").finding
    assert row(str(library)).state == "warn"
    _manifest(tmp_path, "libGLX_nvidia.so.0")
    assert row("libGLX_nvidia.so.0").state == "warn"
    file.write_text("[]")
    assert "is no manifest" in row().finding
    named = row(VK_ICD_FILENAMES=f"{tmp_path / 'gone.json'}")
    assert (named.state, "No such file" in named.finding) == ("warn", True)
    assert named.fix.startswith("unset VK_ICD_FILENAMES")


def test_a_driver_that_lacks_libxext(tmp_path: Path) -> None:
    _manifest(tmp_path, "libGLX_nvidia.so.0")
    row = simulator.vulkan_driver_row(
        gpu=True,
        environment={},
        folders=(tmp_path,),
        fault=lambda name: "libXext.so.6: cannot open shared object file" * ("GLX" in name),
    )
    assert row.state == "warn"
    assert "libxext6" in row.fix


def _device(name: str) -> Answer:
    return Answer(output="WARNING\n" + json.dumps({"name": name, "pci": "0000:00:00.0"}))


@pytest.mark.parametrize(
    ("answer", "has_gpu", "state", "fix"),
    [
        (_device("NVIDIA H100"), True, "ok", ""),
        (_device("SwiftShader Device (Subzero)"), False, "ok", ""),
        (_device("SwiftShader Device (Subzero)"), True, "warn", "unset VK_ICD_FILENAMES"),
        (_device("llvmpipe (LLVM 15.0.6, 256 bits)"), True, "warn", "unset"),
        (
            Answer(problem="RuntimeError: failed to find a rendering device"),
            False,
            "fail",
            "fetch-v",
        ),
        (
            Answer(problem="RuntimeError: failed to find a rendering device"),
            True,
            "fail",
            "NVIDIA_D",
        ),
        (Answer(problem="no answer in 120 s"), True, "fail", "NVIDIA_DRIVER_CAPABILITIES"),
        (Answer(problem="crashed (SIGSEGV)"), False, "fail", "fetch-vulkan"),
        (Answer(output="no JSON"), False, "fail", "fetch-vulkan"),
        (Answer(problem="ModuleNotFoundError: No module named 'sapien'"), False, "fail", "pip"),
    ],
)
def test_vulkan_device(answer: Answer, has_gpu: bool, state: str, fix: str) -> None:
    row = simulator.vulkan_device_row("fail", gpu=has_gpu, answer=answer)
    assert row.state == state
    assert fix in row.fix
    if state == "fail":  # less grave where ManiSkill is not installed
        assert simulator.vulkan_device_row("warn", gpu=has_gpu, answer=answer).state == "warn"


def test_egl(tmp_path: Path) -> None:
    def row(*lacking: str, has_gpu: bool) -> Row:
        return simulator.egl_row(gpu=has_gpu, folders=(tmp_path,), fault=_missing(*lacking))

    assert row("libEGL.so.1", has_gpu=True).state == "warn"
    assert row("libEGL.so.1", has_gpu=False).state == "ok"
    assert row(has_gpu=False).state == "ok"
    assert "libEGL_nvidia.so.0" in row(has_gpu=True).fix
    (tmp_path / "10_nvidia.json").touch()
    assert row(has_gpu=True).state == "ok"


def test_the_manifest_to_write_is_json() -> None:
    fix = simulator.vulkan_driver_row(gpu=True, environment={}, folders=(), fault=_missing()).fix
    written = json.loads(fix.split("'")[1])
    assert written["ICD"]["library_path"] == "libGLX_nvidia.so.0"


def test_assets(tmp_path: Path) -> None:
    roots = (tmp_path, tmp_path)
    files = read_catalog().assets[:3]

    def row(*states: State) -> Row:
        pairs = zip(files, states, strict=False)
        findings = [Finding(asset=asset, path=tmp_path, state=state) for asset, state in pairs]
        return simulator.assets_row("fail", findings, roots)

    assert row(State.OK, State.UNKNOWN).state == "ok"
    assert row(State.OK, State.STAND_IN).state == "warn"
    assert row(State.OK, State.REDUCED).state == "warn"
    worst = row(State.OK, State.MISSING, State.DAMAGED)
    assert worst.state == "fail"
    assert worst.finding == f"1 ok, 1 damaged, 1 missing in {tmp_path}"
    assert worst.fix.startswith("roadvla assets fetch")
    folders = AssetFolders(maniskill=tmp_path / "m", rl4vla=tmp_path / "r")
    assert simulator.assets_row("warn", inspect_all(folders), roots).state == "warn"


# The command

OK = Row(name="Python", state="ok", finding="3.11")
WARN = Row(name="Vulkan [device]", state="warn", finding="none [x]", fix='eval "$(roadvla x)" [y]')
FAIL = Row(name="disk", state="fail", finding="full", fix="free some")


def test_fixes_are_printed_below_the_table_each_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    again = Row(name="EGL", state="warn", finding="none", fix=WARN.fix)
    doctors.print_rows([OK, WARN, FAIL, again], Console(width=40))
    said = capsys.readouterr().out
    assert 'Vulkan [device], EGL: eval "$(roadvla x)" [y]\n' in said
    assert "disk: free some\n" in said
    assert said.count("none [x]") == 1


@pytest.mark.parametrize("rows", [[OK], [OK, WARN]])
def test_warnings_do_not_fail(
    rows: list[Row], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctors, "examine", lambda output: rows)
    doctors.doctor()
    assert "Python" in capsys.readouterr().out


def test_failures_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctors, "examine", lambda output: [OK, WARN, FAIL])
    with pytest.raises(FailedCheckError, match=r"1 of 3 checks fail \(disk\)"):
        doctors.doctor()
    assert "free some" in capsys.readouterr().out


@pytest.mark.parametrize(("installed", "grave"), [(True, "fail"), (False, "warn")])
def test_without_maniskill_its_rows_only_warn(
    installed: bool, grave: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MS_ASSET_DIR", str(tmp_path))
    monkeypatch.delenv("ROADVLA_ASSETS", raising=False)
    monkeypatch.setattr(doctors, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(gpu, "ask", lambda command, timeout: Answer(problem="absent"))
    monkeypatch.setattr(simulator, "ask", lambda command, timeout: Answer(problem="absent"))
    monkeypatch.setattr(gpu, "torch_row", lambda gpus: Row(name="torch", state="ok", finding=""))
    states = {row.name: row.state for row in doctors.examine(tmp_path)}
    assert states["X libraries"] == states["Vulkan device"] == states["assets"] == grave
    assert states["EGL"] == "ok"
    assert len(states) == 16


def test_a_broken_torch_does_not_end_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "ask", lambda command, timeout: Answer(problem="crashed (SIGILL)"))
    monkeypatch.setattr(simulator, "ask", lambda command, timeout: Answer(problem="absent"))
    rows = doctors.examine(tmp_path)
    assert next(row for row in rows if row.name == "torch").state == "fail"
    assert "assets" not in {row.name for row in rows}
