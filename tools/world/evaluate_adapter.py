"""Measure an adapter on the world's base, with several seeds of sampling, and write the figures.

    python tools/world/evaluate_adapter.py --output figures.json
    python tools/world/evaluate_adapter.py --set guidance_refresh=3 --seeds 2 --losses 0

Without --base and --adapter those that are shipped. The figures of the shipped adapter stand beside it.
"""

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from diffusers import WanPipeline

import refalign_adapter as ra
from refalign_adapter.branch.switched_on import branch_of
from refalign_adapter.library_output import quiet_libraries
from refalign_adapter.world.evaluation import Scenes, facts, measure_losses, watch_scenes
from refalign_adapter.world.reading import Judge
from refalign_adapter.world.sampling import Sampling


def evaluate(base: str, adapter: str | None, scenes: Scenes, sampling: Sampling, seeds: int, losses: int) -> dict:
    """The figures; without an adapter, of the base alone."""
    started = time.perf_counter()
    judge = Judge.load()
    with quiet_libraries():
        pipe = ra.load_adapter(WanPipeline.from_pretrained(base), adapter or ra.demo_adapter())
    verdicts = watch_scenes(pipe, judge, scenes, sampling, seeds=range(seeds))
    watched = time.perf_counter() - started
    branch = branch_of(pipe.transformer)
    assert branch is not None
    measured = measure_losses(pipe, branch, losses) if losses else None
    return {
        "sampling": {**vars(sampling), "arguments": dict(sampling.arguments), "seeds": seeds},
        "scenes": {**vars(scenes), "size": dict(scenes.size)},
        "counted_looks": list(judge.counted),
        "seconds_of_videos": round(watched, 1),
        **facts(verdicts, measured),
        "versions": {name: version(name) for name in ("torch", "diffusers", "peft")},
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=None, help="folder of the world's base; the shipped one")
    parser.add_argument("--adapter", default=None, help="adapter folder; the shipped one")
    parser.add_argument("--without-references", action="store_true", help="videos of the base alone")
    parser.add_argument("--one", type=int, default=48, help="scenes of one subject")
    parser.add_argument("--two", type=int, default=24, help="scenes of two subjects")
    parser.add_argument("--same-kind", type=int, default=24, help="scenes of two subjects of one kind")
    parser.add_argument("--losses", type=int, default=192, help="clips for flow losses; 0: none")
    parser.add_argument("--seeds", type=int, default=5, help="of sampling, for every scene")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="of the pipeline's call")
    parser.add_argument("--output", type=Path, default=None, help="JSON file")
    given = parser.parse_args()
    arguments: dict[str, Any] = {
        name: yaml.safe_load(value) for name, _, value in (s.partition("=") for s in given.set)
    }
    own = {name: arguments.pop(name) for name in list(arguments) if name in Sampling.__dataclass_fields__}
    sampling = Sampling(**own, arguments=arguments, references=not given.without_references)
    scenes = Scenes(given.one, given.two, given.same_kind)
    found = evaluate(given.base or str(ra.demo_base()), given.adapter, scenes, sampling, given.seeds, given.losses)
    text = json.dumps(found, indent=1) + "\n"
    print(text)
    if given.output is not None:
        given.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
