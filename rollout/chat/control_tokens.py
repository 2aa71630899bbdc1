"""Control tokens of a chat template, which the content of messages must not contain.

A tokenizer matches its added tokens anywhere in a text: a tool's result with `</tool_response>` would close the result.
The text of a control token is therefore broken by a space wherever the tokenizer would match it, also after its
normalization (case, width, composition).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from envs.base import Message
from envs.tools.tool_calls import CLOSE, OPEN, THINK, THOUGHT
from rollout.chat.template import ChatError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_OWN = (OPEN, CLOSE, THINK, THOUGHT)  # tokens that the policy writes itself, and reads in its earlier turns
_ROUNDS = 4  # of breaking tokens up; those still matched then are removed


class ControlTokens:
    """Control tokens of one tokenizer. pictured: the placeholder of pictures, which perception checks."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, pictured: int | None = None) -> None:
        self._backend = tokenizer.backend_tokenizer
        tokens = {
            token_id: token.content
            for token_id, token in tokenizer.added_tokens_decoder.items()
            if token_id != pictured and (token.special or _structures(token.content))
        }
        self._ids = frozenset(tokens)
        self._own_ids = frozenset(token_id for token_id, content in tokens.items() if content in _OWN)
        self._texts = _any_of(tokens.values(), self._normalized)
        others = [content for content in tokens.values() if content not in _OWN]
        self._texts_but_own = _any_of(others, self._normalized)

    def among(self, ids: Sequence[int], *, own: bool) -> tuple[int, ...]:
        """Select the control tokens among ids, in order; own: with those that a policy writes itself."""
        kept = self._ids if own else self._ids - self._own_ids
        return tuple(token for token in ids if token in kept)

    def apart(self, message: Message) -> Message:
        """Return a message without control tokens; an assistant's content may have calls and thoughts."""
        own = message.get("role") == "assistant"
        return {
            self.plain(key): self.plain(value, own=own and key == "content") for key, value in message.items()
        }

    def plain(self, said: Any, *, own: bool = False) -> Any:
        """Return a JSON value whose texts have no control tokens. own: keep those that a policy writes itself."""
        if isinstance(said, str):
            return self._plain_text(said, own)
        if isinstance(said, dict):
            return {self._plain_text(key, own): self.plain(value, own=own) for key, value in said.items()}
        return [self.plain(each, own=own) for each in said] if isinstance(said, list) else said

    def _plain_text(self, said: str, own: bool) -> str:
        pattern = self._texts_but_own if own else self._texts
        while pattern.search(said):
            said = pattern.sub(lambda token: _apart(token[0]), said)
        if self._normalized(said) == said:
            return said
        for round in range(_ROUNDS + 1):
            spans = self._spelled(said, own)
            if not spans:
                return said
            for start, end in reversed(spans):
                said = said[:start] + ("" if round == _ROUNDS else _apart(said[start:end])) + said[end:]
        if self._spelled(said, own):
            raise ChatError(
                f"the tokenizer reads control tokens in this text, which cannot be split: {said[:80]!r}"
            )
        return said

    def _spelled(self, said: str, own: bool) -> list[tuple[int, int]]:
        """Spans of control tokens that the tokenizer matches."""
        try:
            encoding = self._backend.encode(said, add_special_tokens=False)
        except Exception:  # text that its vocabulary cannot encode is refused when the prompt is built
            return []
        kept = self._ids - self._own_ids if own else self._ids
        return [span for token, span in zip(encoding.ids, encoding.offsets, strict=True) if token in kept]

    def _normalized(self, text: str) -> str:
        normalizer = self._backend.normalizer
        try:
            return text if normalizer is None else str(normalizer.normalize_str(text))
        except UnicodeEncodeError as error:  # half a surrogate pair
            raise ChatError(f"text that is not valid Unicode: {text[:80]!r}") from error


def _structures(content: str) -> bool:
    """Whether an added token that is not special may structure a text; words and white space do not."""
    return not (content.isalnum() or content.isspace())


def _any_of(tokens: Any, normalized: Any) -> re.Pattern[str]:
    """Pattern that matches any of these texts, raw or normalized; without texts it matches nothing."""
    texts = {text for token in tokens for text in (token, normalized(token)) if text.strip()}
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


def _apart(token: str) -> str:
    first, others = token[:1], token[1:]
    # A space beside another could leave the token intact, or form it again.
    return f"{first} {others}" if others and not (first.isspace() or others[0].isspace()) else ""
