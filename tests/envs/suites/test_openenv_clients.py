"""OpenEnv's client, against servers of the package that run here. Needs the extra openenv."""

from __future__ import annotations

import json
import math
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import pytest

pytest.importorskip("openenv")

import jsonschema
import uvicorn
from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app
from pydantic import Field

from envs import registry
from envs.checks.check import check
from envs.registry import EnvironmentUnknown
from envs.suites.openenv_clients import AS_JSON, Player, text_of


class Guess(Action):
    message: str = Field(description="a number from 1 to 9")


class Hint(Observation):
    text: str = ""


class Guessing(Environment[Guess, Hint, State]):
    """A number to guess within the seed's own range."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        super().__init__()
        self._secret = 0
        self._state = State()

    def reset(self, seed: int | None = None, episode_id: str | None = None, **_: Any) -> Hint:
        self._secret = Random(seed).randint(1, 9)
        self._state = State(episode_id=episode_id)
        return Hint(text="guess my number")

    def step(self, action: Guess, timeout_s: float | None = None, **_: Any) -> Hint:
        self._state.step_count += 1
        if not (action.message.isdigit() and len(action.message) == 1):
            return Hint(text="a number", reward=-0.5)
        number = int(action.message)
        if number == self._secret:
            return Hint(text="right", reward=1.0, done=True)
        return Hint(text="higher" if number < self._secret else "lower", reward=0.0)

    @property
    def state(self) -> State:
        return self._state


class Move(Action):
    row: int = Field(ge=0, le=2)
    column: int = Field(ge=0, le=2)


class Board(Observation):
    cells: list[int] = Field(default_factory=list)
    to_move: str = "x"


class Cells(Environment[Move, Board, State]):
    """A board whose cells are filled; it ends when one is filled twice."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        super().__init__()
        self._cells = [0] * 9

    def reset(self, seed: int | None = None, episode_id: str | None = None, **_: Any) -> Board:
        self._cells = [0] * 9
        return Board(cells=self._cells)

    def step(self, action: Move, timeout_s: float | None = None, **_: Any) -> Board:
        at = 3 * action.row + action.column
        self._cells[at] += 1
        return Board(cells=self._cells, reward=0.25, done=self._cells[at] == 2)

    @property
    def state(self) -> State:
        return State()


@contextmanager
def serving(made: Any, action: Any, observation: Any) -> Iterator[str]:
    app = create_fastapi_app(made, action, observation, max_concurrent_envs=16)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive() and time.monotonic() < deadline, "the server did not start within 30 s"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="module")
def guessing() -> Iterator[str]:
    with serving(Guessing, Guess, Hint) as url:
        yield url


def test_a_scripted_player_is_paid_what_the_server_pays(guessing: str) -> None:
    env = registry.make("openenv/server", url=guessing)
    for seed in range(5):
        secret = Random(seed).randint(1, 9)
        opening = "Answer with the message and nothing else. a number from 1 to 9.\nguess my number"
        assert env.reset(seed=seed)[0] == opening
        assert env.step("x") == ("a number", -0.5, False, False, {})
        low, high, done, paid = 1, 9, False, 0.0
        while not done:
            number = (low + high) // 2
            hint, paid, done, truncated, _ = env.step(str(number))
            assert not truncated
            low, high = (number + 1, high) if hint == "higher" else (low, number - 1)
        assert (number, hint, paid) == (secret, "right", 1.0)
    env.close()


def test_episodes_of_two_replicas_do_not_mix(guessing: str) -> None:
    one, other = (registry.make("openenv/server", url=guessing, instructions=False) for _ in range(2))
    seeds = next(
        (a, b) for a in range(9) for b in range(9) if Random(a).randint(1, 9) > Random(b).randint(1, 9) + 1
    )
    one.reset(seed=seeds[0])
    other.reset(seed=seeds[1])
    between = str(Random(seeds[1]).randint(1, 9) + 1)
    assert (one.step(between)[0], other.step(between)[0]) == ("higher", "lower")
    one.close()
    other.close()


def test_turns_used_up_truncate(guessing: str) -> None:
    env = registry.make("openenv/server", url=guessing, max_turns=2)
    env.reset(seed=0)
    assert [env.step("0")[2:4] for _ in range(2)] == [(False, False), (False, True)]
    env.close()


