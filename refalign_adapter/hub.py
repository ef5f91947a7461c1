"""The Hugging Face Hub: fetch a repository's files, and say in one line why that failed and what to do."""

from __future__ import annotations

import errno
import logging
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import UserError, WriteError, one_line
from .files import ADVICE

PATIENCE = 4.0
"""Seconds that the Hub has to answer at all, before it counts as out of reach."""
LIBRARIES = ("huggingface_hub", "hf_xet", "httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
"""Of whose exceptions `refusal` makes a line, beside those of the system; which are used differs between versions."""
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def fetch(
    repo_id: str,
    *,
    field: str,
    repo_type: str = "model",
    revision: str | None = None,
    token: str | None = None,
    patterns: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of a repository's snapshot, whose name is its commit; what is not in the local cache is downloaded.

    When the Hub cannot be reached, a whole copy in the cache serves without a word. Whether it is whole after a
    download that was cut, huggingface_hub knows since 1.22; before, who reads the folder finds what is missing.

    Args:
        repo_id: `user/name`.
        field: what the user called it, such as "adapter"; it opens the line of every error.
        repo_type: model or dataset.
        revision: branch, tag or commit.
        token: None takes the one of `hf auth login`.
        patterns: of the files wanted, as the shell has them; None: all.
        ignore: patterns of files not wanted.
        local_files_only: whether to look into the cache alone.

    Raises:
        UserError: no such repository or revision, gated or private, a wrong token, out of reach, cut off midway.
        WriteError: the cache cannot be written.
    """
    if repo_id.startswith((".", "/", "~")) or repo_id.count("/") > 1 or "\\" in repo_id:
        raise UserError(f"{field}: folder {repo_id!r} does not exist")
    import huggingface_hub

    asked: dict[str, Any] = {"repo_type": repo_type, "revision": revision}
    wanted = None if patterns is None else list(patterns)
    unwanted = {} if ignore is None else {"ignore_patterns": list(ignore)}
    try:
        with _quiet():
            reached = not local_files_only and _answers(repo_id, token, asked)
            only_cached = {} if reached else {"local_files_only": True}
            options = {"token": token, "allow_patterns": wanted, **unwanted, **only_cached}
            return Path(huggingface_hub.snapshot_download(repo_id, **asked, **options))
    except Exception as error:
        if not is_of_the_hub(error):
            raise
        raise refusal(error, repo_id, field=field, repo_type=repo_type, revision=revision) from error


def is_of_the_hub(error: BaseException) -> bool:
    """Whether `refusal` has a line for this exception."""
    if isinstance(error, UserError) or not isinstance(error, Exception):
        return False
    modules = {cls.__module__.partition(".")[0] for cls in type(error).__mro__}
    return isinstance(error, OSError) or bool(modules & set(LIBRARIES))


def refusal(
    error: BaseException,
    repo_id: str,
    *,
    field: str,
    repo_type: str = "model",
    revision: str | None = None,
    doing: str = "read",
) -> UserError:
    """What an exception of `huggingface_hub`, or of what it talks through, means for the user: one line.

    Args:
        error: the exception.
        repo_id, field, repo_type, revision: as in `fetch`.
        doing: what was tried, "read" or "push to".
    """
    number = error.errno if isinstance(error, OSError) else None
    if number in _DISK:
        return WriteError(
            f"{field}: cannot store {repo_id!r} in the cache {_cache_folder()!r} ({os.strerror(number)}); "
            f"{ADVICE.get(number, 'free some space')}, or set HF_HOME to another"
        )
    return UserError(f"{field}: cannot {doing} {repo_id!r}: {_reason(error, repo_id, repo_type, revision)}")


def _reason(error: BaseException, repo_id: str, repo_type: str, revision: str | None) -> str:
    from huggingface_hub import errors

    what = "data set" if repo_type == "dataset" else repo_type
    page = f"https://huggingface.co/{'datasets/' if repo_type == 'dataset' else ''}{repo_id}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.HFValidationError):
        return "it is neither a folder here nor a name on the Hub, which is user/name"
    if isinstance(error, errors.GatedRepoError):
        return f"it is gated; request access at {page} and log in with `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no revision {revision!r}; see {page}/commits"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"there is no such folder here and no {what} of this name on the Hub that you may see; it may be "
            "misspelt, renamed or private; if private, log in with `hf auth login` or give a token that may read it"
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        status = getattr(getattr(error.__cause__, "response", None), "status_code", None)
        return _status(status, page) or _unreachable(error)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "the Hub is switched off by HF_HUB_OFFLINE; unset it"
    if isinstance(error, errors.EntryNotFoundError):
        return f"a file of it is missing on the Hub; see {page}"
    if answer := _status(status, page):
        return answer
    if _is_connection(error):
        return "the Hub cannot be reached, or the connection broke off; try again, downloads go on from what has come"
    return f"{one_line(error)}; see {page}"


def _status(status: int | None, page: str) -> str | None:
    if status == 401:
        return "the Hub does not accept the token; log in anew with `hf auth login`, or correct HF_TOKEN"
    if status == 403:
        return f"the token has no right to it; see {page}, and take a token that may do this"
    if status == 429:
        return "the Hub has had too many requests from here; wait some minutes"
    if status is not None and status >= 500:
        return f"the Hub has trouble of its own (status {status}); try again later"
    return None


def _unreachable(error: BaseException) -> str:
    from huggingface_hub import constants

    there = "the copy in the local cache is not whole" if "Incomplete" in type(error).__name__ else "it is not cached"
    if constants.HF_HUB_OFFLINE:
        return f"{there} and the Hub is switched off by HF_HUB_OFFLINE; unset it, or download it while online"
    return f"{there} and the Hub cannot be reached; look after the connection, or download it while online"


def _is_connection(error: BaseException) -> bool:
    """Whether no answer, or half of one, came: by name, as the HTTP library differs between versions."""
    signs = ("Connect", "Timeout", "Protocol", "Network", "ReadError", "WriteError", "Proxy", "Chunked", "Incomplete")
    names = [cls.__name__ for cls in type(error).__mro__]
    told = str(error)
    return any(sign in name for sign in signs for name in names) or "Consistency check failed" in told


def _answers(repo_id: str, token: str | None, asked: dict[str, Any]) -> bool:
    """Whether the Hub answers in time, whatever it says. In a thread: no timeout holds for name servers."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return False
    outcome: list[bool] = []

    def ask() -> None:
        try:
            HfApi(token=token).repo_info(repo_id, timeout=PATIENCE, **asked)
            outcome.append(True)
        except Exception as error:
            outcome.append(not _is_connection(error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return outcome == [True]


@contextmanager
def _quiet() -> Iterator[None]:
    """No lines of the library about retries. Bars of a download only on a terminal."""
    import huggingface_hub.file_download  # noqa: F401  # its first import sets the level of its logger
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    logger = logging.getLogger("huggingface_hub")
    level, shown = logger.level, not are_progress_bars_disabled()
    hide = shown and not sys.stderr.isatty()
    logger.setLevel(logging.CRITICAL)
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if hide:
            enable_progress_bars()


def _cache_folder() -> str:
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE
