"""Settings of TLS for tests: files made for these tests alone, good for a hundred years."""

from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
SECURED: dict[str, Any] = {
    "tls_cert": str(_HERE / "worker.pem"),
    "tls_key": str(_HERE / "worker.key"),
    "tls_ca": str(_HERE / "ca.pem"),
}
UNKNOWN: dict[str, Any] = {
    "tls_cert": str(_HERE / "stranger.pem"),
    "tls_key": str(_HERE / "stranger.key"),
    "tls_ca": str(_HERE / "ca.pem"),
}
"""Signed by somebody else."""
