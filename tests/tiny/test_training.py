"""Training: the packed form of the tower, and continuing after an interruption."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.tiny.batching import Collator
from qwen2vl_trt.tiny.model import TinyModel, checkpoint_tensors
from qwen2vl_trt.tiny.scenes import FPS, TASKS, held_out_scenes
from qwen2vl_trt.tiny.tokenizer import IMAGE_MEAN, IMAGE_STD
from qwen2vl_trt.tiny.train import Recipe, Trainer, train
from qwen2vl_trt.vision import VisionTransformer
from qwen2vl_trt.windows import window_layout

RECIPE = Recipe(steps=2, warmup=1, batch_limit=6)


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return Trainer(RECIPE, torch.float32)


def run(folder: Path, stops: list[int | None]) -> Trainer:
    for stop in stops:
        result = Trainer(RECIPE)
        result.resume(folder / "state.pt")
        train(result, folder, stop_after=stop, monitor_cases=1, monitor_every=1)
    return result


def test_an_interrupted_run_equals_a_straight_one(tmp_path: Path) -> None:
    straight, interrupted = run(tmp_path / "a", [None]), run(tmp_path / "b", [1, None])
    assert straight.step == interrupted.step == 2
    torch.testing.assert_close(interrupted.weights.master, straight.weights.master, rtol=0, atol=1e-6)
    torch.testing.assert_close(interrupted.weights.moving, straight.weights.moving, rtol=0, atol=1e-6)
    curve = (tmp_path / "b" / "curve.csv").read_text().splitlines()
    assert len(curve) == 3
    assert curve[0].startswith("step,seconds,loss,read,count,two_images,video")


def test_weights_follow_their_masters(trainer: Trainer) -> None:
    with trainer.weights.averaged():
        pass
    ours = dict(trainer.model.named_parameters())
    assert sum(p.numel() for p in ours.values()) == trainer.weights.master.numel()
    assert trainer.weights.weights.data_ptr() <= ours["visual.merger.mlp.0.weight"].data_ptr()


def test_packed_patches_give_the_towers_embeddings(trainer: Trainer) -> None:
    model, collator = trainer.model, trainer.collator
    config = model.config.vision
    scenes = [scene for task in TASKS for scene in held_out_scenes(task, 3, seed=5)]
    batch = collator(scenes)
    assert batch.patches is not None
    tower = VisionTransformer(config)
    tower.load_state_dict(model.visual.state_dict())

    items = [collator.patches(item) for s in scenes for item in [[i] for i in s.images] + [v for v, _ in s.videos]]
    grids = tuple(grid for _, grid in items)
    layout = window_layout(grids, config)
    raster = torch.zeros(*layout.sequence_index.shape, config.qwen2_vl_dim)
    frames = [frame for patches, _ in items for frame in patches.unbind(0)]
    for number, frame in enumerate(frames):
        pixels = frame.view(len(frame), 3, -1).float() / 255
        pixels = (pixels - torch.tensor(IMAGE_MEAN)[:, None]) / torch.tensor(IMAGE_STD)[:, None]
        raster[number, : len(frame)] = pixels.flatten(1)
    packed = raster.flatten(0, 1)[layout.sequence_position]
    with torch.no_grad():
        expected = tower(
            packed,
            *layout.index_tensors.values(),
        )
        torch.testing.assert_close(model.embed(batch.patches), expected, rtol=1e-4, atol=1e-5)


def test_the_checkpoint_has_the_published_names(trainer: Trainer) -> None:
    tensors = checkpoint_tensors(trainer.model, torch.bfloat16)
    assert tensors["visual.patch_embed.proj.weight"].shape == (128, 3, 2, 14, 14)
    assert "model.embed_tokens.weight" in tensors
    assert "lm_head.weight" not in tensors
    assert sum(tensor.numel() * 2 for tensor in tensors.values()) < 10e6


def test_transformers_predicts_the_same(trainer: Trainer, tmp_path: Path) -> None:
    """Pixels, positions and model: an exported checkpoint answers in Transformers as in training."""
    from PIL import Image
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    trainer.export(tmp_path)
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(tmp_path)
    ours = TinyModel(trainer.model.config)
    with trainer.weights.averaged():
        ours.load_state_dict({n: t.bfloat16().float() for n, t in trainer.model.state_dict().items()})
    for task in TASKS:
        scene = held_out_scenes(task, 1, seed=4)[0]
        text = processor.apply_chat_template(scene.messages, tokenize=False, add_generation_prompt=True)
        inputs = processor(
            text=[text + scene.answer],
            images=[Image.fromarray(image) for image in scene.images] or None,
            videos=[[Image.fromarray(frame) for frame in frames] for frames, _ in scene.videos] or None,
            video_metadata=[[{"fps": FPS, "total_num_frames": len(frames)}] for frames, _ in scene.videos] or None,
            return_tensors="pt",
        )
        batch = trainer.collator([scene], reaching=[False])
        assert inputs["input_ids"][0].tolist() == batch.token_ids[0, :-1].tolist()
        with torch.no_grad():
            expected = theirs(**inputs).logits[0][batch.predict_index]
            torch.testing.assert_close(ours(batch), expected, rtol=0, atol=0.05)


def test_text_after_a_video_resumes_in_both_ways(trainer: Trainer) -> None:
    scene = max(held_out_scenes("video", 20, seed=0), key=lambda scene: len(scene.answer))
    reaching, short = trainer.collator([scene], reaching=[True]), trainer.collator([scene], reaching=[False])
    config: Qwen2VLConfig = trainer.model.config
    last = int((reaching.token_ids[0] == config.video_token_id).nonzero().max())
    assert torch.equal(reaching.position_ids[..., : last + 1], short.position_ids[..., : last + 1])
    before = reaching.position_ids[:, 0, : last + 1]
    assert reaching.position_ids[0, 0, last + 1] == before.max() + 1
    assert short.position_ids[0, 0, last + 1] == before[1:].max() + 1


def test_learning_rate_rises_and_falls() -> None:
    recipe = dataclasses.replace(Recipe(), steps=100, warmup=10)
    rates = [recipe.learning_rate_at(step) for step in range(101)]
    assert max(rates) == pytest.approx(recipe.learning_rate)
    assert rates.index(max(rates)) in (9, 10)
    assert rates[-1] == pytest.approx(recipe.final_learning_rate)


def test_collator_pads_on_the_right(trainer: Trainer) -> None:
    collator: Collator = trainer.collator
    batch = collator(held_out_scenes("read", 5, seed=1))
    lengths = [len(row[row != collator.padding]) for row in batch.token_ids]
    assert max(lengths) == batch.token_ids.shape[1]
    assert all((row[length:] == collator.padding).all() for row, length in zip(batch.token_ids, lengths, strict=True))
    assert batch.targets[-1] == collator.end
