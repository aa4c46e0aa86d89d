"""The house itself: imports run one way, importing the package is light, and a machine without a compiler installs all the same."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import esper_elastic

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "esper_elastic"

# A module imports itself and what stands in an earlier row. `esper_elastic` is the package's own __init__, which offers the public names.
ORDER = (
    {"errors", "palette"},
    {"control"},
    {"ops"},
    {"layers"},
    {"followers"},
    {"optim", "growth", "importance"},
    {"model"},
    {"convert"},
    {"summary", "calibration"},
    {"surgery"},
    {"checkpoint"},
    {"training"},
    {PACKAGE},
    {"integrations", "datasets"},
    {"demo"},
    {"cli"},
)
ROW = {name: row for row, names in enumerate(ORDER) for name in names}
KERNELS = {"triton_kernels", "_C"}
OPTIONAL = {
    "triton",
    "matplotlib",
    "rich",
    "sklearn",
    "scipy",
    "pandas",
    "torchvision",
    "timm",
    "transformers",
    "safetensors",
    "tensorboard",
}


def package_sources() -> dict[str, str]:
    """Dotted module name -> source, for every module of the package and of its kernels."""
    folders = {ROOT / PACKAGE: PACKAGE, ROOT / "triton_kernels": f"{PACKAGE}.triton_kernels"}
    return {
        ".".join([name, *path.relative_to(folder).with_suffix("").parts]): path.read_text()
        for folder, name in folders.items()
        for path in sorted(folder.rglob("*.py"))
        if "triton_kernels" not in path.relative_to(folder).parts
    }


def imported_names(module: str, source: str) -> Iterator[str]:
    """Every dotted name that a module imports, anywhere in it: relative imports resolved, `import_module("...")` included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # `a.b.__init__` and `a.b.c` both have `a.b` as the package that one dot means
            base = module.split(".")[: -node.level] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            yield from (argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant))


def part_of(name: str) -> str | None:
    """The part of the package that a dotted name belongs to: a name in ORDER or KERNELS; None for what is not of this package."""
    first, *rest = name.split(".")
    if first != PACKAGE:
        return None
    if not rest or rest[0] == "__init__":
        return PACKAGE
    known = rest[0] in ROW or rest[0] in KERNELS or (ROOT / PACKAGE / rest[0]).exists() or (ROOT / PACKAGE / f"{rest[0]}.py").exists()
    return rest[0] if known else PACKAGE  # otherwise something that __init__ defines, such as __version__


def wrong_imports(sources: dict[str, str]) -> list[str]:
    """What breaks the order of imports, one sentence each."""
    wrong = []
    for module, source in sources.items():
        importer = module.removesuffix(".__init__").split(".")[:2][-1]
        if importer not in ROW and importer not in KERNELS:
            wrong.append(f"{module} has no place in the order of imports: add it to ORDER")
            continue
        for name in imported_names(module, source):
            imported = part_of(name)
            if name.split(".")[0] == "triton" and importer not in {"ops", "triton_kernels"}:
                wrong.append(f"{module} imports {name}: only ops may import kernels")
            if imported is None or imported == importer:
                continue
            if imported in KERNELS:
                allowed = importer == "ops"
            else:
                allowed = importer in ROW and imported in ROW and ROW[imported] < ROW[importer]
            if not allowed:
                wrong.append(f"{module} imports {name}")
    return wrong


