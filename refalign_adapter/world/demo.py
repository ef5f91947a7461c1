"""The demo: a first video with the shipped adapter, then a real training run, videos of its own, and a report.

    DIR/base, DIR/teacher            a tiny Wan pipeline and a tiny DINOv2
    DIR/first                        the first videos and their reference images, first.gif
    DIR/data/train, DIR/data/eval    clips, references and manifests; no subject of one occurs in the other
    DIR/recipe.yaml                  the packaged recipe demo/isolated with this folder's paths
    DIR/cache, DIR/training          what `refalign cache` and training write; the adapter is DIR/training/adapter
    DIR/samples                      reference images, prompts, generated videos
    DIR/report.html, report.json, demo.gif

What is done is noted in DIR/demo.json: run again with the same options, the demo goes on where it stopped, training
from its last checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from ..atomic import atomic_file
from ..errors import ConfigError, UserError
from ..files import require_writable_folder
from ..json_files import read_json, write_json
from .processes import run_module
from .sampling import Sampling
from .shipped import demo_adapter

RECIPE = "demo/isolated"
RECIPE_FOLDER = "demo_output"
"""What the packaged recipe's paths begin with."""
STATE = "demo.json"
MOST_REFERENCES = 3
"""What the world's clips have at most."""
NEEDED = {"matplotlib": "analysis", "scipy": "analysis", "sklearn": "analysis", "bitsandbytes": "train"}
GENERATION = {
    "num-inference-steps": Sampling.num_inference_steps,
    "guidance-scale": Sampling.guidance_scale,
    "image-guidance-scale": Sampling.image_guidance_scale,
}


@dataclass(frozen=True)
class DemoOptions:
    """What `run_demo` is told.

    Args:
        output: folder to write; new, empty, or one in which the demo was begun with the same options.
        seed: of the world's draws, of training and of the samples.
        train_clips, eval_clips: clips that are drawn; the evidence needs 64 held-out ones.
        steps: training steps, a tenth of them warm-up; None: what the recipe says.
        prompt, references: of the first video in place of drawn pictures: a text in the world's words, image files.

    Raises:
        ConfigError: values out of range, all at once.
    """

    output: str | Path
    seed: int = 0
    train_clips: int = 320
    eval_clips: int = 96
    steps: int | None = None
    prompt: str | None = None
    references: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        least = {"seed": 0, "train_clips": 1, "eval_clips": 16, "steps": 1}
        values = {name: getattr(self, name) for name in least}
        problems = [
            f"{name} must be at least {least[name]}, got {value}"
            for name, value in values.items()
            if value is not None and value < least[name]
        ]
        problems += self._problems_of_own_pictures()
        if problems:
            raise ConfigError(problems)

    def _problems_of_own_pictures(self) -> list[str]:
        from ..generation.prompts import reference_problems
        from .demo_first import prompt_problem

        if (self.prompt is None) != (not self.references):
            return ["demo: --reference and --prompt go together: the prompt says what the subject of the picture does"]
        if self.prompt is None:
            return []
        problems = reference_problems(list(self.references), Path(), MOST_REFERENCES)
        return problems + [problem for problem in [prompt_problem(self.prompt)] if problem]

    @property
    def folder(self) -> Path:
        """`output` as a path."""
        return Path(self.output)


def run_demo(options: DemoOptions, console: Console | None = None) -> Path:
    """Run all stages that are not done yet.

    Args:
        options: see `DemoOptions`.
        console: where progress goes; the processes' own output goes to standard output and error.

    Returns:
        `report.html`.

    Raises:
        UserError: extras are missing, the folder holds something else, or a stage failed.
        Stopped: by a signal; running it again goes on.
    """
    console = console or Console()
    _check_extras()
    state = _open(options)
    stages = list(STAGES.items())
    for number, (name, (title, run)) in enumerate(stages, 1):
        heading = f"[bold]{number}/{len(stages)} {title}[/]"
        if name in state["seconds"]:
            console.print(f"{heading}: done before")
            continue
        console.print(heading)
        started = time.perf_counter()
        run(options)
        state["seconds"][name] = round(time.perf_counter() - started, 1)
        write_json(options.folder / STATE, state)
        console.print(f"    {state['seconds'][name]} s", style="dim")
    _finish(options, state["seconds"], console)
    return options.folder / "report.html"


def _check_extras() -> None:
    missing = sorted({extra for module, extra in NEEDED.items() if find_spec(module) is None})
    if missing:
        raise UserError(
            f"demo: needs more packages; install them with: pip install 'refalign-adapter[{','.join(missing)}]'"
        )


