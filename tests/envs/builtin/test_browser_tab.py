"""Tabs of one Chromium: nothing reaches a network or another tab, and nothing outlives its process."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil
import pytest

playwright = pytest.importorskip("playwright.sync_api")
if shutil.which("chromium") is None:
    pytest.skip("there is no Chromium here", allow_module_level=True)

from envs import registry  # noqa: E402
from envs.builtin.browser_tab import Tab, _browsers, find_chromium  # noqa: E402
from envs.hosting.host import HostSettings  # noqa: E402
from envs.hosting.subprocess_env import SubprocessEnv  # noqa: E402

END_SECONDS = 60


def browsers(of: int | None = None) -> list[psutil.Process]:
    """The driver and Chromium's processes under a process."""
    found = []
    for each in psutil.Process(of).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # what draws a page ends with it
            if any(name in each.exe() for name in ("playwright", "chromium")):
                found.append(each)
    return found


def listening(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return any(each.status == "LISTEN" for each in process.net_connections("inet"))
    return False


def all_end(processes: list[psutil.Process]) -> bool:
    assert len(processes) >= 3, "the driver, Chromium, and what draws its pages"
    return not psutil.wait_procs(processes, timeout=END_SECONDS)[1]


@contextmanager
def tab() -> Iterator[Tab]:
    made = Tab(find_chromium())
    try:
        yield made
    finally:
        made.close()


def main_processes() -> set[int]:
    """The driver, and Chromium without those that work for it."""
    driver = psutil.Process().children()
    return {each.pid for parent in driver for each in (parent, *parent.children())} & {
        e.pid for e in browsers()
    }


def greeting(method: str, path: str, fields: dict[str, str]) -> str:
    return f"<h1>hello</h1><a href='/x'>x</a><form autocomplete=off><input name=a aria-label=a></form><p>{path}</p>"


def said(of: Tab) -> list[tuple[str, str, str]]:
    return [(each.role, each.name, each.value) for each in of.read()]


def test_nothing_reaches_a_network_and_nothing_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, tab() as page:
        there = f"//127.0.0.1:{server.getsockname()[1]}"
        script = f"""<script>
            const failed = [];
            fetch("http:{there}/fetched").catch(() => failed.push("fetch"));
            new WebSocket("ws:{there}/socket").onerror = () => failed.push("socket");</script>
            <img src="http:{there}/image" onerror="failed.push('image')">
            <link rel="preconnect" href="http:{there}"><a href="http:{there}/link">away</a>"""
        page.open(lambda *request: script, "/")
        page._do(lambda page: page.wait_for_function("failed.length == 3"))
        with pytest.raises(playwright.Error, match="ERR_"):
            page.click(page.read()[0])
        running = browsers()
        assert len(running) >= 3 and not any(map(listening, running))
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()  # nobody has connected, not even ahead of a click


def test_tabs_share_a_browser_and_nothing_else() -> None:
    with tab() as one:
        one.open(greeting, "/one")
        there = main_processes()
        with tab() as other:
            other.open(lambda *request: "<h1>other</h1>", "/other")
            one.type(one.read()[2], "typed here")
            one.click(one.read()[1])
            assert said(other) == [("heading", "other", "")]
            assert not other.back()
            assert main_processes() == there
        assert said(one)[2:] == [("textbox", "a", ""), ("paragraph", "/x", "")]
        assert one.back() and one.path == "/one"
        one.open(greeting, "/again")
        assert not one.back()


@pytest.mark.slow
def test_a_browser_ends_with_its_last_tab_and_another_begins_when_one_died() -> None:
    with tab() as page:
        page.open(greeting, "/")
        first = browsers()
    assert all_end(first)
    for killed in ("node", "chromium"):
        page = Tab(find_chromium())
        page.open(greeting, "/")
        dead = browsers()
        next(each for each in dead if killed in each.exe()).kill()
        with pytest.raises(Exception, match="closed"):
            page.read()
        with tab() as next_one:
            next_one.open(greeting, "/")
            assert said(next_one)[0] == ("heading", "hello", "")
            page.close()
            assert said(next_one)[0] == ("heading", "hello", ""), (
                "what the dead one leaves behind closes nothing"
            )
            assert not set(dead) & set(browsers())
        assert all_end(dead)
    dropped = Tab(find_chromium())
    dropped.open(greeting, "/")
    last = browsers()
    del dropped
    assert all_end(last)


@pytest.mark.slow
def test_a_browser_that_does_not_answer_is_given_up_and_the_next_tab_has_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    page = Tab(find_chromium())
    page.open(greeting, "/")
    stuck = _browsers[find_chromium()]
    released = threading.Event()
    monkeypatch.setattr("envs.builtin.browser_tab.CALL_SECONDS", 0.1)
    with pytest.raises(RuntimeError, match=r"chromium gave no answer within 0.1 s"):
        page._do(lambda page: released.wait())
    monkeypatch.undo()
    with tab() as other:
        other.open(greeting, "/")
        assert said(other)[0] == ("heading", "hello", "")
        assert _browsers[find_chromium()] is not stuck
    released.set()
    stuck.stuck = False
    page.close()


@pytest.mark.slow
def test_nothing_outlives_a_replicas_process_however_it_ends() -> None:
    async def play() -> None:
        for end in (signal.SIGKILL, None):
            replica = await SubprocessEnv.start(
                registry.env_factory("browser"), HostSettings(where="process")
            )
            try:
                assert "heading home" in await replica.reset(0)
                assert "heading shop" in (await replica.step("click(2)"))[0]
                started = browsers(replica.pid)
                if end is not None:
                    os.kill(replica.pid, end)
            finally:
                await replica.close()
            assert all_end(started)

    asyncio.run(play())
