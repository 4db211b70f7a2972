"""The frame: importing, the direction of imports, pins, and the files a stranger meets first."""
from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
TOP_LEVEL = {".ci", ".github", ".gitignore", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md",
             "data", "figures", "kernels", "notebooks", "pyproject.toml", "requirements.txt", "tests"}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")
HAS_GPU = torch.cuda.is_available()
HAS_TRITON = importlib.util.find_spec("triton") is not None


def python(code: str, cwd=ROOT) -> str:
    """What this code prints in a fresh interpreter; a traceback there fails the test here."""
    fresh = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}  # conftest has set it
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=fresh, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# Importing.

@pytest.mark.parametrize("place", ["root", "notebooks", "elsewhere"])
def test_imports_from(place, tmp_path):
    cwd = {"root": ROOT, "notebooks": ROOT / "notebooks", "elsewhere": tmp_path}[place]
    assert python("import kernels; print(kernels.__file__)", cwd) == str(ROOT / "kernels" / "__init__.py")


def test_import_adds_at_most_half_a_second():
    code = ("import os; os.environ['TRITON_INTERPRET'] = '1'\nimport time, torch\n"
            "try: import triton.language\nexcept ImportError: pass\n"
            "start = time.perf_counter(); import kernels; print(time.perf_counter() - start)")
    assert min(float(python(code)) for _ in range(3)) <= 0.5


PEACE = """
import torch
{first}
{second}
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import is_kernels_available
from kernels import rms_norm, runtime
assert not is_kernels_available()
config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
assert LlamaForCausalLM(config)(torch.zeros(1, 3, dtype=torch.long)).logits.isfinite().all()
x, weight = torch.ones(2, 8, device=runtime.device()), torch.ones(8, device=runtime.device())
try:
    print(torch.equal(rms_norm.triton(x, weight), rms_norm.python(x, weight)))
except runtime.Unavailable as why:
    print(why)
"""


def test_lives_in_peace_with_transformers_imported_after():
    said = python(PEACE.format(first="import kernels", second="import transformers"))
    assert said == "True" or not HAS_TRITON and "Triton cannot be imported here" in said


def test_lives_in_peace_with_transformers_imported_before():
    said = python(PEACE.format(first="import transformers", second="import kernels"))
    assert said == "True" or "restart the kernel and import kernels first" in said.lower() or not HAS_TRITON


@pytest.mark.skipif(not HAS_TRITON, reason="there is no Triton here")
def test_triton_imported_first_is_explained():
    said = python(PEACE.format(first="import triton", second="import kernels"))
    assert said == "True" if HAS_GPU else "restart the kernel and import kernels first" in said.lower()


def test_without_triton_the_specification_runs_and_triton_explains_itself():
    said = python("""
import sys
sys.modules["triton"] = None
import torch
from kernels import rms_norm, runtime
assert not runtime.HAS_TRITON and runtime.where() == "RECORDED"
x = torch.tensor([[3.0, 4.0]])
assert torch.allclose(rms_norm.python(x, torch.ones(2)), x / 12.5**0.5)
try:
    rms_norm.triton(x, torch.ones(2))
except runtime.Unavailable as why:
    print(why)
""")
    assert said.startswith("rms_norm.triton: Triton cannot be imported here")
    assert ".python" in said


def test_a_stand_in_kernel_keeps_its_source_and_refuses_to_launch():
    said = python("""
import sys
sys.modules["triton"] = None
import inspect, kernels
from kernels.runtime import Unavailable
from kernels.arithmetic.sums import tree
assert "def tree" in inspect.getsource(tree.fn)
try:
    tree[(1,)]
except Unavailable as why:
    print(why)
""")
    assert "Triton cannot be imported here" in said


# Floors: each room imports from the floors below it, or from its own.

FLOORS = (("kernels.bits", "kernels.op", "kernels.runtime"),
          ("kernels.launch", "kernels.call", "kernels.tables", "kernels.arithmetic"),
          ("kernels.ops",),
          ("kernels", "kernels.model", "kernels.mode"),  # `kernels` itself names the ops
          ("kernels.inference",),
          ("kernels.training", "kernels.lab"),
          ("kernels.__main__", "figures"))


def floor(module: str) -> int:
    for number, rooms in enumerate(FLOORS):
        if module in rooms:
            return number
    return floor(module.rpartition(".")[0])


