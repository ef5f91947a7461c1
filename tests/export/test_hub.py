"""Pushing an adapter. There is no Hub here: its client is replaced, or finds nobody at its address."""

from types import SimpleNamespace
from unittest.mock import MagicMock

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from tiny_adapter import save_tiny_adapter
from tiny_models import tiny_transformer

import refalign_adapter as ra
from refalign_adapter.export.formats import REFERENCE, STOCK
from refalign_adapter.export.hub import push_adapter


@pytest.fixture
def hub(monkeypatch):
    """What the client was asked to do, the files of the upload read at that moment."""
    asked = []

    class Api:
        def __init__(self, token=None):
            asked.append(("token", token))

        def create_repo(self, repo_id, **options):
            asked.append(("create", repo_id, options))

        def upload_folder(self, *, repo_id, folder_path, commit_message, delete_patterns):
            files = {path.name: path.read_bytes() for path in folder_path.iterdir()}
            asked.append(("upload", repo_id, files, delete_patterns))
            return SimpleNamespace(commit_url="https://hub/commit")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return asked


def save(folder):
    return save_tiny_adapter(folder)


def test_repository_files_and_card(hub):
    commit = push_adapter(save, "you/adapter", private=True, token="secret")
    assert commit.commit_url == "https://hub/commit"
    token, create, upload = hub
    assert token == ("token", "secret")
    assert create == ("create", "you/adapter", {"private": True, "exist_ok": True})
    assert upload[1] == "you/adapter"
    assert sorted(upload[2]) == ["README.md", STOCK.file_name, "refalign_config.json"]
    assert b'ra.load_adapter(base.to(device), "you/adapter")' in upload[2]["README.md"]


def test_a_branch_pushes_itself(hub):
    branch = ra.attach(tiny_transformer(), ra.RefAlignConfig(attention="joint", r=2, align_layers=1))
    branch.push_to_hub("you/adapter")
    assert [item[0] for item in hub] == ["token", "create", "upload"]


def test_a_repository_never_holds_the_weights_of_both_scopes(hub):
    push_adapter(save, "you/adapter")
    branch = ra.attach(
        tiny_transformer(), ra.RefAlignConfig(r=2, align_layers=1, attention="isolated", lora_scope="reference")
    )
    branch.push_to_hub("you/adapter")
    first, second = (item for item in hub if item[0] == "upload")
    assert first[3] == [REFERENCE.file_name]
    assert second[3] == [STOCK.file_name]
    assert set(second[2]) == {"README.md", "refalign_config.json", REFERENCE.file_name}
    assert b"refuses the file" in second[2]["README.md"]


def test_nothing_is_created_when_saving_fails(hub):
    def fails(folder):
        raise ra.UserError("no space")

    with pytest.raises(ra.UserError, match="no space"):
        push_adapter(fails, "you/adapter")
    assert hub == []


REFUSALS = [
    (HfHubHTTPError("403 Forbidden:\nno rights", response=MagicMock(status_code=403)), "the token has no right to it"),
    (HFValidationError("Repo id must be in the form"), "a name on the Hub, which is user/name"),
    (OfflineModeIsEnabled("Cannot reach the Hub: offline mode is enabled."), "switched off by HF_HUB_OFFLINE"),
    (HfHubHTTPError.__bases__[0]("[Errno 111] Connection refused"), "Connection refused"),
]


@pytest.mark.parametrize(("refused", "reason"), REFUSALS, ids=lambda case: type(case).__name__)
def test_a_refusal_is_one_line(hub, monkeypatch, refused, reason):
    def refuse(*_, **__):
        raise refused

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(ra.UserError, match="repo_id: cannot push to 'you/adapter': ") as caught:
        push_adapter(save, "you/adapter")
    assert "\n" not in str(caught.value)
    assert reason in str(caught.value)


def test_the_real_client_with_nobody_there(monkeypatch):
    api = huggingface_hub.HfApi
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token: api(endpoint="http://127.0.0.1:9", token=token))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ra.UserError, match="cannot push to 'you/adapter': the Hub cannot be reached"):
        push_adapter(save, "you/adapter", token="x")
