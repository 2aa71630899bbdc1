"""Groups of the ledger brought back into memory, when a store is opened or the learner returns to a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rollout.buffer.leases import Lease, Leases
from rollout.buffer.ledger import REISSUE, StoredGroup
from rollout.buffer.scheduler import StalenessScheduler
from rollout.buffer.segments import CompleteGroup, segment_path
from rollout.wire.trajectory import Slot

Groups = dict[int, Slot]


def load(groups: Iterable[StoredGroup], buffer: StalenessScheduler[CompleteGroup], leases: Leases) -> None:
    """Restore slots and leases as the ledger has them; both are empty."""
    for stored in groups:
        slot, group_id = stored.slot, stored.slot.group_id
        match stored.state:
            case "issued":
                buffer.restore(group_id, slot.version, None)
                leases.grant(Lease(slot, stored.worker, stored.worker_loop))
            case "waiting":
                buffer.restore(group_id, slot.version, None)
                leases.waiting[group_id] = slot
            case "again":  # REISSUE
                leases.reissue[group_id] = slot
            case _:
                assert stored.location is not None
                group = CompleteGroup(slot, stored.location, None)
                # A group may be trained before it is released: the checkpoint was written while engines loaded.
                buffer.restore(group_id, slot.version, group, taken=stored.taken_version)


def roll_back(
    groups: Iterable[StoredGroup], version: int, buffer: StalenessScheduler[CompleteGroup], segments: Path
) -> tuple[Groups, Groups, Groups]:
    """Divide groups into those that are complete, that wait for a worker, and that are reissued.

    buffer: empty and of the checkpoint's `version`; it holds the first two afterwards.
    """
    complete: Groups = {}
    waiting: Groups = {}
    reissue: Groups = {}
    # Complete groups first: all their tokens exist. (Not all fit where a resumed run has smaller settings.)
    for stored in sorted(groups, key=lambda stored: stored.location is None):
        slot, state = stored.slot, _state(stored, version, buffer.max_lag, segments)
        if state != REISSUE and not buffer.reserve(slot.group_id, issue_version=slot.version):
            state = REISSUE
        if state == "complete":
            assert stored.location is not None
            buffer.add(slot.group_id, CompleteGroup(slot, stored.location, None))
        {"complete": complete, "waiting": waiting, REISSUE: reissue}[state][slot.group_id] = slot
    return complete, waiting, reissue


def _state(stored: StoredGroup, version: int, max_lag: int, segments: Path) -> str:
    if stored.state == REISSUE or not version - max_lag <= stored.slot.version <= version:
        return REISSUE
    if stored.location is None:
        return "waiting"
    known = stored.max_version is not None and stored.max_version <= version
    there = segment_path(segments, stored.location.segment).exists()
    return "complete" if known and there else REISSUE
