"""Plug-ins: families and teachers of other packages, found by their entry points, and a real one that is installed."""

import json
import os
import subprocess
import sys
import textwrap
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_adapter import picture
from tiny_models import tiny_transformer
from tiny_toy import tiny_toy_pipeline
from toy_video_dit import FAMILY, ViTMSNTeacher
from transformers import ViTMSNConfig, ViTMSNModel

import refalign_adapter as ra
from refalign_adapter.commands.doctor import examine
from refalign_adapter.families import lookup as families
from refalign_adapter.families._base_model import read_base_model
from refalign_adapter.plugins import Plugins
from refalign_adapter.teachers import lookup as teachers
from refalign_adapter.teachers.lookup import load_teacher

PACKAGE = Path(__file__).parent / "data" / "plugin_package"
TOY = {"toy": "toy_video_dit:FAMILY"}


@pytest.fixture
def installed(monkeypatch):
    """`installed(families=…, teachers=…)`: have these entry points and no others, {name: path} or [(name, path)]."""
    found = {}

    def entry_points(group):
        entries = found.get(group, [])
        return [SimpleEntry(name, path, group, f"package-{index}") for index, (name, path) in enumerate(entries)]

    monkeypatch.setattr("refalign_adapter.plugins.entry_points", entry_points)
    for module in (families, teachers):
        old = module.PLUGINS
        renewed = Plugins(old.group, old.field, old.package, old.attribute, old._problem)
        monkeypatch.setattr(module, "PLUGINS", renewed)
    monkeypatch.setattr("refalign_adapter.families._pipeline_folder.PLUGINS", families.PLUGINS)

    def install(families=(), teachers=()):
        for group, entries in (("families", families), ("teachers", teachers)):
            found[f"refalign_adapter.{group}"] = list(entries.items() if isinstance(entries, dict) else entries)

    return install


class SimpleEntry(SimpleNamespace):
    """An entry point with a distribution of our own."""

    def __init__(self, name, path, group, package):
        entry = EntryPoint(name, path, group)
        super().__init__(name=name, value=path, load=entry.load, dist=SimpleNamespace(name=package, version="1.0"))

    __hash__ = object.__hash__


