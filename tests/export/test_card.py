"""The model card: front matter that the Hub reads, a usage snippet that runs, no paths of the machine of training."""

import re

import yaml
from huggingface_hub import ModelCard
from tiny_adapter import picture, save_tiny_adapter
from tiny_models import save_tiny_pipeline

import refalign_adapter as ra
from refalign_adapter.data.video import read_video
from refalign_adapter.export.card import model_card

BASE = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
SMALLER = {
    "height=480": "height=32",
    "width=832": "width=48",
    "num_frames=81": "num_frames=5",
    "num_inference_steps=50": "num_inference_steps=1",
}


def front_matter(card):
    return yaml.safe_load(card.split("---")[1])


def test_the_usage_snippet_runs(tmp_path, monkeypatch):
    folder = save_tiny_adapter(tmp_path / "adapter", base_model=BASE)
    card = (folder / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    for given, smaller in SMALLER.items():
        assert snippet.count(given) == 1
        snippet = snippet.replace(given, smaller)
    # The snippet says where the base and the adapter are: an id on the Hub, this folder. Here both are folders.
    save_tiny_pipeline(folder / BASE)
    for seed, name in enumerate(["woman.png", "dog.png"]):
        picture(seed).save(folder / name)
    monkeypatch.chdir(folder)
    exec(compile(snippet, "README.md", "exec"), {"__name__": "__main__"})
    assert read_video("beach.mp4", num_frames=5, height=32, width=48).shape == (5, 32, 48, 3)


def test_front_matter():
    card = model_card(ra.RefAlignConfig(base_model=BASE, base={"family": "wan", "num_layers": 30}))
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
