"""Train an adapter on a folder of your own clips.

The folder holds, for every clip NAME.mp4, its caption in NAME.txt and one image per subject in NAME_0.png, NAME_1.png
… (a subject seen in several clips: give its images the same name after a dash, NAME_0-rex.png). An image whose name
begins like those of several clips belongs to the longest: dog_2_0.png to dog_2.mp4, where there is one. Then:

python examples/train_on_folder.py --clips my_clips --base Wan-AI/Wan2.1-T2V-1.3B-Diffusers --output my_adapter \
    --recipe wan2.1-t2v-1.3b/stage1 -- max_train_steps=2000 train_batch_size=1

It writes `metadata.jsonl` into the folder, encodes everything once, and trains. What follows `--` changes the recipe.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import refalign_adapter as ra
from refalign_adapter.atomic import atomic_file
from refalign_adapter.recipes.shipped import copy_recipe


def write_manifest(folder: Path) -> Path:
    """Write `metadata.jsonl` from the files' names and return its path; ends with a list of what is missing."""
    rows, problems = [], []
    clips, pictures = files_of(folder, ".mp4"), files_of(folder, ".png")
    for clip in clips:
        caption = clip.with_suffix(".txt")
        images = [picture for picture in pictures if clip_of(picture, clips) == clip.stem]
        if not caption.is_file() or not images:
            problems.append(f"{clip.name} needs {caption.name} and at least one {clip.stem}_0.png")
            continue
        references = []
        for image in images:
            name = image.stem.removeprefix(f"{clip.stem}_")
            subject = name.partition("-")[2] or image.stem
            references.append({"image": image.name, "subject": subject})
        text = caption.read_text(encoding="utf-8-sig").strip()  # Windows' editors put a mark at the beginning
        rows.append({"file_name": clip.name, "caption": text, "references": references, "pair": "cross"})
    if problems or not rows:
        sys.exit("\n".join(problems) or f"no .mp4 in {folder}")
    manifest = folder / "metadata.jsonl"
    with atomic_file(manifest) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return manifest


def files_of(folder: Path, suffix: str) -> list[Path]:
    """Files with this suffix in any case: cameras write .MP4."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() == suffix)


def clip_of(picture: Path, clips: list[Path]) -> str | None:
    """The clip's name that a picture's begins with, the longest of several; None without one."""
    names = [clip.stem for clip in clips if picture.stem.startswith(f"{clip.stem}_")]
    return max(names, key=len, default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, required=True)
    parser.add_argument("--base", required=True, help="folder or Hub id; demo: the demo's small world")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--recipe", default="wan2.1-t2v-1.3b/stage1", help="see `refalign recipes list`")
    parser.add_argument("changes", nargs="*", help="recipe fields to change, key=value")
    options = parser.parse_args()

    manifest = write_manifest(options.clips)
    options.output.mkdir(parents=True, exist_ok=True)
    recipe = options.output / "my_recipe.yaml"
    if not recipe.exists():  # a second run goes on with the first one's, which you may have edited
        copy_recipe(options.recipe, recipe)
    base = ra.demo_base() if options.base == "demo" else options.base
    changes = [
        f"pretrained_model_name_or_path={base}",
        f"output_dir={options.output}",
        f"data.train_data={manifest}",
        f"data.cache_dir={options.output / 'cache'}",
        *options.changes,
    ]
    cache = [sys.executable, "-m", "refalign_adapter.cache"]
    train = [sys.executable, "-m", "accelerate.commands.launch", "-m", "refalign_adapter.train"]
    for command in (cache, train):
        code = subprocess.run([*command, "--config", str(recipe), *changes]).returncode
        if code:
            sys.exit(code)


if __name__ == "__main__":
    main()
