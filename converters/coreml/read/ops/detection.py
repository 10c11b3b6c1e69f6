"""Selection of boxes."""

from __future__ import annotations

import torch
from torch import Tensor

from converters.coreml.read.ops.registry import Call, op


@op("non_maximum_suppression")
def non_maximum_suppression(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_boxes: int,
    call: Call,
    score_threshold: float | None = None,
    per_class_suppression: bool = False,
) -> tuple[Tensor, ...]:
    """Boxes of the best scores that do not overlap a better one; coordinates are (x, y, width, height) of the center.

    Up to iOS 16: boxes [n, b, 4], scores [n, b, classes], `score_threshold`, and the number of boxes as fourth result.
    From iOS 17 on the boxes are the last axis. What is not filled holds zeros, and -1 as index. When no box reaches
    the score threshold, the best one is selected all the same.
    """
    new_form = call.ios >= 17
    if new_form:
        boxes, scores = boxes.transpose(1, 2), scores.transpose(1, 2)
    count = boxes.shape[0]
    chosen_boxes = boxes.new_zeros(count, max_boxes, 4)
    chosen_scores = scores.new_zeros(count, max_boxes, scores.shape[2])
    indices = torch.full((count, max_boxes), -1, dtype=torch.int32)
    numbers = torch.zeros(count, dtype=torch.int32)
    for batch in range(count):
        kept = _selected(boxes[batch], scores[batch], iou_threshold, score_threshold, per_class_suppression)[
            :max_boxes
        ]
        at = torch.tensor(kept, dtype=torch.int64)
        chosen_boxes[batch, : len(kept)] = boxes[batch, at]
        chosen_scores[batch, : len(kept)] = scores[batch, at]
        indices[batch, : len(kept)] = at.int()
        numbers[batch] = len(kept)
    if new_form:
        return chosen_boxes.transpose(1, 2).contiguous(), chosen_scores.transpose(1, 2).contiguous(), indices
    return chosen_boxes, chosen_scores, indices, numbers


def _selected(
    boxes: Tensor, scores: Tensor, iou_threshold: float, score_threshold: float | None, per_class: bool
) -> list[int]:
    """Indices of the boxes that are kept, best first."""
    if 0 in scores.shape:
        return []
    best, kind = scores.float().max(1)
    overlap = _overlaps(boxes.float()) > iou_threshold
    if per_class:
        overlap &= kind[:, None] == kind
    order = torch.argsort(best, descending=True, stable=True).tolist()
    if score_threshold is not None:
        order = [index for index in order if float(best[index]) > score_threshold] or order[:1]
    kept: list[int] = []
    for index in order:
        if not any(bool(overlap[index, other]) for other in kept):
            kept.append(index)
    return kept


def _overlaps(boxes: Tensor) -> Tensor:
    """Intersection over union of each pair, [b, b]; 0 for boxes without area."""
    center, size = boxes[:, :2], boxes[:, 2:]
    low, high = center - size / 2, center + size / 2
    sides = torch.minimum(high[:, None], high) - torch.maximum(low[:, None], low)
    shared = sides.clamp(min=0).prod(2)
    area = size.prod(1)
    union = area[:, None] + area - shared
    return torch.where(union > 0, shared / union, torch.zeros_like(shared))