def _open(options: DemoOptions) -> dict[str, Any]:
    """The folder's state; a new one where there is none.

    Raises:
        UserError: a folder with something else in it, or a demo with other options.
    """
    folder = require_writable_folder(options.folder)
    settings = {**dataclasses.asdict(options), "references": list(options.references), "output": None}
    if (folder / STATE).is_file():
        state = read_json(folder / STATE, "output")
        if state["options"] != settings:
            changed = [
                f"{name} {state['options'].get(name)}"
                for name in settings
                if state["options"].get(name) != settings[name]
            ]
            raise UserError(
                f"output: {str(folder)!r} holds a demo with {', '.join(changed)}; delete it or choose another folder"
            )
        return state
    if any(folder.iterdir()):
        raise UserError(f"output: {str(folder)!r} is not empty; choose a new folder")
    state = {"options": settings, "seconds": {}}
    write_json(folder / STATE, state)
    return state


def first_video(options: DemoOptions) -> None:
    """Unpack base, teacher and recipe; generate with the shipped adapter."""
    from .base import unpack_base, unpack_teacher
    from .demo_first import first_jobs, show_first

    folder = options.folder
    unpack_base(folder / "base")
    unpack_teacher(folder / "teacher")
    write_recipe(options)
    size = frame_size(folder)
    drawing = {"height": size["height"], "width": size["width"], "seed": options.seed}
    jobs = first_jobs(folder / "first", [Path(name) for name in options.references], options.prompt, **drawing)
    _generate(folder, demo_adapter(), folder / "first")
    show_first(folder / "first", jobs)


def make_world(options: DemoOptions) -> None:
    """Clips."""
    from .write import write_world

    folder = options.folder
    size = frame_size(folder)
    for split, clips in (("train", options.train_clips), ("eval", options.eval_clips)):
        write_world(
            folder / "data" / split,
            clips=clips,
            subjects_split=split,
            seed=options.seed,
            **size,
        )


def write_recipe(options: DemoOptions) -> None:
    """Copy the packaged recipe as a user would, then set its paths, its seed and its steps."""
    path = options.folder / "recipe.yaml"
    path.unlink(missing_ok=True)
    run_module("refalign_adapter", "recipes", "copy", RECIPE, "--output", path, quiet=True)
    folder = options.folder.resolve()
    text = re.sub(
        rf"{RECIPE_FOLDER}/([\w./-]+)", lambda match: json.dumps(str(folder / match[1])), path.read_text("utf-8")
    )
    values: dict[str, object] = {"seed": options.seed}
    if fast_bf16():
        values["mixed_precision"] = "bf16"
    if options.steps:
        values |= {"max_train_steps": options.steps, "lr_warmup_steps": options.steps // 10}
    for name, value in values.items():
        text = re.sub(rf"^{name}: .*$", f"{name}: {value}", text, flags=re.MULTILINE)
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def fast_bf16() -> bool:
    """Whether this CPU multiplies in bfloat16: training is then a third faster in it; elsewhere it would be slower."""
    import torch

    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))


def make_cache(options: DemoOptions) -> None:
    """Encode both splits, in a process of its own."""
    run_module("refalign_adapter.cache", "--config", options.folder / "recipe.yaml")


def train(options: DemoOptions) -> None:
    """Train under `accelerate launch`, from the last checkpoint if there is one."""
    folder = options.folder
    resume = ["resume_from_checkpoint=latest"] if any((folder / "training").glob("checkpoint-*")) else []
    # Told how many threads to use and to be quiet, the launcher adds no text of its own.
    options_of_launcher = ["--quiet", "--num_cpu_threads_per_process", os.cpu_count() or 1]
    launcher = [*options_of_launcher, "--config_file", folder / "cpu.yaml", "-m", "refalign_adapter.train"]
    run_module("accelerate.commands.launch", *launcher, "--config", folder / "recipe.yaml", *resume)


def generate(options: DemoOptions) -> None:
    """Draw reference images, and generate with them in a fresh process: base, trained adapter and shipped one."""
    from .demo_samples import SCENES, draw_jobs, write_jobs

    folder = options.folder
    size = frame_size(folder)
    jobs = draw_jobs(folder / "samples", SCENES, height=size["height"], width=size["width"], seed=options.seed)
    write_jobs(folder / "samples", jobs)
    run_module("refalign_adapter.world.demo_videos", folder, options.seed, json.dumps(size))


