"""Fails when the generated stubs and the .proto files differ: `python -m protos.check`."""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMPILE = "python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=."


def compiled_stubs(root: Path, protos: list[Path], out: Path) -> dict[Path, str]:
    """Compile `protos` into `out`; the stubs' text by their path below `root`.

    Raises:
        ValueError: a .proto file does not compile; the text is the compiler's.
    """
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(root)]
    command += [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
    result = subprocess.run(
        [*command, *map(str, protos)], capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise ValueError(result.stderr.strip())
    return {path.relative_to(out): path.read_text() for path in out.rglob("*_pb2*.py*")}


def differing_stubs(root: Path = ROOT) -> list[str]:
    """One line for each stub below `root` that is missing, differs, or has no .proto any more."""
    protos = sorted((root / "protos").rglob("*.proto"))
    committed = {
        path.relative_to(root): path.read_text()
        for pattern in ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py")
        for path in (root / "protos").rglob(pattern)
    }
    with tempfile.TemporaryDirectory(prefix="isthmus-protos-") as out:
        wanted = compiled_stubs(root, protos, Path(out))
    lines = [f"{path}: no .proto file for this stub" for path in committed.keys() - wanted.keys()]
    for path, text in wanted.items():
        if path not in committed:
            lines.append(f"{path}: missing")
        elif _normalised(committed[path]) != _normalised(text):
            lines.append(f"{path}: differs from what its .proto compiles to")
    return sorted(lines)


def _normalised(text: str) -> list[str]:
    """Lines without what a checkout or an editor may change: line ends and trailing blanks."""
    return [line.rstrip() for line in text.strip().splitlines()]


def main() -> int:
    """Returns the exit status."""
    lines = differing_stubs()
    for line in lines:
        sys.stderr.write(f"{line}\n")
    if lines:
        sys.stderr.write(f"run `make protos` ({COMPILE} protos/isthmus/v1/*.proto)\n")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
