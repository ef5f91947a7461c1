"""Recipes: YAML and overrides to typed fields; every mistake at once."""

import pytest
from recipe_problems import problems

from refalign_adapter.errors import UserError
from refalign_adapter.recipes import optimizers
from refalign_adapter.recipes.cache_options import options_of
from refalign_adapter.recipes.file import changes, flat_values, load_recipe, save_recipe
from refalign_adapter.training.samples import sample_arguments


def test_defaults_are_the_papers_where_it_gives_them(recipe_file):
    recipe = load_recipe(recipe_file())
    assert (recipe.max_train_steps, recipe.data.height, recipe.data.width, recipe.data.num_frames) == (
        3000,
        480,
        832,
        81,
    )
    assert (recipe.alignment.weight, recipe.alignment.negative_weight, recipe.alignment.negative_margin) == (1, 1, 1)
    assert (recipe.adapter.align_layers, recipe.adam_weight_decay, recipe.optimizer) == (9, 0.01, "adamw8bit")
    assert recipe.ema_decay is None


def test_values_are_yaml_with_numbers_and_words_as_people_write_them(recipe_file):
    text = (
        "learning_rate: 5e-5\nmixed_precision: no\ngradient_checkpointing: true\nadapter: {target_modules: [to_q]}\n"
    )
    recipe = load_recipe(recipe_file(text), ["max_grad_norm=null", "adapter.align_layers=[0, 2]", "seed=3"])
    assert recipe.learning_rate == 5e-5
    assert recipe.mixed_precision == "no"
    assert recipe.gradient_checkpointing is True
    assert recipe.max_grad_norm is None
    assert recipe.adapter_config().align_layers == (0, 2)
    assert recipe.adapter_config().base_model == "base"
    assert recipe.seed == 3


def test_every_mistake_is_told_at_once(recipe_file):
    text = "train_batchsize: 2\nr: 4\ndropout: {text: 0.9, references: 0.3}\nvalidation_steps: 5\npush_to_hub: true\n"
    found = problems(
        recipe_file(text), "adapter.lora_alhpa=1", "adapter.attention=jiont", "seed=true", "data.fps=-1", "nonsense",
        "report_to=3", "optimizer=adamw9bit", "sample_steps=4", "alignment.decay=cosine", "lr_warmup_steps=3",
        "learning_rate.x=1", "x=[",
    )  # fmt: skip
    expected = [
        "'nonsense' is no override; write key=value, such as learning_rate=1e-4",
        "x: '[' is not a YAML value",
        "train_batchsize is no known field; did you mean train_batch_size?",
        "r is no known field; did you mean adapter.r?",
        "adapter.lora_alhpa is no known field; did you mean adapter.lora_alpha?",
        "seed should be a valid integer, got True",
        "data.fps should be greater than 0, got -1",
        "report_to should be a valid string or be a valid list, got 3",
        "adapter.attention must be one of",
        "dropout: the shares must sum to at most 1, got text 0.9 + references 0.3 + both 0.1 = 1.3",
        "validation_steps is 5, but there are no held-out rows; set data.validation_data or data.validation_rows",
        "sample_steps is 4, but sample_prompts is empty",
        "hub_model_id must be set with push_to_hub",
        "optimizer: 'adamw9bit' is in neither torch.optim nor bitsandbytes.optim; did you mean adamw8bit?",
        "lr_warmup_steps is 3, but lr_scheduler 'constant' has no warm-up; use constant_with_warmup",
        "learning_rate should be a valid number, got {'x': 1}",
    ]
    assert [line for line in expected if not any(item.startswith(line) for item in found)] == []
    assert len(found) == len(expected)


def test_missing_fields_and_sections(recipe_file):
    assert problems(recipe_file("seed: 1\n", head="")) == [
        "pretrained_model_name_or_path is required", "output_dir is required", "data is required",
    ]  # fmt: skip
    assert problems(recipe_file("data: {}\nadapter: 3\n", head="output_dir: o\n"), "dropout.text=2") == [
        "pretrained_model_name_or_path is required",
        "data.cache_dir is required",
        "adapter should be a valid dictionary or instance of AdapterSection, got 3",
        "dropout.text should be less than or equal to 1, got 2",
    ]


