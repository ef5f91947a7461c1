"""Generate one video with reference images, in Python.

python examples/generate.py --base Wan-AI/Wan2.1-T2V-1.3B-Diffusers --adapter you/your-adapter \
    --prompt "a woman walks her dog along the beach" --reference woman.png --reference dog.png --output beach.mp4

Without a download, in the demo's small world, whose words and subjects are few (`refalign demo --help`):

python examples/generate.py --base demo --adapter demo --height 64 --width 64 --num-frames 9 --steps 25 --fps 8 \
    --prompt "a cat bounces, in a meadow" --reference cat.png
"""

import argparse

import torch
from diffusers import WanPipeline

import refalign_adapter as ra


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="diffusers folder or Hub id of a Wan model, or demo")
    parser.add_argument("--adapter", required=True, help="adapter folder or Hub id, or demo")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--reference", action="append", default=[], help="reference image; repeat for more subjects")
    parser.add_argument("--output", default="output.mp4")
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--num-frames", type=int, default=81)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--fps", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = ra.demo_base() if options.base == "demo" else options.base
    base = WanPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    pipe = ra.load_adapter(base.to(device), ra.demo_adapter() if options.adapter == "demo" else options.adapter)
    frames = pipe(
        options.prompt,
        reference_images=options.reference,
        height=options.height,
        width=options.width,
        num_frames=options.num_frames,
        num_inference_steps=options.steps,
        image_guidance_scale=5.0,  # how strongly the references pull
        guidance_scale=7.5,  # how strongly the prompt pulls
        generator=torch.Generator().manual_seed(options.seed),
    ).frames[0]
    ra.write_video(options.output, frames, fps=options.fps)
    print(options.output)


if __name__ == "__main__":
    main()
