"""Numbered append-only files, which segments and journal consist of.

A file is never reopened for writing: a restarted writer begins the next one, so that a torn record is always the last
of its file. `rewind` undoes a failed write or sync. It also ends the file, because its content on disk is unknown after
a failed fsync.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from rollout.wire.whole_file import sync

CORRUPT = ".corrupt"  # suffix of a file that was set aside


@dataclass(frozen=True, slots=True)
class Mark:
    """A position to rewind to: the newest file, and its size if it is open."""

    number: int
    size: int | None


class NumberedFiles:
    """Writes `folder/STEM-NNNNNN.SUFFIX`; a file is closed when it reaches `max_bytes`. Numbers begin at `first`.

    durable: whether a sync waits for the disk, which it need not where a copy elsewhere has the same bytes.
    """

    def __init__(
        self,
        folder: Path,
        stem: str,
        suffix: str,
        max_bytes: int,
        *,
        header: bytes = b"",
        trailer: bytes = b"",
        first: int = 0,
        durable: bool = True,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._stem, self._suffix = folder, stem, suffix
        self._max_bytes, self._durable = max_bytes, durable
        self._header, self._trailer = header, trailer
        aside = numbered(folder, stem, suffix + CORRUPT)
        self._number = max((number for number, _ in [*self.files(), *aside]), default=-1)
        self._number = max(self._number, first - 1)
        self._file: FileIO | None = None
        self._size = 0

    @property
    def open_number(self) -> int | None:
        """Number of the file that the next append may write to."""
        return self._number if self._file is not None else None

    @property
    def next_number(self) -> int:
        """Number of the next new file."""
        return self._number + 1

    def files(self) -> list[tuple[int, Path]]:
        """List the files in order, without those set aside."""
        return numbered(self._folder, self._stem, self._suffix)

    def path(self, number: int) -> Path:
        return self._folder / f"{self._stem}-{number:06d}.{self._suffix}"

    def append(self, *parts: Any) -> tuple[int, int]:
        """Write these buffers one after another; returns file number and offset. Durable after the next `sync`.

        An OSError leaves no part of them.
        """
        before = self.mark()
        try:
            if self._file is None or self._size >= self._max_bytes:
                self.close()
                self._begin()
            offset = self._size
            for part in parts:
                self._write(part)
        except OSError:
            self.rewind(before)
            raise
        return self._number, offset

    def sync(self) -> None:
        """Make everything that was appended survive a crash of the machine."""
        if self._file is not None and self._durable:
            os.fsync(self._file.fileno())

    def mark(self) -> Mark:
        """Return the current position, for `rewind`."""
        return Mark(self._number, None if self._file is None else self._size)

    def rewind(self, mark: Mark) -> None:
        """Remove everything appended since `mark`. The next append begins another file."""
        self._end()
        for number, path in self.files():
            if number > mark.number:
                path.unlink()
        if mark.size is not None:
            os.truncate(self.path(mark.number), mark.size)

    def close(self) -> None:
        """End the open file, synced."""
        if self._file is not None:
            try:
                self._write(self._trailer)
                self.sync()
            finally:
                self._end()

    def set_aside(self, number: int) -> Path:
        """Rename a corrupt file, so that no reader finds it; it may be missing already."""
        if number == self.open_number:
            self._end()
        path = self.path(number)
        aside = path.with_name(path.name + CORRUPT)
        if path.exists():
            path.rename(aside)
        return aside

    def _begin(self) -> None:
        self._number += 1
        self._file = FileIO(self.path(self._number), "xb")
        self._size = 0
        if self._durable:
            sync(self._folder)  # the name, which the file's own sync does not keep
        self._write(self._header)

    def _end(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, part: Any) -> None:
        assert self._file is not None
        left = memoryview(part)
        while left:  # a nearly full disk may write a part
            written = self._file.write(left)
            self._size += written
            left = left[written:]


def numbered(folder: Path, stem: str, suffix: str) -> list[tuple[int, Path]]:
    """The files `STEM-NNNNNN.SUFFIX` of a folder with their numbers, in order."""
    found = folder.glob(f"{stem}-*.{suffix}")
    return sorted(
        (int(path.name.removeprefix(f"{stem}-").removesuffix(f".{suffix}")), path) for path in found
    )