def line_of(call, *arguments, **options):
    with pytest.raises(ra.UserError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_family_is_found_by_class_and_by_key(installed):
    installed(families=TOY)
    transformer = tiny_toy_pipeline().transformer
    assert families.load_family(transformer) is FAMILY
    assert families.load_family(transformer, "toy") is FAMILY
    assert families.load_family("ToyTransformer3DModel") is FAMILY
    assert families.load_family(tiny_transformer()).key == "wan"


def test_without_it_the_model_is_unknown(installed):
    installed()
    assert line_of(ra.attach, tiny_toy_pipeline().transformer) == (
        "base: ToyTransformer3DModel is no known DiT; supported are LTXVideoTransformer3DModel, WanTransformer3DModel"
    )
    assert line_of(families.load_family, None, "toy") == (
        "family must be one of ['ltx', 'wan'] or package.module:attribute, got 'toy'"
    )


def test_entry_points_are_read_once_and_loaded_when_needed(installed, monkeypatch):
    installed(families=TOY)
    loads = []
    monkeypatch.setattr(EntryPoint, "load", lambda self: loads.append(self.name) or FAMILY)
    families.load_family(tiny_transformer())
    assert loads == []
    for _ in range(3):
        assert families.load_family("ToyTransformer3DModel") is FAMILY
    assert loads == ["toy"]
    installed()
    assert families.load_family(None, "toy") is FAMILY


BAD = {
    "no module": ("no_such_module:FAMILY", "it cannot be imported: ModuleNotFoundError: No module named"),
    "no attribute": ("toy_video_dit:NOTHING", "it cannot be imported: AttributeError"),
    "no family": ("toy_video_dit:ToyPipeline", "it must be an instance of refalign_adapter.families.base.Family, got"),
    "a class": ("toy_video_dit:ToyFamily", "it must be an instance of refalign_adapter.families.base.Family, got ABC"),
    "another key": ("toy_video_dit:FAMILY", "its key 'toy' differs from the entry point's name"),
}


@pytest.mark.parametrize("kind", BAD)
def test_one_that_cannot_be_used_is_one_line_for_who_needs_it(installed, kind):
    path, reason = BAD[kind]
    installed(families={"other": path})
    assert families.load_family(tiny_transformer()).key == families.load_family(None, "wan").key == "wan"
    for line in (
        line_of(families.load_family, None, "other"),
        line_of(ra.attach, tiny_toy_pipeline().transformer),
    ):
        assert f"the plug-in 'other' of package-0 1.0 ({path}) cannot be used ({reason}" in line
        assert line.endswith("upgrade or uninstall it")


def test_one_that_ends_its_program_ends_nothing_here(installed, tmp_path, monkeypatch):
    (tmp_path / "leaving.py").write_text("import sys; sys.exit(7)")
    monkeypatch.syspath_prepend(tmp_path)
    installed(families={"other": "leaving:FAMILY"})
    assert "it cannot be imported: SystemExit: 7" in line_of(families.load_family, None, "other")
    assert "cannot load 'leaving:X' as package.module:attribute (SystemExit: 7)" in line_of(
        families.load_family, None, "leaving:X"
    )


def test_one_that_fails_does_not_hide_another(installed):
    installed(families={"other": "no_such_module:FAMILY"} | TOY)
    assert families.load_family("ToyTransformer3DModel") is FAMILY


def test_a_built_in_key_is_not_taken_over(installed, monkeypatch):
    installed(families={"wan": "toy_video_dit:FAMILY"})
    assert ra.attach(tiny_transformer(), ra.RefAlignConfig(attention="joint", r=2, align_layers=1)).family.key == "wan"
    reason = "the plug-in 'wan' of package-0 1.0 has a built-in one's name; rename it, or uninstall that package"
    assert line_of(families.load_family, None, "wan") == f"family: {reason}"
    assert line_of(ra.attach, tiny_toy_pipeline().transformer).endswith(reason)


def test_two_of_one_key_are_not_guessed_between(installed):
    installed(families=[("toy", "toy_video_dit:FAMILY")] * 2)
    line = (
        "the plug-ins 'toy' of package-0 1.0 and 'toy' of package-1 1.0 have one name; uninstall one of the packages"
    )
    assert line_of(families.load_family, None, "toy") == f"family: {line}"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """The folder of an encoder that no teacher of this package serves."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    ViTMSNModel(ViTMSNConfig(**ViTMSNTeacher.tiny_config)).save_pretrained(folder)
    return str(folder)


def test_a_teacher_comes_by_entry_point_name_class_and_path(installed, encoder):
    installed(teachers={"vit_msn": "toy_video_dit:ViTMSNTeacher"})
    images = torch.rand(1, 3, 24, 40, generator=torch.Generator().manual_seed(0))
    expected = load_teacher(encoder).encode(images, (3, 5))
    assert expected.shape == (1, 3, 5, 32)
    for given in ("vit_msn", ViTMSNTeacher, "toy_video_dit:ViTMSNTeacher"):
        teacher = load_teacher(encoder, teacher_class=given)
        assert type(teacher) is ViTMSNTeacher
        assert torch.equal(teacher.encode(images, (3, 5)), expected)


def test_a_teacher_that_cannot_be_used_is_one_line_for_who_needs_it(installed, encoder):
    installed(teachers={"vit_msn": "toy_video_dit:ToyFamily", "dinov2": "toy_video_dit:ViTMSNTeacher"})
    line = line_of(load_teacher, encoder)
    assert line.startswith("teacher: ")
    assert "'vit_msn', known are clip, dinov2, " in line
    assert "must be a subclass of refalign_adapter.teachers.base.Teacher, got ToyFamily" in line
    assert "the plug-in 'dinov2' of package-1 1.0 has a built-in one's name" in line
    assert "got ToyFamily" in line_of(load_teacher, encoder, teacher_class="vit_msn")
    assert "a built-in one's name" in line_of(load_teacher, encoder, teacher_class="dinov2")
    assert "got ToyFamily" in line_of(load_teacher, encoder, teacher_class="toy_video_dit:ToyFamily").replace(
        "'toy_video_dit:ToyFamily'", "ToyFamily"
    )
    assert "teacher_class must be one of" in line_of(load_teacher, encoder, teacher_class="nothing")


def test_the_doctor_lists_them(installed):
    installed(families=TOY | {"other": "no_such_module:FAMILY"}, teachers={"vit_msn": "toy_video_dit:ViTMSNTeacher"})
    found = {finding.topic: finding for finding in examine() if finding.topic.startswith("plug-in")}
    assert {topic: finding.ok for topic, finding in found.items()} == {
        "plug-in, family other": None,
        "plug-in, family toy": True,
        "plug-in, teacher vit_msn": True,
    }
    assert found["plug-in, family toy"].value == "toy_video_dit:FAMILY of package-0 1.0"
    assert "cannot be imported" in found["plug-in, family other"].advice


def test_an_adapter_names_no_code(installed, tmp_path, monkeypatch):
    """What a file says of its family is compared; a path in it is no path."""
    installed()
    pipe = tiny_toy_pipeline()
    config = ra.RefAlignConfig(attention="joint", r=2, align_layers=1, max_sequence_length=16)
    folder = ra.attach(pipe.transformer, config, family=FAMILY).save_pretrained(tmp_path / "adapter")
    written = json.loads((folder / "refalign_config.json").read_text())
    assert written["base"]["family"] == "toy"
    assert "toy_video_dit" not in json.dumps(written)
    written["base"]["family"] = "toy_evil:FAMILY"
    (folder / "refalign_config.json").write_text(json.dumps(written))
    (tmp_path / "toy_evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    line = line_of(ra.load_adapter, tiny_toy_pipeline(), folder, family=FAMILY)
    assert "made for another base: it has family 'toy_evil:FAMILY', this one has 'toy'" in line
    assert "ToyTransformer3DModel is no known DiT" in line_of(ra.load_adapter, tiny_toy_pipeline(), folder)


def test_a_base_may_name_the_classes_of_families_that_are_there_and_no_others(installed, tmp_path):
    tiny_toy_pipeline().save_pretrained(tmp_path / "base")
    read = lambda family=None: read_base_model(str(tmp_path / "base"), field="base", family=family)  # noqa: E731
    installed()
    assert "transformer is a toy_video_dit.ToyTransformer3DModel, which diffusers and" in line_of(read)
    assert read(FAMILY).family is read("toy_video_dit:FAMILY").family is FAMILY
    installed(families=TOY)
    vars(families.PLUGINS).pop("found", None)
    assert read().family is FAMILY
    code = tmp_path / "base" / "transformer" / "toy_video_dit.py"
    code.write_text("raise SystemExit('run')")
    assert "which diffusers and transformers do not export" in line_of(read)
    code.unlink()
    index = json.loads((tmp_path / "base" / "model_index.json").read_text())
    for library in ("toy_other", "../toy_video_dit", "toy_video_dit\0"):
        index["transformer"] = [library, "ToyTransformer3DModel"]
        (tmp_path / "base" / "model_index.json").write_text(json.dumps(index))
        assert "do not export here" in line_of(read)


def test_a_pipeline_with_private_names_of_ours_is_refused(tmp_path):
    from refalign_adapter.pipelines.reference_class import reference_class

    stock = type("OtherPipeline", (type(tiny_toy_pipeline()),), {"_read_references": None})
    line = line_of(reference_class, stock)
    assert line == "pipe: OtherPipeline has _read_references of its own, as reference pipelines do; rename it there"


def run(*arguments, **options):
    result = subprocess.run([*map(str, arguments)], capture_output=True, text=True, check=False, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Where the package is installed as its users install it, without the network."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for path in PACKAGE.iterdir():
        if path.is_file():
            (source / path.name).write_bytes(path.read_bytes())
    offline = ("--no-deps", "--no-build-isolation", "--no-index")
    run(sys.executable, "-m", "pip", "install", source, *offline, "--target", target)
    paths = [str(target), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


FOREIGN = """
    import sys

    import torch

    import refalign_adapter as ra
    from refalign_adapter.commands.doctor import examine
    from refalign_adapter.families._base_model import read_base_model
    from refalign_adapter.families.lookup import load_family
    from refalign_adapter.teachers.lookup import load_teacher

    load_family("WanTransformer3DModel")
    assert not any("toy" in name for name in sys.modules)
    base, encoder, picture, folder = sys.argv[1:]
    family = read_base_model(base, field="base").family
    pipe = family.load_pipeline(base)
    options = {"r": 4, "align_layers": 1, "max_sequence_length": 16}
    config = ra.RefAlignConfig(attention="isolated", lora_scope="reference", **options)
    branch = ra.attach(pipe.transformer, config, seed=0)
    for _, parameter in branch.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    branch.save_pretrained(folder)
    branch.detach()
    pipe = ra.load_adapter(pipe, folder)
    pipe.set_progress_bar_config(disable=True)
    options = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 1, "output_type": "latent"}
    latents = torch.randn(1, 2, 4, 6, 16)
    with_reference, without = (pipe("a cat", given, latents=latents, **options).frames for given in ([picture], None))
    assert with_reference.shape == latents.shape and not torch.equal(with_reference, without)
    features = load_teacher(encoder).encode(torch.rand(1, 3, 24, 24), (2, 3))
    print(type(pipe).__name__, branch.config.base["family"], tuple(features.shape))
    for finding in examine():
        if finding.topic.startswith("plug-in"):
            print(finding.topic, finding.ok, finding.value)
