"""What a step waits for, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rollout.buffer.replay_store import ReplayStore
from rollout.wire.trajectory import DropReason

_NAMED = 4  # leases that a message names


def missing(
    store: ReplayStore, held: Sequence[tuple[float, int, str]], dropped: Mapping[DropReason, int]
) -> str:
    """held: for how many seconds each group has been held, its id, and its worker. dropped: since the last release."""
    parts = [
        f"{store.ready} groups are complete and a step needs {store.settings.groups_per_step}",
        f"{len(held)} are in flight",
    ]
    if store.unassigned:
        parts.append(f"{store.unassigned} wait for a worker")
    if store.in_step:
        parts.append(f"{store.in_step} are held by a step that was not released")
    parts += [f"{count} groups were dropped as {reason.value}" for reason, count in dropped.items()]
    longest = sorted(held, key=lambda each: (-each[0], *each[1:]))[:_NAMED]
    parts += [f"{worker} holds group {group} for {seconds:.0f} s" for seconds, group, worker in longest]
    if len(held) > _NAMED:
        parts.append(f"{len(held) - _NAMED} more are held for less")
    return "; ".join(parts)
