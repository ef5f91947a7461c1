"""An adapter folder to the Hub."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..hub import is_of_the_hub, refusal
from .adapter import FILE_NAMES
from .card import model_card
from .folder import open_adapter
from .formats import format_of

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


def push_adapter(
    save: Callable[[Path], Any], repo_id: str, *, private: bool = False, token: str | None = None
) -> CommitInfo:
    """Write an adapter folder, create the model repository if there is none, and upload; one commit.

    Of what the repository holds, the weights file of an adapter of the other scope is deleted.

    Args:
        save: writes the adapter into the folder it is given, such as `branch.save_pretrained`.
        repo_id: `user/name`; the card's usage snippet is made to load it.
        private: whether a repository that is created here is private.
        token: of the Hub; None takes the one of `hf auth login`.

    Raises:
        UserError: the Hub refused or could not be reached, with its reason.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "adapter"
        save(folder)
        config = open_adapter(folder).config
        card = model_card(config, repo_id)
        (folder / "README.md").write_text(card, encoding="utf-8")
        api = HfApi(token=token)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message="Upload adapter",
                delete_patterns=[name for name in FILE_NAMES if name != format_of(config).file_name],
            )
        except Exception as error:
            if not is_of_the_hub(error):
                raise
            raise refusal(error, repo_id, field="repo_id", doing="push to") from error
