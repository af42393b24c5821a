"""`--output` and [[output]]: what the command line and recipes say of several outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from streamconv import api
from streamconv.cli.main import main
from streamconv.targets.hf.target import HuggingFace
from streamconv.targets.trtllm.options import TensorRTLLM
from tests import tiny

ONE, TWO = "trtllm:{}/one:tp_size=2,quant=int8,target_sm=90", "hf:{}/two:quant=w4a16,ignore=*.down_proj+*.o_proj,allow_nonfinite"
TARGETS = {
    "one": TensorRTLLM(tp_size=2, quant="int8", target_sm=90),
    "two": HuggingFace(quant="w4a16", ignore=("*.down_proj", "*.o_proj"), allow_nonfinite=True),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("flag") / "model")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check(model: Path, place: Path) -> None:
    for name, target in TARGETS.items():
        api.convert(model, place / f"{name} alone", target)
        assert files(place / name) == files(place / f"{name} alone"), name


def outputs(place: Path) -> list[str]:
    return ["--output", ONE.format(place), "--output", TWO.format(place)]


def test_two_outputs(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(model), *outputs(tmp_path), "--json", "--workers", "2"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [each["out"] for each in told["outputs"]] == [f"{tmp_path}/one", f"{tmp_path}/two"]
    check(model, tmp_path)
    assert main(["convert", str(model), *outputs(tmp_path)]) == 0
    assert "one: finished by an earlier run, skipped" in capsys.readouterr().out


def test_plan_shows_them_side_by_side(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(model), *outputs(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [each["target"] for each in told["outputs"]] == ["trtllm", "hf"]
    assert [each["bytes_to_read"] for each in told["outputs"]] == [told["bytes_to_read"]] * 2
    assert told["bytes_to_read_apart"] == 2 * told["bytes_to_read"]
    assert told["bytes_to_write"] == sum(each["bytes_to_write"] for each in told["outputs"])
    assert main(["convert", str(model), *outputs(tmp_path)[:2], "--quiet"]) == 0
    capsys.readouterr()
    assert main(["plan", str(model), *outputs(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("2 outputs from one read", "finished, to be skipped", "layout of sm90", "named by --ignore"))


def test_plan_foretells_the_search_of_each(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the plans of one output do, from flags and from a recipe, with a text and without."""
    two = {"a": ("hf", "w4a16", 32, "awq"), "b": ("trtllm", "int4_awq", 64, "clip")}
    several, alone = list[str](), {}
    for name, (to, quant, group, method) in two.items():
        several += ["--output", f"{to}:{tmp_path}/{name}:quant={quant},group_size={group},method={method}"]
        flags = ["--to", to, "--quant", quant, "--group-size", str(group), "--method", method]
        assert main(["plan", str(model), *flags, "--device", "cpu", "--json"]) == 0
        alone[name] = json.loads(capsys.readouterr().out)
    recipe, several = tmp_path / "recipe.toml", [*several, "--output", f"hf:{tmp_path}/c", "--device", "cpu"]
    assert main(["plan", str(model), *several, "--write-config", str(recipe)]) == 0
    shown = capsys.readouterr().out
    assert all(f"{tmp_path}/{name} waits for its codes\nsearch   --method {method[3]}" in shown for name, method in two.items())
    assert f"3 x full of {tiny.HIDDEN} channels" in shown and f"3 x block of {tiny.HIDDEN} channels" in shown
    assert f"a needs codes=FILE: converted alone, with --text, it leaves them in {tmp_path}/a.int4.safetensors" in shown
    for command in ([str(model), *several], ["--config", str(recipe)]):
        assert main(["plan", *command, "--json"]) == 0
        *each, plain = json.loads(capsys.readouterr().out)["outputs"]
        assert "search" not in plain and plain["output_problem"] is None
        for told, name in zip(each, two, strict=True):
            same = {"method", "grams", "passes", "codes", "states", "tokens", "layers", "operations"}
            assert {key: told["search"][key] for key in same} == {key: alone[name]["search"][key] for key in same}
            assert told["options"] == alone[name]["options"] and told["search"]["host"] > 1 << 28
    assert main(["plan", str(model), *several, "--text", "any.txt", "--samples", "4", "--json"]) == 0
    assert [told["search"]["tokens"] for told in json.loads(capsys.readouterr().out)["outputs"][:2]] == [4 * 512] * 2
    assert main(["plan", str(model), "--output", f"hf:{tmp_path}/c", "--text", "any.txt"]) == 2
    assert "no output has INT4 codes to search" in capsys.readouterr().err


