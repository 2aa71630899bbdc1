"""A packed row of sequences with pictures is computed as every sequence is by itself, by the model's own forward."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageTextToText

from learner.data.batch import MicroBatch, SequencePictures, TokenSequence, row_of, sequences_of
from learner.model.loading import ModelError
from learner.model.perception import RowMismatch
from learner.model.policy import Policy
from learner.settings import ModelSettings
from learner.training.publish import take_snapshot
from rollout.engines.hf_engine import HfEngine
from rollout.wire.trajectory import EndReason, Task, Trajectory, Turn
from rollout.wire.weights import WeightUpdate, inline
from tests.seeing import FAMILIES, build, picture

torch.set_num_threads(1)
Logprobs = np.ndarray


class Rig:
    """A policy, and the same checkpoint in plain transformers."""

    def __init__(self, family: str, folder: Path) -> None:
        self.folder = folder
        build(family, folder)
        self.policy = Policy(ModelSettings(path=str(folder)))
        assert self.policy.picture_inputs is not None
        self.placeholder = self.policy.picture_inputs.placeholder_id
        self.processor = AutoImageProcessor.from_pretrained(folder)
        self.plain = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()

    def sequence(self, seed: int, images: tuple[str, ...]) -> TokenSequence:
        """Text, every picture behind some text, and then a turn; three tokens of it are sampled."""
        rng = np.random.default_rng(seed)
        ids = rng.integers(3, 50, int(rng.integers(2, 5))).tolist()
        for shown in images:
            ids += [self.placeholder] * self.count(shown) + rng.integers(3, 50, 2).tolist()
        ids += rng.integers(3, 50, 3).tolist()
        size = len(ids)
        sampled = np.arange(size) >= size - 3
        zeros = np.zeros(size, np.float32)
        pictures = SequencePictures(images, f"row {seed}") if images else None
        return TokenSequence(np.array(ids, np.int32), sampled, zeros, zeros, sampled - 1, pictures=pictures)

    def count(self, shown: str) -> int:
        inputs = self.processor(images=self.processor.fetch_images([shown]), return_tensors="pt")
        grid = inputs.get("image_grid_thw")
        return 4 if grid is None else int(grid.prod()) // 4  # LLaVA: 16 pixels in patches of 8

    def packed(self, sequences: list[TokenSequence]) -> list[Logprobs]:
        with torch.no_grad():
            logprobs_N, _ = self.policy.score(row_of(sequences), 1.0)
        return np.split(logprobs_N.numpy(), len(sequences))

    @torch.no_grad()
    def alone(self, sequence: TokenSequence) -> Logprobs:
        """By the model's own forward, positions and all."""
        ids = torch.tensor(sequence.token_ids_T[None], dtype=torch.int64)
        inputs = {}
        if sequence.pictures:
            pictures = self.processor.fetch_images(list(sequence.pictures.images))
            inputs = dict(self.processor(images=pictures, return_tensors="pt"))
            if "image_grid_thw" in inputs:
                inputs["mm_token_type_ids"] = (ids == self.placeholder).int()
        logits = self.plain(input_ids=ids, **inputs).logits[0]
        logits[:, self.placeholder] = -torch.inf
        return logits[:-1].float().log_softmax(-1)[-3:].gather(1, ids[0, -3:, None])[:, 0].numpy()


