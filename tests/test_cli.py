"""A user's mistakes through the command line: plain lines, a non-zero exit, nothing half-written."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from tiny_data import write_data, write_reference
from tiny_models import save_tiny_pipeline, tiny_dinov2, tiny_transformer

import refalign_adapter as ra
from refalign_adapter.commands import train as train_command
from refalign_adapter.commands.app import app, main
from refalign_adapter.recipes.file import field_paths
from refalign_adapter.signals import Stopped
from refalign_adapter.training import loop
from refalign_adapter.training.interrupt import Interrupted

SMALL = ["--height", "32", "--width", "32", "--num-frames", "5", "--num-inference-steps", "1"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a base, an adapter and a reference."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny_pipeline(folder / "base")
    branch = ra.attach(
        tiny_transformer(), ra.RefAlignConfig(attention="joint", r=2, align_layers=2, max_sequence_length=16), seed=0
    )
    branch.save_pretrained(folder / "adapter")
    write_reference(folder / "a.png")
    write_reference(folder / "b.png", seed=1)
    return folder


@pytest.fixture
def run(world, capsys, monkeypatch):
    """Run `refalign` inside the world; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(world)

    def call(*arguments):
        capsys.readouterr()  # what fixtures printed
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture
def fails(run, world):
    """Run a command that must fail; returns its error lines, all of one form, and checks that nothing was written."""

    def call(*arguments, code=2):
        before = sorted(path for path in world.rglob("*") if "cache" not in path.parts)
        status, _, errors = run(*arguments)
        assert status == code, errors
        assert sorted(path for path in world.rglob("*") if "cache" not in path.parts) == before
        lines = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert lines
        assert "Traceback" not in errors
        return lines

    return call


def generation(base="base", adapter="adapter", references=("a.png",), output="out.mp4", more=()):
    images = [part for name in references for part in ("--reference", name)]
    options = ["--base", base, "--adapter", adapter, "--prompt", "a dog", "--output", output]
    return ["generate", *options, *images, *SMALL, *more]


def test_generate_writes_a_video_with_two_references(run, world, tmp_path):
    status, out, errors = run(*generation(references=("a.png", "b.png"), output=tmp_path / "new" / "out.mp4"))
    assert status == 0, errors
    assert out.strip().endswith("out.mp4")
    import av

    with av.open(str(tmp_path / "new" / "out.mp4")) as video:
        assert len(list(video.decode(video=0))) == 5


def test_quiet_generation_prints_nothing(run, tmp_path):
    assert run(*generation(output=tmp_path / "out.mp4", more=("--quiet",))) == (0, "", "")
    assert (tmp_path / "out.mp4").is_file()


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "folder"])
def test_a_reference_that_is_no_image(fails, world, tmp_path, kind):
    path = tmp_path / "bad.png"
    if kind in ("empty", "text"):
        path.write_text("" if kind == "empty" else "not an image")
    elif kind == "folder":
        path.mkdir()
    (line,) = fails(*generation(references=("a.png", path)))
    assert "references[1]" in line
    assert "bad.png" in line


@pytest.mark.parametrize(("references", "words"), [((), "at least one"), (("a.png",) * 9, "9 images are too many")])
def test_zero_or_too_many_references(fails, references, words):
    (line,) = fails(*generation(references=references))
    assert words in line


def test_sizes_that_do_not_patchify_are_told_together(fails):
    lines = fails(*generation(more=("--height", "36", "--width", "33", "--num-frames", "6")))
    assert len(lines) == 3
    assert "height must be a multiple of 16, got 36; try 32" in "\n".join(lines)
    assert "num_frames must be a multiple of 4 plus 1, got 6" in "\n".join(lines)