def test_a_recipe(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.toml"
    assert main(["plan", str(model), *outputs(tmp_path), "--workers", "2", "--write-config", str(recipe)]) == 0
    assert main(["convert", "--config", str(recipe), "--quiet"]) == 0
    check(model, tmp_path)
    recipe.write_text(f'model = "{model}"\n[[output]]\nout = "{tmp_path}/x"\ntp-size = 2\n[[output]]\nto = "hf"\nout = "{tmp_path}/y"\n')
    capsys.readouterr()
    assert main(["convert", "--config", str(recipe), "--json"]) == 0
    assert [each["files"] for each in json.loads(capsys.readouterr().out)["outputs"]] == [2, 1]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--output", "hf"], "no folder is named"),
        (["--output", "hf::quant=fp8_dynamic"], "no folder is named"),
        (["--output", "x:a"], "unknown target 'x'"),
        (["--output", "hf:a:tp_size=2"], "it is an option of trtllm"),
        (["--output", "trtllm:a:tp-sise=2"], "did you mean tp_size?"),
        (["--output", "trtllm:a:tp_size=two"], "tp_size is 'two', not a whole number"),
        (["--output", "trtllm:a:tp_size=2,tp-size=4"], "tp_size is there twice"),
        (["--output", "trtllm:a:rope_tables=maybe"], "not true or false"),
        (["--output", "hf:a:quant=w2a16"], "--quant w2a16 is not known"),
        (["--output", "hf:a", "--quant", "int8"], "--quant: not beside --output"),
        (["--output", "hf:a", "--to", "hf"], "--to: not beside --output"),
        (["--output", "hf:a", "--text", "x.txt"], "--text: for one output"),
        (["out", "--output", "hf:a"], "exclude each other"),
        (["--output", "trtllm:a:quant=int8,group_size=64"], "--group-size has no effect"),
        (["--output", "hf:a", "--output", "hf:./a"], "two outputs are to be written to"),
        (["--output", "hf:a", "--output", "trtllm:a/b"], "is in output"),
        ([], "Missing argument 'OUT'"),
    ],
)
def test_what_is_refused(
    given: list[str], told: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["convert", str(model), *given]) in (2, 6)
    assert told in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ('[[output]]\nto = "hf"', "[[output]] 1: no folder is named"),
        ('output = ["hf:a"]\nquant = "int8"', "--quant: not beside --output"),
        ("output = [3]", "it is no table"),
        ('output = "hf:a"', "output is 'hf:a', not a table for each output"),
        ('[[output]]\nout = "a"\ntp-size = "2"', "tp_size is '2', not a whole number"),
        ('[[output]]\nout = "a"\nto = "hf"\nignore = [1]', "ignore is [1], not a list of texts"),
        ('[[output]]\nout = "a"\nto = 3', "unknown target '3'"),
        ('[output]\nout = "a"', "not a table for each output"),
    ],
)
def test_recipes_that_are_refused(
    lines: str, told: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.toml").write_text(lines)
    assert main(["convert", str(model), "--config", "r.toml"]) == 2
    assert told in capsys.readouterr().err and [path.name for path in tmp_path.iterdir()] == ["r.toml"]


def test_folders_may_hold_colons(model: Path, tmp_path: Path) -> None:
    assert main(["convert", str(model), "--output", f"hf:{tmp_path}/a:b", "--output", f"hf:{tmp_path}/c:d=e:", "--quiet"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a:b", "c:d=e"]
