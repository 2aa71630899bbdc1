"""Memory across episodes: a store of lessons, written by the policy and retrieved by similarity.

    reset           the most similar lessons precede the first observation
    the last step   its reward is paid, the end is deferred, and the policy is asked "What is worth remembering?"
    policy          a lesson                           a turn that this part answers
                    the deferred end

The store is an SQLite file with a full-text index; similarity is its BM25 (Robertson and Zaragoza 2009) over the words
of the first observation of a lesson's episode. All agents with the same file share it. It keeps the latest `capacity`
lessons, and makes an environment nondeterministic: an episode that lost its worker starts again. Evaluations read
lessons and write none (learns=False), so that they do not learn from their own tasks.
"""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from envs.base import Info, Observation, messages_of
from rollout.agents.part import VERDICT, AgentPart, Env, Outcome, defer_end, with_text_after, with_text_before

LOCK_TIMEOUT_SECONDS = 30.0  # of the store, which other processes write too
WORDS = 64  # of an observation in a query


class LibrarySettings(BaseModel):
    """Lessons of earlier episodes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["library"] = "library"
    path: Path = Field(
        description="SQLite file that holds the lessons, shared by all replicas; created if absent"
    )
    found: int = Field(3, gt=0, description="most lessons shown before the first observation of an episode")
    capacity: int = Field(10_000, gt=0, description="most lessons stored; beyond it the oldest are deleted")
    ask: str = Field(
        "What is worth remembering?",
        description="text that asks for a lesson, appended to the last observation of an episode",
    )
    max_chars: int = Field(300, gt=0, description="longest lesson, characters; a longer one is cut")
    learns: bool = Field(
        True,
        description="ask for a lesson after every episode. False reads stored lessons only, as evaluations "
        "always do",
    )

    def wrap(self, env: Env) -> Env:
        """Wrap an environment in this part."""
        return Library(env, settings=self)


class Library(AgentPart):
    """An environment with lessons of earlier episodes."""

    nondeterministic = True  # the lessons found depend on earlier writes

    def __init__(self, env: Env, settings: LibrarySettings) -> None:
        super().__init__(env, settings=settings)
        self._settings = settings
        self._store = Store(settings.path, settings.capacity)
        self._about = ""
        self._held: Outcome | None = None  # the deferred end, while a lesson is asked for

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        observation, info = self.env.reset(seed=seed, options=options)
        self._about, self._held = _said(observation), None
        lessons = self._store.similar(self._about, self._settings.found)
        if lessons:
            observation = with_text_before(
                "\n".join(f"Remember: {lesson}" for lesson in lessons), observation
            )
        return observation, info

    def step(self, action: str) -> Outcome:
        if self._held is not None:
            self._store.add(self._about, action.strip()[: self._settings.max_chars])
            held, self._held = self._held, None
            return held
        observation, reward, terminated, truncated, info = self.env.step(action)
        if not (self._settings.learns and (terminated or truncated)):
            return observation, float(reward), terminated, truncated, info
        verdict = {key: info[key] for key in VERDICT if key in info}
        self._held = observation, 0.0, terminated, truncated, verdict | {"ended": None}
        asked = with_text_after(observation, self._settings.ask)
        return asked, float(reward), False, False, defer_end(terminated, truncated, info)


class Store:
    """Lessons and their subjects in one SQLite file; every call opens it, so that all processes may use it."""

    def __init__(self, path: Path, capacity: int) -> None:
        self._path = path
        self._capacity = capacity
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(self._open()) as db, db:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("CREATE VIRTUAL TABLE IF NOT EXISTS lessons USING fts5(about, lesson UNINDEXED)")

    def add(self, about: str, lesson: str) -> None:
        """Keep a lesson; beyond the capacity the oldest goes. An empty one is none."""
        if not lesson:
            return
        with closing(self._open()) as db, db:
            db.execute("INSERT INTO lessons (about, lesson) VALUES (?, ?)", (about, lesson))
            db.execute(
                "DELETE FROM lessons WHERE rowid <= (SELECT max(rowid) FROM lessons) - ?", (self._capacity,)
            )

    def similar(self, about: str, most: int) -> list[str]:
        """Lessons whose subject shares words with `about`, the most similar first."""
        words = list(dict.fromkeys(re.findall(r"\w+", about)))[:WORDS]
        if not words:
            return []
        wanted = " OR ".join(f'"{word}"' for word in words)
        with closing(self._open()) as db:
            rows = db.execute(
                "SELECT lesson FROM lessons WHERE lessons MATCH ? ORDER BY bm25(lessons), rowid DESC LIMIT ?",
                (wanted, most),
            ).fetchall()
        return [lesson for (lesson,) in rows]

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=LOCK_TIMEOUT_SECONDS)


def _said(observation: Observation) -> str:
    """All text of an observation."""
    contents = [message["content"] for message in messages_of(observation)]
    parts = [[{"text": each}] if isinstance(each, str) else each for each in contents]
    return " ".join(part["text"] for each in parts for part in each if "text" in part)
