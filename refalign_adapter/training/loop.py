"""The training loop: accumulate, clip, step; log, validate, sample and write checkpoints when their step comes."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from ..alignment.objective import Objective
from ..atomic import atomic_folder
from ..batch import Batch
from ..data.cache.dataset import UnreadableRowError
from ..data.cache.prefetch import read_ahead, workers_told
from ..errors import ReadError
from ..files import require_writable_folder, writing
from ..leftovers import remove_leftovers
from ..recipes.file import flat_values, save_recipe
from ..recipes.schema import Recipe
from ..signals import stopping_means
from .bad_steps import Seen, all_finite, look_into
from .checkpoint import averaged_weights, save_checkpoint, save_sidecar
from .checkpoint_files import ADAPTER, TRAINING, write_sidecar_checksums
from .interrupt import Interrupted, SignalWatch, largest, together
from .objectives import full_weights, weights_at
from .resuming import resume, starting_point
from .run_lock import only_run
from .samples import Sampler
from .setup import Run, build_accelerator, build_run, step_seed
from .telling import newest_checkpoint, tell_left_out, tell_unreadable, why_not, with_what_is_kept
from .tracking import LossMeter, ProgressBar, RunLog, say
from .validation import validate

SAMPLES = "samples"
LETTING_GO = 1.0
"""Seconds, thousands of times what it takes."""
DATA_WAIT = "train/data_wait"
"""Share of a step's time in which the main process waits for batches, in [0, 1]."""


@dataclass
class _Watchers:
    """What looks on while a run trains."""

    log: RunLog
    bar: ProgressBar
    sampler: Sampler | None


def train(recipe: Recipe, objectives: Sequence[Objective] = ()) -> Path:
    """Train an adapter as the recipe says.

    Args:
        recipe: see `Recipe`.
        objectives: what is added to the loss beside that; the cache must hold their targets.

    Returns:
        The adapter's folder, `output_dir/adapter`.

    Raises:
        UserError: something the recipe names is missing or does not fit, or the loss stays no number.
        Interrupted: by a signal; what was done is in a checkpoint.
    """
    output_dir = Path(recipe.output_dir)
    accelerator = build_accelerator(recipe, output_dir)
    try:
        with ExitStack() as held:
            with together(accelerator):
                require_writable_folder(output_dir, "output_dir")
                if accelerator.is_main_process:  # the processes of a launch are one run
                    held.enter_context(only_run(output_dir))
                    _remove_leftovers(output_dir)
            return _train(recipe, accelerator, output_dir, objectives)
    finally:
        _let_go(accelerator)


def _remove_leftovers(output_dir: Path) -> None:
    """What killed runs left half-written: checkpoints, the adapter, the log, sample videos."""
    for folder in (output_dir, *sorted((output_dir / SAMPLES).glob("step-*"))):
        remove_leftovers(folder)


def _train(recipe: Recipe, accelerator: Accelerator, output_dir: Path, objectives: Sequence[Objective]) -> Path:
    with together(accelerator):
        checkpoint = starting_point(recipe, output_dir, partial(say, accelerator))
    set_seed(recipe.seed)
    run = build_run(recipe, accelerator, output_dir, objectives=objectives)
    with together(accelerator), with_what_is_kept(run):
        if checkpoint is not None:
            resume(run, checkpoint)
        elif recipe.resume_from_checkpoint:
            say(accelerator, f"resume_from_checkpoint: there is none in {str(output_dir)!r} yet, beginning anew")
        sampler = Sampler(run) if recipe.sample_steps else None
        if accelerator.is_main_process:
            save_recipe(recipe, output_dir / "recipe.yaml")
        with writing(output_dir / recipe.logging_dir):
            accelerator.init_trackers("refalign", flat_values(recipe))
        log = RunLog(accelerator, output_dir, run.progress.step)
    watchers = _Watchers(log, ProgressBar(accelerator, recipe.max_train_steps, run.progress.step), sampler)
    try:
        with with_what_is_kept(run, (ReadError, UnreadableRowError)), workers_told("dataloader_num_workers"):
            _train_all(run, watchers)
        tell_unreadable(run)
        folder = finish(run)
    finally:
        watchers.bar.close()
        with stopping_means("see above; whatever was written is whole"):
            watchers.log.close()
        _let_go(accelerator)  # while the model is still here
    return folder


