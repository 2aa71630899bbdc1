"""Messages to tokens by delta: what was sampled is never decoded and encoded again.

A conversation's tokens are the opening prompt, then for every turn what was sampled and the glue up to the next
turn. The glue is found in text, once per set of new messages: the chat template renders a stand-in conversation whose
assistant turn has a known content, and what follows that content is the glue. History therefore stays as it was
sampled, thoughts included, also under templates that would drop them from earlier turns.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from envs.base import Message
from rollout.chat.control_tokens import ControlTokens
from rollout.chat.long_text import TooLong, spelling_of
from rollout.chat.prompt_cache import PromptCache
from rollout.chat.stand_ins import StandIn
from rollout.chat.template import ChatError, Template
from rollout.wire.images import images_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rollout.chat.perception import Perception

Ids = tuple[int, ...]

# Stand-ins that no template treats specially and no template text contains.
_ASKED: Message = {"role": "user", "content": "zq8 asked zq8"}
_SAID: Message = {"role": "assistant", "content": "zq8 said zq8"}
_THOUGHT: Message = {"role": "assistant", "content": "zq8 thought zq8"}
_NEXT: Message = {"role": "user", "content": "zq8 next zq8"}
_CACHED_BYTES = 32 << 20  # of opening prompts, and of glue
_CACHED_FORMS = 512  # of conversations
_WAYS_OUT = (
    "put a chat_template.jinja with a place for it into the model's folder (docs/agents.md, Tools), or choose a model "
    "whose template has one"
)

__all__ = ["Chat", "ChatError", "Ids", "TooLong", "as_json"]


class Chat:
    """One tokenizer's chat template, applied by delta.

    `end_of_turn` is the token the template puts after an assistant's content, or None where that is plain text. `stops`
    are the tokens at which an engine has to end a turn: that one, the tokenizer's own end, and the model's.
    Raises ChatError for a template that rewrites earlier turns when new ones come, or renders a turn by its place.

    perception: of a model that sees; without one messages are text. ends: what the model's files name beside
    (`rollout.chat.end_tokens`). context_tokens: a text that is proven to have more is not encoded but raises TooLong.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        perception: Perception | None = None,
        ends: Sequence[int] = (),
        context_tokens: int | None = None,
    ) -> None:
        # It takes seconds, and who makes a Chat has imported it to have a tokenizer; settings alone need none of it.
        from transformers import PreTrainedTokenizerFast

        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ChatError(
                f"tokenizer {tokenizer.name_or_path} has no tokenizer.json; save it with a fast backend"
            )
        self._template = Template(tokenizer)
        self._name = self._template.name
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._context_tokens = context_tokens
        self._spelling = None if context_tokens is None else spelling_of(self._backend)
        pictured = None if perception is None else perception.placeholder_id
        self._control = ControlTokens(tokenizer, pictured)
        self._closing = self._after(
            self._template.render([_ASKED, _SAID], prompted=False), "an assistant's turn"
        )
        closing_ids = self._encode(self._closing)
        starts_special = bool(closing_ids) and closing_ids[0] in tokenizer.added_tokens_decoder
        self.end_of_turn: int | None = closing_ids[0] if starts_special else None
        known = [end for end in ends if self._backend.id_to_token(end) is not None]
        stops = (self.end_of_turn, tokenizer.eos_token_id, *known)
        self.stops: tuple[int, ...] = tuple(dict.fromkeys(token for token in stops if token is not None))
        self._closes = self._closing_tokens()
        self._perception = perception
        # Messages with pictures are megabytes: their tokens are made anew, and perception remembers the pictures.
        most_bytes = _CACHED_BYTES if perception is None else 0
        self._opening = PromptCache(self._opening_ids, most_bytes)
        self._glue = PromptCache(self._glue_ids, most_bytes)
        self._form = lru_cache(_CACHED_FORMS)(self._form_of)
        self._check_template()

    def images(self, messages: Sequence[Message]) -> tuple[str, ...]:
        """The pictures in these messages, in order, as data URLs; none where the model reads text alone."""
        return () if self._perception is None else _images(messages)

    def opening(self, messages: Sequence[Message]) -> Ids:
        """The tokens of a new conversation, up to where the assistant speaks; with the first message's `tools`."""
        return self._opening(as_json(messages))

    def delta(self, messages: Sequence[Message], sampled_ids: Sequence[int]) -> Ids:
        """The tokens between what was sampled last and where the assistant speaks next.

        They close the sampled turn, and hold `messages` and the next generation prompt. The end-of-turn token is left
        out where it was sampled, or another was that the template puts in its place (Llama 3.1's `<|eom_id|>`). Behind
        an end that no template writes, as of a whole text, the turn is closed as ever.
        """
        glue = self._glue(as_json(messages))
        return glue[1:] if len(sampled_ids) and sampled_ids[-1] in self._closes else glue

    def going_on(self, message: Message, sampled_ids: Sequence[int]) -> Ids:
        """The tokens of `message`, put behind what was sampled: the assistant's turn goes on.

        A turn that was ended already can not: the message is then the user's.
        """
        if len(sampled_ids) and sampled_ids[-1] in self.stops:
            return self.delta([{"role": "user", "content": message["content"]}], sampled_ids)
        return self._encode(self._control.plain(message["content"], own=True))

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
        return self._ids(json.loads(messages_json), goes_on=False)

    def _glue_ids(self, messages_json: str) -> Ids:
        return self._ids(json.loads(messages_json), goes_on=True)

    def _ids(self, messages: Sequence[Message], goes_on: bool) -> Ids:
        """The tokens of these messages. ChatError for what the template leaves out, or what forges its structure."""
        if self._backend.normalizer is not None:  # then taking a text apart may encode it
            for message in messages:
                if message.get("role") != "assistant" and isinstance(content := message.get("content"), str):
                    self._require_room(content.strip())  # templates trim
        said = [self._control.apart(message) for message in messages]
        if goes_on:  # the tools were offered where the conversation began
            said[0].pop("tools", None)
        ids = self._perceived(self._text(said, goes_on), messages)
        stand_in = StandIn.of(said)
        own = all(message.get("role") != "assistant" for message in messages)
        left_out, structure = self._form(as_json(stand_in.messages), goes_on, own)
        if left_out:
            what = stand_in.marks[left_out]
            raise ChatError(f"{self._name} leaves out {what}: the policy would not read it; {_WAYS_OUT}")
        if structure is not None and self._control.among(ids, own=own) != structure:
            roles = [message.get("role") for message in messages]
            raise ChatError(
                f"{self._name}: what messages of the roles {roles} say forms control tokens with its own text; "
                "change the roles, names or contents that spell them"
            )
        return ids

    def _form_of(self, messages_json: str, goes_on: bool, own: bool) -> tuple[str, Ids | None]:
        """Of a conversation of marks: the first one left out, and the control tokens; None where it cannot be said."""
        messages = json.loads(messages_json)
        try:
            text = self._text(messages, goes_on)
        except ChatError:  # a template that wants certain words
            return "", None
        left_out = StandIn.of(messages).left_out(text)
        try:
            return left_out, self._control.among(self._encode(text), own=own)
        except ChatError:  # of a vocabulary that cannot spell the marks
            return left_out, None

    def _text(self, messages: Sequence[Message], goes_on: bool) -> str:
        if goes_on:
            return self._glue_text([_ASKED, _SAID], messages)
        return self._template.render(messages, prompted=True)

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
        glue = self._after(self._template.render([*history, *messages], prompted=True), "the next turn")
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
            self._template.render(messages, prompted=False).partition(_ASKED["content"])[0]
            for messages in ([_ASKED, _SAID], [_ASKED, _SAID, _NEXT])
        ]
        if heads[0] != heads[1]:
            raise ChatError(f"{self._name}: what stands before the first message changes with a later turn")
        second_turn = self._glue_text([_ASKED, _SAID], [_NEXT])
        if self._glue_text([_ASKED, _THOUGHT, _ASKED, _SAID], [_NEXT]) != second_turn:
            raise ChatError(f"{self._name}: a turn is rendered by its place in the conversation")

    def _closing_tokens(self) -> frozenset[int]:
        """The tokens that close a turn as the template does: its own, and other ends that its text names."""
        if self.end_of_turn is None:
            return frozenset()
        named = {end for end in self.stops if self._backend.id_to_token(end) in self._template.source}
        return frozenset({self.end_of_turn} | named)

    def _require_room(self, text: str) -> None:
        """TooLong for a text that is proven not to fit the context."""
        if self._spelling is None or self._context_tokens is None:
            return
        least = self._spelling.least_tokens(text)
        if least > self._context_tokens:
            raise TooLong(least)

    def _encode(self, text: str) -> Ids:
        self._require_room(text)
        # The template has written every special token itself; the backend spares what transformers wraps around it.
        try:
            return tuple(self._backend.encode(text, add_special_tokens=False).ids)
        except Exception as error:  # the backend has no narrower one for text its vocabulary cannot spell
            raise ChatError(
                f"tokenizer {self._tokenizer.name_or_path} cannot encode {text!r}: {error}"
            ) from error


def _images(messages: Sequence[Message]) -> tuple[str, ...]:
    try:
        return images_of(messages)
    except ValueError as error:
        raise ChatError(f"a message cannot be shown: {error}") from error


def as_json(messages: Sequence[Message]) -> str:
    """Messages as stored and as looked up. Raises ChatError for contents that are not JSON."""
    try:
        return json.dumps(messages)
    except (TypeError, ValueError, RecursionError) as error:
        raise ChatError(f"chat messages must be JSON: {error}") from error
