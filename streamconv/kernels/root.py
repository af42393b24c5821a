"""The smoother for alpha 1/2 without torch, whose power of float64 is not always the rounded root."""

from __future__ import annotations

from streamconv.lazy import Array, np


def half_power_smoother(inputs: Array, maxima: Array) -> tuple[Array, float, tuple[float, float]] | None:
    """The smoother of SmoothQuant for alpha 1/2.

    Torch gives the rounded square root or, in one of a hundred cases, its neighbour on the other side of the exact one (which was seen
    up to 0.53 units away on an AMD EPYC, 0.73 on an Intel Xeon). So both are tried.

    Args:
        inputs: float64 [cols], x. maxima: [cols], the column maxima; their roots are taken in their type, float16 or float64.

    Returns:
        s float64 [cols]; the largest x / s; the least and the greatest that it is by torch's roots. None if the bytes of weights,
        norms or smoothers could depend on which root it is: ask torch.
    """
    from streamconv.kernels.root_code import alike, half_power

    smoother, low, high = np.empty_like(inputs), np.empty_like(inputs), np.empty_like(inputs)
    roots = np.sqrt(maxima).astype(np.float64)  # of float16: the same for every value
    doubtful = maxima if maxima.dtype == np.float64 else roots * roots  # a square's root is in no doubt
    top, least, greatest = half_power(inputs, doubtful, roots, smoother, low, high)
    return (smoother, float(top), (float(least), float(greatest))) if alike(low, high) else None
