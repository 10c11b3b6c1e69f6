"""What the report says about each palettized weight, and about the size of all."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from edkm_export.activity import tracked
from edkm_export.artifact.metrics import snr_db
from edkm_export.artifact.protocol import StoredModel
from edkm_export.checkpoint import Checkpoint
from edkm_export.errors import PackageError
from edkm_export.palette import PalettizedTensor
from edkm_export.verify.ranking import ranked
from edkm_export.verify.report import Size, TensorReport, WeightPlot

__all__ = ["describe_tensors", "measure_sizes", "plot_weights"]

_PLOTS = 6
_BINS = 80


def describe_tensors(
    checkpoint: Checkpoint, original: Mapping[str, Tensor], output_snr_db: Mapping[str, float]
) -> list[TensorReport]:
    """One line for each palettized weight.

    Args:
        checkpoint: its palettized weights.
        original: float weights by parameter name, where available.
        output_snr_db: of the layer's output by parameter name, where measured.
    """
    rows = []
    for name, tensor in tracked(checkpoint.palettized.items(), "describing", "weights"):
        groups_out, groups_in = tensor.groups
        counts = _index_counts(tensor)
        rows.append(
            TensorReport(
                name=name,
                shape=list(tensor.shape),
                n_bits=tensor.n_bits,
                groups=tensor.groups,
                dim=tensor.dim,
                lut_dtype=tensor.lut_dtype,
                used_centroids=int((counts > 0).sum()),
                centroids=groups_out * groups_in << tensor.n_bits,
                bits_per_weight=tensor.bits_per_weight,
                bit_exact=None,
                index_entropy=_entropy(counts),
                weight_snr_db=snr_db(original[name], tensor.decode()) if name in original else None,
                output_snr_db=output_snr_db.get(name),
            )
        )
    return rows


def measure_sizes(
    checkpoint: Checkpoint, artifact: StoredModel, predicted_size_bytes: int | None
) -> list[Size]:
    """Bytes by part, as the checkpoint predicts them and as they lie on disk."""
    try:
        palettized, dense = artifact.palettized(), artifact.dense()
        weights: int | None = artifact.weights_size_bytes()
    except PackageError:
        palettized, dense, weights = {}, {}, None
    found = None if weights is None else palettized.values()
    wanted = checkpoint.palettized.values()
    # A graph may compute in float32; the files of weights, below, are predicted from the interface alone.
    others = sum(
        tensor.numel() * (dense[name].element_size() if name in dense else 2)
        for name, tensor in checkpoint.dense.items()
    )
    held = [tensor for name, tensor in dense.items() if name in checkpoint.dense]
    return [
        Size(
            part="indices",
            predicted_bytes=sum(tensor.indices.numel() for tensor in wanted),
            actual_bytes=None if found is None else sum(tensor.indices.numel() for tensor in found),
        ),
        Size(
            part="LUTs",
            predicted_bytes=sum(tensor.size_bytes - tensor.indices.numel() for tensor in wanted),
            actual_bytes=None
            if found is None
            else sum(tensor.size_bytes - tensor.indices.numel() for tensor in found),
        ),
        Size(
            part="other parameters",
            predicted_bytes=others,
            actual_bytes=None if found is None else sum(t.numel() * t.element_size() for t in held),
        ),
        Size(
            part="files of weights, with tables and alignment",
            predicted_bytes=predicted_size_bytes,
            actual_bytes=weights,
        ),
        Size(part="everything that ships", predicted_bytes=None, actual_bytes=artifact.size_bytes() or None),
    ]


def plot_weights(
    checkpoint: Checkpoint, original: Mapping[str, Tensor], rows: list[TensorReport]
) -> list[WeightPlot]:
    """LUTs over the histograms of their weights: four of the worst layers, a middling one and the best.

    Of each weight the LUT is shown that errs most.
    """
    ordered = ranked(row for row in rows if row.dim == 1)
    places = [*range(min(_PLOTS - 2, len(ordered))), len(ordered) // 2, len(ordered) - 1]
    chosen = list(dict.fromkeys(ordered[place].name for place in places)) if ordered else []
    return [_plot(checkpoint.palettized[name], original.get(name)) for name in chosen]


def _plot(tensor: PalettizedTensor, original: Tensor | None) -> WeightPlot:
    decoded = _blocks(tensor, tensor.decode().float())
    values = decoded if original is None else _blocks(tensor, original.float())
    errors = (values - decoded).square().mean((1, 3)) / values.square().mean((1, 3)).clamp_min(1e-30)
    worst = int(errors.argmax())
    group = divmod(worst, tensor.groups[1])
    within = values[group[0], :, group[1]].reshape(-1)
    lut, order = tensor.lut_values()[group][:, 0].float().sort()
    low = min(float(within.min()), float(lut[0]))
    high = max(float(within.max()), float(lut[-1]))
    if low == high:
        low, high = low - 1, high + 1
    return WeightPlot(
        name=tensor.name,
        group=group,
        source="decoded" if original is None else "original",
        low=low,
        high=high,
        counts=torch.histc(within, _BINS, low, high).long().tolist(),
        lut=lut.tolist(),
        used=_index_counts(tensor)[group][order].tolist(),
    )


def _blocks(tensor: PalettizedTensor, dense: Tensor) -> Tensor:
    """Dense values as [G_out, rows, G_in, columns]."""
    rows, columns = tensor.matrix_shape
    groups_out, groups_in = tensor.groups
    return dense.reshape(groups_out, rows // groups_out, groups_in, columns // groups_in)


def _index_counts(tensor: PalettizedTensor) -> Tensor:
    """How many indices select each LUT entry, int64 [G_out, G_in, 2**n_bits]."""
    rows, columns = tensor.index_shape
    groups_out, groups_in = tensor.groups
    indices = tensor.unpack_indices().view(groups_out, rows // groups_out, groups_in, columns // groups_in)
    counts = torch.empty(groups_out, groups_in, 1 << tensor.n_bits, dtype=torch.int64)
    for group in range(groups_out):
        for column in range(groups_in):
            part = indices[group, :, column].reshape(-1).int()
            counts[group, column] = torch.bincount(part, minlength=1 << tensor.n_bits)
    return counts


def _entropy(counts: Tensor) -> float:
    """Bits of an index given its LUT: Shannon entropy of each LUT's indices, averaged over all indices."""
    counts = counts.double()
    share = counts / counts.sum(-1, keepdim=True)
    bits = -(counts * share.clamp_min(1e-300).log2()).sum()
    return float(bits / counts.sum())
