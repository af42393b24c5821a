"""`streamconv list`: complete, true to the golden cases, and the same as in the README."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from streamconv.cli import list_view, official_flags
from streamconv.cli.main import cli, main
from streamconv.families import all_families
from streamconv.targets import TARGETS
from streamconv.targets.trtllm.recipes import all_quants
from tests.golden import cases

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"


@pytest.mark.parametrize("what", list_view.LISTS)
def test_the_readme_says_what_the_program_says(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", what, "--markdown"]) == 0
    printed = capsys.readouterr().out.strip()
    found = re.search(rf"<!-- {what} -->\n(.*?)\n<!-- /{what} -->", README.read_text(), re.DOTALL)
    assert found, f"README.md lacks <!-- {what} --> ... <!-- /{what} -->"
    assert found[1].strip() == printed, f"put the output of `streamconv list {what} --markdown` into README.md"


def test_every_promise_names_tests_that_exist() -> None:
    text = README.read_text()
    told, whole = text[text.index("## Promises") : text.index("## Limits")], (ROOT / "tests" / "README.md").read_text()
    heads = ("| ---", "| promise |", "| given |")
    rows = [line for line in f"{told}\n{whole}".splitlines() if line.startswith("| ") and not line.startswith(heads)]
    assert len(rows) - told.count("\n| ") + 2 == int(re.findall(r"whole list\]\(tests/README.md\) has (\d+)", told)[0]) > 20
    for row in rows:
        named = re.findall(r"`([\w/]+(?:\.py)?)(?:::(\w+))?`", row.rpartition(" | ")[2])
        assert named, row
        for path, function in named:
            file = ROOT / "tests" / path
            assert file.exists(), f"{path}: {row}"
            assert not function or f"def {function}(" in file.read_text(), f"{function}: {row}"


def test_every_command_of_the_readme_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").touch()
    commands = re.findall(r"`streamconv ([^`]+)`", README.read_text())
    assert len(commands) > 20
    for command in commands:
        verb, *words = shlex.split(command.replace("OUT/streamconv.json", "recipe.toml"))  # a recipe is read while flags are parsed
        if verb != "COMMAND":  # --help
            found = cli.get_command(click.Context(cli), verb)
            assert found, command
            found.make_context(verb, words, obj=words)
    (official,) = re.findall(r"`streamconv-convert-checkpoint ([^`]+)`", README.read_text())
    official_flags.parse(shlex.split(official))


def test_every_link_of_the_readme_leads_somewhere() -> None:
    links = re.findall(r"\]\((?!https:)([^)#]+)(?:#([^)]+))?\)", README.read_text())
    assert len(links) > 3
    for path, heading in links:
        headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(), re.MULTILINE) if heading else []
        assert (ROOT / path).exists() and (not heading or heading in [name.lower().replace(" ", "-") for name in headings]), path


@pytest.mark.parametrize("what", list_view.LISTS)
def test_every_cell_is_filled(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    header, rows = list_view.LISTS[what]()
    assert all(len(row) == len(header) and all(row) for row in rows)
    assert main(["list", what]) == 0
    printed = capsys.readouterr().out
    assert all(row[0] in printed for row in rows)
    above = len(TARGETS) + 1 if what == "targets" else 0  # what each target is
    assert len(printed.splitlines()) == above + len(rows) + 2


def test_golden_families_are_those_with_golden_cases() -> None:
    proven = set()
    for case in cases.every():
        if case.model is None:
            continue
        architecture = str(case.config["architecture"])
        meta = case.model.startswith("inputs/meta")
        proven |= {"llama-meta"} if meta else {f.name for f in all_families() if architecture in f.architectures}
    assert {family.name for family in all_families() if family.evidence == "golden"} == proven


def test_golden_formats_are_those_with_golden_cases() -> None:
    proven = {str(case.config["quantization"]["quant_algo"]) for case in cases.every() if case.model}
    smooth = {algo for algo in proven if "_SQ_" in algo}
    assert len(smooth) == 4  # one --quant, four names
    for quant in all_quants().values():
        info = quant.info
        golden = str(info.algo) in proven
        assert golden == (info.evidence == "golden"), info.key
