"""`manta check`: shipped recipes are sound, figures are right, and what a run would refuse ends with status 1."""

from __future__ import annotations

import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
from transformers import AutoConfig

from deploy.assembly.memory_plan import GIB, MemoryPlan, ModelFacts, host_bytes
from deploy.config.config import RunConfig
from deploy.config.load import load_config
from deploy.config.recipe_files import recipe_names
from deploy.run.findings import of_disk, of_host, of_job, of_memory, of_recipe, of_shared_rows
from deploy.run.job_size import DiskUse, JobSize, nodes
from learner.model.footprint import blank_model
from learner.training.memory_estimate import slice_tokens
from learner.training.optim import Optimizer
from tests.deploy.command import Manta, command
from tests.qwen3 import QWEN3_06B, QWEN3_8B, QWEN3_30B_A3B, Qwen3
from tests.smollm2 import needs_smollm2

ROOT = Path(__file__).resolve().parents[3]
GPU = {"qwen3_gsm8k": QWEN3_06B, "qwen3_gsm8k_lora": QWEN3_06B, "qwen3_8b_gsm8k": QWEN3_8B}
MARKS = {name: [needs_smollm2] for name in ("smollm2_sums", "smollm2_assistant")}
OTHERS = [pytest.param(name, marks=MARKS.get(name, [])) for name in recipe_names() if name not in GPU]
LEFT_OPEN = {"scratch": ["env.id=arithmetic"]}  # what a recipe leaves to its user


@pytest.fixture
def manta(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Manta:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "200")
    return command(monkeypatch, capsys)


@pytest.mark.parametrize("recipe", OTHERS)
def test_a_shipped_recipe_is_sound(manta: Manta, recipe: str) -> None:
    code, out, err = manta("check", recipe, "evaluation.tasks=2", *LEFT_OPEN.get(recipe, []))
    assert (code, err) == (0, "") and "refused" not in out
    assert "learner" in out
    assert ("KV cache of an engine" in out) == (
        recipe != "locks"
    )  # whose many small engines are transformers


@pytest.mark.parametrize(("recipe", "model"), GPU.items())
def test_a_recipe_for_gpus_is_sound(manta: Manta, tmp_path: Path, recipe: str, model: Qwen3) -> None:
    code, out, err = manta("check", recipe, "--config-json", str(model.write(tmp_path)))
    assert (code, err) == (0, "")
    assert f"{model.parameters:,} parameters" in out
    # What is not on this machine is all that there is to look at.
    looks = [line.split("look", 1)[1].strip() for line in out.splitlines() if line.strip().startswith("look")]
    assert len(looks) == 2, looks
    assert f"model Qwen/Qwen3-{'8B' if model is QWEN3_8B else '0.6B'} is not on this machine" in looks[0]
    assert "openai/gsm8k:main:train" in looks[1]
    assert "node 1" in out and "node 2" not in out


def test_a_model_that_is_not_here_is_one_line_and_the_rest_is_checked(manta: Manta) -> None:
    code, out, _ = manta("check", "smollm2_sums", "learner.model.path=nobody/nothing", "evaluation.tasks=2")
    assert code == 0 and "memory is not told" in out and "nobody/nothing is not on this machine" in out
    assert "rows, of which" in out and "tokens sampled a step" in out
    code, out, _ = manta("check", "frozen_lake", "evaluation.tasks=2")
    assert code == 0 and " tasks are played" in out and "of which" not in out, "every seed is another task"
    code, out, _ = manta("check", "smollm2_sums", "learner.model.path=./nothing", "evaluation.tasks=2")
    assert code == 1 and "./nothing: no such folder" in out


def test_a_column_that_no_split_has_is_told_once(manta: Manta) -> None:
    absent = "learner.model.path=nobody/nothing", "evaluation.tasks=2"
    code, out, _ = manta("check", "smollm2_sums", "env.options.answer=sum", *absent)
    assert code == 1 and out.count("there is no column 'sum'") == 1


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["env.options.size=99"], "the first prompt of frozen_lake has"),
        (["engine.kv_cache_gib=0.000001"], "does not hold one sequence of rollout.context_tokens=64"),
        (["rollout.cpus_per_worker=4000"], "the run reserves 4001 CPUs"),
        (["env.options.nothing=1"], "has no option 'nothing'"),
    ],
)
def test_what_a_run_would_refuse_is_refused(manta: Manta, overrides: list[str], says: str) -> None:
    code, out, _ = manta("check", "frozen_lake", "evaluation.tasks=2", *overrides)
    assert code == 1 and any(line.startswith("refused: ") and says in line for line in out.splitlines())


