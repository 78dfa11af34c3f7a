"""Little room, for the programs of `deaths`: disks of a few bytes that only the process that mounts them sees, and memory."""

import contextlib
import ctypes
import os
import resource
import sys
from pathlib import Path

NO_MOUNTS = 77
"""How a program ends that may not mount."""

_NEW_MOUNTS, _NEW_USERS = 0x20000, 0x10000000
_READ_ONLY, _REMOUNT, _REC, _PRIVATE = 1, 1 << 5, 1 << 14, 1 << 18
_LIBC = ctypes.CDLL(None, use_errno=True)


def own_mounts():
    """From here on what this process mounts is seen by no other, and gone with it; ends it where that is not allowed."""
    user, group = os.getuid(), os.getgid()
    _check(_LIBC.unshare(_NEW_MOUNTS | (_NEW_USERS if user else 0)))
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _check(_LIBC.mount(None, b"/", None, ctypes.c_ulong(_REC | _PRIVATE), None))


def disk(folder, size):
    """A disk of so many bytes, empty."""
    folder.mkdir(parents=True, exist_ok=True)
    _check(_LIBC.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", ctypes.c_ulong(0), f"size={size}".encode()))


def read_only(folder):
    """From here on nobody writes to a disk."""
    _check(_LIBC.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", ctypes.c_ulong(_READ_ONLY | _REMOUNT), None))


def _check(failed):
    if failed:
        print(os.strerror(ctypes.get_errno()), file=sys.stderr)
        sys.exit(NO_MOUNTS)


def fill(folder):
    """Take the last byte of a disk."""
    with (folder / "filling").open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 10, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass
    assert os.statvfs(folder).f_bavail == 0


def little_memory(spare):
    """From here on there are so many bytes of memory more, and no others."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + spare, resource.RLIM_INFINITY))
