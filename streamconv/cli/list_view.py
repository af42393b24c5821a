"""`streamconv list`: the registries as tables, for a terminal or for a README."""

from __future__ import annotations

from streamconv.cli.view import table

Rows = list[tuple[str, ...]]

_EVIDENCE = {"golden": "golden", "specification": "from the specification"}


def families() -> tuple[tuple[str, ...], Rows]:
    """(header, rows) of the model families."""
    from streamconv.families import all_families

    rows: Rows = [
        (
            family.name,
            ", ".join(family.architectures) or "params.json (Meta)",
            family.handles,
            ", ".join(family.versions),
            _EVIDENCE[family.evidence],
        )
        for family in all_families()
    ]
    return ("family", "architectures", "handled", "TensorRT-LLM", "evidence"), rows


def quants() -> tuple[tuple[str, ...], Rows]:
    """(header, rows) of the weight formats."""
    from streamconv.quants import all_quants

    rows: Rows = []
    for quant in all_quants().values():
        info = quant.info
        gpus = f"SM {info.least_sm} and later" if info.least_sm else "laid out for --target-sm" if info.sm_dependent else "any"
        rows.append(
            (
                info.key,
                info.algo or "-",
                info.summary,
                info.stores,
                " ".join(info.flags),
                gpus,
                ", ".join(info.versions),
                _EVIDENCE[info.evidence],
            )
        )
    return ("quant", "quant_algo", "what it is", "stored as", "flags", "GPU", "TensorRT-LLM", "evidence"), rows


def show(what: str, markdown: bool) -> str:
    """A table as text.

    Args:
        what: "families" or "quants".
        markdown: for a README.
    """
    header, rows = families() if what == "families" else quants()
    if not markdown:
        return "\n".join(table(rows, header))
    code = {"family", "architectures", "quant", "quant_algo", "flags"}
    lines = [header, tuple("---" for _ in header)]
    for row in rows:
        named = zip(header, row, strict=True)
        lines.append(tuple(_code(cell) if name in code and _plain(cell) else cell for name, cell in named))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _code(cell: str) -> str:
    return " ".join(f"`{word}`" for word in cell.split())


def _plain(cell: str) -> bool:
    """Names alone, no sentence and no list."""
    return bool(cell) and cell != "-" and "," not in cell and "(" not in cell
