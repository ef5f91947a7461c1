"""The world's pretrained parts, shipped with the package: a tiny Wan pipeline and a tiny teacher.

Each is two files in `assets/`: all weights as float16 in one safetensors file, all JSON files of the folder in one.
Unpacking writes the folder that diffusers or transformers load. `tools/world/pretrain.py` tells how they were made.
"""

from pathlib import Path

from ..atomic import atomic_folder
from ..json_files import read_json, write_json

ASSETS = Path(__file__).parent / "assets"


def unpack_base(folder: str | Path) -> Path:
    """Write the tiny Wan pipeline as a folder for `WanPipeline.from_pretrained(folder)`, weights in float32.

    Args:
        folder: replaced as a whole if it exists.

    Returns:
        The folder.

    Raises:
        UserError: the folder cannot be written.
    """
    return _unpack("base", folder)


def unpack_teacher(folder: str | Path) -> Path:
    """Likewise the tiny teacher, a `Dinov2Model`, for `AutoModel.from_pretrained(folder)`."""
    return _unpack("teacher", folder)


def pack(folder: str | Path, name: str, assets: str | Path = ASSETS) -> None:
    """Pack a model folder into `assets/<name>.safetensors` and `assets/<name>.json`: the inverse of unpacking.

    A weights file's tensors are kept under `<its path>::<key>`.
    """
    from safetensors.torch import load_file, save_file

    root, target = Path(folder), Path(assets)
    target.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{path.relative_to(root).as_posix()}::{key}": value.half().contiguous()
        for path in sorted(root.rglob("*.safetensors"))
        for key, value in load_file(path).items()
    }
    texts = {path.relative_to(root).as_posix(): read_json(path) for path in sorted(root.rglob("*.json"))}
    for text in texts.values():
        text.pop("_name_or_path", None)  # where the model was trained is of no use elsewhere
    save_file(tensors, target / f"{name}.safetensors")
    (target / f"{name}.safetensors").chmod(0o644)
    write_json(target / f"{name}.json", texts)


def _unpack(name: str, folder: str | Path) -> Path:
    from safetensors.torch import load_file, save_file

    files: dict[str, dict] = {}
    for key, value in load_file(ASSETS / f"{name}.safetensors").items():
        path, parameter = key.split("::")
        files.setdefault(path, {})[parameter] = value.float()
    with atomic_folder(folder) as temporary:
        for path, content in read_json(ASSETS / f"{name}.json").items():
            write_json(temporary / path, content)
        for path, tensors in files.items():
            save_file(tensors, temporary / path, metadata={"format": "pt"})
    return Path(folder)
