"""MiniWoB++: small web pages in a real browser, unmodified. Needs the extra miniwob, and Chromium with ChromeDriver.

Observation, line by line: "task: " and the task; then the page's elements in its own order: a number for actions, the
tag, its text in quotes and its value (4 button "ok", 7 input_checkbox = off), its id and class, and for what has
no text its place, size and colour. Text between elements has no number. With observe="screenshot" an image of the page
follows the task, 160 by 210 pixels, without the list.
Action: one call in the plain form of envs/tools/tool_calls.py: click(4), type(7, ann), press(<Enter>), or by pixels
click_at(80, 120), double_click_at(80, 120), drag(20, 60, 90, 60), scroll_down(80, 120), scroll_up(80, 120).
Reward: the package's raw reward: 1 for the whole task, a part, or down to -1; without its discount for time.
Horizon: `max_turns`. The package's limit of ten seconds is lifted: what the policy takes to answer is not its fault.
Levels: none; each id is a task.
Ends: the page says that the task is done (terminated), turns used up (truncated), any other action (malformed).
"""

from __future__ import annotations

import os
import re
import shutil
from typing import Any, Literal, get_args

import gymnasium as gym
import miniwob
import numpy as np
from gymnasium.utils import RecordConstructorArgs
from miniwob.action import ActionTypes
from miniwob.reward import get_raw_reward

from envs.base import Info, Observation, TalkSpace, text_space
from envs.images import image_observation
from envs.registry import Env, make_gymnasium
from envs.suites.rng_isolation import IsolatedRng
from envs.tools.tool_calls import ToolCall, parse_calls

gym.register_envs(miniwob)
IDS = tuple(sorted(env_id for env_id in gym.registry if env_id.startswith("miniwob/")))
View = Literal["text", "screenshot"]
MAX_TYPED = 64  # characters, as in the package's action space
NOTHING, UNREADABLE = "nothing happens", "That is no action."
INSTRUCTIONS = (
    "You are looking at a web page. Do the task. Answer with one call: click(NUMBER), type(NUMBER, TEXT), "
    "press(KEY), click_at(X, Y), drag(X, Y, TO_X, TO_Y), scroll_down(X, Y) or scroll_up(X, Y).\n"
)
# Call -> the types of its arguments. Coordinates are pixels from the left and the top.
CALLS: dict[str, tuple[type, ...]] = {
    "click": (int,),
    "type": (int, str),
    "press": (str,),
    "click_at": (int, int),
    "double_click_at": (int, int),
    "drag": (int, int, int, int),
    "scroll_down": (int, int),
    "scroll_up": (int, int),
}
_AT = {
    "click_at": ActionTypes.CLICK_COORDS,
    "double_click_at": ActionTypes.DBLCLICK_COORDS,
    "scroll_down": ActionTypes.SCROLL_DOWN_COORDS,
    "scroll_up": ActionTypes.SCROLL_UP_COORDS,
}
_NO_CLOCK = (
    "clearTimeout(core.EP_TIMER); core.clearTimer();"  # its number stays: the mark of a running episode
)


def miniwob_page(
    env_id: str, observe: View = "text", max_turns: int = 20, instructions: bool = True, **options: Any
) -> Env:
    """A replica with a browser of its own. options: the package's own, data_mode and wait_ms among them."""
    if observe not in get_args(View):
        raise ValueError(f"observe={observe!r} must be text or screenshot")
    if max_turns < 1:
        raise ValueError(f"max_turns={max_turns} leaves no turn to play; use 1 or more")
    _find_driver()
    given = {"disable_env_checker": True, "reward_processor": get_raw_reward} | options
    return MiniWobPage(make_gymnasium(env_id, given), observe == "screenshot", max_turns, instructions)


def _find_driver() -> None:
    """Name the system's ChromeDriver to Selenium, which would download one. ValueError, one line, if there is none."""
    found = os.environ.get("SE_CHROMEDRIVER") or shutil.which("chromedriver")
    if found is None:
        raise ValueError(
            "there is no ChromeDriver here: install your system's package (Debian: apt-get install chromium-driver) "
            "or name its path in SE_CHROMEDRIVER"
        )
    os.environ["SE_CHROMEDRIVER"] = found
    os.environ.setdefault("SE_OFFLINE", "true")
    os.environ.setdefault("SE_AVOID_STATS", "true")


