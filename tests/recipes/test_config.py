"""Every value is checked, from YAML, JSON and the command line alike; files stay small and whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pointcmt.cli import main
from pointcmt.recipes.config import override, plain, read_json, read_yaml, restore, structure
from pointcmt.recipes.evaluate import Evaluate
from pointcmt.recipes.options import DataOptions
from pointcmt.recipes.train import MethodOptions, Train
from pointcmt.recipes.train_teacher import TrainTeacher

WRONG = [
    (
        {"loop": {"optimizer": "AdamW"}},
        r"train\.loop\.optimizer is 'AdamW'; expected one of adam, adamw, sgd",
    ),
    ({"loop": {"schedule": "cosinus"}}, r"loop\.schedule is 'cosinus'; expected one of cosine, constant"),
    ({"loop": {"lr": None}}, r"loop\.lr is None; expected a number"),
    ({"loop": {"lr": "fast"}}, r"loop\.lr is 'fast'; expected a number"),
    ({"loop": {"lr": float("nan")}}, r"loop\.lr is nan; expected a finite number"),
    ({"loop": {"epochs": 2.5}}, r"loop\.epochs is 2\.5; expected a whole number"),
    ({"loop": {"epochs": True}}, r"loop\.epochs is True; expected a whole number"),
    ({"loop": 3}, r"train\.loop is 3; expected a mapping of options"),
    ({"loop": {"lrr": 3}}, r"train\.loop: there is no option 'lrr'; expected one of epochs, "),
    ({"data": {"num_points": {"a": 1}}}, r"data\.num_points is \{'a': 1\}; expected a whole number"),
    ({"data": {"data": 3}}, r"data\.data is 3; expected text"),
    (
        {"method": {"guard": "heldotu"}},
        r"method\.guard is 'heldotu'; expected one of auto, schedule, heldout",
    ),
    ({"method": {"decay": "linaer"}}, r"method\.decay is 'linaer'; expected one of constant, linear, cosine"),
    ({"method": {"fe_distance": "emdd"}}, r"method\.fe_distance is 'emdd'; expected one of emd, chamfer"),
    ({"method": {"objectives": "nst=1"}}, r"method\.objectives is 'nst=1'; expected a list"),
    ({"method": {"objectives": [1]}}, r"method\.objectives is 1; expected text"),
    ({"teacher": 5}, r"train\.teacher is 5; expected a path"),
    ({"resume": "no"}, r"train\.resume is 'no'; expected true or false"),
    ([1], r"train is \[1\]; expected a mapping of options"),
]


@pytest.mark.parametrize(("values", "words"), WRONG, ids=[words[:30] for _, words in WRONG])
def test_a_wrong_value_is_named(values, words):
    with pytest.raises(ValueError, match=words):
        override(Train(Path("r")), values, "train")
    if isinstance(values, dict):  # as JSON too
        with pytest.raises(ValueError, match=words.replace("train", "config")):
            restore(Train(Path("r")), json.loads(json.dumps(values)), "config")


def test_all_mistakes_are_told_at_once_and_right_values_are_taken():
    with pytest.raises(ValueError) as error:
        override(Train(Path("r")), {"loop": {"lr": None, "epochs": "x"}, "images": 1}, "t")
    assert str(error.value).count("\n") == 2
    made = override(
        Train(Path("r")),
        {"loop": {"lr": "1e-3", "epochs": 7}, "teacher": "a/b", "student": {"student_options": ["k=3"]},
         "data": {"per_class": None}},
        "t",
    )  # fmt: skip
    assert made.loop.lr == 1e-3 and made.loop.epochs == 7 and made.loop.batch_size == 32
    assert made.teacher == Path("a/b") and made.student.student_options == ("k=3",)
    assert structure(plain(made), Train, "again") == made
    for options in (Evaluate(Path("r")), TrainTeacher(Path("r")), DataOptions(), MethodOptions()):
        assert structure(plain(options), type(options), "again") == options


def test_options_that_another_version_wrote_are_left_out():
    assert restore(DataOptions(), {"num_points": 5, "colour": "red"}, "config").num_points == 5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: 'a' stands twice"),
        ("x: {FE: 1, CE: 2, FE: 3}", "line 1: 'FE' stands twice"),
        ("- 1\n", "expected a mapping of sections"),
        ("a: [", "is not YAML"),
        ("[" * 5000, "is not YAML"),
        ("a: !!python/object/apply:os.system ['true']", "is not YAML"),
        (
            "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
            + "".join(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]\n" for k in range(1, 10)),
            "more than 20000 values",
        ),
        ("a: &a {b: *a}", "more than 20000 values"),
        (
            "m0: &m0 {k: v}\n"
            + "".join(f"m{k}: &m{k}\n  <<: [{', '.join([f'*m{k - 1}'] * 10)}]\n" for k in range(1, 9)),
            "more than 20000 values",
        ),
    ],
)  # fmt: skip
def test_a_yaml_file_is_small_and_says_each_thing_once(text, words, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        read_yaml(tmp_path / "c.yaml")
    assert "c.yaml" in str(error.value)


@pytest.mark.parametrize("text", ["{", "[1]", "\xff", "[" * 100_000])
def test_damaged_json_names_its_file(text, tmp_path):
    (tmp_path / "c.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"c\.json"):
        read_json(tmp_path / "c.json")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lr", "nan"], "loop.lr is nan; expected a finite number"),
        (["--fe-weight", "inf", "--teacher", "t"], "method.fe_weight is inf"),
        (["--optimizer", "AdamW"], "AdamW"),
        (["--seed", "-1", "--method", "none"], "--seed is -1"),
        (["--weight-decay", "-1", "--method", "none"], "--weight-decay is -1"),
        (["--label-smoothing", "1.5", "--method", "none"], "--label-smoothing is 1.5"),
        (["--augment-scale", "0.5", "--method", "none"], "--augment-scale is 0.5"),
        (
            ["--student-options", "width=1", "width=2", "--method", "none"],
            "--student-options names width twice",
        ),
    ],
)
def test_the_command_line_is_checked_alike(words, said, tmp_path, capsys):
    assert main(["train", "--out", str(tmp_path / "r"), *words]) in (1, 2)
    assert said in capsys.readouterr().err and not (tmp_path / "r").exists()
