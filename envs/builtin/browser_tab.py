"""A page in Chromium whose requests are answered by one function, driven by Playwright (extra browser).

    environment, any thread         the one thread that calls Playwright                   driver, Chromium
    Tab.click, .read, ...   job ->  one after another                              pipes ->   a context per tab
                            <- result or error

Playwright cannot be called in a thread with a running event loop, where replicas are played: hence the extra thread. A
process has one browser, started with its first tab and stopped soon after its last; each tab has its own context.
Requests are answered by the tab's function or aborted, so nothing reaches a network, and nothing listens. Driver and
browser end when their pipes close, that is, with this process. A driver that is killed with it leaves Chromium's
profile (a megabyte) in the temporary folder.
"""

from __future__ import annotations

import atexit
import os
import random
import shutil
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlsplit

try:
    from playwright.sync_api import Error, sync_playwright
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "browser needs an optional package: pip install 'manta-rl[browser]'", name="playwright"
    ) from missing

ORIGIN = "http://site.test"  # a reserved name (RFC 6761), never resolved
VIEWPORT = {"width": 640, "height": 480}
START_SECONDS = 120.0  # for the driver and Chromium
CALL_SECONDS = 60.0  # limit for one operation in a tab
END_SECONDS = 5.0
LINGER_SECONDS = 5.0  # a browser without tabs is kept this long, because starting one takes seconds
EXECUTABLES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # for what no route catches: preconnecting before a click
    "--enable-blink-features=ComputedAccessibilityInfo",  # roles and names as the browser itself computes them
)
Respond = Callable[[str, str, dict[str, str]], str]  # method, path, fields -> HTML
_Result = TypeVar("_Result")

# All readable and interactive elements, in page order; interactive ones are numbered from 1.
_READ = """() => {
    let handle = 0;
    return Array.from(document.querySelectorAll("h1, p, tr, a, button, input, select"), each => {
        const acts = each.matches("a, button, input, select"), role = each.computedRole;
        if (acts) each.dataset.handle = ++handle;
        const cells = Array.from(each.cells ?? [each], cell => cell.textContent.trim());
        const state = each.checked ? "on" : "off", chosen = each.selectedOptions?.[0]?.label;
        return {
            handle: acts ? handle : 0,
            role: role,
            name: acts ? each.computedName : cells.join(", "),
            value: ["radio", "checkbox"].includes(role) ? state : chosen ?? each.value ?? "",
            options: Array.from(each.options ?? [], option => option.label),
        };
    });
}"""
_CENTRE = """handle => {
    const element = document.querySelector(`[data-handle="${handle}"]`);
    element.scrollIntoView({block: "nearest"});
    const box = element.getBoundingClientRect();
    return [box.x + box.width / 2, box.y + box.height / 2];
}"""
_MARK = """() => document.querySelectorAll("[data-handle]").forEach(each => {
    const box = each.getBoundingClientRect(), mark = document.createElement("b");
    mark.textContent = each.dataset.handle;
    mark.className = "mark";
    mark.style = `position: fixed; left: ${Math.max(0, box.left - 20)}px; top: ${box.top + box.height / 2 - 9}px;
        font: bold 12px/18px sans-serif; min-width: 17px; text-align: center; color: #000; background: #ffd84d;
        border-radius: 3px`;
    document.body.append(mark);
})"""
_UNMARK = """() => document.querySelectorAll("b.mark").forEach(mark => mark.remove())"""


def find_chromium() -> str:
    """The path of Chromium or Chrome on this machine. ValueError, one line, if there is none."""
    found = next((path for name in EXECUTABLES if (path := shutil.which(name))), None)
    if found is None:
        raise ValueError(
            "there is no Chromium here: install your system's package (Debian: apt-get install chromium) "
            "or name its path with the option executable"
        )
    return found