def test_a_context_beyond_the_models_positions_is_refused(manta: Manta, tmp_path: Path) -> None:
    told = QWEN3_06B.write(tmp_path)
    code, out, _ = manta("check", "qwen3_gsm8k", "rollout.context_tokens=50000", "--config-json", str(told))
    assert code == 1
    assert "has 40960 positions, but rollout.context_tokens=50000" in out
    told.write_text("{", encoding="utf-8")
    code, _, err = manta("check", "qwen3_gsm8k", "--config-json", str(told))
    assert code == 2 and "--config-json" in err and err.count("\n") == 1


@lru_cache
def _facts(recipe: str) -> ModelFacts:
    return ModelFacts.of(AutoConfig.for_model(**GPU[recipe].config()), load_config(recipe))


def test_memory_is_what_arithmetic_says() -> None:
    config, facts = load_config("qwen3_8b_gsm8k"), _facts("qwen3_8b_gsm8k")
    plan = MemoryPlan.of(config, facts, 80 * GIB)
    amounts = {each.what: each.nbytes for each in plan.process("learner").amounts}
    weights = QWEN3_8B.parameters
    assert amounts["parameters, float32"] == weights  # 4 bytes over 4 ranks
    assert amounts["AdamW's moments, float32"] == 2 * weights
    assert amounts["copy of weights and moments, while saving"] == 3 * weights
    # 36 layers of 8 key heads of 128 numbers of 2 bytes, keys and values.
    assert plan.cache is not None and plan.cache.token_bytes == 36 * 8 * 128 * 2 * 2
    assert plan.version_bytes == 2 * weights
    (node,) = nodes([(config, plan)], 8)
    assert (node.gpus, node.cpus) == (8, 64)
    # Every rank copies its part to save it; one of them holds what engines are sent, and so does the object store.
    # The processes themselves: four ranks and the driver with torch, four workers with vLLM's client and processes.
    assert node.host_bytes == pytest.approx((4 * 3 + 2 + 2) * weights + (5 * 0.5 + 4 * 2.4) * GIB, rel=0.01)
    halves = nodes([(config, plan)], 4)
    assert [each.gpus for each in halves] == [4, 4]


def test_moments_in_eight_bits_are_a_byte_and_a_256th_of_a_scale_a_number() -> None:
    overrides = ["learner.optim.moments=8bit", "stages=[{kind='sft', source={kind='player'}}]"]
    config, facts = load_config("qwen3_8b_gsm8k", overrides), _facts("qwen3_8b_gsm8k")
    amounts = {
        each.what: each.nbytes for each in MemoryPlan.of(config, facts, 80 * GIB).process("learner").amounts
    }
    # What is stored of each parameter of the model, of which no rank's rows end within a block.
    model = blank_model(AutoConfig.for_model(**GPU["qwen3_8b_gsm8k"].config()))
    optimizer = Optimizer(model.parameters(), config.learner.optim)
    stored = sum(each.nbytes for each in optimizer.moments_to_come()[:-1])
    assert amounts["AdamW's moments, 8 bits a number"] == pytest.approx(stored / 4, rel=1e-4)
    assert stored / 8 < QWEN3_8B.parameters * 0.26
    # 16 million numbers at a time: both moments in float32, and of one that is quantized the scaled numbers, what they
    # are looked up by and their codes, of four bytes each.
    assert amounts["AdamW's moments, the part that is updated"] == 2**24 * 20
    assert amounts["copy of weights and moments, while saving"] == pytest.approx(
        QWEN3_8B.parameters + stored / 4, rel=1e-4
    )
    # The stage has its own optimizer, whose moments are float32.
    beyond = amounts["AdamW's moments in stage 0, beyond those of reinforcement learning"]
    assert beyond == pytest.approx(2 * QWEN3_8B.parameters - stored / 4, rel=1e-4)


def test_float8_copies_of_a_product_are_counted() -> None:
    config, facts = load_config("qwen3_8b_gsm8k", ["learner.model.float8=true"]), _facts("qwen3_8b_gsm8k")
    amounts = {
        each.what: each.nbytes for each in MemoryPlan.of(config, facts, 80 * GIB).process("learner").amounts
    }
    model, tokens = QWEN3_8B, slice_tokens(config.learner, config.rollout.context_tokens)
    # Of a product of the MLP, by far the largest: inputs and gradients, as they are and transposed.
    exact = 2 * tokens * (model.width + model.mlp)
    assert amounts["matrices of a product in float8"] == exact


