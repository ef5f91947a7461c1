"""Host memory of a training process, roughly."""

from __future__ import annotations

from .memory import Memory, Part, TrainingMemory
from .setting import Setting

LIBRARIES, WORKER = 3 * 10**9, 3 * 10**8
"""What a process takes for Python, torch and CUDA, and a data worker beside its batches; allowances."""
AHEAD = 2
"""Batches that are read ahead, by each worker or by the process itself."""


def host_memory(setting: Setting, training: TrainingMemory) -> Memory:
    """Of one process.

    The base counts once: it is read from mapped files into host memory and then moved to the GPU.

    Args:
        setting: the run.
        training: its memory on the GPU.
    """
    recipe = setting.recipe
    workers = recipe.dataloader_num_workers
    read = max(1, workers) * AHEAD * batch_bytes(setting)
    parts = [
        Part("allowance: Python, torch, CUDA libraries", LIBRARIES),
        Part("base, while it is loaded", training.base),
        Part("batches read ahead", read),
        Part(f"allowance: {workers} data workers", workers * WORKER),
        Part("offloaded activations, pinned", training.offloaded),
    ]
    return Memory(tuple(part for part in parts if part.bytes))


def batch_bytes(setting: Setting) -> int:
    """Bytes of a training batch of the largest samples."""
    batch = setting.shapes.batch(setting.recipe.train_batch_size, setting.references, "meta")
    tensors = [
        batch.latents,
        *batch.text.values(),
        batch.references,
        *(target for targets in batch.targets.values() for target in targets.values()),
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
