"""`refalign estimate`: what training will need."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .arguments import Overrides


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
