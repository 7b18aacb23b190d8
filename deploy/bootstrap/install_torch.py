"""`install_torch.py VERSION cpu|cuda`: install torch without gigabytes that the machine cannot use.

What pip finds for `torch` on Linux brings CUDA's libraries, some 3 GB. On a machine without a GPU
the CPU build is tried first: from the indexes that pip is set up with, then from PyTorch's own.
"""

import subprocess
import sys

CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def attempts(version: str, variant: str) -> list[list[str]]:
    """Arguments of `pip install`, to be tried in this order."""
    plain = [f"torch=={version}"]
    if variant == "cuda":
        return [plain]
    impatient = ["--retries", "1", "--timeout", "15"]
    return [
        [f"torch=={version}+cpu"],
        [f"torch=={version}", "--index-url", CPU_INDEX, *impatient],
        plain,
    ]


def install(version: str, variant: str) -> int:
    """Status of the first attempt that worked, else of the last."""
    status = 1
    for arguments in attempts(version, variant):
        print("pip install", *arguments, flush=True)
        command = [sys.executable, "-m", "pip", "install", *arguments]
        status = subprocess.run(command, check=False).returncode
        if status == 0:
            break
    return status


if __name__ == "__main__":
    _, version, variant = sys.argv
    if variant not in {"cpu", "cuda"}:
        sys.exit(f"TORCH_VARIANT must be cpu or cuda, got {variant!r}")
    sys.exit(install(version, variant))
