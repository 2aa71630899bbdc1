"""A shop's pages in a real browser: links to follow, a form to send, a table to search.

Observation, line by line: "task: " and the task; then the page as in a screen reader, with the roles and names that
Chromium computes: "heading order", "text page 1 of 4", "row ann berg, baker, arlen, 4711", and with a number before it
each interactive element: "3 link people", "5 textbox name: ann", "8 combobox colour: red of choose, red, green",
"9 radio post: off", "12 checkbox wrapping: on", "13 button send". After an action without effect, the first line is
"nothing happens". With observe="screenshot" the task is followed by an image of the page, 640 by 480 pixels, with the
same numbers drawn beside the elements (set-of-mark prompting, Yang et al. 2023, arXiv:2310.11441).
Action: one call in the plain form of envs/tools/tool_calls.py: click(3), type(5, ann), select(8, red), back(), done(),
done(4711).
Reward: 1 if the requested page is open at done(), if done has the requested answer (in any case), or if the form was
sent once with all fields as requested; else 0. Horizon: `max_turns`.
Levels: 1 links to a page; 2 a form whose contents are told; 3 a fact in a table of several pages, by a name that can be
searched for, or by trade and town; 4 a form whose contents have to be found by links and in the table.
Ends: done, and a form that was sent, right or wrong (terminated); turns used up (truncated); an action outside the
grammar (malformed).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from envs import images
from envs.base import Info, Observation, Split, TalkSpace, TextEnv, check_options, draw_valid, vocabulary
from envs.builtin.browser_pages import (
    COLOURS,
    COLUMNS,
    DELIVERIES,
    FAMILY,
    GIVEN,
    LEVELS,
    LOOKS,
    SECTIONS,
    TOWNS,
    TRADES,
    WRAPPING,
    Goal,
    Site,
    draw,
    paid,
)
from envs.builtin.browser_tab import Element, Tab, find_chromium
from envs.tools.tool_calls import ToolCall, parse_calls

NOTHING, RIGHT, WRONG, UNREAD = "nothing happens", "right", "wrong", "no such action"
MAX_TYPED = 60  # characters of a text
INSTRUCTIONS = (
    "You are looking at a page in a browser. Do what the task says. {shown} Answer with one call: click(NUMBER) for "
    "links, buttons, radios and checkboxes; type(NUMBER, TEXT) to fill a textbox; select(NUMBER, OPTION) for a "
    "combobox; back(); done() when the page that was asked for is open; done(ANSWER) for a question. A form that is "
    "sent ends the task.\n"
)
SHOWN = {
    "text": "What can be acted on has a number before it.",
    "screenshot": "What can be acted on has its number beside it.",
}
ROLES = ("heading", "text", "row", "link", "button", "textbox", "combobox", "radio", "checkbox")
CALLS = ("click", "type", "select", "back", "done")
WORDS = vocabulary(
    (
        *(
            "task open the page of what is phone who order number in for by with without",
            NOTHING,
            RIGHT,
            WRONG,
            UNREAD,
        ),
        *("home shop people order name count colour choose search send previous next on off price", WRAPPING),
        *("welcome to the shop, your order was sent, there is no such page, missing", *ROLES, *CALLS),
        *(*SECTIONS, *(kind for kinds in SECTIONS.values() for kind in kinds), *LOOKS, *GIVEN, *FAMILY),
        *(*TRADES, *TOWNS, *COLOURS, *DELIVERIES, *COLUMNS),
    )
)


class Browser(TextEnv):
    """The environment.

    level: 1 to 4, see above. observe: "text" or "screenshot". max_turns: actions before truncation. split: "train" and
    "heldout" divide the tasks by text, regardless of the seed; "all" contains both. instructions: begin with the rules
    in English. executable: of Chromium; None searches the PATH. Raises ValueError for other values, or if there is no
    Chromium. Every turn waits for the browser: with env.host.where="process" other episodes do not.
    """

    def __init__(
        self,
        level: int = 1,
        observe: Literal["text", "screenshot"] = "text",
        max_turns: int = 30,
        split: Split = "all",
        instructions: bool = True,
        executable: str | None = None,
    ) -> None:
        check_options(level, LEVELS, split, max_turns)
        if observe not in SHOWN:
            raise ValueError(f"observe={observe!r} must be {' or '.join(SHOWN)}")
        self._level = level
        self._pictures = observe == "screenshot"
        self._max_turns = max_turns
        self._split = split
        self._opening = INSTRUCTIONS.format(shown=SHOWN[observe]) if instructions else ""
        self._executable = executable or find_chromium()
        if self._pictures:
            self.observation_space = TalkSpace()
        # Started here, because starting a browser takes seconds, which should not count as a reset.
        self._tab: Tab | None = Tab(self._executable)
        self._site = Site((), ())
        self._goal = Goal("")
        self._elements: dict[int, Element] = {}
        self._turns = 0

    def reset(  # type: ignore[override]  # observations may hold images
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        super().reset(seed=seed)
        self._site, self._goal = draw_valid(
            lambda: draw(self.np_random, self._level), lambda made: made[1].task, self._split
        )
        self._turns = 0
        if self._tab is None:
            self._tab = Tab(self._executable)
        self._tab.open(self._site.respond, "/")
        return self._observed(self._tab, self._opening), {}

    def step(self, action: str) -> tuple[Observation, float, bool, bool, Info]:  # type: ignore[override]
        if self._tab is None or not self._goal.task:
            raise RuntimeError("step() was called before reset()")
        call = read(action)
        if call is None:
            return UNREAD, 0.0, True, False, {"malformed": True, "success": False}
        self._turns += 1
        name, *given = call
        said = given[0] if name == "done" and given else ""
        acted = name == "done" or self._act(self._tab, name, given)
        if name == "done" or self._site.sent:
            reward = paid(self._goal, self._tab.path, said.lower(), self._site.sent)
            return RIGHT if reward else WRONG, reward, True, False, {"success": reward > 0}
        truncated = self._turns >= self._max_turns
        observation = self._observed(self._tab, "" if acted else f"{NOTHING}\n")
        return observation, 0.0, False, truncated, {"success": False} if truncated else {}

    def close(self) -> None:
        if self._tab is not None:
            self._tab.close()
            self._tab = None

    def _act(self, tab: Tab, name: str, given: Sequence[str]) -> bool:
        """Execute a call; return whether the page has the element for it."""
        if name == "back":
            return tab.back()
        element = self._elements.get(int(given[0]))
        role = element.role if element else ""
        if element is None:
            return False
        if name == "click" and role in ("link", "button", "radio", "checkbox"):
            tab.click(element)
        elif name == "type" and role == "textbox":
            tab.type(element, given[1])
        elif name == "select" and role == "combobox" and given[1] in element.options:
            tab.select(element, given[1])
        else:
            return False
        return True

    def _observed(self, tab: Tab, before: str) -> Observation:
        elements = tab.read()
        self._elements = {each.handle: each for each in elements if each.handle}
        task = f"{before}task: {self._goal.task}"
        if not self._pictures:
            return "\n".join((task, *map(line_of, elements)))
        return [{"role": "user", "content": [images.text_part(task), images.png_part(tab.picture())]}]


def read(action: str) -> tuple[str, ...] | None:
    """Parse an action as one call with text arguments; None for anything else."""
    outside, calls = parse_calls(action.strip(), "plain")
    if outside or len(calls) != 1 or not isinstance(call := calls[0], ToolCall):
        return None
    values = list(call.arguments.values())
    if any(isinstance(value, bool) or not isinstance(value, int | str) for value in values):
        return None
    texts = [str(value) for value in values]
    if not all(len(text) <= MAX_TYPED and text.isascii() and text.isprintable() for text in texts):
        return None
    if call.name == "back":
        fits = not values
    elif call.name == "done":
        fits = len(values) <= 1
    else:
        wanted = {"click": 1, "type": 2, "select": 2}.get(call.name)
        fits = len(values) == wanted and isinstance(values[0], int)
    return (call.name, *texts) if fits else None


def line_of(element: Element) -> str:
    """An element as a line of an observation."""
    role = "text" if element.role == "paragraph" else element.role
    line = f"{role} {element.name}"
    if element.role in ("textbox", "combobox", "radio", "checkbox"):
        line += f": {element.value}".rstrip()
    if element.options:
        line += f" of {', '.join(element.options)}"
    return f"{element.handle} {line}" if element.handle else line


# The scripted player ----------------------------------------------------------------------------------------------

_LINE = re.compile(r"(?:([0-9]+) )?([a-z]+) ([^:]*)(?:: ?(.*?)(?: of (.+))?)?")
_OPEN, _ASK = re.compile(r"open the page of the (.+)"), re.compile(r"(what is the phone of|who is) (.+)")
_ORDER = re.compile(rf"order (.) of (.+) in (.+) for (.+) by (.+) (with|without) {WRAPPING}")


class PageView:
    """The content of a text observation."""

    def __init__(self, observation: str) -> None:
        task, *lines = observation[observation.index("task: ") :].splitlines()
        self.task = task.removeprefix("task: ")
        self.elements = []
        for line in lines:
            found = _LINE.fullmatch(line)
            assert found is not None, f"not a line of an observation: {line!r}"
            handle, role, name, value, options = found.groups()
            options = options.split(", ") if options else []
            self.elements.append(Element(int(handle or 0), role, name, value or "", options))

    def named(self, role: str, name: str) -> Element | None:
        """The first element with this role and name."""
        return next((each for each in self.elements if (each.role, each.name) == (role, name)), None)

    def click(self, role: str, *names: str) -> str:
        """The call that clicks the first of these elements that is there."""
        return next(f"click({found.handle})" for name in names if (found := self.named(role, name)))

    def text(self, beginning: str) -> str | None:
        """The rest of the first text that begins with `beginning`."""
        texts = (each.name for each in self.elements if each.role == "text")
        return next((text.removeprefix(beginning) for text in texts if text.startswith(beginning)), None)

    def person(self, who: str) -> list[str] | None:
        """The row of a person, given by name or as "the TRADE of TOWN", if it is on the page."""
        rows = (each.name.split(", ") for each in self.elements if each.role == "row")
        return next((row for row in rows if who in (row[0], f"the {row[1]} of {row[2]}")), None)


class Player:
    """Goes where missing facts are found, then answers or sends the form; errs with probability `error_rate`.

    An error is any possible action on the page, or done with any word on it. One per episode; it reads text, not
    images.
    """

    def __init__(self, error_rate: float, seed: int) -> None:
        self._error_rate = error_rate
        self._rng = np.random.default_rng(seed)
        self._known: dict[str, str] = {}  # phrase of the task -> item number or person name

    def act(self, observation: Observation) -> str:
        """The next call. ValueError for an image."""
        if not isinstance(observation, str):
            raise ValueError('the scripted player reads text only; use observe="text"')
        view = PageView(observation)
        if self._rng.random() < self._error_rate:
            return self._random_action(view)
        if found := _OPEN.fullmatch(view.task):
            return "done()" if view.named("heading", found[1]) else _towards_item(view, found[1])
        if found := _ASK.fullmatch(view.task):
            if row := view.person(found[2]):
                return f"done({row[0] if found[1] == 'who is' else row[3]})"
            return _towards_person(view, found[2])
        found = _ORDER.fullmatch(view.task)
        assert found is not None, f"unknown task: {view.task!r}"
        return self._order(view, *found.groups())

    def _order(
        self, view: PageView, count: str, what: str, colour: str, who: str, delivery: str, wrapped: str
    ) -> str:
        item = what.removeprefix("the ")
        if what.startswith("number "):
            self._known[what] = what.removeprefix("number ")
        elif view.named("heading", item) and (number := view.text("number ")):
            self._known[what] = number
        if not who.startswith("the "):
            self._known[who] = who
        elif row := view.person(who):
            self._known[who] = row[0]
        if what not in self._known:
            return _towards_item(view, item)
        if who not in self._known:
            return _towards_person(view, who)
        if not view.named("button", "send"):
            return view.click("link", "order")
        filled = {"number": self._known[what], "name": self._known[who], "count": count, "colour": colour}
        filled |= {delivery: "on", WRAPPING: "on" if wrapped == "with" else "off"}
        for each in view.elements:
            wanted = filled.get(each.name, each.value)
            if wanted != each.value and each.handle:
                form = {"textbox": "type({}, {})", "combobox": "select({}, {})"}.get(each.role, "click({})")
                return form.format(each.handle, wanted)
        return view.click("button", "send")

    def _random_action(self, view: PageView) -> str:
        words = [*view.task.split(), *(cell for each in view.elements for cell in each.name.split(", "))]
        word = words[self._rng.integers(len(words))]
        calls = ["back()", "done()", f"done({word})"]
        for each in view.elements:
            if each.role == "textbox":
                calls.append(f"type({each.handle}, {word})")
            elif each.role == "combobox":
                calls.append(f"select({each.handle}, {each.options[self._rng.integers(len(each.options))]})")
            elif each.handle:
                calls.append(f"click({each.handle})")
        return calls[self._rng.integers(len(calls))]


def _towards_item(view: PageView, item: str) -> str:
    section = next(section for section, kinds in SECTIONS.items() if item.split()[-1] in kinds)
    return view.click("link", item, section, "shop")


def _towards_person(view: PageView, who: str) -> str:
    box = view.named("textbox", "name")
    if not view.named("heading", "people") or box is None:
        return view.click("link", "people")
    if who.startswith("the "):
        return view.click("link", "next", "people")
    return view.click("button", "search") if box.value == who else f"type({box.handle}, {who})"
