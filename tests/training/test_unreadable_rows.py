"""A cache that is damaged or stale: training says what, goes on where that is right, and never takes it for whole."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from seals import seal

from refalign_adapter.data.cache.build import cache_dataset
from refalign_adapter.data.cache.index import read_index
from refalign_adapter.data.cache.part_file import write_tensor
from refalign_adapter.data.cache.parts import DAMAGED, PartStore
from refalign_adapter.data.cache.verify import verify_cache
from refalign_adapter.errors import UserError
from refalign_adapter.recipes.cache_options import options_of
from refalign_adapter.training.datasource import open_data
from refalign_adapter.training.loop import train
from refalign_adapter.training.setup import build_accelerator


@pytest.fixture
def copied(tiny_world, make_recipe, tmp_path):
    """`copied("key=value", …)`: the tiny recipe on a copy of its cache."""
    shutil.copytree(tiny_world / "cache", tmp_path / "cache")

    def make(*overrides):
        return make_recipe(f"data.cache_dir={tmp_path / 'cache'}", *overrides)

    return make


def part_of(recipe, row, part="video"):
    """A row's file."""
    entry = read_index(recipe.data.cache_dir, "train")[row]
    key = next(key for name, key in entry.parts.files() if name == part)
    return PartStore(recipe.data.cache_dir).path(part, key)


def flip(path, position=-5):
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(bytes(content))