class MiniWobPage(gym.Wrapper[Observation, str, Any, Any], RecordConstructorArgs):
    """Text wrapper around an environment of the package."""

    reward_range = (-1.0, 1.0)
    # Pages have clocks and animations of their own: what is seen depends on when.
    nondeterministic = True

    def __init__(
        self, env: gym.Env[Any, Any], pictures: bool = False, max_turns: int = 20, instructions: bool = True
    ) -> None:
        RecordConstructorArgs.__init__(
            self, pictures=pictures, max_turns=max_turns, instructions=instructions
        )
        super().__init__(env)
        self.action_space = text_space(256)
        self.observation_space = TalkSpace()
        self._pictures = pictures
        self._max_turns = max_turns
        self._opening = INSTRUCTIONS if instructions else ""
        self._generators = IsolatedRng()
        self._page: Any = env.unwrapped
        self._numbers: set[int] = set()
        self._turns = 0
        self._running = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        # Loaded anew: a reload, which is all that the package does, keeps what was focused and typed.
        self._page.instance.driver.get(self._page.instance.url)
        with self._generators.entered():  # the package seeds NumPy's global generator
            seen = self.env.reset(
                seed=seed, options={"record_screenshots": self._pictures} | (options or {})
            )[0]
        self._page.instance.driver.execute_script(_NO_CLOCK)
        self._turns = 0
        self._running = True
        return self._observed(seen, self._opening), {}

    def step(self, action: str) -> tuple[Observation, float, bool, bool, Info]:
        if not self._running:
            raise RuntimeError("step() was called without a running episode; call reset() first")
        call = read(action)
        if call is None:
            self._running = False
            return UNREADABLE, 0.0, True, False, {"malformed": True, "success": False}
        self._turns += 1
        actions = self._actions(*call)
        game: Any = self.env  # its actions are none of this environment's
        seen, reward, done = None, 0.0, False
        for each in actions or [self._page.create_action(ActionTypes.NONE)]:
            with self._generators.entered():
                seen, reward, done, *_ = game.step(each)
        truncated = not done and self._turns >= self._max_turns
        info: Info = {"success": bool(done and reward == 1.0)} if done or truncated else {}
        self._running = not (done or truncated)
        if done:
            return "done", float(reward), True, False, info
        return self._observed(seen, "" if actions else f"{NOTHING}\n"), 0.0, False, truncated, info

    def _actions(self, name: str, given: list[Any]) -> list[dict[str, Any]]:
        """A call as actions of the package; empty for an element or a key that is not there."""
        create = self._page.create_action
        if name in ("click", "type") and given[0] not in self._numbers:
            return []
        if name == "click":
            return [create(ActionTypes.CLICK_ELEMENT, ref=given[0])]
        if name == "type":
            typed = {"ref": given[0], "text": given[1]}
            return [create(ActionTypes.FOCUS_ELEMENT_AND_TYPE_TEXT, **typed)]
        if name == "press":
            keys = self._page.action_space_config.allowed_keys
            return [create(ActionTypes.PRESS_KEY, key=keys.index(given[0]))] if given[0] in keys else []
        places = [np.array(given[at : at + 2], dtype=np.float32) for at in range(0, len(given), 2)]
        if not all(place in self._page.action_space["coords"] for place in places):
            return []
        kinds = (ActionTypes.MOUSEDOWN_COORDS, ActionTypes.MOUSEUP_COORDS) if name == "drag" else (_AT[name],)
        return [create(kind, coords=place) for kind, place in zip(kinds, places, strict=True)]

    def _observed(self, seen: Any, before: str) -> Observation:
        task = f"{before}task: {seen['utterance']}"
        elements = [each for each in seen["dom_elements"] if each["ref"] > 0]
        self._numbers = {int(each["ref"]) for each in elements}
        if self._pictures:
            return image_observation(seen["screenshot"], task)
        return "\n".join((task, *filter(None, map(line_of, seen["dom_elements"]))))


