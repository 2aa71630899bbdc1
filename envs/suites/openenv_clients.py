"""OpenEnv's environments, behind their servers, by the package's own client. Needs the extra openenv.

Observation: the server's, as text: the only field of text there is, else JSON; the first one begins with the form of an
action, made from the schema that the server publishes. What the server says of reward, end and metadata is left out.
Action: if the server's actions have one field that is required and holds text, that text; else a JSON object of the
server's schema. `field` names another field.
Reward: the server's, step by step; none counts as 0. Horizon: `max_turns` actions.
Levels: none; `reset_options` are the server's own.
Ends: the server says that the episode is done (terminated), turns used up (truncated), an action that is not of the
schema (malformed; it is not sent).
"""

from __future__ import annotations

import json
import math
import re
import urllib.request
from typing import Any
from urllib.error import URLError

import numpy as np
from jsonschema import Draft202012Validator
from openenv.core.generic_client import GenericEnvClient

from envs.base import Info, TalkSpace, TextEnv, text_space

PREFIX = "openenv/"
IDS = (f"{PREFIX}server",)
MAX_ACTION = 1 << 16  # characters
SCHEMA_SECONDS = 10.0
UNREADABLE = "That is no action."
OF_EVERY_ACTION = ("metadata", "type")  # fields of the base class, not of an environment
AS_TEXT, AS_JSON = "Answer with the ", "Answer with a JSON object of this schema and nothing else: "


def openenv(
    env_id: str,
    url: str = "http://127.0.0.1:8000",
    max_turns: int = 50,
    field: str | None = None,
    instructions: bool = True,
    timeout_seconds: float = 60.0,
    reset_options: dict[str, Any] | None = None,
) -> OpenEnv:
    """A replica with a session of its own. env_id: "openenv/server". Others: see OpenEnv."""
    if env_id not in IDS:
        raise ValueError(f"use {IDS[0]}, and name the server with the option url")
    return OpenEnv(url, max_turns, field, instructions, timeout_seconds, reset_options)


class OpenEnv(TextEnv):
    """A session with a server as an environment.

    url: of the server. max_turns: actions before truncation. field: of an action, filled with the text. instructions:
    begin with the form of an action. timeout_seconds: for the server's answer, seconds. reset_options: passed to the
    server's reset beside the seed. ValueError for wrong values, and a server that does not publish its schema.
    """

    action_space = text_space(MAX_ACTION)
    observation_space = TalkSpace()
    reward_range = (-math.inf, math.inf)
    nondeterministic = True  # another process may do anything; its resets get the seed

    def __init__(
        self,
        url: str,
        max_turns: int = 50,
        field: str | None = None,
        instructions: bool = True,
        timeout_seconds: float = 60.0,
        reset_options: dict[str, Any] | None = None,
    ) -> None:
        if max_turns < 1:
            raise ValueError(f"max_turns={max_turns} leaves no turn to play; use 1 or more")
        self._url = url.rstrip("/")
        self._max_turns = max_turns
        self._reset_options = dict(reset_options or {})
        self._schema = _action_schema(self._url)
        self._validator = Draft202012Validator(self._schema)
        self._field = _text_field(self._schema, field)
        self._opening = _form(self._schema, self._field) if instructions else ""
        self._client = GenericEnvClient(self._url, message_timeout_s=timeout_seconds).sync()
        self._turns = 0
        self._running = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, Info]:
        super().reset(seed=seed)
        result = self._client.reset(**({"seed": seed} | self._reset_options))
        self._turns = 0
        self._running = True
        return self._opening + text_of(result.observation), {}

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        if not self._running:
            raise RuntimeError("step() was called without a running episode; call reset() first")
        asked = self._read(action)
        if asked is None:
            self._running = False
            return UNREADABLE, 0.0, True, False, {"malformed": True}
        self._turns += 1
        result = self._client.step(asked)
        done = bool(result.done)
        truncated = not done and self._turns >= self._max_turns
        self._running = not (done or truncated)
        return text_of(result.observation), float(result.reward or 0.0), done, truncated, {}

    def close(self) -> None:
        self._client.close()

    def _read(self, action: str) -> dict[str, Any] | None:
        """Parse an action; None for what the server's schema does not allow."""
        if len(action) > MAX_ACTION:
            return None
        try:
            asked = json.loads(action) if self._field is None else {self._field: action}
        except (ValueError, RecursionError):
            return None
        return asked if isinstance(asked, dict) and self._validator.is_valid(asked) else None


