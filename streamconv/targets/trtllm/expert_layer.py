"""The mixture of experts of a layer in rank files: whole experts for moe_ep, rows and columns of each for moe_tp."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamconv.checkpoint.dtypes import F32
from streamconv.quants.plain import Plain
from streamconv.targets.trtllm.parallel import Rank, even

if TYPE_CHECKING:
    from streamconv.targets.trtllm.rank_layout import RankLayout


def describe_experts(layout: RankLayout, ranks: list[Rank], layer: int, prefix: str) -> None:
    """Experts of a rank, ascending; in each, this rank's up rows over its gate rows."""
    model, roles, builder, hidden = layout.model, layout.roles, layout.builder, layout.model.hidden_size
    total, width = model.num_experts, model.moe_intermediate_size or model.intermediate_size
    local, cut = total // layout.mapping.moe_ep_size, width // layout.mapping.moe_tp_size
    router = roles.require("router", (total, hidden), layer)
    tp = layout.mapping.moe_tp_size
    fc_enc, fc_note = layout.codec("mlp.fc", layer, 2 * cut, hidden, 2 * width, None, local, tp)
    proj_enc, proj_note = layout.codec("mlp.proj", layer, hidden, cut, hidden, width, local, tp)
    fcs, projs = [], []
    for rank in ranks:
        matrix = builder.matrix(rank.file, prefix + "mlp.router", total, hidden, Plain(F32))
        builder.feed(matrix, router, 0, total)
        name = prefix + "mlp."
        fcs.append(builder.matrix(rank.file, name + "fc", 2 * cut, hidden, fc_enc, experts=local, note=fc_note))
        projs.append(builder.matrix(rank.file, name + "proj", hidden, cut, proj_enc, experts=local, note=proj_note))
    stacked = roles.has("experts_gate_up", layer)
    if stacked:
        gate_up = roles.require("experts_gate_up", (total, 2 * width, hidden), layer)
        down_all = roles.require("experts_down", (total, hidden, width), layer)
    for expert in range(total):
        if stacked:
            base = expert * 2 * width
            up_gate = ((gate_up, base + width), (gate_up, base))
            down, down_base = down_all, expert * hidden
        else:
            up_gate = (
                (roles.require("expert_up", (width, hidden), layer, expert), 0),
                (roles.require("expert_gate", (width, hidden), layer, expert), 0),
            )
            down, down_base = roles.require("expert_down", (hidden, width), layer, expert), 0
        here = [(r, f, p) for r, f, p in zip(ranks, fcs, projs, strict=True) if expert // local == r.moe_ep]
        for source, row in up_gate:
            for rank, fc, _ in here:
                start, stop = even(width, tp, rank.moe_tp)
                builder.feed(fc, source, row + start, row + stop)
        for rank, _, proj in here:
            builder.feed(proj, down, down_base, down_base + hidden, cols=[even(width, tp, rank.moe_tp)])
