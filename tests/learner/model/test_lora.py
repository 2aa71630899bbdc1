"""A policy that trains a low-rank adapter: what moves, what it computes, what it leaves on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3
from peft import PeftModel
from safetensors.torch import load_file
from transformers import GPT2Config

from learner.algorithm.schedule import OptimSettings
from learner.model.linear import _OneDnnLinear
from learner.model.loading import ModelError
from learner.model.lora_targets import planned
from learner.model.policy import Policy
from learner.settings import LearnerSettings, LoraSettings
from learner.stages.settings import SftSettings
from learner.training.learner import Learner
from learner.training.publish import take_snapshot
from rollout.wire.trajectory import Group
from tests.learner.adapted import learn, logprobs, plain
from tests.learner.staged import learned

Groups = Callable[..., Group]
IDS = list(range(3, 40))
EVERY = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(autouse=True)
def through_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapted layers compute as they do where oneDNN is the faster one, whatever processor this is."""
    monkeypatch.setenv("MANTA_LINEAR", "onednn")


def _settings(tiny: Path, **model: Any) -> LearnerSettings:
    model = {"path": str(tiny), "lora": {"rank": 4, "alpha": 8}} | model
    return LearnerSettings.model_validate(
        {"model": model, "optim": {"learning_rate": 3e-2, "warmup_steps": 2}, "tokens_per_microbatch": 40}
    )


def _policy(tiny: Path, **model: Any) -> Policy:
    """One whose adapter has learned something: B is no longer zeros."""
    policy = Policy(_settings(tiny, **model).model)
    learn(policy.parameters())
    return policy


def _base(policy: Policy) -> dict[str, str]:
    """Checksums of everything that is not trained."""
    frozen = {n: p for n, p in policy.model.named_parameters() if not p.requires_grad}
    return {
        name: blake3(p.detach().view(torch.uint8).numpy().tobytes()).hexdigest() for name, p in frozen.items()
    }


def test_a_new_adapter_changes_nothing(tiny: Path) -> None:
    before = torch.get_rng_state()
    policy = Policy(_settings(tiny).model)
    assert torch.equal(torch.get_rng_state(), before), "its random A must not move anyone's randomness"
    np.testing.assert_allclose(policy.score_ids(IDS), logprobs(plain(tiny), IDS), atol=1e-5)
    layer = policy.model.get_submodule("model.layers.0.self_attn.q_proj")
    assert type(layer.base_layer) is type(layer.lora_A["default"]) is _OneDnnLinear


@pytest.mark.parametrize(
    "model", [{}, {"dtype": "bfloat16", "gradient_checkpointing": True}], ids=["plain", "bf16"]
)
def test_only_the_adapter_is_trained(tiny: Path, group_of: Groups, model: dict[str, Any]) -> None:
    settings = _settings(tiny, lora={"targets": ["q_proj", "down_proj"]}, **model)
    learner = Learner(settings, stages=[SftSettings()])
    base, before = _base(learner.policy), [p.detach().clone() for p in learner.policy.parameters()]
    learned(learner, [group_of(7, [1.0, 1.0])])
    metrics = [learner.step([group_of(0, [1.0, 0.0])]) for _ in range(2)]
    assert np.isfinite([*metrics[0].values(), *metrics[1].values()]).all()
    assert _base(learner.policy) == base
    trained = {name for name, p in learner.policy.model.named_parameters() if p.requires_grad}
    assert len(trained) == len(before) == 2 * 2 * 2  # A and B of two layers in each of two blocks
    assert all("lora_" in name and ("q_proj" in name or "down_proj" in name) for name in trained)
    assert {name for name, p in learner.policy.model.named_parameters() if p.grad is not None} == trained
    assert not any(torch.equal(a, b) for a, b in zip(before, learner.policy.parameters(), strict=True))


def test_merged_weights_are_base_plus_product_and_score_the_same(tiny: Path, tmp_path: Path) -> None:
    policy = _policy(tiny)
    merged, stored = dict(policy.named_weights()), load_file(tiny / "model.safetensors")
    assert merged.keys() == stored.keys()
    for name, tensor in merged.items():
        layer = name.removesuffix(".weight")
        expected = stored[name].double().numpy()
        if layer.rpartition(".")[2] in EVERY:
            own = policy.model.get_submodule(layer)
            b_VR, a_RD = (
                own.get_submodule(f"lora_{x}.default").weight.detach().double().numpy() for x in "BA"
            )
            expected = expected + 8.0 / 4 * b_VR @ a_RD
            assert np.abs(expected - stored[name].numpy()).max() > 1e-3
        np.testing.assert_allclose(tensor.numpy(), expected, atol=1e-6, err_msg=name)
    policy.save(tmp_path)
    np.testing.assert_allclose(policy.score_ids(IDS), logprobs(plain(tmp_path), IDS), atol=1e-5)
    assert np.abs(policy.score_ids(IDS) - logprobs(plain(tiny), IDS)).mean() > 0.01


def test_the_adapter_alone_is_what_peft_reads(tiny: Path, tmp_path: Path) -> None:
    policy = _policy(tiny, lora={"rank": 3, "alpha": 5, "targets": ["v_proj", "up_proj"]})
    policy.save(tmp_path)
    theirs = PeftModel.from_pretrained(plain(tiny), str(tmp_path / "adapter"))
    np.testing.assert_allclose(policy.score_ids(IDS), logprobs(theirs, IDS), atol=1e-5)


