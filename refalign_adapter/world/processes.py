"""Commands of the package as processes of their own, stopped cleanly when the one that runs them is."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence

import psutil

from ..errors import UserError
from ..signals import NUMBERS, Stopped

GRACE_SECONDS = 60
POLL_SECONDS = 0.05
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore::FutureWarning",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Everything is on disk; bars over files that load in a moment and libraries' plans say nothing to a user."""


def run_module(module: str, *arguments: object, quiet: bool = False) -> None:
    """Run `python -m module arguments…` with this Python; its output goes where ours goes.

    On Ctrl-C the process and its descendants are asked to end and waited for: training writes a checkpoint first.

    Args:
        module, arguments: what to run.
        quiet: drop its standard output; errors are shown all the same.

    Raises:
        UserError: it failed; it has printed why.
        Stopped: a signal ended it.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    process = subprocess.Popen(
        command, env={**os.environ, **ENVIRONMENT}, stdout=subprocess.DEVNULL if quiet else None
    )
    try:
        # Not wait(): on Ctrl-C it lingers, and a launcher that ends meanwhile leaves its own child unknown to us.
        while (code := process.poll()) is None:
            time.sleep(POLL_SECONDS)
    except BaseException:
        _stop(process.pid)
        process.wait()
        raise
    if (number := code - 128 if code > 128 else -code) in NUMBERS:
        raise Stopped(number)
    if code:
        raise UserError(f"{_name(module, arguments)} failed with exit code {code}; its own message is above")


def _name(module: str, arguments: Sequence[object]) -> str:
    """What ran, in words: the module, or for a launcher the module it launched."""
    names = [str(argument) for argument in arguments if str(argument).startswith("refalign_adapter.")]
    return (names or [module])[0]


def _stop(pid: int) -> None:
    try:
        parent = psutil.Process(pid)
        family = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for member in family:
        try:
            member.terminate()
        except psutil.NoSuchProcess:
            pass
    _, alive = psutil.wait_procs(family, timeout=GRACE_SECONDS)
    for member in alive:
        member.kill()
