"""The benchmarks at the smallest size: what they count is checked, how long it takes is not."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
import typer
from tiny_adapter import SIZE, save_tiny_adapter
from tiny_models import save_tiny_pipeline
from typer.testing import CliRunner

from refalign_adapter.data.cache.build import CacheReport
from refalign_adapter.errors import UserError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MODEL = {"dim": 64, "heads": 2, "layers": 3, "ffn": 128}
VIDEO = {"frames": 5, "height": 64, "width": 96}
TINY = {**MODEL, **VIDEO, "rank": 4, "rounds": 1, "references": 2}
"""Two latent frames of 8 x 12, 4 x 6 tokens each."""


@pytest.fixture(scope="module", autouse=True)
def path():
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def run(name, file, *flags, **options):
    """The file a benchmark writes, and what it prints."""
    module = importlib.import_module(name)
    app = typer.Typer()
    app.command()(module.main)
    given = [part for option, value in {**TINY, **options}.items() for part in (f"--{option}", str(value))]
    result = CliRunner().invoke(app, [*given, *flags, "--json", str(file)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(file.read_text()), result.output


@pytest.fixture
def setting():
    options = importlib.import_module("_setting")
    size = options.choose_size(None, "cpu", model=MODEL, video=VIDEO)
    values = {"references": 2, "batch": 1, "rank": 4, "backend": None, "rounds": 1}
    return options.make_setting(size, dtype=None, device="cpu", scale=1.0, dropped=0.0, **values)


def test_inference(tmp_path):
    found, output = run("inference", tmp_path / "figures.json")
    assert (found["tokens"], found["reference_tokens"]) == (48, 48)
    assert found["key_value_bytes"] == 2 * 48 * MODEL["dim"] * 4 * MODEL["layers"]
    seconds = {name: times[0] for name, times in found["seconds"].items()}
    plain, cached = seconds["plain"], seconds["isolated/reference, cached"]
    assert found["step_seconds"]["plain"] == pytest.approx(2 * plain)
    video = seconds["isolated/reference, cached: prefill"] + 50 * (plain + 2 * cached)
    assert found["video_seconds"]["isolated/reference, cached"] == pytest.approx(video)
    assert found["attention_share"] == pytest.approx(seconds["dot products"] / plain)
    bars = {bar["what"]: bar for bar in found["bars"]}
    assert bars["isolated/all, merged, cached: pass / plain pass, bound 1.03 (1 + s M/F)"]["limit"] == pytest.approx(
        1.03 * (1 + found["attention_share"] * 2 / 2)
    )
    more = found["peak_bytes"]["isolated/all, merged, cached"] - found["peak_bytes"]["plain"]
    assert more >= found["key_value_bytes"]
    assert "joint, merged" in output


def test_inference_of_another_family(tmp_path):
    given = {"preset": "ltx", "ffn": 4 * MODEL["dim"], "frames": 9}
    found, output = run("inference", tmp_path / "figures.json", **given)
    assert (found["tokens"], found["reference_tokens"]) == (2 * 2 * 3, 2 * 2 * 3)
    assert found["key_value_bytes"] == 2 * 12 * MODEL["dim"] * 4 * MODEL["layers"]
    assert "ltx: dim 64" in output


def test_guidance(tmp_path):
    module = importlib.import_module("guidance")
    base = save_tiny_pipeline(tmp_path / "base")
    adapter = save_tiny_adapter(tmp_path / "adapter", attention="isolated", lora_scope="reference")
    given = {**SIZE, "num_frames": None, "frames": SIZE["num_frames"], "steps": 5, "most": 3, "videos": 1}
    given |= {"base": base, "adapter": adapter, "rounds": 1, "references": 2, "json": tmp_path / "figures.json"}
    app = typer.Typer()
    app.command()(module.main)
    options = [part for name, value in given.items() if value is not None for part in (f"--{name}", str(value))]
    result = CliRunner().invoke(app, options, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "figures.json").read_text())
    passes = {f"{k}": found["passes"][f"5 steps, k = {k}"] for k in (1, 2, 3)}
    assert found["passes"]["stock, 5 steps"] == 10
    assert passes == {"1": 15, "2": 4 * 3 + 1, "3": 3 * 3 + 2}
    half = [found["passes"][f"5 steps, guided in the first half, k = {k}"] for k in (1, 3)]
    assert half == [3 * 3 + 2, 2 * 3 + 3]
    assert found["passes"]["5 steps, batch_guidance, k = 3"] == passes["3"]
    assert [found["passes"][f"4 steps, k = {k}"] for k in (1, 2, 3)] == [12, 10, 10]
    assert found["decibels"]["5 steps, k = 1"] == float("inf")
    assert 10 < found["decibels"]["5 steps, k = 3"] < 100
    ratio = found["times"]["5 steps, k = 3"][0] / found["times"]["stock, 5 steps"][0]
    assert [bar["value"] for bar in found["bars"]] == pytest.approx([11 / 10, ratio])
    assert "equal" in result.output


def test_decibels():
    decibels = importlib.import_module("guidance").decibels
    assert decibels(torch.full((4,), 0.1), torch.zeros(4)) == pytest.approx(20)
    assert decibels(torch.zeros(4), torch.zeros(4)) == float("inf")


def test_inference_with_economical_references(tmp_path):
    economical = {"reference-scale": 0.5, "dropped": 0.5}
    found, _ = run("inference", tmp_path / "figures.json", dtype="bfloat16", batch=2, **economical)
    assert found["reference_tokens"] == 2 * 3  # a canvas of 2 x 3 tokens, half of them left out
    assert found["key_value_bytes"] == 2 * 2 * 6 * MODEL["dim"] * 2 * MODEL["layers"]


@pytest.mark.parametrize("flags", [(), ("--checkpointing", "--nf4")])
def test_training(flags, tmp_path):
    found, output = run("training", tmp_path / "figures.json", *flags)
    seconds, trained = found["seconds"], found["trained_bytes"]
    assert len(seconds) == 7
    assert found["optimizer"] == "AdamW8bit"
    assert trained["plain LoRA"] == trained["joint"] > trained["isolated/reference"]
    heads = 2 * (64 * 32 + 32 * 768)  # of the two aligned blocks
    assert trained["joint + alignment"] - trained["joint"] >= heads * 4
    assert found["peak_bytes"]["joint"] > found["peak_bytes"]["plain LoRA"]
    added = seconds["joint + alignment"][0] / seconds["joint"][0] - 1
    assert found["added_by_alignment"]["joint"] == pytest.approx(added)
    assert "isolated/all + alignment" in output


def test_training_steps_train_what_they_should(setting):
    cases = importlib.import_module("training").build_cases(setting)
    shared = cases["joint"].module.transformer.blocks[0].attn1.to_q.base_layer.weight
    for name, case in cases.items():
        assert case.module.transformer.blocks[0].attn1.to_q.base_layer.weight is shared, name
        before = {key: value.clone() for key, value in case.module.state_dict().items()}
        case.step()
        changed = [key for key, value in case.module.state_dict().items() if not torch.equal(value, before[key])]
        assert {key.partition(".")[0] for key in changed if ".lora_" not in key} == (
            {"objectives"} if name.endswith("alignment") else set()
        ), name
        assert any(".lora_" in key for key in changed), name


@torch.no_grad()
def test_merged_cases_share_the_base_and_leave_it_as_it_is(setting):
    cases = importlib.import_module("inference").build_cases(setting)
    plain = cases.pop("plain")
    torch.manual_seed(0)  # as the cases were made
    for name, weight in importlib.import_module("_models").random_transformer(setting).named_parameters():
        assert torch.equal(weight, plain.transformer.get_parameter(name)), name
    for name, case in cases.items():
        assert case.transformer.proj_out.weight is plain.transformer.proj_out.weight, name
        merged = not any("lora_" in key for key, _ in case.transformer.named_parameters())
        assert merged == ("merged" in name), name


def test_peak_bytes_counts_what_lives_at_a_time():
    measure = importlib.import_module("_measure")

    def work():
        first = torch.empty(1000, dtype=torch.float32)
        del first
        second, third = torch.empty(2000), torch.empty(500)
        return second, third

    assert measure.peak_bytes(work, "cpu") == 2500 * 4


def test_ratios_are_medians_of_pairs():
    times = importlib.import_module("_measure").Times(a=[1.0, 10.0, 3.0], b=[2.0, 30.0, 3.0])
    assert times.ratio("b", "a") == 2.0
    assert times.median("a") == 3.0


@pytest.mark.parametrize(
    ("model", "video", "message"),
    [
        ({}, {"frames": 6}, "frames must be 4k + 1, got 6"),
        ({}, {"height": 40, "width": 0}, "width must be at least 1, got 0\nheight must be a multiple of 16, got 40"),
        ({"dim": 10, "heads": 4}, {}, "dim must be an even multiple of heads, got 10 and 4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(model, video, message):
    with pytest.raises(UserError) as error:
        importlib.import_module("_setting").choose_size("small", "cpu", model=model, video=video)
    assert str(error.value) == message


def test_presets_have_the_tokens_of_the_real_videos():
    presets = importlib.import_module("_setting").PRESETS
    assert {name: size.tokens for name, size in presets.items()} == {
        "small": 8190,
        "1.3b": 32760,
        "14b": 32760,
        "5b": 27280,
        "ltx": 7392,
    }


def test_wan_22_5b_has_a_timestep_for_every_token(tmp_path):
    found, _ = run("inference", tmp_path / "figures.json", preset="5b", height=64, width=96)
    assert (found["tokens"], found["reference_tokens"]) == (2 * 2 * 3, 2 * 2 * 3)
    size = found["setting"]["size"]
    assert (size["channels"], size["height"], size["width"], size["timestep_per_token"]) == (48, 4, 6, True)


def test_growth_is_the_slope_of_the_second_half():
    caching = importlib.import_module("caching")
    warming = [caching.Look(rows, 1000 * rows) for rows in range(50)]
    flat = [caching.Look(rows, 50_000 + 3 * rows) for rows in range(50, 100)]
    run = caching.Run(CacheReport(), [*warming, *flat, caching.Look(100, 10)])  # at the end all is given back
    assert run.growth() == pytest.approx(3)
    assert run.peak == 50_000 + 3 * 99
    assert run.bytes_at(20) == 20_000
    assert run.at_work[-1].rows == 99
    short = caching.Run(CacheReport(), [caching.Look(0, 7), caching.Look(100, 9)])
    assert (short.growth(), short.bytes_at(50), short.peak) == (0, 9, 9)


def test_memory_is_that_of_a_process_and_its_children():
    caching, process = importlib.import_module("caching"), psutil.Process()
    alone = caching.tree_bytes(process)
    assert alone == pytest.approx(process.memory_info().rss, rel=0.5)
    filled = "data = bytearray(range(256)) * 400_000; print(len(data), flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", filled], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert int(child.stdout.readline()) == 102_400_000
        assert caching.tree_bytes(process) - alone > 100e6
        child.communicate(b"\n")


def test_reading(tmp_path):
    app = typer.Typer()
    app.command()(importlib.import_module("reading").main)
    few = {"rows": 2, "files": 3, "parts": 2, "folder": tmp_path}
    given = [part for option, value in {**TINY, **few}.items() for part in (f"--{option}", str(value))]
    file = tmp_path / "figures.json"
    result = CliRunner().invoke(app, [*given, "--json", str(file)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text())
    features = (8 * 8 // 14) * (12 * 8 // 14) * 768
    assert found["row_bytes"] == 2 * (16 * 2 * 8 * 12 + 2 * 16 * 8 * 12 + 100 * 4096 + 2 * features)
    seconds = found["seconds"]
    share = max(0, seconds["checked"] - seconds["unchecked"]) / seconds["step"]
    assert found["share"] == pytest.approx(share)
    assert found["bars"][0]["value"] == pytest.approx(share)
    assert list(found["staleness_first"]) == list(found["staleness_again"]) == ["3"]
    assert set(found["parts_per_second"]) == {"durable", "not durable"}
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


@pytest.mark.slow
def test_caching(tmp_path):
    app = typer.Typer()
    app.command()(importlib.import_module("caching").main)
    file = tmp_path / "figures.json"
    result = CliRunner().invoke(app, ["--rows", "8", "--workers", "1", "--json", str(file)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text())
    first, again, workers = found["runs"].values()
    assert first["made"]["video"] == workers["made"]["video"] == again["reused"]["video"] == 8
    assert again["made"] == {}
    assert first["bytes_per_part"] == again["bytes_per_part"] == workers["bytes_per_part"]
    for run in found["runs"].values():
        assert run["looks"][-1][0] == 8
        assert run["peak_bytes"] == max(size for _, size in run["looks"])
    assert "first, 1 decoding processes" in result.output
