"""Nothing in the package can run what it reads: no unpickling, no evaluation, no shell."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parents[2] / "src").rglob("*.py"))
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
CALLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
FORBIDDEN = {
    "a module": "from pickle import loads",
    "a module under another name": "import dill as d",
    "a module's function": "import pickle\npickle.loads(b'')",
    "eval": "eval('1')",
    "exec": "exec('1')",
    "a shell": "import os\nos.system('ls')",
    "a subprocess's shell": "import subprocess\nsubprocess.run('ls', shell=True)",
    "a shell that may be": "import subprocess\nsubprocess.run('ls', shell=flag)",
    "remote code": "AutoModel.from_pretrained('x', trust_remote_code=True)",
    "yaml": "import yaml\nyaml.load(text)",
    "an array of objects": "import numpy as np\nnp.load('x')",
    "an array that may hold objects": "import numpy as np\nnp.load('x', allow_pickle=flag)",
    "torch.load": "import torch\ntorch.load('x')",
    "torch.load that may unpickle": "import torch\ntorch.load('x', weights_only=False)",
    "torch.load under its own name": "from torch import load\nload('x')",
}
ALLOWED = {
    "the error's name": "import pickle\ntry:\n    pass\nexcept pickle.UnpicklingError:\n    pass",
    "weights alone": "import torch\ntorch.load('x', weights_only=True)",
    "plain arrays": "import numpy as np\nnp.load('x', allow_pickle=False)",
    "a method of that name": "model.eval()",
    "safetensors": "from safetensors.torch import load\nload(data)",
}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_no_source_can_run_what_it_reads(path):
    assert faults(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("source", FORBIDDEN.values(), ids=FORBIDDEN)
def test_it_is_noticed(source):
    assert faults(source)


@pytest.mark.parametrize("source", ALLOWED.values(), ids=ALLOWED)
def test_what_is_harmless_is_allowed(source):
    assert faults(source) == []


def faults(source: str) -> list[str]:
    """List line and kind of everything that is forbidden."""
    tree = ast.parse(source)
    named = {
        node.value for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "UnpicklingError"
    }  # fmt: skip
    found = []
    for node in ast.walk(tree):
        what = ""
        if isinstance(node, ast.Import):
            # `import pickle` is needed to catch its error; any other use of the name is found below
            modules = {alias.name.partition(".")[0] for alias in node.names if alias.asname}
            plain = {alias.name.partition(".")[0] for alias in node.names}
            what = " ".join((modules & MODULES) | (plain & MODULES - {"pickle"}))
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").partition(".")[0]
            taken = {f"{module}.{alias.name}" for alias in node.names}
            what = module if module in MODULES else " ".join(taken & {*CALLS, "torch.load"})
        elif isinstance(node, ast.Name) and node.id == "pickle" and node not in named:
            what = "pickle"
        elif isinstance(node, ast.Call):
            what = _call_fault(node)
        if what:
            found.append(f"line {node.lineno}: {what}")
    return found


def _call_fault(call: ast.Call) -> str:
    name = ast.unparse(call.func)
    given = {word.arg: getattr(word.value, "value", None) for word in call.keywords}
    if name in BUILTINS | CALLS:
        return name
    for flag in ("shell", "trust_remote_code"):
        if given.get(flag, False) is not False:
            return flag
    safe = {"np.load": "allow_pickle", "numpy.load": "allow_pickle", "torch.load": "weights_only"}
    if name in safe and given.get(safe[name]) is not (name == "torch.load"):
        return name
    if name.startswith("yaml.") and "safe" not in name:
        return name
    return ""
