"""The version that the workers of a node hold together, in memory that their engines' processes map.

One of them applies a delta to it and verifies the result; the others map the same memory. A version without a delta, or
with one to another base (after a missed version, or after the learner has gone back to a checkpoint), is copied whole
from its own handle.

    file            one line a version: digest of its checksums, inode and path of its memory
    the file's lock held by the worker that makes a version
    a memory's lock shared while an engine loads from it, so that a delta is applied to nothing that is being read
"""

from __future__ import annotations

import fcntl
import os
from dataclasses import replace
from pathlib import Path
from typing import IO

import numpy as np

from rollout.wire.delta import apply
from rollout.wire.time_limits import MEMORY, NETWORK, limit
from rollout.wire.verdicts import locked
from rollout.wire.weights import ByteArray, Delta, Handle, MemoryFile, WeightUpdate, parts

_WAIT_SECONDS = 10.0  # for a version that another worker makes, and the time of its bytes
_KEPT = 8  # lines: of the policies that a run has, and of versions that slow engines are loading
_Places = dict[str, tuple[int, str]]  # inode and path of a memory, by the digest of the version in it


class HeldVersion:
    """One worker's use of the node's versions. file: of this node's processes alone."""

    def __init__(self, file: Path, wait_seconds: float = _WAIT_SECONDS) -> None:
        self._file = file
        self._wait_seconds = wait_seconds
        self._memory: IO[bytes] | None = None  # of the version last received

    def receive(self, update: WeightUpdate) -> WeightUpdate:
        """Have a version in this node's memory; returns it with a handle there, verified, until `loaded`.

        Raises WeightMismatch, naming the tensor. Blocks: call it in a thread. Where the worker that makes the version
        does not end in time, this one makes a copy of its own.
        """
        nbytes = update.manifest.nbytes
        seconds = limit(limit(self._wait_seconds, nbytes, NETWORK), 2 * nbytes, MEMORY)
        with self._file.open("a+", encoding="utf-8") as file, locked(file, seconds) as alone:
            places = _read(file) if alone else {}
            memory = _opened(places.get(update.manifest.digest))
            if memory is None:
                memory = self._made(update, places, file if alone else None)
            fcntl.flock(memory, fcntl.LOCK_SH)
            self._use(memory)
        handle = Handle("rollout.wire.weights:open_file", _path(memory))
        return replace(update, handle=handle, delta=None, verified=True)

    def loaded(self) -> None:
        """The engine has loaded the version, or given it up: its memory may become another one."""
        if self._memory is not None:
            fcntl.flock(self._memory, fcntl.LOCK_UN)

    def _use(self, memory: IO[bytes]) -> None:
        if self._memory is not None:
            self._memory.close()
        self._memory = memory

    def _made(self, update: WeightUpdate, places: _Places, file: IO[str] | None) -> IO[bytes]:
        """Make the version, verify it, and tell the others where it is; file: theirs."""
        delta, digest = update.delta, update.manifest.digest
        base = _opened(places.get(delta.base)) if delta else None
        if base is not None and delta is not None:
            if _only_user(base):
                del places[delta.base]
                _write(file, places)  # before it is written to
                memory = base
            else:
                memory = _new(update.manifest.nbytes)
                _mapped(memory)[:] = _mapped(base)
                base.close()
            _apply(update, delta, _mapped(memory))
        else:
            memory = _new(update.manifest.nbytes)
            owns = parts(_mapped(memory), update.manifest.sizes)
            for own, (_, array) in zip(owns, update.tensors(), strict=True):
                own[:] = array
        here = Handle("rollout.wire.weights:open_file", _path(memory))
        replace(update, handle=here, verified=False).verify()
        _write(file, places | {digest: (os.fstat(memory.fileno()).st_ino, _path(memory))})
        return memory


def _apply(update: WeightUpdate, delta: Delta, whole: ByteArray) -> None:
    held = parts(whole, update.manifest.sizes)
    differences = delta.handle.open(delta.sizes)
    for difference, own, spec in zip(differences, held, update.manifest.tensors, strict=True):
        apply(difference, own, spec, update.version)


def _read(file: IO[str]) -> _Places:
    file.seek(0)
    lines = (line.split(maxsplit=2) for line in file.read().splitlines())
    return {digest: (int(inode), path) for digest, inode, path in lines}


def _write(file: IO[str] | None, places: _Places) -> None:
    if file is None:
        return
    file.truncate(0)
    newest = list(places.items())[-_KEPT:]
    file.write("".join(f"{digest} {inode} {path}\n" for digest, (inode, path) in newest))
    file.flush()


def _opened(place: tuple[int, str] | None) -> IO[bytes] | None:
    """The memory at a place; None if its process has ended."""
    if place is None:
        return None
    inode, path = place
    try:
        memory = open(path, "r+b")  # noqa: SIM115  # closed by `_use`
    except OSError:
        return None
    if os.fstat(memory.fileno()).st_ino != inode:
        memory.close()
        return None
    return memory


def _new(nbytes: int) -> IO[bytes]:
    made = MemoryFile("manta-held-weights")
    os.truncate(made.path, nbytes)
    return open(made.path, "r+b")


def _only_user(memory: IO[bytes]) -> bool:
    """Whether no engine loads from it; none does then until its lock is released."""
    try:
        fcntl.flock(memory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _path(memory: IO[bytes]) -> str:
    return f"/proc/{os.getpid()}/fd/{memory.fileno()}"


def _mapped(memory: IO[bytes]) -> ByteArray:
    return np.memmap(_path(memory), dtype=np.uint8, mode="r+")
