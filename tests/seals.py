"""What a test wrote into a cache counts as the package's own, or as a cache of before there were checksums."""

import json
from pathlib import Path

from refalign_adapter.data.cache.index import CHECKSUM, SUMS, write_meta


def seal(cache: Path) -> None:
    """Give a cache's `meta.json` the checksums of what is there now."""
    write_meta(cache, unseal(cache))


def unseal(cache: Path) -> dict:
    """Take them away; returns what `meta.json` holds now."""
    path = Path(cache) / "meta.json"
    meta = {name: value for name, value in json.loads(path.read_text()).items() if name not in (SUMS, CHECKSUM)}
    path.write_text(json.dumps(meta))
    return meta
