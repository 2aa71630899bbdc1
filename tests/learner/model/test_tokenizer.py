from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from learner.model.tokenizer import CHARACTERS, build_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(folder, ["left", "right", "up", "up"])
    return AutoTokenizer.from_pretrained(folder)


@given(st.text(CHARACTERS))
def test_ascii_text_survives_the_round_trip(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text


def test_words_are_one_token_only_where_they_stand_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = tokenizer.convert_ids_to_tokens(
        tokenizer.encode("left,upleft Up right\n", add_special_tokens=False)
    )
    assert tokens == ["left", ",", *"upleft", " ", "U", "p", " ", "right", "\n"]
    assert len(tokenizer) == 5 + 3 + len(CHARACTERS)
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|pad|>", "<|end|>")


def test_the_chat_template_grows_by_prefix(tokenizer: PreTrainedTokenizerBase) -> None:
    asked = [{"role": "user", "content": "X"}]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    answered = [*asked, {"role": "assistant", "content": "left"}]
    assert prompt == "<|user|>X<|assistant|>"
    assert tokenizer.apply_chat_template(answered, tokenize=False) == "<|user|>X<|assistant|>left<|end|>"
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(prompt)) == ["<|user|>", "X", "<|assistant|>"]


def test_a_word_that_is_not_lower_case_letters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Up"):
        build_tokenizer(tmp_path, ["Up"])