def test_actions_of_several_fields_are_json_of_the_servers_schema() -> None:
    with serving(Cells, Move, Board) as url:
        env = registry.make("openenv/server", url=url)
        told = env.reset(seed=0)[0]
        assert (
            told.startswith("Answer with a JSON object of this schema")
            and '"required": ["row", "column"]' in told
        )
        assert told.endswith('{"cells": [0, 0, 0, 0, 0, 0, 0, 0, 0], "to_move": "x"}')
        assert env.step('{"row": 1, "column": 2}')[1:4] == (0.25, False, False)
        assert env.step(' {"column": 2, "row": 1}\n')[1:4] == (0.25, True, False)
        for wrong in ('{"row": 3, "column": 0}', '{"row": 1}', "1 2", "[1, 2]", ""):
            env.reset(seed=0)
            assert env.step(wrong)[1:] == (0.0, True, False, {"malformed": True}), wrong
        env.close()


def test_the_random_player_draws_every_action_of_a_schema_and_none_outside() -> None:
    schema = {
        "$defs": {"Side": {"enum": ["left", "right"], "type": "string"}},
        "properties": {
            "row": {"type": "integer", "minimum": 0, "maximum": 2},
            "side": {"$ref": "#/$defs/Side"},
            "speed": {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "null"}]},
            "loud": {"type": "boolean"},
            "steps": {"type": "array", "items": {"const": 1}, "minItems": 1, "maxItems": 2},
            "note": {"type": "string"},
        },
        "required": ["row", "side", "speed", "loud", "steps"],
    }
    player, observation = Player(0.0, 0), f"{AS_JSON}{json.dumps(schema)}\nbegin"
    drawn = [json.loads(player.act(observation if turn == 0 else "go on")) for turn in range(400)]
    for action in drawn:
        jsonschema.validate(action, schema)
    simple = {(each["row"], each["side"], each["loud"], len(each["steps"])) for each in drawn}
    assert len(simple) == 3 * 2 * 2 * 2 and None in [each["speed"] for each in drawn]
    with pytest.raises(ValueError, match="needs the option instructions"):
        Player(0.0, 0).act("begin")


def test_the_random_player_is_paid_as_chance_pays() -> None:
    # Nine cells are filled at random until one is filled twice, and each is paid 1/4. The expected number of fills
    # is the sum over k of the probability that k of them differ.
    lengths = [math.prod((9 - each) / 9 for each in range(k)) for k in range(10)]
    paid = []
    with serving(Cells, Move, Board) as url:
        env = registry.make("openenv/server", url=url)
        for seed in range(300):
            player, done, observation = (
                registry.player("openenv/server")(0.0, seed),
                False,
                env.reset(seed=seed)[0],
            )
            paid.append(0.0)
            while not done:
                observation, reward, done, _, info = env.step(player.act(observation))
                assert "malformed" not in info
                paid[-1] += reward
        env.close()
    error = statistics.stdev(paid) / len(paid) ** 0.5
    assert abs(statistics.mean(paid) - sum(lengths) / 4) < 4 * error


def test_text_is_said_alone_and_everything_else_as_json() -> None:
    assert text_of({"echo": "hi", "done": False, "reward": None, "metadata": {}}) == "hi"
    assert text_of({"echo": "hi", "length": 2}) == '{"echo": "hi", "length": 2}'
    assert text_of({"length": 2}) == '{"length": 2}'


def test_it_keeps_what_environments_promise(guessing: str) -> None:
    assert check("openenv/server", {"url": guessing}, turns=5, seconds=30) == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"url": "http://127.0.0.1:9"},
            "no OpenEnv server publishes its schema at http://127.0.0.1:9/schema",
        ),
        ({"max_turns": 0}, "leaves no turn to play"),
    ],
)
def test_what_is_wrong_is_refused_in_one_line(options: dict[str, Any], says: str) -> None:
    with pytest.raises(EnvironmentUnknown, match=says) as refused:
        registry.make("openenv/server", **options)
    assert "\n" not in str(refused.value)


def test_a_field_that_is_not_there_is_refused(guessing: str) -> None:
    with pytest.raises(
        EnvironmentUnknown, match=r"field='text' is none of the server's actions; use one of: .*message"
    ):
        registry.make("openenv/server", url=guessing, field="text")
