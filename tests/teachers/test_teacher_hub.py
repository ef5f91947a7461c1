"""Loading errors, each one clear line; folders as they are, the Hub played by a local server (no network in tests)."""

import json
import os
import subprocess
import sys
import threading
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from transformers import BertConfig, Dinov2Config, Dinov2Model

import refalign_adapter
from refalign_adapter.errors import UserError
from refalign_adapter.teachers.dinov2 import DINOv2Teacher
from refalign_adapter.teachers.lookup import load_teacher

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path) -> Path:
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**DINOv2Teacher.tiny_config)).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def message_of(name, **options) -> str:
    with pytest.raises(UserError) as caught:
        load_teacher(str(name), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_folder(tmp_path):
    message = message_of(tmp_path / "nowhere")
    assert "nowhere' does not exist; or use" in message
    assert "facebook/dinov2-base" in message


def test_folder_without_a_config(tmp_path):
    assert "config.json' does not exist" in message_of(tmp_path)


def test_unknown_kind_lists_the_known_ones(tmp_path):
    BertConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    message = message_of(tmp_path)
    assert "is a 'bert', known are clip, dinov2, dinov2_with_registers, dinov3, siglip2" in message
    assert "teacher_class=package.module:Class" in message


def test_kind_that_transformers_does_not_know_either(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "seer9000"}')
    assert "is a 'seer9000', known are" in message_of(tmp_path)


def test_broken_config(tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert "config.json' is not readable JSON" in message_of(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "config.json' must be an object of fields" in message_of(tmp_path)


def test_broken_processor_file_is_not_taken_for_a_missing_one(folder):
    (folder / "preprocessor_config.json").write_text("{")
    assert "preprocessor_config.json' is not readable JSON" in message_of(folder)


def test_processor_nested_in_the_newer_file(folder):
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.7, 0.7, 0.7]}')
    (folder / "processor_config.json").write_text('{"processor_class": "CLIPProcessor"}')
    assert load_teacher(str(folder)).mean == (0.7, 0.7, 0.7)
    (folder / "processor_config.json").write_text('{"image_processor": {"image_mean": [0.1, 0.2, 0.3]}}')
    assert load_teacher(str(folder)).mean == (0.1, 0.2, 0.3)


def test_pickled_weights_are_not_read(folder):
    torch.save(Dinov2Model(Dinov2Config(**DINOv2Teacher.tiny_config)).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "holds no safetensors weights" in message_of(folder)


def test_truncated_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot load" in message_of(folder)


def test_weights_of_another_size(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    assert "cannot load" in message_of(folder)


def test_weights_that_are_missing_are_never_random(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    message = message_of(folder)
    assert "lacks 18 weights of Dinov2Model (encoder.layer.2." in message


def test_offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "it is not cached and the Hub is switched off by HF_HUB_OFFLINE" in message_of(
        "someone/never-cached-encoder"
    )


def serve_hub(root: Path) -> ThreadingHTTPServer:
    """A stand-in for huggingface.co, the one part that cannot exist here: its status codes and headers.

    `open/encoder` holds the files of `root`; `gated/encoder` is refused whole, `gated/weights` shows its config only;
    `expired/token` answers as for bad credentials; anything else is no repository.
    """

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.partition("?")[0].removeprefix("/api/models")
            repository, rest = "/".join(path.split("/")[1:3]), path.split("/")[3:]
            status, headers, body = self.answer(repository, rest)
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

        def answer(self, repository, rest):
            gated_file = repository == "gated/weights" and rest[-1:] != ["config.json"]
            if repository == "gated/encoder" or (gated_file and rest[:1] == ["resolve"]):
                return 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."}, b""
            if repository == "expired/token":
                return 401, {"X-Error-Message": "Invalid credentials in Authorization header"}, b""
            if repository not in ("open/encoder", "gated/weights"):
                return 401, {"X-Error-Code": "RepoNotFound"}, b""
            if "no-such-branch" in rest:
                return 404, {"X-Error-Code": "RevisionNotFound"}, b""
            files = [
                {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": ""} for path in root.iterdir()
            ]
            if rest[:1] == ["tree"]:
                return 200, {}, json.dumps(files).encode()
            if rest[:1] != ["resolve"]:
                siblings = [{"rfilename": file["path"]} for file in files]
                return 200, {}, json.dumps({"id": repository, "sha": COMMIT, "siblings": siblings}).encode()
            if not (root / rest[-1]).is_file():
                return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b""
            body = (root / rest[-1]).read_bytes()
            return 200, {"ETag": f'"{sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}, body

        def log_message(self, format, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


CLIENT = """
import json
import huggingface_hub
from refalign_adapter.errors import UserError
from refalign_adapter.teachers.lookup import load_teacher

answers = {}
for name in ("gated/encoder", "gated/weights", "expired/token", "no-such/repository", "open/encoder@no-such-branch"):
    repository, _, revision = name.partition("@")
    try:
        load_teacher(repository, revision=revision or None)
    except UserError as error:
        answers[name] = str(error)
answers["online"] = load_teacher("open/encoder").fingerprint()
huggingface_hub.constants.HF_HUB_OFFLINE = True
answers["offline"] = load_teacher("open/encoder").fingerprint()
print("ANSWERS" + json.dumps(answers))
"""


@pytest.fixture(scope="module")
def hub_answers(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    Dinov2Model(Dinov2Config(**DINOv2Teacher.tiny_config)).save_pretrained(root)
    (root / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3]}))
    server = serve_hub(root)
    package_root = str(Path(refalign_adapter.__file__).parents[1])
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path_factory.mktemp("cache")),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": package_root,
    }
    run = subprocess.run([sys.executable, "-c", CLIENT], env=environment, capture_output=True, text=True, timeout=120)
    server.shutdown()
    server.server_close()
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.partition("ANSWERS")[2])


REFUSED = {
    "gated/encoder": "it is gated; request access at https://huggingface.co/gated/encoder",
    "gated/weights": "it is gated; request access at https://huggingface.co/gated/weights",
    "expired/token": "the Hub does not accept the token; log in anew",
    "no-such/repository": "there is no such folder here and no model of this name on the Hub",
    "open/encoder@no-such-branch": "it has no revision 'no-such-branch'",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_the_hub(hub_answers, name):
    message = hub_answers[name]
    assert "\n" not in message
    assert message.startswith(f"teacher: cannot read '{name.partition('@')[0]}': {REFUSED[name]}")
    assert "or use 'facebook/dinov2-base', which is open to all" in message


def test_a_teacher_of_the_hub_is_known_by_its_commit(hub_answers):
    online = hub_answers["online"]
    assert online["id"] == "open/encoder"
    assert online["revision"] == COMMIT
    assert online["preprocessing"]["mean"] == [0.1, 0.2, 0.3]
    assert hub_answers["offline"] == online, "once cached, it loads without the Hub"