def _let_go(accelerator: Accelerator) -> None:
    """Give the threads of torch's gloo the time to let go of the last exchange's tensors.

    They need Python's lock for that. When the model goes, torch waits for these threads with the lock held, for ever.
    """
    if accelerator.num_processes > 1:
        time.sleep(LETTING_GO)


def _train_all(run: Run, watchers: _Watchers) -> None:
    meter = LossMeter(run.module.logs)
    batches = endless_batches(run)
    if run.progress.step == 0:
        with together(run.accelerator), with_what_is_kept(run):
            _look(run, watchers, first=True)
    with SignalWatch() as signals:
        while run.progress.step < run.recipe.max_train_steps:
            before = copy.copy(run.progress)
            values = optimizer_step(run, batches, meter, signals)
            if values is None:
                run.progress = before  # batches whose gradients were not used count as not seen
                _stop(run, signals)
            with together(run.accelerator), with_what_is_kept(run):
                watchers.log.write(run.progress.step, values)
            shown = {name: values[name] for name in ("train/loss", "train/flow") if name in values}
            watchers.bar.update(run.progress.step, shown)
            if _is_due(run, run.recipe.checkpointing_steps):
                _save(run)
            if signals.anywhere(run.accelerator):
                _stop(run, signals)
            with together(run.accelerator), with_what_is_kept(run):
                _look(run, watchers)
    if run.progress.skipped:
        say(run.accelerator, f"{run.progress.skipped} steps of this run were skipped, their loss was no number")


def optimizer_step(
    run: Run, batches: Iterator[Batch], meter: LossMeter, signals: SignalWatch
) -> dict[str, float] | None:
    """One optimizer step; returns what to log, or None when a signal came before it was done.

    A step whose loss or gradient is no number changes no weight, and no state but the counts.

    Raises:
        UserError: it is one too many of those.
    """
    accelerator, recipe, trained = run.accelerator, run.recipe, run.trained
    weights = weights_at(trained.objectives, run.progress.step)
    norm = torch.zeros(())
    fine, seen = True, []
    started, waited = time.perf_counter(), 0.0
    for _ in range(recipe.gradient_accumulation_steps):
        seed = step_seed(recipe.seed, run.progress.micro_step, accelerator.process_index)
        asked = time.perf_counter()
        with together(accelerator):  # a process without a batch would leave the others in the backward pass
            batch = next(batches)
        waited += time.perf_counter() - asked
        set_seed(seed)  # what draws from the global generators, such as LoRA dropout
        with accelerator.accumulate(run.model):
            generator = torch.Generator().manual_seed(seed)
            batch = batch.to(accelerator.device)
            output = run.model(batch, run.data.empty_text, generator=generator, weights=weights)
            accelerator.backward(output.loss)
            seen.append((batch.keys, output.loss.detach()))
            if accelerator.sync_gradients:
                norm = _clip(run)
                fine = all_finite(accelerator, seen, norm)
            if fine:
                run.optimizer.step()
            run.optimizer.zero_grad()
        meter.add(output, len(batch.keys))
        run.progress.micro_step += 1
        if not accelerator.sync_gradients and signals.anywhere(accelerator):
            return None
    run.progress.step += 1
    values = {f"train/{name}": value for name, value in meter.reduce(accelerator).items()}
    values |= {"train/grad_norm": float(norm)}
    values |= {f"train/{objective.weight_name}": weights[objective.name] for objective in trained.objectives}
    values |= _rates(run)
    values[DATA_WAIT] = waited / (time.perf_counter() - started)  # the norm has waited for the device
    _conclude(run, fine, seen)
    return {**values, "train/skipped": run.progress.skipped}


