"""What a recipe may say: one line for every mistake, and no option that nothing reads."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest
from pydantic import BaseModel

from deploy.config import run_folder
from deploy.config.config import RunConfig
from deploy.config.config_errors import ConfigError, models_in, option_names
from deploy.config.load import load_config, moved
from deploy.config.synonyms import SYNONYMS
from learner.algorithm.losses import DivergenceLoss
from tests.deploy.small_run import configured

ROOT = Path(__file__).resolve().parents[3]
CHECKPOINT = "learner.model.path=somewhere"


def fault(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        configured(*overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("rollout.group_sise=4", "rollout.group_size"),
        ("learner.optim.learning_rat=1e-3", "learner.optim.learning_rate"),
        ("evaluation.task=3", "evaluation.tasks"),
        ("roll_out.workers=2", "rollout"),
        ("step=3", "steps"),
        ("tiny.layer=2", "tiny.layers"),
        ("stages.0.optim.warmup=5", "stages.0.optim.warmup_steps"),
    ],
)
def test_an_unknown_name_is_told_the_nearest(override: str, nearest: str) -> None:
    assert f"unknown option {override.partition('=')[0].partition('.')[0]}" in fault(override)
    assert f"did you mean {nearest}?" in fault(override)


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("learner.optim.lr=1e-3", "learner.optim.learning_rate"),
        ("learner.lr=1e-3", "learner.optim.learning_rate"),
        ("lr=1e-3", "learner.optim.learning_rate"),
        ("stages.0.optim.lr=1e-3", "stages.0.optim.learning_rate"),
        ("sampling.temp=0.7", "sampling.temperature"),
        ("temperature=0.7", "sampling.temperature"),
        ("learner.batch_size=8", "buffer.groups_per_step"),
        ("data.train_batch_size=8", "buffer.groups_per_step"),
        ("actor_rollout_ref.rollout.n=8", "rollout.group_size"),
        ("rollout.num_generations=8", "rollout.group_size"),
        ("sampling.max_new_tokens=8", "sampling.max_tokens"),
        ("data.max_prompt_length=8", "rollout.context_tokens"),
        ("algorithm.kl_ctrl.kl_coef=0.1", "learner.algorithm.kl.coefficient"),
        ("learner.algorithm.beta=0.1", "learner.algorithm.kl.coefficient"),
        ("learner.algorithm.loss.clip_ratio=0.1", "learner.algorithm.loss.clip_low"),
        ("learner.algorithm.ppo_epochs=2", "learner.algorithm.epochs"),
        ("learner.algorithm.gamma=0.9", "learner.algorithm.advantage.gamma"),
        ("learner.optim.warmup_step=3", "learner.optim.warmup_steps"),
        ("learner.learning_rate=3", "learner.optim.learning_rate"),
        ("learner.group_size=3", "rollout.group_size"),
        ("engine.gpu_memory_utilization=0.5", "engine.memory_fraction"),
    ],
)
def test_a_peers_name_or_a_misplaced_one_is_told_ours(override: str, meant: str) -> None:
    assert f"unknown option {override.partition('=')[0]}; did you mean {meant}?" in fault(override)


def test_every_synonym_means_options_that_exist() -> None:
    names = set(option_names(RunConfig))
    assert {name for ours in SYNONYMS.values() for name in ours} <= names


def test_nothing_like_it_is_no_suggestion() -> None:
    assert fault("qqqq.zzzz=1").endswith("unknown option qqqq.zzzz")


def test_several_mistakes_are_named_at_once() -> None:
    said = fault("rollout.group_sise=4", "steps=-1", "sampling.temperature=cold")
    assert "rollout.group_size" in said and "steps" in said and "sampling.temperature" in said


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("steps=many", "steps: "),
        ("steps=2.5", "steps: "),
        ("rollout.workers=0", "rollout.workers: "),
        ("tiny.tie=maybe", "tiny.tie: "),
        ("tiny.words=left", "tiny.words: "),
        ("learner.optim.betas=0.9", "learner.optim.betas: "),
        ("engine.dtype=float64", "engine.dtype: "),
        ("env.options=3", "env.options: "),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_what_was_given(override: str, named: str) -> None:
    said = fault(override)
    assert named in said
    assert override.partition("=")[2] in said


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["rollout.group_size=1"], "rollout.group_size=1"),
        (["sampling.top_p=0.9"], "sampling.top_p"),
        (["sampling.seed=7"], "sampling.seed"),
        (["weights.transfer=nccl"], "rollout.gpus_per_worker=0"),
        (["weights.transfer=ipc"], "rollout.gpus_per_worker=0"),
        (["weights.transfer=nccl", "rollout.gpus_per_worker=1"], "learner.model.device='cpu'"),
        (
            ["weights.transfer=nccl", "rollout.gpus_per_worker=0.5", "learner.model.device=cuda"],
            "rollout.gpus_per_worker=0.5",
        ),
        (
            ["weights.transfer=ipc", "rollout.gpus_per_worker=1", "learner.model.device=cuda"],
            "share the learner's",
        ),
        (["learner.model.lora.rank=0"], "learner.model.lora.rank: Input should be greater than 0 (got 0)"),
        (["learner.model.lora.targets=[]"], "learner.model.lora.targets"),
        (
            ["learner.model.lora.sync=adapter", "weights.transfer=nccl", "rollout.gpus_per_worker=1"],
            "learner.model.lora.sync='adapter' cannot be sent by weights.transfer='nccl'",
        ),
        (
            ["learner.model.lora.sync=adapter", "rollout.gpus_per_worker=1"],
            "needs engine.dtype='bfloat16' or 'float16' on GPUs",
        ),
        (["learner.model.lora.sync=adapter", "learner.model.lora.quantize_base=nf4"], "use sync='merged'"),
        (["sampling.max_tokens=40"], "rollout.context_tokens=40"),
        (["rollout.context_tokens=32"], "rollout.context_tokens=32 must exceed"),
        ([CHECKPOINT], "exactly one"),
        (["tiny.words=['Left']"], "tiny.words"),
        (["learner.algorithm.entropy_bonus=0.1"], "skip_zero_advantage"),
        (["learner.algorithm.advantage.kind=gppo"], "'grpo', 'rloo'"),
        (["learner.algorithm.loss.kind=ppo2"], "'ppo', 'reinforce'"),
        (["learner.algorithm.advantage.kind=gae"], "needs a critic"),
        (
            ["learner.algorithm.advantage.kind=gae", "learner.algorithm.critic.detach=true"],
            "learner.algorithm.critic.detach does not belong to kind='own'; it belongs to 'shared'",
        ),
        (
            ["learner.algorithm.corrections=[{kind='lag', max_lag=1, cap=2.0}]"],
            "learner.algorithm.corrections.cap does not belong to kind='lag'; it belongs to 'tis'",
        ),
        (["learner.algorithm.advantage.kind=gae", "learner.algorithm.critic.kind=both"], "'own', 'shared'"),
        (["rollout.max_turns=1", "learner.algorithm.advantage.kind=gigpo"], "compares turns"),
        (["guards=[{metric='entrophy', below=0.1}]"], "did you mean 'entropy'"),
        (["guards=[{metric='entropy'}]"], "no bound"),
        (
            ["learner.optim.schedule=linear", "learner.optim.warmup_steps=4"],
            "learner.optim.warmup_steps or train longer",
        ),
        (
            ["stages.0.optim.schedule=cosine", "stages.0.optim.warmup_steps=48"],
            "lower stages.0.optim.warmup_steps or",
        ),
        (
            ["buffer.reuse.groups=1", "buffer.reuse.limit=0"],
            "buffer.reuse.limit: Input should be greater than",
        ),
        (["buffer.reuse.groups=1", "buffer.max_lag=4"], "buffer.reuse.max_lag=4 leaves nothing to reuse"),
        (["buffer.reuse.groups=3"], "buffer.reuse.groups=3 can never be found"),
        (["buffer.reuse.sampler.kind=lifo"], "'fifo', 'uniform', 'prioritized'"),
        (
            [
                "buffer.reuse={groups=1, sampler={kind='prioritized'}}",
                "rollout.group_size=1",
                "learner.algorithm.advantage.kind=reinforce_pp",
            ],
            "prefers groups whose rewards differ",
        ),
        (["learner.ranks=33"], "have at least 33 groups a step"),
        (["learner.ranks=66", "learner.context_parallel_size=2"], "have at least 33 groups a step"),
        (["learner.model.router_balance=0.1"], "is for a mixture of experts"),
        (["learner.ranks=2", "learner.sharded_over=3"], "does not divide learner.ranks=2"),
        (
            [
                "learner.ranks=2",
                "weights.transfer=ipc",
                "rollout.gpus_per_worker=0.5",
                "engine.kv_cache_gib=1",
                "learner.model.device=cuda",
            ],
            "'ipc' sends within one GPU",
        ),
    ],
)
def test_contradictions_are_refused(overrides: list[str], named: str) -> None:
    assert named in fault(*overrides)


def test_neither_checkpoint_nor_tiny_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("steps = 1\n[env]\nid = 'frozen_lake'\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="exactly one"):
        load_config(str(recipe))
    assert load_config(str(recipe), [CHECKPOINT]).learner.model.path == "somewhere"


def test_overrides_read_as_numbers_booleans_lists_and_text() -> None:
    config = configured(
        "steps=7", "learner.optim.learning_rate=3e-4", "tiny.tie=false", "learner.optim.betas=[0.8, 0.9]",
        "name=my run", 'env.id="CartPole-v1"', "env.options={size = 5}", "env.options.slippery=true",
        "tiny.words=['a', 'b']",
    )  # fmt: skip
    assert (config.steps, config.learner.optim.learning_rate, config.tiny and config.tiny.tie) == (
        7,
        3e-4,
        False,
    )
    assert config.learner.optim.betas == (0.8, 0.9)
    assert (config.name, config.env.id, config.env.options) == (
        "my run",
        "CartPole-v1",
        {"size": 5, "slippery": True},
    )
    assert config.tiny is not None and config.tiny.words == ("a", "b")


def test_a_run_goes_on_elsewhere_but_as_what_it_was() -> None:
    began = configured("learner.ranks=2", "env.options.slippery=true")
    moves = ["learner.ranks=1", "cluster.address=there", "supervision.max_restarts=7", "rollout.workers=3"]
    assert moved(began, moves) == configured("env.options.slippery=true", *moves)
    for changes in (
        "name=other",
        "learner.optim.learning_rate=1",
        "rollout.group_size=2",
        "learner=",
        "seed=1",
    ):
        with pytest.raises(
            ConfigError, match=f"^override '{changes}': [^\n]* options that may change: cluster, "
        ):
            moved(began, [changes])
    with pytest.raises(ConfigError, match=r"learner\.ranks"):
        moved(began, ["learner.ranks=0"])


@pytest.mark.parametrize("override", ["steps", "=3", "steps.x=3"])
def test_an_override_that_is_none_is_quoted(override: str) -> None:
    assert repr(override) in fault(override)


def test_a_recipe_that_is_no_toml_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text("steps = = 3\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"broken\.toml: not valid TOML: .*line 1"):
        load_config(str(broken))
    with pytest.raises(ConfigError, match=r"'frozen_lak' is neither .* frozen_lake"):
        load_config("frozen_lak")


@pytest.mark.parametrize(
    "name", sorted(p.name for p in files("deploy.recipes").iterdir() if p.name.endswith(".toml"))
)
def test_recipes_that_ship_load(name: str) -> None:
    assert load_config(name.removesuffix(".toml")).steps > 0


def test_a_recipe_that_extends_another_says_only_what_differs(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        "extends = 'ppo'\nsteps = 17\n[learner.algorithm]\ncritic = { value_clip = 0.5 }\n"
        "loss = { kind = 'dppo' }\n[learner.optim]\nbetas = [0.8, 0.9]\n",
        encoding="utf-8",
    )
    config, base = load_config(str(recipe), ["seed=3"]), load_config("ppo")
    assert (config.steps, config.seed, config.env) == (17, 3, base.env)
    assert config.learner.optim == base.learner.optim.model_copy(update={"betas": (0.8, 0.9)})
    algorithm, old = config.learner.algorithm, base.learner.algorithm
    assert (algorithm.advantage, algorithm.loss) == (
        old.advantage,
        DivergenceLoss(),
    )  # another kind: nothing of the old
    assert algorithm.critic == old.critic.model_copy(update={"value_clip": 0.5})

    recipe.write_text(
        "extends = 'ppo'\n[env]\nid = 'arithmetic'\n[evaluation]\ntasks = 7\n", encoding="utf-8"
    )
    other = load_config(str(recipe))
    assert (other.env.id, other.env.options) == ("arithmetic", {})  # another environment: none of its options
    assert other.evaluation == base.evaluation.model_copy(update={"tasks": 7})


def test_an_override_with_nothing_behind_it_leaves_a_section_out() -> None:
    config = load_config(
        "household", ["tiny=", "stages=", "learner.model.path=/a/model", "env.options.level=3"]
    )
    assert config.tiny is None and config.stages == ()
    assert config.learner.model.path == "/a/model"
    assert config.env.options["level"] == 3
    assert load_config("household", ["cluster.address="]).cluster.address == ""


def test_the_stored_configuration_reads_back_as_it_was(tmp_path: Path) -> None:
    for config in (configured("name=odd [name]"), load_config("frozen_lake", ["seed=3"])):
        folder = run_folder.choose(config, tmp_path)
        run_folder.create(config, folder)
        assert run_folder.open_existing(folder) == config
        assert folder.stat().st_mode & 0o777 == 0o700


# Every option is read -------------------------------------------------------------------------------------------


def options(
    model: type[BaseModel] = RunConfig, names: tuple[str, ...] = ()
) -> Iterator[tuple[str, str, str]]:
    """Of every option and section: its dotted name, its own section's name, and the class it is declared in."""
    for name, field in model.model_fields.items():
        yield ".".join((*names, name)), names[-1] if names else "config", model.__name__
        for section in models_in(field.annotation):
            yield from options(section, (*names, name))


