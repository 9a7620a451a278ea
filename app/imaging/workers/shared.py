"""Memory that processes share: anonymous files that each of them reads, writes and maps.

Nothing has a name in a file system, so nothing is left behind when a process is killed.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import functools
import io
import math
import mmap
import os
import pickle
import queue
import tempfile
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import numpy as np

from app.errors import Unavailable
from model.arrays import AnyArray

_MAP_FROM = 1 << 22
"""Bytes from which an array is mapped wherever it is used. A smaller one is copied, or mapped once
for as long as its block is reused: page faults would cost more than the copy."""
_MAX_CACHED = 1 << 25
"""Bytes of all blocks that are kept for reuse."""
_MAX_REPEATED = 256
"""Values whose pickles are kept; the one that was not used for the longest time goes first."""
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC})
"""Errors of a system that has no file descriptors or memory left."""


class MemoryFreer:
    """A thread that gives memory back: the kernel takes about a millisecond for 4 MB, in which the
    event loop could answer a probe."""

    def __init__(self) -> None:
        # It may be used in a destructor, at any time and on any thread.
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._stopped = False
        threading.Thread(target=self._work, name="memory freer", daemon=True).start()

    def put(self, free: Callable[[], None]) -> None:
        """Call a function on the thread, and return at once. After `stop` it is called here."""
        if self._stopped:
            free()
        else:
            self._calls.put(free)

    def stop(self) -> None:
        """End the thread after the calls that are queued. Does not wait for that."""
        self._stopped = True
        self._calls.put(None)

    def _work(self) -> None:
        while (free := self._calls.get()) is not None:
            free()
            del free


class _Mapping(mmap.mmap):
    """A mapping that `freer` unmaps once nothing refers to it. Without one it is done at once."""

    freer: MemoryFreer | None = None

    def __del__(self) -> None:
        if self.freer is not None:
            self.freer.put(self.close)


class SharedBlock:
    """An anonymous file in memory, which grows as it is written.

    Args:
        fd: of the file; the block closes it.
        freer: gives its memory back if it is large; without one that is done at once.
    """

    def __init__(self, fd: int, freer: MemoryFreer | None = None) -> None:
        self.fd = fd
        self._freer = freer
        self._mapped: _Mapping | None = None

    @classmethod
    def create(cls, freer: MemoryFreer | None = None) -> Self:
        """Create an empty block. On Linux it can grow and not shrink: reading a mapped page that
        another process has cut off would end this one."""
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("unet-image", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
            return cls(fd, freer)
        with tempfile.TemporaryFile() as file:  # macOS: a file without a name
            return cls(os.dup(file.fileno()), freer)

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

    def map(self, size: int) -> mmap.mmap:
        """Map at least `size` bytes, or return the mapping if there is one that is long enough.

        What was never written is zero.
        """
        if self._mapped is None or len(self._mapped) < size:
            if self.size < size:
                os.ftruncate(self.fd, size)
            self._mapped = _Mapping(self.fd, self.size)
            if self.size >= _MAP_FROM:
                self._mapped.freer = self._freer
        return self._mapped

    def clear(self) -> None:
        """Overwrite everything with zeros."""
        self.write(bytes(self.size))

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self.fd < 0

    def close(self) -> None:
        """Close the file. Its memory is freed when no process has it open or mapped."""
        if self.closed:
            return
        slow = self._freer is not None and self.size >= _MAP_FROM
        fd, self.fd = self.fd, -1
        self._mapped = None  # arrays in it keep it
        if slow and self._freer is not None:
            self._freer.put(functools.partial(os.close, fd))
        else:
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
        """Map the array: the memory of the block itself, until the block is used for another."""
        mapped = self.block.map(self.nbytes)
        return np.frombuffer(mapped, self.dtype, math.prod(self.shape)).reshape(self.shape)


class BlockCache:
    """Hands out blocks, and keeps small ones for reuse: their memory is already allocated."""

    def __init__(self) -> None:
        self._freer = MemoryFreer()
        self._free: list[tuple[SharedBlock, int]] = []  # with their sizes
        self._cached = 0

    def borrow(self) -> BorrowedBlock:
        """A block with any content, for the time of a `with` statement.

        After an error it is not reused: the process whose call was cancelled may still write to it.

        Raises:
            Unavailable: the system has no file descriptors or no memory for it.
        """
        return BorrowedBlock(self)

    def take(self) -> SharedBlock:
        """A block with any content, which is not borrowed."""
        if not self._free:
            return SharedBlock.create(self._freer)
        block, size = self._free.pop()
        self._cached -= size
        return block

    def give_back(self, block: SharedBlock) -> None:
        """Keep a block for reuse if it is small and open."""
        if block.closed:
            return
        size = block.size
        if size < _MAP_FROM and self._cached + size <= _MAX_CACHED:
            self._free.append((block, size))
            self._cached += size
        else:
            block.close()

    def close(self) -> None:
        """Free all blocks that are not in use. It is not used after this."""
        while self._free:
            self.take().close()
        self._freer.stop()


class BorrowedBlock:
    """See `BlockCache.borrow`. An image borrows four, and a generator takes longer than a class."""

    __slots__ = ("_block", "_cache")

    def __init__(self, cache: BlockCache) -> None:
        self._cache = cache

    def __enter__(self) -> SharedBlock:
        try:
            self._block = self._cache.take()
        except OSError as error:
            _raise_if_exhausted(error)
            raise
        return self._block

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self._cache.give_back(self._block)
            return
        self._block.close()
        _raise_if_exhausted(error)


def _raise_if_exhausted(error: BaseException) -> None:
    """Turn an error of a system without memory or files into one for the client."""
    if isinstance(error, OSError) and error.errno in _EXHAUSTED:
        text = "the service has no memory or files left for this image; retry in a moment"
        raise Unavailable(text, retry_after=1) from error


_repeated: dict[type, Callable[[Any], tuple[Any, tuple[bytes]]]] = {}


def pickle_once(*types: type) -> None:
    """Keep the pickles of values of these types, which are the same in most calls.

    The values must be hashable and never change: a process that receives equal values gets one
    object. Pickling the options and the preprocessing of an image takes longer than sending them.
    """
    _repeated.update(dict.fromkeys(types, _reduce_repeated))


def _reduce_repeated(value: Any) -> tuple[Any, tuple[bytes]]:
    return _load_repeated, (_dump_repeated(value),)


@functools.lru_cache(_MAX_REPEATED)
def _dump_repeated(value: Any) -> bytes:
    return pickle.dumps(value, pickle.HIGHEST_PROTOCOL)


@functools.lru_cache(_MAX_REPEATED)
def _load_repeated(data: bytes) -> Any:
    return pickle.loads(data)


class _Pickler(pickle.Pickler):
    """Replaces each block by the index of its file descriptor.

    By a table, because `persistent_id` would be called for every number in a message.
    """

    def __init__(self, file: io.BytesIO, fds: list[int]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.dispatch_table = {**_repeated, SharedBlock: self._reduce}
        self._fds = fds

    def _reduce(self, block: SharedBlock) -> tuple[Any, tuple[int]]:
        self._fds.append(block.fd)
        return _received_block, (len(self._fds) - 1,)


def _received_block(index: int) -> SharedBlock:
    """Stands for a block in a message; `_Unpickler` calls another function in its place."""
    raise pickle.UnpicklingError("a block in a message was read without its descriptors")


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, fds: list[int]) -> None:
        super().__init__(file)
        self._blocks = [SharedBlock(fd) for fd in fds]

    def find_class(self, module: str, name: str) -> Any:
        if name == _received_block.__name__ and module == __name__:
            return self._blocks.__getitem__
        return super().find_class(module, name)


def pack(message: Any) -> tuple[bytes, list[int]]:
    """Pickle a message. The file descriptors of its blocks have to be sent with it."""
    file, fds = io.BytesIO(), list[int]()
    _Pickler(file, fds).dump(message)
    return file.getvalue(), fds


def unpack(data: bytes, fds: list[int]) -> Any:
    """Undo `pack` in the process that received the file descriptors."""
    return _Unpickler(io.BytesIO(data), fds).load()
