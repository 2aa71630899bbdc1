"""Warnings of a worker's process are its notices: each kind once, bounded in count and length."""

from __future__ import annotations

import asyncio
import logging
import threading

import pytest

from rollout.buffer.failures import cause_of
from rollout.episodes import loop_watch
from rollout.episodes.loop_watch import LoopWatch
from rollout.wire.notices import MOST, MOST_CHARACTERS, Notices


def test_a_warning_is_a_notice_once_and_what_differs_in_numbers_is_the_same() -> None:
    log, other = logging.getLogger("envs.anything"), logging.getLogger("somebody.else")
    with Notices() as notices:
        for seed in range(3):
            log.warning("maze (seed %d) failed in step %d:\nTraceback", seed, seed)
        log.info("nothing to be told of")
        other.warning("of a library")
        log.warning("the reward is a numpy array")
        assert notices.since(0) == ["maze (seed 0) failed in step 0", "the reward is a numpy array"]
        assert notices.since(1) == ["the reward is a numpy array"] and notices.since(2) == []
    log.warning("after the end")
    assert len(notices.since(0)) == 2


def test_notices_are_bounded_in_count_and_length() -> None:
    log = logging.getLogger("rollout.anything")
    with Notices() as notices:
        for number in range(2 * MOST):
            log.warning("%s %s", "x" * number, "y" * 10_000)
    assert len(notices.since(0)) == MOST
    assert max(map(len, notices.since(0))) == MOST_CHARACTERS


def test_the_line_of_code_by_which_all_episodes_wait_is_a_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_watch, "_BLOCKED_AFTER_SECONDS", 0.3)
    monkeypatch.setattr(loop_watch, "_BEAT_INTERVAL_SECONDS", 0.05)
    noticed = threading.Event()

    def stand() -> None:
        assert noticed.wait(30)

    async def scene() -> None:
        watch = LoopWatch()
        stand()
        watch.close()

    with Notices(lambda text: noticed.set()) as notices:
        asyncio.run(scene())
    assert notices.since(0)[0].startswith(
        "all episodes of a worker wait: its event loop has been blocked for"
    )
    assert f"stand ({__file__}:" in notices.since(0)[0]


def test_an_error_is_told_by_its_cause() -> None:
    assert cause_of("Traceback:\n  File 1\nmine.errors.ValueError: 3 is odd\n\n") == "ValueError: 3 is odd"
    assert cause_of("") == ""
