"""A model behind an OpenAI-compatible server plays as the policy would, asked by the official client."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from deploy.config.config_errors import ConfigError
from deploy.run.evaluate import Conditions, evaluate_checkpoint
from deploy.run.served import served_model
from envs.builtin.arithmetic import Arithmetic
from rollout.agents.agent import AgentSettings
from rollout.buffer.segments import read_rows

Answer = Callable[[dict[str, Any]], dict[str, Any]]  # request -> the message that answers it


class Server:
    """Answers as a function says; models, and the requests that it was asked."""

    def __init__(self) -> None:
        self.answer: Answer = lambda request: {"content": "4"}
        self.models = ["one"]
        self.asked: list[dict[str, Any]] = []
        self.finish_reason = "stop"


@pytest.fixture
def server() -> Iterator[tuple[str, Server]]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *told: object) -> None: ...

        def _say(self, status: int, body: dict[str, Any]) -> None:
            said = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def do_GET(self) -> None:
            self._say(
                200, {"object": "list", "data": [{"id": name, "object": "model"} for name in state.models]}
            )

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.asked.append(request)
            message = {"role": "assistant", "content": None} | state.answer(request)
            if "error" in message:
                return self._say(400, {"error": {"message": message["error"]}})
            choice = {"index": 0, "message": message, "finish_reason": state.finish_reason}
            self._say(
                200,
                {"id": "1", "object": "chat.completion", "created": 0, "model": "one", "choices": [choice]},
            )

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}/v1", state
    http.shutdown()
    thread.join()
    http.server_close()


def last(request: dict[str, Any]) -> str:
    return str(request["messages"][-1]["content"])


def test_a_server_is_judged_by_the_environment_and_its_episodes_are_stored(
    server: tuple[str, Server], tmp_path: Path
) -> None:
    url, state = server
    options = {"level": 1}
    right = {}
    for seed in range(4):
        env = Arithmetic(**options)
        observation, _ = env.reset(seed=seed)
        right[str(observation)] = next(n for n in range(100) if _solves(seed, str(n)))
    state.answer = lambda request: {"content": str(right[last(request)] if request["seed"] % 2 else "none")}
    conditions = Conditions.model_validate(
        {
            "env_options": options,
            "samples": 5,
            "max_turns": 1,
            "sampling": {"temperature": 0.5, "max_tokens": 7},
        }
    )
    outcome = evaluate_checkpoint(url, "arithmetic", range(4), conditions, tmp_path / "out")
    odd = sum(request["seed"] % 2 for request in state.asked)
    assert 0 < odd < 20 and (outcome.successes, outcome.episodes, outcome.failed) == (odd, 20, 0)
    assert len({request["seed"] for request in state.asked}) == 20
    assert {(r["model"], r["temperature"], r["max_tokens"]) for r in state.asked} == {("one", 0.5, 7)}
    rows = read_rows(tmp_path / "out").to_pylist()
    assert len(rows) == 20 and {row["action"] for row in rows} <= {"none", *map(str, right.values())}
    assert len((tmp_path / "out" / "episodes.jsonl").read_text(encoding="utf-8").splitlines()) == 20


def _solves(seed: int, answer: str) -> bool:
    env = Arithmetic(level=1)
    env.reset(seed=seed)
    return bool(env.step(answer)[4].get("success"))


def test_tool_calls_of_a_server_are_answered_under_their_ids(
    server: tuple[str, Server], tmp_path: Path
) -> None:
    url, state = server
    function = {"name": "double", "arguments": '{"number": 21}'}
    call = {"id": "c1", "type": "function", "function": function}

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        return {"content": "42"} if request["messages"][-1]["role"] == "tool" else {"tool_calls": [call]}

    state.answer = answer
    tools = AgentSettings.model_validate(
        {"parts": [{"kind": "tools", "functions": ["tests.envs.example_tools:double"]}]}
    )
    conditions = Conditions(agent=tools, env_options={"level": 1}, max_turns=4)
    evaluate_checkpoint(url, "arithmetic", range(1), conditions, tmp_path / "out")
    first, second, *_ = state.asked
    assert [tool["function"]["name"] for tool in first["tools"]] == ["double"]
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "tool"]
    assert second["messages"][1]["tool_calls"] == [call]
    assert second["messages"][2]["tool_call_id"] == "c1" and "42" in second["messages"][2]["content"]
    assert '<tool_call>\n{"name": "double"' in read_rows(tmp_path / "out").to_pylist()[0]["action"]


def test_a_full_context_ends_an_episode_and_another_refusal_fails_it(
    server: tuple[str, Server], tmp_path: Path
) -> None:
    url, state = server
    state.answer = lambda request: (
        {"content": "left"}
        if len(request["messages"]) < 3
        else {
            "error": "This model's maximum context length is 9 tokens"
            if state.finish_reason == "stop"
            else "bad"
        }
    )
    conditions = Conditions(env_options={"size": 3}, max_turns=4)
    evaluate_checkpoint(url, "frozen_lake", range(1), conditions, tmp_path / "full")
    assert read_rows(tmp_path / "full").to_pylist()[-1]["end_reason"] == "context_overflow"
    state.finish_reason = "length"
    with pytest.raises(Exception, match=r"all 1 evaluation episodes failed.*one refused a request.*bad"):
        evaluate_checkpoint(url, "frozen_lake", range(1), conditions, tmp_path / "bad")


def test_the_model_is_the_only_one_or_named(server: tuple[str, Server]) -> None:
    url, state = server
    assert served_model(url, "") == "one"
    state.models = ["one", "two"]
    assert served_model(url, "two") == "two"
    with pytest.raises(ConfigError, match="has one, two; name one with --model"):
        served_model(url, "")
    with pytest.raises(ConfigError, match="has no model 'three'; it has one, two"):
        served_model(url, "three")
    with pytest.raises(ConfigError, match="does not answer"):
        served_model("http://127.0.0.1:1/v1", "")
