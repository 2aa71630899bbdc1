"""A tokenizer small enough for models of a few hundred thousand parameters.

Its tokens are five role and control tokens, some whole words, and every printable ASCII character. Other text is an
error: there is no unknown token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD, USER, ASSISTANT, END, SYSTEM = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>", "<|system|>"
CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n"]

# <|role|>content, and an assistant's finished turn ends with <|end|>. A rendered history is a prefix of the next one.
# Results of tools have the user's role. Tools are listed with their arguments, a line each: schemas would fill a small
# context.
CHAT_TEMPLATE = (
    "{% if tools %}<|system|>{% for tool in tools %}"
    "{{ tool.function.name }}({{ tool.function.parameters.properties | join(', ') }})\n{% endfor %}{% endif %}"
    "{% for message in messages %}"
    "<|{{ 'user' if message.role == 'tool' else message.role }}|>{{ message.content }}"
    "{% if message.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer(folder: Path, words: Sequence[str] = ()) -> PreTrainedTokenizerBase:
    """Build the tokenizer, save it into `folder` and return it.

    words: lower-case words that become one token each if no lower-case letter is beside them; all other text is one
    token a character. ValueError for a word that is not [a-z]+.
    """
    unusable = [word for word in words if not re.fullmatch("[a-z]+", word)]
    if unusable:
        raise ValueError(f"tiny.words must be of lower-case letters only, got {unusable}; rename them")
    tokens = dict.fromkeys([PAD, USER, ASSISTANT, END, SYSTEM, *words, *CHARACTERS])
    tokenizer = Tokenizer(models.WordLevel({token: place for place, token in enumerate(tokens)}))
    whole = f"(?<![a-z])(?:{'|'.join(dict.fromkeys(words))})(?![a-z])|" if words else ""
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(whole + r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[USER, ASSISTANT, SYSTEM],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)
    return fast
