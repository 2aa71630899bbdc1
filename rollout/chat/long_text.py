"""Text that is long: proven not to fit a context before it is encoded, and encoded off the event loop.

Encoding takes seconds and hundreds of bytes a character; 10 MB of text would take a minute and gigabytes to learn that
it does not fit.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from tokenizers import Tokenizer

from envs.base import Message
from rollout.chat.template import ChatError

T = TypeVar("T")

_AT_ONCE_CHARACTERS = 4096  # encoded on the event loop, within a few milliseconds

# What these make of a text is at least 1/n of its characters long. A composed character has at most four parts.
_SHRINK = {"NFC": 4, "NFKC": 4, "NFD": 1, "NFKD": 1, "Lowercase": 1, "Prepend": 1}
_KEEP_ALL = {"ByteLevel", "Metaspace", "Digits", "Split", "Punctuation"}  # but for the behavior "Removed"


class TooLong(ChatError):
    """A text does not fit the context. tokens: the least that it has."""

    def __init__(self, tokens: int) -> None:
        super().__init__(f"a text has {tokens} tokens or more and does not fit the context")
        self.tokens = tokens


async def off_loop(messages: Sequence[Message], call: Callable[[], T]) -> T:
    """`call`, which encodes these messages; in a thread where they are long. Tokenizers release the interpreter."""
    said = sum(len(said) for message in messages if isinstance(said := message.get("content"), str))
    return call() if said <= _AT_ONCE_CHARACTERS else await asyncio.to_thread(call)


@dataclass(frozen=True, slots=True)
class Spelling:
    """How many characters of a text one token stands for at most, and the characters that no token stands for."""

    characters: int
    silent: str

    def least_tokens(self, text: str) -> int:
        """The text has at least so many tokens."""
        said = len(text) - sum(map(text.count, self.silent))
        return -(-said // self.characters)


def spelling_of(backend: Tokenizer) -> Spelling | None:
    """None where a token may stand for any number of characters.

    Such tokens are unknown-tokens, and added tokens that take the white space beside them along; a text may also be
    normalized to less, split with a loss, or cut.
    """
    told = json.loads(backend.to_str())
    shrink, silent = _shrink(told["normalizer"]), _silent(told)
    if told["truncation"] or shrink is None or silent is None or not _keeps_all(told["pre_tokenizer"]):
        return None
    if any(token["lstrip"] or token["rstrip"] for token in told["added_tokens"]):
        return None
    return Spelling(shrink * max(map(len, backend.get_vocab(with_added_tokens=True))), silent)


def _shrink(normalizer: dict[str, Any] | None) -> int | None:
    if normalizer is None:
        return 1
    if normalizer["type"] == "Sequence":
        product = 1
        for each in normalizer["normalizers"]:
            if (shrink := _shrink(each)) is None:
                return None
            product *= shrink
        return product
    if normalizer["type"] == "Replace":
        replaced = normalizer["pattern"].get("String")
        return 1 if replaced is not None and len(normalizer["content"]) >= len(replaced) else None
    return _SHRINK.get(normalizer["type"])


def _keeps_all(pre_tokenizer: dict[str, Any] | None) -> bool:
    if pre_tokenizer is None:
        return True
    if pre_tokenizer["type"] == "Sequence":
        return all(map(_keeps_all, pre_tokenizer["pretokenizers"]))
    return pre_tokenizer["type"] in _KEEP_ALL and pre_tokenizer.get("behavior") != "Removed"


def _silent(told: dict[str, Any]) -> str | None:
    """The characters that cost no token; None where one token may stand for any number of others."""
    model = told["model"]
    if model["type"] == "WordLevel":  # without an unknown-token it refuses what it cannot spell
        return None if model["unk_token"] in model["vocab"] else ""
    if model["type"] != "BPE":
        return None
    if model.get("unk_token") is not None:
        return None if model.get("fuse_unk") else ""
    if model.get("byte_fallback"):
        return "" if all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256)) else None
    if "ByteLevel" not in json.dumps(told["pre_tokenizer"]):
        return None
    missing = {byte for byte, letter in enumerate(_byte_letters()) if letter not in model["vocab"]}
    if missing & set(
        range(0x80, 0xC0)
    ):  # of these every character beyond ASCII has some, whatever its first byte is
        return None
    return "".join(chr(byte) for byte in sorted(missing) if byte < 0x80)


def _byte_letters() -> list[str]:
    """The letter that ByteLevel writes for each byte: printable ones of Latin-1 are their own, others follow U+0100."""
    own = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in own else next(others)) for byte in range(256)]
