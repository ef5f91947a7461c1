"""References on a canvas smaller than the video's, and which of their tokens show more than white padding."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from seals import unseal

from refalign_adapter.data.cache.dataset import open_cache
from refalign_adapter.data.cache.index import read_index
from refalign_adapter.data.cache.parts import PartStore
from refalign_adapter.data.check.inspection import canvas_of
from refalign_adapter.data.sources.manifest import load_manifest
from refalign_adapter.errors import ConfigError, UserError
from refalign_adapter.media.canvas import prepare_reference
from refalign_adapter.media.images import read_image, read_mask
from refalign_adapter.media.sizes import Size


@pytest.fixture(scope="module")
def economical(options, encoders, build_options, tmp_path_factory):
    """Options of a finished cache of 64x96 videos with references of half that size; the subjects are slim pillars."""
    folder = tmp_path_factory.mktemp("economical")
    shutil.copytree(Path(options.train_data).parent, folder / "data")
    pillar = np.zeros((40, 30), np.uint8)
    pillar[:, 12:18] = 255
    for path in (folder / "data/masks").iterdir():
        Image.fromarray(pillar).save(path)
    options = replace(
        options,
        train_data=str(folder / "data"),
        cache_dir=str(folder / "cache"),
        height=64,
        width=96,
        reference_scale=0.5,
        drop_background=True,
    )
    report = build_options(options, encoders)
    assert dict(report.made) == {"video": 4, "references": 4, "text": 5, "teacher": 4, "tokens": 4}
    return options


def canvas(reference):
    """uint8 (32, 48, 3), half of the video's size."""
    mask = read_mask(reference.mask)
    return np.asarray(prepare_reference(read_image(reference.image), height=32, width=48, mask=mask))


def test_all_encoders_see_the_small_canvas(economical, encoders):
    dataset, rows = open_cache(economical), load_manifest(economical.train_data)
    teacher = economical.teachers[0]
    for index, row in enumerate(rows):
        sample = dataset[index]
        assert sample.latents.shape == (16, 2, 8, 12)
        assert sample.references.shape[1:] == (len(row.references), 16, 4, 6)
        assert sample.targets["reference"][teacher].shape[1:] == (len(row.references), 2, 3, 24)
        if row.pair == "cross":
            images = np.stack([canvas(reference) for reference in row.references])
            images = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
            encoded = encoders.family.encode_images(encoders.pipe, images * 2 - 1)
            assert torch.equal(sample.references[0], encoded.bfloat16())
            features = encoders.teachers[teacher].encode(images, (2, 3))
            assert torch.equal(sample.targets["reference"][teacher][0], features.bfloat16())


def test_tokens_say_where_anything_but_white_is_seen(economical):
    dataset, rows = open_cache(economical), load_manifest(economical.train_data)
    for index, row in enumerate(rows):
        sample = dataset[index]
        assert sample.tokens.dtype == torch.bool
        assert sample.tokens.shape == (*sample.references.shape[:2], 2, 3)
        assert sample.tokens[..., 1].any(-1).all()
        if row.pair == "cross":
            for reference, tokens in zip(row.references, sample.tokens[0], strict=True):
                seen = (canvas(reference) != 255).any(-1)
                marks = [[bool(seen[y : y + 16, x : x + 16].any()) for x in (0, 16, 32)] for y in (0, 16)]
                assert tokens.tolist() == marks == [[False, True, False]] * 2  # 5 of 48 columns, in the middle


def test_tokens_of_augmented_references_are_those_of_each_variant(economical, encoders, build_options, tmp_path):
    changes = {"cache_dir": str(tmp_path), "reference_variants": 8, "teachers": ()}
    build_options(economical, encoders, **changes)
    sample = open_cache(replace(economical, **changes))[1]
    assert sample.tokens.shape == (8, 2, 2, 3)
    assert len({variant.numpy().tobytes() for variant in sample.tokens}) > 1


