"""A log of numbered parts in shared storage, with one writer at a time: the fence of a run's replay buffer.

    claim      a writer takes the log over at this number; everything before it counts, nothing else
    changes    what the writer has done since the part before
    snapshot   the whole state; parts before it, except claims, may be removed

Every writer creates its parts exclusively, under the next number. A superseded writer therefore fails at its next part,
whose number the other's claim has, and not before: what it appended until then, the other has read. A part is
acknowledged once it is created. No clock, no lease that runs out and no order of reads and writes is involved.

Two rules keep that so while old parts are removed. Claims stay, so that the number of a superseded writer's next part
is taken for good. And a claim counts only if no part has a higher number: one that was created late, at the number of
a removed part, finds the snapshot that allowed the removal.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, Self

from blake3 import blake3

from rollout.buffer.ledger_checks import LedgerError
from rollout.buffer.objects import Objects

FOLDER = "copy"  # of the parts, under the base of a store
VERSION = 1
_MAGIC = b"MTPART1\n"
_LENGTH = struct.Struct("<I")
_CHECKSUM_BYTES = 16
_TRIES = 100  # of a claim; each that fails met another writer at work

Kind = Literal["claim", "changes", "snapshot"]


class Fenced(RuntimeError):
    """Another writer has taken over; the message, one line, says which."""


@dataclass(frozen=True, slots=True)
class Part:
    """One part. snapshot: number of the newest snapshot, itself included; None before the first."""

    number: int
    kind: Kind
    writer: str
    snapshot: int | None
    before: str  # checksum of the part before; empty for the first
    facts: dict[str, Any]
    body: bytes = b""  # of one that was read
    checksum: str = ""

    def sealed(self, *bodies: bytes) -> tuple[Self, bytes]:
        """Itself with its checksum, and its bytes: magic, length of the header, header as JSON, bodies, checksum."""
        fields = ("number", "kind", "writer", "snapshot", "before", "facts")
        header = json.dumps({"version": VERSION} | {name: getattr(self, name) for name in fields}).encode()
        begin = b"".join((_MAGIC, _LENGTH.pack(len(header)), header))
        hasher = blake3()
        for each in (begin, *bodies):
            hasher.update(each)
        digest = hasher.digest(length=_CHECKSUM_BYTES)
        return replace(self, checksum=digest.hex()), b"".join((begin, *bodies, digest))

    @classmethod
    def decoded(cls, data: bytes, name: str) -> Self:
        """Read its bytes. Raises LedgerError for others than `sealed` made."""
        told, digest = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
        if not told.startswith(_MAGIC) or blake3(told).digest(length=_CHECKSUM_BYTES) != digest:
            raise damaged(name, "its checksum does not match")
        begin = len(_MAGIC) + _LENGTH.size
        end = begin + _LENGTH.unpack_from(told, len(_MAGIC))[0]
        header = json.loads(told[begin:end])
        if (version := header.pop("version")) != VERSION:
            raise LedgerError(
                f"{name}: a part of version {version}, but this Manta reads {VERSION}; use that Manta"
            )
        return cls(**header, body=told[end:], checksum=digest.hex())


class PartLog:
    """The log as its writer has it; made by `claim`."""

    def __init__(self, objects: Objects, writer: str, parts: Sequence[Part]) -> None:
        self._objects, self._writer = objects, writer
        self._last = parts[-1]
        self._removable = [part.number for part in parts if part.kind != "claim"]
        self._unsure: tuple[Part, bytes] | None = None  # a part whose creation failed, or did not answer

    @classmethod
    def claim(cls, objects: Objects) -> tuple[Self, list[Part]]:
        """Take the log over; returns it, and its parts from the newest snapshot to the claim. Raises LedgerError."""
        when = time.strftime("%Y-%m-%d %H:%M:%S")
        writer = f"pid {os.getpid()} on {socket.gethostname()} at {when}, {os.urandom(4).hex()}"
        for _ in range(_TRIES):
            parts = read(objects)
            number = parts[-1].number + 1 if parts else 0
            snapshot, before = (parts[-1].snapshot, parts[-1].checksum) if parts else (None, "")
            made, data = Part(number, "claim", writer, snapshot, before, {}).sealed()
            if _create(objects, number, data) and max(_numbers(objects), default=-1) <= number:
                log = cls(objects, writer, [*parts, made])
                log._remove_leftovers()
                return log, [*parts, made]
        raise LedgerError(
            f"the copy's log is being claimed by others all the time ({_TRIES} tries); stop those runs"
        )

    @property
    def settled(self) -> bool:
        """Whether the outcome of every part is known."""
        return self._unsure is None

    def append(self, kind: Kind, facts: dict[str, Any], *bodies: bytes) -> None:
        """Append a part; it is durable on return. Raises Fenced.

        After another OSError its outcome is unknown: call `settle` until it returns, before anything else.
        """
        number = self._last.number + 1
        snapshot = number if kind == "snapshot" else self._last.snapshot
        part = Part(number, kind, self._writer, snapshot, self._last.checksum, facts)
        self._unsure = part.sealed(*bodies)
        self.settle()

    def settle(self) -> None:
        """Finish an append whose outcome is unknown."""
        if self._unsure is None:
            return
        part, data = self._unsure
        if not _create(self._objects, part.number, data):
            with suppress(LedgerError, FileNotFoundError):
                other = Part.decoded(self._objects.get(_name(part.number)), _name(part.number)).writer
                raise Fenced(
                    f"another replay buffer has taken over this run ({other}); this one ({self._writer}) has stopped. "
                    "What it acknowledged is kept; stop one of the two runs"
                )
            raise Fenced(
                f"another replay buffer has taken over this run; this one ({self._writer}) has stopped"
            )
        self._last, self._unsure = part, None
        if part.kind == "snapshot":
            removable, self._removable = self._removable, []
            for number in removable:
                with suppress(OSError):  # the next writer removes it
                    self._objects.remove(_name(number))
        self._removable.append(part.number)

    def _remove_leftovers(self) -> None:
        """Remove what an earlier writer was about to remove when it ended."""
        first = self._last.snapshot or 0
        for number in _numbers(self._objects):
            if number < first:
                with suppress(FileNotFoundError):
                    if Part.decoded(self._objects.get(_name(number)), _name(number)).kind != "claim":
                        self._objects.remove(_name(number))


def read(objects: Objects) -> list[Part]:
    """The parts from the newest snapshot on, in order; all parts before the first snapshot. Raises LedgerError."""
    before = None
    for _ in range(_TRIES):
        newest = max(_numbers(objects), default=None)
        if newest is None:
            return []
        parts, lacking = _up_to(objects, newest)
        if lacking is None:
            return parts
        if (newest, lacking) == before:  # no writer is at work that might have removed it
            raise damaged(_name(lacking), "it is missing, or does not follow the part before it")
        before = newest, lacking
    raise LedgerError(f"the copy's log changes faster than it can be read ({_TRIES} tries); stop its writer")


def damaged(name: str, why: str) -> LedgerError:
    """The error of a part that cannot be used."""
    return LedgerError(f"{name}: damaged ({why}); restore the copy from one of your own, or start a new run")


def _up_to(objects: Objects, newest: int) -> tuple[list[Part], int | None]:
    """Read up to the newest part, and beyond what was listed; also the number of a part that is not as it must be."""
    try:
        last = _read(objects, newest)
    except FileNotFoundError:
        return [], newest
    parts: list[Part] = []
    for number in range(last.snapshot or 0, newest):
        try:
            parts.append(_read(objects, number))
        except FileNotFoundError:
            return [], number
    parts.append(last)
    with suppress(FileNotFoundError):  # names may lag behind
        while True:
            parts.append(_read(objects, parts[-1].number + 1))
    begin = next((at for at, part in enumerate(parts) if part.number == parts[-1].snapshot), 0)
    wrong = (other.number for one, other in pairwise(parts) if other.before != one.checksum)
    return parts[begin:], next(wrong, None)


def _create(objects: Objects, number: int, data: bytes) -> bool:
    """Whether this part has its number: created now, or by an earlier try whose answer was lost."""
    try:
        objects.create(_name(number), data)
    except FileExistsError:
        try:
            return objects.get(_name(number)) == data
        except FileNotFoundError:
            return False
    return True


def _read(objects: Objects, number: int) -> Part:
    return Part.decoded(objects.get(_name(number)), _name(number))


def _numbers(objects: Objects) -> list[int]:
    return [int(name) for name in objects.names(FOLDER) if name.isdigit()]


def _name(number: int) -> str:
    return f"{FOLDER}/{number:012d}"
