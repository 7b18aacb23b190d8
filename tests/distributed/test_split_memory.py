"""A rank holds its share of the weights while it loads them, not the whole checkpoint."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.kernels import choose_kernels
from engine.models.build import load_model
from engine.parallel import RankGroup
from tests.checkpoints import tiny_checkpoint, write_gguf
from tests.distributed.ranks import run_ranks

PAGE_BYTES = 4096
CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 8192,
}
SLACK_BYTES = 16 << 20
"""Of 48 MB in all: a module that is loaded and packed is held twice, one from a GGUF file three
times, and the allocator keeps some of what was freed."""


class PeakMemory:
    """The most memory of its own that this process has in a `with` block, above its start.

    Pages of mapped files do not count: they are the page cache's, one copy for all ranks.
    """

    def __enter__(self) -> "PeakMemory":
        self._is_over = threading.Event()
        self._start_bytes = self._peak_bytes = own_bytes()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._is_over.set()
        self._thread.join()

    @property
    def num_bytes(self) -> int:
        return self._peak_bytes - self._start_bytes

    def _watch(self) -> None:
        while not self._is_over.wait(0.0002):
            self._peak_bytes = max(self._peak_bytes, own_bytes())


def own_bytes() -> int:
    _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
    return (int(resident) - int(shared)) * PAGE_BYTES


def peak_of_loading(group: RankGroup, path: str) -> int:
    kernels = choose_kernels(CPU, torch.bfloat16, 1)
    with PeakMemory() as peak:
        model = load_model(Path(path), kernels=kernels, dtype="bfloat16", axes=group.axes)
    assert model.stage_layers
    return peak.num_bytes


def write_checkpoint(root: Path, form: str) -> tuple[Path, int]:
    """A path, and the bytes of all its weights in bfloat16."""
    path = tiny_checkpoint(root, dtype="bfloat16", **SIZES)
    num_bytes = (path / "model.safetensors").stat().st_size
    return path if form == "safetensors" else write_gguf(path, root / form, "Q8_0"), num_bytes


@pytest.mark.parametrize("form", ["safetensors", "gguf"])
def test_a_rank_needs_memory_for_its_share_only(form: str, tmp_path: Path) -> None:
    path, all_bytes = write_checkpoint(tmp_path, form)
    (alone,) = run_ranks(1, peak_of_loading, str(path))
    assert alone > all_bytes, "the measurement misses what is there"
    for layout, share in (("tp=4", 1 / 4), ("pp=2,tp=2", 1 / 3)):
        peaks = run_ranks(layout, peak_of_loading, str(path))
        assert max(peaks) < share * all_bytes + SLACK_BYTES, (layout, peaks)
