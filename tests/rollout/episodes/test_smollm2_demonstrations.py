"""Demonstrations of a tool user in the real SmolLM2's own chat template, token for token."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from itertools import chain

from transformers import AutoTokenizer

from deploy.config.load import load_config
from envs import registry
from envs.base import Message
from rollout.chat.chat import Chat
from rollout.episodes.demonstrations import demonstrate
from rollout.wire.trajectory import EndReason, Task, Trajectory
from tests.smollm2 import FOLDER, needs_smollm2

TOOLS = """You may call these tools, one call a line:
weather(place, date): Temperature (celsius), wind and rain in a place on a date such as may 12.
calculate(expression): The value of an expression such as 3 * (4 + 5).
convert(amount, unit, to): An amount in another unit, such as metres in feet or celsius in fahrenheit.
search(words): What is known of some words: mayors, birthplaces, trades, heights of towers."""


def conversation(episode: Trajectory) -> list[Message]:
    """What was said, as messages: the tools in the system message, then observations and actions in turn."""
    said: list[Message] = [{"role": "system", "content": TOOLS}]
    for turn in episode.turns:
        for message in json.loads(turn.observation):
            said.append({"role": message["role"], "content": message["content"]})
        said.append({"role": "assistant", "content": turn.action})
    return said


@needs_smollm2
def test_a_tool_users_turns_are_the_tokens_of_the_models_own_template() -> None:
    config = load_config("smollm2_assistant")
    (environment,) = config.environments
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    tasks = [Task.of(environment.id, seed, environment.options) for seed in range(24)]
    chat, context = Chat(tokenizer), config.rollout.context_tokens
    played = asyncio.run(
        demonstrate(tasks, partial(registry.player(environment.id), 0.0), chat, context, environment.agent)
    )
    for group in played:
        (episode,) = group.trajectories
        assert (episode.reward, episode.end_reason, len(episode.turns)) == (1.0, EndReason.TERMINATED, 3)
        said = conversation(episode)
        assert [message["role"] for message in said[2:]] == ["assistant", "tool"] * 2 + ["assistant"]
        ids = [*chain(*((*turn.prompt_ids, *turn.action_ids) for turn in episode.turns))]
        whole = tokenizer.apply_chat_template(said, tokenize=True, return_dict=False)
        assert ids == whole[:-1] and tokenizer.decode(whole[-1:]) == "\n"
        for turn, answer in zip(episode.turns, said[2::2], strict=True):
            assert tokenizer.decode(turn.action_ids) == f"{answer['content']}<|im_end|>"
            assert len(turn.action_ids) <= config.sampling.max_tokens
        assert len(episode.turns[0].prompt_ids) < 180 and len(ids) < 260