@pytest.fixture(scope="module", params=FAMILIES)
def rig(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Rig:
    return Rig(request.param, tmp_path_factory.mktemp(request.param))


def test_packed_is_as_alone_and_pictures_are_seen_by_their_own_sequence_only(rig: Rig) -> None:
    wide = (16, 16) if rig.plain.config.model_type == "llava" else (16, 32)
    rows = [
        rig.sequence(1, (picture(1),)),
        rig.sequence(2, ()),
        rig.sequence(3, (picture(3), picture(4, *wide))),
        rig.sequence(4, (picture(5),)),
    ]
    packed = rig.packed(rows)
    for sequence, found in zip(rows, packed, strict=True):
        np.testing.assert_allclose(found, rig.alone(sequence), atol=1e-4)
    assert rows[2].pictures is not None
    other = replace(
        rows[2], pictures=replace(rows[2].pictures, images=(picture(30), rows[2].pictures.images[1]))
    )
    changed = rig.packed([*rows[:2], other, rows[3]])
    for place in (0, 1, 3):
        np.testing.assert_array_equal(changed[place], packed[place])
    assert np.abs(changed[2] - packed[2]).max() > 1e-3, "a picture that changes nothing is not seen"
    swapped = replace(
        other, pictures=replace(rows[2].pictures, images=tuple(reversed(rows[2].pictures.images)))
    )
    if wide == (16, 16):
        assert np.abs(rig.packed([swapped])[0] - packed[2]).max() > 1e-3, "pictures have an order"


def test_gradients_reach_what_sees(rig: Rig) -> None:
    logprobs_N, _ = rig.policy.score(row_of([rig.sequence(1, (picture(1),))]), 1.0)
    logprobs_N.sum().backward()
    moved = {name for name, x in rig.policy.model.named_parameters() if x.grad is not None and x.grad.any()}
    rig.policy.model.zero_grad()
    assert any("vision" in name or "visual" in name for name in moved)
    assert any("language_model" in name for name in moved)


def test_a_row_whose_placeholders_are_not_its_pictures_is_named(rig: Rig) -> None:
    sequence = rig.sequence(1, (picture(1),))
    fewer = replace(sequence, pictures=SequencePictures((), "row 7"))
    more = replace(sequence, pictures=SequencePictures((picture(1), picture(2)), "row 8"))
    with pytest.raises(
        RowMismatch, match=r"row 8: \d+ image tokens, but the processor makes \d+ features of 2"
    ):
        rig.packed([more])
    with pytest.raises(RowMismatch, match=r"row 7: .* 0 features of 0 pictures"):
        rig.packed([sequence, fewer])


def test_a_version_holds_in_an_engine_and_in_a_checkpoint(rig: Rig, tmp_path: Path) -> None:
    policy = Policy(ModelSettings(path=str(rig.folder)))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.01)
    snapshot = take_snapshot(policy, 1, "float32")
    engine = HfEngine(AutoModelForImageTextToText.from_pretrained(rig.folder, dtype=torch.float32), [1])
    report = asyncio.run(engine.sync(WeightUpdate(snapshot.manifest, inline(snapshot.arrays))))
    assert report.probe_difference < 1e-4
    policy.save(tmp_path)
    row = row_of([rig.sequence(5, (picture(5),))])
    with torch.no_grad():
        now, _ = policy.score(row, 1.0)
        again, _ = Policy(ModelSettings(path=str(tmp_path))).score(row, 1.0)
        before, _ = rig.policy.score(row, 1.0)
    assert torch.equal(now, again) and not torch.equal(now, before)


def test_pictures_of_a_segment_are_those_its_turns_were_shown() -> None:
    def step(turn: int, segment: int, *images: str) -> Turn:
        content = [{"type": "image", "image": each} for each in images]
        said = '[{"role": "user", "content": ' + str(content).replace("'", '"') + "}]"
        one, none = np.ones(1, np.int32), np.zeros(1, np.float32)
        return Turn(turn, segment, said, "", one, one, none, one, 0.0, "stop")

    a, b, c = picture(1), picture(2), picture(3)
    steps = (step(0, 0, a), step(1, 0), step(2, 0, b, c), step(3, 1, a))
    episode = Trajectory(7, 0, 2, Task.of("toy", 0), steps, EndReason.TERMINATED)
    found = sequences_of(episode, np.zeros(4, np.float32))
    assert [sequence.pictures for sequence in found] == [
        SequencePictures((a, b, c), "group 7, episode 2, segment 0"),
        SequencePictures((a,), "group 7, episode 2, segment 1"),
    ]


def test_a_model_that_reads_text_alone_refuses_pictures(tiny: Path) -> None:
    ids = np.arange(3, 9, dtype=np.int32)
    zeros = np.zeros(6, np.float32)
    blind = Policy(ModelSettings(path=str(tiny)))
    row: MicroBatch = row_of(
        [
            TokenSequence(
                ids,
                ids > 5,
                zeros,
                zeros,
                ids,
                pictures=SequencePictures((picture(1),), "group 3, episode 1"),
            )
        ]
    )
    with pytest.raises(ModelError, match="takes text only, but group 3, episode 1 has pictures"):
        blind.score(row, 1.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_close_as_transformers_is_in_it_and_the_tower_learns(
    family: str, tmp_path: Path
) -> None:
    rig = Rig(family, tmp_path)
    sequences = [rig.sequence(seed, (picture(seed),) if seed % 2 else ()) for seed in range(8)]
    exact_N = np.concatenate([rig.alone(sequence) for sequence in sequences])
    rig.plain = AutoModelForImageTextToText.from_pretrained(
        tmp_path, attn_implementation="eager", dtype=torch.bfloat16
    ).eval()
    theirs_N = np.concatenate([rig.alone(sequence) for sequence in sequences])
    policy = Policy(ModelSettings(path=str(tmp_path), dtype="bfloat16", gradient_checkpointing=True))
    logprobs_N, _ = policy.score(row_of(sequences), 1.0)
    apart = np.abs(logprobs_N.detach().numpy() - exact_N).mean()
    assert 0 < apart < 3 * np.abs(theirs_N - exact_N).mean()
    logprobs_N.sum().backward()
    learned = {name for name, p in policy.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("vis" in name for name in learned) and any("language" in name for name in learned)