def imports(path: Path, name: str, whole: bool = True) -> set[str]:
    """Modules of this repository that a file imports, under their full names; not `whole`: at module level alone."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found, tree = set(), ast.parse(path.read_text())
    for node in ast.walk(tree) if whole else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" if is_module(f"{base}.{alias.name}") else base for alias in node.names}
    return {module for module in found if module.split(".")[0] in ("kernels", "figures")}


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def modules() -> dict[str, Path]:
    files = [*(ROOT / "kernels").rglob("*.py"), *(ROOT / "figures").glob("*.py")]
    return {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


def upward(name: str, path: Path) -> list[str]:
    return [f"{name} imports {other}" for other in sorted(imports(path, name)) if floor(other) > floor(name)]


def private(path: Path) -> list[str]:
    """Names with a leading underscore that a file takes from another one of this project."""
    tree = ast.parse(path.read_text())
    taken = [alias for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
             if node.level or (node.module or "").split(".")[0] in ("kernels", "figures") for alias in node.names]
    held = {alias.asname or alias.name for alias in taken}
    reached = [f"{node.value.id}.{node.attr}" for node in ast.walk(tree) if isinstance(node, ast.Attribute)
               and isinstance(node.value, ast.Name) and node.value.id in held]
    return [name for name in (*(alias.name for alias in taken), *reached)
            if re.search(r"(^|\.)_(?!_)", name)]


def test_imports_point_one_way():
    assert [fault for name, path in modules().items() for fault in upward(name, path)] == []


def test_no_private_name_crosses_a_file():
    assert {name: found for name, path in modules().items() if (found := private(path))} == {}


@pytest.mark.parametrize("line", [
    "from ..lab import bench", "from kernels.lab.bench import measure", "import kernels.lab", "from .. import OPS",
    "def f():\n    from ..model import llama"])
def test_an_import_upward_is_found(line, tmp_path):
    (tmp_path / "softmax.py").write_text(line)
    assert len(upward("kernels.ops.softmax", tmp_path / "softmax.py")) == 1


@pytest.mark.parametrize("line", [
    "from .rms_norm import _inputs", "from kernels.ops.mean import _view as view", "from . import mean\nmean._view",
    "def f():\n    from .. import bits\n    bits._hash"])
def test_a_private_name_that_crosses_is_found(line, tmp_path):
    (tmp_path / "softmax.py").write_text(line)
    assert len(private(tmp_path / "softmax.py")) == 1


def test_no_file_imports_in_a_circle():
    """At module level, that is: imports inside functions may wait for each other."""
    found = {name: {other for other in imports(path, name, whole=False) if other in modules()} - {name}
             for name, path in modules().items()}
    while found:
        free = {name for name, needs in found.items() if not needs & set(found)}
        assert free, f"these import each other: {sorted(found)}"
        found = {name: needs for name, needs in found.items() if name not in free}


# Pins and the files beside the code.

*PINS, ABOUT_ITSELF, ITSELF = filter(None, (ROOT / "requirements.txt").read_text().splitlines())


@pytest.mark.parametrize("line", PINS)
def test_a_requirement_is_pinned_and_says_why(line):
    assert re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9.]*\s*(;[^#]+)?\s+# \S.{10,}", line)


def test_the_requirements_alone_install_the_suite_too():
    """pip reads the last line; setuptools, which reads the file for the suite's own needs, has to drop it."""
    assert ABOUT_ITSELF.startswith("# ") and ITSELF == "-e . \\"
    needs = [need for need in importlib.metadata.requires(PYPROJECT["project"]["name"]) if "extra ==" not in need]
    assert [need.split(";")[0] for need in needs] == [line.split("#")[0].split(";")[0].strip() for line in PINS]


@pytest.mark.parametrize("name", ["test", "site"])
def test_an_extra_is_pinned(name):
    extra = PYPROJECT["project"]["optional-dependencies"][name]
    assert extra
    assert [r for r in extra if not re.fullmatch(r"[a-z0-9_.-]+==[0-9][0-9.]*", r)] == []


def test_torch_and_triton_are_the_pair_torch_asks_for():
    pins = dict(re.match(r"([a-z]+)==([0-9.]+)", line).groups() for line in PINS[:2])
    assert pins == {"torch": "2.13.0", "triton": "3.7.1"}


@needs_make
def test_the_makefile_reads_torchs_pin_from_requirements():
    dry = subprocess.run(["make", "--dry-run", "--always-make", "figures"], cwd=ROOT, capture_output=True, text=True)
    installs = [line for line in dry.stdout.splitlines() if "pip install" in line]
    assert [line.split()[-1] for line in installs] == ['"torch==2.13.0"', '".[test]"']


@needs_make
@pytest.mark.parametrize("target", ["lab", "test", "mutants", "figures", "notebooks", "record", "site", "slides",
                                    "student"])
def test_make_help_lists(target):
    said = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.search(rf"^make {target}\s+\S", said, re.M)


