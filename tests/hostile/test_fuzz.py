"""Mutated inputs of every kind: no traceback, no hang, memory within bounds. Each one is made from its number."""

import copy
import json
import random
import resource
import shutil
import signal
from contextlib import contextmanager

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny_adapter import anatomy, save_tiny_adapter, weights_of
from tiny_models import tiny_pipeline

import refalign_adapter as ra
from refalign_adapter.data.cache.dataset import CachedDataset
from refalign_adapter.data.cache.index import index_path, read_index
from refalign_adapter.data.sources.manifest import load_manifest
from refalign_adapter.errors import UserError
from refalign_adapter.export.folder import open_adapter
from refalign_adapter.generation.prompts import read_prompts
from refalign_adapter.media.images import read_image, read_mask
from refalign_adapter.media.video import probe_video, read_video
from refalign_adapter.media.video_file import write_video
from refalign_adapter.recipes.file import load_recipe
from refalign_adapter.tensor_files import save_tensors
from refalign_adapter.training.checkpoint_files import read_state

ODD = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, -(10**30), 0.5, 1e300, "", "x", "ä" * 300, "a\0b", "../..", "~",
    [], {}, [[]], [None], {"a": {}}, [0] * 50, {"": 1}, "((", ".*" * 50, "é", "1e999", "null", ["a", "a"], "\u202e",
]  # fmt: skip


def mutate_value(value, generator):
    """Somewhere in a value of JSON types, another value, a key gone or one more."""
    value = copy.deepcopy(value)
    target, path = value, []
    while isinstance(target, dict | list) and target and generator.random() < 0.7:
        key = generator.choice(list(target) if isinstance(target, dict) else range(len(target)))
        path.append((target, key))
        target = target[key]
    if not path:
        return generator.choice(ODD)
    holder, key = path[-1]
    kind = generator.randrange(4)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[generator.choice(["x", "", "__class__", "r", "file_name", "key"])] = generator.choice(ODD)
    else:
        holder[key] = generator.choice(ODD)
    return value


