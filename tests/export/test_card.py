"""The model card: front matter that the Hub reads, usage snippets that run, no paths of the machine of training."""

import re

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from tiny_adapter import picture, save_tiny_adapter, velocity
from tiny_models import save_tiny_pipeline, tiny_pipeline

import refalign_adapter as ra
from refalign_adapter.export.card import model_card
from refalign_adapter.media.video import read_video

BASE = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
SMALLER = {
    "height=480": "height=32",
    "width=832": "width=48",
    "num_frames=81": "num_frames=5",
    "num_inference_steps=50": "num_inference_steps=1",
}


SCOPES = [("joint", "all"), ("isolated", "all"), ("isolated", "reference")]
REFERENCE = ra.RefAlignConfig(attention="isolated", lora_scope="reference")


def front_matter(card):
    return yaml.safe_load(card.split("---")[1])


def snippets(card):
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


@pytest.mark.parametrize(("attention", "lora_scope"), SCOPES)
def test_the_usage_snippets_run(tmp_path, monkeypatch, attention, lora_scope):
    folder = save_tiny_adapter(
        tmp_path / "adapter", base_model=BASE, attention=attention, lora_scope=lora_scope, align_layers=1
    )
    usage, *stock = snippets((folder / "README.md").read_text())
    assert len(stock) == (lora_scope == "all")
    for given, smaller in SMALLER.items():
        assert usage.count(given) == 1
        usage = usage.replace(given, smaller)
    # The snippet says where the base and the adapter are: an id on the Hub, this folder. Here both are folders.
    save_tiny_pipeline(folder / BASE)
    for seed, name in enumerate(["woman.png", "dog.png"]):
        picture(seed).save(folder / name)
    monkeypatch.chdir(folder)
    exec(compile(usage, "README.md", "exec"), {"__name__": "__main__"})
    assert read_video("beach.mp4", num_frames=5, height=32, width=48).shape == (5, 32, 48, 3)
    for snippet in stock:
        base = tiny_pipeline()
        before = velocity(base.transformer)
        exec(compile(snippet, "README.md", "exec"), {"base": base})
        assert not torch.equal(velocity(base.transformer), before)


def test_a_card_of_the_reference_scope_names_its_one_loader_and_what_cannot_be():
    card = model_card(REFERENCE, "you/adapter")
    assert len(snippets(card)) == 1
    assert 'ra.load_adapter(base.to(device), "you/adapter")' in card
    assert "`load_lora_weights` of diffusers refuses the file" in card
    assert "cannot be fused into the base's weights, nor converted" in card
    assert "videos are the base's own" in card
    assert "videos without references differ from the base's" not in card
    assert "`refalign_reference_lora.safetensors`" in card
    assert "pytorch_lora_weights" not in card
    # With these the Hub would show how to load the repository with diffusers alone.
    assert front_matter(card)["library_name"] == "refalign-adapter"
    assert "lora" not in front_matter(card)["tags"]


def test_a_card_of_the_scope_all_shows_diffusers_own_loader_too():
    for attention in ("joint", "isolated"):
        card = model_card(ra.RefAlignConfig(attention=attention, lora_scope="all"), "you/adapter")
        assert 'base.load_lora_weights("you/adapter")' in snippets(card)[1]
        assert "videos without references differ from the base's" in card


def test_what_references_cost_and_how_they_are_seen_is_that_of_the_attention():
    assert "about as much as one more latent frame" in model_card(ra.RefAlignConfig(attention="joint"))
    assert "reference canvas" not in model_card(ra.RefAlignConfig(attention="joint"))
    isolated = {"attention": "isolated", "reference_scale": 0.5, "drop_background": True, "reference_frame": 40}
    card = model_card(ra.RefAlignConfig(**isolated))
    assert "once per video; every step then reads their keys and values" in card
    assert "| reference canvas | 0.5 of the video's height and width |" in card
    assert "| first reference's frame | 40 |" in card
    assert "| white padding | left out |" in card


def test_what_came_later_is_told_where_it_is_not_the_default():
    default = model_card(ra.RefAlignConfig()) + model_card(ra.RefAlignConfig(attention="joint"))
    place = {"reference_frame": -1, "reference_place": "beyond", "reference_size": [512, 384]}
    isolated = model_card(ra.RefAlignConfig(attention="isolated", null_reference="zeros", **place))
    joint = model_card(ra.RefAlignConfig(attention="joint", reference_timestep="clean"))
    for card, row in (
        (isolated, "| first reference's frame | -1 |"),
        (isolated, "| references' rows and columns | begin where the video's end |"),
        (isolated, "| reference canvas | 512 x 384 pixels (height x width) |"),
        (isolated, "| in place of dropped references | latents of zero |"),
        (joint, "| references' timestep | 0 |"),
    ):
        assert row in card
        assert row not in default
    for name in ("rows and columns", "references' timestep", "in place of dropped"):
        assert name not in default


def test_front_matter():
    card = model_card(ra.RefAlignConfig(attention="joint", base_model=BASE, base={"family": "wan", "num_layers": 30}))
    assert card.startswith("---\n")
    assert front_matter(card) == {
        "base_model": BASE,
        "base_model_relation": "adapter",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-video",
        "tags": ["lora", "reference-to-video", "refalign", "refalign-adapter", "wan"],
    }
    assert ModelCard(card).data.to_dict()["base_model"] == BASE
    assert "family wan, num_layers 30" in card


def test_it_says_what_the_adapter_is():
    config = ra.RefAlignConfig(
        r=12, lora_alpha=34, target_modules=["to_q", "to_v"], align_layers=[0, 5], teachers=["a/b"]
    )
    card = model_card(config)
    for row in ("| r | 12 |", "| lora_alpha | 34 |", "| target modules | to_q, to_v |", "| aligned blocks | 0, 5 |"):
        assert row in card
    assert "| teachers | a/b |" in card
    assert not re.search(r"\{\w*\}", card)


def test_a_pattern_of_modules_does_not_break_the_table():
    card = model_card(ra.RefAlignConfig(target_modules=r"blocks\.(0|1)\.attn1\.to_q"))
    assert r"`blocks\.(0\|1)\.attn1\.to_q`" in card


def test_paths_of_the_machine_of_training_are_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "base").mkdir(parents=True)
    for base in (str(tmp_path / "models" / "base"), "models/base", "./base", None):
        card = model_card(ra.RefAlignConfig(base_model=base, teachers=[str(tmp_path / "teacher")]))
        assert "base_model" not in front_matter(card)
        assert str(tmp_path) not in card
        assert "models/base" not in card
        assert 'from_pretrained("path/to/the/base"' in card
        assert "| teachers | a local model |" in card


def test_it_loads_from_where_it_is_told():
    assert 'ra.load_adapter(base.to(device), ".")' in model_card(ra.RefAlignConfig())
    assert 'ra.load_adapter(base.to(device), "you/adapter")' in model_card(ra.RefAlignConfig(), "you/adapter")


def test_the_card_makes_no_claim_about_quality():
    card = model_card(ra.RefAlignConfig(base_model=BASE)).lower()
    assert not any(
        word in card for word in ("state of the art", "state-of-the-art", "best", "high-quality", "faithful")
    )
