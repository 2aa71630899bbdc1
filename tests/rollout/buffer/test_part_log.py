"""Writers that claim one log at any moment, in many interleavings: what was acknowledged is there, once, in order."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random

import pytest

from rollout.buffer.ledger_checks import LedgerError
from rollout.buffer.part_log import Fenced, Part, PartLog, read
from tests.rollout.buffer.interleaving import InTurns, MemoryObjects, Turns


def entries(parts: list[Part]) -> list[str]:
    """Every entry that a reader finds: those of the newest snapshot, and those appended since."""
    found: list[str] = []
    for part in parts:
        if part.kind == "snapshot":
            found = json.loads(part.body)
        elif part.kind == "changes":
            found.append(part.facts["entry"])
    return found


def writer(
    store: InTurns, name: str, rng: Random, acknowledged: list[str], attempted: list[str]
) -> Callable[[], None]:
    def work() -> None:
        for life in range(rng.randint(1, 3)):
            log, parts = PartLog.claim(store)
            known = entries(parts)
            try:
                for number in range(rng.randint(0, 8)):
                    entry = f"{name}.{life}.{number}"
                    attempted.append(entry)
                    log.append("changes", {"entry": entry}, b"")
                    acknowledged.append(entry)
                    known.append(entry)
                    if rng.random() < 0.4:
                        log.append("snapshot", {}, json.dumps(known).encode())
            except Fenced:
                pass

    return work


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_of_writers_that_fence_each_other_nothing_acknowledged_is_lost_or_twice(first: int) -> None:
    fenced = 0
    for seed in range(first, first + 50):
        turns, objects = Turns(seed), MemoryObjects()
        acknowledged: list[str] = []
        attempted: list[str] = []
        stores = {name: InTurns(objects, turns) for name in "abc"}
        turns.run(
            {
                name: writer(store, name, Random(f"{seed}{name}"), acknowledged, attempted)
                for name, store in stores.items()
            }
        )
        found = entries(read(objects))
        assert len(found) == len(set(found)) and set(acknowledged) <= set(found) <= set(attempted), seed
        for name in "abc":
            own = [entry for entry in found if entry[0] == name]
            assert own == sorted(own, key=attempted.index), seed
        fenced += len(set(attempted) - set(acknowledged))
    assert fenced > 10  # the interleavings did fence writers in the middle of their work


def test_a_writer_that_slept_through_everything_is_fenced_however_much_was_removed() -> None:
    objects = MemoryObjects()
    sleeper, _ = PartLog.claim(objects)
    sleeper.append("changes", {"entry": "its own"}, b"")
    other, _ = PartLog.claim(objects)
    for number in range(20):
        other.append("snapshot" if number % 3 == 0 else "changes", {"entry": str(number)}, b"[]")
    before = dict(objects.stored)
    with pytest.raises(
        Fenced, match=r"^another replay buffer has taken over this run \(pid .*stop one of the two runs$"
    ):
        sleeper.append("changes", {"entry": "too late"}, b"")
    assert objects.stored == before


def test_a_claim_at_the_number_of_a_removed_part_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    objects = MemoryObjects()
    owner, _ = PartLog.claim(objects)
    owner.append("snapshot", {}, b"[]")
    create = objects.create

    def late(name: str, data: bytes) -> None:
        monkeypatch.undo()  # the claimer has read the log, and sleeps before its claim
        for kind in ("changes", "changes", "snapshot"):
            owner.append(kind, {"entry": kind}, b'["changes", "changes"]')
        assert name not in objects.stored  # it was there, and was removed
        create(name, data)

    monkeypatch.setattr(objects, "create", late)
    claimer, parts = PartLog.claim(objects)
    assert entries(parts) == ["changes", "changes"]
    claimer.append("changes", {"entry": "mine"}, b"")
    with pytest.raises(Fenced):
        owner.append("changes", {"entry": "too late"}, b"")
    assert entries(read(objects)) == ["changes", "changes", "mine"]


@pytest.mark.parametrize("stored", [True, False])
def test_a_part_whose_answer_was_lost_is_in_the_log_once(stored: bool) -> None:
    objects = MemoryObjects()
    log, _ = PartLog.claim(objects)
    create = objects.create

    def lost(name: str, data: bytes) -> None:
        if stored:
            create(name, data)
        raise TimeoutError("no answer")

    objects.create = lost  # type: ignore[method-assign]
    with pytest.raises(TimeoutError):
        log.append("changes", {"entry": "one"}, b"")
    assert not log.settled
    objects.create = create  # type: ignore[method-assign]
    log.settle()
    assert log.settled
    log.append("changes", {"entry": "two"}, b"")
    assert entries(read(objects)) == ["one", "two"]


def test_every_changed_byte_of_a_part_is_noticed_and_named() -> None:
    objects = MemoryObjects()
    log, _ = PartLog.claim(objects)
    log.append("snapshot", {}, b"[]")
    log.append("changes", {"entry": "one"}, b"some bytes")
    log.append("changes", {"entry": "two"}, b"more")
    for name in [name for name in objects.stored if not name.endswith("0")]:
        whole = objects.stored[name]
        for at in range(len(whole)):
            objects.stored[name] = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
            with pytest.raises(LedgerError, match=f"^{name}: damaged"):
                read(objects)
        objects.stored[name] = whole
    missing = objects.stored.pop("copy/000000000002")
    with pytest.raises(LedgerError, match=r"^copy/000000000002: damaged .it is missing"):
        read(objects)
    objects.stored["copy/000000000002"] = missing
    assert entries(read(objects)) == ["one", "two"]