def test_a_base_of_no_known_family(fails, world, tmp_path):
    (line,) = fails(*generation(base="no/such-folder/at-all"))
    assert "no/such-folder/at-all" in line
    index = {"_class_name": "CogVideoXPipeline", "transformer": ["diffusers", "CogVideoXTransformer3DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (line,) = fails(*generation(base=tmp_path))
    assert "CogVideoXTransformer3DModel is no known DiT; supported are" in line
    (line,) = fails(*generation(base=world / "adapter"))
    assert "model_index.json" in line


def test_an_adapter_made_for_another_base(fails, tmp_path):
    branch = ra.attach(
        tiny_transformer(num_layers=2), ra.RefAlignConfig(attention="joint", r=2, align_layers=2), seed=0
    )
    branch.save_pretrained(tmp_path / "other")
    (line,) = fails(*generation(adapter=tmp_path / "other"))
    assert "made for another base" in line
    assert "num_layers 2, this one has 3" in line


def test_a_pickle_offered_as_an_adapter(fails, world, tmp_path):
    torch.save({"lora": torch.zeros(1)}, tmp_path / "adapter.bin")
    (line,) = fails(*generation(adapter=tmp_path / "adapter.bin"))
    assert "pickle" in line
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "refalign_config.json").write_bytes((world / "adapter" / "refalign_config.json").read_bytes())
    (tmp_path / "adapter.bin").rename(folder / "pytorch_lora_weights.bin")
    (line,) = fails(*generation(adapter=folder))
    assert "pickle" in line


def test_damaged_adapter_weights(fails, world, tmp_path):
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in (world / "adapter").iterdir():
        (folder / file.name).write_bytes(file.read_bytes()[: 1 if file.suffix == ".safetensors" else None])
    (line,) = fails(*generation(adapter=folder))
    assert "damaged" in line


@pytest.mark.parametrize("output", ["a.png/out.mp4", "/proc/no-such-place/out.mp4"])
def test_an_output_that_cannot_be_written(fails, output):
    (line,) = fails(*generation(output=output))
    assert "cannot write" in line


def test_options_of_generate_are_checked_together(fails):
    lines = fails(*generation(more=("--fps", "0", "--dtype", "int8", "--offload", "all", "--seed", "-1")))
    assert len(lines) == 4
    (line,) = fails("generate", "--base", "base", "--adapter", "adapter", "--output", "out.mp4")
    assert "--prompts FILE" in line


def test_many_prompts_every_problem_at_once_then_resume(fails, run, tmp_path):
    rows = [
        {"key": "one", "prompt": "a dog", "references": ["a.png"]},
        {"key": "one", "prompt": "", "references": ["nothing.png"]},
        {"key": "../two", "prompt": "a cat", "references": ["a.png"]},
    ]
    write_reference(tmp_path / "a.png")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, rows)))
    command = ["generate", "--base", "base", "--adapter", "adapter", "--prompts", prompts, *SMALL]
    lines = fails(*command, "--output", tmp_path / "videos")
    assert len(lines) >= 4
    rows = [{**rows[0], "key": key} for key in ("one", "two")]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    assert run(*command, "--output", tmp_path / "videos")[0] == 0
    (tmp_path / "videos" / "two.mp4").unlink()
    kept = (tmp_path / "videos" / "one.mp4").stat().st_mtime_ns
    status, out, _ = run(*command, "--output", tmp_path / "videos")
    assert status == 0
    assert "1 of 2 videos exist" in out
    assert (tmp_path / "videos" / "one.mp4").stat().st_mtime_ns == kept
    assert (tmp_path / "videos" / "two.mp4").is_file()


RECIPE = """
pretrained_model_name_or_path: base
output_dir: training
data: {{train_data: {data}, cache_dir: {cache}, height: 32, width: 32, num_frames: 5, fps: 8}}
adapter: {{attention: joint, r: 2, align_layers: 2, teachers: [{teacher}], max_sequence_length: 16}}
"""


@pytest.fixture
def recipe(world, tmp_path):
    data = write_data(tmp_path / "data", 3)
    path = tmp_path / "recipe.yaml"
    teacher = tiny_dinov2(tmp_path / "teacher")
    path.write_text(RECIPE.format(data=data, cache=tmp_path / "cache", teacher=teacher))
    return path


