"""Local InfoNCE: which cell of which image does a point of the cloud fall into?"""

from __future__ import annotations

import torch
from torch import Tensor

from pointcmt.objectives._contrast import (
    MAX_LOGITS,
    check_negatives,
    gathered,
    log_sum_exp,
    mean_over_ranks,
    prepared,
)


def local_info_nce(
    local: Tensor,
    maps: Tensor,
    cell: Tensor,
    *,
    temperature: float = 0.1,
    normalize: bool = True,
    gather: bool = True,
    max_logits: int = MAX_LOGITS,
) -> Tensor:
    """Mean over the local features of −log(exp(z · q⁺ / τ) / Σ_q exp(z · q / τ)) over all cells of all images.

    The positive is the cell of the same shape's image that the feature's centre falls into; the other cells
    of that image are negatives as those of the others are. At chance it is ln(h·w·B), with B over all ranks.

    Args:
        local: [B, M, D] local features of the clouds.
        maps: [B, D, h, w] features of the cells of one image of each.
        cell: int64 [B, M], ``row·w + column`` of the cell that each centre falls into; −1 where it falls into
            none, and then it does not count.
        temperature: τ.
        normalize, gather: as for :func:`pointcmt.objectives.info_nce`.
        max_logits: at most so many of the B·M × h·w·B logits are in memory at a time: what exceeds it is
            computed some rows at a time, and again in the backward pass.

    Returns:
        Scalar in float32 (float64 for such input), also under autocast.

    Raises:
        ValueError: shapes that do not fit, cells outside the maps, no centre in any cell, a single cell
            altogether, NaN or infinite values.

    Source: Herzog and Suwelack, "Pic@Point: cross-modal learning by local and global point-picture
    correspondence", ACML 2024, equations 1 and 2.
    """
    if (
        local.ndim != 3
        or maps.ndim != 4
        or local.shape[0] != maps.shape[0]
        or local.shape[2] != maps.shape[1]
    ):
        raise ValueError(
            f"local_info_nce: local {list(local.shape)} and maps {list(maps.shape)}; expected [B, M, D] and "
            "[B, D, h, w], projected into one space (pointcmt.heads)"
        )
    cells = maps.shape[2] * maps.shape[3]
    if cell.shape != local.shape[:2] or cell.dtype != torch.int64:
        raise ValueError(
            f"local_info_nce: cell is {cell.dtype} {list(cell.shape)}; expected int64 "
            f"{list(local.shape[:2])}, as pointcmt.views.cells_of gives"
        )
    valid = cell >= 0
    if cell.device.type == "cpu" and cell.numel():
        if int(cell.max()) >= cells:
            raise ValueError(
                f"local_info_nce: cell goes up to {int(cell.max())}, and maps of {maps.shape[2]}×"
                f"{maps.shape[3]} have {cells} cells; expected row·w + column"
            )
        if not valid.any():
            raise ValueError(
                "local_info_nce: no centre falls into its image: the cameras are not those of these points. "
                "Give views of the same clouds (teacher.project(points, cameras=True)), and turn the cameras "
                "with clouds that were turned (pointcmt.views.moved)"
            )
    with torch.autocast(local.device.type, enabled=False):
        anchors, rows = prepared(
            "local_info_nce",
            normalize,
            temperature,
            local=local,
            maps=maps.flatten(2).transpose(1, 2),
        )
        everyone, _ = gathered(rows, gather)
        candidates = everyone.flatten(0, 1)
        check_negatives("local_info_nce", len(candidates), 2, gather)
        index = cell.clamp(min=0).unsqueeze(-1).expand(-1, -1, rows.shape[2])
        positive = (anchors * rows.gather(1, index)).sum(-1) / temperature
        total = log_sum_exp(anchors.flatten(0, 1), candidates, temperature, max_logits=max_logits)
        return mean_over_ranks(total - positive.flatten(), valid.flatten(), gather)
