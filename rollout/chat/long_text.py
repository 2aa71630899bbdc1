"""Long texts: refused without encoding if they provably exceed the context, and encoded off the event loop.

Encoding costs hundreds of bytes of memory per character: 10 MB of text would take a minute and gigabytes before it is
found not to fit.
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

# These normalizers shorten a text to 1/n of its characters at most. A composed character has at most four parts.
_SHRINK = {"NFC": 4, "NFKC": 4, "NFD": 1, "NFKD": 1, "Lowercase": 1, "Prepend": 1}
_KEEP_ALL = {"ByteLevel", "Metaspace", "Digits", "Split", "Punctuation"}  # except with the behavior "Removed"


class TooLong(ChatError):
    """A text does not fit the context. tokens: a lower bound of its length."""

    def __init__(self, tokens: int) -> None:
        super().__init__(f"a text has {tokens} tokens or more and does not fit the context")
        self.tokens = tokens


async def off_loop(messages: Sequence[Message], call: Callable[[], T]) -> T:
    """Run `call`, which encodes these messages, in a thread if they are long. Tokenizers release the interpreter."""
    said = sum(len(said) for message in messages if isinstance(said := message.get("content"), str))
    return call() if said <= _AT_ONCE_CHARACTERS else await asyncio.to_thread(call)


@dataclass(frozen=True, slots=True)
class Spelling:
    """Most characters of a text per token, and the characters that yield no token."""

    characters: int
    silent: str

    def least_tokens(self, text: str) -> int:
        """Lower bound of the text's tokens."""
        said = len(text) - sum(map(text.count, self.silent))
        return -(-said // self.characters)


def spelling_of(backend: Tokenizer) -> Spelling | None:
    """Spelling of a tokenizer; None if a token may represent any number of characters.

    Such tokens are unknown-tokens, and added tokens that absorb the white space beside them. Normalization may also
    shorten a text without bound, and a tokenizer may split with a loss or truncate.
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
    """Characters that yield no token; None if one token may represent any number of characters."""
    model = told["model"]
    if model["type"] == "WordLevel":  # without an unknown-token it refuses unknown words
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
    if missing & set(range(0x80, 0xC0)):  # continuation bytes, which every character beyond ASCII has
        return None
    return "".join(chr(byte) for byte in sorted(missing) if byte < 0x80)


def _byte_letters() -> list[str]:
    """The letter of each byte in ByteLevel: printable Latin-1 bytes are their own letter, others map from U+0100 on."""
    own = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in own else next(others)) for byte in range(256)]
