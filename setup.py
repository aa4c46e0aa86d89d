"""Builds the C++ library of ``csrc`` and lists the packages; everything else is declared in ``pyproject.toml``.

The library is the module ``esper_elastic._C``, and importing it registers its ops with torch. Where it cannot
be built the installation goes on without it: the reason is left in ``esper_elastic/_build_failure.txt``, which
``esper_elastic.backend_info()`` reports.
"""

import os
import shlex
import shutil
import sys
from pathlib import Path

import torch
from setuptools import Extension, find_packages, setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension, get_cxx_compiler

ROOT = Path(__file__).resolve().parent
FAILURE = "_build_failure.txt"
CXX_FLAGS = ["-O3", "-g0", "-std=c++20", "-fno-math-errno", "-fopenmp"]
NVCC_FLAGS = ["-O3", "-std=c++20"]

# The interpreter's own ninja, whether or not its environment is activated: two versions of ninja discard each other's logs and compile all.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def sources(pattern: str) -> list[str]:
    """Files of ``csrc`` that match, relative to the root as setuptools wants them, in an order that does not depend on the disk."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(pattern))


def library() -> Extension:
    """The library: for the CPU everywhere, with ``csrc/cuda`` where both a CUDA build of torch and nvcc are found."""
    with_cuda = torch.version.cuda is not None and CUDA_HOME is not None and bool(sources("cuda/*.cu"))
    if with_cuda and not torch.cuda.is_available():  # torch asks the GPUs that it sees what to compile for, and fails where it sees none
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    cpu_files = [path for path in sources("**/*.cpp") if not path.startswith("csrc/cuda/")]
    return (CUDAExtension if with_cuda else CppExtension)(
        "esper_elastic._C",
        cpu_files + (sources("cuda/*.cpp") + sources("cuda/*.cu") if with_cuda else []),
        depends=[*sources("**/*.h"), *sources("**/*.cuh"), "setup.py", torch.version.__file__],
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[("ESPER_ELASTIC_WITH_CUDA", "1")] if with_cuda else [],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
        extra_link_args=["-fopenmp"],
    )


class OptionalBuild(BuildExtension):
    """Compiles with ninja into ``build/csrc``, whoever asks, so that only what changed is compiled again; a failure is no error."""

    def finalize_options(self) -> None:
        """Keep one place for object files: an editable installation would take a new temporary folder each time."""
        super().finalize_options()
        self.build_temp = str(ROOT / "build" / "csrc")

    def build_extensions(self) -> None:
        """Build; on failure write the reason, and remove older libraries, which would not fit the Python code beside them."""
        compiler = get_cxx_compiler()
        homes = [ROOT / "esper_elastic", Path(self.build_lib) / "esper_elastic"]
        for home in homes:
            (home / FAILURE).unlink(missing_ok=True)
        try:
            if shutil.which(shlex.split(compiler)[0]) is None:
                raise FileNotFoundError(f"no C++ compiler: {compiler!r} is not on PATH")
            super().build_extensions()
        except (Exception, SystemExit) as error:
            reason = f"{' '.join(str(error).split())[:300]} (compiler {compiler!r}, torch {torch.__version__})"
            self.warn(f"esper_elastic goes on without its compiled library: {reason}")
            for home in homes:
                home.mkdir(parents=True, exist_ok=True)
                (home / FAILURE).write_text(reason + "\n")
                for stale in home.glob("_C*.so"):
                    stale.unlink()
            for extension in self.extensions:
                extension.optional = True  # whoever copies or installs the library next does without it


setup(
    packages=[*find_packages(include=["esper_elastic", "esper_elastic.*"]), "esper_elastic.triton_kernels"],
    package_dir={"esper_elastic.triton_kernels": "triton_kernels"},
    package_data={"esper_elastic": ["py.typed"]},
    ext_modules=[library()],
    cmdclass={"build_ext": OptionalBuild},
)
