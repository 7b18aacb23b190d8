"""The paged KV pool: one tensor of blocks, on CPU in memory that other processes can map.

Shape suffixes: P blocks, L layers, J parts (key, value), G KV heads, C slots in a block,
A elements of a row: the head dim, and scales where the layout has them.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

import torch

from engine.kv_cache.layout import KvLayout
from engine.kv_cache.progress import KvProgress
from engine.kv_cache.shared_blocks import shared_blocks

if TYPE_CHECKING:
    import mmap

TORCH_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}


class KvPool:
    """Blocks of one engine; implements `kv_transfer.memory.KvMemory`.

    On CPU the blocks live in a memfd, followed by NONCE_BYTES random bytes: a process on the same
    host can map /proc/<pid>/fd/<n>, and nothing is left behind when this process is gone.
    """

    def __init__(self, layout: KvLayout, num_blocks: int, device: torch.device) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
        self.layout = layout
        self.num_blocks = num_blocks
        self.device = device
        self.progress = KvProgress(layout.num_layers)
        self._fd: int | None = None
        self._map: mmap.mmap | None = None
        shape = (num_blocks, *layout.block_shape)
        dtype = TORCH_DTYPES[layout.dtype]
        if device.type == "cpu":
            self.blocks_PLJGCA = self._shared_tensor(dtype).view(shape)
        else:
            self.blocks_PLJGCA = torch.zeros(shape, dtype=dtype, device=device)
        self._layers = tuple(self.blocks_PLJGCA[:, index] for index in range(layout.num_layers))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def layer(self, index: int) -> torch.Tensor:
        """This layer's strided view kv_PJGCA."""
        return self._layers[index]

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.layout.block_bytes

    @property
    def shared_fd(self) -> int | None:
        return self._fd

    @property
    def nonce(self) -> bytes:
        """The random bytes after the last block; empty without shared memory."""
        return b"" if self._map is None else self._map[self.num_bytes :]

    @property
    def host_bytes(self) -> memoryview | None:
        if self._map is None:
            return None
        return memoryview(self._map)[: self.num_bytes]

    def read_blocks(self, block_ids: Sequence[int]) -> memoryview:
        index_P = self._index(block_ids)
        copied = self.blocks_PLJGCA.index_select(0, index_P).cpu().contiguous()
        return memoryview(copied.flatten().view(torch.uint8).numpy().data)

    def write_slots(
        self, block_id: int, *, layers: slice, heads: slice, slots: slice, data: memoryview
    ) -> None:
        self._check_ids([block_id])
        target_LJGCA = self.blocks_PLJGCA[block_id, layers, :, heads, slots]
        expected = target_LJGCA.numel() * target_LJGCA.element_size()
        if data.nbytes != expected:
            raise ValueError(f"these slots of a block are {expected} bytes, got {data.nbytes}")
        flat = torch.frombuffer(bytearray(data), dtype=target_LJGCA.dtype)
        target_LJGCA.copy_(flat.view(target_LJGCA.shape))
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def close(self) -> None:
        """Close the memfd; the memory goes when the last mapping and tensor view go."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _index(self, block_ids: Sequence[int]) -> torch.Tensor:
        self._check_ids(block_ids)
        return torch.tensor(list(block_ids), dtype=torch.int64, device=self.device)

    def _check_ids(self, block_ids: Sequence[int]) -> None:
        if block_ids and not (min(block_ids) >= 0 and max(block_ids) < self.num_blocks):
            raise ValueError(f"block ids must be in [0, {self.num_blocks})")

    def _shared_tensor(self, dtype: torch.dtype) -> torch.Tensor:
        self._fd, self._map = shared_blocks(self.num_bytes)
        whole = torch.frombuffer(self._map, dtype=torch.uint8)
        return whole[: self.num_bytes].view(dtype)
