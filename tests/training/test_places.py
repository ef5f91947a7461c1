"""From a cache to a video: references at other places, of another size, and zeros for those that are dropped."""

import math

import pytest
import torch
from tiny_models import tiny_pipeline

import refalign_adapter as ra
from refalign_adapter.data.cache.build import cache_dataset
from refalign_adapter.data.cache.dataset import open_cache
from refalign_adapter.recipes.cache_options import options_of
from refalign_adapter.training.loop import train
from refalign_adapter.training.tracking import read_metrics

WAYS = {
    "Stand-In's": (
        "adapter.attention=isolated",
        "adapter.lora_scope=reference",
        "adapter.reference_frame=-1",
        "adapter.reference_place=beyond",
        "adapter.reference_size=[32, 64]",
    ),
    "the released code's": ("adapter.null_reference=zeros", "dropout.references=0.5"),
    "isolated, with zeros": (
        "adapter.attention=isolated",
        "adapter.lora_scope=reference",
        "adapter.null_reference=zeros",
        "dropout.references=0.5",
    ),
    "IC-LoRA's": ("adapter.reference_timestep=clean",),
}
SIZE = {"height": 48, "width": 48, "num_frames": 5}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_of_every_way_writes_an_adapter_that_makes_videos(make_recipe, tiny_world, tmp_path, way):
    own_cache = [f"data.cache_dir={tmp_path / 'cache'}"] if "Stand-In" in way else []
    steps = ("max_train_steps=2", "optimizer=adamw", "validation_steps=2", "sample_steps=2")
    prompts = f"sample_prompts=[{{prompt: a cat, references: [{tiny_world / 'clips/1_0.png'}]}}]"
    recipe = make_recipe(*WAYS[way], *own_cache, *steps, prompts, "sample.num_inference_steps=1")
    if own_cache:
        cache_dataset(options_of(recipe), device="cpu")
        assert open_cache(options_of(recipe))[0].references.shape[-2:] == (4, 8)
    train(recipe)
    rows = read_metrics(tmp_path / "out/metrics.jsonl")
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    assert rows[-1]["step"] == 2
    assert list((tmp_path / "out/samples/step-2").glob("*.mp4"))
    pipe = ra.load_adapter(tiny_pipeline(), tmp_path / "out/adapter")
    pipe.set_progress_bar_config(disable=True)
    for name, value in recipe.adapter.model_dump().items():
        if f"adapter.{name}" in " ".join(WAYS[way]):
            saved = getattr(pipe.branch.config, name)
            assert (list(saved) if isinstance(value, list) else saved) == value
    given = {**SIZE, "num_inference_steps": 1, "output_type": "latent"}
    noise = torch.randn(1, 16, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    images = [tiny_world / "clips/1_0.png"]
    videos = [pipe("a cat", references, latents=noise, **given).frames for references in (images, None)]
    assert videos[0].isfinite().all()
    assert not torch.equal(*videos)