@dataclass(frozen=True, slots=True)
class Element:
    """An element of a page: role and name as Chromium computes them for screen readers, and its state."""

    handle: int  # number for actions; 0 for elements that can only be read
    role: str
    name: str
    value: str  # of a textbox or combobox; on or off of a radio or checkbox
    options: list[str]  # of a combobox


class _Browser:
    """Chromium and the thread that drives it. All methods but `post` and `ask` run in that thread."""

    def __init__(self, executable: str) -> None:
        self.stuck = False
        self._executable = executable
        self._jobs: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        self._playwright: Any = None
        self._chromium: Any = None
        self._contexts: set[Any] = set()
        threading.Thread(target=self._work, name="chromium", daemon=True).start()

    def post(self, job: Callable[[], _Result]) -> Future[_Result]:
        """Schedule a job without waiting; may be called by the garbage collector."""
        done: Future[_Result] = Future()
        self._jobs.put((done, job))
        return done

    def ask(self, job: Callable[[], _Result], seconds: float) -> _Result:
        """Run a job and wait. Raises what it raises, RuntimeError if there is no answer in time."""
        return self.wait(self.post(job), seconds)

    def wait(self, done: Future[_Result], seconds: float) -> _Result:
        """Wait for a posted job, like `ask`."""
        try:
            return done.result(0 if self.stuck else seconds)
        except TimeoutError:
            self.stuck = True  # the thread cannot be stopped; the next tab starts another browser
            raise RuntimeError(
                f"the browser {self._executable} gave no answer within {seconds:g} s"
            ) from None

    def join(self) -> Any:
        """A new context; starts the browser if none runs or the last one died."""
        context = None
        if self._chromium is not None:
            with suppress(Error):
                context = self._context()
        if context is None:
            self._stop()
            self._start()
            context = self._context()
        self._contexts.add(context)
        return context

    def leave(self, context: Any) -> None:
        """Close a context; a browser without contexts is stopped soon."""
        with suppress(Error):
            context.close()
        self._contexts.discard(context)

    def end(self) -> None:
        """Stop at interpreter exit, which must not happen during a call to Playwright."""
        with suppress(RuntimeError):
            self.ask(self._stop, END_SECONDS)

    def _work(self) -> None:
        while True:
            try:
                done, job = self._jobs.get(timeout=None if self._contexts else LINGER_SECONDS)
            except Empty:
                self._stop()
                continue
            try:
                done.set_result(job())
            except BaseException as error:  # re-raised in the waiting thread
                done.set_exception(error)
            del done, job  # so that an idle thread does not keep a tab's context alive

    def _context(self) -> Any:
        return self._chromium.new_context(viewport=VIEWPORT, offline=True, service_workers="block")

    def _start(self) -> None:
        state = random.getstate()  # Playwright draws from the global generator, which must not be disturbed
        self._playwright = sync_playwright().start()
        random.setstate(state)
        try:
            # Chromium's own sandbox does not work for root.
            self._chromium = self._playwright.chromium.launch(
                executable_path=self._executable, args=FLAGS, chromium_sandbox=os.geteuid() != 0
            )
        except Error as error:
            self._stop()
            raise RuntimeError(
                f"{self._executable} did not start: {error.message.splitlines()[0]}"
            ) from error

    def _stop(self) -> None:
        playwright, chromium = self._playwright, self._chromium
        self._playwright = self._chromium = None
        self._contexts.clear()
        if chromium is not None:
            with suppress(Error):
                chromium.close()
        if playwright is not None:
            with suppress(Error):
                playwright.stop()


_browsers: dict[str, _Browser] = {}  # by executable
_lock = threading.Lock()


def _browser(executable: str) -> _Browser:
    with _lock:
        browser = _browsers.get(executable)
        if browser is None or browser.stuck:
            browser = _browsers[executable] = _Browser(executable)
            atexit.register(browser.end)
        return browser


