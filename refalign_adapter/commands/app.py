"""The `refalign` command. Thin: each command reads its options and calls one function of the package."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from ..signals import ended_by_signals, stopping_means, tell

app = typer.Typer(
    name="refalign",
    help="Reference images for frozen video diffusion transformers, by a small adapter.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes_app = typer.Typer(help="Training recipes that come with the package.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")
data_app = typer.Typer(help="Look after training data.", no_args_is_help=True)
app.add_typer(data_app, name="data")

Overrides = Annotated[
    list[str] | None, typer.Argument(help="Recipe fields to change: key=value, dotted for sections.")
]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a user's mistake is printed as plain lines and exits with 2."""
    with ended_by_signals():
        _quiet_libraries()
        try:
            app(args=arguments)
        except UserError as error:
            for line in str(error).splitlines():
                tell(f"error: {line}")
            sys.exit(2)


def _quiet_libraries() -> None:
    """Leave out libraries' notes about optional parts that a user of this command can do nothing about."""
    import logging

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _version(show: bool) -> None:
    if show:
        print(importlib.metadata.version("refalign-adapter"))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Reference images for frozen video diffusion transformers, by a small adapter."""


@app.command()
def doctor() -> None:
    """Tell what this machine can run."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from .doctor import examine

    findings = examine()
    table = Table("", "topic", "found", "advice", box=None)
    marks = {True: "[green]ok[/]", False: "[red]missing[/]", None: "[yellow]note[/]"}
    for finding in findings:
        table.add_row(marks[finding.ok], *map(escape, (finding.topic, finding.value, finding.advice)))
    Console().print(table)
    if any(finding.ok is False for finding in findings):
        raise typer.Exit(1)


@recipes_app.command("list")
def recipes_list() -> None:
    """Name the recipes."""
    from ..recipes.shipped import list_recipes

    for name in list_recipes():
        print(name)


@recipes_app.command("copy")
def recipes_copy(
    name: Annotated[str, typer.Argument(help="A name that `refalign recipes list` prints.")],
    output: Annotated[Path, typer.Option(help="File or folder to copy to.")] = Path("."),
) -> None:
    """Copy a recipe, so that you can change it."""
    from ..recipes.shipped import copy_recipe

    print(copy_recipe(name, output))


@data_app.command("check")
def data_check(
    config: Annotated[Path, typer.Option(help="The recipe (YAML); of it, the data section counts.")],
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option(help="Folder of the report; an older report is replaced.")] = Path(
        "data_check"
    ),
    sheets: Annotated[int, typer.Option(help="Rows on the contact sheets, those with problems first; 0: none.")] = 120,
    workers: Annotated[int | None, typer.Option(help="Processes that decode; data.num_workers if not given.")] = None,
) -> None:
    """Find every problem of a data set before it is encoded, and show its rows as training will see them.

    Exits with 2 when there are problems. Neither the base model nor a GPU is needed.
    """
    from .data_check import run

    with stopping_means("no report was written"):
        run(config, overrides or [], output=output, sheets=sheets, workers=workers)


@app.command()
def cache(
    config: Annotated[Path, typer.Option(help="The recipe (YAML).")],
    overrides: Overrides = None,
    rehash: Annotated[bool, typer.Option("--rehash", help="Hash every file anew, also those unchanged.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Make nothing: read and check every part.")] = False,
    prune: Annotated[bool, typer.Option("--prune", help="Make nothing: delete parts that no row needs.")] = False,
) -> None:
    """Encode clips, references and captions once, so that training needs the transformer alone."""
    from .cache import look_after, run

    with stopping_means("run the same command again to go on"):
        if verify or prune:
            look_after(config, overrides or [], verify=verify, prune=prune)
        else:
            run(config, overrides or [], rehash=rehash)


@app.command()
def generate(
    base: Annotated[str, typer.Option(help="Diffusers folder or Hub id of the text-to-video model.")],
    adapter: Annotated[str, typer.Option(help="Adapter folder or Hub id.")],
    output: Annotated[Path, typer.Option(help="An .mp4 file; with --prompts a folder.")],
    prompt: Annotated[str | None, typer.Option(help="What happens in the video.")] = None,
    reference: Annotated[list[str] | None, typer.Option(help="A reference image; repeat for more.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Many videos: JSONL of key, prompt, references; or OpenS2V-Eval's JSON.")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="In place of the empty text.")] = None,
    height: Annotated[int, typer.Option(help="Pixels.")] = 480,
    width: Annotated[int, typer.Option(help="Pixels.")] = 832,
    num_frames: Annotated[int, typer.Option(help="Frames, 4 k + 1 for Wan.")] = 81,
    fps: Annotated[float, typer.Option(help="Frames per second of the file.")] = 16,
    num_inference_steps: Annotated[int, typer.Option(help="Denoising steps.")] = 50,
    guidance_scale: Annotated[float, typer.Option(help="How strongly the prompt pulls; 1 turns it off.")] = 7.5,
    image_guidance_scale: Annotated[
        float, typer.Option(help="How strongly the references pull; 1 turns it off.")
    ] = 5.0,
    guidance_interval: Annotated[
        tuple[float, float], typer.Option(help="Start and stop of guidance, as shares of the steps.")
    ] = (0.0, 1.0),
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

    options = GenerateOptions(
        **{name: values[name] for name in GenerateOptions.__dataclass_fields__ if name in values}
    )
    if prompts is None:
        print(generate_one(options, prompt or "", reference or [], output))
        return
    with stopping_means("finished videos are whole; run the same command again to go on"):
        generate_many(options, prompts, output, report=print)


@app.command()
def estimate(
    config: Annotated[Path, typer.Option(help="The recipe (YAML).")],
    overrides: Overrides = None,
    gpu_memory: Annotated[
        float | None,
        typer.Option(help="GB (1e9 bytes) of one GPU, to tell whether training fits; that of the GPU here."),
    ] = None,
    processes: Annotated[int | None, typer.Option(help="Of the run, one per GPU; as many as GPUs here.")] = None,
    rows: Annotated[int | None, typer.Option(help="Of the data; counted where its tables are here.")] = None,
    step_time: Annotated[float | None, typer.Option(help="Seconds of one optimizer step, for the hours.")] = None,
    measure: Annotated[
        int | None, typer.Option(help="Run so many optimizer steps here with random batches, for the same.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON: bytes and seconds.")] = False,
) -> None:
    """Tell what training will need: GPU memory, disk, host memory, hours. Exits with 1 if it does not fit.

    A step is simulated, without weights, data or a GPU. Where it does not fit, changes of the recipe are tried.
    """
    import json as json_module

    from rich.console import Console

    from ..estimate.estimate import make_estimate
    from ..estimate.report import show, to_json
    from ..estimate.setting import Asked
    from ..recipes.file import load_recipe

    asked = Asked(processes, gpu_memory, rows, step_time, measure)
    recipe = load_recipe(config, overrides or [])
    with Console(stderr=True).status("") as status:
        found = make_estimate(recipe, asked, status.update)
    if json:
        print(json_module.dumps(to_json(found), indent=2))
    else:
        show(found, Console())
    if found.fits is False:
        raise typer.Exit(1)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path("demo_output"),
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
) -> None:
    """Draw a small world, train an adapter in it, generate with it, and write a report."""
    from ..world.demo import DemoOptions, run_demo

    with stopping_means("the same command goes on from here"):
        run_demo(DemoOptions(output=output, seed=seed))


if __name__ == "__main__":
    main()
