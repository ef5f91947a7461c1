"""RefAlignConfig: all problems at once, JSON round trip."""

import pytest

import refalign_adapter as ra


def test_every_problem_is_told_at_once():
    with pytest.raises(ra.ConfigError) as caught:
        ra.RefAlignConfig(
            attention="jiont", r=0, lora_alpha=-1, lora_dropout=1.0, align_layers=[1, 1], teachers=["a", "a"]
        )
    assert len(caught.value.problems) == 6
    assert "attention must be one of ['isolated', 'joint'], got 'jiont'" in caught.value.problems


def test_what_only_isolated_attention_has_is_refused_with_joint():
    with pytest.raises(ra.ConfigError) as caught:
        ra.RefAlignConfig(reference_frame=3, reference_scale=0.5, drop_background=True)
    names = ("reference_frame", "reference_scale", "drop_background")
    assert [problem.split(" needs attention='isolated'")[0] for problem in caught.value.problems] == list(names)
    with pytest.raises(ra.ConfigError, match=r"lora_scope must be one of \['all'\] with attention='joint'"):
        ra.RefAlignConfig(lora_scope="reference")
    with pytest.raises(ra.ConfigError) as caught:
        ra.RefAlignConfig(attention="isolated", reference_frame=-1, reference_scale=0, drop_background=1)
    assert len(caught.value.problems) == 3
    assert ra.RefAlignConfig(attention="isolated", lora_scope="reference", reference_frame=0).reference_frame == 0


def test_a_misspelt_key_is_told_with_the_nearest_one():
    with pytest.raises(ra.ConfigError, match="file: lora_alhpa is no known field; did you mean lora_alpha?"):
        ra.RefAlignConfig.from_dict({"lora_alhpa": 3}, source="file")


def test_what_is_saved_is_read_back(tmp_path):
    config = ra.RefAlignConfig(
        r=8, align_layers=[0, 4], target_modules=["to_q"], teachers=["a", "b"], base={"family": "wan"}
    )
    config.save(tmp_path)
    assert ra.RefAlignConfig.load(tmp_path) == config


def test_a_missing_or_broken_file_is_one_line(tmp_path):
    with pytest.raises(ra.UserError, match="does not exist"):
        ra.RefAlignConfig.load(tmp_path)
    (tmp_path / "refalign_config.json").write_text("{")
    with pytest.raises(ra.UserError, match="not readable JSON"):
        ra.RefAlignConfig.load(tmp_path)


@pytest.mark.parametrize(("layers", "blocks"), [(0, ()), (2, (0, 1)), ([3, 1], (1, 3))])
def test_align_blocks(layers, blocks):
    assert ra.RefAlignConfig(align_layers=layers).align_blocks(4) == blocks


def test_align_blocks_beyond_the_model():
    with pytest.raises(ra.ConfigError, match="reaches block 8, but the model has 4 blocks"):
        ra.RefAlignConfig().align_blocks(4)