def text_of(observation: dict[str, Any]) -> str:
    """An observation as text: its only field of text, else JSON."""
    told = {key: value for key, value in observation.items() if key not in ("done", "reward", "metadata")}
    [*texts] = [value for value in told.values() if isinstance(value, str)]
    return texts[0] if len(told) == len(texts) == 1 else json.dumps(told, ensure_ascii=False)


def _action_schema(url: str) -> dict[str, Any]:
    """The JSON schema of a server's actions. ValueError, one line, for an address without one."""
    try:
        with urllib.request.urlopen(f"{url}/schema", timeout=SCHEMA_SECONDS) as answer:
            schema: dict[str, Any] = json.load(answer)["action"]
    except (URLError, OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"no OpenEnv server publishes its schema at {url}/schema: {type(error).__name__}: {error}; "
            "start the server, or name it with the option url"
        ) from error
    return schema


def _text_field(schema: dict[str, Any], field: str | None) -> str | None:
    """The field of an action that takes the text; None if actions are JSON objects. ValueError for one not there."""
    fields = schema.get("properties", {})
    if field is not None:
        if field not in fields:
            raise ValueError(
                f"field={field!r} is none of the server's actions; use one of: {', '.join(fields)}"
            )
        return field
    own = [name for name in fields if name not in OF_EVERY_ACTION]
    required = [name for name in schema.get("required", ()) if name in own]
    return required[0] if len(required) == 1 and fields[required[0]].get("type") == "string" else None


def _form(schema: dict[str, Any], field: str | None) -> str:
    """What an action looks like, in a line."""
    if field is not None:
        told = schema["properties"][field].get("description", "")
        return f"{AS_TEXT}{field} and nothing else.{f' {told}.' if told else ''}\n".replace("..", ".")
    own = {name: of for name, of in schema.get("properties", {}).items() if name not in OF_EVERY_ACTION}
    needed = [name for name in schema.get("required", ()) if name in own]
    wanted = {"properties": own, "required": needed} | (
        {"$defs": schema["$defs"]} if "$defs" in schema else {}
    )
    return f"{AS_JSON}{json.dumps(wanted)}\n"


# The random player -------------------------------------------------------------------------------------------------

_FEW = 10  # numbers that a bound leaves open, items


class Player:
    """The random baseline, of which error_rate changes nothing: required fields drawn from the server's schema.

    Where the action is text, a word or number of what it has read, the form of an action included. One per episode; it
    needs `instructions`, which show the form.
    """

    def __init__(self, error_rate: float, seed: int) -> None:
        del error_rate
        self._rng = np.random.default_rng(seed)
        self._words: list[str] = []
        self._schema: dict[str, Any] | None = None

    def act(self, observation: str) -> str:
        """The next action. ValueError where the first observation has no form."""
        form, _, said = observation.partition("\n") if not self._words else ("", "", observation)
        if not self._words and not form.startswith((AS_TEXT, AS_JSON)):
            raise ValueError("the random player needs the option instructions")
        if form.startswith(AS_JSON):
            self._schema = json.loads(form.removeprefix(AS_JSON))
        self._words += re.findall(r"\w+", f"{'' if self._schema else form} {said}") or ["nothing"]
        if self._schema is None:
            return str(self._rng.choice(self._words))
        return json.dumps(self._drawn(self._schema, self._schema.get("$defs", {})))

    def _drawn(self, schema: dict[str, Any], defined: dict[str, Any]) -> Any:
        """A value of a schema, one that is simple to draw."""
        if "$ref" in schema:
            return self._drawn(defined[schema["$ref"].rpartition("/")[2]], defined)
        if options := schema.get("anyOf") or schema.get("oneOf"):
            return self._drawn(options[self._rng.integers(len(options))], defined)
        if "const" in schema or "enum" in schema:
            values = schema.get("enum") or [schema["const"]]
            return values[self._rng.integers(len(values))]
        kind = schema.get("type", "object")
        if kind == "object":
            fields = schema.get("properties", {})
            return {name: self._drawn(fields.get(name, {}), defined) for name in schema.get("required", ())}
        if kind == "array":
            wanted = int(self._rng.integers(schema.get("minItems", 0), schema.get("maxItems", _FEW) + 1))
            return [self._drawn(schema.get("items", {"type": "string"}), defined) for _ in range(wanted)]
        if kind in ("integer", "number"):
            low = schema.get("minimum", schema.get("exclusiveMinimum", -1) + 1)
            high = schema.get("maximum", schema.get("exclusiveMaximum", low + _FEW) - 1)
            return int(self._rng.integers(math.ceil(low), math.floor(high) + 1))
        if kind in ("boolean", "null"):
            return bool(self._rng.integers(2)) if kind == "boolean" else None
        return str(self._rng.choice(self._words))
