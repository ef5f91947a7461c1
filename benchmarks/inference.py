"""What references cost at inference: plain text-to-video, joint, and isolated attention with cached keys and values.

    python benchmarks/inference.py                       # a small Wan on the CPU: some minutes
    python benchmarks/inference.py --device cuda --preset 1.3b --references 1
    python benchmarks/inference.py --device cuda --preset 5b --references 1
    python benchmarks/inference.py --device cuda --preset ltx --references 1
    python benchmarks/inference.py --device cuda --reference-scale 0.5 --dropped 0.4 --backend xformers

Random weights, shared by all; the transformer alone, without VAE and text encoder. Wan 2.2's 5b gets a timestep for
every token, as from its pipeline. Every round times all passes there and back, and ratios are medians over rounds.
Joint attention takes full-size references, and its LoRA is merged, as is that of isolated attention with scope all.

A step has the paper's passes: plain text-to-video two (prompt, negative prompt); with references three, one of which
goes without them and is counted as plain. A video is 50 steps, and the references' prefill where keys and values are
cached.

s is the share of a plain pass that self-attention's dot products take: all the attention calls that a pass makes, of
the same size and layout, timed in the same rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import _models as models
import _setting as options
import torch
from _measure import Times, peak_bytes, time_in_turn
from _report import MIB, Bar, print_bars, print_table, report, start
from _setting import Setting
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

import refalign_adapter as ra
from refalign_adapter.branch.reference_branch import ReferenceBranch
from refalign_adapter.branch.reference_cache import ReferenceCache
from refalign_adapter.families.lookup import load_family

STEPS = 50
PLAIN, JOINT, REFERENCE, ALL = "plain", "joint, merged", "isolated/reference, cached", "isolated/all, merged, cached"
CACHED = (REFERENCE, ALL)
DOT_PRODUCTS = "dot products"
PREFILL = "{}: prefill"
COLUMNS = ("", "pass s", "/ plain", "prefill s", "/ pass", "step s", "video s", "/ plain", "peak MiB", "beyond plain")


@dataclass
class Case:
    """A transformer and what it is given besides video and text.

    Attributes:
        transformer: with or without a branch.
        inputs: the arguments of a pass.
        branch: its reference branch; None without.
        references: (B, C, M, h, w), with the branch.
        tokens: (B, M, rows, columns) bool, those that are kept; None: all.
    """

    transformer: Any
    inputs: dict[str, Any]
    branch: ReferenceBranch | None = None
    references: Tensor | None = None
    tokens: Tensor | None = None

    def denoise(self, references: Tensor | ReferenceCache | None) -> None:
        """One pass."""
        riding = nullcontext() if self.branch is None else self.branch.references(references)
        with riding:
            self.transformer(**self.inputs)

    def prefill(self) -> ReferenceCache:
        """Keys and values of the references."""
        assert self.branch is not None
        assert self.references is not None
        _, frames, _, _ = self.branch.family.call_shape(self.branch.transformer, self.inputs)
        cache = self.branch.encode_references(self.references, tokens=self.tokens, frames=frames)
        assert cache is not None
        return cache

    def prefill_and_denoise(self) -> None:
        """Prefill and one pass with what it gave."""
        self.denoise(self.prefill())


def build_cases(setting: Setting) -> dict[str, Case]:
    """All cases on one copy of the weights."""
    torch.manual_seed(0)
    base = models.random_transformer(setting)
    inputs = models.call_arguments(setting, base)
    full, _ = models.random_references(setting, economical=False)
    economical, tokens = models.random_references(setting, economical=True)
    given = {JOINT: (full, None), REFERENCE: (economical, tokens), ALL: (economical, tokens)}
    cases = {PLAIN: Case(base, inputs)}
    for name, (references, kept) in given.items():
        transformer = models.sharing_weights(base)
        branch = _attach(transformer, name, setting)
        cases[name] = Case(transformer, inputs, branch, references.to(setting.dtype), kept)
    return cases


def _attach(transformer: Any, name: str, setting: Setting) -> ReferenceBranch:
    """A branch with its LoRA in the base's type, merged where its scope allows it."""
    config = ra.RefAlignConfig(
        attention="joint" if name == JOINT else "isolated",
        lora_scope="reference" if name == REFERENCE else "all",
        reference_scale=1.0 if name == JOINT else setting.scale,
        drop_background=name != JOINT and setting.dropped > 0,
        r=setting.rank,
        lora_alpha=setting.rank,
        align_layers=setting.size.layers - 1,
        max_sequence_length=setting.size.text_tokens,
    )
    branch = ra.attach(transformer, config, seed=0)
    for _, parameter in branch.named_parameters():
        parameter.data = parameter.data.to(setting.dtype)
    if config.lora_scope == "all":  # the update is zero, so that the shared weights stay as they are
        transformer.fuse_lora()
        transformer.unload_lora()
        branch.merged = True
    return branch


