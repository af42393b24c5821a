"""The search for INT4 codes: each step against a direct computation, and against what it promises."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from streamconv.calibration import awq, gptq, tiers  # noqa: E402
from streamconv.calibration import search as search_module  # noqa: E402
from streamconv.calibration.awq import multiplier_of  # noqa: E402
from streamconv.calibration.gram import Gram  # noqa: E402
from streamconv.calibration.grid import NEAREST, Grid  # noqa: E402
from streamconv.calibration.search import Found, clipped, nearest, search  # noqa: E402
from streamconv.calibration.tiers import SAMPLE  # noqa: E402
from streamconv.quants.int_group import RATIOS  # noqa: E402

N, K, GROUP, TOKENS = 64, 128, 32, 1024
GRID = Grid(GROUP, torch.bfloat16)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices are small here, and threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def normal(*shape: int, seed: int = 0) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gram(inputs: Any, tier: Any = "full", group: int = GROUP) -> Gram:
    made = Gram(tier, inputs.shape[1], group, torch.device("cpu"))
    for part in inputs.split(300):
        made.add(part)
    made.finish()
    return made


def of(found: Found, grid: Grid = GRID) -> Any:
    return grid.values(found.codes.float(), found.scales)


def loss(weight: Any, made: Any, inputs: Any) -> float:
    """Mean square of the outputs' error, summed over outputs, in float64 on the tokens themselves."""
    return float(((made - weight).double() @ inputs.double().T).square().mean(1).sum())


def agree(method: str, device: str) -> None:
    """A search on a device, whose sums are in another order, against one on the CPU: Grams to 1e-4, losses to 1 %, codes but for ties."""
    mix = normal(K, K, seed=11) / 8 + torch.eye(K)
    inputs, weight = (normal(TOKENS, K) @ mix).bfloat16(), normal(N, K, seed=12).bfloat16()
    here = gram(inputs)
    there = Gram("full", K, GROUP, torch.device(device))
    for part in inputs.flip(0).to(device).split(77):
        there.add(part)
    there.finish()
    largest = float(here.moments.diagonal().max())
    assert float((there.moments.cpu() - here.moments).abs().max()) < 1e-4 * largest
    one = search(method, {"w": weight}, here, {"w": GRID})
    two = search(method, {"w": weight.to(device)}, there, {"w": GRID})
    assert (one.multiplier is None) == (two.multiplier is None)
    a, b = one.found["w"], two.found["w"]
    assert torch.allclose(a.losses, b.losses.cpu(), rtol=0.01)
    assert float((a.codes == b.codes.cpu()).float().mean()) > (0.95 if method == "gptq" else 0.99)
    assert float((a.scales == b.scales.cpu()).float().mean()) > 0.99


@pytest.mark.parametrize("method", ["clip", "awq", "gptq"])
def test_the_order_of_sums_changes_ties_alone(method: str) -> None:
    agree(method, "cpu")


@pytest.mark.parametrize(("tier", "close"), [("full", 1e-5), ("block", 1e-5), ("sample", 0.2)])
def test_a_gram_tells_the_error_of_all_tokens(tier: str, close: float) -> None:
    inputs, error = normal(TOKENS, K).bfloat16(), normal(N, K, seed=1)
    if tier == "block":  # no terms across groups
        error[:, GROUP:] = 0
    wanted = (error.double() @ inputs.double().T).square().mean(1)
    assert torch.allclose(gram(inputs, tier).energies(error).double(), wanted, rtol=close)