class Reads(ast.NodeVisitor):
    """Every attribute read outside of validators: `config.rollout.workers` is (rollout, workers)."""

    def __init__(self) -> None:
        self.found: set[tuple[str, str]] = set()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        # That a setting is checked does not mean that it has an effect.
        if not any("validator" in ast.unparse(decorator) for decorator in node.decorator_list):
            self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        owner = node.value
        whose = (
            owner.attr
            if isinstance(owner, ast.Attribute)
            else owner.id
            if isinstance(owner, ast.Name)
            else ""
        )
        self.found.add((whose.lstrip("_"), node.attr))
        self.generic_visit(node)


def test_every_option_is_read() -> None:
    """As section.x anywhere, or as settings.x (self.x in the class) in a file that names the settings class."""
    read: dict[str, set[tuple[str, str]]] = {}
    for path in sorted(
        p for package in ("deploy", "envs", "learner", "rollout") for p in (ROOT / package).rglob("*.py")
    ):
        if path.name == "config_checks.py":  # that a setting is checked does not mean that it has an effect
            continue
        source = path.read_text(encoding="utf-8")
        visitor = Reads()
        visitor.visit(ast.parse(source))
        read[source] = visitor.found
    anywhere = set().union(*read.values())
    unread = []
    for dotted, section, declared in options():
        name = dotted.rpartition(".")[2]
        near = set().union(*(found for source, found in read.items() if declared in source))
        if name == "kind":
            continue  # pydantic reads it, to know which section this is
        one_of_several = (section.removesuffix("s"), name)
        if not {(section, name), one_of_several} & anywhere and not near & {
            ("settings", name),
            ("self", name),
        }:
            unread.append(dotted)
    assert unread == []


def test_the_names_that_are_offered_are_all_options() -> None:
    assert {dotted for dotted, _, _ in options()} == set(option_names(RunConfig))


def test_a_recipe_is_utf8_with_or_without_a_mark(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    text = "extends = 'scratch'\nname = 'café'\n[env]\nid = 'arithmetic'\n"
    for encoding in ("utf-8", "utf-8-sig"):
        recipe.write_text(text, encoding=encoding)
        assert load_config(str(recipe)).name == "café"
    recipe.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"not UTF-8 text \(byte 0xe9 in line 2\); save it as UTF-8"):
        load_config(str(recipe))


def test_text_that_reads_as_a_number_is_told_to_be_quoted() -> None:
    with pytest.raises(ConfigError, match=r"""name: .*quote .*name='"TEXT"' \(got 111\)"""):
        load_config("frozen_lake", ["name=1_1_1"])
    assert load_config("frozen_lake", ['name="1_1_1"']).name == "1_1_1"
