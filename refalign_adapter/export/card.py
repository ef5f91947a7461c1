"""The model card that is saved with an adapter: what is known of it, how to use it, what it cannot do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from ..config import RefAlignConfig
from .formats import format_of

REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")
UNKNOWN_BASE = "path/to/the/base"

USAGE = """\
import torch
from diffusers import DiffusionPipeline

import refalign_adapter as ra

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
dtypes = {{"default": dtype, "vae": torch.float32}}
base = DiffusionPipeline.from_pretrained("{base}", torch_dtype=dtypes)

pipe = ra.load_adapter(base.to(device), "{adapter}")
video = pipe(
    "a woman walks her dog along the beach",
    reference_images=["woman.png", "dog.png"],
    height=480,
    width=832,
    num_frames=81,
    num_inference_steps=50,
    image_guidance_scale=5.0,
    guidance_scale=7.5,
    generator=torch.Generator().manual_seed(0),
).frames[0]
ra.write_video("beach.mp4", video, fps=16)
"""

STOCK_USAGE = """
diffusers itself loads the LoRA too, and applies it in the same way, but takes no reference images then:

```python
base.load_lora_weights("{adapter}")  # in place of ra.load_adapter
```
"""

BODY = """\
{front}
# Reference-to-video adapter{for_base}

{what}: give a prompt and pictures of the subjects,
get a video in which they are to appear. The method is RefAlign (arXiv 2603.25743); the vision encoders and projectors
that it trains with are not part of the adapter and are not needed to use it.

## Usage

With the Python package `refalign-adapter`:

```python
{usage}```

`reference_images` takes paths, PIL images or arrays, for several prompts one list each. A step runs the transformer
three times; twice when one of the two guidance scales is 1 or both are equal, once when both are 1.
{stock_usage}
## Configuration

{table}

{written}

## Limits

{limits}
- No evaluation is recorded in this card.
"""

WHAT = {
    True: "A LoRA that lets a frozen text-to-video transformer take reference images",
    False: "How reference images reach a text-to-video transformer that was trained whole to take them",
}
"""Whether there is a LoRA -> what the adapter is."""
WRITTEN = """\
Written out in `refalign_config.json`; the LoRA's own fields are in the metadata of
`{file_name}` too."""
WRITTEN_ALONE = (
    "Written out in `refalign_config.json`, which is all of it: there is no LoRA (r 0) and no file of weights."
)
BARE_LIMITS = (
    "It holds no weights: references mean something only to the base that was trained with it, and of several bases "
    "of its shape nothing in the file tells which one that is.",
)
SCOPE_LIMITS = {
    "all": ("It changes the base: with the adapter loaded, videos without references differ from the base's.",),
    "reference": (
        "Only `load_adapter` loads it: the LoRA acts on reference tokens alone, and a loader that knows nothing of "
        "that would apply it to video tokens too. `load_lora_weights` of diffusers refuses the file.",
        "For the same reason it cannot be fused into the base's weights, nor converted into a LoRA for other tools.",
        "Without references it does nothing: videos are the base's own, and other LoRAs keep their effect.",
    ),
}
COSTS = {
    "joint": "References take part in attention as further frames, so each one costs about as much as one more latent "
    "frame.",
    "isolated": "References run through the transformer once per video; every step then reads their keys and values, "
    "which take memory.",
}


def model_card(config: RefAlignConfig, adapter: str = ".") -> str:
    """The adapter's `README.md`: YAML front matter for the Hub, a usage snippet that runs, configuration, limits.

    Args:
        config: of the adapter.
        adapter: what the usage snippet loads: a folder or a Hub id. The default is the folder that the card is in.
    """
    base = _hub_id(config.base_model)
    return BODY.format(
        front=_front_matter(config, base),
        for_base=f" for {base}" if base else "",
        usage=USAGE.format(base=base or UNKNOWN_BASE, adapter=adapter),
        stock_usage=STOCK_USAGE.format(adapter=adapter) if _is_stock(config) else "",
        what=WHAT[config.r > 0],
        table=_table(config),
        written=WRITTEN.format(file_name=format_of(config).file_name) if config.r else WRITTEN_ALONE,
        limits="\n".join(f"- {line}" for line in _limits(config)),
    )


def _limits(config: RefAlignConfig) -> list[str]:
    facts = ", ".join(f"{name} {value}" for name, value in config.base.items()) or "the one it was trained on"
    lines = [f"It fits bases of one shape only: {facts}. Others are refused."]
    return [*lines, *(SCOPE_LIMITS[config.lora_scope] if config.r else BARE_LIMITS), COSTS[config.attention]]


def _is_stock(config: RefAlignConfig) -> bool:
    """Whether diffusers' own loader takes the LoRA."""
    return config.lora_scope == "all" and config.r > 0


def _hub_id(name: str | None) -> str | None:
    """`name` if it can be a Hub id; a path on the machine of training helps nobody else."""
    return name if name and REPOSITORY.fullmatch(name) and not Path(name).exists() else None


def _front_matter(config: RefAlignConfig, base: str | None) -> str:
    """What the Hub reads. `diffusers` and `lora` make it show how to load the repository with diffusers alone."""
    family, stock = config.base.get("family"), _is_stock(config)
    values: dict[str, Any] = {
        **({"base_model": base, "base_model_relation": "adapter"} if base else {}),
        "library_name": "diffusers" if stock else "refalign-adapter",
        "pipeline_tag": "text-to-video",
        "tags": [
            *(["lora"] if stock else []),
            *("reference-to-video", "refalign", "refalign-adapter"),
            *([family] if family else []),
        ],
    }
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---\n"


def _table(config: RefAlignConfig) -> str:
    layers = config.align_layers
    rows = {
        "attention": config.attention,
        **({"LoRA scope": config.lora_scope} if config.r else {}),
        **_reference_rows(config),
        **_dropped_rows(config),
        "r": config.r,
        **(_lora_rows(config) if config.r else {}),
        "aligned blocks": f"the first {layers}" if isinstance(layers, int) else ", ".join(map(str, layers)),
        "teachers": ", ".join(_teacher_name(name) for name in config.teachers) or "none",
        "text tokens": config.max_sequence_length,
    }
    cells = ((name, str(value).replace("|", "\\|")) for name, value in rows.items())
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in cells)])


def _lora_rows(config: RefAlignConfig) -> dict[str, Any]:
    modules = config.target_modules
    return {
        "lora_alpha": config.lora_alpha,
        "target modules": f"`{modules}`" if isinstance(modules, str) else ", ".join(modules or ("the family's own",)),
    }


def _dropped_rows(config: RefAlignConfig) -> dict[str, Any]:
    zeros = config.null_reference == "zeros"
    return {"in place of dropped references": "latents of zero"} if zeros else {}


def _reference_rows(config: RefAlignConfig) -> dict[str, Any]:
    """What only references of one attention have."""
    if config.attention != "isolated":
        return {"references' timestep": "0"} if config.reference_timestep == "clean" else {}
    frame, scale, size = config.reference_frame, config.reference_scale, config.reference_size
    share = "the video's" if scale == 1 else f"{scale:g} of the video's height and width"
    beyond = config.reference_place == "beyond"
    return {
        "first reference's frame": "the one after the video" if frame is None else frame,
        **({"references' rows and columns": "begin where the video's end"} if beyond else {}),
        "reference canvas": share if size is None else f"{size[0]} x {size[1]} pixels (height x width)",
        "white padding": "left out" if config.drop_background else "kept",
    }


def _teacher_name(name: str) -> str:
    return _hub_id(name) or "a local model"