def test_a_config_with_five_mistakes(fails, recipe):
    mistakes = ["learning_rat=1", "max_train_steps=0", "adapter.r=-1", "optimizer=adamw9bit", "data.height=tall"]
    lines = fails("cache", "--config", recipe, *mistakes)
    text = "\n".join(lines)
    assert len(lines) == 5
    assert "did you mean learning_rate?" in text
    wrong = {"max_train_steps": "0", "adapter.r": "-1", "optimizer": "adamw9bit", "data.height": "tall"}
    for field, value in wrong.items():
        assert any(field in line and value in line for line in lines), field


@pytest.mark.parametrize("kind", ["missing", "empty", "text"])
def test_a_clip_that_is_no_video(fails, recipe, tmp_path, kind):
    clip = tmp_path / "data" / "clips" / "1.mp4"
    clip.unlink()
    if kind != "missing":
        clip.write_text("" if kind == "empty" else "not a video")
    (line,) = fails("cache", "--config", recipe)
    assert "1.mp4" in line


def test_a_row_whose_references_are_no_list(fails, recipe, tmp_path):
    manifest = tmp_path / "data" / "metadata.jsonl"
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    rows[2]["references"] = "a.png"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (line,) = fails("cache", "--config", recipe)
    assert "line 3" in line
    assert "references" in line


def test_wrong_paths(fails, recipe):
    (line,) = fails("cache", "--config", "nothing.yaml")
    assert "nothing.yaml" in line
    (line,) = fails("cache", "--config", recipe, "pretrained_model_name_or_path=nowhere/at/all")
    assert "nowhere/at/all" in line


def test_recipes_are_listed_and_copied_once(run, fails, tmp_path):
    names = run("recipes", "list")[1].split()
    assert {"demo/isolated", "wan2.1-t2v-1.3b/stage1", "wan2.1-t2v-14b/stage2"} <= set(names)
    status, out, _ = run("recipes", "copy", "demo/isolated", "--output", tmp_path / "mine.yaml")
    assert status == 0
    assert out.strip().endswith("mine.yaml")
    assert (tmp_path / "mine.yaml").is_file()
    assert "exists already" in fails("recipes", "copy", "demo/isolated", "--output", tmp_path / "mine.yaml")[0]
    assert "choose one of demo/isolated" in fails("recipes", "copy", "demo/isolatde")[0]


def test_doctor_names_what_is_there(run):
    status, out, _ = run("doctor")
    assert status == 0
    assert torch.__version__.split("+")[0] in out
    assert "Wan 2.1 T2V 14B" in out


def test_commands_are_listed_as_an_adapters_life_goes(run):
    lines = run("--help")[1].split("Commands")[1].splitlines()
    order = ["doctor", "demo", "data", "cache", "estimate", "train", "generate", "recipes"]
    assert [words[1] for line in lines if len(words := line.split()) > 1 and line[2] != " "] == order
    assert len(app.registered_commands) + len(app.registered_groups) == len(order)


@pytest.fixture
def trained(monkeypatch):
    """Recipes that training was called with, in place of training."""
    recipes = []
    monkeypatch.setattr(loop, "train", recipes.append)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    return recipes


def test_train_trains_the_recipe_with_its_changes(run, recipe, trained):
    status, out, errors = run("train", "--config", recipe, "optimizer=adamw", "report_to=null", "seed=7")
    assert (status, out, errors) == (0, "", "")
    assert [found.seed for found in trained] == [7]