def test_an_engine_larger_than_a_node_takes_the_next_ones_too() -> None:
    sizes = ["engine.tensor_parallel_size=8", "rollout.gpus_per_worker=8", "rollout.workers=2"]
    config, facts = load_config("qwen3_8b_gsm8k", sizes), _facts("qwen3_8b_gsm8k")
    plan = MemoryPlan.of(config, facts, 80 * GIB)
    assert [each.gpus for each in nodes([(config, plan)], 3)] == [3, 3, 2 + 1, 3, 3, 2 + 1, 2]
    # Over 8 GPUs lie an eighth of the weights, and one of 8 key heads of each layer.
    amounts = {each.what: each.nbytes for each in plan.process("rollout worker").amounts}
    assert amounts["weights, bfloat16"] == 2 * QWEN3_8B.parameters // 8
    assert plan.cache is not None and plan.cache.token_bytes == 36 * 128 * 2 * 2


def test_an_adapters_size_is_what_arithmetic_says() -> None:
    model, facts = QWEN3_06B, _facts("qwen3_gsm8k_lora")
    inner, keys = model.heads * model.head_width, model.key_heads * model.head_width
    sides = [(model.width, inner), (model.width, keys), (model.width, keys), (inner, model.width)]
    sides += [(model.width, model.mlp), (model.width, model.mlp), (model.mlp, model.width)]
    assert facts.lora.adapter == model.layers * sum(32 * (i + o) for i, o in sides)
    assert facts.lora.adapted == model.layers * sum(i * o for i, o in sides)


def test_a_teacher_of_experts_is_gathered_with_all_of_them(tmp_path: Path) -> None:
    QWEN3_30B_A3B.write(tmp_path)
    distill = f"learner.algorithm.distill={{teacher={str(tmp_path)!r}, divergence='reverse'}}"
    config = load_config("qwen3_8b_gsm8k", [distill, "learner.algorithm.skip_zero_advantage=false"])
    plan = MemoryPlan.of(config, ModelFacts.of(AutoConfig.for_model(**QWEN3_8B.config()), config), 80 * GIB)
    amounts = {each.what: each.nbytes for each in plan.process("learner").amounts}
    teacher = QWEN3_30B_A3B
    assert amounts["teacher, float32"] == teacher.parameters  # 4 bytes over 4 ranks
    head = teacher.vocabulary * teacher.width
    outside = 2 * head + teacher.width
    layer = (teacher.parameters - outside) // teacher.layers
    assert amounts["gathered layers of the teacher, embedding and head"] == 2 * (outside + 2 * layer)
    assert amounts["the teacher's head, while the policy is compared with it"] == 2 * head


def test_the_value_heads_of_a_stage_are_what_arithmetic_says() -> None:
    model, config = (
        QWEN3_8B,
        load_config("qwen3_8b_gsm8k", ["stages=[{kind='ilql', source={kind='player'}}]"]),
    )
    plan = MemoryPlan.of(config, _facts("qwen3_8b_gsm8k"), 80 * GIB)
    amounts = {each.what: each.nbytes for each in plan.process("learner").amounts}
    first = 2 * model.width * (model.width + 1)
    actions, state = (first + out * (2 * model.width + 1) for out in (model.vocabulary, 1))
    # Over 4 ranks 4 bytes of each number: weights, gradients and two moments, and once more the action values.
    assert amounts["value heads of stage 0, with a slow copy"] == 4 * (2 * actions + state) + 2 * actions
    # A checkpoint within the stage has no gradients: weights and two moments of all, and once more the action values.
    stored = 12 * (2 * actions + state) + 4 * 2 * actions
    # Each rank copies its part.
    assert amounts["copy of weights and moments, while saving"] == (12 * model.parameters + stored) // 4
    disk = DiskUse.of(config, _facts("qwen3_8b_gsm8k"), JobSize.of(config, [(7473, 1319)]))
    assert disk.checkpoint == 12 * model.parameters + stored


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["learner.optim.learning_rate=1e-3"], "learning_rate=0.001 is unusual for all weights"),
        (["learner.model.lora={}", "learner.optim.learning_rate=1e-2"], "is unusual for an adapter"),
        (["buffer.groups_per_step=63", "learner.ranks=2", "weights.transfer=object_store"], "not divisible"),
        (["learner.algorithm.minibatches=3"], "not divisible by learner.algorithm.minibatches=3"),
        (["rollout.concurrent_groups=200"], "could play 200 groups at once"),
        (["checkpoint.every_steps=500"], "saves nothing between version 0 and the last"),
        (["evaluation.tasks=0"], "nothing says how much was learned"),
        (["engine.enforce_eager=true"], "without CUDA graphs"),
        (["learner.model.dtype=float32"], "on a GPU has neither"),
        (
            [
                "engine.dtype=float16",
                "learner.algorithm.proximal=behavior",
                "learner.algorithm.corrections=[]",
            ],
            "round differently",
        ),
    ],
)
def test_what_looks_wrong_in_a_recipe_is_said(overrides: list[str], says: str) -> None:
    assert list(of_recipe(load_config("qwen3_gsm8k"))) == []
    (found,) = of_recipe(load_config("qwen3_gsm8k", overrides))
    assert says in found.text and not found.certain


