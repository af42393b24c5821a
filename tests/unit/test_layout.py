"""Mixed-GEMM layouts and weight-only definitions against the vectors and formulas of the quantization spec."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from streamconv.checkpoint.dtypes import BF16, F16, F32, I8, DType
from streamconv.errors import RefusedError
from streamconv.options import Version
from streamconv.quants.base import EncodeStats
from streamconv.quants.layout import FAMILIES, Layout, family_for
from streamconv.quants.weight_only import WeightOnly
from streamconv.targets.trtllm.recipes.per_channel import size_problem

# (family, bits, fp8 activations, K, SHA-256 of the whole string, first bytes); N is 64
VECTORS = [
    ("sm80", 8, False, 128, "fdbb019bc81a8984d8ed6410674552abf158bb2a1dccb26a208e6d0e67ba274f", "0038073f0e46154d1c54235b2a623169"),
    ("sm70", 8, False, 128, "bedd7f83c43fc3f0f3a6307daf45e439686b304114d896acf18c537d021da2fa", "000e07151c2a233138463f4d54625b69"),
    ("sm90-0.16", 8, False, 128, "be6a80efc156bd9d6a4063759e060bb1f3448bdd90d1b496c5981228dc5f4b9c", "80878e959ca3aab1b8bfc6cdd4dbe2e9"),
    ("sm90", 8, False, 128, "d239cfd37c5c29a68055195d4bd763a17f15bb1387f6f9aa3470b4281a4573f5", "0038073f0e46154d1c54235b2a623169"),
    ("sm80", 4, False, 128, "966814251e1fd5052b089a0e58c56ae5a697f37f744dcbe7de6f79ee56e84050", "8080f7f76e6ed5d54c4cb3b32a2a9191"),
    ("sm70", 4, False, 128, "ef567644a4c27a876be66354fd333d8b835eca7e98a62346f158173510b8f120", "e0ac57136824df9be0ac57136824df9b"),
    ("sm90-0.16", 4, False, 128, "ff1d5bb4a384ab9370d5513fde525559391882f196bef3cca42cc66944de7087", "f8d6b492705e3c1af8d6b492705e3c1a"),
    ("sm90", 4, False, 128, "8fb552cd6926faf64344505870dff2352125aedd9aaf4dfc7c9d5cb24877a91d", "8080f7f76e6ed5d54c4cb3b32a2a9191"),
    ("sm80", 4, True, 256, "faf0b3404e7748a19abd5f5b96d0bc7af3d72475cccae82119a92c366b8b1efe", "e0e05757acac13136868dfdf24249b9b"),
    ("sm90", 4, True, 256, "b14430f05c7333cdfdfa9518fe0deb27dbe243316a29e0173d6e09ea39e0ae1f", "e0e05757acac13136868dfdf24249b9b"),
]
MOE = "229a20c3b08120c546ae65801282648faf07f5900e089fdab05297fb7ad2dc9e"
UNPROCESSED = {
    8: ("c330fd3637dce16c9426ecd6456fbd21481795d13e91b2128b2ed1cea1e156a7", "808d9aa7b4c1cedb"),
    4: ("e5680084eea4d0e25f0ba61473a45c9064c56e48a67183c6a6f9c41078b5a573", "58f29c36d07a14be"),
}
# bits -> (unprocessed, family A)
SYMMETRIC = {
    8: (
        "164ba17d31fb757ced3db08a6fc46d9336d1516be8e6a89c9351c38c4ec0ff0c",
        "5280f64e463e431c3bb42f1a368d3957429bb79d07ecd17b1ba6f1a59be48861",
    ),
    4: (
        "2bb53ff2a26d976b27b767ac53ffa807334a398fb8cd1180ed3369dac9a1a035",
        "9d72775afaef587d42468775feb243726dc9ab587fa845c864e6a2d1a0e2d666",
    ),
}
# permutation p of the rows of k, and register order s
PERMUTE = {
    (8, False): [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15],
    (4, False): [0, 1, 8, 9, 16, 17, 24, 25, 2, 3, 10, 11, 18, 19, 26, 27, 4, 5, 12, 13, 20, 21, 28, 29, 6, 7, 14, 15, 22, 23, 30, 31],
    (4, True): [0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31],
}
REGISTER = {8: [0, 2, 1, 3], 4: [0, 2, 4, 6, 1, 3, 5, 7]}
KINDS = [(family, bits, fp8) for family in FAMILIES for bits, fp8 in ((8, False), (4, False), (4, True))]


def integers(k: int, n: int, bits: int, expert: int = 0) -> torch.Tensor:
    """int8 [n, k], that is output channels first."""
    at_k, at_n = torch.arange(k)[None, :], torch.arange(n)[:, None]
    wide = (7 * at_k + 13 * at_n + (at_k * at_n) % 5 + 3 * expert) % (1 << bits)
    return (wide - (1 << (bits - 1))).to(torch.int8)


def unprocessed(q: torch.Tensor, bits: int) -> bytes:
    """int8 [n, k] -> the bytes [K, N] or, two neighbouring channels to a byte, [K, N/2]."""
    wide = q.T.contiguous().to(torch.int16)
    if bits == 4:
        wide = (wide[:, 0::2] & 15) | ((wide[:, 1::2] & 15) << 4)
    return (wide & 255).to(torch.uint8).numpy().tobytes()


def gathered(q: torch.Tensor, layout: Layout) -> bytes:
    """The gather form, element by element; shares nothing with `pack` but the family's letter."""
    n_count, k_count = q.shape
    family, bits, fp8 = layout.family, layout.bits, layout.fp8_activations
    tile = 128 if fp8 else 64
    lanes = 1024 // bits // tile if family == "sm80" else 1
    permute, register = PERMUTE[bits, fp8], REGISTER[bits]
    values = []
    for m in range(n_count * k_count):
        moved = len(register) * (m // len(register)) + register[m % len(register)] if family != "sm90-0.16" else m
        g, u = divmod(moved, k_count * lanes)
        t, v = divmod(u, tile * lanes)
        j, r = divmod(v, tile)
        n, k = (lanes * g + j, tile * t + r) if lanes > 1 else divmod(moved, k_count)
        if family in ("sm80", "sm90"):
            k = len(permute) * (k // len(permute)) + permute[k % len(permute)]
        values.append((int(q[n, k]) + (1 << (bits - 1)) * (family != "sm90-0.16")) % (1 << bits))
    if bits == 8:
        return bytes(values)
    return bytes(low | (high << 4) for low, high in zip(values[0::2], values[1::2], strict=True))


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def packed(layout: Layout, q: torch.Tensor) -> bytes:
    made = layout.pack(q)
    assert made.dtype == torch.uint8 and made.dim() == 1
    return made.numpy().tobytes()


@pytest.mark.parametrize("bits", [8, 4])
def test_the_integers_of_the_vectors(bits: int) -> None:
    data = unprocessed(integers(128, 64, bits), bits)
    assert (sha(data), data[:8].hex()) == UNPROCESSED[bits]


@pytest.mark.parametrize(("family", "bits", "fp8", "k", "digest", "first"), VECTORS)
def test_vectors(family: str, bits: int, fp8: bool, k: int, digest: str, first: str) -> None:
    data = packed(Layout(family, bits, fp8), integers(k, 64, bits))
    assert data[:16].hex() == first
    assert sha(data) == digest


def test_vector_with_experts() -> None:
    layout = Layout("sm80", 4)
    assert sha(b"".join(packed(layout, integers(128, 64, 4, expert)) for expert in range(2))) == MOE


@pytest.mark.parametrize(("family", "bits", "fp8"), KINDS)
def test_pack_is_the_gather_formula(family: str, bits: int, fp8: bool) -> None:
    layout = Layout(family, bits, fp8)
    q = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (8, 256), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    assert packed(layout, q) == gathered(q, layout)


@pytest.mark.parametrize("bits", [8, 4])
def test_plain_and_volta_rows_need_not_fill_a_tile(bits: int) -> None:
    """With one channel per record the tile does not matter."""
    for family, k in (("sm70", 40), ("sm90-0.16", 40), ("sm90", 96)):
        q = integers(k, 3, bits)
        assert packed(Layout(family, bits), q) == gathered(q, Layout(family, bits))


@pytest.mark.parametrize(("family", "bits", "fp8"), KINDS)
def test_unpack_inverts_pack_and_groups_stand_alone(family: str, bits: int, fp8: bool) -> None:
    layout = Layout(family, bits, fp8)
    q = integers(256, 8, bits)
    whole = layout.pack(q)
    assert torch.equal(layout.unpack(whole, 8, 256), q)
    step = layout.interleave
    assert torch.equal(torch.cat([layout.pack(q[at : at + step]) for at in range(0, 8, step)]), whole)


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_symmetric_quantization_with_many_ties(bits: int, dtype: DType) -> None:
    at_n, at_k = torch.arange(64)[:, None], torch.arange(1024)[None, :]
    weights = (((31 * at_n + 17 * at_k) % 513 - 256) / 1024).to(getattr(torch, dtype.torch))
    stats = EncodeStats()
    made, scales = WeightOnly(bits, "sm80", dtype).encode(weights, stats)
    assert stats == EncodeStats()
    assert sha(made.numpy().tobytes()) == SYMMETRIC[bits][1]
    assert sha(unprocessed(Layout("sm80", bits).unpack(made, 64, 1024), bits)) == SYMMETRIC[bits][0]
    assert (scales.view(getattr(torch, dtype.torch)).float() == (1 / 512 if bits == 8 else 1 / 32)).all()


def test_parts_have_the_recorded_shapes() -> None:
    for bits, packed_rows in ((8, 128), (4, 64)):
        weight, scale = WeightOnly(bits, "sm80", F16).parts(128, 256)
        assert (weight.role, weight.dtype, weight.shape, weight.record_bytes) == ("weight", I8, (256, packed_rows), 256 * bits // 8)
        assert (scale.role, scale.dtype, scale.shape, scale.record_bytes) == ("per_channel_scale", F16, (128,), 2)
        weight, scale = WeightOnly(bits, "sm80", F32).parts(128, 256, experts=3)
        assert (weight.shape, scale.shape, scale.record_bytes) == ((3, 256, packed_rows), (3, 128), 4)


@pytest.mark.parametrize(
    ("sm", "version", "dense", "moe"),
    [
        *((sm, version, "sm80", "sm80") for sm in (75, 80, 86, 87, 89) for version in ("0.16", "1.2")),
        *((sm, "0.16", "sm70", "sm70") for sm in (70, 72)),
        (90, "0.16", "sm90-0.16", "sm80"),
        (90, "1.2", "sm90", "sm80"),
        *((sm, "1.2", "sm80", "sm80") for sm in (100, 103, 120, 121)),
    ],
)
def test_family_of_a_generation(sm: int, version: Version, dense: str, moe: str) -> None:
    assert (family_for(sm, version, False), family_for(sm, version, True)) == (dense, moe)


@pytest.mark.parametrize("sm", [100, 103, 120, 121])
@pytest.mark.parametrize("experts", [False, True])
def test_an_old_release_and_a_new_generation_are_refused(sm: int, experts: bool) -> None:
    with pytest.raises(RefusedError, match=rf"{sm}.*0\.16.*--target-version 1\.2.*--encoding raw"):
        family_for(sm, "0.16", experts)


@pytest.mark.parametrize("sm", [70, 72])
def test_a_new_release_and_an_old_generation_are_refused(sm: int) -> None:
    with pytest.raises(RefusedError, match=rf"{sm}.*1\.2 begins at SM 75.*--target-version 0\.16"):
        family_for(sm, "1.2", False)


def test_sizes_that_would_be_padded_are_refused() -> None:
    assert size_problem("mlp.fc", 256, 128, 2) is None
    for rows, cols, tp, named in ((192, 128, 2, "outputs 192"), (128, 192, 2, "inputs 192"), (96, 64, 1, "outputs 96")):
        problem = size_problem("mlp.fc", rows, cols, tp)
        assert problem and problem.startswith("mlp.fc") and named in problem and str(64 * tp) in problem


def test_formats_are_listed_without_heavy_imports() -> None:
    code = (
        "import sys; from streamconv.targets.trtllm.recipes import all_quants; all_quants();"
        "import streamconv.quants.layout, streamconv.kernels.launch;"
        "sys.exit(str({'torch', 'numba', 'numpy'} & set(sys.modules) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "", done.stderr


def test_the_gather_formula_itself() -> None:
    """The yardstick above, checked on a published vector."""
    assert sha(gathered(integers(128, 64, 8), Layout("sm80", 8))) == VECTORS[0][4]
    assert np.frombuffer(gathered(integers(128, 64, 4), Layout("sm90", 4)), np.uint8)[:2].tolist() == [0x80, 0x80]
