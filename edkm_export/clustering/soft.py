"""The one entry to differentiable clustering."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from edkm_export.clustering.dense import cluster_dense
from edkm_export.clustering.fused import bins_of, can_fuse
from edkm_export.clustering.fused_histogram import FusedHistogram
from edkm_export.clustering.fused_trace import FusedStreaming
from edkm_export.clustering.histogram import Histogram
from edkm_export.clustering.marshaling import MarshaledTensors
from edkm_export.clustering.streaming import Streaming
from edkm_export.errors import PaletteError

__all__ = ["Method", "soft_cluster"]

Method = Literal["auto", "dense", "histogram", "streaming", "marshaled"]

# A smaller group has nearly as many distinct values as weights, and 65,536 bins cost more than they save.
_LEAST_FOR_HISTOGRAM = 4096

# The kernels sweep all bins of a group, used or not.
_LEAST_PER_BIN = 4


def soft_cluster(
    weight: Tensor,
    centroids: Tensor,
    *,
    temperature: float | Sequence[float] | Tensor,
    iterations: int | Literal["converge"],
    method: Method = "auto",
) -> tuple[Tensor, Tensor]:
    """Differentiable k-means of each group (DKM, arXiv 2108.12659, section 3.2; eDKM, arXiv 2309.00964).

        A^t = softmax(-|w - c^t|**2 / tau);  c^{t+1} = (A^t)^T w / sum(A^t);  soft weight = A^{T-1} c^T

    Differentiable in the weight and in the centroids, through both results; not in the temperature. Computes
    in the wider dtype of weight and centroids, float32 at least. A centroid that attracts no weight stays put.

    Methods, which agree to rounding:
        - "dense": autograd as it comes; the oracle. Memory of k entries a weight, several times an iteration.
        - "histogram": for scalars; on the distinct values of each group. 16-bit weights take no sorting.
        - "streaming": recomputes attention block by block; for any dtype and for vectors.
        - "marshaled": "dense" under the paper's marshaling and uniquification (see `marshaling`).
        - "auto": "histogram" for 16-bit scalars in groups of 4,096 weights or more (on a GPU 32,768 of bfloat16,
          262,144 of float16), otherwise "streaming".

    On CUDA devices with Triton, "histogram" and "streaming" of scalars in float32 run as fused kernels.

    Args:
        weight: float [groups, m], or vectors [groups, m, dim].
        centroids: c^0, float [groups, k] or [groups, k, dim].
        temperature: tau, positive; a number or floats [groups]. See `scale_free_temperature`. A tensor on a
            GPU is not checked.
        iterations: T, at least 1; or "converge" for a fixed point, whose gradient comes from the implicit
            function theorem and does not depend on c^0. Not for "dense" and "marshaled".
        method: see above.

    Returns:
        Soft weight in the dtype and shape of `weight`; c^T in the compute dtype and the shape of `centroids`.

    Raises:
        PaletteError: shapes or dtypes that do not fit, a temperature that is not positive, or a method that
            cannot do what is asked.
    """
    _check(weight, centroids, iterations, method)
    dtype = torch.promote_types(torch.promote_types(weight.dtype, centroids.dtype), torch.float32)
    tau = _temperature(temperature, weight, dtype)
    count = None if iterations == "converge" else int(iterations)
    start = centroids.to(dtype)
    fused = method in ("auto", "histogram", "streaming") and can_fuse(weight, centroids, tau, count)
    bins = bins_of(weight.dtype)
    if method == "auto":
        least = _LEAST_PER_BIN * bins if fused else _LEAST_FOR_HISTOGRAM
        method = "histogram" if weight.dim() == 2 and bins and weight.shape[1] >= least else "streaming"
    soft: Tensor
    last: Tensor
    if fused and method == "streaming":
        soft, last = FusedStreaming.apply(weight, start, tau, count)  # type: ignore[no-untyped-call]
        return soft, last
    # With fewer weights than bins, the bins of all groups together would outweigh the weights.
    if fused and method == "histogram" and 0 < bins <= weight.shape[1]:
        soft, last = FusedHistogram.apply(weight, start, tau, count)  # type: ignore[no-untyped-call]
        return soft, last
    if method == "histogram":
        soft, last = Histogram.apply(weight, start, tau, count)  # type: ignore[no-untyped-call]
        return soft, last
    points = weight if weight.dim() == 3 else weight[..., None]
    start = start if centroids.dim() == 3 else start[..., None]
    if method == "streaming":
        soft, last = Streaming.apply(points, start, tau, count)  # type: ignore[no-untyped-call]
    else:
        assert count is not None
        if method == "marshaled":
            with MarshaledTensors(weight.detach()):
                soft, last = cluster_dense(points.to(dtype), start, tau, count)
        else:
            soft, last = cluster_dense(points.to(dtype), start, tau, count)
        soft = soft.to(weight.dtype)
    return soft.view(weight.shape), last.view(centroids.shape)


def _check(weight: Tensor, centroids: Tensor, iterations: int | str, method: str) -> None:
    if (
        weight.dim() not in (2, 3)
        or centroids.dim() != weight.dim()
        or centroids.shape[0] != weight.shape[0]
        or centroids.shape[2:] != weight.shape[2:]
        or not weight.numel()
        or not centroids.numel()
    ):
        raise PaletteError(
            f"weight {list(weight.shape)} and centroids {list(centroids.shape)} do not fit; expected "
            "[groups, m] and [groups, k], or [groups, m, dim] and [groups, k, dim], none of them empty."
        )
    if not (weight.is_floating_point() and centroids.is_floating_point()):
        raise PaletteError(f"weight is {weight.dtype} and centroids are {centroids.dtype}, expected floats.")
    if weight.device != centroids.device:
        raise PaletteError(f"weight is on {weight.device}, but the centroids are on {centroids.device}.")
    if method not in get_args(Method):
        raise PaletteError(f"method is {method!r}, use {', '.join(get_args(Method))}.")
    if iterations == "converge":
        if method in ("dense", "marshaled"):
            raise PaletteError(f"method {method!r} cannot iterate to a fixed point; use 'auto'.")
    elif not isinstance(iterations, int) or iterations < 1:
        raise PaletteError(f"iterations is {iterations!r}, expected a number from 1 or 'converge'.")
    if method == "histogram" and weight.dim() == 3:
        raise PaletteError("method 'histogram' takes scalars only; use 'streaming' for vectors.")


def _temperature(temperature: float | Sequence[float] | Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """As a tensor [groups]."""
    if not isinstance(temperature, Tensor):  # torch would round a number to float32
        temperature = torch.as_tensor(temperature, dtype=torch.float64)
    tau = temperature.detach().to(dtype)
    if tau.shape not in ((), weight.shape[:1]):
        raise PaletteError(
            f"temperature has shape {list(tau.shape)}, expected a number or [{weight.shape[0]}]."
        )
    # Looking at a tensor on a GPU would make the host wait for it.
    if tau.device.type == "cpu" and not bool((tau > 0).all() & (tau < torch.inf).all()):
        raise PaletteError(
            f"temperature is {float(tau.min())} in {dtype}, expected positive and finite values."
        )
    return tau.to(weight.device).expand(weight.shape[0])
