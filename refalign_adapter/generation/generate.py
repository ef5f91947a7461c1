"""`refalign generate`: one video, or one for every row of a prompt file, resumable and shared out among processes."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from tqdm import tqdm

from ..config import CONFIG_NAME
from ..data.cache.options import model_id
from ..errors import ConfigError, UserError
from ..export.folder import open_adapter
from ..files import require_writable_folder
from ..hashes import file_digest
from ..json_files import read_json, write_json
from ..leftovers import remove_leftovers
from ..media.video_file import write_video
from ..pipelines.guidance import ALL_STEPS
from .options import GenerateOptions, check_models, load_pipeline, process_device
from .prompts import Prompt, image_path, read_prompts, reference_problems

OPTIONS_NAME = ".refalign_generate.json"
"""What a folder of videos was made with; beside them, hidden from tools that take every file for a video."""

logger = logging.getLogger(__name__)


def generate_one(
    options: GenerateOptions,
    prompt: str,
    references: Sequence[str | Path],
    output: str | Path,
    *,
    show_bar: bool = True,
) -> Path:
    """Generate one video; an existing file is replaced.

    Args:
        options: how.
        prompt: the text.
        references: image files.
        output: an mp4 file.
        show_bar: whether steps are counted on standard error, where that is a terminal.

    Raises:
        UserError: bad input, told before any model is loaded wherever that can be known.
    """
    output = Path(output)
    problems = reference_problems([str(name) for name in references], Path(), options.max_references)
    if not prompt.strip():
        problems.append(f"prompt must be text, got {prompt!r}")
    if output.suffix.lower() != ".mp4":
        problems.append(f"output must be an .mp4 file, got {str(output)!r}")
    elif output.is_dir():
        problems.append(f"output: {str(output)!r} is a folder; name a file")
    if problems:
        raise ConfigError(problems)
    require_writable_folder(output.parent)
    remove_leftovers(output.parent)
    pipe = load_pipeline(options)
    images = tuple(image_path(Path(), str(name)) for name in references)
    with _steps_bar(options, 1, show_bar) as bar:
        _generate(pipe, options, Prompt(output.stem, prompt, images), options.seed, output, bar)
    return output


def generate_many(
    options: GenerateOptions,
    prompts: str | Path,
    output: str | Path,
    report: Callable[[str], None] = logger.info,
    *,
    show_bar: bool = True,
) -> list[Path]:
    """Generate one `<key>.mp4` for every row of a prompt file.

    Files that exist are kept, so that a run that was stopped can go on; a file is there whole or not at all.
    A row that was changed since keeps its file too, until that is deleted. Under `accelerate launch` the rows are
    shared out among the processes; a key's video does not depend on their number, nor on what came before it.

    Args:
        options: how.
        prompts: see `read_prompts`.
        output: a folder; it may hold videos of the same options.
        report: told of every video, in one line.
        show_bar: whether the steps of all videos are counted on standard error, where that is a terminal.

    Returns:
        The files that this process wrote.

    Raises:
        UserError: bad input, told before any model is loaded wherever that can be known.
    """
    rows = read_prompts(prompts, options.max_references)
    device, state = process_device(options)
    check_models(options)
    folder = require_writable_folder(output)
    made_with = _describe(options)
    missing = [row for row in rows if not (folder / f"{row.key}.mp4").is_file()]
    _check_folder(folder, made_with, resumed=len(missing) < len(rows))
    state.wait_for_everyone()  # all have looked before one writes, so that all share out the same rows
    if state.is_main_process:
        remove_leftovers(folder)
        write_json(folder / OPTIONS_NAME, made_with)
    mine = missing[state.process_index :: state.num_processes]
    report(f"{len(rows) - len(missing)} of {len(rows)} videos exist, {len(mine)} to generate here")
    if not mine:
        return []
    pipe = load_pipeline(options, device)
    written = []
    with _steps_bar(options, len(mine), show_bar) as bar:
        for number, row in enumerate(mine, 1):
            path = folder / f"{row.key}.mp4"
            _generate(pipe, options, row, seed_of(options.seed, row.key), path, bar)
            written.append(path)
            with bar.external_write_mode():
                report(f"{number}/{len(mine)} {path}")
    return written


def seed_of(seed: int, key: str) -> int:
    """A key's own seed in [0, 2**63): the same in every run and on every process."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@contextmanager
