"""Train a base and the shipped teacher on two CPU cores: `python tools/world/pretrain.py --output DIR`.

Draws the world's training split, trains VAE, teacher, and text encoder with transformer, and writes `DIR/base` (a
`WanPipeline` folder), `DIR/teacher` and `DIR/assets` (packed as the package has them). A teacher or VAE whose folder
is there already is taken from it, so an interrupted run goes on. On two busy cores it took about 34 minutes for the
VAE, 25 for the teacher, and 17 and 20 for the two stages of text to video.

The teacher in the package is from here, and so was the base of version 0.1.0. The base of today went on from its
VAE, on a GPU, with a script that is not part of this project: VAE 2,392 steps (1,414 of 48 clips, 978 of 512 pictures;
absolute, half squared and .3 edge errors; 23.5 dB on held-out clips); then text encoder and a transformer of 8 heads
and ffn 768 from nothing, 7,192 steps (3,741 of 768 pictures, alone in the first 30 %, and 3,451 of 192 clips; 30,000
drawn clips, AdamW at 1.5e-3 with a linear end over the last 40 %, weights averaged at .998; held-out flow loss .2275).
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
from pretrain_teacher import PREPROCESSOR, draw_stills, retrieval_accuracy, train_teacher
from pretrain_transformer import SHIFT, TextToVideo, train_text_to_video
from pretrain_vae import draw_world, encode, psnr, set_latent_statistics, single_frames_as_images, train_vae
from torch import Tensor

from refalign_adapter.json_files import read_json, write_json
from refalign_adapter.world.base import pack
from refalign_adapter.world.scenes import draw_clip

SIZE, NUM_FRAMES, CHANNELS = 64, 9, 16
TEACHER_STEPS, TEACHER_SUBJECTS = 1200, 2500
# Steps, and the share of them that sees stills alone.
VAE_STAGES = ((2600, 0.6), (1300, 0.0), (900, 0.0), (1800, 0.0))
VAE_CLIPS = 1500
# Steps, and drawn clips: one row a stage, each going on from the one before with other clips.
TEXT_TO_VIDEO_STAGES = ((3000, 1500), (2400, 3500))
STILLS = 1500


def pretrain(output: str | Path, *, seed: int = 0, steps: int | None = None) -> None:
    """Train all parts and write them.

    Args:
        output: the folder to write.
        seed: of weights, batches and drawn clips.
        steps: cap on the steps of every stage, for a trial; None runs them in full.
    """
    root, started = Path(output), time.time()
    limit = steps or 10**9

    def log(line: str) -> None:
        print(f"{time.time() - started:6.0f} s  {line}", flush=True)

    if not (root / "teacher").is_dir():
        _write_teacher(root / "teacher", min(TEACHER_STEPS, limit), seed, log)
    if not (root / "vae").is_dir():
        videos, stills, _, _ = draw_world(seed, VAE_CLIPS, SIZE, NUM_FRAMES)
        stages = [(min(count, limit), share) for count, share in VAE_STAGES]
        train_vae(videos, stills, stages, seed, log).save_pretrained(root / "vae")
    vae = AutoencoderKLWan.from_pretrained(root / "vae").eval().requires_grad_(False)
    log(f"vae: PSNR of evaluation clips {psnr(vae, evaluation_videos(seed + 1, 32)):.1f} dB")
    torch.manual_seed(seed)
    model = TextToVideo(CHANNELS)
    for stage, (count, clips) in enumerate(TEXT_TO_VIDEO_STAGES):
        data = _latents(vae, seed + 77 * stage, clips)
        log(f"encoded {clips} clips")
        model = train_text_to_video(model, *data, steps=min(count, limit), seed=seed + stage, log=log)
        save_pipeline(root / "base", vae, model)
        model.requires_grad_(True)
    for name in ("base", "teacher"):
        pack(root / name, name, root / "assets")
    log("done")


def _write_teacher(folder: Path, steps: int, seed: int, log: Callable[[str], None]) -> None:
    teacher = train_teacher(draw_stills(seed, TEACHER_SUBJECTS, "train"), steps, seed, log)
    scores = retrieval_accuracy(teacher, draw_stills(seed + 1, 400, "eval"))
    log(f"teacher: retrieval among 400 evaluation subjects {scores[0]:.3f}, by pixels {scores[1]:.3f}")
    teacher.save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", PREPROCESSOR)


def _latents(vae: AutoencoderKLWan, seed: int, clips: int) -> list[tuple[Tensor, list[str]]]:
    """Normalised latents with captions, of clips and stills. Sets the config's statistics from the clips first."""
    videos, stills, captions, still_captions = draw_world(seed, clips, SIZE, NUM_FRAMES)
    with single_frames_as_images():
        pairs = [(encode(vae, videos), captions), (encode(vae, stills[:STILLS, :, None]), still_captions[:STILLS])]
    set_latent_statistics(vae, pairs[0][0])
    return [(normalise(vae, latents), texts) for latents, texts in pairs]


def evaluation_videos(seed: int, clips: int) -> Tensor:
    """uint8 videos (clips, 3, frames, height, width) of evaluation subjects."""
    drawn = [
        draw_clip(seed, number, split="eval", height=SIZE, width=SIZE, num_frames=NUM_FRAMES).frames
        for number in range(clips)
    ]
    return torch.from_numpy(np.stack(drawn)).permute(0, 4, 1, 2, 3).contiguous()


def normalise(vae: Any, latents: Tensor) -> Tensor:
    """Latents (B, C, F, H, W) less the config's mean, over its standard deviation."""
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (latents - mean) / std


def save_pipeline(folder: Path, vae: AutoencoderKLWan, model: Any) -> None:
    """Write the parts as a `WanPipeline` folder."""
    pipe = WanPipeline(
        tokenizer=model.tokenizer,
        text_encoder=model.text_encoder,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        transformer=model.transformer,
    )
    pipe.save_pretrained(folder, safe_serialization=True)
    # transformers 5 writes a class name that version 4 does not know; both know this one.
    for path, entry in (
        (folder / "model_index.json", "tokenizer"),
        (folder / "tokenizer" / "tokenizer_config.json", "tokenizer_class"),
    ):
        content = read_json(path)
        content[entry] = (
            ["transformers", "PreTrainedTokenizerFast"] if entry == "tokenizer" else "PreTrainedTokenizerFast"
        )
        write_json(path, content)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=None, help="cap on the steps of every stage, for a trial")
    arguments = parser.parse_args()
    pretrain(**vars(arguments))


if __name__ == "__main__":
    main()