def build_works(setting: Setting, cases: dict[str, Case]) -> dict[str, Callable[[], Any]]:
    """Every pass and prefill to be timed, and a plain pass's attention calls."""
    works: dict[str, Callable[[], Any]] = {}
    for name, case in cases.items():
        works[name] = partial(case.denoise, case.prefill() if name in CACHED else case.references)
        if name in CACHED:
            works[PREFILL.format(name)] = case.prefill
    size, transformer = setting.size, cases[PLAIN].transformer
    shape = (setting.batch, size.tokens, size.heads, size.dim // size.heads)
    query, key, value = (torch.randn(shape, device=setting.device).to(setting.dtype) for _ in range(3))
    family = load_family(transformer)
    attention: Any = family.self_attention(family.blocks(transformer)[0])
    backend = attention.processor._attention_backend

    def dot_products() -> None:
        for _ in range(size.layers):
            dispatch_attention_fn(query, key, value, backend=backend)

    works[DOT_PRODUCTS] = dot_products
    return works


def measure_memory(setting: Setting, cases: dict[str, Case]) -> dict[str, int]:
    """Peak bytes beyond weights and inputs of a pass, together with the prefill where there is one."""
    return {
        name: peak_bytes(
            case.prefill_and_denoise if name in CACHED else partial(case.denoise, case.references), setting.device
        )
        for name, case in cases.items()
    }


@dataclass
class Result:
    """All that was measured.

    Attributes:
        times: seconds of every work.
        peaks: peak bytes of every case beyond weights and inputs.
        cached_bytes: of the keys and values.
        reference_tokens: cached tokens of one video.
        tokens: of the video.
    """

    times: Times
    peaks: dict[str, int]
    cached_bytes: int
    reference_tokens: int
    tokens: int

    @property
    def attention_share(self) -> float:
        """s: self-attention's dot products as a share of a plain pass."""
        return self.times.ratio(DOT_PRODUCTS, PLAIN)

    def step_seconds(self, name: str) -> float:
        """Of a step of the paper's."""
        plain = self.times.median(PLAIN)
        return 2 * plain if name == PLAIN else plain + 2 * self.times.median(name)

    def video_seconds(self, name: str) -> float:
        """Of a whole video, prefill included."""
        prefill = self.times.median(PREFILL.format(name)) if name in CACHED else 0.0
        return prefill + STEPS * self.step_seconds(name)

    def bars(self) -> list[Bar]:
        """What cached keys and values have to reach."""
        bound = 1.03 * (1 + self.attention_share * self.reference_tokens / self.tokens)
        bars = []
        for name in CACHED:
            ratio = self.times.ratio(name, PLAIN)
            more = (self.peaks[name] - self.peaks[PLAIN]) / self.cached_bytes
            bars += [
                Bar(f"{name}: pass / plain pass", ratio, 1.05),
                Bar(f"{name}: pass / plain pass, bound 1.03 (1 + s M/F)", ratio, bound),
                Bar(f"{name}: prefill / plain pass", self.times.ratio(PREFILL.format(name), PLAIN), 0.10),
                Bar(f"{name}: memory beyond plain / keys and values", more, 1.10),
            ]
        return bars

    def to_dict(self) -> dict[str, Any]:
        """JSON."""
        names = list(self.peaks)
        return {
            "seconds": dict(self.times),
            "step_seconds": {name: self.step_seconds(name) for name in names},
            "video_seconds": {name: self.video_seconds(name) for name in names},
            "peak_bytes": self.peaks,
            "key_value_bytes": self.cached_bytes,
            "attention_share": self.attention_share,
            "reference_tokens": self.reference_tokens,
            "tokens": self.tokens,
            "bars": [bar.to_dict() for bar in self.bars()],
        }


def measure(setting: Setting) -> Result:
    """Build, measure, clean up."""
    with torch.no_grad():
        cases = build_cases(setting)
        cache = cases[REFERENCE].prefill()
        facts = cache.nbytes, cache.tokens, setting.size.tokens
        del cache
        times = time_in_turn(build_works(setting, cases), setting.rounds, setting.device)
        peaks = measure_memory(setting, cases)  # last: what libraries allocate at their first call is there already
    return Result(times, peaks, *facts)


def print_result(result: Result) -> None:
    """The table of passes, the share of attention, the bars."""
    rows = []
    for name in result.peaks:
        prefill = ["", ""]
        if name in CACHED:
            key = PREFILL.format(name)
            prefill = [f"{result.times.median(key):.3f}", f"{result.times.ratio(key, PLAIN):.3f}"]
        rows.append(
            [
                name,
                f"{result.times.median(name):.3f}",
                f"{result.times.ratio(name, PLAIN):.3f}",
                *prefill,
                f"{result.step_seconds(name):.2f}",
                f"{result.video_seconds(name):.0f}",
                f"{result.video_seconds(name) / result.video_seconds(PLAIN):.2f}",
                f"{result.peaks[name] / MIB:.1f}",
                f"{(result.peaks[name] - result.peaks[PLAIN]) / MIB:.1f}",
            ]
        )
    print_table(f"Passes; a step is 2 of them plain, else 3; a video {STEPS} steps", COLUMNS, rows)
    ratio = result.tokens / result.reference_tokens
    print(f"self-attention's dot products: s = {result.attention_share:.3f} of a plain pass")
    print(f"tokens: {result.reference_tokens:,} of references, 1/{ratio:.1f} of the video's {result.tokens:,}")
    print(f"keys and values: {result.cached_bytes / MIB:.1f} MiB; peaks are beyond weights and inputs")
    print_bars(result.bars())


def main(
    preset: options.PresetOption = None,
    dim: options.DimOption = None,
    heads: options.HeadsOption = None,
    layers: options.LayersOption = None,
    ffn: options.FfnOption = None,
    frames: options.FramesOption = None,
    height: options.HeightOption = None,
    width: options.WidthOption = None,
    references: options.ReferencesOption = 3,
    reference_scale: options.ScaleOption = 1.0,
    dropped: options.DroppedOption = 0.0,
    batch: options.BatchOption = 1,
    rank: options.RankOption = 64,
    dtype: options.DtypeOption = None,
    device: options.DeviceOption = "cpu",
    backend: options.BackendOption = None,
    rounds: options.RoundsOption = 5,
    threads: options.ThreadsOption = None,
    json: options.JsonOption = None,
) -> None:
    """Time plain, joint and cached passes in turn."""
    if threads is not None:
        torch.set_num_threads(threads)
    model = {"dim": dim, "heads": heads, "layers": layers, "ffn": ffn}
    video = {"frames": frames, "height": height, "width": width}
    setting = options.make_setting(
        options.choose_size(preset, device, model=model, video=video),
        references=references,
        scale=reference_scale,
        dropped=dropped,
        batch=batch,
        rank=rank,
        dtype=dtype,
        device=device,
        backend=backend,
        rounds=rounds,
    )
    report(setting, measure, print_result, json)


if __name__ == "__main__":
    start(main)
