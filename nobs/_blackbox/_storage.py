"""How bytes get into the file: through a map of it where a store can never fail, and by a call where it can.

A store into a map that finds no room on the disk is no error but the end of the process (SIGBUS). Space that was taken once
stays taken where a file system writes a block over in place; where it writes it anew elsewhere (btrfs, ZFS, APFS), and over
a network, only a call can say that there is none. Both leave the bytes with the system's page cache, which outlives the process.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Protocol

IN_PLACE = frozenset({"ext2", "ext3", "ext4", "tmpfs", "ramfs"})
"""File systems that write a block over where it is. Not xfs: a copy of the file shares its blocks there."""


_CHUNK = 1 << 20


class Storage(Protocol):
    """The bytes of an open file."""

    def put(self, offset: int, content: bytes) -> None: ...
    def get(self, offset: int, size: int) -> bytes: ...
    def sync(self, offset: int, size: int) -> None: ...
    def close(self) -> None: ...


class MappedStorage:
    """Through a map: a copy in memory."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._memory = mmap.mmap(descriptor, size)

    def put(self, offset: int, content: bytes) -> None:
        self._memory[offset : offset + len(content)] = content

    def get(self, offset: int, size: int) -> bytes:
        return self._memory[offset : offset + size]

    def sync(self, offset: int, size: int) -> None:
        begin = offset - offset % mmap.ALLOCATIONGRANULARITY
        self._memory.flush(begin, offset + size - begin)

    def close(self) -> None:
        self._memory.close()


class CalledStorage:
    """By calls: as many copies, and a system call."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def put(self, offset: int, content: bytes) -> None:
        while content:
            written = os.pwrite(self._descriptor, content, offset)
            content, offset = content[written:], offset + written

    def get(self, offset: int, size: int) -> bytes:
        return os.pread(self._descriptor, size, offset)

    def sync(self, offset: int, size: int) -> None:
        os.fsync(self._descriptor)

    def close(self) -> None:
        pass


def storage_for(descriptor: int, path: Path, size: int) -> Storage:
    """What suits the file system that a file lies on, its space taken now.

    Raises:
        OSError: there is no room.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        with open(descriptor, "wb", closefd=False) as file:  # it is open already
            for offset in range(0, size, _CHUNK):
                file.write(bytes(min(_CHUNK, size - offset)))
    can_call = hasattr(os, "pwrite")  # Windows cannot
    return CalledStorage(descriptor) if can_call and file_system(path) not in IN_PLACE else MappedStorage(descriptor, size)


def file_system(path: Path) -> str:
    """The type of the file system that a path lies on, as Linux tells; empty where it does not."""
    try:
        device = path.stat().st_dev
        wanted = f"{os.major(device)}:{os.minor(device)}"
        for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
            mount, _, behind = line.partition(" - ")
            if mount.split()[2] == wanted:
                return behind.split()[0]
    except (OSError, AttributeError, IndexError):
        pass
    return ""
