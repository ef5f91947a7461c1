"""The world as files: videos that decode, a manifest that holds, bad values refused."""

import json

import av
import numpy as np
import pytest
from PIL import Image

from refalign_adapter.errors import ConfigError, UserError
from refalign_adapter.world.scenes import draw_clip
from refalign_adapter.world.write import write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"), clips=6, seed=5)


def rows_of(manifest):
    return [json.loads(line) for line in manifest.read_text().splitlines()]


def test_videos_decode_to_the_drawn_frames(world):
    for number, row in enumerate(rows_of(world), start=1):
        with av.open(str(world.parent / row["file_name"])) as container:
            stream = container.streams.video[0]
            assert stream.average_rate == 8
            assert stream.codec_context.pix_fmt == "yuv420p"
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        drawn = draw_clip(5, number, split="train", height=64, width=64, num_frames=9)
        assert frames.shape == (9, 64, 64, 3)
        error = ((frames.astype(float) - drawn.frames) ** 2).mean()
        assert 10 * np.log10(255**2 / error) > 26
        assert row["caption"] == drawn.caption


def test_rows_of_the_manifest_lead_to_their_pictures(world):
    rows = rows_of(world)
    assert [row["file_name"] for row in rows] == [f"clips/{number:06d}.mp4" for number in range(1, 7)]
    for row in rows:
        assert row["pair"] == "cross"
        assert 1 <= len(row["references"]) <= 3
        for reference in row["references"]:
            image, mask = (Image.open(world.parent / reference[key]) for key in ("image", "mask"))
            assert (image.mode, mask.mode) == ("RGB", "L")
            assert image.size == mask.size == (64, 64)
            assert reference["subject"].split("-")[0] in row["caption"]


def test_the_same_seed_writes_the_same_bytes(world, tmp_path):
    again = write_world(tmp_path, clips=2, seed=5)
    for path in sorted(tmp_path.rglob("*.png")) + sorted(tmp_path.rglob("*.mp4")):
        assert path.read_bytes() == (world.parent / path.relative_to(tmp_path)).read_bytes()
    assert again.read_text() == "".join(world.read_text().splitlines(keepends=True)[:2])


def test_wrong_values_are_reported_together(tmp_path):
    with pytest.raises(ConfigError) as caught:
        write_world(
            tmp_path,
            clips=0,
            subjects_split="test",
            height=63,
            num_frames=8,
            fps=0,
            subjects=4,
            same_kind=1.5,
            pairs="pasted",
            reference_backgrounds=-1,
        )
    assert [line.split()[0] for line in caught.value.problems] == [
        "clips",
        "subjects_split",
        "height",
        "num_frames",
        "fps",
        "subjects",
        "same_kind",
        "reference_backgrounds",
        "pairs",
    ]


def test_a_file_in_the_place_of_the_folder_is_one_clear_line(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="folder: cannot write"):
        write_world(tmp_path / "taken", clips=1)


def test_shares_of_clips_of_one_kind_and_of_references_before_backgrounds(tmp_path):
    manifest = write_world(tmp_path, clips=24, seed=5, same_kind=0.5, reference_backgrounds=0.5, pairs="regular")
    rows = rows_of(manifest)
    assert {row["pair"] for row in rows} == {"regular"}
    alike = [len({reference["subject"].split("-")[0] for reference in row["references"]}) == 1 for row in rows]
    several = [len(row["references"]) > 1 for row in rows]
    assert 4 < sum(np.logical_and(alike, several)) < 20
    corners = [np.asarray(Image.open(tmp_path / row["references"][0]["image"]))[0, 0].tolist() for row in rows]
    assert 4 < sum(corner != [255, 255, 255] for corner in corners) < 20
    with pytest.raises(ConfigError, match="same_kind needs clips of 2 or 3 subjects"):
        write_world(tmp_path, clips=1, subjects=1, same_kind=0.5)
