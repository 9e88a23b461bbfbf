"""The data: one split for ever, scenes that a seed reproduces, and sizes that really vary."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from qwen2vl_trt.runtime.preprocessing.settings import smart_resize
from qwen2vl_trt.tiny import scenes
from qwen2vl_trt.tiny.digits import load_split
from qwen2vl_trt.tiny.scenes import AUGMENTED, PLAIN, TASKS, Scene, evaluation_scene, training_scenes


def held_out(task: str, count: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [evaluation_scene(rng, load_split()[1], task, number) for number in range(count)]


def pictures(scene: Scene) -> list[scenes.Pixels]:
    return scene.images + [frame for frames, _ in scene.videos for frame in frames]


def same(first: Scene, second: Scene) -> bool:
    return (
        (first.task, first.messages, first.answer) == (second.task, second.messages, second.answer)
        and len(pictures(first)) == len(pictures(second))
        and all(np.array_equal(a, b) for a, b in zip(pictures(first), pictures(second), strict=True))
    )


def test_split_is_disjoint_complete_and_stratified() -> None:
    training, held = load_split()
    assert not set(training.indices) & set(held.indices)
    assert sorted([*training.indices, *held.indices]) == list(range(1797))
    for label in range(10):
        share = len(held.by_label[label]) / (len(held.by_label[label]) + len(training.by_label[label]))
        assert share == pytest.approx(0.2, abs=0.005)


def test_split_is_the_one_the_checkpoint_was_trained_with() -> None:
    training, held = load_split()
    assert (len(training.labels), len(held.labels)) == (1438, 359)
    load_split.cache_clear()
    again = load_split()
    assert np.array_equal(again[1].indices, held.indices)
    assert held.indices[:8].tolist() == FIRST_HELD_OUT


FIRST_HELD_OUT = [5, 15, 17, 18, 20, 21, 27, 35]


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_reproduces_a_scene(task: str) -> None:
    assert all(map(same, held_out(task, 5), held_out(task, 5)))
    assert not all(map(same, held_out(task, 5), held_out(task, 5, seed=1)))


def test_a_training_step_reproduces_its_scenes() -> None:
    first, again, next_step = (training_scenes(3, step)[:4] for step in (5000, 5000, 5001))
    assert all(map(same, first, again))
    assert not all(map(same, first, next_step))
    assert not all(map(same, first, training_scenes(3, 5001)))


def test_scenes_vary_in_size_and_aspect() -> None:
    images = [scene.images[0] for scene in held_out("read", 300)]
    sides = np.array([image.shape[:2] for image in images])
    aspect = sides[:, 1] / sides[:, 0]
    assert (aspect > 2).sum() > 20
    assert (aspect < 0.6).sum() > 10
    assert (abs(aspect - 1) < 0.05).sum() > 10
    assert (sides % 28 != 0).all(axis=1).mean() > 0.5
    assert (sides > 112).any(axis=1).mean() > 0.2
    groups = [np.prod(smart_resize(*side, 28, 4 * 784, 64 * 784)) // 784 for side in sides.tolist()]
    assert min(groups) == 4
    assert max(groups) > 40
    assert np.mean(groups) < 20
    assert max(groups) <= 64


def test_answers_cover_every_digit_and_length() -> None:
    answers = [scene.answer for scene in held_out("read", 200)]
    assert set("".join(answers)) == set("0123456789")
    assert set(map(len, answers)) == {1, 2, 3, 4, 5}
    assert {scene.answer for scene in held_out("count", 60)} == set("12345")
    assert {len(scene.answer) for scene in held_out("video", 60)} == {1, 2, 3, 4}


def test_two_images_rotates_its_questions() -> None:
    cases = held_out("two_images", 6)
    assert Counter(scene.messages[0]["content"][-1]["text"] for scene in cases) == {
        scenes.FIRST_PROMPTS[0]: 2,
        scenes.SECOND_PROMPTS[0]: 2,
        scenes.BOTH_PROMPTS[0]: 2,
    }
    assert all(len(scene.images) == 2 for scene in cases)
    assert cases[2].answer.startswith("first image: ")
    assert ", second image: " in cases[2].answer


def test_a_video_has_two_frames_a_digit() -> None:
    for scene in held_out("video", 10):
        ((frames, fps),) = scene.videos
        assert len(frames) == 2 * len(scene.answer)
        assert fps == 2
        assert len({frame.shape for frame in frames}) == 1


@pytest.mark.parametrize("style", [PLAIN, AUGMENTED])
def test_ink_stands_out_from_paper(style: scenes.Style) -> None:
    rng = np.random.default_rng(0)
    for label in range(10):
        ink = scenes.draw_digit(rng, load_split()[0], label, 32, style)
        assert ink.shape == (32, 32)
        assert 0.03 < (ink > 0.5).mean() < 0.6