def mutate_bytes(content, generator):
    """A file's bytes: flipped, cut, doubled, mixed up."""
    content = bytearray(content)
    for _ in range(generator.randint(1, 6)):
        place = generator.randrange(max(1, len(content)))
        kind = generator.randrange(5)
        if kind == 0 and content:
            content[place] ^= 1 << generator.randrange(8)
        elif kind == 1:
            del content[place:]
        elif kind == 2:
            content[place:place] = generator.randbytes(generator.randrange(1, 40))
        elif kind == 3:
            content[place : place + 8] = generator.choice([b"\xff" * 8, b"\0" * 8, b"[" * 200])
        else:
            content += content[place : place + 100]
    return bytes(content)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One of each kind of input, to be spoilt."""
    folder = tmp_path_factory.mktemp("whole")
    save_tiny_adapter(folder / "adapter")
    save_tiny_adapter(folder / "scoped", attention="isolated", lora_scope="reference", align_layers=1)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 30, 4), np.uint8)).save(folder / "a.png")
    Image.new("RGB", (40, 30), "red").save(folder / "a.jpg")
    Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100).save(folder / "a.tif")
    write_video(folder / "a.mp4", np.random.default_rng(1).integers(0, 256, (9, 32, 32, 3), np.uint8), 8)
    return folder


@contextmanager
def in_time(seconds=20):
    def late(*_):
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def adapter_config(whole, folder, generator):
    shutil.copytree(whole / generator.choice(["adapter", "scoped"]), folder, dirs_exist_ok=True)
    path = folder / "refalign_config.json"
    if generator.random() < 0.3:
        path.write_bytes(mutate_bytes(path.read_bytes(), generator))
    else:
        path.write_text(json.dumps(mutate_value(json.loads(path.read_text()), generator)))
    load_into_a_pipe(folder)


def adapter_weights(whole, folder, generator):
    shutil.copytree(whole / generator.choice(["adapter", "scoped"]), folder, dirs_exist_ok=True)
    path = weights_of(folder)
    path.write_bytes(mutate_bytes(path.read_bytes()[: generator.choice([None, 4000])], generator))
    load_into_a_pipe(folder)


def adapter_metadata(whole, folder, generator):
    from safetensors import safe_open
    from safetensors.torch import load_file

    shutil.copytree(whole / generator.choice(["adapter", "scoped"]), folder, dirs_exist_ok=True)
    path = weights_of(folder)
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    name = generator.choice(sorted(metadata))
    try:
        metadata[name] = json.dumps(mutate_value(json.loads(metadata[name]), generator))
    except ValueError:
        metadata[name] = str(generator.choice(ODD))
    save_tensors(path, load_file(path), metadata)
    load_into_a_pipe(folder)


def load_into_a_pipe(folder):
    before = anatomy(PIPE.transformer)
    try:
        open_adapter(folder)
        ra.load_adapter(PIPE, folder).unload()
    finally:
        assert anatomy(PIPE.transformer) == before


def manifest(whole, folder, generator):
    row = {
        "file_name": "a.mp4",
        "caption": "a",
        "references": [{"image": "a.png", "box": [1, 2, 9, 9], "subject": "s"}],
    }
    for name in ("a.mp4", "a.png"):
        shutil.copy(whole / name, folder)
    text = "".join(json.dumps(mutate_value(row, generator)) + "\n" for _ in range(3))
    path = folder / generator.choice(["metadata.jsonl", "a.csv", "b.json"])
    path.write_bytes(mutate_bytes(text.encode(), generator) if generator.random() < 0.4 else text.encode())
    load_manifest(str(path))


def prompts(whole, folder, generator):
    shutil.copy(whole / "a.png", folder)
    rows = [
        {"key": "a", "prompt": "a dog", "references": ["a.png"]},
        {"key": "b", "prompt": "c", "references": ["a.png"]},
    ]
    text = "".join(json.dumps(mutate_value(row, generator)) + "\n" for row in rows)
    (folder / "p.jsonl").write_bytes(
        mutate_bytes(text.encode(), generator) if generator.random() < 0.4 else text.encode()
    )
    read_prompts(folder / "p.jsonl", 4)


def recipe(whole, folder, generator):
    values = {
        "pretrained_model_name_or_path": "base",
        "output_dir": "out",
        "seed": 1,
        "learning_rate": 1e-4,
        "adapter": {"r": 4, "target_modules": ["to_q"], "align_layers": [0, 1]},
        "data": {"cache_dir": "cache", "train_data": [{"path": "a", "ratio": 1}], "buckets": ["81x480x832"]},
        "sample_prompts": [{"prompt": "a", "references": ["a.png"]}],
    }
    text = yaml.safe_dump(mutate_value(values, generator), allow_unicode=True)
    path = folder / "recipe.yaml"
    path.write_bytes(mutate_bytes(text.encode(), generator) if generator.random() < 0.5 else text.encode())
    load_recipe(path, [f"seed={generator.choice(ODD)}"] if generator.random() < 0.3 else [])


def picture(whole, folder, generator):
    name = generator.choice(["a.png", "a.jpg", "a.tif"])
    (folder / name).write_bytes(mutate_bytes((whole / name).read_bytes(), generator))
    for read in (read_image, read_mask):
        try:
            read(folder / name)
        except UserError:
            continue


def clip(whole, folder, generator):
    (folder / "a.mp4").write_bytes(mutate_bytes((whole / "a.mp4").read_bytes(), generator))
    probe_video(folder / "a.mp4")
    read_video(folder / "a.mp4", num_frames=5, height=32, width=32, fps=generator.choice([None, 8, 24]))


def state(whole, folder, generator):
    values = {
        "step": 3, "micro_step": 6, "epoch": 1, "position": 2, "skipped": 0, "run": {"seed": 0},
        "schedule": {"step": 1}, "optimizer": {"a": {"step": 3}}, "ema_steps": 2,
    }  # fmt: skip
    folder = folder / "checkpoint-3" / "training"
    folder.mkdir(parents=True)
    text = json.dumps(mutate_value(values, generator)).encode()
    (folder / "state.json").write_bytes(mutate_bytes(text, generator) if generator.random() < 0.4 else text)
    read_state(folder.parent)


def index(whole, folder, generator):
    entry = {
        "key": "a" * 32, "file_name": "a.mp4", "line": 1, "shape": [16, 2, 4, 6], "variants": 1, "subjects": [0],
        "parts": {"video": "a" * 32, "references": "b" * 32, "text": "c" * 32, "teachers": {"t": "d" * 32}},
    }  # fmt: skip
    meta = {
        "format": 1, "options": {"max_sequence_length": 16}, "manifests": {}, "teachers": {"t": 4},
        "empty_text": "e" * 32, "provenance": {"video": {"dtype": "bf16"}},
    }  # fmt: skip
    spoil = lambda value: mutate_bytes(json.dumps(mutate_value(value, generator)).encode(), generator)  # noqa: E731
    index_path(folder, "train").write_bytes(spoil(entry) if generator.random() < 0.6 else json.dumps(entry).encode())
    (folder / "meta.json").write_bytes(spoil(meta) if generator.random() < 0.6 else json.dumps(meta).encode())
    read_index(folder, "train")
    CachedDataset(folder)


READERS = [
    adapter_config, adapter_weights, adapter_metadata, manifest, prompts, recipe, picture, clip, state, index,
]  # fmt: skip
PIPE = tiny_pipeline()


def try_one(number, whole, folder):
    reader = READERS[number % len(READERS)]
    folder.mkdir()
    told = ""
    try:
        with in_time():
            reader(whole, folder, random.Random(number))
    except UserError as error:
        told = str(error)
    lines = told.splitlines()
    assert len(lines) < 60, number
    assert all(len(line) < 1200 for line in lines), number
    shutil.rmtree(folder)


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def test_some_mutated_inputs(whole, tmp_path):
    before = peak()
    for number in range(100):
        try_one(number, whole, tmp_path / str(number))
    assert peak() - before < 1000


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_many_mutated_inputs(whole, tmp_path):
    before = peak()
    for number in range(100, 1100):
        try_one(number, whole, tmp_path / str(number))
    assert peak() - before < 2000
