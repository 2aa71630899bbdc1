"""Messages to tokens by delta: what was sampled is never decoded and encoded again.

A conversation's tokens are the opening prompt, then for every turn the sampled tokens and the glue up to the next turn.
The glue is derived from text, once per set of new messages: the chat template renders a stand-in conversation whose
assistant turn has a known content, and the text after that content is the glue. The history therefore stays as it was
sampled, thoughts included, even with templates that drop them from earlier turns.
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
from rollout.chat.tool_prompt import with_tools_said
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
_TOLD: Message = {"role": "system", "content": "zq8 told zq8"}
_ARGUMENTS = {"type": "object", "properties": {"zq8": {"type": "string"}}, "required": ["zq8"]}
_TOOL = {
    "type": "function",
    "function": {"name": "zq8tool", "description": "zq8", "parameters": _ARGUMENTS},
}
_CACHED_BYTES = 32 << 20  # of opening prompts, and of glue
_CACHED_FORMS = 512  # of conversations
_REMEDY = (
    "put a chat_template.jinja that renders it into the model's folder (docs/agents.md, Tools), or choose a model "
    "whose template does"
)

__all__ = ["Chat", "ChatError", "Ids", "TooLong", "as_json"]


class Chat:
    """One tokenizer's chat template, applied by delta.

    end_of_turn: the token that the template puts after an assistant's content, or None if that is plain text. stops:
    the tokens at which an engine must end a turn: end_of_turn, the tokenizer's end, and the model's. Raises ChatError
    for a template that rewrites earlier turns when new ones follow, or renders a turn by its position.

    Tools that the template has no section for are described in the system message (`rollout.chat.tool_prompt`).

    perception: of a model with vision; without it messages are text. ends: further end tokens from the model's files
    (`rollout.chat.end_tokens`). context_tokens: a text with provably more tokens is not encoded, and raises TooLong.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        perception: Perception | None = None,
        ends: Sequence[int] = (),
        context_tokens: int | None = None,
    ) -> None:
        # The import takes seconds; a caller with a tokenizer has done it already, and settings do not need it.
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
        # Messages with pictures are megabytes: their tokens are not cached, and perception caches the pictures.
        most_bytes = _CACHED_BYTES if perception is None else 0
        self._opening = PromptCache(self._opening_ids, most_bytes)
        self._glue = PromptCache(self._glue_ids, most_bytes)
        self._form = lru_cache(_CACHED_FORMS)(self._form_of)
        self._check_template()
        self._says_tools = not self._shows([_ASKED | {"tools": [_TOOL]}], "zq8tool") and self._shows(
            [_TOLD, _ASKED], _TOLD["content"]
        )

    def images(self, messages: Sequence[Message]) -> tuple[str, ...]:
        """Pictures in these messages, in order, as data URLs; empty for a model without vision."""
        return () if self._perception is None else _images(messages)

    def opening(self, messages: Sequence[Message]) -> Ids:
        """Tokens of a new conversation up to the assistant's turn, with the first message's `tools`.

        Where the template has no section for tools, they are said in the system message.
        """
        return self._opening(as_json(messages))

    def delta(self, messages: Sequence[Message], sampled_ids: Sequence[int]) -> Ids:
        """Tokens between the last sampled turn and the assistant's next turn.

        They close the sampled turn, and contain `messages` and the next generation prompt. The end-of-turn token is
        omitted if it was sampled, or another that the template uses in its place (Llama 3.1's `<|eom_id|>`). After an
        end token that no template writes, such as the end of a text, the turn is closed as usual.
        """
        glue = self._glue(as_json(messages))
        return glue[1:] if len(sampled_ids) and sampled_ids[-1] in self._closes else glue

    def continue_turn(self, message: Message, sampled_ids: Sequence[int]) -> Ids:
        """Tokens of `message`, appended to the assistant's unfinished turn.

        A turn that has ended cannot continue: the message is then the user's.
        """
        if len(sampled_ids) and sampled_ids[-1] in self.stops:
            return self.delta([{"role": "user", "content": message["content"]}], sampled_ids)
        return self._encode(self._control.plain(message["content"], own=True))

    def text(self, sampled_ids: Sequence[int]) -> str:
        """Decode sampled tokens for environment and people, without the token that ended the turn.

        Other special tokens stay visible.
        """
        spoken = sampled_ids[:-1] if len(sampled_ids) and sampled_ids[-1] in self.stops else sampled_ids
        return str(self._backend.decode(spoken, skip_special_tokens=False))

    def encode_action(self, text: str) -> Ids:
        """Encode a turn that was not sampled (a demonstration): the text and the token that ends it."""
        if not self.stops:
            raise ChatError(
                f"{self._name}: neither it nor the tokenizer has a token that ends a turn; set the eos_token"
            )
        return (*self._encode(text), self.stops[0])

    def _opening_ids(self, messages_json: str) -> Ids:
        messages = json.loads(messages_json)
        return self._ids(with_tools_said(messages) if self._says_tools else messages, goes_on=False)

    def _glue_ids(self, messages_json: str) -> Ids:
        return self._ids(json.loads(messages_json), goes_on=True)

    def _ids(self, messages: Sequence[Message], goes_on: bool) -> Ids:
        """Tokens of these messages. ChatError for content that the template omits, or that forges its structure."""
        if self._backend.normalizer is not None:  # then splitting control tokens may encode the text
            for message in messages:
                if message.get("role") != "assistant" and isinstance(content := message.get("content"), str):
                    self._require_room(content.strip())  # templates trim
        said = [self._control.apart(message) for message in messages]
        if goes_on:  # the tools were announced at the start of the conversation
            said[0].pop("tools", None)
        ids = self._perceived(self._text(said, goes_on), messages)
        stand_in = StandIn.of(said)
        own = all(message.get("role") != "assistant" for message in messages)
        left_out, structure = self._form(as_json(stand_in.messages), goes_on, own)
        if left_out:
            what = stand_in.marks[left_out]
            raise ChatError(f"{self._name} leaves out {what}: the policy would not read it; {_REMEDY}")
        if structure is not None and self._control.among(ids, own=own) != structure:
            roles = [message.get("role") for message in messages]
            raise ChatError(
                f"{self._name}: the content of messages of the roles {roles} forms control tokens with the template's "
                "text; change these roles, names or contents"
            )
        return ids

    def _form_of(self, messages_json: str, goes_on: bool, own: bool) -> tuple[str, Ids | None]:
        """Of a stand-in conversation: the first mark left out, and the control tokens; None if they are unknown."""
        messages = json.loads(messages_json)
        try:
            text = self._text(messages, goes_on)
        except ChatError:  # a template that requires certain words
            return "", None
        left_out = StandIn.of(messages).left_out(text)
        try:
            return left_out, self._control.among(self._encode(text), own=own)
        except ChatError:  # a vocabulary that cannot encode the marks
            return left_out, None

    def _text(self, messages: Sequence[Message], goes_on: bool) -> str:
        if goes_on:
            return self._glue_text([_ASKED, _SAID], messages)
        return self._template.render(messages, prompted=True)

    def _shows(self, messages: Sequence[Message], mark: str) -> bool:
        """Whether the template renders these messages with this text in them."""
        try:
            return mark in self._template.render(messages, prompted=True).casefold()
        except ChatError:  # it refuses them
            return False

    def _perceived(self, text: str, messages: Sequence[Message]) -> Ids:
        """Tokens of the rendered text of these messages, with a placeholder for every image feature."""
        images = _images(messages)
        if self._perception is None:
            if images:
                raise ChatError(
                    f"{self._name}: an observation has a picture, but this model reads text only; use one with vision"
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
        """The text after the stand-in assistant's content."""
        before, found, after = rendered.partition(_SAID["content"])
        if not found or _ASKED["content"] not in before:
            raise ChatError(
                f"{self._name}: rendering {what} drops or changes an earlier message; a history must stay extensible"
            )
        return after

    def _check_template(self) -> None:
        """Raise ChatError if a later turn changes earlier ones, or if a turn's glue depends on its position."""
        heads = [
            self._template.render(messages, prompted=False).partition(_ASKED["content"])[0]
            for messages in ([_ASKED, _SAID], [_ASKED, _SAID, _NEXT])
        ]
        if heads[0] != heads[1]:
            raise ChatError(f"{self._name}: the text before the first message changes with a later turn")
        second_turn = self._glue_text([_ASKED, _SAID], [_NEXT])
        if self._glue_text([_ASKED, _THOUGHT, _ASKED, _SAID], [_NEXT]) != second_turn:
            raise ChatError(f"{self._name}: a turn is rendered by its position in the conversation")

    def _closing_tokens(self) -> frozenset[int]:
        """Tokens that close a turn as the template does: end_of_turn, and other stops that its source names."""
        if self.end_of_turn is None:
            return frozenset()
        named = {end for end in self.stops if self._backend.id_to_token(end) in self._template.source}
        return frozenset({self.end_of_turn} | named)

    def _require_room(self, text: str) -> None:
        """Raise TooLong for a text that provably exceeds the context."""
        if self._spelling is None or self._context_tokens is None:
            return
        least = self._spelling.least_tokens(text)
        if least > self._context_tokens:
            raise TooLong(least)

    def _encode(self, text: str) -> Ids:
        self._require_room(text)
        # The template has written all special tokens; the backend avoids the overhead of transformers' tokenizer.
        try:
            return tuple(self._backend.encode(text, add_special_tokens=False).ids)
        except (
            Exception
        ) as error:  # the backend raises no narrower one for text that its vocabulary cannot encode
            raise ChatError(
                f"tokenizer {self._tokenizer.name_or_path} cannot encode {text!r}: {error}"
            ) from error


def _images(messages: Sequence[Message]) -> tuple[str, ...]:
    try:
        return images_of(messages)
    except ValueError as error:
        raise ChatError(f"a message has an invalid picture: {error}") from error


def as_json(messages: Sequence[Message]) -> str:
    """Messages as JSON, for storage and caches. Raises ChatError for contents that are not JSON."""
    try:
        return json.dumps(messages)
    except (TypeError, ValueError, RecursionError) as error:
        raise ChatError(f"chat messages must be JSON: {error}") from error
