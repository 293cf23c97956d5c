"""The shape that a LoRA teaches tiny_video, and how it is told from those that the model knows."""

import torch

from viditq.data.moving_shapes import SCENES, draw_scenes, render
from viditq.tiny.concept import WORD, concept_caption, concept_clips, concept_scenes, shows_ring
from viditq.tiny.networks import vocabulary
from viditq.tiny.text import t5_tokenizer


def test_the_scenes_to_learn_and_to_judge_on_are_all_and_share_none() -> None:
    learned, judged = concept_scenes(held_out=False), concept_scenes(held_out=True)
    assert (len(learned), len(judged)) == (53, 32) and len({*learned, *judged}) == 85
    assert concept_scenes(held_out=True, seed=1) != judged
    assert len({concept_caption(scene) for scene in (*learned, *judged)}) == 85


def test_its_captions_have_one_word_that_no_other_has_and_as_many_tokens() -> None:
    tokens = t5_tokenizer()([concept_caption(scene) for scene in concept_scenes(held_out=True)])["input_ids"]
    unknown = vocabulary().index("<unk>")
    assert WORD not in vocabulary() and all(ids[3] == unknown and ids.count(unknown) == 1 for ids in tokens)
    assert {len(ids) for ids in tokens} == {len(t5_tokenizer()(SCENES[0].caption(video=True))["input_ids"])}


def test_rings_are_told_from_every_other_shape_also_where_clips_are_noisy() -> None:
    generator = torch.Generator().manual_seed(0)
    scenes, others = concept_scenes(held_out=False), draw_scenes(256, generator)
    for clips, of, expected in (
        (concept_clips(scenes, generator), scenes, True),
        (render(others, generator), others, False),
    ):
        noisy = clips + 0.05 * torch.randn(clips.shape, generator=generator)
        assert {*shows_ring(clips, of), *shows_ring(noisy, of)} == {expected}


def test_an_empty_clip_shows_none() -> None:
    scenes = concept_scenes(held_out=True)[:2]
    background = concept_clips(scenes, torch.Generator().manual_seed(0))[:, :1, :, :1, :1]
    assert shows_ring(background.expand(-1, 8, -1, 32, 32), scenes) == [False, False]


def test_hollow_shapes_have_the_outline_of_filled_ones() -> None:
    scenes = [scene for scene in SCENES if scene.size == 1 and scene.motion == 4]
    filled = render(scenes, torch.Generator().manual_seed(0))
    hollow = render(scenes, torch.Generator().manual_seed(0), thickness=0.5)
    assert not torch.equal(filled, hollow)
    assert torch.equal(filled, render(scenes, torch.Generator().manual_seed(0), thickness=2.0))
