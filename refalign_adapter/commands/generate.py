"""`refalign generate`: videos from a base and an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from ..signals import stopping_means

DEFAULTS: dict[str, float] = {
    "height": 480,
    "width": 832,
    "num_frames": 81,
    "fps": 16,
    "num_inference_steps": 50,
    "guidance_scale": 7.5,
    "image_guidance_scale": 5.0,
}
DEMO: dict[str, float] = {
    "height": 64,
    "width": 64,
    "num_frames": 9,
    "fps": 8,
    "num_inference_steps": 25,
    "guidance_scale": 2.0,
    "image_guidance_scale": 3.0,
}
"""Of the demo's base, which knows no other size."""


def shown(name: str) -> str:
    """An option's defaults in words."""
    return f"{DEFAULTS[name]:g}; of demo {DEMO[name]:g}"


def generate(
    base: Annotated[
        str, typer.Option(help="Diffusers folder or Hub id of the text-to-video model; demo: the demo's.")
    ],
    adapter: Annotated[str, typer.Option(help="Adapter folder or Hub id; demo: the demo's.")],
    output: Annotated[Path, typer.Option(help="An .mp4 file; with --prompts a folder.")],
    prompt: Annotated[str | None, typer.Option(help="What happens in the video.")] = None,
    reference: Annotated[list[str] | None, typer.Option(help="A reference image; repeat for more.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Many videos: JSONL of key, prompt, references; or OpenS2V-Eval's JSON.")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="In place of the empty text.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.", show_default=shown("height"))] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.", show_default=shown("width"))] = None,
    num_frames: Annotated[
        int | None,
        typer.Option(help="Frames: 4 k + 1 for Wan, 8 k + 1 for LTX-Video.", show_default=shown("num_frames")),
    ] = None,
    fps: Annotated[
        float | None, typer.Option(help="Frames per second of the file.", show_default=shown("fps"))
    ] = None,
    num_inference_steps: Annotated[
        int | None, typer.Option(help="Denoising steps.", show_default=shown("num_inference_steps"))
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(help="How strongly the prompt pulls; 1 turns it off.", show_default=shown("guidance_scale")),
    ] = None,
    image_guidance_scale: Annotated[
        float | None,
        typer.Option(
            help="How strongly the references pull; 1 turns it off.", show_default=shown("image_guidance_scale")
        ),
    ] = None,
    guidance_interval: Annotated[
        tuple[float, float], typer.Option(help="Start and stop of guidance, as shares of the steps.")
    ] = (0.0, 1.0),
    guidance_refresh: Annotated[
        int, typer.Option(help="Compute guidance in the first two steps and every K-th.", metavar="K")
    ] = 1,
    batch_guidance: Annotated[
        bool, typer.Option("--batch-guidance", help="Run guidance passes together, with more memory.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the initial noise.")] = 0,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1, cpu; the GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; bf16 on a GPU, else fp32.")] = None,
    offload: Annotated[str, typer.Option(help="none or model: less GPU memory, slower.")] = "none",
    variant: Annotated[str | None, typer.Option(help="Of the base's weight files, such as fp16.")] = None,
    revision: Annotated[str | None, typer.Option(help="The base's revision on the Hub.")] = None,
    adapter_revision: Annotated[str | None, typer.Option(help="The adapter's revision on the Hub.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Tell mistakes alone: no bar, no lines.")] = False,
) -> None:
    """Generate one video from --prompt and --reference, or one for every row of --prompts.

    With --prompts, videos that exist are kept, and `accelerate launch -m refalign_adapter generate …` shares the
    rows out among its processes.
    """
    values = dict(locals())
    one = (prompt, reference)
    if (prompt is None) == (prompts is None):
        raise UserError("generate: give either --prompt with --reference, or --prompts FILE")
    if prompts is not None and any(one):
        raise UserError("generate: --reference goes with --prompt; a prompt file names its own references")
    from ..generation.generate import GenerateOptions, generate_many, generate_one
    from ..world.shipped import NAME, adapter_named, base_named

    values |= {"base": base_named(base), "adapter": adapter_named(adapter)}
    defaults = DEMO if base == NAME else DEFAULTS
    values |= {name: value for name, value in defaults.items() if values[name] is None}
    options = GenerateOptions(
        **{name: values[name] for name in GenerateOptions.__dataclass_fields__ if name in values}
    )
    if prompts is None:
        written = generate_one(options, prompt or "", reference or [], output, show_bar=not quiet)
        if not quiet:
            print(written)
        return
    with stopping_means("finished videos are whole; run the same command again to go on"):
        generate_many(options, prompts, output, report=(lambda _: None) if quiet else print, show_bar=not quiet)
