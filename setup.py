"""Builds the C library of kernels into the package; all else is in pyproject.toml.

The compiler is ziglang from PyPI, since a fresh machine has none, or else the system's `cc`. An
install never fails for want of one: plain torch serves then, and says so.
"""

import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).parent
SOURCES = ROOT / "engine" / "kernels" / "native"
LIBRARY = Path("engine") / "kernels" / "libisthmus.so"

FLAGS = [
    *("-O3", "-fPIC", "-std=gnu11", "-fvisibility=hidden", "-Wno-psabi"),
    # One rounding for a multiplication and its addition, on every level that can.
    *("-ffp-contract=fast", "-fno-math-errno"),
]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, *(f"-mavx512{part}" for part in ("f", "dq", "cd", "bw", "vl"))]
BF16 = [*AVX512, "-mavx512bf16"]
PORTABLE_UNITS = [
    ("pool", []),
    ("library", []),
    ("call_linear", []),
    ("call_rows", []),
    ("call_attention", []),
    ("layer", []),
    ("collectives", []),
    ("copy", []),
    ("wire", []),
    ("mailbox", []),
    ("rank_sum", []),
    ("rank_wait", []),
    ("level", ["-DLEVEL=portable"]),
]
X86_UNITS = [
    ("level", ["-DLEVEL=avx2", *AVX2]),
    ("level", ["-DLEVEL=avx512", *AVX512]),
    ("level", ["-DLEVEL=avx512_bf16", *BF16]),
    ("dot", BF16),
    ("amx_linear", [*BF16, "-mamx-tile", "-mamx-bf16"]),
    ("amx_attention", [*BF16, "-mamx-tile", "-mamx-bf16"]),
]


def compilers() -> list[list[str]]:
    """Command lines to try, best first."""
    found = []
    if find_spec("ziglang"):
        target = []
        if sys.platform == "linux" and platform.machine() in {"x86_64", "aarch64"}:
            target = ["-target", f"{platform.machine()}-linux-gnu.2.17"]  # runs on older systems
        found.append([sys.executable, "-m", "ziglang", "cc", *target])
    if cc := shutil.which("cc"):
        found.append([cc])
    return found


def compile_library(compiler: list[str], output: Path) -> None:
    """Compile all units at once, link them, and put the result in place in one move.

    Raises:
        subprocess.CalledProcessError: the compiler refused; its words are in stderr.
    """
    units = PORTABLE_UNITS + (X86_UNITS if platform.machine() in {"x86_64", "AMD64"} else [])
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as threads:

        def compile_unit(index: int) -> str:
            name, flags = units[index]
            unit = str(Path(folder) / f"{index}.o")
            run([*compiler, *FLAGS, *flags, "-c", str(SOURCES / f"{name}.c"), "-o", unit])
            return unit

        objects = list(threads.map(compile_unit, range(len(units))))
        library = Path(folder) / output.name
        run([*compiler, "-shared", *objects, "-o", str(library), "-lpthread", "-lm"])
        output.parent.mkdir(parents=True, exist_ok=True)
        staged = output.with_suffix(".new")  # a process that runs the old one keeps its file
        shutil.copyfile(library, staged)
        staged.replace(output)


def run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def build_library(output: Path) -> None:
    """Build with the first compiler that works, or say why none did."""
    reasons = [] if compilers() else ["neither ziglang nor cc was found"]
    for compiler in compilers():
        try:
            compile_library(compiler, output)
        except (OSError, subprocess.CalledProcessError) as error:
            reasons.append(f"{' '.join(compiler)}: {getattr(error, 'stderr', None) or error}")
        else:
            return
    print("isthmus: no native kernels, plain torch will serve:", *reasons, sep="\n  ")  # noqa: T201


class BuildWithLibrary(build_py):
    """Wheels carry the library."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            build_library(Path(self.build_lib) / LIBRARY)


class EditableWithLibrary(editable_wheel):
    """Editable installs get it beside the sources."""

    def run(self) -> None:
        build_library(ROOT / LIBRARY)
        super().run()


class BinaryDistribution(Distribution):
    """Tags wheels with the platform, though no extension module is declared."""

    def has_ext_modules(self) -> bool:
        return True


setup(
    cmdclass={"build_py": BuildWithLibrary, "editable_wheel": EditableWithLibrary},
    distclass=BinaryDistribution,
)
