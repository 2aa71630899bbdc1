"""A model from anywhere becomes a whole folder of this machine, or one line says why not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import import_utils

from deploy.assembly.build import load_chat
from deploy.assembly.fetching import fetch
from deploy.assembly.models import model_path
from deploy.config.config_errors import ConfigError
from deploy.run.model_checks import check_model, check_tokenizer
from deploy.run.preflight import check
from learner.model import source
from learner.model.policy import Policy
from learner.model.source import local_model, pinned
from learner.settings import ModelSettings
from rollout.wire.model_folder import ModelDamaged, ModelMissing
from tests.deploy.small_run import configured
from tests.rollout.chat.test_chat import CHATML, bpe
from tests.smollm2 import FOLDER, GGUF, PACKAGES, needs_smollm2

OLDER, NEWER = "a" * 40, "b" * 40  # commits
NAME = "somebody/tiny"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The caches of this user, empty."""
    monkeypatch.setenv("MANTA_CACHE", str(tmp_path / "manta"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


@pytest.fixture(scope="module")
def sharded(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with its weights in several files."""
    folder = tmp_path_factory.mktemp("sharded")
    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(folder, max_shard_size="20KB")
    for file in (*tiny.glob("*token*"), *tiny.glob("*.jinja")):
        shutil.copyfile(file, folder / file.name)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def snapshot(cache: Path, model: Path, commit: str = NEWER, name: str = NAME) -> Path:
    """Lay a model into the hub's cache as its client does: blobs, a snapshot of links, a branch."""
    repository = cache / "hub" / f"models--{name.replace('/', '--')}"
    (blobs := repository / "blobs").mkdir(parents=True, exist_ok=True)
    (folder := repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit, encoding="utf-8")
    for file in model.iterdir():
        shutil.copyfile(file, blob := blobs / f"{commit}-{file.name}")
        (folder / file.name).symlink_to(Path("../../blobs") / blob.name)
    return folder


def list_files(folder: Path, names: list[str]) -> None:
    """Say which files the repository has, as the client notes when it begins to download."""
    trees = folder.parents[1] / "trees"
    trees.mkdir()
    entries = {name: {"size": 1, "blob_id": "0" * 40} for name in names}
    (trees / f"{folder.name}.json").write_text(
        json.dumps({"format_version": 1, "files": entries}), encoding="utf-8"
    )


def test_a_whole_snapshot_of_the_hub_is_a_model_at_the_commit_that_is_asked_for(
    cache: Path, sharded: Path, tiny: Path
) -> None:
    older, newer = snapshot(cache, tiny, OLDER), snapshot(cache, sharded)
    list_files(newer, [file.name for file in sharded.iterdir()] + ["pytorch_model.bin", "onnx/config.json"])
    assert local_model(NAME) == local_model(f"{NAME}@main") == newer
    assert local_model(f"{NAME}@{OLDER}") == older
    assert pinned(NAME, newer) == f"{NAME}@{NEWER}"
    assert pinned(str(tiny), tiny) == str(tiny)
    ids = list(range(3, 30))
    of_hub, of_folder = (Policy(ModelSettings(path=path)).score_ids(ids) for path in (NAME, str(tiny)))
    np.testing.assert_array_equal(of_hub, of_folder)
    assert load_chat(fetch(NAME)).stops == load_chat(str(tiny)).stops


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def without_last_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[-1].unlink()


def with_link_to_nothing(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[0].resolve().unlink()


def with_half_a_shard(folder: Path) -> None:
    blob = sorted(folder.glob("*.safetensors"))[0].resolve()
    blob.write_bytes(blob.read_bytes()[:-100])


def with_index_of_more(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    said = json.loads(index.read_text(encoding="utf-8"))
    said["weight_map"]["model.layers.9.mlp.up_proj.weight"] = sorted(said["weight_map"].values())[0]
    index.write_text(json.dumps(said), encoding="utf-8")


def listing_more(folder: Path) -> None:
    list_files(folder, [*(file.name for file in folder.iterdir()), "special_tokens_map.json"])


@pytest.mark.parametrize(
    ("cached", "told"),
    [
        (without("config.json"), r"no configuration \(config.json is missing\)"),
        (without("tokenizer_config.json"), r"no tokenizer \(tokenizer_config.json is missing\)"),
        (without("tokenizer.json"), r"no vocabulary \(tokenizer.json is missing\)"),
        (without("model.safetensors.index.json"), r"no weights \(model-00001-of-\d+.safetensors, but no"),
        (without_last_shard, r"1 of \d+ files of weights are missing, such as model-000\d+-of"),
        (with_link_to_nothing, r"model-00001-of-\d+.safetensors is a link to a file that is not there"),
        (with_half_a_shard, "broken file"),
        (with_index_of_more, r"lacks 1 tensors that \S+ lists, such as model.layers.9.mlp"),
        (
            listing_more,
            r"1 file\(s\) are missing \(special_tokens_map.json\)\), and the hub cannot be reached",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_partly_cached_snapshot_is_never_taken_for_a_whole_one(
    cache: Path, sharded: Path, cached: Callable[[Path], None], told: str
) -> None:
    cached(snapshot(cache, sharded))
    with pytest.raises(ModelDamaged, match=told):
        local_model(NAME)
    with pytest.raises(ConfigError, match=told) as refused:
        check(configured("tiny=", f"learner.model.path={NAME}"))
    assert "\n" not in str(refused.value)


def test_what_is_nowhere_is_one_line(cache: Path) -> None:
    for named, told in (
        (NAME, "the hub cannot be reached, and no snapshot of it is here"),
        (f"{NAME}@{OLDER}", "no snapshot of it is here"),
        (str(cache / "none.gguf"), "no such file"),
        (str(cache / "none"), "no such folder"),
        ("", "set learner.model.path to a folder, an id of the Hugging Face hub, or a GGUF file"),
    ):
        with pytest.raises(ModelMissing, match=told) as refused:
            local_model(named)
        assert "\n" not in str(refused.value)


def test_of_a_repository_only_the_files_of_the_model_are_downloaded() -> None:
    of_model = ["config.json", "model-1-of-2.safetensors", "model.safetensors.index.json", "tokenizer.model"]
    of_model += ["chat_template.jinja", "additional_chat_templates/rag.jinja", "modeling_own.py", "LICENSE"]
    others = ["onnx/config.json", "original/model.safetensors", "consolidated.safetensors", "README.md"]
    kept = filter_repo_objects(
        [*of_model, *others], allow_patterns=list(source.FILES), ignore_patterns=list(source._IGNORED)
    )
    assert list(kept) == of_model


def test_a_run_keeps_the_commit_that_it_began_with(cache: Path, tiny: Path, sharded: Path) -> None:
    (run := cache / "run").mkdir()
    config = configured("tiny=", f"learner.model.path={NAME}")
    snapshot(cache, tiny, OLDER)
    assert model_path(config, run) == f"{NAME}@{OLDER}"
    snapshot(cache, sharded)  # the branch has moved
    assert model_path(config, run) == f"{NAME}@{OLDER}"
    assert fetch(model_path(config, run)) == str(local_model(f"{NAME}@{OLDER}"))
    (other := cache / "other").mkdir()
    assert model_path(config, other) == f"{NAME}@{NEWER}"


@pytest.fixture
def with_gguf(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package gguf can be imported."""
    monkeypatch.syspath_prepend(PACKAGES)
    import_utils.is_gguf_available.cache_clear()


def write_tiny_gguf(file: Path, seed: int, layers: int = 1, context: int = 64) -> Qwen2ForCausalLM:
    """Write a random Qwen2 of one layer as GGUF, by that format's own library; returns the model.

    layers: as the file says; its weights are of one.
    """
    import gguf

    tokenizer = bpe(CHATML)
    said = json.loads(tokenizer.backend_tokenizer.to_str())
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), num_hidden_layers=1, **shape))
    writer = gguf.GGUFWriter(file, "qwen2")
    writer.add_context_length(context)
    writer.add_block_count(layers)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(model.config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    vocabulary = {**said["model"]["vocab"], **{each["content"]: each["id"] for each in said["added_tokens"]}}
    special = set(tokenizer.all_special_tokens) | {each["content"] for each in said["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in said["model"]["merges"]])
    writer.add_eos_token_id(vocabulary["<|im_end|>"])
    writer.add_bos_token_id(vocabulary["<|bos|>"])
    writer.add_chat_template(CHATML)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, 1)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@needs_smollm2
def test_a_gguf_file_is_converted_once_into_a_folder_named_after_its_content(
    cache: Path, with_gguf: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_tiny_gguf(file := cache / "tiny.gguf", seed=0)
    conversions: list[Path] = []
    write = source.write_gguf
    monkeypatch.setattr(
        source, "write_gguf", lambda file, target: (conversions.append(file), write(file, target))
    )
    with ThreadPoolExecutor(2) as both:  # as two processes of a machine, at once
        folders = set(both.map(local_model, [str(file)] * 2))
    (folder,) = folders
    assert conversions == [file]
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in stored.items())
    tokenizer = check_tokenizer(check_model(str(file)))
    assert tokenizer.get_vocab().items() >= bpe(CHATML).get_vocab().items()
    assert load_chat(str(folder)).stops == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    file.rename(moved := cache / "elsewhere.gguf")
    assert local_model(str(moved)) == folder
    write_tiny_gguf(moved, seed=1)
    assert local_model(str(moved)) != folder
    assert len(conversions) == 2


@needs_smollm2
def test_a_conversion_that_was_interrupted_or_is_not_whole_leaves_no_model(
    cache: Path, with_gguf: None
) -> None:
    write_tiny_gguf(file := cache / "tiny.gguf", seed=0, layers=2)
    with pytest.raises(ModelDamaged, match=r"lacks \d+ weights, such as model.layers.1.*the whole model"):
        local_model(str(file))
    assert not [folder for folder in (cache / "manta" / "models").iterdir() if folder.name[0] != "."]
    write_tiny_gguf(file, seed=0)
    folder = local_model(str(file))
    partial = folder.with_name(f".{folder.name}.part")
    folder.rename(partial)
    (partial / "model.safetensors").write_bytes(b"half")
    assert local_model(str(file)) == folder
    assert not partial.exists()
    check_model(str(file))


@needs_smollm2
def test_the_real_smollm2_from_the_hub(cache: Path) -> None:
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    snapshot(cache, FOLDER, name=name)
    folder = check_model(name)
    assert len(check_tokenizer(folder)) == 49_152
    assert load_chat(folder).stops == (2,)


@pytest.mark.rare
@needs_smollm2
def test_the_real_smollm2_from_its_gguf_file(cache: Path, with_gguf: None) -> None:
    folder = Path(check_model(str(GGUF)))
    ours, theirs = (
        Policy(ModelSettings(path=str(each))).score_ids(list(range(100, 150))) for each in (folder, FOLDER)
    )
    np.testing.assert_array_equal(ours, theirs)
    assert load_chat(str(folder)).stops == (2,)