@needs_make
def test_an_old_python_is_refused_before_anything_is_made(tmp_path):
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    old = tmp_path / "old-python"
    old.write_text("#!/bin/sh\n[ $1 = -V ] && echo Python 3.9.1\nexit 1\n")
    old.chmod(0o755)
    made = subprocess.run(["make", "test", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True)
    assert made.returncode != 0
    assert "Python 3.11 or newer is needed" in made.stderr and "Python 3.9.1" in made.stderr
    assert not (tmp_path / ".venv").exists()


@needs_make
def test_an_interrupted_set_up_leaves_no_stamp(tmp_path):
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".ready").touch()
    os.utime(tmp_path / ".venv" / ".ready", (0, 0))
    broken = tmp_path / "python"  # new enough, and dies while it makes the environment
    broken.write_text("#!/bin/sh\n[ $1 = -m ] && exit 1\nexit 0\n")
    broken.chmod(0o755)
    made = subprocess.run(["make", "test", f"PYTHON={broken}"], cwd=tmp_path, capture_output=True, text=True)
    assert made.returncode != 0
    assert not (tmp_path / ".venv" / ".ready").exists()


@pytest.fixture
def made_venv(tmp_path):
    """A folder whose .venv bears a stamp of its Python and pins; gives whether `make` would set it up again."""
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    pythons = {version: tmp_path / path for version, path in (("3.12.1", ".venv/bin/python"), ("3.13.0", "newer"))}
    for version, python in pythons.items():
        python.write_text(f"#!/bin/sh\necho Python {version}\n")
        python.chmod(0o755)
    pins = "".join((tmp_path / name).read_text() for name in ("requirements.txt", "pyproject.toml"))
    (tmp_path / ".venv" / ".ready").write_text(f"{pins}Python 3.12.1\n")

    def set_up_again(*named):
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "MAKEFLAGS")}
        dry = subprocess.run(["make", "--dry-run", "figures", *named], cwd=tmp_path, env=environment,
                             capture_output=True, text=True, check=True)
        assert "-m figures" in dry.stdout
        return "pip install" in dry.stdout
    return tmp_path, set_up_again


@needs_make
def test_the_environment_is_kept_while_its_pins_and_python_are_the_same(made_venv):
    folder, set_up_again = made_venv
    assert not set_up_again()
    os.utime(folder / ".venv" / ".ready", (0, 0))  # a checkout or a copy: older than the pins, which are the same
    assert not set_up_again() and not set_up_again(f"PYTHON={folder}/.venv/bin/python")


@needs_make
@pytest.mark.parametrize("change", ["requirements.txt", "pyproject.toml", "python", "stamp", "caller"])
def test_the_environment_is_set_up_again_after_a_change(change, made_venv):
    folder, set_up_again = made_venv
    if change == "python":
        (folder / "newer").replace(folder / ".venv" / "bin" / "python")
    elif change == "stamp":
        (folder / ".venv" / ".ready").write_text("")
    elif change != "caller":
        before = (folder / change).stat()
        (folder / change).write_text((folder / change).read_text().replace("2", "3", 1))
        os.utime(folder / change, (0, before.st_mtime - 9**9))  # older than the stamp
    assert set_up_again(*[f"PYTHON={folder}/newer"] * (change == "caller"))


def test_citation_names_this_version_and_licence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == PYPROJECT["project"]["version"]
    assert citation["license"] == PYPROJECT["project"]["license"] == "MIT"
    assert citation["authors"] and citation["title"] and citation["message"]


def test_licence_is_mit():
    text = (ROOT / "LICENSE").read_text()
    assert text.startswith("MIT License\n\nCopyright (c) 2026 the Same Bits authors\n")
    assert "WITHOUT WARRANTY OF ANY KIND" in text


def git(*arguments, cwd=ROOT) -> list[str]:
    done = subprocess.run(["git", *arguments], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"not a git checkout: {done.stderr.strip()}")
    return done.stdout.splitlines()


def test_top_level_has_only_the_named_files():
    listed = git("ls-files", "--cached", "--others", "--exclude-standard")
    assert {name.split("/")[0] for name in listed} - TOP_LEVEL == set()


@pytest.mark.parametrize("cache", [
    ".venv/bin/python", "kernels/__pycache__/op.cpython-311.pyc", "same_bits.egg-info/PKG-INFO",
    "notebooks/.ipynb_checkpoints/x.ipynb", ".pytest_cache/x", ".ruff_cache/x", ".hypothesis/x",
    "notebooks/.virtual_documents/x", "data/h200/token_sweep.csv.lock", "data/h200/abc.tmp",
    "build/site/html/index.html"])
def test_caches_are_ignored(cache, tmp_path):
    git("init", "-q", cwd=tmp_path)
    (tmp_path / ".gitignore").write_bytes((ROOT / ".gitignore").read_bytes())
    ignored = subprocess.run(["git", "check-ignore", "--quiet", cache], cwd=tmp_path)
    assert ignored.returncode == 0


# What the tests themselves rest on.

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_uninitialised_memory_is_nan_in_tests(dtype):
    assert torch.empty(4, dtype=dtype).isnan().all()
    assert torch.empty_like(torch.ones(4, dtype=dtype)).isnan().all()