def _steps_bar(options: GenerateOptions, videos: int, show: bool) -> Iterator[tqdm]:
    """One bar for the denoising steps of so many videos, drawn by the main process alone."""
    hidden = None if show and PartialState().is_main_process else True  # None: hidden where there is no terminal
    with tqdm(total=videos * options.num_inference_steps, unit="step", disable=hidden, dynamic_ncols=True) as bar:
        yield bar


def _generate(pipe: Any, options: GenerateOptions, row: Prompt, seed: int, path: Path, bar: tqdm) -> None:
    def count_step(_: Any, __: int, ___: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        bar.update()
        return tensors

    pipe.set_progress_bar_config(disable=True)
    bar.set_description(row.key)
    frames = pipe(
        row.prompt,
        reference_images=list(row.references),
        negative_prompt=row.negative_prompt if row.negative_prompt is not None else options.negative_prompt,
        height=options.height,
        width=options.width,
        num_frames=options.num_frames,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
        image_guidance_scale=options.image_guidance_scale,
        guidance_interval=options.guidance_interval,
        guidance_refresh=options.guidance_refresh,
        batch_guidance=options.batch_guidance,
        callback_on_step_end=count_step,
        generator=torch.Generator().manual_seed(seed),  # of the CPU: the same noise on every device
    ).frames[0]
    if not np.isfinite(frames).all():
        raise UserError(
            f"{row.key}: its video is not finite, and is not written; try dtype bf16 or fp32, and see that base and "
            "adapter are whole"
        )
    write_video(path, frames, fps=options.fps)


def _describe(options: GenerateOptions) -> dict[str, Any]:
    """What decides a folder's videos. The adapter by its weights too: it may have been trained again in its place."""
    values = dataclasses.asdict(options) | {"guidance_interval": list(options.guidance_interval)}  # as JSON has it
    for name in ("device", "offload", "max_references", "batch_guidance"):
        del values[name]
    for name in ("base", "adapter"):  # a folder of videos is passed on: it need not tell where things were
        values[name] = model_id(getattr(options, name))
    adapter = open_adapter(options.adapter, revision=options.adapter_revision)
    decides = (
        adapter.weights if adapter.config.r else adapter.path / CONFIG_NAME
    )  # without a LoRA there are no weights
    values["adapter_sha256"] = file_digest(decides)
    return values


def _check_folder(folder: Path, made_with: dict[str, Any], resumed: bool) -> None:
    """Refuse to add to a folder whose videos were made with something else."""
    path = folder / OPTIONS_NAME
    if not path.is_file():
        if resumed:
            raise UserError(f"output: {str(folder)!r} holds other videos of these keys; choose another folder")
        return
    before = _made_before(path)
    names = [name for name in made_with if before.get(name) != made_with[name]]
    if names and resumed:
        differences = "; ".join(f"{name} {before.get(name)!r}, now {made_with[name]!r}" for name in names)
        raise UserError(f"output: {str(folder)!r} holds videos made with {differences}; choose another folder")


def _made_before(path: Path) -> dict[str, Any]:
    """What a folder's videos were made with; older folders do not say everything, and hold paths."""
    try:
        found = read_json(path, "output")
    except UserError as error:
        raise UserError(f"{error}; choose another folder, or delete this file and the videos beside it") from None
    if not isinstance(found, dict):
        raise UserError(f"output: {str(path)!r} holds no options; delete it and the videos beside it")
    before = {"guidance_interval": list(ALL_STEPS), "guidance_refresh": 1, "variant": None} | found
    for name in ("base", "adapter"):
        if isinstance(before.get(name), str):
            before[name] = model_id(before[name])
    return before
