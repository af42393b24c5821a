"""Recipe files: what is read, what is refused and how it is named, what is written."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from streamconv.cli import recipe, recipe_option
from streamconv.cli.conversion import convert, plan
from streamconv.errors import OutputError, UsageError
from streamconv.targets.trtllm.options import TensorRTLLM

KINDS = recipe_option.kinds(convert, plan)


def _file(folder: Path, text: str, name: str = "recipe.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_every_option_has_a_key() -> None:
    """A manifest and a written recipe hold all of them."""
    assert {field.name for field in dataclasses.fields(TensorRTLLM)} <= set(KINDS)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.toml", 'tp-size = 2\nquant = "int8"\nforce = true\nsmoothquant = 1\nworkers = 2'),
        ("a.yaml", "tp_size: 2\nquant: int8\nforce: true\nsmoothquant: 1\nworkers: 2\nkv-cache: null\n"),
        ("a.yml", "tp-size: 2\nquant: 'int8'\nforce: yes\nsmoothquant: 1\nworkers: 2\n"),
    ],
)
def test_reading(tmp_path: Path, name: str, text: str) -> None:
    values = recipe.read(_file(tmp_path, text, name), KINDS).values
    assert values == {"tp_size": 2, "quant": "int8", "force": True, "smoothquant": 1, "workers": 2}


BAD = {
    "unknown key": ("tp-sise = 2", "unknown key 'tp-sise'", "did you mean 'tp-size'?"),
    "unknown key, nothing near": ("zzzzzz = 2", "unknown key 'zzzzzz'", "long flags"),
    "text for a number": ('tp-size = "2"', "tp-size is '2', not a whole number", ""),
    "true for a number": ("tp_size = true", "tp_size is True, not a whole number", ""),
    "a fraction for a whole number": ("tp-size = 2.0", "tp-size is 2.0, not a whole number", ""),
    "number for a switch": ("force = 1", "force is 1, not true or false", ""),
    "number for a text": ("target-version = 1.2", "target-version is 1.2, not a text in quotes", ""),
    "no such choice": ('dtype = "fp8"', "dtype is 'fp8', not one of auto, float16, bfloat16, float32", ""),
    "a list": ("quant = ['int8']", "quant is ['int8'], not a text in quotes", ""),
    "a table": ("[quant]\nx = 1", "quant is {'x': 1}", ""),
    "both spellings": ("tp-size = 2\ntp_size = 2", "is there twice", ""),
    "no TOML": ("tp-size: 2", "recipe.toml", ""),
}


@pytest.mark.parametrize(("text", "message", "hint"), BAD.values(), ids=BAD)
def test_what_is_refused(tmp_path: Path, text: str, message: str, hint: str) -> None:
    path = _file(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        recipe.read(path, KINDS)
    assert str(path) in caught.value.message and message in caught.value.message
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", "a: [1"),
        ("a.yaml", "- tp-size"),
        ("a.yaml", "!!python/object/apply:os.system ['true']"),
        ("a.ini", "tp-size = 2"),
        ("a.json", "{}"),
        ("a.json", "["),
    ],
)
def test_files_that_are_no_recipes(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(UsageError, match="a\\."):
        recipe.read(_file(tmp_path, text, name), KINDS)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.toml: No such file"):
        recipe.read(tmp_path / "absent.toml", KINDS)
    (tmp_path / "latin.toml").write_bytes(b'quant = "\xe9"')
    with pytest.raises(UsageError, match=r"latin\.toml"):
        recipe.read(tmp_path / "latin.toml", KINDS)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    options = TensorRTLLM(tp_size=2, quant="int4", target_sm=90, activation_ranges='odd "name"\n\x7f\té\\.safetensors', rope_tables=True)
    path = tmp_path / "r.toml"
    recipe.write(path, recipe.render("a model", [("out", options)], {"memory_budget": "1GiB", "device_memory_budget": None}))
    values = recipe.read(path, KINDS).values
    given = {"to": "trtllm", "model": "a model", "out": "out", "memory_budget": "1GiB"}
    assert {name: values.pop(name) for name in given} == given
    assert TensorRTLLM(**values) == options
    assert path.read_text().startswith("# ")
    with pytest.raises(OutputError, match="exists already"):
        recipe.write(path, "")


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    text = recipe.render("model\udcff", [("", TensorRTLLM())], {})
    with pytest.raises(OutputError, match=r"r\.toml"):
        recipe.write(tmp_path / "r.toml", text)
    with pytest.raises(OutputError, match="cannot be written"):
        recipe.write(tmp_path / "no" / "r.toml", "")
    assert not list(tmp_path.iterdir())


_NAMES = some.text(some.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)


@settings(deadline=None)
@given(model=_NAMES, out=_NAMES, path=_NAMES, alpha=some.floats(0, 1), tp=some.integers(1, 1 << 40), on=some.booleans())
def test_any_value_survives(model: str, out: str, path: str, alpha: float, tp: int, on: bool) -> None:
    options = TensorRTLLM(tp_size=tp, smoothquant=alpha, activation_ranges=path, per_token=on)
    text = recipe.render(model, [(out, options)], {"memory_budget": path})
    values = recipe.tomllib.loads(text)
    assert (values.pop("to"), values.pop("model"), values.pop("out"), values.pop("memory-budget")) == ("trtllm", model, out, path)
    assert TensorRTLLM(**{key.replace("-", "_"): value for key, value in values.items()}) == options