def test_the_tiers_hold_the_same_blocks() -> None:
    inputs = normal(TOKENS, K)
    blocks = (inputs.T @ inputs / TOKENS).reshape(K // GROUP, GROUP, K // GROUP, GROUP).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    for tier in ("full", "block", "sample"):
        assert torch.allclose(gram(inputs, tier).blocks(), blocks, rtol=1e-3, atol=1e-4)


def test_a_sample_spreads_over_all_tokens() -> None:
    inputs = torch.arange(3.0 * SAMPLE)[:, None].repeat(1, GROUP)
    made = Gram("sample", GROUP, GROUP, torch.device("cpu"), every=3)
    for part in inputs.split(7):
        made.add(part)
    made.finish()
    assert torch.allclose(made.moments[:, 0] * SAMPLE**0.5, torch.arange(0.0, 3 * SAMPLE, 3))
    assert made.tokens == 3 * SAMPLE and float(made.absolute[0]) == pytest.approx(float(inputs.mean()), rel=1e-5)


def test_every_group_gets_the_ratio_with_the_smallest_error() -> None:
    weight, inputs = normal(N, K, seed=2), normal(TOKENS, K) * torch.linspace(0.1, 3, K)
    blocks = gram(inputs, "block").blocks()
    got = clipped(weight, blocks, GRID)
    best = torch.full_like(got, float("inf"))
    for ratio in RATIOS:
        scales = (weight.reshape(N, -1, GROUP).abs().amax(2) * ratio / 7).bfloat16().float()
        codes = (weight.reshape(N, -1, GROUP) / scales[..., None]).round().clamp(-8, 7)
        error = codes * scales[..., None] - weight.reshape(N, -1, GROUP)
        best = torch.minimum(best, torch.einsum("ngi,gij,ngj->ng", error, blocks, error))
    error = (GRID.values(GRID.codes(weight, got), got) - weight).reshape(N, -1, GROUP)
    assert torch.allclose(torch.einsum("ngi,gij,ngj->ng", error, blocks, error), best, rtol=1e-5)


def test_gptq_is_the_textbook_loop() -> None:
    """One column after the other with the inverse of what is left, in float64."""
    weight, inputs = normal(8, K, seed=3).double(), normal(TOKENS, K) @ normal(K, K, seed=4) / 8
    made = gram(inputs)
    scales = clipped(weight.float(), made.blocks(), GRID)
    known = gptq.factor(made.moments)
    assert known is not None
    got = gptq.rounded(weight.float(), scales, GRID, known)
    hessian = made.moments.double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(K)
    left, wanted = weight.clone(), torch.zeros(8, K)
    order = torch.argsort(made.moments.diagonal(), descending=True, stable=True).tolist()
    for at, column in enumerate(order):
        rest = order[at:]
        inverse = torch.linalg.inv(hessian[rest][:, rest])
        step = scales[:, column // GROUP].double()
        wanted[:, column] = (left[:, column] / step).round().clamp(-8, 7).float()
        change = (left[:, column] - wanted[:, column] * step) / inverse[0, 0]
        left[:, rest] -= change[:, None] * inverse[0]
    assert float((got == wanted).float().mean()) > 0.995  # float32 ties


@pytest.mark.parametrize("method", ["clip", "awq", "gptq"])
def test_never_worse_than_rounding_and_better_on_other_tokens(method: str) -> None:
    mix = normal(K, K, seed=5) / 8 + torch.eye(K)
    weights = {"one": normal(N, K, seed=6).bfloat16(), "two": normal(N, K, seed=7).bfloat16()}
    inputs, others = normal(TOKENS, K) @ mix, normal(TOKENS, K, seed=8) @ mix
    inputs[:, 5] = 0  # a dead channel
    made = search(method, weights, gram(inputs), dict.fromkeys(weights, GRID))
    factor = 1.0 if made.multiplier is None else made.multiplier
    for name, weight in weights.items():
        found = made.found[name]
        values, plain = of(found) * factor, of(nearest(weight, GRID))
        before, after = loss(weight.float(), plain, inputs), loss(weight.float(), values, inputs)
        assert after <= before and after <= loss(weight.float(), GRID.values(*_at(weight.float(), 1.0)), inputs)
        assert torch.allclose(found.losses[1:], torch.tensor([before, after]), rtol=1e-3)
        assert loss(weight.float(), values, others) < 0.9 * loss(weight.float(), plain, others)
        if method != "awq":  # row by row
            error, other = ((made - weight.float()) @ inputs.T for made in (values, plain))
            assert bool((error.square().sum(1) <= other.square().sum(1) * 1.0001).all())


def _at(weight: Any, ratio: float) -> tuple[Any, Any]:
    scales = GRID.scales(GRID.largest(weight), ratio)
    return GRID.codes(weight, scales), scales


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("method", ["clip", "awq", "gptq"])
def test_weights_on_a_grid_come_back(method: str, dtype: str) -> None:
    grid = Grid(GROUP, getattr(torch, dtype))
    codes = torch.randint(-8, 8, (N, K), generator=torch.Generator().manual_seed(1)).float()
    codes[:, ::GROUP] = -8
    scales = (torch.rand(N, K // GROUP, generator=torch.Generator().manual_seed(2)) + 0.5).to(grid.dtype).float()
    weight = grid.values(codes, scales)
    weight[0], weight[1] = 0, weight[1].abs()  # a row of zeros; one-signed groups
    inputs = normal(TOKENS, K)
    inputs[:, 7] = 1  # with the others a Gram of full rank
    inputs[:, 9] = inputs[:, 7]  # and now of less
    made = search(method, {"one": weight}, gram(inputs), {"one": grid})
    assert made.multiplier is None or method == "awq"
    if made.multiplier is None:
        same = torch.ones(N, dtype=torch.bool)
        same[1] = False  # its largest code was 8, which there is not
        assert torch.equal(of(made.found["one"], grid)[same], weight[same])
    assert float(made.found["one"].losses[2]) <= float(made.found["one"].losses[1])


@pytest.mark.slow
def test_what_each_method_is_for() -> None:
    """One loud channel is AWQ's; inputs of low rank are GPTQ's; for white inputs the scales alone matter."""
    wide, group = 512, 64
    grid, weight = Grid(group, torch.bfloat16), normal(256, wide, seed=9)

    def losses(inputs: Any) -> dict[str, float]:
        made = gram(inputs, group=group)
        scales = grid.scales(grid.largest(weight), 1.0)
        plain = float(made.energies(grid.values(grid.codes(weight, scales), scales) - weight).sum())
        return {m: float(search(m, {"w": weight}, made, {"w": grid}).found["w"].losses[2]) / plain for m in ("clip", "awq", "gptq")}

    loud = normal(4096, wide)
    loud[:, 3] *= 100
    assert losses(loud)["awq"] < 0.2
    low = losses(normal(4096, wide // 4) @ normal(wide // 4, wide, seed=1) / (wide // 4) ** 0.5 + 0.01 * normal(4096, wide, seed=2))
    assert low["gptq"] < 0.5 * low["clip"]
    white = losses(normal(4096, wide))
    assert white["clip"] < 0.85 and abs(white["gptq"] - white["clip"]) < 0.1 and abs(white["awq"] - white["clip"]) < 0.1


def test_the_weights_follow_from_the_rounded_multiplier() -> None:
    scale = torch.logspace(-3, 3, K)
    for kind, most in ((torch.float16, 2.0**6), (torch.bfloat16, 1e9)):
        multiplier = multiplier_of(scale, Grid(GROUP, kind))
        assert torch.equal(multiplier, multiplier.to(kind).float()) and float(multiplier.max()) <= most
        assert float(multiplier.max() / multiplier.min()) <= 1.01e3


def test_a_gram_without_a_factorization_leaves_the_clipped_scales() -> None:
    moments = gram(normal(TOKENS, K))
    moments.moments = -moments.moments - 10 * torch.ones(K, K)
    assert gptq.factor(moments.moments) is None
    made = search("gptq", {"one": normal(N, K)}, moments, {"one": GRID})
    assert made.unfactored


class Live(TorchDispatchMode):
    """Counts bytes of tensors that operations make, while they live, on any device."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._seen:
                storage = tensor.untyped_storage()
                self._seen[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, storage._cdata)
        return made

    def _gone(self, key: int) -> None:
        self.now -= self._seen.pop(key)


@pytest.mark.parametrize(("double", "times"), [(0, 3), (4096, 5)])
def test_a_factor_holds_no_more_than_is_planned(double: int, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, as on a GPU, and in float64."""
    monkeypatch.setattr(gptq, "DOUBLE", double)
    moments = gram(normal(300, 256)).moments + torch.eye(256)
    with Live() as live:
        assert gptq.factor(moments) is not None
    assert (times - 0.2) * moments.nbytes < live.most < (times + 0.2) * moments.nbytes


@pytest.mark.parametrize("method", ["clip", "awq", "gptq"])
def test_a_search_holds_no_more_than_is_planned(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the Gram: copies of a tile of rows, and what is made."""
    for module in (awq, gptq, search_module):
        monkeypatch.setattr(module, "rows_at_once", lambda size, device: 64)
    weight, known = normal(256, K, seed=3).bfloat16(), gram(normal(300, K))
    with Live() as live:
        search(method, {"w": weight}, known, {"w": GRID})
    tile, made = 4 * 64 * K, weight.numel() * (1 + 4 / GROUP)
    factors = 2 * known.moments.nbytes if method == "gptq" else known.moments.nbytes
    assert live.most < tiers._COPIES * tile + factors + known.blocks().nbytes + made + weight.nbytes


def test_subnormal_groups() -> None:
    weight = normal(N, K) * 1e-7
    found = nearest(weight, Grid(GROUP, torch.float16))
    assert float(found.scales.min()) == 2.0**-14 and not found.codes.any()
    assert torch.equal(nearest(torch.zeros(2, K), GRID).scales, torch.ones(2, K // GROUP))
    assert NEAREST in RATIOS
