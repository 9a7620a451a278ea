"""Memory that processes share: anonymous files that each of them reads, writes and maps.

Nothing has a name in a file system, so nothing is left behind when a process is killed.
"""

from __future__ import annotations

import dataclasses
import errno
import io
import math
import mmap
import os
import pickle
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import numpy as np

from app.errors import Unavailable
from model.arrays import AnyArray

_MAP_FROM = 1 << 22
"""Bytes from which an array is mapped. A smaller one is copied: its page faults would cost more."""
_MAX_CACHED = 1 << 25
"""Bytes of all blocks that are kept for reuse."""
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC})
"""Errors of a system that has no file descriptors or memory left."""


class SharedBlock:
    """An anonymous file in memory, which grows as it is written.

    Args:
        fd: of the file; the block closes it.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @classmethod
    def create(cls) -> Self:
        """Create an empty block."""
        if hasattr(os, "memfd_create"):
            return cls(os.memfd_create("unet-image", os.MFD_CLOEXEC))
        with tempfile.TemporaryFile() as file:  # macOS: a file without a name
            return cls(os.dup(file.fileno()))

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return os.fstat(self.fd).st_size

    def write(self, data: bytes | memoryview, start: int = 0) -> int:
        """Write `data` from `start` on, and return where it ends."""
        rest = memoryview(data)
        while rest:  # one call writes at most 2 GB
            written = os.pwrite(self.fd, rest, start)
            start, rest = start + written, rest[written:]
        return start

    def read(self, size: int, start: int = 0) -> bytes:
        """Copy `size` bytes from `start` on."""
        return os.pread(self.fd, size, start)

    def store(self, array: AnyArray) -> StoredArray:
        """Store an array at the beginning of the block."""
        stored = StoredArray(self, array.shape, array.dtype.str)
        if stored.is_large:
            stored.map()[...] = array
        else:
            self.write(np.ascontiguousarray(array).data.cast("B"))
        return stored

    def clear(self) -> None:
        """Make the block empty. Mapping it again gives zeros."""
        os.ftruncate(self.fd, 0)

    def close(self) -> None:
        """Close the file. Its memory is freed when no process has it open or mapped."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close()


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array at the beginning of a block."""

    block: SharedBlock
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def is_large(self) -> bool:
        """Whether it is mapped and not copied."""
        return self.nbytes >= _MAP_FROM

    def load(self) -> AnyArray:
        """Copy a small array, map a large one. The result stays valid when the block is closed.

        It may be read-only.
        """
        if self.is_large:
            return self.map()
        return np.frombuffer(self.block.read(self.nbytes), self.dtype).reshape(self.shape)

    def map(self) -> AnyArray:
        """Map the array. What was not written since the block was empty is zero."""
        if self.block.size < self.nbytes:
            os.ftruncate(self.block.fd, self.nbytes)
        mapped = mmap.mmap(self.block.fd, self.nbytes)
        return np.frombuffer(mapped, self.dtype).reshape(self.shape)


class BlockCache:
    """Hands out blocks, and keeps small ones for reuse: their memory is already allocated."""

    def __init__(self) -> None:
        self._free: list[SharedBlock] = []

    @contextmanager
    def borrow(self) -> Iterator[SharedBlock]:
        """A block with any content.

        After an error it is not reused: the process whose call was cancelled may still write to it.

        Raises:
            Unavailable: the system has no file descriptors or no memory for it.
        """
        block = None
        try:
            block = self._free.pop() if self._free else SharedBlock.create()
            yield block
        except BaseException as error:
            if block is not None:
                block.close()
            if isinstance(error, OSError) and error.errno in _EXHAUSTED:
                text = "the service has no memory or files left for this image; retry in a moment"
                raise Unavailable(text, retry_after=1) from error
            raise
        cached = sum(each.size for each in self._free)
        if block.size < _MAP_FROM and cached + block.size <= _MAX_CACHED:
            self._free.append(block)
        else:
            block.close()

    def close(self) -> None:
        """Free all blocks that are not in use."""
        while self._free:
            self._free.pop().close()


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
