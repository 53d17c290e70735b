"""What a pre-trained network finds similar, in pictures that ``pointcmt report`` shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from sklearn.manifold import TSNE

from pointcmt.objectives import LocalInfoNCE
from pointcmt.pictures import save_embedding, save_similarity
from pointcmt.types import StudentState, TeacherOutput

# of each shape in the picture of similarities
VIEWS, SHAPES = 2, 4


def draw_features(
    before: np.ndarray, after: np.ndarray, labels: np.ndarray, names: list[str], path: Path
) -> Path | None:
    """t-SNE of features [n, D] before and after pre-training; None of too few shapes for one.

    The labels are looked at here alone, for the colours.
    """
    if len(labels) < 8:
        return None
    tsne = TSNE(perplexity=min(30, len(labels) / 4), init="pca", random_state=0)
    panels = {
        name: tsne.fit_transform(features / max(float(features.std()), 1e-12))
        for name, features in (("random weights", before), ("pre-trained", after))
    }
    return save_embedding(panels, labels, names, path)


@torch.no_grad()
def draw_similarity(
    objective: LocalInfoNCE,
    state: StudentState,
    said: TeacherOutput,
    names: list[str],
    up: str,
    path: Path,
) -> Path:
    """For each shape of a batch, how similar its outermost local feature is to what.

    Args:
        objective: with its heads, in eval mode.
        state: of the network, with local features.
        said: of the image encoder on ``VIEWS`` views of each, with its maps and the views.
        names: of the shapes.
        up: the axis that points up.
        path: of the PNG.
    """
    assert state.centers is not None and said.views is not None
    local, cells = objective.embed_cells(state, said)  # [B, V, M, D], [B, V, D, h, w]
    chosen = state.centers.norm(dim=-1).argmax(1)
    row = torch.arange(len(chosen), device=chosen.device)
    point = local[row, :, chosen]  # [B, V, D]
    first = point[:, 0, :, None]
    return save_similarity(
        state.centers.cpu().numpy(),
        chosen.tolist(),
        (local[:, 0] @ first)[..., 0].cpu().numpy(),
        (local.roll(-1, 0)[:, 0] @ first)[..., 0].cpu().numpy(),
        said.views.images.cpu().numpy(),
        torch.einsum("bvd,bvdhw->bvhw", point, cells).cpu().numpy(),
        names,
        path,
        up,
    )
