"""How videos are generated from the command line, and the pipeline that these options ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState

from ..branch.attach import fit_config
from ..data.cache.options import DTYPES
from ..errors import ConfigError, UserError, one_line
from ..export.folder import open_adapter
from ..families._base_model import read_base_model
from ..families._pipeline_folder import open_pipeline, reading
from ..families.base import Family
from ..media.sizes import Size, size_misfits
from ..pipelines.base import MAX_REFERENCES
from ..pipelines.guidance import ALL_STEPS, check_scales
from ..pipelines.load import load_adapter
from ..pipelines.weights import check_fits

WEIGHTS = ("transformer", "vae", "text_encoder")
"""Components of the base that have weights."""
MOST = {"height": 16384, "width": 16384, "num_frames": 4093, "num_inference_steps": 10_000, "max_references": 64}
"""Sizes and frames: what the rotary tables of video DiTs reach, 1,024 tokens along an axis (Wan)."""
LEAST_FPS, MOST_FPS = 0.1, 1000
"""An mp4's rate is a fraction of small numbers: far below, another rate would be written."""
OFFLOADS = ("none", "model")
"""model: a model is on the GPU only while it runs, diffusers' `enable_model_cpu_offload`; slower, with less memory."""


@dataclass(frozen=True)
class GenerateOptions:
    """How videos are made; sizes and scales as in `WanReferencePipeline`.

    Attributes:
        base: folder or Hub id of a diffusers text-to-video pipeline.
        adapter: adapter folder or Hub id.
        negative_prompt: in place of the empty text.
        height, width: in pixels.
        num_frames, fps: frames, and how many are shown a second.
        num_inference_steps: at least 1.
        guidance_scale, image_guidance_scale: how strongly the prompt and the references pull.
        guidance_interval: [start, stop), shares of the steps in which they do.
        guidance_refresh: k: guidance is computed in the first two steps and every k-th, and kept between; 1: in all.
        batch_guidance: whether passes share calls of the transformer: faster on a large GPU, with more memory.
        seed: of a single video's noise; in a run of many, each key has a seed made of this one and the key.
        max_references: most images a prompt may have.
        device: None takes the GPU if there is one, else the CPU.
        dtype: fp32, fp16 or bf16, of transformer and text encoder; None takes bf16, on the CPU fp32. The VAE is fp32.
        offload: none or model.
        variant: of the base's weight files, such as fp16.
        revision, adapter_revision: of the Hub.

    Raises:
        ConfigError: every problem at once.
    """

    base: str
    adapter: str
    negative_prompt: str | None = None
    height: int = 480
    width: int = 832
    num_frames: int = 81
    fps: float = 16
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    image_guidance_scale: float = 5.0
    guidance_interval: tuple[float, float] = ALL_STEPS
    guidance_refresh: int = 1
    batch_guidance: bool = False
    seed: int = 0
    max_references: int = MAX_REFERENCES
    device: str | None = None
    dtype: str | None = None
    offload: str = "none"
    variant: str | None = None
    revision: str | None = None
    adapter_revision: str | None = None

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be a whole number from 1 to {most}, got {getattr(self, name)}"
            for name, most in MOST.items()
            if type(getattr(self, name)) is not int or not 1 <= getattr(self, name) <= most
        ]
        if not LEAST_FPS <= self.fps <= MOST_FPS:
            problems.append(f"fps must be from {LEAST_FPS} to {MOST_FPS}, got {self.fps}")
        if not 0 <= self.seed < 2**63:
            problems.append(f"seed must be at least 0 and below 2**63, got {self.seed}")
        if self.dtype is not None and self.dtype not in DTYPES:
            problems.append(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.offload not in OFFLOADS:
            problems.append(f"offload must be one of {', '.join(OFFLOADS)}, got {self.offload!r}")
        try:
            check_scales(self.guidance_scale, self.image_guidance_scale, self.guidance_interval, self.guidance_refresh)
        except ConfigError as error:
            problems += error.problems
        if problems:
            raise ConfigError(problems)


def process_device(options: GenerateOptions) -> tuple[torch.device, PartialState]:
    """The device of this process, and accelerate's view of all processes: a single one outside of `accelerate launch`.

    Raises:
        UserError: a device that is not there, or offloading without a GPU.
    """
    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device: {name!r} cannot be used ({one_line(error)}); take cpu or cuda") from None
    if options.offload != "none" and device.type == "cpu":
        raise UserError(f"offload: {options.offload!r} needs a GPU, got device {name!r}; use 'none'")
    state = PartialState(cpu=device.type == "cpu")
    if state.num_processes > 1 and state.device is not None:
        device = state.device
    return device, state


def check_models(options: GenerateOptions) -> Family:
    """Look at base and adapter without loading weights; returns the base's family.

    Raises:
        UserError: a base or adapter that cannot be read, that cannot take references, or that do not fit each other.
    """
    adapter = open_adapter(options.adapter, revision=options.adapter_revision)
    base = read_base_model(options.base, field="base", revision=options.revision)
    with reading(options.base, "base"), torch.device("meta"):
        fit_config(base.transformer, adapter.config, base.family)
        check_fits(base.transformer, base.family, adapter)
    if (multiples := base.size_multiples()) is not None:
        size = Size(options.num_frames, options.height, options.width)
        if problems := list(size_misfits(size, multiples)):
            raise ConfigError(problems)
    return base.family


def load_pipeline(options: GenerateOptions, device: torch.device | None = None) -> Any:
    """Load base and adapter, in the type and with the offloading asked for.

    Args:
        options: what and how.
        device: where; None: as the options say.

    Raises:
        UserError: what `check_models` and `process_device` tell, or weights that cannot be read.
    """
    family = check_models(options)
    device = device or process_device(options)[0]
    dtype = DTYPES[options.dtype or ("fp32" if device.type == "cpu" else "bf16")]
    found = open_pipeline(
        options.base,
        field="base",
        revision=options.revision,
        weights=WEIGHTS,
        variant=options.variant,
        classes=family.classes,
    )
    with reading(options.base, "base"):
        base = family.load_pipeline(
            str(found.path), variant=options.variant, dtype={"default": dtype, "vae": torch.float32}
        )
    if options.offload == "none":
        base.to(device)
    pipe = load_adapter(base, options.adapter, revision=options.adapter_revision, family=family)
    pipe.max_references = options.max_references
    if options.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    return pipe
