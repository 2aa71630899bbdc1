"""Each layer of vLLM's model is proved by itself. The real vLLM with faults of every kind: test_vllm_engine.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rollout.engines.vllm_proof import LayerProof
from rollout.wire.weights import WeightMismatch


@pytest.mark.parametrize("copied", [True, False], ids=["as copied", "as published"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_value_of_a_vector_that_is_another_is_refused_by_name(dtype: torch.dtype, copied: bool) -> None:
    model = nn.ModuleDict({"norm": nn.LayerNorm(64, dtype=dtype)})
    proof = LayerProof(model)
    for name, tensor in model.named_parameters():
        proof.see(name, torch.zeros_like(tensor) if copied else tensor.clone())
        if copied:
            proof.copied(name, tensor)
    assert proof.check(3) == 2
    weight = model["norm"].weight
    with torch.no_grad():
        weight[5] = torch.nextafter(weight[5], torch.tensor(2.0, dtype=dtype))
    with pytest.raises(WeightMismatch, match=r"version 3: a layer computes with another norm\.weight"):
        proof.check(3)


def test_layers_that_no_published_name_fits_are_noted_once(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleDict({"norm": nn.LayerNorm(64)})
    for _ in range(2):  # two syncs
        proof = LayerProof(model)
        for name, tensor in model.named_parameters():
            proof.see(f"transformer.{name}", tensor.clone())
        assert proof.check(3) == 0
    assert LayerProof(model).check(3) == 0  # nothing was published through it: no name is at fault
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(
        "2 parameters of the model's layers, the first norm.weight, fit no published tensor"
    )
