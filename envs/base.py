"""The contract between environments and agents: a `gymnasium.Env` that talks.

An observation is text, or chat messages; an action is the text the agent wrote. `terminated` says that the environment
reached a final state, `truncated` that a limit cut the episode: they are never the same thing. An environment draws
from its own generator (`self.np_random`) only, so replicas are independent and a seed fixes the instance.

Keys of `info` that mean something to Manta:

    success    bool, on the last step: the environment's own verdict, where it has one
    malformed  bool: the action could not be read (whether that ends the episode is the environment's choice)
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
from gymnasium import spaces

Message = dict[str, str]  # role, content
Observation = str | list[Message]
Info = dict[str, Any]

PRINTABLE = "".join(map(chr, range(32, 127))) + "\n\t"


def text_space(max_length: int = 4096) -> spaces.Text:
    """Printable ASCII text of at most `max_length` characters, the empty text included."""
    return spaces.Text(min_length=0, max_length=max_length, charset=PRINTABLE)


class TextEnv(gym.Env[str, str]):
    """Base of environments that are text from the start: text in, text out."""

    metadata = {"render_modes": []}  # noqa: RUF012 - Gymnasium's own convention

    observation_space = text_space()
    action_space = text_space(256)
