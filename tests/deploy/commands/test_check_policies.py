"""`manta check` of several policies: each is told, their memory is summed, and a finding is said once."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from transformers import AutoConfig

from deploy.assembly.memory_plan import GIB, MemoryPlan, ModelFacts, Opponent, host_bytes
from deploy.assembly.models import tiny_architecture, tiny_tokenizer
from deploy.config.config import RunConfig
from deploy.config.load import load_config
from deploy.config.policies import of_policy
from deploy.run.job_size import nodes
from tests.deploy.command import Manta, command
from tests.qwen3 import QWEN3_8B


@pytest.fixture
def manta(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Manta:
    monkeypatch.setenv("COLUMNS", "200")
    return command(monkeypatch, capsys)


def _tiny_facts(config: RunConfig) -> ModelFacts:
    with TemporaryDirectory() as folder:
        architecture = tiny_architecture(config, tiny_tokenizer(config, Path(folder)))
    assert architecture is not None
    return ModelFacts.of(architecture, config)


def test_each_of_several_policies_is_told_with_the_engines_of_those_it_meets(
    manta: Manta, monkeypatch: pytest.MonkeyPatch
) -> None:
    policies = ['policies.keeper={env={options={seat="keeper"}}, tiny={layers=1}}', "policies.opener={}"]
    config = load_config("locks", ["league.engines=3", *policies])
    opener, keeper = (_tiny_facts(of_policy(config, name)) for name in ("opener", "keeper"))
    assert keeper.shape.parameters < opener.shape.parameters
    plan = MemoryPlan.of(of_policy(config, "keeper"), keeper, GIB, [Opponent("opener", config, opener)])
    held = {each.what: each.nbytes for each in plan.process("rollout worker").amounts}
    weights = held["versions of opener in 3 engines: weights, float32"]
    assert weights == 3 * 4 * opener.shape.parameters
    small = ["evaluation.tasks=2", "cluster.learner_cpus=0.25", "rollout.cpus_per_worker=0.25"]
    of, read = ModelFacts.of, list[str]()
    monkeypatch.setattr(ModelFacts, "of", lambda model, run: read.append(run.policy) or of(model, run))
    code, out, _ = manta("check", "locks", "league.engines=3", *small, *policies)
    assert code == 0 and sorted(read) == ["keeper", "opener"], "once each, though both meet the other"
    assert "locks, policy keeper:" in out and "locks, policy opener:" in out
    assert "versions of opener in" in out and "versions of keeper in" in out  # the table breaks lines


def test_every_amount_of_a_worker_that_meets_policies_has_a_name_of_its_own() -> None:
    config = load_config("locks", ["engine={kind='vllm'}", "engine.max_num_seqs=8"])
    facts = _tiny_facts(config)
    plan = MemoryPlan.of(config, facts, GIB, [Opponent("policy", config, facts)])
    amounts = plan.process("rollout worker").amounts
    named = {each.what: each.nbytes for each in amounts}
    assert len(named) == len(amounts)
    for what in (f"weights, {config.engine.dtype}", "KV cache", "vLLM's processes"):
        assert named[f"versions of policy in 12 engines: {what}"] == 12 * named[what]


def test_the_memory_of_several_policies_is_summed_with_one_driver() -> None:
    policies = [
        "policies.one={}",
        "policies.two={learner={ranks=3}, rollout={workers=5}}",
        "checkpoint.keep=2",
    ]
    config = load_config("qwen3_8b_gsm8k", policies)
    facts = ModelFacts.of(AutoConfig.for_model(**QWEN3_8B.config()), config)
    rings = [
        (own, MemoryPlan.of(own, facts, 80 * GIB)) for own in map(partial(of_policy, config), ("one", "two"))
    ]
    (one,), (two,) = (nodes([ring], 8) for ring in rings)
    driver = rings[0][1].process("driver").peak(on_host=True)
    (together,) = nodes(rings, 16)
    assert together.host_bytes == one.host_bytes + two.host_bytes - driver
    assert (together.gpus, together.cpus) == (16, one.cpus + two.cpus)
    assert ("learner of two", 3) in together.actors and ("rollout worker of one", 4) in together.actors
    apart = nodes(rings, 8)  # a policy on each: what engines load lies where it has an actor
    assert [each.gpus for each in apart] == [8, 8]
    assert sum(each.host_bytes for each in apart) == together.host_bytes
    whole = host_bytes([plan for _, plan in rings])
    assert whole == sum(host_bytes([plan]) for _, plan in rings) - driver


def test_a_refusal_is_one_line_and_names_a_policy_where_it_is_about_one(
    manta: Manta, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")  # as a narrow terminal, or a pipe
    small = ["evaluation.tasks=2", "rollout.cpus_per_worker=0.25"]
    wrong = 'policies.keeper={env={options={seat="keeper", nothing=1}}}'
    code, out, _ = manta("check", "locks", *small, "cluster.learner_cpus=4000", wrong, "policies.opener={}")
    refused = [line for line in out.splitlines() if line.startswith("refused: ")]
    assert code == 1 and len(refused) == 2, refused
    assert refused[0].startswith(
        "refused: policy keeper: environment locks has no option 'nothing'; its options: "
    )
    assert refused[1].startswith("refused: the run reserves 8000.5 CPUs, but this machine has ")
    assert refused[1].endswith("rollout.cpus_per_worker or cluster.learner_cpus")
    assert "locks: all 2 policies together" in out and out.count("node 1") == 1
