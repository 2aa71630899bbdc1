"""What a row of a dataset means: the messages that pose the task, and the answer that rewards compare with.

Columns are named in the recipe, or found: each list below is tried in its order. That reads the schemas of verl
(`prompt` as messages, `reward_model.ground_truth`), of TRL (`prompt` or `messages`, other columns for reward functions)
and of OpenRLHF (`input`, `label`) as their files are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from envs.base import Message
from envs.datasets.files import DataError, Row
from envs.images import text_part

PROMPTS = ("prompt", "messages", "conversations", "question", "problem", "input", "instruction", "query")
ANSWERS = (
    "reward_model.ground_truth",
    "ground_truth",
    "answer",
    "solution",
    "label",
    "target",
    "output",
    "response",
    "completion",
)
IMAGES = ("images", "image")
ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT = {"human": "user", "gpt": "assistant", "system": "system"}
_GAP = re.compile(r"{([A-Za-z_][\w.]*)}")
_PICTURE_MARK = "<image>"  # where verl's and LLaVA's prompts show a picture


@dataclass(frozen=True, slots=True)
class Schema:
    """Which columns hold what; a dot steps into a column that is an object. None: the rows have no such column."""

    prompt: str
    answer: str | None
    images: str | None
    system: str | None = None  # said first, unless the messages begin with a system message
    template: str | None = None  # the user's message with {column} in it, in place of the prompt column

    @classmethod
    def of(
        cls,
        row: Row,
        where: str,
        *,
        prompt: str | None = None,
        answer: str | None = None,
        images: str | None = None,
        system: str | None = None,
        template: str | None = None,
    ) -> Schema:
        """The schema of rows like this one. DataError for a column that is missing, and for rows without a prompt."""
        for column in filter(None, (prompt, answer, images, *_gaps(template))):
            if not has(row, column):
                raise DataError(f"{where}: there is no column {column!r}; its columns: {', '.join(row)}")
        found = prompt or first_of(row, PROMPTS)
        if found is None and template is None:
            raise DataError(
                f"{where}: no column of the usual names ({', '.join(PROMPTS)}) holds a prompt; name one with "
                f"prompt=, or write template=; its columns: {', '.join(row)}"
            )
        return cls(
            found or "", answer or first_of(row, ANSWERS), images or first_of(row, IMAGES), system, template
        )

    def messages(self, row: Row, where: str) -> list[Message]:
        """The messages that a row begins an episode with. DataError for a prompt that is none."""
        if self.template is not None:
            said: Any = fill(self.template, row)
        else:
            said = value(row, self.prompt)
        messages = as_messages(said, f"{where}: column {self.prompt!r}")
        if messages[-1]["role"] == "assistant":  # a whole conversation: the policy gives its last answer
            messages = messages[:-1]
        if not messages or messages[-1]["role"] == "assistant":
            raise DataError(
                f"{where}: column {self.prompt!r}: a prompt ends with the user's or a tool's message"
            )
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        pictures = value(row, self.images) if self.images else None
        return _with_pictures(messages, pictures, where) if pictures else messages

    def truth(self, row: Row) -> Any:
        """The answer that is right; None where the rows have none. Of a conversation it is the last message."""
        if self.answer is not None:
            return value(row, self.answer)
        said = None if self.template is not None else value(row, self.prompt)
        last = said[-1] if isinstance(said, list) and said else None
        if isinstance(last, dict) and last.get("role", _SHAREGPT.get(last.get("from", ""))) == "assistant":
            return last.get("content", last.get("value"))
        return None


def has(row: Row, column: str) -> bool:
    """Whether a row has a column, dots stepping inwards."""
    held: Any = row
    for name in (column,) if column in row else column.split("."):
        if not isinstance(held, dict) or name not in held:
            return False
        held = held[name]
    return True


def value(row: Row, column: str) -> Any:
    """What a row holds in a column, dots stepping inwards; None where it has none."""
    if column in row:
        return row[column]
    held: Any = row
    for name in column.split("."):
        held = held.get(name) if isinstance(held, dict) else None
    return held


def first_of(row: Row, columns: Sequence[str]) -> str | None:
    return next((column for column in columns if value(row, column) is not None), None)


def fill(template: str, row: Row) -> str:
    """The template with what the row holds in place of each {column}."""
    return _GAP.sub(lambda gap: str(value(row, gap[1])), template)


def _gaps(template: str | None) -> list[str]:
    """The columns that a template names."""
    return _GAP.findall(template or "")


def as_messages(said: Any, where: str) -> list[Message]:
    """Messages of a column: text is the user's. DataError for anything else."""
    if isinstance(said, str) and said.strip():
        return [{"role": "user", "content": said}]
    if not isinstance(said, list) or not said:
        raise DataError(f"{where}: a prompt is text or a list of messages, found {said!r:.60}")
    return [_message(each, where) for each in said]


def _message(said: Any, where: str) -> Message:
    role = said.get("role", _SHAREGPT.get(said.get("from", ""))) if isinstance(said, dict) else None
    content = said.get("content", said.get("value")) if isinstance(said, dict) else None
    if role not in ROLES or not isinstance(content, str | list):
        raise DataError(
            f"{where}: a message has a role ({', '.join(ROLES)}) and a content (text or parts), found {said!r:.80}"
        )
    name = {"name": said["name"]} if role == "tool" and isinstance(said.get("name"), str) else {}
    return {"role": role, "content": content, **name}


def _with_pictures(messages: list[Message], pictures: Any, where: str) -> list[Message]:
    """Messages whose marks <image> are pictures; those without a mark are shown before the last message's text."""
    left = [_picture(each, where) for each in (pictures if isinstance(pictures, list) else [pictures])]
    shown = []
    for message in messages:
        content = message["content"]
        if isinstance(content, str) and _PICTURE_MARK in content:
            pieces = content.split(_PICTURE_MARK)
            if len(pieces) - 1 > len(left):
                raise DataError(f"{where}: {len(pieces) - 1} marks {_PICTURE_MARK} and {len(left)} pictures")
            parts = [text_part(pieces[0])] if pieces[0] else []
            for piece in pieces[1:]:
                parts += [left.pop(0), *([text_part(piece)] if piece else [])]
            message = message | {"content": parts}
        shown.append(message)
    if left:
        content = shown[-1]["content"]
        parts = content if isinstance(content, list) else [text_part(content)]
        shown[-1] = shown[-1] | {"content": [*left, *parts]}
    return shown


def _picture(held: Any, where: str) -> dict[str, Any]:
    """A picture as a part: {"bytes": base64, ...} as the datasets library stores it, base64 alone, or a data URL."""
    encoded = held.get("bytes") if isinstance(held, dict) else held
    if not isinstance(encoded, str):
        raise DataError(f"{where}: a picture is stored in its row (bytes), found {held!r:.60}")
    return {
        "type": "image",
        "image": encoded if encoded.startswith("data:") else f"data:image/png;base64,{encoded}",
    }
