"""`hub.fetch` against a Hub on loopback, with the real client in a process of its own."""

import json
import subprocess
import sys

import huggingface_hub
import huggingface_hub.errors
import pytest
from fake_hub import COMMIT, TOKEN, client_environment, serving
from tiny_adapter import save_tiny_adapter
from tiny_models import save_tiny_pipeline

CLIENT = """
import json, sys, time
from refalign_adapter.errors import UserError
from refalign_adapter.hub import fetch

for name, options in json.loads(sys.argv[1]):
    start = time.monotonic()
    try:
        answer = str(fetch(name, field="adapter", **options))
    except UserError as error:
        answer = f"{type(error).__name__} {error}"
    print(json.dumps([answer, time.monotonic() - start]), flush=True)
"""
FILES = {"config.json": b"{}", "model.safetensors": b"\0" * 300_000, "large.bin": b"\0" * 2000}


def client(url, home, *calls, prefix="", **changes):
    """(answer, seconds) of each call; nothing else may be printed on either stream."""
    environment = client_environment(url, home) | changes
    run = subprocess.run(
        [sys.executable, "-c", prefix + CLIENT, json.dumps(calls)],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    return [tuple(json.loads(line)) for line in run.stdout.splitlines()]


REFUSED = {
    "gated": ("gated/one", {}, "it is gated; request access at https://huggingface.co/gated/one and log in"),
    "missing": (
        "nobody/nothing",
        {},
        "no model of this name on the Hub that you may see",
    ),
    "private": ("private/one", {}, "if private, log in with `hf auth login`"),
    "data set": ("nobody/nothing", {"repo_type": "dataset"}, "no data set of this name on the Hub"),
    "revision": ("open/one", {"revision": "no-such-branch"}, "it has no revision 'no-such-branch'; see"),
    "token": ("open/one", {"token": "hf_wrong"}, "the Hub does not accept the token; log in anew"),
    "trouble": ("busy/one", {}, "the Hub has trouble of its own (status 503); try again later"),
    "cut": ("cut/one", {}, "the connection broke off; try again, downloads go on"),
    "name": ("user/na me", {}, "neither a folder here nor a name on the Hub"),
    "folder": ("./nowhere", {}, "folder './nowhere' does not exist"),
    "deep folder": ("a/b/c", {}, "folder 'a/b/c' does not exist"),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    with serving(FILES) as hub:
        calls = [(name, options) for name, options, _ in REFUSED.values()]
        calls += [("private/one", {"token": TOKEN}), ("open/part", {"patterns": ["*.json", "*.safetensors"]})]
        found = client(hub.url, home, *calls)
    return dict(zip([*REFUSED, "with token", "part"], found, strict=True))


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_is_one_line_with_the_way_out(answers, case):
    name, _, expected = REFUSED[case]
    message = answers[case][0]
    assert message.startswith("UserError adapter: ")
    assert repr(name) in message
    assert expected in message
    assert "\n" not in message


def test_what_is_asked_for_is_fetched(answers):
    assert answers["with token"][0].endswith(f"/{COMMIT}")
    assert answers["part"][0].endswith(f"/{COMMIT}")


def test_without_a_network_the_cache_serves_and_otherwise_there_is_a_line_in_time(tmp_path):
    with serving(FILES) as hub:
        ((cached, _),) = client(hub.url, tmp_path, ("open/one", {}))
        ((silent, seconds),) = client(hub.url, tmp_path, ("silent/one", {}))
    assert "it is not cached and the Hub cannot be reached" in silent
    assert seconds < 5
    again, other = client(hub.url, tmp_path, ("open/one", {}), ("open/other", {}))
    assert again[0] == cached
    assert "it is not cached and the Hub cannot be reached; look after the connection" in other[0]
    assert other[1] < 5
    (offline,) = client(hub.url, tmp_path, ("open/other", {}), HF_HUB_OFFLINE="1")
    assert "switched off by HF_HUB_OFFLINE; unset it" in offline[0]


@pytest.mark.slow
def test_a_download_that_was_cut_goes_on(tmp_path):
    with serving(FILES) as hub:
        ((first, _),) = client(hub.url, tmp_path, ("cut/one", {}))
    assert "broke off" in first
    if not hasattr(huggingface_hub.errors, "IncompleteSnapshotError"):
        pytest.skip(f"huggingface_hub {huggingface_hub.__version__} does not know what a snapshot lacks")
    with serving(FILES) as hub:
        ((offline, _),) = client(hub.url, tmp_path, ("cut/one", {}), HF_HUB_OFFLINE="1")
    assert "UserError adapter: " in offline, "half a snapshot is not taken for a whole one"


def test_a_full_disk_is_a_write_error(tmp_path):
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
    with serving(FILES) as hub:
        ((message, _),) = client(hub.url, tmp_path, ("open/one", {}), prefix=limit)
    assert message.startswith("WriteError adapter: cannot store 'open/one' in the cache ")
    assert "set HF_HOME to another" in message


BASE = """
import logging, sys
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # as the command line does: it misses kernels for the CPU
from refalign_adapter.errors import UserError
from refalign_adapter.generation.options import GenerateOptions, load_pipeline

for base in ("open/base", "original/base", "open/base"):
    try:
        pipe = load_pipeline(GenerateOptions(base, sys.argv[1], device="cpu", height=32, width=48, num_frames=5))
        print(type(pipe).__name__)
    except UserError as error:
        print(error)
"""


@pytest.mark.slow
def test_a_base_of_the_hub_is_loaded_without_a_line_of_a_library(tmp_path):
    adapter, folder = save_tiny_adapter(tmp_path / "adapter"), save_tiny_pipeline(tmp_path / "base")
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with serving(files) as hub:
        environment = client_environment(hub.url, tmp_path / "home")
        run = subprocess.run(
            [sys.executable, "-c", BASE, str(adapter)], env=environment, capture_output=True, text=True, timeout=120
        )
    assert run.returncode == 0, run.stderr
    first, refused, again = run.stdout.splitlines()
    assert first == again == "WanReferencePipeline"
    assert refused.startswith("base: cannot read 'original/base': there is no such folder here and no model of this")
    assert run.stderr == ""


KINDS = {
    "a pipeline": ({"model_index.json": b"{}"}, "is a whole diffusers pipeline, a base and no adapter"),
    "PEFT's own": ({"adapter_config.json": b"{}"}, "is an adapter of PEFT itself"),
    "an adapter below": ({"run/adapter/refalign_config.json": b"{}"}, "has its adapter in 'run/adapter'; download it"),
    "nothing": ({"notes.txt": b""}, "is no adapter folder, it lacks refalign_config.json"),
}


@pytest.mark.slow
def test_a_repository_of_another_kind_says_what_it_is(tmp_path):
    code = (
        "import sys; from refalign_adapter.export.folder import open_adapter\n"
        "from refalign_adapter.errors import UserError\n"
        "try: open_adapter('open/one')\nexcept UserError as error: print(error)\n"
    )
    for kind, (files, message) in KINDS.items():
        with serving(files) as hub:
            environment = client_environment(hub.url, tmp_path / kind)
            run = subprocess.run(
                [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=True
            )
        assert f"adapter: 'open/one' {message}" in run.stdout, kind
        assert len(run.stdout.splitlines()) == 1
        assert run.stderr == ""