def read(action: str) -> tuple[str, list[Any]] | None:
    """Parse an action as one call: its name and arguments; None for anything else."""
    outside, calls = parse_calls(action.strip(), "plain")
    if outside or len(calls) != 1 or not isinstance(call := calls[0], ToolCall):
        return None
    wanted, given = CALLS.get(call.name), list(call.arguments.values())
    if wanted is None or len(given) != len(wanted):
        return None
    read = [_as(kind, value) for kind, value in zip(wanted, given, strict=True)]
    if any(type(value) is not kind for kind, value in zip(wanted, read, strict=True)):
        return None
    texts = [value for value in read if isinstance(value, str)]
    typable = all(text.isascii() and text.isprintable() and len(text) <= MAX_TYPED for text in texts)
    return (call.name, read) if typable else None


def _as(kind: type, value: Any) -> Any:
    """A number as text, where text is wanted: 4711 is typed as it is written."""
    return str(value) if kind is str and type(value) in (int, float) else value


_CONTAINERS = ("body", "div", "span", "table", "tbody", "tr", "ul", "form", "svg", "g", "p", "center")


def line_of(element: dict[str, Any]) -> str:
    """An element as a line of an observation; empty for what only holds others."""
    tag, text = element["tag"].lower(), element["text"]
    if element["ref"] < 0:
        return f'text "{text}"' if text else ""
    leaf, value = bool(element["flags"][3]), element["value"]
    coloured = element["bg_color"][3] > 0 and tuple(element["bg_color"][:3]) != (1, 1, 1)
    if tag in _CONTAINERS and not text and not (leaf and (coloured or element["classes"])):
        return ""
    line = f"{element['ref']} {tag}"
    if text:
        line += f' "{text}"'
    if tag in ("input_checkbox", "input_radio"):
        line += f" = {'on' if value == 'True' else 'off'}"
    elif tag.startswith("input") or tag == "textarea":
        line += f' = "{value}"'
    if not text:
        left, top, wide, high = (float(element[key][0]) for key in ("left", "top", "width", "height"))
        line += f" at {left:.0f},{top:.0f} size {wide:.0f}x{high:.0f}"
        if coloured:
            line += " #" + "".join(f"{round(255 * float(part)):02x}" for part in element["bg_color"][:3])
    marks = [f"#{element['id']}"] if element["id"] else []
    marks += [f".{name}" for name in element["classes"].split() if not name.isupper()]
    return " ".join((line, *marks, *(["focused"] if element["flags"][0] else [])))


# The scripted player ----------------------------------------------------------------------------------------------

_LINE = re.compile(r'(\d+) (\S+)(?: "(.*?)")?(?: = "?(.*?)"?)?(?: at .*)?(?: [#.]\S+)*(?: focused)?')
_ENDS = ("submit", "ok", "search", "done")


class Player:
    """Clicks what the task names, types what it quotes into empty boxes, then submits; errs with `error_rate`.

    An error is a click on any element. One per episode; it reads text, not images.
    """

    def __init__(self, error_rate: float, seed: int) -> None:
        self._error_rate = error_rate
        self._rng = np.random.default_rng(seed)
        self._used: set[int] = set()

    def act(self, observation: Observation) -> str:
        """The next call. ValueError for an image."""
        if not isinstance(observation, str):
            raise ValueError('the scripted player reads text only; use observe="text"')
        task, *lines = observation[observation.index("task: ") + 6 :].splitlines()
        elements = [found.groups() for line in lines if (found := _LINE.fullmatch(line))]
        if not elements:
            return "click_at(80, 100)"
        if self._rng.random() < self._error_rate:
            return f"click({elements[self._rng.integers(len(elements))][0]})"
        number, call = self._chosen(task, elements)
        self._used.add(number)
        return call

    def _chosen(self, task: str, elements: list[tuple[Any, ...]]) -> tuple[int, str]:
        left = [(int(number), *rest) for number, *rest in elements if int(number) not in self._used]
        quoted = re.findall(r'"([^"]+)"', task)
        for number, tag, text, value in left:
            if tag in ("input_text", "input_password", "textarea") and not value and quoted:
                typed = quoted[
                    min(sum("input" in each[1] for each in left if each[0] < number), len(quoted) - 1)
                ]
                return number, f'type({number}, "{typed}")'
            if (
                text
                and text.lower() not in _ENDS
                and re.search(rf"\b{re.escape(text)}\b", task, re.IGNORECASE)
            ):
                return number, f"click({number})"
        for number, tag, text, _ in left:
            if (text or "").lower() in _ENDS or tag == "button":
                return number, f"click({number})"
        number = int(elements[self._rng.integers(len(elements))][0])
        return number, f"click({number})"
