"""Ranks that read a model each read their own rows and nothing else, and hold together what transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from learner.model.policy import Policy
from learner.model.tensor_files import StoredTensor, stored_tensors
from learner.parallel.ranks import Ranks
from learner.parallel.shards import gathered
from learner.settings import ModelSettings
from tests.families import build_family
from tests.learner.ranked import model_refused
from tests.learner.together import together

# A vocabulary of a prime number of rows and three experts: no number of ranks divides them.
ODD = {"vocab_size": 97, "num_experts": 3}


def read(ranks: Ranks, folder: Path) -> tuple[dict[str, Any], int, int]:
    """A policy's whole parameters by name, the bytes that this rank read, and those of its own part."""
    counted, rows = [], StoredTensor.rows

    def counting(stored: StoredTensor, begin: int, end: int) -> torch.Tensor:
        counted.append((end - begin) * stored.row_bytes)
        return rows(stored, begin, end)

    StoredTensor.rows = counting  # type: ignore[method-assign]
    policy = Policy(ModelSettings(path=str(folder)), ranks, examined=True)
    named = dict(policy.model.named_parameters())
    own = sum(p.to_local().nbytes if ranks.size > 1 else p.nbytes for p in named.values())  # type: ignore[attr-defined]
    return {name: gathered(p.detach()).numpy() for name, p in named.items()}, sum(counted), own


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp(name.partition("-")[0]) for name in ("Qwen3-0.6B", "Qwen3-30B-A3B")}
    for family, folder in made.items():
        build_family(family, family == "Qwen3-0.6B", folder, **ODD)
        stored = load_file(folder / "model.safetensors")
        stored.pop("lm_head.weight" if family == "Qwen3-0.6B" else "", None)
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return made


@pytest.mark.parametrize("family", ["Qwen3-0.6B", "Qwen3-30B-A3B"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_rank_reads_its_own_rows_once(size: int, family: str, folders: dict[str, Path]) -> None:
    folder = folders[family]
    expected = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters())
    found = together(size, read, folder)
    for parameters, counted, own in found:
        assert parameters.keys() == expected.keys()
        assert all((array == expected[name].detach().numpy()).all() for name, array in parameters.items())
        assert counted == own
    stored = stored_tensors(folder).values()
    assert sum(counted for _, counted, _ in found) == sum(each.shape[0] * each.row_bytes for each in stored)


def test_what_one_rank_finds_is_said_by_all(tiny: Path, tmp_path: Path) -> None:
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    stored = load_file(tiny / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    stored[name][-1, -1] = torch.nan  # of the last rank's part alone
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    first, second = together(2, model_refused, tmp_path, {})
    assert first == second
    assert "\n" not in first and "not finite" in first
