"""Judgements of annotators: RUN/labels/labels.sqlite, one transaction each.

A judgement has an id that its sender made: sent again, because the answer was lost, it is not stored again. It is
durable before it is answered. The judged episodes are stored with it, so that labels outlive the segments of the run.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StringConstraints

from deploy.config.config_errors import ConfigError
from deploy.labels.agreement import krippendorff_alpha
from deploy.labels.asking import Pair
from deploy.labels.messages import Shown, shown_turns
from rollout.wire.trajectory import Trajectory

FOLDER, FILE, KEY = "labels", "labels.sqlite", "key"
_BUSY_SECONDS = 10.0  # wait for another process that writes
_TABLES = """
CREATE TABLE IF NOT EXISTS judgements (
    id TEXT PRIMARY KEY, annotator TEXT NOT NULL, group_id INTEGER NOT NULL, attempt INTEGER NOT NULL,
    "left" INTEGER NOT NULL, "right" INTEGER NOT NULL, verdict TEXT NOT NULL, thumbs TEXT NOT NULL,
    corrections TEXT NOT NULL, comment TEXT NOT NULL, seconds REAL NOT NULL, received REAL NOT NULL);
CREATE UNIQUE INDEX IF NOT EXISTS once_an_annotator
    ON judgements (annotator, group_id, attempt, min("left", "right"), max("left", "right"));
CREATE TABLE IF NOT EXISTS episodes (
    group_id INTEGER NOT NULL, attempt INTEGER NOT NULL, episode INTEGER NOT NULL, env_id TEXT NOT NULL,
    env_options TEXT NOT NULL, seed INTEGER NOT NULL, turns TEXT NOT NULL, PRIMARY KEY (group_id, attempt, episode));
