"""An annotator played by a script: reads both answers of a pair off the page of `manta label`, and judges by keyboard.

Needs Chromium and the extra `browser`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from envs.builtin.browser_tab import find_chromium

VIEWPORT = {"width": 1000, "height": 640}
_KEYS = {1: "1", -1: "2", 0: "3"}  # the left is better, the right is, a tie
_ALIKE = 1e-6  # tastes that differ by less are a tie
_WAIT_MS = 120_000
_END_SECONDS = 60


class Annotator:
    """Who judges: a taste says how much an answer is liked, and nothing else knows it."""

    def __init__(self, page: Page, address: str, name: str, taste: Callable[[str], float]) -> None:
        self._page = page
        self._taste = taste
        self._judged = 0
        page.set_default_timeout(_WAIT_MS)
        page.goto(address)
        page.locator("#annotator").fill(name)
        page.keyboard.press("Enter")
        self._wait()

    def judge(self, count: int) -> None:
        """Judge so many pairs, one after the other."""
        for _ in range(count):
            left, right = (self._taste(answer) for answer in self._answers())
            better = 0 if abs(left - right) < _ALIKE else 1 if left > right else -1
            self._page.keyboard.press(_KEYS[better])
            self._page.keyboard.press("Enter")
            self._judged += 1
            self._wait()

    def reload(self) -> None:
        """Load the page again, which asks for the next pair again."""
        self._page.reload()
        self._wait()

    def screenshot(self, file: Path, key: str = "") -> None:
        """Write a picture of the page, after pressing a key."""
        if key:
            self._page.keyboard.press(key)
        self._page.screenshot(path=file)

    def _answers(self) -> list[str]:
        """The text of the answers on the left and on the right, as the page shows it."""
        sides = self._page.locator("#sides section")
        return ["\n".join(sides.nth(place).locator(".answer pre").all_inner_texts()) for place in range(2)]

    def _wait(self) -> None:
        """Return when the page shows the pair after all that were judged."""
        self._page.locator("#counts", has_text=re.compile(rf"^{self._judged} by you")).wait_for()
        self._page.locator("#sides section .answer").first.wait_for()


@contextmanager
def annotating(address: str, name: str, taste: Callable[[str], float]) -> Iterator[Annotator]:
    """An annotator at a page, whose browser ends with the block."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=find_chromium(), chromium_sandbox=os.geteuid() != 0, args=["--disable-gpu"]
        )
        try:
            yield Annotator(browser.new_page(viewport=VIEWPORT), address, name, taste)
        finally:
            browser.close()


@contextmanager
def serving(arguments: Sequence[str]) -> Iterator[str]:
    """A command of manta that serves until the end of the block; yields the address that it prints."""
    command = [sys.executable, "-m", "deploy.cli", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    assert process.stdout is not None
    try:
        found = (re.search(r"http://\S+", line) for line in process.stdout)
        address = next((match.group() for match in found if match), None)
        if address is None:
            raise RuntimeError(f"manta {' '.join(arguments)} ended with status {process.wait(_END_SECONDS)}")
        yield address
    finally:
        process.terminate()
        process.wait(_END_SECONDS)
        process.stdout.close()
