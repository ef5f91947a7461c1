"""Reproduce the shipped judge: `python tools/world/pretrain_judge.py --output DIR`.

Draws what the judge learns from and passes it through the shipped base's VAE, trains the finder and then the reader,
and writes `DIR/assets/judge.safetensors` and `judge.json` with the report on drawn held-out clips. Pictures
that are in `DIR` already are taken from there. The shipped judge took about 25 minutes on one core.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from judge_data import PLACES, SEED, Pictures, draw_pictures
from judge_report import CLIPS as REPORTED
from judge_report import judge_report, load_vae
from pretrain_vae import to_signal
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from refalign_adapter.json_files import write_json
from refalign_adapter.world.judge import (
    LOOK_SIZES,
    OFFSET_UNIT,
    SIDE,
    JudgeNetwork,
    Squares,
    cut_crops,
    squares_around,
)
from refalign_adapter.world.reading import Judge
from refalign_adapter.world.tracks import SMALLEST

WIDTHS = {"finder": [16, 32, 48, 80], "reader": [16, 48, 96, 128]}
CLIPS = 5000
FINDER_STEPS, FINDER_BATCH = 3500, 16
READER_STEPS, READER_BATCH = 9500, 64
RATE = 2e-3
AVERAGE = 0.998
DECODED = 0.75
"""Share of the pictures in a batch that come out of the VAE, as all do that the judge is for."""
BLANK = 0.03
"""Share of the finder's pictures that are noise or one colour, where nothing is to be found."""


def pretrain_judge(output: str | Path, vae: Any, *, seed: int = SEED, steps: int | None = None) -> None:
    """Train the judge and write it.

    Args:
        output: the folder to write.
        vae: whose pictures the judge must read.
        seed: of weights, batches and drawn clips.
        steps: cap on the steps of both nets and on clips, for a trial; None runs them in full.
    """
    root, started, limit = Path(output), time.time(), steps or 10**9
    root.mkdir(parents=True, exist_ok=True)

    def log(line: str) -> None:
        print(f"{time.time() - started:6.0f} s  {line}", flush=True)

    drawn = root / "judge_pictures.safetensors"
    if not drawn.exists():
        draw_pictures(vae, min(CLIPS, limit), seed).save(drawn)
    pictures = Pictures.load(drawn)
    log(f"{len(pictures.images)} pictures")
    torch.manual_seed(seed)
    network = JudgeNetwork(**WIDTHS)
    finder = train(network.finder, finder_losses(network, pictures, seed), min(FINDER_STEPS, limit), log)
    reader = train(network.reader, reader_losses(network, pictures, seed), min(READER_STEPS, limit), log)
    network.finder.load_state_dict(finder)
    network.reader.load_state_dict(reader)
    write_judge(network, vae, root / "assets", min(REPORTED, limit))
    log("done")