@pytest.mark.parametrize(("given", "precision"), [("null", "bf16"), ("bf16", "bf16"), ("no", "no")])
def test_train_takes_one_gpu_in_bf16_and_tells_how_all_are_used(run, recipe, trained, monkeypatch, given, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(train_command.os, "environ", dict(train_command.os.environ))
    changes = ["optimizer=adamw", "report_to=null", f"mixed_precision={given}", "output_dir=a b"]
    _, _, errors = run("train", "--config", recipe, *changes)
    assert errors.splitlines() == [
        "training on 1 of 4 GPUs; on all: accelerate launch --multi_gpu --num_processes 4 --mixed_precision "
        f"{precision} -m refalign_adapter.train --config {recipe} optimizer=adamw report_to=null "
        f"mixed_precision={given} 'output_dir=a b'"
    ]
    assert train_command.os.environ.get("ACCELERATE_MIXED_PRECISION") == ("bf16" if given == "null" else None)
    run("train", "--config", recipe, *changes[:2])
    monkeypatch.setitem(train_command.os.environ, "ACCELERATE_MIXED_PRECISION", "no")
    assert run("train", "--config", recipe, *changes[:2])[2] == "", "a launcher has chosen already"
    assert len(trained) == 3


def test_train_tells_mistakes_and_signals_as_the_training_module_does(run, fails, recipe, monkeypatch):
    lines = fails("train", "--config", recipe, "learning_rat=1", "adapter.r=-1")
    assert len(lines) == 2
    assert "did you mean learning_rate?" in lines[0]

    def stop(_):
        raise Interrupted(15, "stopped at step 3, checkpoint written")

    monkeypatch.setattr(loop, "train", stop)
    status, out, errors = run("train", "--config", recipe, "optimizer=adamw", "report_to=null")
    assert (status, out, errors) == (143, "", "stopped at step 3, checkpoint written\n")


def test_train_explains_every_field_without_a_recipe(run):
    status, out, _ = run("train", "--help-fields")
    assert status == 0
    assert [path for path in field_paths() if f"{path}: " not in out] == []
    text = " ".join(run("train", "--help")[1].split())
    assert "accelerate launch" in text
    assert "-m refalign_adapter.train" in text


def test_a_folder_without_a_table_says_how_to_write_one(fails, recipe, tmp_path):
    (tmp_path / "empty").mkdir()
    clips = tmp_path / "data" / "clips"
    for path, words in {
        clips: "has 3 clips and 0 captions but names no references; add a metadata.jsonl with a line such as ",
        clips / "1.mp4": "is a clip; name the folder with the clips and their metadata.jsonl",
        tmp_path / "empty": "has no metadata.jsonl; write one with a line such as ",
    }.items():
        (line,) = fails("data", "check", "--config", recipe, f"data.train_data={path}")
        assert line.startswith(f"error: data.train_data: {str(path)!r} {words}")


def test_every_command_has_help(run):
    for command in ("doctor", "cache", "generate", "demo", "recipes", "estimate", "train", "data", "data check"):
        status, out, _ = run(*command.split(), "--help")
        assert status == 0
        assert "--help" in out


@pytest.mark.parametrize(
    ("command", "called", "line"),
    [
        ("cache", "refalign_adapter.commands.cache.run", "interrupted; run the same command again to go on"),
        ("data check", "refalign_adapter.commands.data_check.run", "interrupted; no report was written"),
        ("estimate", "refalign_adapter.recipes.file.load_recipe", "interrupted; nothing was written"),
        (
            "train",
            "refalign_adapter.recipes.file.load_recipe",
            "interrupted; the last checkpoint, if there is one, is whole",
        ),
    ],
)
def test_ctrl_c_says_in_one_line_what_it_means(run, monkeypatch, command, called, line):
    def interrupted(*_, **__):
        raise Stopped(2)

    monkeypatch.setattr(called, interrupted)
    status, out, errors = run(*command.split(), "--config", "recipe.yaml")
    assert status == 130
    assert out == ""
    assert errors.splitlines() == [line]


def test_a_mistake_ends_a_real_process_with_plain_lines(world):
    arguments = [sys.executable, "-m", "refalign_adapter", *generation(references=("nothing.png",))]
    result = subprocess.run(arguments, cwd=world, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.strip() == "error: references[0]: 'nothing.png' does not exist"
    assert Image.open(world / "a.png").size == (30, 40)