def test_sample_prompts_are_checked_one_by_one(recipe_file):
    text = "sample_steps: 1\nsample_prompts: [{prompt: a, references: [none.png]}, {prompt: 3}, {promt: b}]\n"
    assert problems(recipe_file(text), check_machine=True) == [
        "sample_prompts.2.prompt is required",
        "sample_prompts.2.promt is no known field; did you mean sample_prompts.2.prompt?",
        "sample_prompts.1.prompt should be a valid string, got 3",
    ]
    text = "sample_steps: 1\nsample_prompts: [{prompt: a, references: [none.png]}]\n"
    assert problems(recipe_file(text), check_machine=True) == [
        "sample_prompts.0.references: image 'none.png' does not exist"
    ]


def test_more_references_than_a_prompt_may_have_are_refused_at_the_start(recipe_file):
    many, fits = ("[" + ", ".join(["a.png"] * count) + "]" for count in (9, 8))
    text = f"sample_steps: 1\nsample_prompts: [{{prompt: a, references: {many}}}, {{prompt: b, references: {fits}}}]\n"
    assert problems(recipe_file(text)) == [
        "sample_prompts.0.references: 9 images are too many, at most 8; leave some out"
    ]
    load_recipe(recipe_file(text), ["sample_steps=null"])


@pytest.mark.parametrize("name", ["lr_warmup_steps", "alignment.warmup_steps"])
def test_no_warm_up_is_longer_than_the_run(recipe_file, name):
    given = ["max_train_steps=10", "lr_scheduler=constant_with_warmup"]
    load_recipe(recipe_file(), [*given, f"{name}=10"])
    assert problems(recipe_file(), *given, f"{name}=11") == [
        f"{name} is 11, beyond max_train_steps (10): the run would end while it rises; lower it"
    ]


