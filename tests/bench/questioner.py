"""Twenty questions, played by an agent that knows the game and the `openai` client, and nothing of who trains it."""

from __future__ import annotations

from functools import cache
from typing import Any

from openai import AsyncOpenAI

from envs.twenty_questions import TwentyQuestions


@cache
def _client(base_url: str) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=base_url, api_key="each episode has its own")


async def play(base_url: str, api_key: str, task: dict[str, Any]) -> dict[str, Any]:
    """One game; task: seed, level and split. What it came to, as docs/foreign_agents.md wants it."""
    client = _client(base_url).with_options(api_key=api_key)
    game = TwentyQuestions(level=task["level"], split=task["split"], instructions=False)
    said, _ = game.reset(seed=task["seed"])
    messages: list[Any] = []
    while True:
        messages.append({"role": "user", "content": said})
        completion = await client.chat.completions.create(model="policy", messages=messages)
        messages.append(completion.choices[0].message)
        said, reward, terminated, truncated, info = game.step(messages[-1].content)
        if terminated or truncated:
            end = "truncated" if truncated else "malformed" if info.get("malformed") else "terminated"
            return {"reward": reward, "success": info["success"], "end": end}
