"""Reference images for frozen video diffusion transformers, by a small adapter. Names are imported on first use."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .alignment.reference.loss import reference_alignment_loss
    from .branch.attach import attach
    from .branch.reference_branch import ReferenceBranch
    from .branch.reference_cache import ReferenceCache
    from .config import RefAlignConfig
    from .errors import ConfigError, UserError
    from .media.image_files import read_images
    from .media.video_file import write_video
    from .pipelines.load import load_adapter
    from .pipelines.merge import merge_and_unload
    from .world.shipped import demo_adapter, demo_base

_SOURCES = {
    "ConfigError": ".errors",
    "RefAlignConfig": ".config",
    "ReferenceBranch": ".branch.reference_branch",
    "ReferenceCache": ".branch.reference_cache",
    "UserError": ".errors",
    "attach": ".branch.attach",
    "demo_adapter": ".world.shipped",
    "demo_base": ".world.shipped",
    "load_adapter": ".pipelines.load",
    "merge_and_unload": ".pipelines.merge",
    "read_images": ".media.image_files",
    "reference_alignment_loss": ".alignment.reference.loss",
    "write_video": ".media.video_file",
}

__all__ = [
    "ConfigError",
    "RefAlignConfig",
    "ReferenceBranch",
    "ReferenceCache",
    "UserError",
    "attach",
    "demo_adapter",
    "demo_base",
    "load_adapter",
    "merge_and_unload",
    "read_images",
    "reference_alignment_loss",
    "write_video",
]

try:
    __version__ = version("refalign-adapter")
except PackageNotFoundError:  # a checkout on the path without an install
    __version__ = "0.0.0"


def __getattr__(name: str) -> Any:
    if name not in _SOURCES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_SOURCES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
