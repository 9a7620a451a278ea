"""Memory that processes share: anonymous files that each of them maps.

Nothing has a name in a file system, so nothing is left behind when a process is killed.
"""

from __future__ import annotations

import dataclasses
import io
import math
import mmap
import os
import pickle
import tempfile
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from model.arrays import AnyArray


class SharedBlock:
    """An anonymous file in memory. Its pages take no memory before they are written.

    Args:
        fd: of the file; the block closes it.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @classmethod
    def create(cls, size: int = 0) -> Self:
        """Create a block of `size` zeros."""
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("unet-image", os.MFD_CLOEXEC)
        else:  # macOS: a file without a name, which the system keeps in its cache
            with tempfile.TemporaryFile() as file:
                fd = os.dup(file.fileno())
        block = cls(fd)
        os.ftruncate(fd, size)
        return block

    @classmethod
    def holding(cls, data: bytes) -> Self:
        """Create a block with a copy of `data`."""
        block = cls.create()
        block.append(data)
        return block

    def append(self, data: bytes) -> None:
        """Write `data` after what the block contains."""
        end, rest = os.fstat(self.fd).st_size, memoryview(data)
        while rest:  # one call writes at most 2 GB
            written = os.pwrite(self.fd, rest, end)
            end, rest = end + written, rest[written:]

    def read(self, start: int = 0, size: int | None = None) -> bytes:
        """Copy `size` bytes from `start`, or all that follow."""
        if size is None:
            size = os.fstat(self.fd).st_size - start
        return os.pread(self.fd, size, start)

    def map(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> AnyArray:
        """Map the beginning of the block as an array. It stays valid when the block is closed."""
        count = math.prod(shape)
        mapped = mmap.mmap(self.fd, count * np.dtype(dtype).itemsize)
        return np.frombuffer(mapped, dtype, count).reshape(shape)

    def store(self, array: AnyArray) -> StoredArray:
        """Copy an array to the beginning of the block, which must be large enough."""
        stored = StoredArray(self, array.shape, array.dtype.str)
        stored.map()[...] = array
        return stored

    def close(self) -> None:
        """Close the file. Its memory is freed when no process has it open or mapped."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array at the beginning of a block."""

    block: SharedBlock
    shape: tuple[int, ...]
    dtype: str

    def map(self) -> AnyArray:
        """Map the array."""
        return self.block.map(self.shape, self.dtype)


class _Pickler(pickle.Pickler):
    """Replaces each block by the index of its file descriptor."""

    def __init__(self, file: io.BytesIO, fds: list[int]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._fds = fds

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, SharedBlock):
            return None
        self._fds.append(value.fd)
        return len(self._fds) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, fds: list[int]) -> None:
        super().__init__(file)
        self._blocks = [SharedBlock(fd) for fd in fds]

    def persistent_load(self, index: int) -> SharedBlock:
        return self._blocks[index]


def pack(message: Any) -> tuple[bytes, list[int]]:
    """Pickle a message. The file descriptors of its blocks have to be sent with it."""
    file, fds = io.BytesIO(), list[int]()
    _Pickler(file, fds).dump(message)
    return file.getvalue(), fds


def unpack(data: bytes, fds: list[int]) -> Any:
    """Undo `pack` in the process that received the file descriptors."""
    return _Unpickler(io.BytesIO(data), fds).load()
