from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from learner.data.prefix_tree import PrefixTree
from learner.model.attention import packed_attention, register
from learner.model.attention_blocks import RowAttention

COMMON = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "qwen3": Qwen3Config(**COMMON),
    "llama": LlamaConfig(**COMMON),
    "llama_ungrouped": LlamaConfig(**{**COMMON, "num_key_value_heads": 4}),
    "qwen3_window": Qwen3Config(**COMMON, use_sliding_window=True, sliding_window=4, max_window_layers=1),
}
LENGTHS = [9, 9, 5, 1, 12, 5]  # runs of equal length, a single token, out of order


@pytest.fixture(params=list(CONFIGS))
def models(request: pytest.FixtureRequest) -> tuple[torch.nn.Module, torch.nn.Module]:
    """One model twice: with packed attention, and with transformers' own plain one."""
    torch.manual_seed(0)
    config = CONFIGS[request.param]
    packed = AutoModelForCausalLM.from_config(config, attn_implementation=register()).eval()
    plain = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    plain.load_state_dict(packed.state_dict())
    return packed, plain


def _packed_logits(model: torch.nn.Module, sequences: list[Tensor]) -> list[Tensor]:
    lengths = [len(s) for s in sequences]
    logits = model(
        input_ids=torch.cat(sequences)[None],
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        row_attention=RowAttention(PrefixTree.apart(lengths)),
        use_cache=False,
    ).logits[0]
    return list(logits.split(lengths))


def _sequences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(50, (length,), generator=generator) for length in LENGTHS]


def test_packed_sequences_equal_each_sequence_alone(models: tuple[torch.nn.Module, torch.nn.Module]) -> None:
    packed, plain = models
    sequences = _sequences()
    together = _packed_logits(packed, sequences)
    alone = [plain(input_ids=s[None], use_cache=False).logits[0] for s in sequences]
    for mine, own in zip(together, alone, strict=True):
        torch.testing.assert_close(mine, own, atol=1e-5, rtol=1e-5)
    # ... and so are the gradients.
    torch.cat(together).square().mean().backward()
    torch.cat(alone).square().mean().backward()
    for mine, own in zip(packed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, own.grad, atol=1e-5, rtol=1e-4)


def test_a_sequence_never_sees_its_neighbours(models: tuple[torch.nn.Module, torch.nn.Module]) -> None:
    packed, _ = models
    sequences = _sequences()
    before = _packed_logits(packed, sequences)
    for changed in range(len(sequences)):
        other = [(s + 7) % 50 if i == changed else s for i, s in enumerate(sequences)]
        after = _packed_logits(packed, other)
        for i in range(len(sequences)):
            assert torch.equal(before[i], after[i]) == (i != changed)


def test_what_would_change_the_formula_is_refused() -> None:
    module = torch.nn.Linear(1, 1)
    row = torch.zeros(1, 2, 3, 8)
    rows = torch.zeros(2, 2, 3, 8)
    with pytest.raises(ValueError, match="2 rows"):
        packed_attention(module, rows, rows, rows, None)
    with pytest.raises(ValueError, match="mask"):
        packed_attention(module, row, row, row, torch.zeros(1, 1, 3, 3))
    with pytest.raises(ValueError, match="softcap"):
        packed_attention(module, row, row, row, None, softcap=30.0)
