"""`streamconv list`: the registries as tables, for a terminal or for a README."""

from __future__ import annotations

import dataclasses
import itertools

import click

from streamconv.cli import output
from streamconv.cli.view import table
from streamconv.targets import TARGETS, target_class
from streamconv.targets.base import choices_of, flag

Rows = list[tuple[str, ...]]

_VALUES = {bool: "switch", int: "whole number", float: "number", str: "text", tuple: "list of names"}
_EVIDENCE = {"golden": "golden", "specification": "from the specification"}


def families() -> tuple[tuple[str, ...], Rows]:
    """(header, rows) of the model families."""
    from streamconv.families import all_families

    rows: Rows = []
    for family in all_families():
        what = (family.name, ", ".join(family.architectures) or "params.json (Meta)", family.handles)
        rows.append((*what, ", ".join(family.versions), _EVIDENCE[family.evidence]))
    return ("family", "architectures", "handled", "TensorRT-LLM", "evidence"), rows


def quants() -> tuple[tuple[str, ...], Rows]:
    """(header, rows) of the weight formats."""
    from streamconv.targets.trtllm.recipes import all_quants

    rows: Rows = []
    for info in (quant.info for quant in all_quants().values()):
        gpus = f"SM {info.least_sm} and later" if info.least_sm else "laid out for --target-sm" if info.sm_dependent else "any"
        what = (info.key, info.algo or "-", info.summary, info.stores)
        rows.append((*what, " ".join(info.flags), gpus, ", ".join(info.versions), _EVIDENCE[info.evidence]))
    return ("quant", "quant_algo", "what it is", "stored as", "flags", "GPU", "TensorRT-LLM", "evidence"), rows


def formats() -> tuple[tuple[str, ...], Rows]:
    """(header, rows) of the weight formats of a Hugging Face directory."""
    from streamconv.targets.hf.recipes import RECIPES

    rows: Rows = []
    for row in RECIPES:
        said = row.algo or row.form or f"quant_method {row.stated['quant_method']}"
        rows.append((row.quant, row.container, said, "calibrated" if row.input_scale else "-", row.summary))
    return ("--quant", "--format", "in config.json", "activation ranges", "what it is"), rows


def targets() -> tuple[tuple[str, ...], Rows]:
    """(header, rows) of the options of each target, from its fields."""
    rows: Rows = []
    for key in TARGETS:
        for field in dataclasses.fields(target_class(key)):
            facts, default, choices = field.metadata, field.default, choices_of(field)
            values = ", ".join(map(str, choices)) if choices else "bytes" if facts["size"] else _VALUES[facts["type"]]
            rows.append((key, flag(field.name), values, "-" if default in (None, ()) or default is False else str(default), facts["help"]))
    return ("target", "option", "values", "default", "what it is"), rows


def _targets_in_short() -> tuple[tuple[str, ...], Rows]:
    """(header, rows) of the targets with the names of their options."""
    options = {key: " ".join(flag(field.name) for field in dataclasses.fields(target_class(key))) for key in TARGETS}
    return ("--to", "what it writes", "flags"), [(key, target_class(key).summary, options[key]) for key in TARGETS]


def _formats_in_short() -> tuple[tuple[str, ...], Rows]:
    """(header, rows) of the formats of a Hugging Face directory, one for each --quant."""
    header, all_rows = formats()
    rows: Rows = []
    for quant, same in itertools.groupby(all_rows, key=lambda row: row[0]):
        containers = [*same]
        _, _, _, ranges, summary = containers[0]
        rows.append((quant, ", ".join(f"`{container}` ({said})" for _, container, said, _, _ in containers), ranges, summary))
    return ("--quant", "--format (in config.json)", *header[3:]), rows


LISTS = {"families": families, "quants": quants, "formats": formats, "targets": targets}
_IN_SHORT = {"formats": _formats_in_short, "targets": _targets_in_short}


@click.command("list")
@click.argument("what", type=click.Choice([*LISTS]))
@click.option("--markdown", is_flag=True, help="As a Markdown table; of formats and targets in short.")
def list_(what: str, markdown: bool) -> int:
    """Print the model families, the weight formats, or the targets and their options."""
    header, rows = (_IN_SHORT if markdown else LISTS).get(what, LISTS[what])()
    if not markdown:
        if what == "targets":
            output.block([*table([(f"--to {key}", target_class(key).summary) for key in TARGETS]), ""])
        output.block(table(rows, header))
        return 0
    code = {"--quant", "family", "architectures", "quant", "quant_algo", "flags", "--to"}
    lines = [header, tuple("---" for _ in header)]
    for row in rows:
        named = zip(header, row, strict=True)
        lines.append(tuple(_code(cell) if name in code else cell for name, cell in named))
    output.block(f"| {' | '.join(cells)} |" for cells in lines)
    return 0


def _code(cell: str) -> str:
    """Names as code; a sentence and a list as they are."""
    return cell if cell == "-" or "," in cell or "(" in cell else " ".join(f"`{word}`" for word in cell.split())