def test_imports_run_one_way():
    sources = package_sources()
    assert len(sources) > 5
    assert wrong_imports(sources) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        pytest.param("errors", "from .control import ElasticDim", id="upwards"),
        pytest.param("layers.linear", "from .. import optim", id="upwards, package relative"),
        pytest.param("ops.linear", "def f():\n    from ..layers import base", id="inside a function"),
        pytest.param("growth", "import esper_elastic.optim", id="beside"),
        pytest.param("optim.__init__", "from ..growth import grow", id="beside, from a package"),
        pytest.param("surgery.surgeon", "import esper_elastic as ee", id="the package itself"),
        pytest.param("layers.__init__", "from ..triton_kernels import linear", id="kernels outside ops"),
        pytest.param("control", "import importlib\nimportlib.import_module('esper_elastic._C')", id="library outside ops"),
        pytest.param("layers.norm", "import triton.language as tl", id="triton outside ops"),
        pytest.param("triton_kernels.linear", "from esper_elastic.control import ControlBlock", id="kernels import nothing of ours"),
        pytest.param("utils", "import torch", id="no place"),
    ],
)
def test_a_wrong_import_is_found(module, source):
    assert len(wrong_imports({f"{PACKAGE}.{module}": source})) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        pytest.param("control", "from .errors import CapacityError", id="earlier row"),
        pytest.param("ops.linear", "from . import reference\nfrom esper_elastic import triton_kernels", id="kernels from ops"),
        pytest.param("layers.__init__", "from .base import ElasticLayer", id="itself"),
        pytest.param("cli", "import esper_elastic\nfrom . import __version__, demo", id="the package from cli"),
        pytest.param("triton_kernels.linear", "import triton\nfrom . import linear", id="triton from kernels"),
    ],
)
def test_a_right_import_passes(module, source):
    assert wrong_imports({f"{PACKAGE}.{module}": source}) == []


IMPORT_AND_TELL = """
import sys, torch

class Watch:
    tried = set()
    def find_spec(self, name, path=None, target=None):
        self.tried.add(name.split(".")[0])

sys.meta_path.insert(0, Watch())
import esper_elastic
print(*sorted(Watch.tried))
assert not torch.cuda.is_initialized(), "importing the package initialised CUDA"
"""


# An editable installation would lend a copy of the package the compiled library of the checkout.
FORGET_EDITABLE = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')]\n"


def run_python(code: str, cwd: Path) -> str:
    """Standard output of a fresh interpreter whose only esper_elastic is the one in `cwd`."""
    command = [sys.executable, "-c", FORGET_EDITABLE + code]
    done = subprocess.run(command, cwd=cwd, env=os.environ | {"PYTHONPATH": str(cwd)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_takes_no_optional_package_and_no_gpu():
    tried = set(run_python(IMPORT_AND_TELL, ROOT).split())
    assert PACKAGE in tried
    assert tried & OPTIONAL == set()


def test_setup_is_build_and_packages_only():
    assert len((ROOT / "setup.py").read_text().splitlines()) <= 100


def test_no_two_sources_of_the_library_make_one_object_file():
    sources = [path for path in (ROOT / "csrc").rglob("*.c*") if path.suffix in (".cpp", ".cu")]
    assert any(path.suffix == ".cu" for path in sources)
    assert len({path.with_suffix("") for path in sources}) == len(sources)


def test_version_is_one():
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared
    assert declared[1] == esper_elastic.__version__


@pytest.mark.wide
@pytest.mark.parametrize(
    ("compiler", "source", "reason"),
    [
        pytest.param("no-such-compiler", None, "no C++ compiler", id="none"),
        pytest.param("false", None, "'false'", id="fails"),
        pytest.param(None, "#error not today", "Error compiling objects", id="source does not compile"),
    ],
)
def test_without_a_library_the_build_succeeds_and_says_why(tmp_path, compiler, source, reason):
    for name in ("csrc", PACKAGE, "triton_kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    stale = tmp_path / PACKAGE / "_C.abi3.so"
    stale.touch()
    if source is not None:
        shutil.rmtree(tmp_path / "csrc")
        (tmp_path / "csrc").mkdir()
        (tmp_path / "csrc" / "library.cpp").write_text(source)
    environment = os.environ | ({"CXX": compiler} if compiler else {})
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert reason in (tmp_path / PACKAGE / "_build_failure.txt").read_text()
    assert not stale.exists()
    assert reason in run_python("import esper_elastic; print(esper_elastic.backend_info())", tmp_path)
