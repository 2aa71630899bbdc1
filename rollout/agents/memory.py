"""Memory within an episode: a notebook, and for conversations longer than the context a window or a summary.

notebook  tools with which the policy keeps notes: `write`, `read` and `notes`
window    keeps the task (the first observation) and the last `keep` turns
summary   asks the policy for a summary, in a turn that is stored and trained like any other; the summary then replaces
          all earlier turns

Window and summary restart the conversation in a new segment after `every` turns: a stored segment is never edited, and
between two restarts the conversation grows by new messages, so that tokens are sampled and trained once. If the
environment restarts the conversation, its messages are the task from then on. Summaries by the policy, learnt with the
task: Zhou et al. 2025, MEM1, section 3.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from envs.base import Info, Message, Observation, messages_of
from envs.tools.tool import Tool
from envs.tools.tool_calls import Style
from envs.tools.tool_env import Toolbox, ToolEnv
from rollout.agents.part import (
    AgentPart,
    Env,
    Outcome,
    continues_turn,
    part_answer,
    reset_context,
    resets_context,
    with_text_after,
    with_text_before,
)


class NotebookSettings(BaseModel):
    """Notes that outlast restarts of the conversation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["notebook"] = "notebook"
    entries: int = Field(32, gt=0, description="most notes of an episode; writing one more is refused")
    max_chars: int = Field(
        200, gt=0, description="longest note and longest key, characters; longer ones are cut"
    )
    style: Style = Field(
        "hermes", description='syntax of tool calls, as in the part tools: "hermes" or "plain"'
    )
    max_calls: int = Field(
        64, gt=0, description="most calls of the notebook's tools per episode; further ones are refused"
    )

    def wrap(self, env: Env) -> Env:
        """Wrap an environment in this part."""
        toolbox = Toolbox(sources=[Notebook(self.entries, self.max_chars)], call_seconds=None)
        return ToolEnv(env, toolbox, style=self.style, max_calls=self.max_calls)


class WindowSettings(BaseModel):
    """The latest turns of a conversation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["window"] = "window"
    every: int = Field(
        8,
        gt=0,
        description="turns after which the conversation is shortened to the task and the last turns, in a new "
        "segment",
    )
    keep: int = Field(
        4, ge=0, description="most recent turns that the shortened conversation keeps; fewer than every"
    )

    @model_validator(mode="after")
    def _forgets_something(self) -> WindowSettings:
        if self.keep >= self.every:
            raise ValueError(f"keep={self.keep} of every={self.every} turns removes nothing; lower keep")
        return self

    def wrap(self, env: Env) -> Env:
        """Wrap an environment in this part."""
        return Window(env, settings=self)


class SummarySettings(BaseModel):
    """Summaries by the policy in place of earlier turns."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["summary"] = "summary"
    every: int = Field(
        8,
        gt=0,
        description="turns after which the policy is asked for a summary, which replaces the conversation so "
        "far",
    )
    ask: str = Field(
        "Write down what matters of all this.",
        description="text that asks for the summary, appended to the observation",
    )
    max_chars: int = Field(600, gt=0, description="longest summary, characters; a longer one is cut")

    def wrap(self, env: Env) -> Env:
        """Wrap an environment in this part."""
        return Summary(env, settings=self)


class Notebook:
    """Notes of one episode by key, as a source of tools (`envs.tools.tool_env.Source`)."""

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
        """Empty the notebook for a new episode."""
        self._notes.clear()

    def close(self) -> None:
        """Nothing is held."""


class Window(AgentPart):
    """An environment whose conversation keeps the task and the last turns."""

    def __init__(self, env: Env, settings: WindowSettings) -> None:
        super().__init__(env, settings=settings)
        self._settings = settings
        self._task: list[Message] = []
        self._turns: list[list[Message]] = []  # an action and the observation after it
        self._begun = ""  # text of an unfinished turn

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
        self._begun = f"{done}{new[0]['content']}" if continues_turn(new) else ""
        if continues_turn(new):
            return new
        if resets_context(new):
            self._task, self._turns = new, []
            return new
        self._turns.append([{"role": "assistant", "content": done}, *new])
        if len(self._turns) < self._settings.every:
            return new
        self._turns = self._turns[len(self._turns) - self._settings.keep :]
        latest = [message for turn in self._turns for message in turn] or new
        return reset_context([*self._task, *latest], new)


class Summary(AgentPart):
    """An environment whose conversation keeps the task, the last summary, and the turns after it."""

    def __init__(self, env: Env, settings: SummarySettings) -> None:
        super().__init__(env, settings=settings)
        self._settings = settings
        self._task: list[Message] = []
        self._turns = 0
        self._waiting: list[Message] | None = None  # the observation that follows the summary

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
        if resets_context(new):
            self._task, self._turns = new, 0
        elif not continues_turn(new):
            self._turns += 1
        if self._turns >= self._settings.every and not (terminated or truncated or continues_turn(new)):
            self._waiting = new
            observation = with_text_after(observation, self._settings.ask)
        return observation, float(reward), terminated, truncated, info

    def _summarized(self, text: str) -> Outcome:
        assert self._waiting is not None
        said = f"So far: {text.strip()[: self._settings.max_chars]}"
        observation = reset_context([*self._task, *with_text_before(said, self._waiting)], self._waiting)
        self._turns, self._waiting = 0, None
        return part_answer(observation)
