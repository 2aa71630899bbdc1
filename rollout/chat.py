"""Messages to tokens by delta: what was sampled is never decoded and encoded again.

A conversation's tokens are the opening prompt, then for every turn what was sampled and the glue up to the next
turn. The glue is found in text, once per set of new messages: the chat template renders a stand-in conversation whose
assistant turn has a known content, and what follows that content is the glue. History therefore stays as it was
sampled, thoughts included, also under templates that would drop them from earlier turns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError as JinjaError

from envs.base import DIRECTIONS, Message
from rollout.wire.images import images_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rollout.perception import Perception

Ids = tuple[int, ...]

# Stand-ins that no template treats specially and no template text contains.
_ASKED: Message = {"role": "user", "content": "zq8 asked zq8"}
_SAID: Message = {"role": "assistant", "content": "zq8 said zq8"}
_THOUGHT: Message = {"role": "assistant", "content": "zq8 thought zq8"}
_NEXT: Message = {"role": "user", "content": "zq8 next zq8"}
_CACHED_PROMPTS = 8192


class ChatError(ValueError):
    """Messages that cannot be rendered, or a chat template that cannot be extended turn by turn."""


class Chat:
    """One tokenizer's chat template, applied by delta.

    `end_of_turn` is the token the template puts after an assistant's content, or None where that is plain text. `stops`
    are the tokens at which an engine has to end a turn: that one, and the tokenizer's own end where it is another.
    Raises ChatError for a template that rewrites earlier turns when new ones come, or renders a turn by its place.

    perception: of a model that sees; without one messages are text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, perception: Perception | None = None) -> None:
        # It takes seconds, and who makes a Chat has imported it to have a tokenizer; settings alone need none of it.
        from transformers import PreTrainedTokenizerFast

        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ChatError(
                f"tokenizer {tokenizer.name_or_path} has no tokenizer.json; save it with a fast backend"
            )
        if not tokenizer.chat_template:
            raise ChatError(f"tokenizer {tokenizer.name_or_path} has no chat template; set one and save it")
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        pictured = None if perception is None else perception.placeholder_id
        self._control = _any_of(
            [
                token.content
                for place, token in tokenizer.added_tokens_decoder.items()
                if token.special and place != pictured
            ]
        )
        self._closing = self._after(self._render([_ASKED, _SAID], prompted=False), "an assistant's turn")
        closing_ids = self._encode(self._closing)
        starts_special = bool(closing_ids) and closing_ids[0] in tokenizer.added_tokens_decoder
        self.end_of_turn: int | None = closing_ids[0] if starts_special else None
        ends = (self.end_of_turn, tokenizer.eos_token_id)
        self.stops: tuple[int, ...] = tuple(dict.fromkeys(token for token in ends if token is not None))
        self._perception = perception
        # Messages with pictures are megabytes: their tokens are made anew, and perception remembers the pictures.
        remembers = lru_cache(_CACHED_PROMPTS if perception is None else 0)
        self._opening = remembers(self._opening_ids)
        self._glue = remembers(self._glue_ids)
        self._check_template()

    def images(self, messages: Sequence[Message]) -> tuple[str, ...]:
        """The pictures in these messages, in order, as data URLs; none where the model reads text alone."""
        return () if self._perception is None else _images(messages)

    def opening(self, messages: Sequence[Message]) -> Ids:
        """The tokens of a new conversation, up to where the assistant speaks; with the first message's `tools`."""
        return self._opening(as_json(messages))

    def delta(self, messages: Sequence[Message], sampled_ids: Sequence[int]) -> Ids:
        """The tokens between what was sampled last and where the assistant speaks next.

        They close the sampled turn (its end-of-turn token is left out where it was sampled), and hold `messages` and
        the next generation prompt.
        """
        glue = self._glue(as_json(messages))
        return glue[1:] if len(sampled_ids) and sampled_ids[-1] == self.end_of_turn else glue

    def going_on(self, message: Message, sampled_ids: Sequence[int]) -> Ids:
        """The tokens of `message`, put behind what was sampled: the assistant's turn goes on.

        A turn that was ended already can not: the message is then the user's.
        """
        if len(sampled_ids) and sampled_ids[-1] in self.stops:
            return self.delta([{"role": "user", "content": message["content"]}], sampled_ids)
        return self._encode(message["content"])

    def text(self, sampled_ids: Sequence[int]) -> str:
        """What was sampled, for the environment and for people: decoded without the token that ended the turn.

        Other special tokens stay visible: an action is what was sampled.
        """
        spoken = sampled_ids[:-1] if len(sampled_ids) and sampled_ids[-1] in self.stops else sampled_ids
        return str(self._backend.decode(spoken, skip_special_tokens=False))

    def encode_action(self, text: str) -> Ids:
        """The tokens of a turn that nobody sampled (a demonstration): the text and the token that ends it."""
        if not self.stops:
            raise ChatError(f"{self._name}: neither it nor the tokenizer has a token that ends a turn")
        return (*self._encode(text), self.stops[0])

    def _opening_ids(self, messages_json: str) -> Ids:
        messages = json.loads(messages_json)
        return self._perceived(self._render(messages, prompted=True), messages)

    def _glue_ids(self, messages_json: str) -> Ids:
        messages = json.loads(messages_json)
        return self._perceived(self._glue_text([_ASKED, _SAID], messages), messages)

    def _perceived(self, text: str, messages: Sequence[Message]) -> Ids:
        """The tokens of a text that these messages were rendered to, with a placeholder for every feature."""
        images = _images(messages)
        if self._perception is None:
            if images:
                raise ChatError(
                    f"{self._name}: an observation shows a picture, but this model reads text alone"
                )
            return self._encode(text)
        ids = self._encode(self._perception.spelled(text, images))
        self._perception.check(ids, images)
        return ids

    def _glue_text(self, history: Sequence[Message], messages: Sequence[Message]) -> str:
        glue = self._after(self._render([*history, *messages], prompted=True), "the next turn")
        if not glue.startswith(self._closing):
            raise ChatError(f"{self._name}: an assistant's turn is closed differently when a message follows")
        return glue

    def _after(self, rendered: str, what: str) -> str:
        """The text behind the stand-in assistant's content."""
        before, found, after = rendered.partition(_SAID["content"])
        if not found or _ASKED["content"] not in before:
            raise ChatError(
                f"{self._name}: rendering {what} drops or changes an earlier message, so a history cannot be extended"
            )
        return after

    def _check_template(self) -> None:
        """A later turn must leave earlier ones alone, and a turn's glue must not depend on its place."""
        heads = [
            self._render(messages, prompted=False).partition(_ASKED["content"])[0]
            for messages in ([_ASKED, _SAID], [_ASKED, _SAID, _NEXT])
        ]
        if heads[0] != heads[1]:
            raise ChatError(f"{self._name}: what stands before the first message changes with a later turn")
        second_turn = self._glue_text([_ASKED, _SAID], [_NEXT])
        if self._glue_text([_ASKED, _THOUGHT, _ASKED, _SAID], [_NEXT]) != second_turn:
            raise ChatError(f"{self._name}: a turn is rendered by its place in the conversation")

    @property
    def _name(self) -> str:
        return f"chat template of {self._tokenizer.name_or_path or 'this tokenizer'}"

    def _render(self, messages: Sequence[Message], *, prompted: bool) -> str:
        plain = [
            {key: self._plain(_bare(value)) for key, value in each.items() if key not in DIRECTIONS}
            for each in messages
        ]
        tools = self._plain(messages[0].get("tools"))
        try:
            text = self._tokenizer.apply_chat_template(
                plain, tools=tools, tokenize=False, add_generation_prompt=prompted
            )
        except JinjaError as error:
            roles = [message.get("role") for message in plain]
            raise ChatError(f"{self._name} refuses messages of the roles {roles}: {error}") from error
        return str(text)

    def _plain(self, said: Any) -> Any:
        """What a message or tool says, without the tokenizer's special tokens in it: who writes one speaks of it.

        The template alone opens and closes turns. A space behind the first character takes a token apart.
        """
        if isinstance(said, str):
            while self._control.search(said):
                said = self._control.sub(_apart, said)
            return said
        if isinstance(said, dict):
            return {self._plain(key): self._plain(value) for key, value in said.items()}
        return [self._plain(each) for each in said] if isinstance(said, list) else said

    def _encode(self, text: str) -> Ids:
        # The template has written every special token itself; the backend spares what transformers wraps around it.
        try:
            return tuple(self._backend.encode(text, add_special_tokens=False).ids)
        except Exception as error:  # the backend has no narrower one for text its vocabulary cannot spell
            raise ChatError(
                f"tokenizer {self._tokenizer.name_or_path} cannot encode {text!r}: {error}"
            ) from error


def _any_of(tokens: Sequence[str]) -> re.Pattern[str]:
    """A pattern of any of these texts; of nothing where there is none."""
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _apart(token: re.Match[str]) -> str:
    first, others = token[0][:1], token[0][1:]
    # A space beside another would leave the token whole, or make it anew.
    return f"{first} {others}" if others and not (first.isspace() or others[0].isspace()) else ""


def _images(messages: Sequence[Message]) -> tuple[str, ...]:
    try:
        return images_of(messages)
    except ValueError as error:
        raise ChatError(f"a message cannot be shown: {error}") from error


def _bare(value: Any) -> Any:
    """What a template is told of a message's content: that there is a picture, not which."""
    if not isinstance(value, list):
        return value
    return [
        {"type": "image"} if isinstance(part, dict) and part.get("type") == "image" else part
        for part in value
    ]


def as_json(messages: Sequence[Message]) -> str:
    """Messages as stored and as looked up. Raises ChatError for contents that are not JSON."""
    try:
        return json.dumps(messages)
    except TypeError as error:
        raise ChatError(f"chat messages must be JSON: {error}") from error
