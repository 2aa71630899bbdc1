"""The copy of a replay buffer's state in shared storage: the truth, where the state itself lies on a local disk.

    COPY/copy/N       parts of the log (part_log.py): what was appended to journal and segments since the part before,
                      and the statements that changed the ledger; now and then a snapshot of all of it
    COPY/groups/      segments that are complete, whole

`ship` is called after every call of the store, before its answer: what was answered is in the copy. A replay buffer
that opens the copy claims the log, restores ledger, journal and open segment into a private folder, and verifies them:
every part's checksum and the one before it, the place of every byte that is appended, and after every part the digest
of the ledger's rows. Whole segments are fetched when their groups are in use; the ledger has their checksums.
"""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from rollout.buffer.disk_space import CopyUnreachable
from rollout.buffer.ledger import Ledger
from rollout.buffer.ledger_checks import LEDGER, LedgerError, watch
from rollout.buffer.objects import Objects
from rollout.buffer.part_log import Part, PartLog, damaged
from rollout.buffer.segments import is_segment, oldest_beyond, segment_path
from rollout.buffer.statements import RecordingConnection, encoded, repeat

SNAPSHOT_PARTS = 500  # parts until the next snapshot: a recovery reads each
SNAPSHOT_BYTES = 256 * 2**20
_TRACKED = {"turns": ".journal", "groups": ".arrows"}  # folders, and the suffix of their files
_SETTLED_MODE = b"\1\1"  # bytes 18 and 19 of a database without a write-ahead log


@dataclass(frozen=True, slots=True)
class _Shipment:
    """What the copy has once a part is in its log: sizes of files by name, and statements of the ledger."""

    sizes: dict[str, int]
    statements: int


class StateCopy:
    """The copy as its only writer keeps it.

    folder: of the state. copies: stores of whole segments, of which the first has the log. readers: store of the run
    folder, where other programs read ledger and segments.
    """

    def __init__(
        self, log: PartLog, parts: Sequence[Part], folder: Path, copies: Sequence[Objects], readers: Objects
    ) -> None:
        self._log, self._folder, self._copies, self._readers = log, folder, copies, readers
        found = copies[0].names("groups")
        self._whole = {name: size for name, size in found.items() if is_segment(name)}
        snapshot = parts[-1].snapshot
        self._shipped = {} if snapshot is None else self._sizes()
        self._parts, self._bytes = len(parts), sum(len(part.body) for part in parts)
        self._started = snapshot is not None
        self._under_way: _Shipment | None = None

    @property
    def next_segment(self) -> int:
        """Number of the first segment that neither the copy nor the folder has."""
        names = [*self._whole, *(path.name for path in (self._folder / "groups").glob("*.arrows"))]
        return max(map(_number, names), default=-1) + 1

    def follow(self, ledger: Ledger) -> None:
        """Ship this ledger from now on; one that the copy does not have yet as a snapshot, first of all."""
        assert isinstance(ledger.db, RecordingConnection)
        self._db, self._recorded = ledger.db, ledger.db.recorded

    def fetch(self, segments: Collection[int]) -> None:
        """Bring these whole segments into the folder, if they are in the copy."""
        with _reaching():
            for number in segments:
                path = segment_path(self._folder / "groups", number)
                if path.name in self._whole and not path.exists():
                    path.write_bytes(self._copies[0].get(f"groups/{path.name}"))

    def ship(self, open_segment: int | None) -> None:
        """Return when everything done so far is in the copy. Raises Fenced; CopyUnreachable: call it again."""
        with _reaching():
            self._settle()
            sizes = self._sizes()
            if self._started and (sizes != self._shipped or self._recorded):
                self._ship_changes(sizes)
            self._ship_whole(open_segment)
            if not self._started or self._parts >= SNAPSHOT_PARTS or self._bytes >= SNAPSHOT_BYTES:
                self._ship_snapshot()

    def trim(self, needed: Collection[int], limit_bytes: float | None) -> None:
        """Remove whole segments that are not needed from the folder, and from the copy the oldest beyond the limit."""
        numbers = {_number(name): size for name, size in self._whole.items()}
        for number in numbers.keys() - set(needed):
            segment_path(self._folder / "groups", number).unlink(missing_ok=True)
        with _reaching():
            for number in [] if limit_bytes is None else oldest_beyond(numbers, limit_bytes, needed):
                name = segment_path(Path(), number).name
                for store in self._copies:
                    store.remove(f"groups/{name}")
                del self._whole[name]

    def close(self) -> None:
        """Ship what is left, with every segment whole and the ledger for readers. The ledger is still open."""
        self.ship(None)
        with _reaching():
            self._ship_snapshot()

    # Parts ------------------------------------------------------------------------------------------------------------

    def _ship_changes(self, sizes: dict[str, int]) -> None:
        told = encoded(self._recorded)
        files, bodies = [], [told]
        for name, size in sizes.items():
            begin = self._shipped.get(name, 0)
            if size > begin:
                files.append((name, begin, size - begin))
                bodies.append(_read(self._folder / name, begin, size))
        removed = sorted(self._shipped.keys() - sizes.keys())
        facts = {"statements": len(told), "files": files, "removed": removed, "digest": _digest(self._db)}
        self._under_way = _Shipment(sizes, len(self._recorded))
        self._log.append("changes", facts, *bodies)
        self._parts, self._bytes = self._parts + 1, self._bytes + sum(map(len, bodies))
        self._settle()

    def _ship_snapshot(self) -> None:
        """All of the state but whole segments; nothing else is under way, and everything is shipped or recorded."""
        sizes = self._sizes()
        ledger = self._db.serialize()
        files = [(name, 0, size) for name, size in sizes.items()]
        bodies = [ledger, *(_read(self._folder / name, 0, size) for name, size in sizes.items())]
        facts = {"ledger": len(ledger), "files": files, "digest": _digest(self._db)}
        self._under_way = _Shipment(sizes, len(self._recorded))
        self._log.append("snapshot", facts, *bodies)
        self._settle()
        self._parts, self._bytes, self._started = 0, 0, True
        # Readers may be on other hosts, where a log of the ledger that is in use would be of no help.
        for beside in ("-wal", "-shm"):  # of a ledger that was in use there before the run had a copy
            self._readers.remove(LEDGER + beside)
        self._readers.put(LEDGER, ledger[:18] + _SETTLED_MODE + ledger[20:])

    def _settle(self) -> None:
        """Finish a part whose outcome is unknown, and note what the copy then has."""
        self._log.settle()
        if (shipped := self._under_way) is not None:
            self._shipped, self._under_way = shipped.sizes, None
            del self._recorded[: shipped.statements]

    def _ship_whole(self, open_segment: int | None) -> None:
        for name in [name for name in self._shipped if is_segment(Path(name).name)]:
            path = self._folder / name
            if path.exists() and _number(path.name) != open_segment:
                data = path.read_bytes()
                for store in self._copies:
                    store.put(f"groups/{path.name}", data)
                self._whole[path.name] = len(data)

    def _sizes(self) -> dict[str, int]:
        """Journal and segments that parts have: by name below the folder, without whole segments."""
        return {
            f"{folder}/{path.name}": path.stat().st_size
            for folder, suffix in _TRACKED.items()
            for path in sorted((self._folder / folder).glob(f"*{suffix}"))
            if path.name not in self._whole
        }