@dataclass
class _Router:
    """Answers a tab's requests. Playwright holds it, so it must not reference the tab."""

    respond: Respond | None = None

    def handle(self, route: Any) -> None:
        request = route.request
        if self.respond is None or not request.url.startswith(f"{ORIGIN}/"):
            route.abort()
            return
        url = urlsplit(request.url)
        sent = (request.post_data or "") if request.method == "POST" else url.query
        page = self.respond(request.method, url.path, dict(parse_qsl(sent, keep_blank_values=True)))
        route.fulfill(body=page, content_type="text/html; charset=utf-8")


@dataclass(frozen=True)
class _Opened:
    """A tab's objects in the browser."""

    context: Any
    page: Any
    protocol: Any  # DevTools session, for operations that Playwright lacks
    router: _Router


class Tab:
    """One page in its own context. Methods may be called from any thread, one at a time.

    Raises RuntimeError if the browser does not start or answer in time, Playwright's errors if it is gone. A tab is
    closed when it is garbage collected.
    """

    def __init__(self, executable: str) -> None:
        # Jobs must not reference the tab, or it could never be garbage collected.
        browser = self._browser = _browser(executable)
        self._opened = browser.ask(lambda: _opened(browser), START_SECONDS)
        context = self._opened.context
        self._finalizer = weakref.finalize(self, lambda: browser.post(lambda: browser.leave(context)))
        self._finalizer.atexit = False  # contexts end with this process anyway

    @property
    def path(self) -> str:
        """The path of the current page."""
        return urlsplit(self._do(lambda page: page.url)).path

    def open(self, respond: Respond, path: str) -> None:
        """Open a page with an empty history; from now on `respond` answers."""
        self._opened.router.respond = respond
        protocol = self._opened.protocol

        def job(page: Any) -> None:
            page.goto(f"{ORIGIN}{path}")
            protocol.send("Page.resetNavigationHistory")

        self._do(job)

    def read(self) -> list[Element]:
        """Headings, paragraphs, table rows and all interactive elements, in page order."""
        return [Element(**each) for each in self._do(lambda page: page.evaluate(_READ))]

    def click(self, element: Element) -> None:
        """Click at the centre of an element; waits for the page of a link or button."""
        leads_on = element.role in ("link", "button")

        def job(page: Any) -> None:
            x, y = page.evaluate(_CENTRE, element.handle)
            with page.expect_navigation() if leads_on else nullcontext():
                page.mouse.click(x, y)

        self._do(job)

    def type(self, element: Element, text: str) -> None:
        """Replace the text of a textbox."""
        self._do(lambda page: page.locator(f'[data-handle="{element.handle}"]').fill(text))

    def select(self, element: Element, option: str) -> None:
        """Choose an option of a combobox."""
        self._do(lambda page: page.locator(f'[data-handle="{element.handle}"]').select_option(label=option))

    def back(self) -> bool:
        """Go back one page; returns whether there was one."""

        def job(page: Any) -> bool:
            can_go_back = bool(page.evaluate("navigation.canGoBack"))
            if can_go_back:
                page.go_back()
            return can_go_back

        return self._do(job)

    def picture(self) -> bytes:
        """A screenshot as PNG, VIEWPORT in size, with the numbers of `read` beside the elements."""

        def job(page: Any) -> bytes:
            page.evaluate(_MARK)
            png: bytes = page.screenshot()
            page.evaluate(_UNMARK)
            return png

        return self._do(job)

    def close(self) -> None:
        """Close the page and its context; the browser ends with its last tab."""
        done = self._finalizer()
        if done is not None:
            self._browser.wait(done, CALL_SECONDS)

    def _do(self, job: Callable[[Any], _Result]) -> _Result:
        page = self._opened.page
        return self._browser.ask(lambda: job(page), CALL_SECONDS)


def _opened(browser: _Browser) -> _Opened:
    context = browser.join()
    router = _Router()
    try:
        context.route("**/*", router.handle)
        context.set_default_timeout(CALL_SECONDS * 500)  # milliseconds: half of the caller's limit
        page = context.new_page()
        return _Opened(context, page, context.new_cdp_session(page), router)
    except Error:
        browser.leave(context)
        raise
