"""`refalign doctor`: what this machine can run, read off the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

CORE = ("torch", "diffusers", "peft", "transformers", "accelerate", "safetensors", "huggingface_hub", "av")
OPTIONAL = {
    "bitsandbytes": "8-bit optimizers: pip install 'refalign-adapter[train]'",
    "datasets": "training: pip install 'refalign-adapter[train]'",
    "tensorboard": "training curves: pip install 'refalign-adapter[train]'",
    "matplotlib": "the demo's report: pip install 'refalign-adapter[analysis]'",
    "xformers": "an optional attention backend: pip install 'refalign-adapter[xformers]'",
}
# bf16 weights of base, text encoder and VAE by parameter count; activations and optimizer state come on top.
WEIGHTS_GB = {
    "Wan 2.1 T2V 1.3B": (2.8, 11.4),
    "Wan 2.1 T2V 14B": (28.6, 11.4),
    "Wan 2.2 TI2V-5B": (10.0, 11.4),
    "LTX-Video 0.9": (3.8, 9.5),
}


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report.

    Attributes:
        topic: what was looked at.
        value: what was found.
        ok: True fine, False missing and needed, None worth knowing.
        advice: the way out, or empty.
    """

    topic: str
    value: str
    ok: bool | None = True
    advice: str = ""


def examine() -> list[Finding]:
    """Look at Python, packages, plug-ins, accelerator, memory and disk. Loads torch and plug-ins, changes nothing."""
    return [*_system(), *_packages(), *_plugins(), *_accelerator(), *_models()]


def _system() -> list[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    python = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    size = f"{memory.total / 1e9:.0f} GB memory, {memory.available / 1e9:.0f} GB free"
    room = (True, "") if free > 5 else (None, "little room for caches and models")
    return [
        Finding("Python", python, sys.version_info >= (3, 11)),
        Finding("CPU", f"{os.cpu_count()} cores, {size}"),
        Finding("Disk here", f"{free:.0f} GB free", *room),
    ]


def _packages() -> list[Finding]:
    findings = []
    for name in (*CORE, *OPTIONAL):
        try:
            findings.append(Finding(name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            advice = OPTIONAL.get(name, "pip install refalign-adapter")
            findings.append(Finding(name, "not installed", None if name in OPTIONAL else False, advice))
    return findings


def _plugins() -> list[Finding]:
    """Families and teachers of other packages; one that cannot be used matters to whoever needs it alone."""
    from ..families.lookup import PLUGINS as families
    from ..teachers.lookup import PLUGINS as teachers

    return [
        Finding(
            f"plug-in, {plugins.field} {plugin.name}",
            f"{plugin.entry.value} of {plugin.package}",
            None if (problem := plugins.problem(plugin)) else True,
            problem or "",
        )
        for plugins in (families, teachers)
        for plugin in plugins.found
    ]


def _accelerator() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        advice = "the demo runs on the CPU; the models below need a CUDA GPU to be practical"
        return [Finding("GPU", "none that torch can use", None, advice)]
    findings = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        size = properties.total_memory / 1e9
        findings.append(
            Finding(f"GPU {index}", f"{properties.name}, {size:.0f} GB, CUDA {torch.version.cuda}, {bf16}")
        )
    return findings


def _models() -> list[Finding]:
    """Which base fits this GPU's memory by its weights alone, in bf16."""
    import torch

    if not torch.cuda.is_available():
        return [Finding(name, "not practical without a GPU", None) for name in WEIGHTS_GB]
    memory = (
        max(torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())) / 1e9
    )
    return [_fit(name, transformer, text, memory) for name, (transformer, text) in WEIGHTS_GB.items()]


def _fit(name: str, transformer: float, text: float, memory: float) -> Finding:
    if memory > transformer + text:
        return Finding(name, f"weights take {transformer + text:.0f} GB of {memory:.0f} GB with the text encoder")
    if memory > transformer:
        advice = "generate with --offload model; cache before training, so that the text encoder is not loaded"
        return Finding(
            name, f"the transformer's {transformer:.0f} GB fit, the text encoder's {text:.0f} GB do not", None, advice
        )
    return Finding(name, f"the transformer alone takes {transformer:.0f} GB of {memory:.0f} GB", None, "a larger GPU")