def _generate(folder: Path, adapter: Path, videos: Path) -> None:
    """Generate what the folder `videos` lists into it."""
    arguments = ["--prompts", videos / "prompts.jsonl", "--output", videos]
    run_module("refalign_adapter", "generate", *_generation_arguments(folder, adapter), *arguments)


def commands(options: DemoOptions) -> list[str]:
    """Two command lines that generate with the demo's adapter: another reference, and another prompt."""
    from .demo_samples import SCENES, read_jobs

    folder = options.folder
    jobs = read_jobs(folder / "samples")
    first, second = [job for job in jobs if len(job.references) == 2][:2]
    script = Path(sys.executable).parent / "refalign"
    program = [_short(script)] if script.is_file() else [_short(Path(sys.executable)), "-m", "refalign_adapter"]
    swapped = (first.references[0], second.references[1])
    other = dataclasses.replace(SCENES[-1], motions=("bounces", "sways"), place="in a city").prompt
    wanted = [("another_reference", first.prompt, swapped), ("another_prompt", other, first.references)]
    return [
        shlex.join(
            [
                *program,
                "generate",
                *map(str, _generation_arguments(folder, folder / "training" / "adapter")),
                *("--prompt", prompt),
                *(part for path in references for part in ("--reference", _short(path))),
                *("--output", str(folder / f"{name}.mp4")),
            ]
        )
        for name, prompt, references in wanted
    ]


def frame_size(folder: Path) -> dict[str, Any]:
    """Height, width and frames of the demo's clips."""
    from ..recipes.file import load_recipe

    data = load_recipe(folder / "recipe.yaml").data
    assert data.fps is not None
    return {"height": data.height, "width": data.width, "num_frames": data.num_frames, "fps": round(data.fps)}


def _generation_arguments(folder: Path, adapter: Path) -> list[object]:
    """What all the demo's calls of `refalign generate` share."""
    values = {"base": folder / "base", "adapter": adapter, **frame_size(folder), **GENERATION}
    return [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", value)]


def _short(path: Path) -> str:
    """The path from here, where that is shorter. Links are not followed: a virtual environment's Python is one."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _finish(options: DemoOptions, seconds: dict[str, float], console: Console) -> None:
    """Note the stages' times in report.json and tell what came out."""
    folder = options.folder
    facts = read_json(folder / "report.json")
    facts["seconds"] = {**seconds, "total": round(sum(seconds.values()), 1)}
    write_json(folder / "report.json", facts)
    for line in (
        *_results(facts),
        f"Done in {facts['seconds']['total']:.0f} s. Open {folder / 'report.html'} in a browser.",
    ):
        console.print(line, highlight=False, soft_wrap=True)
    console.print("Generate again, with another reference and with another prompt:", highlight=False, soft_wrap=True)
    for command in commands(options):
        print(f"\n{command}")  # not through the console, which would wrap the line


def _results(facts: dict[str, Any]) -> tuple[str, str]:
    losses, identity = facts["reference_sensitivity"], facts["identity"]
    return (
        f"\nHeld-out flow loss with the right references {losses['true']:.4f}, with another clip's "
        f"{losses['shuffled']:.4f} (p = {losses['p_value']:.1g}), with none {losses['none']:.4f} "
        f"(p = {losses['p_value_none']:.1g}); {losses['n']} clips.",
        f"In {identity['top1']:.0%} of {identity['n']} videos the right reference is first among 16 of its kind, by "
        f"chance in {identity['chance']:.0%}.",
    )


def report(options: DemoOptions) -> None:
    """Measure, then write report.html, report.json and demo.gif."""
    from .demo_measure import measure
    from .demo_report import write_demo_report

    folder = options.folder
    size = frame_size(folder)
    del size["fps"]
    measured = measure(
        folder / "base", folder / "training" / "adapter", folder / "cache", size=size, seed=options.seed
    )
    state = read_json(folder / STATE)
    write_demo_report(folder, measured, state["options"], state["seconds"], commands(options))


STAGES: dict[str, tuple[str, Callable[[DemoOptions], None]]] = {
    "first": ("A first video, with an adapter that is shipped", first_video),
    "world": ("Drawing the world", make_world),
    "cache": ("Encoding clips, references and captions", make_cache),
    "training": ("Training the adapter", train),
    "samples": ("Generating videos in a fresh process", generate),
    "report": ("Measuring and writing the report", report),
}