@pytest.mark.parametrize(
    ("changes", "made"),
    [
        ({"reference_scale": 0.7}, {"references": 4, "teacher": 4, "tokens": 4}),
        ({"reference_scale": 1.0, "reference_size": (48, 32)}, {"references": 4, "teacher": 4, "tokens": 4}),
        ({"reference_scale": 1.0, "reference_size": (32, 48)}, {}),  # the canvas that it has
        ({"keep_background": True}, {"references": 4, "teacher": 4, "tokens": 4}),
        ({"dtype": "fp16"}, {"video": 4, "references": 4, "text": 5, "teacher": 4}),
        ({"seed": 1}, {"references": 2, "teacher": 2, "tokens": 2}),
        ({"teacher_grid": "native"}, {"teacher": 4}),
    ],
    ids=lambda value: next(iter(value), "nothing"),
)
def test_tokens_are_made_anew_with_what_they_show(economical, encoders, build_options, tmp_path, changes, made):
    copy = shutil.copytree(economical.cache_dir, tmp_path / "cache")
    assert dict(build_options(economical, encoders, cache_dir=str(copy), **changes).made) == made


def test_a_missing_part_is_made_again_alone(economical, encoders, build_options, tmp_path):
    copy = shutil.copytree(economical.cache_dir, tmp_path / "cache")
    key = read_index(copy, "train")[3].parts.tokens
    before = PartStore(copy).path("tokens", key).read_bytes()
    PartStore(copy).path("tokens", key).unlink()
    assert dict(build_options(economical, encoders, cache_dir=str(copy)).made) == {"tokens": 1}
    assert PartStore(copy).path("tokens", key).read_bytes() == before


def test_a_cache_from_before_these_options_is_one_of_whole_references(cached, tmp_path):
    options, _ = cached
    copy = shutil.copytree(options.cache_dir, tmp_path / "cache")
    assert "tokens" not in (copy / "index-train.jsonl").read_text()
    meta = json.loads((copy / "meta.json").read_text())
    for name in ("reference_scale", "drop_background", "reference_size"):
        del meta["options"][name]
    (copy / "meta.json").write_text(json.dumps(meta))
    unseal(copy)
    dataset = open_cache(replace(options, cache_dir=str(copy)))
    assert dataset[0].tokens is None
    assert (dataset.meta.options["reference_scale"], dataset.meta.options["drop_background"]) == (1.0, False)


def test_a_canvas_of_their_own_is_the_same_for_every_size_of_clips(cached, encoders, build_options, tmp_path):
    options, _ = cached
    buckets = (Size(5, 32, 48), Size(5, 48, 32))
    sized = replace(options, buckets=buckets, reference_size=(32, 32), cache_dir=str(tmp_path / "cache"))
    report = build_options(sized, encoders)
    assert (report.made["references"], report.made["teacher"]) == (4, 4)
    dataset = open_cache(sized)
    assert {tuple(dataset[index].references.shape[-2:]) for index in range(4)} == {(4, 4)}
    assert json.loads((tmp_path / "cache/meta.json").read_text())["options"]["reference_size"] == [32, 32]
    for other, told in ((None, "None"), ((32, 48), r"\[32, 48\]")):
        with pytest.raises(UserError, match=rf"was made with reference_size \[32, 32\] instead of {told}"):
            open_cache(replace(sized, reference_size=other))
    assert {canvas_of(size, sized) for size in buckets} == {(32, 32)}


def test_a_canvas_that_cannot_be_is_told(options, encoders):
    problem = "reference_size must be a multiple of what a token covers, [16, 16] pixels, got [40, 32]; try [32, 32]"
    with pytest.raises(ConfigError) as caught:
        encoders.check_sizes(replace(options, reference_size=(40, 32)))
    assert caught.value.problems == [problem]
    with pytest.raises(ConfigError, match=r"beside reference_scale 0.5, which says it too; leave one of them out"):
        replace(options, reference_size=(32, 32), reference_scale=0.5)
