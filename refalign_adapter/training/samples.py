"""Videos made while training: the reference pipeline around the transformer that is being trained."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..batch import moved_text
from ..data.cache.encoders import Encoders
from ..errors import UserError
from ..families._pipeline_folder import reading
from ..families.base import Family
from ..media.images import read_image
from ..media.sizes import Size
from ..media.video_file import write_video
from ..pipelines.reference_class import build_pipeline
from ..recipes.cache_options import options_of
from ..recipes.schema import Recipe
from ..recipes.sections import SamplePrompt
from ..signals import tell
from .base_model import FIELD

if TYPE_CHECKING:
    from .setup import Run


class Sampler:
    """Makes the recipe's sample videos. Prompts are encoded once; the text encoder is then let go of.

    Args:
        run: prompts are shared out among its processes; one without any loads nothing.

    Raises:
        UserError: sizes that the base cannot cut into tokens, or an image that cannot be read.
    """

    def __init__(self, run: Run):
        self.run = run
        accelerator, recipe = run.accelerator, run.recipe
        numbered = list(enumerate(recipe.sample_prompts))
        self.mine = numbered[accelerator.process_index :: accelerator.num_processes]
        if not self.mine:
            return
        self.arguments = sample_arguments(recipe)
        for _, sample in self.mine:
            for path in sample.references:
                read_image(path, "sample_prompts")
        branch = run.trained.branch
        pipe = _load_encoders(recipe, branch.family, accelerator.mixed_precision == "bf16")
        size = Size(*(self.arguments[name] for name in ("num_frames", "height", "width")))
        Encoders(branch.family, pipe, branch.transformer).check_sizes(options_of(recipe).at(size))
        samples = [sample for _, sample in self.mine]
        self.texts = _encode_prompts(pipe, branch.family, recipe, samples, accelerator.device)
        replaced = {"transformer": branch.transformer, "text_encoder": None, "tokenizer": None}
        self.pipe = build_pipeline(pipe, **replaced)
        self.pipe.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def write(self, folder: Path) -> None:
        """Write `NN-prompt.mp4` for every prompt of this process into `folder`; one that is no video is told.

        Raises:
            WriteError: one cannot be written.
        """
        if not self.mine:
            return
        module, device = self.run.module, self.run.accelerator.device
        training = module.training
        module.eval()
        module.branch.capture = False
        self.pipe.vae.to(device)
        try:
            for (number, sample), texts in zip(self.mine, self.texts, strict=True):
                path = folder / f"{number:02d}-{_slug(sample.prompt)}.mp4"
                try:
                    video = self._generate(sample, texts)
                except UserError as error:  # training may still recover, or says so itself
                    step = self.run.progress.step
                    tell(f"step {step}: no video of sample {number} ({sample.prompt[:60]!r}): {error}")
                    continue
                write_video(path, video, self.run.recipe.data.fps or 16)
        finally:
            self.pipe.vae.to("cpu")
            module.train(training)

    def _generate(self, sample: SamplePrompt, texts: dict[str, torch.Tensor]) -> Any:
        """(frames, height, width, 3) in [0, 1].

        Raises:
            UserError: its values are no numbers.
        """
        generator = torch.Generator().manual_seed(self.run.recipe.sample.seed)
        images = sample.references or None
        frames = self.pipe(reference_images=images, generator=generator, **texts, **self.arguments).frames[0]
        if not np.isfinite(frames).all():
            raise UserError("its values are no numbers; if that goes on, lower learning_rate")
        return frames


def sample_arguments(recipe: Recipe) -> dict[str, Any]:
    """The pipeline's arguments for a recipe's videos; sizes not given are the training clips'."""
    sample, data = recipe.sample, options_of(recipe)
    return {
        "height": sample.height or data.height,
        "width": sample.width or data.width,
        "num_frames": sample.num_frames or data.num_frames,
        "num_inference_steps": sample.num_inference_steps,
        "guidance_scale": sample.guidance_scale,
        "image_guidance_scale": sample.image_guidance_scale,
        "guidance_refresh": sample.guidance_refresh,
    }


def _load_encoders(recipe: Recipe, family: Family, bf16: bool) -> Any:
    text_dtype = torch.bfloat16 if bf16 else torch.float32
    with reading(recipe.pretrained_model_name_or_path, FIELD):
        return family.load_encoders(
            recipe.pretrained_model_name_or_path,
            revision=recipe.revision,
            variant=recipe.variant,
            dtype={"vae": torch.float32, "default": text_dtype},
        )


def _encode_prompts(
    pipe: Any, family: Family, recipe: Recipe, samples: list[SamplePrompt], device: torch.device
) -> list[dict[str, torch.Tensor]]:
    """The pipeline's text arguments of each sample; each (1, …), on the CPU."""
    pipe.to(device)
    texts = [*(sample.prompt for sample in samples), recipe.sample.negative_prompt]
    encoded = moved_text(family.encode_text(pipe, texts, recipe.adapter.max_sequence_length), "cpu")
    pipe.to("cpu")
    *prompts, negative = ({name: part[i : i + 1] for name, part in encoded.items()} for i in range(len(texts)))
    return [family.pipeline_text(prompt, negative) for prompt in prompts]


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40] or "video"
