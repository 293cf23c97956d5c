"""The colour that a LoRA teaches tiny_video, and how it is told from those that the model knows."""

import torch

from viditq.data.moving_shapes import COLORS, SCENES, draw_scenes, render
from viditq.tiny.concept import WORD, concept_caption, concept_clips, concept_scenes, object_colors
from viditq.tiny.networks import vocabulary
from viditq.tiny.text import t5_tokenizer


def test_the_scenes_to_learn_and_to_judge_on_are_all_and_share_none() -> None:
    learned, judged = concept_scenes(held_out=False), concept_scenes(held_out=True)
    assert (len(learned), len(judged)) == (88, 32) and len({*learned, *judged}) == 120
    assert concept_scenes(held_out=True, seed=1) != judged
    assert len({concept_caption(scene) for scene in (*learned, *judged)}) == 120


def test_its_captions_have_one_word_that_no_other_has_and_as_many_tokens() -> None:
    tokens = t5_tokenizer()([concept_caption(scene) for scene in concept_scenes(held_out=True)])["input_ids"]
    unknown = vocabulary().index("<unk>")
    assert WORD not in vocabulary() and all(ids[2] == unknown and ids.count(unknown) == 1 for ids in tokens)
    assert {len(ids) for ids in tokens} == {len(t5_tokenizer()(SCENES[0].caption(video=True))["input_ids"])}


def test_every_colour_is_read_from_clips_also_from_noisy_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    scenes = draw_scenes(256, generator)
    clips = render(scenes, generator)
    noisy = clips + 0.05 * torch.randn(clips.shape, generator=generator)
    names = [list(COLORS)[scene.color] for scene in scenes]
    assert object_colors(clips, scenes) == names and object_colors(noisy, scenes) == names
    scenes = concept_scenes(held_out=False)
    assert set(object_colors(concept_clips(scenes, generator), scenes)) == {WORD}


def test_an_empty_clip_has_no_colour() -> None:
    scenes = concept_scenes(held_out=True)[:2]
    clips = render(scenes, torch.Generator().manual_seed(0))
    background = clips[:, :1, :, :1, :1].expand_as(clips)
    assert object_colors(background, scenes) == ["", ""]
