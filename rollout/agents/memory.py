"""Memory within an episode: a notebook; and for conversations that outgrow their context a window, or a summary.

notebook  tools with which the policy writes down what it wants to read again: `write`, `read` and `notes`
window    of the conversation the last `keep` turns stay; the task (the first observation) always does
summary   the policy is asked to say what matters so far, a turn that is stored and trained like any other; its own
          words then stand for all that went before

What the environment itself begins anew with is the task from there on.
The last two begin the conversation anew, as a segment of its own, when `every` turns have come together: a stored
segment is never edited, and in between the conversation grows by what is said, so that its tokens are sampled and
trained once.
Summaries by the policy itself, learnt with the task: Zhou et al. 2025, MEM1, section 3.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from envs.base import Info, Message, Observation, messages_of
from envs.tools.tool import Tool
from envs.tools.tool_calls import Style
from envs.tools.tool_env import Toolbox, ToolEnv
from rollout.agents.part import Env, Outcome, Part, anew, answered, begins_anew, followed, goes_on, preceded


class NotebookSettings(BaseModel):
    """What the policy writes down stays, whatever the conversation forgets."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["notebook"] = "notebook"
    entries: int = Field(32, gt=0, description="notes kept; one more is refused")
    max_chars: int = Field(200, gt=0, description="a longer note is cut, and so is a longer key")
    style: Style = Field("hermes", description="how its tools are called, as in the part `tools`")
    max_calls: int = Field(64, gt=0, description="calls an episode")

    def dress(self, env: Env) -> Env:
        """The environment as the policy has it."""
        toolbox = Toolbox(sources=[Notebook(self.entries, self.max_chars)], call_seconds=None)
        return ToolEnv(env, toolbox, style=self.style, max_calls=self.max_calls)


class WindowSettings(BaseModel):
    """What was said longest ago is forgotten."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["window"] = "window"
    every: int = Field(8, gt=0, description="turns that come together before the conversation begins anew")
    keep: int = Field(4, ge=0, description="of them the last so many stay")

    @model_validator(mode="after")
    def _forgets_something(self) -> WindowSettings:
        if self.keep >= self.every:
            raise ValueError(f"keep={self.keep} of every={self.every} turns forgets nothing; keep fewer")
        return self

    def dress(self, env: Env) -> Env:
        """The environment as the policy has it."""
        return Window(env, settings=self)


class SummarySettings(BaseModel):
    """The policy's own words stand for what was said."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["summary"] = "summary"
    every: int = Field(8, gt=0, description="turns that come together before a summary is asked for")
    ask: str = Field("Write down what matters of all this.", description="how it is asked for")
    max_chars: int = Field(600, gt=0, description="a longer summary is cut")

    def dress(self, env: Env) -> Env:
        """The environment as the policy has it."""
        return Summary(env, settings=self)


class Notebook:
    """Notes of one episode by their keys, as a source of tools (`envs.tools.tool_env.Source`)."""

    repeatable = True

    def __init__(self, entries: int, max_chars: int) -> None:
        self._entries, self._max_chars = entries, max_chars
        self._notes: dict[str, str] = {}
        self.tools = [Tool.of(each) for each in (self.write, self.read, self.notes)]

    def write(self, key: str, text: str) -> str:
        """Note something down under a key; an earlier note of that key is replaced."""
        key = key[: self._max_chars]
        if key not in self._notes and len(self._notes) >= self._entries:
            return f"the notebook is full: {', '.join(self._notes)}"
        self._notes[key] = text[: self._max_chars]
        return "noted"

    def read(self, key: str) -> str:
        """What stands under a key."""
        key = key[: self._max_chars]
        return self._notes.get(key, f"nothing stands under {key}")

    def notes(self) -> str:
        """The keys there are."""
        return ", ".join(self._notes) or "no notes"

    def renew(self) -> None:
        """An episode begins with an empty notebook."""
        self._notes.clear()

    def close(self) -> None:
        """Nothing is held."""


class Window(Part):
    """An environment whose policy remembers the task and the last turns."""

    def __init__(self, env: Env, settings: WindowSettings) -> None:
        super().__init__(env, settings=settings)
        self._settings = settings
        self._task: list[Message] = []
        self._turns: list[list[Message]] = []  # what was done, and what came of it
        self._begun = ""  # of a turn that goes on

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        observation, info = self.env.reset(seed=seed, options=options)
        self._task, self._turns, self._begun = messages_of(observation), [], ""
        return observation, info

    def step(self, action: str) -> Outcome:
        observation, reward, terminated, truncated, info = self.env.step(action)
        return self._remembered(action, messages_of(observation)), float(reward), terminated, truncated, info

    def _remembered(self, action: str, new: list[Message]) -> list[Message]:
        done = self._begun + action
        self._begun = f"{done}{new[0]['content']}" if goes_on(new) else ""
        if goes_on(new):
            return new
        if begins_anew(new):
            self._task, self._turns = new, []
            return new
        self._turns.append([{"role": "assistant", "content": done}, *new])
        if len(self._turns) < self._settings.every:
            return new
        self._turns = self._turns[len(self._turns) - self._settings.keep :]
        latest = [message for turn in self._turns for message in turn] or new
        return anew([*self._task, *latest], new)


class Summary(Part):
    """An environment whose policy remembers the task, its last summary, and what came since."""

    def __init__(self, env: Env, settings: SummarySettings) -> None:
        super().__init__(env, settings=settings)
        self._settings = settings
        self._task: list[Message] = []
        self._turns = 0
        self._waiting: list[Message] | None = None  # the observation that a summary is to come before

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        observation, info = self.env.reset(seed=seed, options=options)
        self._task, self._turns, self._waiting = messages_of(observation), 0, None
        return observation, info

    def step(self, action: str) -> Outcome:
        if self._waiting is not None:
            return self._summarized(action)
        observation, reward, terminated, truncated, info = self.env.step(action)
        new = messages_of(observation)
        if begins_anew(new):
            self._task, self._turns = new, 0
        elif not goes_on(new):
            self._turns += 1
        if self._turns >= self._settings.every and not (terminated or truncated or goes_on(new)):
            self._waiting = new
            observation = followed(observation, self._settings.ask)
        return observation, float(reward), terminated, truncated, info

    def _summarized(self, text: str) -> Outcome:
        assert self._waiting is not None
        said = f"So far: {text.strip()[: self._settings.max_chars]}"
        observation = anew([*self._task, *preceded(said, self._waiting)], self._waiting)
        self._turns, self._waiting = 0, None
        return answered(observation)