@pytest.mark.parametrize("sync", ["merged", "adapter"])
def test_publishing_a_hundred_times_leaves_base_and_adapter_as_they_are(tiny: Path, sync: str) -> None:
    policy = _policy(tiny, lora={"sync": sync})
    base, adapter = _base(policy), [p.detach().clone() for p in policy.parameters()]
    first = take_snapshot(policy, 0, "float32")
    for version in range(1, 100):
        last = take_snapshot(policy, version, "float32")
    assert [spec.checksum for spec in last.manifest.tensors] == [
        spec.checksum for spec in first.manifest.tensors
    ]
    assert _base(policy) == base
    assert all(torch.equal(a, b) for a, b in zip(adapter, policy.parameters(), strict=True))
    spec = planned(str(tiny), LoraSettings())
    assert last.manifest.adapter == (spec if sync == "adapter" else None)
    assert ([spec.name for spec in last.manifest.tensors] == spec.names) == (sync == "adapter")


def test_a_learner_with_an_adapter_learns(tiny: Path, group_of: Groups) -> None:
    sft = SftSettings(optim=OptimSettings(learning_rate=2e-2), epochs=8, episodes_per_step=4)
    learner = Learner(_settings(tiny), stages=[sft])
    losses = [row["loss"] for row in learned(learner, [group_of(g, [1.0]) for g in range(9)])]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.3


@pytest.mark.parametrize(
    "algorithm",
    [
        {},
        {"kl": {"coefficient": 0.1}, "skip_zero_advantage": False},
        {"advantage": {"kind": "gae"}, "critic": {"optim": {"learning_rate": 1e-2}}},
    ],
    ids=["plain", "kl", "critic"],
)
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(
    tiny: Path, tmp_path: Path, group_of: Groups, algorithm: dict[str, Any]
) -> None:
    settings = LearnerSettings.model_validate(_settings(tiny).model_dump() | {"algorithm": algorithm})
    batches = [[group_of(10 * s + g, [1.0, 0.0, 0.5]) for g in range(2)] for s in range(4)]
    straight = Learner(settings, stages=[SftSettings()])
    learned(straight, [group_of(90, [1.0, 1.0])])  # so that version 0 is not the base
    straight.save(tmp_path)
    expected = []
    for version, groups in enumerate(batches):
        if version == 2:
            straight.save(tmp_path)
        expected.append(straight.step(groups))
    resumed = Learner(settings)
    resumed.load(tmp_path)
    assert resumed.version == 2
    assert [resumed.step(groups) for groups in batches[2:]] == expected[2:]
    for (name, a), (_, b) in zip(
        straight.policy.model.state_dict().items(), resumed.policy.model.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name


def test_the_reference_is_version_0_after_the_stages_and_lends_the_learners_own_model(
    tiny: Path, tmp_path: Path, group_of: Groups
) -> None:
    algorithm = {"kl": {"coefficient": 0.1}, "skip_zero_advantage": False}
    settings = LearnerSettings.model_validate(_settings(tiny).model_dump() | {"algorithm": algorithm})
    learner = Learner(settings, stages=[SftSettings()])
    learned(learner, [group_of(90, [1.0, 1.0])])
    learner.save(tmp_path)
    first = learner.policy.score_ids(IDS)
    for version in range(3):
        learner.step([group_of(version, [1.0, 0.0])])
    now = learner.policy.score_ids(IDS)
    reference = learner._reference
    assert reference is not None
    for _ in range(2):
        with reference.beside(learner.policy) as policy:
            np.testing.assert_array_equal(policy.score_ids(IDS), first)
        np.testing.assert_array_equal(learner.policy.score_ids(IDS), now)
        reference.find(tmp_path)  # the second time it is read from the run
    assert np.abs(now - first).mean() > 1e-3


def test_targets_that_are_no_layers_are_refused_with_those_there_are(tiny: Path) -> None:
    with pytest.raises(
        ModelError, match=r"'qproj' is no linear layer .* choose from: down_proj, .*, v_proj$"
    ) as error:
        Policy(_settings(tiny, lora={"targets": ["q_proj", "qproj"]}).model)
    assert "\n" not in str(error.value)
    with pytest.raises(ModelError, match="'lm_head'"):
        Policy(_settings(tiny, lora={"targets": ["lm_head"]}).model)


def test_matrices_that_no_adapter_reaches_are_refused_before_a_run(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=32, n_embd=16, n_head=2, n_layer=1, architectures=None)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"all-linear would leave out c_attn, c_fc, c_proj"):
        planned(str(tmp_path), LoraSettings())
    with pytest.raises(ValueError, match="'c_attn' is no linear layer"):
        planned(str(tmp_path), LoraSettings(targets=("c_attn",)))


def test_another_adapter_is_not_taken_for_the_run_s_own(tiny: Path, tmp_path: Path) -> None:
    _policy(tiny).save(tmp_path)
    settings = _settings(tiny, lora={"rank": 5}).model
    with pytest.raises(
        ModelError, match=r"^adapter .* does not fit: it has no .*lora_A.weight of shape \(5, 32\)"
    ):
        Policy.restored(settings, tmp_path)
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"^adapter .*: broken or missing file"):
        Policy.restored(settings, tmp_path)
