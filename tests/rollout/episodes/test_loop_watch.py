"""An event loop that stands is named by another thread: for how long, and in which line of code."""

from __future__ import annotations

import asyncio
import logging
import threading

import pytest

from rollout.episodes import loop_watch
from rollout.episodes.loop_watch import LoopWatch


def stand(until: threading.Event) -> None:
    assert until.wait(30)


def test_a_loop_that_stands_is_named_with_its_line_of_code(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loop_watch, "_BLOCKED_AFTER_SECONDS", 0.3)
    monkeypatch.setattr(loop_watch, "_BEAT_INTERVAL_SECONDS", 0.05)
    caplog.set_level(logging.WARNING, logger=loop_watch.__name__)
    seen: list[str] = []

    async def scene() -> None:
        watch = LoopWatch()
        go_on = threading.Event()

        def look() -> None:
            while not (told := watch.standing()) or "has been blocked" not in caplog.text:
                pass
            seen.append(told)
            go_on.set()

        assert watch.standing() == ""
        threading.Thread(target=look, daemon=True).start()
        stand(go_on)
        while "runs again" not in caplog.text:
            await asyncio.sleep(0.01)
        assert watch.standing() == ""
        watch.close()

    asyncio.run(scene())
    # The innermost line that is not Python's own: `Event.wait` is its caller's doing.
    line = stand.__code__.co_firstlineno + 1
    assert seen[0].endswith(f"in stand ({__file__}:{line})")
    assert "scene" in caplog.text, "the log has the whole stack"