def train(net: nn.Module, losses: Iterator[Tensor], steps: int, log: Callable[[str], None]) -> dict[str, Tensor]:
    """Train a net for so many steps and return the running average of its weights."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):  # a fifth faster on the CPU
            module.weight.data = module.weight.data.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    average = {key: value.detach().clone() for key, value in net.state_dict().items()}
    for step in range(steps):
        loss = next(losses)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(AVERAGE, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.values()), list(net.state_dict().values()), 1 - decay)
        if step % 100 == 0:
            log(f"{type(net).__name__} step {step}: loss {loss.item():.3f}")
    return average


def finder_losses(network: JudgeNetwork, pictures: Pictures, seed: int) -> Iterator[Tensor]:
    """Cross-entropy of every pixel's kind and mean error of the subject pixels' offsets, batch after batch."""
    generator = torch.Generator().manual_seed(seed)
    line = torch.arange(SIDE) + 0.5
    grid = torch.stack([line.expand(SIDE, SIDE), line[:, None].expand(SIDE, SIDE)])
    weights = torch.where(pictures.decoded, DECODED, 1 - DECODED)
    while True:
        rows = torch.multinomial(weights, FINDER_BATCH, replacement=True, generator=generator)
        images, owners = augment(pictures.images[rows], generator), pictures.owners[rows].long()
        blank = torch.rand(FINDER_BATCH, generator=generator) < BLANK
        images[blank], owners[blank] = _blanks(images[blank], generator), 0
        padded = functional.pad(pictures.kinds[rows] + 1, (1, 0))
        target = padded.gather(1, owners.flatten(1)).view_as(owners)
        places = (owners - 1).clamp_min(0).flatten(1)[:, None].expand(-1, 2, -1)
        centres = pictures.centres[rows].transpose(1, 2).gather(2, places).unflatten(2, owners.shape[1:])
        seen = network.finder(images.contiguous(memory_format=torch.channels_last))
        error = (seen.offsets - (centres - grid)).abs().sum(1)[owners > 0].sum() / (owners > 0).sum().clamp_min(1)
        yield functional.cross_entropy(seen.logits, target) + 0.5 * error / OFFSET_UNIT


def reader_losses(network: JudgeNetwork, pictures: Pictures, seed: int) -> Iterator[Tensor]:
    """Sum of the cross-entropies of the looks on crops around subjects, batch after batch."""
    generator = torch.Generator().manual_seed(seed + 1)
    areas = torch.stack([(pictures.owners == place + 1).flatten(1).sum(1) for place in range(PLACES)], dim=1)
    items = (areas >= SMALLEST * SIDE**2).nonzero()
    weights = torch.where(pictures.decoded[items[:, 0]], DECODED, 1 - DECODED)
    while True:
        drawn = torch.multinomial(weights, READER_BATCH, replacement=True, generator=generator)
        rows, places = items[drawn].unbind(1)
        masks = _rough(pictures.owners[rows] == places[:, None, None] + 1, generator)
        squares = _jittered(squares_around(masks), generator)
        crops = cut_crops(augment(pictures.images[rows], generator), masks, squares)
        mirrored = torch.rand(len(crops), generator=generator) < 0.5
        crops = torch.where(mirrored[:, None, None, None], crops.flip(3), crops)
        parts = network.reader(crops.contiguous(memory_format=torch.channels_last)).split(LOOK_SIZES, dim=1)
        targets = pictures.looks[rows, places].unbind(1)
        yield torch.stack([functional.cross_entropy(*pair) for pair in zip(parts, targets, strict=True)]).sum()


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 (B, H, W, 3) to float (B, 3, H, W) in [-1, 1], with other light, a little blur and a little noise."""
    signal = to_signal(images).permute(0, 3, 1, 2)
    count = (len(signal), 1, 1, 1)
    gain = 1 + 0.08 * (2 * torch.rand(count, generator=generator) - 1)
    tint = 1 + 0.04 * (2 * torch.rand(len(signal), 3, 1, 1, generator=generator) - 1)
    signal = (signal + 1) * gain * tint - 1
    blur = 0.5 * torch.rand(count, generator=generator) * (torch.rand(count, generator=generator) < 0.4)
    smooth = functional.avg_pool2d(functional.pad(signal, (1, 1, 1, 1), mode="replicate"), 3, 1)
    noise = 0.08 * torch.rand(count, generator=generator) * torch.randn(signal.shape, generator=generator)
    return (signal + blur * (smooth - signal) + noise).clamp(-1, 1)


def _blanks(images: Tensor, generator: torch.Generator) -> Tensor:
    colours = 2 * torch.rand(len(images), 3, 1, 1, generator=generator) - 1
    strength = torch.rand(len(images), 1, 1, 1, generator=generator)
    return (colours + strength * torch.randn(images.shape, generator=generator)).clamp(-1, 1)


def _rough(masks: Tensor, generator: torch.Generator) -> Tensor:
    """Masks a pixel larger, a pixel smaller or as they are: a found mask is never exact."""
    choice = torch.rand(len(masks), 1, 1, generator=generator)
    plain = masks[:, None].float()
    larger, smaller = functional.max_pool2d(plain, 3, 1, 1), -functional.max_pool2d(-plain, 3, 1, 1)
    return torch.where(choice < 0.25, larger[:, 0], torch.where(choice > 0.75, smaller[:, 0], plain[:, 0])) > 0.5


def _jittered(squares: Squares, generator: torch.Generator) -> Squares:
    """Squares moved, scaled and, every second one, turned."""
    x, y, scale, turn = (2 * torch.rand(4, len(squares.x), generator=generator) - 1).unbind(0)
    turned = torch.rand(len(turn), generator=generator) < 0.5
    reach, side = 0.05 * squares.side, squares.side * (1 + 0.1 * scale)
    return Squares(squares.x + reach * x, squares.y + reach * y, side, turn * torch.pi * turned)


def write_judge(network: JudgeNetwork, vae: Any, assets: Path, clips: int) -> None:
    """Write the weights as float16, and beside them what the judge with these weights reads right."""
    assets.mkdir(parents=True, exist_ok=True)
    weights = {key: value.half().contiguous() for key, value in network.state_dict().items()}
    save_file(weights, assets / "judge.safetensors")
    (assets / "judge.safetensors").chmod(0o644)
    network.load_state_dict({key: value.float() for key, value in weights.items()})
    report = judge_report(Judge(network.eval().requires_grad_(False), ()), vae, clips=clips)
    write_json(assets / "judge.json", {"widths": WIDTHS, **report})


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True)
    parser.add_argument("--vae", default=None, help="a VAE's folder; the shipped base's if left out")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument(
        "--steps", type=int, default=None, help="cap on the steps of both nets and on clips, for a trial"
    )
    arguments = parser.parse_args()
    pretrain_judge(arguments.output, load_vae(arguments.vae), seed=arguments.seed, steps=arguments.steps)


if __name__ == "__main__":
    main()
