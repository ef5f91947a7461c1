"""A wheel that is built and installed elsewhere works without the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*arguments, **options):
    result = subprocess.run([*map(str, arguments)], capture_output=True, text=True, check=False, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def files_below(folder):
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from the checkout without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", ROOT, "--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def refalign(wheel, tmp_path_factory):
    """Runs the installed console script in another folder, with the wheel in front of everything else."""
    target = tmp_path_factory.mktemp("site")
    run(sys.executable, "-m", "pip", "install", wheel, "--no-deps", "--no-index", "--target", target)
    options = {"env": {**os.environ, "PYTHONPATH": str(target)}, "cwd": tmp_path_factory.mktemp("elsewhere")}
    location = run(sys.executable, "-c", "import refalign_adapter; print(refalign_adapter.__file__)", **options)
    assert Path(location.strip()).is_relative_to(target)
    return lambda *arguments: run(target / "bin" / "refalign", *arguments, **options)


def test_wheel_holds_the_package_and_the_recipes_and_nothing_else(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    package = {f"refalign_adapter/{name}" for name in files_below(ROOT / "refalign_adapter")}
    recipes = {f"refalign_adapter/_recipes/{name}" for name in files_below(ROOT / "recipes")}
    assert recipes
    assert {name for name in inside if ".dist-info/" not in name} == package | recipes


def test_command_line_runs_without_the_checkout(refalign):
    usage = refalign("--help")
    for command in ("demo", "generate", "recipes", "doctor"):
        assert command in usage


def test_recipes_are_found_without_the_checkout(refalign):
    listed = refalign("recipes", "list")
    configurations = [name for name in files_below(ROOT / "recipes") if name.startswith("configs/")]
    assert configurations
    for name in configurations:
        assert Path(name).stem in listed
