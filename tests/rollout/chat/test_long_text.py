"""Long observations: what cannot fit is not encoded, what fits is encoded off the event loop, and little is kept."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from learner.model.tokenizer import build_tokenizer
from rollout.agents.agent import Agent, ContextOverflow, SampledTurn
from rollout.chat import chat as chats
from rollout.chat.chat import Chat, TooLong
from rollout.chat.long_text import spelling_of
from rollout.chat.prompt_cache import PromptCache
from rollout.engines.engine import Sampling
from rollout.engines.scripted_engine import ScriptedEngine
from tests.rollout.chat.test_chat import CHATML, bpe
from tests.smollm2 import FOLDER, needs_smollm2

CONTEXT = 512


class Spy:
    """A tokenizer's backend that notes which texts are encoded, and in which thread."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.encoded: list[tuple[int, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def encode(self, text: str, **options: Any) -> Any:
        self.encoded.append((len(text), threading.get_ident()))
        return self._backend.encode(text, **options)


def turn(tokenizer: PreTrainedTokenizerFast, observation: str) -> tuple[SampledTurn | ContextOverflow, Spy]:
    async def scene() -> tuple[SampledTurn | ContextOverflow, Spy]:
        chat = Chat(tokenizer, context_tokens=CONTEXT)
        spy = Spy(chat._backend)
        chat._backend = chat._control._backend = spy
        agent = Agent(
            ScriptedEngine(tokenizer, lambda prompt, random: "on"), chat, Sampling(max_tokens=4), CONTEXT
        )
        return await agent.turn(agent.begin(1), observation), spy

    return asyncio.run(scene())


def smollm2() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(FOLDER)


def composing() -> PreTrainedTokenizerFast:
    tokenizer = bpe(CHATML)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


TOKENIZERS = [
    pytest.param(smollm2, marks=needs_smollm2),
    pytest.param(composing, id="composing"),
    pytest.param(lambda: bpe(CHATML), id="bpe"),
]


@pytest.mark.parametrize("made", TOKENIZERS)
@pytest.mark.parametrize(
    "piece", ["all work and no play\n", "e\u0301", " "], ids=["words", "accents", "blanks"]
)
def test_an_observation_of_ten_megabytes_overflows_the_context_without_being_encoded(
    made: Any, piece: str
) -> None:
    overflow, spy = turn(made(), piece * (10_000_000 // len(piece)))
    assert isinstance(overflow, ContextOverflow)
    assert overflow.prompt_tokens > CONTEXT
    longest = max((length for length, _ in spy.encoded), default=0)
    assert longest < 1000


@needs_smollm2
def test_a_long_observation_that_fits_is_encoded_in_a_thread_of_its_own() -> None:
    tokenizer, text = smollm2(), " the" * 4000
    sampled, spy = turn(tokenizer, text[: 4 * (CONTEXT - 100)])
    assert isinstance(sampled, SampledTurn)
    assert {thread for _, thread in spy.encoded} == {threading.get_ident()}, (
        "short texts do not leave the loop"
    )
    overflow, spy = turn(tokenizer, text)
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
    )
    assert overflow == ContextOverflow(len(whole), CONTEXT), "what is not proven is counted"
    length, thread = max(spy.encoded)
    assert length > len(text)
    assert thread != threading.get_ident()


@pytest.mark.parametrize("made", TOKENIZERS)
def test_no_token_stands_for_more_characters_than_the_bound(made: Any) -> None:
    backend = made().backend_tokenizer
    spelling = spelling_of(backend)
    assert spelling is not None
    pieces = st.sampled_from(
        [
            *backend.get_vocab(),
            " " * 100,
            "\u1112\u1161\u11ab",
            "\u0344\u0308\u0301",
            "ﷺ",
            "\U0001f600",
            "\x00",
            "\x04" * 99,
        ]
    )

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.one_of(pieces, st.text(max_size=8)), max_size=20).map("".join))
    def holds(text: str) -> None:
        text = text.encode("utf-8", "replace").decode()
        assert spelling.least_tokens(text) <= len(backend.encode(text, add_special_tokens=False).ids)

    holds()


def test_nothing_is_proven_where_a_token_may_stand_for_any_number_of_characters(tmp_path: Path) -> None:
    def with_(change: Any) -> Tokenizer:
        backend = bpe(CHATML).backend_tokenizer
        change(backend)
        return backend

    assert spelling_of(with_(lambda backend: None)).characters == len("<|assistant|>")
    assert spelling_of(build_tokenizer(tmp_path, ["left", "right"]).backend_tokenizer) is not None
    assert spelling_of(Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))) is None
    assert spelling_of(Tokenizer(models.BPE({"a": 0}, []))) is None, "what it cannot spell costs nothing"
    assert spelling_of(with_(lambda b: b.enable_truncation(4))) is None
    assert spelling_of(with_(lambda b: b.add_tokens([AddedToken("<x>", rstrip=True)]))) is None
    for normalizer in (normalizers.Strip(), normalizers.Replace("aa", "a"), normalizers.BertNormalizer()):
        assert spelling_of(with_(lambda b, n=normalizer: setattr(b, "normalizer", n))) is None
    for splits in (pre_tokenizers.Whitespace(), pre_tokenizers.Split("a", "removed")):
        assert spelling_of(with_(lambda b, s=splits: setattr(b, "pre_tokenizer", s))) is None


def test_remembered_prompts_are_bounded_in_bytes() -> None:
    encoded: list[str] = []

    def encode(text: str) -> tuple[int, ...]:
        encoded.append(text[0])
        return tuple(range(len(text)))

    remembered = PromptCache(encode, most_bytes=100_000)  # a text of 1,000 costs 41,300
    for name in "abaca":
        assert len(remembered(name * 1000)) == 1000
        assert remembered.bytes <= 100_000
    assert encoded == ["a", "b", "c"], "the one that was not used for longest is forgotten"
    remembered("b" * 1000)
    remembered("d" * 10_000)
    assert encoded == ["a", "b", "c", "b", "d"]
    remembered("b" * 1000)
    assert encoded[-1] == "d", "what is larger than all that may be kept drives nothing out"


def test_prompts_that_are_kept_in_a_chat_are_few_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chats, "_CACHED_BYTES", 200_000)
    chat = Chat(bpe(CHATML))
    for number in range(30):
        chat.opening([{"role": "user", "content": f"{number} left" * 300}])
        chat.delta([{"role": "user", "content": f"{number} left" * 300}], ())
    assert 0 < chat._opening.bytes <= 200_000
    assert 0 < chat._glue.bytes <= 200_000


def test_a_text_that_is_too_long_is_an_error_of_the_conversation() -> None:
    with pytest.raises(TooLong, match=r"tokens or more and does not fit the context"):
        Chat(bpe(CHATML), context_tokens=64).opening([{"role": "user", "content": "left" * 1000}])
