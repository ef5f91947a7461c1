"""The report of a data check: pages that a browser can show, pictures of what is encoded, all of it or nothing."""

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_data
from PIL import Image

from refalign_adapter.data.cache.options import CacheOptions
from refalign_adapter.data.check import contact_sheet, thumbnails
from refalign_adapter.data.check.check import DataCheck, check_data
from refalign_adapter.data.check.contact_sheet import require_own_folder, shown_rows, write_contact_sheets
from refalign_adapter.errors import UserError
from refalign_adapter.media.video_file import write_video

EVIL = "<script>alert('caption')</script> & a \"thing\" moves"
VOID = {"img", "meta"}


class Page(HTMLParser):
    """Links and pictures of a page that opens and closes its tags in order."""

    def __init__(self, path: Path):
        super().__init__()
        self.path, self.tags, self.open, self.names = path, [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def pictures(self) -> list[Path]:
        """Files that are shown."""
        found = [values for tag, values in self.tags if tag == "img"]
        assert all(values["loading"] == "lazy" and values["alt"] for values in found)
        return [(self.path.parent / str(values["src"])).resolve() for values in found]

    def links(self) -> list[tuple[Path, str]]:
        """(file, place in it) that it leads to."""
        found = [str(values["href"]).partition("#") for tag, values in self.tags if tag == "a"]
        return [((self.path.parent / file).resolve(), place) for file, _, place in found]

    def anchors(self) -> list[str]:
        """Places in it."""
        return [str(values["id"]) for tag, values in self.tags if tag == "article"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[DataCheck, CacheOptions]:
    """Six rows checked: row 1 has a caption with markup, row 2 a clip of known colours, row 4 a broken clip."""
    folder = tmp_path_factory.mktemp("sheet")
    manifest = tiny_data.write_data(folder / "data", 6, frames=12, height=32, width=64)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    rows[0]["caption"] = EVIL
    frames = np.zeros((10, 32, 64, 3), np.uint8)
    frames[..., 2] = (25 * np.arange(10))[:, None, None]
    write_video(folder / "data/clips/1.mp4", frames, 8)
    red = np.full((40, 30, 3), 128, np.uint8)
    red[8:-6, 5:-4] = (200, 30, 40)
    red[8:12, 5:-4] = (20, 130, 240)
    Image.fromarray(red).save(folder / "data/references/1_0.png")
    (folder / "data/clips/3.mp4").write_bytes(b"nonsense")
    tiny_data.write_manifest(folder / "data", rows)
    options = CacheOptions(
        base_model="none",
        cache_dir="none",
        train_data=str(folder / "data"),
        height=32,
        width=64,
        num_frames=10,
        fps=None,
        reference_variants=2,
    )
    return check_data(options), options


def write(folder: Path, data: tuple[DataCheck, CacheOptions], **changes: Any) -> Path:
    return write_contact_sheets(folder / "out", *data, **{"sheets": 120, **changes})


def test_pages_show_every_row_and_lead_to_each_other(data, tmp_path, monkeypatch):
    monkeypatch.setattr(contact_sheet, "ROWS_A_PAGE", 4)
    index = Page(write(tmp_path, data))
    sheets = [Page(tmp_path / f"out/sheets/{number}.html") for number in (1, 2)]
    assert sheets[0].anchors() == ["row-3", "row-0", "row-1", "row-2"]
    assert sheets[1].anchors() == ["row-4", "row-5"]
    pages = {page.path.resolve(): page for page in (index, *sheets)}
    shown = [picture for page in pages.values() for picture in page.pictures()]
    images = sorted(path.resolve() for path in (tmp_path / "out/images").iterdir())
    assert sorted(shown) == images
    for page in pages.values():
        for file, place in page.links():
            assert file in images or not place or place in pages[file].anchors()
    assert (sheets[0].path.resolve(), "row-3") in index.links()
    everything = " ".join(page.path.read_text() for page in pages.values())
    assert not any(word in everything for word in ("http://", "https://", "<script", "{{", "{%"))


def test_captions_are_text_and_findings_stand_at_their_row(data, tmp_path):
    write(tmp_path, data)
    text = (tmp_path / "out/sheets/1.html").read_text()
    assert "&lt;script&gt;alert(&#39;caption&#39;)&lt;/script&gt; &amp; a &#34;thing&#34; moves" in text
    first = text[: text.index('id="row-0"')]
    assert '<article id="row-3" class="problem">' in first
    assert "cannot read" in first
    assert "The clip cannot be shown." in first
    index = (tmp_path / "out/index.html").read_text()
    assert "1 problem and no notes in 6 rows. 6 of them can be seen, those with problems first." in index
    assert "Replace the file or remove the row." in index
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert [(item["kind"], item["row"]) for item in report["problems"]] == [("clip", 3)]
    assert report["summary"]["Rows"][0]["rows"] == 6


def test_pictures_are_what_is_encoded(data, tmp_path):
    write(tmp_path, data)
    strip = Image.open(tmp_path / "out/images/000001_frames.jpg")
    assert strip.size == (4 * 240 + 3 * 2, 120)
    blues = np.asarray(strip)[60, 120::242, 2].tolist()
    assert blues == pytest.approx([0, 75, 150, 225], abs=6)
    canvas = Image.open(tmp_path / "out/images/000001_0_0.jpg")
    assert canvas.size == (240, 120)
    assert canvas.getpixel((120, 80)) == pytest.approx((200, 30, 40), abs=6)
    assert canvas.getpixel((10, 60)) == pytest.approx((255, 255, 255), abs=3)
    variants = [Image.open(tmp_path / f"out/images/000001_0_{number}.jpg") for number in (1, 2)]
    differences = [np.abs(np.asarray(item, int) - np.asarray(canvas)).mean() for item in variants]
    assert min(differences) > 3
    assert not (tmp_path / "out/images/000001_0_3.jpg").exists()
    assert not (tmp_path / "out/images/000000_0_1.jpg").exists()  # of a cross pair, which is not augmented


def test_workers_write_the_same_pictures(data, tmp_path):
    done = []
    write(tmp_path / "two", data, workers=2, progress=lambda *counts: done.append(counts))
    write(tmp_path / "none", data)
    assert done == [(number, 6) for number in range(1, 7)]
    files = {path.relative_to(tmp_path / "none"): path for path in (tmp_path / "none").rglob("*.*")}
    assert len(files) > 20
    for name, path in files.items():
        assert (tmp_path / "two" / name).read_bytes() == path.read_bytes()


def test_rows_with_problems_come_first_then_a_draw(data):
    check, _ = data
    assert shown_rows(check, 0, seed=0) == []
    assert shown_rows(check, 1, seed=0) == [3]
    draws = {tuple(shown_rows(check, 3, seed=seed)) for seed in range(20)}
    assert len(draws) > 5
    assert all(draw[0] == 3 and list(draw[1:]) == sorted(set(draw[1:]) - {3}) for draw in draws)
    assert shown_rows(check, 3, seed=1) == shown_rows(check, 3, seed=1)
    assert shown_rows(check, 100, seed=0) == [3, 0, 1, 2, 4, 5]


def test_an_older_report_is_replaced_as_a_whole(data, tmp_path):
    write(tmp_path, data)
    write(tmp_path, data, sheets=1)
    images = sorted(path.name for path in (tmp_path / "out/images").iterdir())
    assert images == ["000003_0_0.jpg", "000003_0_1.jpg", "000003_0_2.jpg"]
    assert Page(tmp_path / "out/sheets/1.html").anchors() == ["row-3"]
    write(tmp_path, data, sheets=0)
    assert not list((tmp_path / "out/images").iterdir())
    assert not list((tmp_path / "out/sheets").iterdir())
    assert "sheets/" not in (tmp_path / "out/index.html").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupted_report_leaves_the_older_one(data, tmp_path, monkeypatch):
    write(tmp_path, data, sheets=1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}

    def interrupted(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, data, progress=interrupted)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


def test_folders_of_others_are_refused(tmp_path):
    assert require_own_folder(tmp_path / "new" / "report") == tmp_path / "new" / "report"
    (tmp_path / "mine").mkdir()
    require_own_folder(tmp_path / "mine")
    (tmp_path / "mine" / "report.json").write_text('{"format": "another"}')
    with pytest.raises(UserError, match="holds files that are no report of a check; choose another folder"):
        require_own_folder(tmp_path / "mine")
    with pytest.raises(UserError, match="is a file; choose a folder"):
        require_own_folder(tmp_path / "mine" / "report.json")
    with pytest.raises(UserError, match="output: cannot write to"):
        require_own_folder("/proc/no/such/place")


def test_long_lists_of_findings_are_cut_on_the_page_only(data, tmp_path, monkeypatch):
    check, options = data
    many = DataCheck(check.sources, check.rows, [*check.findings, *check.problems * 4])
    monkeypatch.setattr(contact_sheet, "LISTED", 2)
    write(tmp_path, (many, options), sheets=0)
    index = (tmp_path / "out/index.html").read_text()
    assert index.count("cannot read") == 2
    assert "and 3 more, in report.json" in index
    assert len(json.loads((tmp_path / "out/report.json").read_text())["problems"]) == 5


def test_a_clip_that_has_gone_is_told_in_place_of_its_frames(data, tmp_path):
    check, options = data
    row = check.rows[0].row
    gone = replace(row, clip=tmp_path / "gone.mp4")
    drawn = thumbnails.ThumbnailWriter(options, tmp_path)["a", gone, check.rows[0].look.size]
    assert drawn.frames is None
    assert [item.file for item in drawn.references[0]] == ["a_0_0.jpg"]