"""
_COLUMNS = 'id, annotator, group_id, attempt, "left", "right", verdict, thumbs, corrections, comment, seconds'

Text = Annotated[str, StringConstraints(max_length=100_000)]
Place = Annotated[int, Field(ge=0, lt=2**31)]


class Thumb(BaseModel, extra="forbid", frozen=True):
    """Whether a turn is good."""

    episode: Place
    turn: Place
    up: bool


class Correction(BaseModel, extra="forbid", frozen=True):
    """What a turn should have answered."""

    episode: Place
    turn: Place
    text: Annotated[Text, StringConstraints(min_length=1)]


class Judgement(BaseModel, extra="forbid", frozen=True):
    """What an annotator says of a pair. left, right: places of its episodes in the group, as they were shown."""

    id: Annotated[str, StringConstraints(pattern=r"^[0-9a-f-]{16,64}$")]
    annotator: Annotated[
        str, StringConstraints(strip_whitespace=True, min_length=1, max_length=40, pattern=r"^[^\x00-\x1f]*$")
    ]
    group_id: Annotated[int, Field(ge=0, lt=2**63)]
    attempt: Place
    left: Place
    right: Place
    verdict: Literal["left", "right", "tie", "both_bad", "skip"]
    thumbs: tuple[Thumb, ...] = ()
    corrections: tuple[Correction, ...] = ()
    comment: Text = ""
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0

    @property
    def pair(self) -> Pair:
        return Pair(self.group_id, self.attempt, *sorted((self.left, self.right)))

    @property
    def answer(self) -> str:
        """The better episode by its place in the pair, "first" or "second"; the verdict where neither is better."""
        if self.verdict not in ("left", "right"):
            return self.verdict
        return "first" if (self.verdict == "left") == (self.left == self.pair.first) else "second"


class Judged(ValueError):
    """Another judgement with this id, or of this pair by this annotator, is stored already."""


class Labels:
    """The judgements of a run."""

    def __init__(self, run: Path) -> None:
        """Open or create them. ConfigError if the file cannot be written, or is damaged."""
        self._folder = run / FOLDER
        path = self._folder / FILE
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            # One thread at a time calls, the server's loop, which need not be the one that opened the file.
            self._db = sqlite3.connect(
                path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            # The write-ahead log lets others read; FULL syncs it before a transaction counts as committed.
            self._db.executescript(f"PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; {_TABLES}")
        except (sqlite3.DatabaseError, OSError) as error:
            raise ConfigError(
                f"{path}: cannot be used ({error}); give this user write access, or restore it from a copy"
            ) from error

    def key(self) -> str:
        """The key of the page, made once, so that a page stays valid when its server starts again."""
        path = self._folder / KEY
        if not path.is_file():
            aside = path.with_name(f".{KEY}.{secrets.token_hex(4)}")
            aside.touch(mode=0o600, exist_ok=False)
            aside.write_text(secrets.token_urlsafe(24), encoding="utf-8")
            with suppress(FileExistsError):  # another process was first
                path.hardlink_to(aside)
            aside.unlink()
        return path.read_text(encoding="utf-8")

    def add(self, judgement: Judgement, episodes: Sequence[Trajectory]) -> None:
        """Store a judgement of these episodes, durably and once. Judged if it contradicts one that is stored."""
        said = judgement.model_dump(mode="json")
        row = [json.dumps(each) if isinstance(each, list) else each for each in said.values()]
        self._db.execute("BEGIN IMMEDIATE")
        with self._db:
            if self.has(judgement):
                return
            try:
                holes = ", ".join("?" * (len(row) + 1))
                self._db.execute(f"INSERT INTO judgements VALUES ({holes})", (*row, time.time()))
            except sqlite3.IntegrityError:
                raise Judged(f"{judgement.annotator} has judged this pair already") from None
            self._db.executemany(
                "INSERT OR IGNORE INTO episodes VALUES (?, ?, ?, ?, ?, ?, ?)", map(_episode_row, episodes)
            )

    def has(self, judgement: Judgement) -> bool:
        """Whether it is stored. Judged if another one is, under its id."""
        for stored in self._where("id = ?", judgement.id):
            if stored != judgement:
                raise Judged(f"judgement {judgement.id} is stored already, and says something else")
            return True
        return False

    def __iter__(self) -> Iterator[Judgement]:
        """All judgements, in the order of their arrival."""
        yield from self._where("TRUE")

    def _where(self, condition: str, *values: str) -> list[Judgement]:
        rows = self._db.execute(
            f"SELECT {_COLUMNS} FROM judgements WHERE {condition} ORDER BY rowid", values
        ).fetchall()
        return [_judgement(dict(zip(Judgement.model_fields, row, strict=True))) for row in rows]

    def turns(self) -> Mapping[tuple[int, int, int], list[Shown]]:
        """The turns of every judged episode, by group, attempt and place in the group."""
        rows = self._db.execute("SELECT group_id, attempt, episode, turns FROM episodes")
        return {(group, attempt, place): json.loads(turns) for group, attempt, place, turns in rows}

    def close(self) -> None:
        self._db.close()


def by_pair(judgements: Iterable[Judgement]) -> dict[Pair, list[Judgement]]:
    """The judgements of each pair, those that skipped it included."""
    found: dict[Pair, list[Judgement]] = {}
    for judgement in judgements:
        found.setdefault(judgement.pair, []).append(judgement)
    return found


def agreement(judgements: Iterable[Judgement]) -> float | None:
    """Krippendorff's alpha of the verdicts on pairs that several annotators judged: one, the other, tie, both bad."""
    decided = by_pair([each for each in judgements if each.verdict != "skip"])
    return krippendorff_alpha([[each.answer for each in given] for given in decided.values()])


def _judgement(row: dict[str, Any]) -> Judgement:
    lists = {name: json.loads(row[name]) for name in ("thumbs", "corrections")}
    return Judgement.model_validate(row | lists)


def _episode_row(episode: Trajectory) -> tuple[Any, ...]:
    task = episode.task
    turns = json.dumps(shown_turns(episode), ensure_ascii=False)
    return (episode.group_id, episode.attempt, episode.index, task.env_id, task.options, task.seed, turns)