def _conclude(run: Run, fine: bool, seen: Seen) -> None:
    """Schedule and average after a step. The schedule is a function of the step, skipped or not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")  # the first step, skipped
        run.scheduler.step()
    if fine:
        run.bad_steps.clear()
        if run.trained.ema is not None:
            run.trained.ema.step([parameter for _, parameter in run.trained.branch.named_parameters()])
        return
    run.progress.skipped += 1
    bad = look_into(run.accelerator, getattr(run.data, "training", None), run.progress.step, seen)
    with together(run.accelerator):
        say(run.accelerator, run.bad_steps.add(bad, partial(newest_checkpoint, run.output_dir)))


def _clip(run: Run) -> torch.Tensor:
    """Clip the gradients where the recipe says so; returns their norm before."""
    parameters = [parameter for _, parameter in run.trained.named_parameters()]
    limit = run.recipe.max_grad_norm
    if limit is None:
        return torch.nn.utils.get_total_norm([item.grad for item in parameters if item.grad is not None])
    return torch.as_tensor(run.accelerator.clip_grad_norm_(parameters, limit))


def _rates(run: Run) -> dict[str, float]:
    names = ("train/learning_rate", "train/projector_learning_rate")
    return {name: float(rate) for name, rate in zip(names, run.scheduler.get_last_lr(), strict=False)}


def endless_batches(run: Run) -> Iterator[Batch]:
    """One pass over the data after the other; `run.progress` says where to begin and is kept up to date."""
    batches = run.data.training_batches(run.progress.epoch, run.progress.position)
    for batch in batches if run.data.workers else read_ahead(batches):  # workers read ahead by themselves
        run.progress.position += 1
        if run.progress.position == len(run.data.sampler):
            run.progress.epoch, run.progress.position = run.progress.epoch + 1, 0
        yield batch


def _is_due(run: Run, every: int | None) -> bool:
    step = run.progress.step
    return every is not None and (step % every == 0 or step == run.recipe.max_train_steps)


def _look(run: Run, watchers: _Watchers, first: bool = False) -> None:
    """Validate and make sample videos where their step has come; before the first step, validate only."""
    recipe, step = run.recipe, run.progress.step
    if recipe.validation_steps and (first or _is_due(run, recipe.validation_steps)):
        with averaged_weights(run.trained):
            values = validate(
                run.module,
                run.data.validation_batch,
                run.data.groups,
                run.data.empty_text,
                run.accelerator,
                weights=full_weights(run.trained.objectives),
                left_out=run.data.left_out,
            )
        without = tell_left_out(run)
        watchers.log.write(step, {f"validation/{name}": value for name, value in values.items()})
        loss = values["flow"]
        say(run.accelerator, f"step {step}: validation flow loss {loss:.5f}{without}{why_not(run, loss)}")
    if watchers.sampler is not None and not first and _is_due(run, recipe.sample_steps):
        with averaged_weights(run.trained):
            watchers.sampler.write(run.output_dir / SAMPLES / f"step-{step}")


def _save(run: Run) -> None:
    """Write a checkpoint; all processes leave together.

    Raises:
        WriteError: it cannot be written; the line says what is kept.
    """
    with together(run.accelerator), with_what_is_kept(run):
        if run.accelerator.is_main_process:
            limit = run.recipe.checkpoints_total_limit
            save_checkpoint(run.output_dir, run.trained, run.progress, run.facts(), limit, run.data.rows)
            run.saved = run.progress.step


def _stop(run: Run, signals: SignalWatch) -> NoReturn:
    """Write a checkpoint unless there is one of this step, then raise `Interrupted`."""
    number = signals.anywhere(run.accelerator)
    step = run.progress.step
    if step == 0:
        raise Interrupted(number, "stopped before the first step was done; there is nothing to resume")
    if largest(run.accelerator, int(run.saved or 0)) != step:
        _save(run)
    how = "to go on, run the same command with resume_from_checkpoint=latest"
    raise Interrupted(number, f"stopped at step {step}, checkpoint written; {how}")


def finish(run: Run) -> Path:
    """Write the adapter's folder and the sidecar beside it, upload the adapter where the recipe asks for it.

    Raises:
        UserError: the Hub refused.
    """
    folder, recipe, branch = run.output_dir / ADAPTER, run.recipe, run.trained.branch
    with (
        stopping_means(
            "all steps are done; run the same command with resume_from_checkpoint=latest to write the adapter"
        ),
        together(run.accelerator),
        with_what_is_kept(run),
        averaged_weights(run.trained),
    ):
        if run.accelerator.is_main_process:
            branch.save_pretrained(folder)
            with atomic_folder(run.output_dir / TRAINING) as temporary:
                save_sidecar(temporary, run.trained)
                write_sidecar_checksums(temporary)
            say(run.accelerator, f"adapter written to {folder}; projectors stay in {run.output_dir / TRAINING}")
    with stopping_means(f"the adapter is in {folder}"), together(run.accelerator), averaged_weights(run.trained):
        if run.accelerator.is_main_process and recipe.push_to_hub:
            assert recipe.hub_model_id is not None
            branch.push_to_hub(recipe.hub_model_id, private=recipe.hub_private)
            say(run.accelerator, f"uploaded to {recipe.hub_model_id}")
    return folder