DAMAGES = {
    "a flipped bit": (flip, "is not what was written: its checksum differs"),
    "torn": (lambda path: os.truncate(path, path.stat().st_size // 2), "cannot be read"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read"),
    "gone": (lambda path: path.unlink(), "is missing"),
    "NaN with its checksum": (
        lambda path: rewrite(path, lambda tensor: tensor.index_fill(0, torch.tensor([0]), torch.nan)),
        "holds .* values that are no finite numbers",
    ),
    "another shape": (lambda path: rewrite(path, lambda tensor: tensor[:, :1]), "expected"),
    "another type": (lambda path: rewrite(path, lambda tensor: tensor.double()), "holds torch.float64, expected"),
}


def rewrite(path, change):
    write_tensor(path, change(load_file(path)["data"]).contiguous())


@pytest.mark.parametrize("part", ["video", "references", "text", "teacher"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_part_is_found_when_it_is_first_read_and_made_anew(copied, tmp_path, damage, part):
    recipe = copied()
    spoil, message = DAMAGES[damage]
    path = part_of(recipe, 2, part)
    if damage == "another shape" and part == "text":
        spoil, message = lambda path: rewrite(path, lambda tensor: tensor[:, :-1]), "expected"
    spoil(path)
    data = open_data(recipe, build_accelerator(recipe, tmp_path))
    with pytest.raises(UserError, match=rf"^cache: train line 3 \(2.mp4\): '.*{path.name}' .*{message}") as told:
        data.training[2]
    assert str(told.value).endswith("run `refalign cache --config …` to make it anew")
    assert not path.exists()
    assert path.with_suffix(DAMAGED).exists() == (damage != "gone")
    report = cache_dataset(options_of(recipe), device="cpu")
    assert dict(report.made) == {part: 1}
    assert verify_cache(options_of(recipe)).count > 0


def test_a_row_that_turns_unreadable_is_replaced_counted_and_listed(copied, tmp_path, capfd):
    recipe = copied("data.max_unreadable=0.5", "train_batch_size=1", "gradient_accumulation_steps=7")
    for row in (1, 4):
        flip(part_of(recipe, row))
    train(recipe)
    errors = capfd.readouterr().err
    for row in (1, 4):
        assert errors.count(f"skipped, another row is taken: cache: train line {row + 1} ({row}.mp4)") == 1
    assert "2 of 7 rows could not be read and others were taken instead: train line" in errors


@pytest.mark.parametrize("workers", [0, 2])
def test_more_than_the_share_stops_the_run(copied, tmp_path, workers):
    recipe = copied("data.max_unreadable=0.2", "train_batch_size=1", f"dataloader_num_workers={workers}")
    for row in (1, 4):
        flip(part_of(recipe, row))
    message = (
        r"^data.max_unreadable: 2 of 7 rows cannot be read, more than the share 0.2; the first: cache: train line"
    )
    with pytest.raises(UserError, match=message):
        train(recipe)


def test_batches_of_whole_rows_are_what_they_were(copied, tmp_path):
    """Only the damaged row's place is taken by another; all others are in their order."""
    recipe = copied("data.max_unreadable=1.0", "train_batch_size=1")
    accelerator = build_accelerator(recipe, tmp_path)
    batches = open_data(recipe, accelerator).training_batches(0, 0)
    before = [next(batches).names[0] for _ in range(14)]
    flip(part_of(recipe, 3))
    batches = open_data(recipe, accelerator).training_batches(0, 0)
    after = [next(batches) for _ in range(14)]
    for name, batch in zip(before, after, strict=True):
        assert batch.names[0] == name if "line 4 " not in name else "line 4 " not in batch.names[0]
    assert sum(bool(batch.unreadable) for batch in after) == 2


@pytest.fixture(scope="module")
def stale_world(tiny_world, tmp_path_factory):
    """Data, base and teacher of the test's own, cached; a copy is changed in each test."""
    folder = tmp_path_factory.mktemp("stale")
    for name in ("base", "teacher", "clips"):
        shutil.copytree(tiny_world / name, folder / name)
    table = folder / "clips" / "metadata.jsonl"
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    (folder / "clips" / "0.txt").write_text(rows[0].pop("caption"))
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe_on(folder, make_recipe):
    values = {"data.train_data": folder / "clips/metadata.jsonl", "data.cache_dir": folder / "cache"}
    values["pretrained_model_name_or_path"] = folder / "base"
    return make_recipe(
        *(f"{name}={value}" for name, value in values.items()), f"adapter.teachers=[{folder / 'teacher'}]"
    )


def edit(path):
    with path.open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        last = file.read(1)
        file.seek(-3, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))


CHANGES = {
    "a clip": ("clips/2.mp4", "2.mp4' of train line 3 changed"),
    "a reference": ("clips/1_0.png", "1_0.png' of train line 2 changed"),
    "a caption file": ("clips/0.txt", "0.txt' of train line 1 changed"),
    "the VAE": ("base/vae/diffusion_pytorch_model.safetensors", "the VAE of '.*base' changed"),
    "the tokenizer": ("base/tokenizer/tokenizer.json", "the text encoder or tokenizer of '.*base' changed"),
    "the teacher": ("teacher/model.safetensors", "the teacher '.*teacher' changed"),
}


def test_training_knows_a_stale_cache(stale_world, make_recipe, tmp_path):
    recipe = recipe_on(stale_world, make_recipe)
    cache_dataset(options_of(recipe), device="cpu")
    accelerator = build_accelerator(recipe, tmp_path)
    open_data(recipe, accelerator)
    for file, message in CHANGES.values():
        path = stale_world / file
        content = path.read_bytes()
        edit(path)
        with pytest.raises(UserError, match=rf"^cache_dir: since .* was made, .*{message}; run `refalign"):
            open_data(recipe, accelerator)
        path.write_bytes(content)  # the same bytes again: other stamps, but nothing has changed
        open_data(recipe, accelerator)
    names = ("base/vae", "base/text_encoder", "base/tokenizer", "teacher", "clips")
    away = lambda name: stale_world / f"away-{name.replace('/', '-')}"  # noqa: E731
    for name in names:
        (stale_world / name).rename(away(name))
    try:
        open_data(recipe, accelerator)  # a cache may be moved without its data
    finally:
        for name in names:
            away(name).rename(stale_world / name)


def test_two_changes_are_counted(stale_world, make_recipe, tmp_path):
    recipe = recipe_on(stale_world, make_recipe)
    cache_dataset(options_of(recipe), device="cpu")
    for file in ("clips/2.mp4", "clips/5.mp4"):
        edit(stale_world / file)
    with pytest.raises(UserError, match=r"2.mp4' of train line 3 and 1 more changed"):
        open_data(recipe, build_accelerator(recipe, tmp_path))


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("index-train.jsonl", '{"key": "../../x", "parts": {}}'),
        ("index-train.jsonl", "[" * 200_000),
        ("index-train.jsonl", '{"key": 1, "key": 1}'),
        ("index-train.jsonl", "5"),
        ("meta.json", "[" * 200_000),
        ("meta.json", '{"format": 1}'),
        ("meta.json", "[]"),
    ],
)
def test_a_caches_own_words_are_data(copied, tmp_path, name, line):
    recipe = copied()
    path = tmp_path / "cache" / name
    path.write_text(line + "\n")
    with pytest.raises(UserError, match="^cache_dir: .*(is damaged|not readable|another version)") as told:
        open_data(recipe, build_accelerator(recipe, tmp_path))
    assert len(str(told.value).splitlines()) == 1


CHANGED = {
    "a path": ("video", "../../../etc/passwd"),
    "short": ("text", "ab"),
    "a number": ("references", 5),
    "a list": ("video", ["a"]),
}


@pytest.mark.parametrize("case", CHANGED)
def test_a_parts_key_is_never_a_path(copied, tmp_path, case):
    recipe = copied()
    path = tmp_path / "cache" / "index-train.jsonl"
    first, *rest = path.read_text().splitlines()
    values = json.loads(first)
    name, value = CHANGED[case]
    values["parts"][name] = value
    path.write_text("\n".join([json.dumps(values), *rest]))
    seal(tmp_path / "cache")
    with pytest.raises(UserError, match=r"is damaged \(a row's"):
        open_data(recipe, build_accelerator(recipe, tmp_path))
    for field, wrong in (
        ("shape", [1, 2]),
        ("shape", [1, 2, 3, "x"]),
        ("line", -1),
        ("variants", 2**40),
        ("subjects", []),
    ):
        values = json.loads(first) | {field: wrong}
        path.write_text("\n".join([json.dumps(values), *rest]))
        seal(tmp_path / "cache")
        with pytest.raises(UserError, match=r"is damaged \(a row's"):
            open_data(recipe, build_accelerator(recipe, tmp_path))