def restore(parts: Sequence[Part], folder: Path) -> None:
    """Write the state that these parts tell of into an empty folder. Raises LedgerError for parts that do not fit."""
    folder.mkdir(parents=True, exist_ok=True)
    told = [part for part in parts if part.kind != "claim"]
    if not told:
        return
    first, changes = told[0], told[1:]
    if first.kind != "snapshot":
        raise damaged(f"part {first.number}", "there is no snapshot before it")
    path, size = folder / LEDGER, first.facts["ledger"]
    path.write_bytes(first.body[:size])
    _append_files(first, first.body[size:], folder)
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        watch(db)
        for part in changes:
            size = part.facts["statements"]
            repeat(db, part.body[:size])
            _append_files(part, part.body[size:], folder)
            for name in part.facts["removed"]:
                (folder / name).unlink()
            if _digest(db) != part.facts["digest"]:
                raise damaged(f"part {part.number}", "the ledger's rows do not match their checksum after it")


def _append_files(part: Part, body: bytes, folder: Path) -> None:
    at = 0
    for name, begin, size in part.facts["files"]:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        with path.open("ab") as file:
            if file.tell() != begin:
                raise damaged(f"part {part.number}", f"{name} has {file.tell()} bytes before it, not {begin}")
            file.write(body[at : at + size])
        at += size


@contextmanager
def _reaching() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CopyUnreachable(
            error.errno or errno.EIO, f"the copy of the ledger cannot be written ({error})"
        ) from error


def _digest(db: sqlite3.Connection) -> int:
    (digest,) = db.execute("SELECT value FROM meta WHERE name = 'digest'").fetchone()
    return int(digest)


def _read(path: Path, begin: int, end: int) -> bytes:
    with path.open("rb") as file:
        file.seek(begin)
        data = file.read(end - begin)
    if len(data) != end - begin:
        raise LedgerError(f"{path}: shorter than it was; something else has changed it")
    return data


def _number(name: str) -> int:
    return int(Path(name).stem.rpartition("-")[2])
