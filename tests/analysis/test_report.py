"""Pictures, animation and report from made-up metrics and real small files."""

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from refalign_adapter.analysis import pictures, report
from refalign_adapter.analysis.samples import Sample, read_frames, write_animation
from refalign_adapter.analysis.sensitivity import Sensitivity
from refalign_adapter.media.strips import frame_strip
from refalign_adapter.media.video_file import write_video

ROWS = [
    {"step": 0, "validation/flow": 0.5},
    *(
        {
            "step": step,
            "train/flow": 1 / step,
            "train/positive": 0.9,
            "train/negative": 0.1,
            "train/cosine/block_0": 0.1,
        }
        for step in range(1, 60)
    ),
    {"step": 59, "validation/flow": 0.4, "train/positive": 0.3},
]


def sensitivity(true: float = 0.3, shuffled: float = 0.4, p_value: float = 1e-9, none: float = 0.5) -> Sensitivity:
    """Of 16 rows whose losses differ by little."""
    noise = 0.001 * torch.randn(16, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([true, shuffled, 0.31, none], dtype=torch.float64) + noise
    return Sensitivity(true, shuffled, 0.31, none, 16, p_value, rows)


def opened(png: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG"
    return np.asarray(image.convert("RGB"))


@pytest.fixture
def sample(tmp_path: Path) -> Sample:
    frames = np.stack([np.full((32, 48, 3), 25 * index, np.uint8) for index in range(9)])
    write_video(tmp_path / "video.mp4", frames, fps=8)
    for index in range(2):
        Image.new("RGB", (48, 32), (255, 80 * index, 0)).save(tmp_path / f"reference_{index}.png")
    references = (tmp_path / "reference_0.png", tmp_path / "reference_1.png")
    return Sample('a "star" <spins>', references, tmp_path / "video.mp4")


def test_series_and_smoothing():
    steps, values = pictures.series(ROWS, "validation/flow")
    assert (steps.tolist(), values.tolist()) == ([0, 59], [0.5, 0.4])
    assert pictures.series(ROWS, "absent")[0].size == 0
    assert pictures.smooth(np.array([0.0, 3.0, 6.0, 0.0]), 3).tolist() == pytest.approx([1.5, 3, 3, 3])


def test_pictures_are_drawn_and_differ_with_their_values():
    subjects = np.repeat([0, 1], 5)
    points = np.random.default_rng(0).normal(size=(10, 2))
    names = ["ball-0001", "star-0002"]
    assert opened(pictures.loss_picture(ROWS)).std() > 0
    assert opened(pictures.cosine_picture(ROWS)).std() > 0
    one, two = (opened(pictures.features_picture({"a": points * x}, subjects, names)) for x in ([1, 1], [1, -1]))
    assert one.shape == two.shape
    assert (one != two).any()
    assert opened(pictures.sensitivity_picture(sensitivity())).std() > 0


def test_frame_strip_takes_evenly_spaced_frames(sample: Sample):
    strip = frame_strip(read_frames(sample.video), 3)
    assert strip.size == (3 * 48 + 2 * 2, 32)
    middles = [strip.getpixel((x, 16))[0] for x in (24, 74, 124)]
    assert middles == pytest.approx([0, 100, 200], abs=4)


def test_animation_plays_all_frames_with_references_beside_them(sample: Sample, tmp_path: Path):
    write_animation(tmp_path / "demo.gif", [sample, sample, sample], columns=2, size=64, fps=5)
    image = Image.open(tmp_path / "demo.gif")
    assert image.n_frames == 9
    assert image.info["duration"] == 200
    cell = 3 * 96 + 2 * 6
    assert image.size == (2 * (cell + 18), 2 * (64 + 36 + 18))
    red, green, _ = image.convert("RGB").getpixel((6 + 48, 6 + 32))
    assert red > 240
    assert green < 30


class _Sources(HTMLParser):
    def __init__(self):
        super().__init__()
        self.sources, self.open = [], []

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_is_one_well_formed_file(sample: Sample, tmp_path: Path):
    page = report.Report("Demo & more", "What was done.", footer="small print")
    page.sections = [
        report.Section("Losses", "They fall.", report.plot(pictures.loss_picture(ROWS), "losses")),
        report.Section("Use", "Measured.", report.sensitivity_answer(sensitivity())),
        report.Section("Samples", "Look.", report.sample_table([sample])),
        report.Section("Times", "Long.", report.value_table(["stage", "seconds"], [("training", "1.5")])),
        report.Section("Again", "Run.", report.code(["refalign generate --prompt 'a <b>'"])),
    ]
    text = report.write_report(tmp_path / "report.html", page).read_text()
    parser = _Sources()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    assert len(parser.sources) == 1 + 2 + 1 + 1
    assert all(source.startswith("data:") for source in parser.sources)
    assert "<title>Demo &amp; more</title>" in text
    assert "a &quot;star&quot; &lt;spins&gt;" in text
    assert "Yes: the adapter uses its references" in text
    assert not re.search(r"\$\w", text)


@pytest.mark.parametrize(
    ("true", "shuffled", "p_value", "none"),
    [(0.4, 0.3, 0.999, 0.5), (0.3, 0.30001, 0.2, 0.5), (0.3, 0.4, 1e-9, 0.29), (0.3, 0.4, 1e-9, 0.30001)],
    ids=["worse than shuffled", "perhaps chance", "worse than none", "perhaps no better than none"],
)
def test_answer_is_no_without_evidence(true: float, shuffled: float, p_value: float, none: float):
    assert "No: the adapter does not use" in report.sensitivity_answer(sensitivity(true, shuffled, p_value, none))


def test_summary_is_json():
    summary = json.loads(json.dumps(sensitivity().to_dict()))
    assert 0 < summary.pop("p_value_none") < 1e-9
    assert summary == {"true": 0.3, "shuffled": 0.4, "swapped": 0.31, "none": 0.5, "n": 16, "p_value": 1e-9}
