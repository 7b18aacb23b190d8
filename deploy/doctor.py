"""`isthmus doctor`: what this machine has, what is missing, and what to do about it."""

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from deploy.launcher.core_plan import usable_cores
from deploy.launcher.redis_server import find_redis_server
from deploy.progress import console

_NEEDED_BYTES = 2 << 30
_NEEDED_MODULES = ("torch", "grpc", "tokenizers", "safetensors", "gguf", "redis", "uvicorn")
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. `advice` is empty when all is well."""

    what: str
    found: str
    advice: str = ""
    is_needed: bool = True


def findings(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Look at one thing after the other."""
    yield Finding("system", f"{platform.system()} {platform.machine()}", _system_advice())
    yield Finding("Python", platform.python_version(), "" if _is_new_enough() else "use 3.11+")
    for name in _NEEDED_MODULES:
        if importlib.util.find_spec(name) is None:
            yield Finding(name, "not installed", "pip install isthmus")
    yield Finding("cores", f"{len(usable_cores())} usable, {_cpu_flags() or 'no AVX2'}")
    yield _memory()
    redis = find_redis_server()
    yield Finding(
        "redis-server",
        str(redis or "none"),
        "" if redis else "apt-get install redis-server, or pass --redis-url",
    )
    yield _demo_model(environment)
    yield _cuda()


def _system_advice() -> str:
    return "" if platform.system() == "Linux" else "Isthmus needs Linux"


def _is_new_enough() -> bool:
    return sys.version_info >= (3, 11)


def _cpu_flags() -> str:
    """The instruction sets that matter for matrix products, as far as Linux names them."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "unknown"
    flags = set(text.partition("\nflags")[2].partition("\n")[0].split())
    return " ".join(flag for flag in _CPU_FLAGS if flag in flags)


def _memory() -> Finding:
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    advice = "" if available >= _NEEDED_BYTES else "the demo mesh needs about 2 GB"
    return Finding("free memory", f"{available / 1e9:.1f} GB", advice, is_needed=False)


def _demo_model(environment: Mapping[str, str]) -> Finding:
    from engine.checkpoint.demo import DEMO_FILE_NAME
    from engine.checkpoint.locate import default_cache_dir

    path = default_cache_dir(environment) / DEMO_FILE_NAME
    if path.is_file():
        return Finding("demo model", str(path))
    return Finding("demo model", "not fetched yet", "`make demo` fetches it", is_needed=False)


def _cuda() -> Finding:
    if shutil.which("nvidia-smi") is None:
        return Finding("GPU", "none, the CPU computes")
    import torch

    if torch.cuda.is_available():
        return Finding("GPU", torch.cuda.get_device_name())
    return Finding("GPU", "present, torch cannot use it", "install a CUDA torch", is_needed=False)


def doctor(environment: Mapping[str, str]) -> int:
    """Print all findings; status 1 when something that is needed is missing."""
    is_well = True
    for finding in findings(environment):
        mark = "[green]ok[/]  " if not finding.advice else "[red]FIX[/] "
        if finding.advice and not finding.is_needed:
            mark = "[yellow]note[/]"
        console.print(f"{mark} {finding.what}: {finding.found}", soft_wrap=True)
        if finding.advice:
            console.print(f"       {finding.advice}", markup=False, soft_wrap=True)
            is_well = is_well and not finding.is_needed
    return 0 if is_well else 1
