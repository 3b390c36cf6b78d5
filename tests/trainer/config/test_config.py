"""Settings: every mistake is named, and nothing is silently ignored."""

import pytest

from medtrain.trainer.config.reading import read_tree
from medtrain.trainer.config.settings import config_from_dict, learned_settings, load_config
from medtrain.trainer.errors import InputError


def test_unknown_key_names_the_nearest_in_name_or_by_section(cpt_tree):
    cpt_tree["optim"]["learning_rate"] = 1.0
    cpt_tree["optim"]["stepz"] = 1
    del cpt_tree["optim"]["learning_rate"]
    with pytest.raises(InputError, match=r"optim\.stepz.*unknown key.*'optim\.steps'"):
        config_from_dict("cpt", cpt_tree)


def test_a_known_setting_in_the_wrong_section_is_pointed_to(cpt_tree):
    cpt_tree["optim"]["seq_len"] = 4
    with pytest.raises(InputError, match=r"'data\.seq_len'"):
        config_from_dict("cpt", cpt_tree)


def test_unknown_key_in_a_list_entry_is_named_with_its_place(cpt_tree):
    cpt_tree["data"]["sources"][0]["wieght"] = 1
    with pytest.raises(InputError, match=r"data\.sources\.0\.wieght"):
        config_from_dict("cpt", cpt_tree)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.steps=0", "optim.steps.*1 or more"),
        ("optim.steps=many", "optim.steps.*whole number"),
        ("optim.steps=2.5", "optim.steps.*whole number"),
        ("optim.lr=-1", "optim.lr"),
        ("optim.lr=true", "optim.lr.*a number"),
        ("optim.schedule=linear", "cosine | wsd | constant"),
        ("optim.epochs=1", "set exactly one of optim.steps and optim.epochs"),
        ("model.path=/x", "set exactly one of model.path and model.init"),
        ("run.out=null", "run.out"),
        ("data.sources=[]", "data.sources"),
        ("data.sources=5", "a list"),
        ("rpo.beta=0", "rpo.beta"),
        ("rpo.loss=dpo", "sigmoid"),
        ("data.sources.0.path.x=1", "not a section"),
        ("optim", "KEY=VALUE"),
        ("optim.lr.x=1", "not a section"),
        ("data.sources.3.path=x", "no such entry"),
    ],
)
def test_wrong_values_are_refused_by_name(cpt_tree, tmp_path, override, message):
    import yaml

    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(cpt_tree))
    with pytest.raises(InputError, match=message):
        load_config("cpt", path, [override])


def test_overrides_reach_lists_and_yaml_floats_without_a_dot(cpt_tree, tmp_path):
    import yaml

    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(cpt_tree))
    config = load_config("cpt", path, ["optim.lr=1e-5", "data.sources.0.name=medical", "optim.batch_tokens=4e2"])
    assert config.optim.lr == 1e-5
    assert config.data.sources[0].name == "medical"
    assert config.optim.batch_tokens == 400


def test_broken_yaml_names_file_and_row(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("optim:\n  lr: [1\nrun: x\n")
    with pytest.raises(InputError, match=r"config\.yaml: row 3.*not valid YAML"):
        load_config("cpt", path)


def test_settings_the_stage_does_not_read_are_told(cpt_tree):
    cpt_tree["rpo"] = {"beta": 0.3}
    cpt_tree["optim"]["decay_steps"] = 3
    assert config_from_dict("cpt", cpt_tree).unused() == ["optim.decay_steps", "rpo.beta"]


def test_a_run_may_be_continued_with_other_micro_batches_but_not_another_rate(cpt_tree):
    before = learned_settings(config_from_dict("cpt", cpt_tree).settings())
    cpt_tree["optim"]["micro_batch_tokens"] = 64
    cpt_tree["checkpoint"] = {"every": 3}
    assert learned_settings(config_from_dict("cpt", cpt_tree).settings()) == before
    cpt_tree["optim"]["lr"] = 2e-2
    assert learned_settings(config_from_dict("cpt", cpt_tree).settings()) != before


def test_the_name_that_other_trainers_use_is_led_to_ours(cpt_tree):
    cpt_tree["optim"]["learning_rate"] = 1.0
    with pytest.raises(InputError, match=r"'optim\.lr'"):
        config_from_dict("cpt", cpt_tree)


@pytest.mark.parametrize("name", ["rpo.beta", "rpo.alpha", "optim.lr", "optim.weight_decay"])
def test_numbers_are_finite(name, tmp_path):
    for value in (".inf", "1e400", ".nan"):
        with pytest.raises(InputError, match=rf"field '{name}': not a finite number"):
            load_config("rpo", None, [f"{name}={value}"])


def test_a_key_that_occurs_twice_is_refused_with_its_line(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("rpo: {beta: 0.1}\noptim: {lr: 1e-5}\nrpo: {beta: 0.9}\n")
    with pytest.raises(InputError, match=r"twice\.yaml: row 3: not valid YAML \(found the key rpo a second time"):
        load_config("rpo", path)


def test_yaml_that_only_looks_as_if_a_key_occurred_twice_is_read(tmp_path):
    path = tmp_path / "merged.yaml"
    path.write_text("optim: &base {lr: 1.0e-5, steps: 3}\nrpo: {beta: 0.2}\n")
    assert load_config("rpo", path, ["data.pairs=[{path: x}]", "model.path=x", "run.out=x"]).rpo.beta == 0.2
    path.write_text("a: &a {lr: 1}\nb: &b {<<: *a, lr: 2}\nc: {<<: *b, lr: 3}\n")
    assert read_tree(path, ())["c"] == {"lr": 3}
    path.write_text("run: {out: {{name}}}\n")
    with pytest.raises(InputError, match=r"merged\.yaml: row 1: not valid YAML"):
        load_config("rpo", path)
    with pytest.raises(InputError, match="not valid YAML"):
        load_config("rpo", None, ["optim={lr: 1, lr: 2}"])


def test_an_unknown_key_of_a_list_entry_is_told_its_neighbours():
    with pytest.raises(InputError, match=r"data\.pairs\.0\.qqq.*one of path, "):
        load_config("rpo", None, ["data.pairs=[{path: x, qqq: 1}]"])