@pytest.mark.parametrize(
    ("overrides", "gpu_gib", "says", "certain"),
    [
        ([], 80, None, False),
        (
            ["learner.tokens_per_microbatch=400000"],
            80,
            "does not fit into 80 GiB of a GPU, beside engines",
            False,
        ),
        ([], 48, "does not fit into 48 GiB of a GPU, beside engines", True),
        (["engine.kv_cache_gib=4"], 80, "KV cache holds 24 sequences of 1536 tokens, but up to 256", False),
        (["engine.kv_cache_gib=0.1"], 80, "does not hold one sequence", True),
        (["rollout.concurrent_groups=64"], 80, "plays 512 episodes at once", False),
    ],
)
def test_what_does_not_fit_is_said(
    overrides: list[str], gpu_gib: int, says: str | None, certain: bool
) -> None:
    config, facts = load_config("qwen3_gsm8k", overrides), _facts("qwen3_gsm8k")
    found = list(of_memory(config, facts, MemoryPlan.of(config, facts, gpu_gib * GIB), gpu_gib * GIB))
    if says is None:
        assert found == []
    else:
        (match,) = [each for each in found if says in each.text]
        assert match.certain is certain


@pytest.mark.parametrize(
    ("overrides", "fits"),
    [
        (["buffer.groups_per_step=128"], True),
        (["rollout.context_tokens=131072", "learner.tokens_per_microbatch=131072"], False),
        (
            ["buffer.groups_per_step=3", "learner.algorithm.minibatches=1"],
            None,
        ),  # of more ranks some would wait
    ],
)
def test_ranks_that_share_rows_which_each_has_room_for_are_told(
    overrides: list[str], fits: bool | None
) -> None:
    def told(together: int) -> tuple[RunConfig, MemoryPlan]:
        shared = ["learner.ranks=4", f"learner.context_parallel_size={together}"]
        config = load_config("qwen3_8b_gsm8k", [*overrides, *shared])
        return config, MemoryPlan.of(config, ModelFacts.of(architecture, config), 80 * GIB)

    architecture = AutoConfig.for_model(**QWEN3_8B.config())
    config, plan = told(2)
    found = [each.text for each in of_shared_rows(config, architecture, plan, 80 * GIB)]
    if fits is None:
        assert found == []
        return
    _, alone = told(1)
    peak = alone.process("learner").peak(on_host=False)
    assert (peak < 76 * GIB) is fits is bool(found)
    if fits:
        more = (plan.traffic.row - alone.traffic.row) / GIB
        assert f"room for its rows alone ({peak / GIB:.3g} GiB of 80)" in found[0]
        assert f"exchange {more:.3g} GiB more for a row and have 2 times fewer rows" in found[0] and more > 0
    assert list(of_shared_rows(*(told(1)[0], architecture, alone), 80 * GIB)) == []


def test_rows_disk_and_host_that_do_not_suffice_are_said() -> None:
    config, facts = load_config("qwen3_gsm8k"), _facts("qwen3_gsm8k")
    few = JobSize.of(config, [(50, 20)])
    assert few.data[0].evaluation_tasks == 20 and few.data[0].passes == 200 * 64 / 50
    assert "50 rows, but a step trains on 64 groups" in next(of_job(config, few)).text
    assert list(of_job(config, JobSize.of(config, [(7473, 1319)]))) == []
    asked = config.evaluation.tasks
    assert "has only 7 rows to evaluate on" in next(of_job(config, JobSize.of(config, [(7473, 7)]))).text
    assert list(of_job(config, JobSize.of(config, [(7473, asked)]))) == []
    use = DiskUse.of(config, facts, few)
    assert use.checkpoint == 12 * QWEN3_06B.parameters and use.checkpoints == 3 * use.checkpoint
    assert "the disk has 1 GiB free" in next(of_disk(config, use, GIB)).text
    plan = MemoryPlan.of(config, facts, 80 * GIB)
    assert "of which this machine has 1 GiB" in next(of_host(host_bytes([plan]), GIB)).text


def test_a_worker_with_fewer_gpus_than_its_engine_spans_is_refused(manta: Manta) -> None:
    code, _, err = manta("check", "qwen3_8b_gsm8k", "engine.tensor_parallel_size=2")
    assert code == 2 and "use rollout.gpus_per_worker=2" in err


def test_neither_ray_nor_vllm_is_imported() -> None:
    script = "import sys, deploy.run.recipe_check, deploy.commands.check; print({'ray', 'vllm'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, encoding="utf-8"
    )
    assert done.stdout == "set()\n"