def test_what_the_machine_lacks(recipe_file, monkeypatch):
    monkeypatch.setattr("refalign_adapter.recipes.checks.find_spec", lambda name: None)
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None)
    path = recipe_file(
        "report_to: [wandb, wandbb]\nresume_from_checkpoint: none\ndata_: 1\n".replace("data_: 1\n", "")
    )
    load_recipe(path)  # nothing of it matters where the recipe is only read
    found = problems(path, "data.train_data=none.jsonl", check_machine=True)
    assert [line.split(",")[0].split(";")[0] for line in found] == [
        "optimizer: 'adamw8bit' is none of torch's",
        "report_to: wandb is not installed",
        "report_to must be among aim",
        "resume_from_checkpoint must be 'latest' or a checkpoint's folder",
        "data.train_data: 'none.jsonl' does not exist",
    ]
    assert "pip install 'refalign-adapter[train]', or use adamw" in found[0]
    load_recipe(path, ["optimizer=adamw"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\n", r"is not valid YAML \(line 5: "),
        ("seed: 1\nseed: 2\n", r"is not valid YAML \(line 5: seed is given twice\)"),
        ("- a\n", "is not valid YAML"),
    ],
)
def test_yaml_that_cannot_be_read_is_one_line(recipe_file, text, message):
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(recipe_file(text))
    assert len(str(caught.value).splitlines()) == 1


def test_files_that_are_no_recipe(tmp_path, recipe_file):
    with pytest.raises(UserError, match=r"^config: cannot read .* \(No such file or directory\)"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(UserError, match=r"must be a mapping of fields, got list"):
        load_recipe(recipe_file("- a\n", head=""))


def test_saved_recipe_is_the_same(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file("mixed_precision: no\nadapter: {teachers: [a, b]}\nlearning_rate: 1e-7\n"))
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == recipe
    flat = flat_values(recipe)
    assert flat["adapter.teachers"] == "['a', 'b']"
    assert flat["data.cache_dir"] == "cache"
    assert "init_adapter" not in flat


def test_changes_names_what_differs():
    before = {"a": 1, "b": {"c": 2, "d": 3}, "gone": 4}
    assert changes(before, {"a": 1, "b": {"c": 5, "d": 3}, "new": 6}) == [
        ("b.c", 2, 5), ("gone", 4, None), ("new", None, 6),
    ]  # fmt: skip


def test_a_cosine_without_length_ends_with_the_run(recipe_file):
    recipe = load_recipe(recipe_file("alignment: {decay: cosine, warmup_steps: 100, final_weight: 0.25}\n"))
    schedule = recipe.alignment_schedule()
    assert schedule.weight_at(100) == 1.0
    assert schedule.weight_at(1550) == pytest.approx(0.625)
    assert schedule.weight_at(3000) == pytest.approx(0.25)


def test_sources_of_data_are_checked_with_everything_else(recipe_file):
    path = recipe_file("max_train_steps: 0\n")
    overrides = ["data.train_data=[{path: a, ratio: 6}, {path: b, formt: folder}]", "data.validation_data=3"]
    assert problems(path, *overrides) == [
        "max_train_steps should be greater than or equal to 1, got 0",
        "data.validation_data should be a valid string or be a valid dictionary or be a valid list, got 3",
        "data.train_data.1.formt is no known field; did you mean data.train_data.1.format?",
        "data.train_data: give every source a ratio, or none of them",
    ]
    sources = "[{path: a, ratio: 6}, {path: user/name, ratio: 4.0, videos: none}]"
    recipe = load_recipe(recipe_file(""), [f"data.train_data={sources}"])
    assert recipe.data.train_data[1]["ratio"] == 4.0
    assert problems(
        recipe_file(""), f"data.train_data={sources}", "optimizer=adamw", "report_to=null", check_machine=True
    ) == [
        "data.train_data: 'a' does not exist",
        "data.train_data: 'none' does not exist",
    ]


def test_buckets_take_the_place_of_one_size(recipe_file):
    bad = problems(recipe_file(), "data.buckets=[81x480, 81x480x832, 5]")
    assert bad == ["data.buckets.2 should be a valid string, got 5"]
    bad = problems(recipe_file(), "data.buckets=[81x480, 81x480x832, none]", "data.fps=0")
    assert bad[0] == "data.fps should be greater than 0, got 0"
    assert bad[1:] == [
        f"data.buckets.{index} must be frames x height x width such as 81x480x832, got {value!r}"
        for index, value in ((0, "81x480"), (2, "none"))
    ]
    options = options_of(load_recipe(recipe_file(), ["data.buckets=[49x832x480, 81x480x832]"]))
    assert list(map(str, options.sizes)) == ["49x832x480", "81x480x832"]
    assert (options.num_frames, options.height, options.width) == (49, 832, 480)
    assert options_of(load_recipe(recipe_file(), ["data.buckets=[81x480x832]"])) == options_of(
        load_recipe(recipe_file())
    )


def test_an_adapter_without_lora_has_nothing_to_train(recipe_file):
    assert problems(recipe_file(), "adapter.r=0") == [
        "adapter.r must be at least 1 to train, got 0: an adapter without LoRA has nothing to train; it is for a base "
        "that was trained whole"
    ]


def test_samples_are_guided_as_the_recipe_says(recipe_file):
    assert sample_arguments(load_recipe(recipe_file()))["guidance_refresh"] == 1
    given = {"guidance_refresh": 3, "guidance_scale": 4.0, "image_guidance_scale": 2.0}
    found = sample_arguments(load_recipe(recipe_file(), [f"sample.{name}={value}" for name, value in given.items()]))
    assert {name: found[name] for name in given} == given
    (problem,) = problems(recipe_file(), "sample.guidance_refresh=0")
    assert problem.endswith("sample.guidance_refresh should be greater than or equal to 1, got 0")