"""


@pytest.fixture(scope="module")
def names(encoder, tmp_path_factory):
    """What the script and the commands are given: base, encoder, picture, and where the adapter goes."""
    folder = tmp_path_factory.mktemp("names")
    tiny_toy_pipeline().save_pretrained(folder / "base")
    picture(0).save(folder / "picture.png")
    return [folder / "base", encoder, folder / "picture.png", folder / "adapter"]


def test_an_installed_package_works_unnamed(environment, names, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(FOREIGN))
    out = run(sys.executable, script, *names, env=environment, cwd=tmp_path)
    assert out.splitlines()[-3:] == [
        "ToyReferencePipeline toy (1, 2, 3, 32)",
        "plug-in, family toy True toy_video_dit:FAMILY of toy-video-dit 1.0",
        "plug-in, teacher vit_msn True toy_video_dit:ViTMSNTeacher of toy-video-dit 1.0",
    ]


@pytest.mark.slow
def test_commands_know_an_installed_package(environment, names, tmp_path):
    config = ra.RefAlignConfig(attention="joint", r=2, align_layers=1, max_sequence_length=16)
    ra.attach(tiny_toy_pipeline().transformer, config, family=FAMILY).save_pretrained(tmp_path / "adapter")
    command = [sys.executable, "-m", "refalign_adapter"]
    listed = run(*command, "doctor", env={**environment, "COLUMNS": "200"}, cwd=tmp_path)
    for words in ("plug-in, family toy", "plug-in, teacher vit_msn", "toy_video_dit:FAMILY of toy-video-dit 1.0"):
        assert words in listed
    sizes = ["--height", "32", "--width", "48", "--num-frames", "5", "--num-inference-steps", "1"]
    models = ["--base", names[0], "--adapter", "adapter", "--reference", names[2]]
    run(*command, "generate", *models, "--prompt", "a", *sizes, "--output", "out.mp4", env=environment, cwd=tmp_path)
    assert (tmp_path / "out.mp4").stat().st_size > 0
