"""An assistant that answers with tools, written with the `openai` client; it knows nothing of who trains its model."""

from __future__ import annotations

from functools import cache
from typing import Any

from openai import AsyncOpenAI

from envs.builtin.assistant import assistant


@cache
def _client(base_url: str) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=base_url, api_key="each episode has its own")


async def play(base_url: str, api_key: str, task: dict[str, Any]) -> dict[str, Any]:
    """One question; task: seed, level, max_calls and split. What it came to, as docs/foreign_agents.md wants it."""
    client = _client(base_url).with_options(api_key=api_key)
    options = {name: task[name] for name in ("level", "max_calls", "split")}
    desk = assistant(**options, style="plain", instructions=False)
    (question,), _ = desk.reset(seed=task["seed"])
    tools, messages = question.pop("tools"), [question]
    while True:
        completion = await client.chat.completions.create(model="policy", messages=messages, tools=tools)
        messages.append(completion.choices[0].message)
        said, reward, terminated, truncated, info = desk.step(messages[-1].content)
        if terminated or truncated:
            end = "truncated" if truncated else "malformed" if info.get("malformed") else "terminated"
            return {"reward": reward, "success": info["success"], "end": end}
        messages += said
