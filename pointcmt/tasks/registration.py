"""Figures of a registration: errors of the pose as each family of papers gives them, and recall.

Every function takes the poses of n pairs: rotations [n, 3, 3] and translations [n, 3], numpy or tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation
from sklearn.metrics import r2_score

EULER = "zyx"
"""Extrinsic rotations about the fixed axes z, then y, then x: scipy's lower case, as DCP, PRNet, IDAM and
CMIGNet use it. R = Rx·Ry·Rz. RPMNet and ROPNet use 'xyz'."""

RECALL: tuple[tuple[float, float], ...] = ((5.0, 0.05), (10.0, 0.1))
"""Thresholds of the recall: degrees, and the translation in the units of the unit sphere. The second is
RegTR's."""

SYMMETRIC = frozenset(("bottle", "bowl", "cone", "cup", "flower_pot", "lamp", "tent", "vase"))
"""Classes of ModelNet40 that look alike from several sides, so that their pose is not defined; those that
OMNet leaves out."""


def euler_degrees(rotation: Any, convention: str = EULER) -> np.ndarray:
    """Rotations [n, 3, 3] as Euler angles in degrees [n, 3], in the order of the convention's letters."""
    return Rotation.from_matrix(_array(rotation, (3, 3))).as_euler(convention, degrees=True)


def rotation_errors(rotation: Any, truth: Any) -> np.ndarray:
    """Angles in degrees [n] of the rotations between estimate and truth.

    ``arccos((tr(truthᵀ R) − 1) / 2)``, computed as ``2 arcsin(‖R − truth‖ / √8)``, which is the same and
    keeps small angles, that the arccosine loses.
    """
    difference = np.linalg.norm(_array(rotation, (3, 3)) - _array(truth, (3, 3)), axis=(1, 2))
    return np.degrees(2 * np.arcsin(np.clip(difference / np.sqrt(8), 0, 1)))


def translation_errors(translation: Any, truth: Any) -> np.ndarray:
    """Distances [n] between translations: ``‖truthᵀ (t − t_truth)‖``, whose rotation changes no length."""
    return np.linalg.norm(_array(translation, (3,)) - _array(truth, (3,)), axis=1)


def registration_metrics(
    rotation: Any,
    translation: Any,
    true_rotation: Any,
    true_translation: Any,
    *,
    convention: str = EULER,
    recall: Sequence[tuple[float, float]] = RECALL,
    chamfer: Any = None,
) -> dict[str, float]:
    """All figures of n poses.

    Returns:
        ``rotation_rmse`` and ``rotation_mae`` (degrees, over all pairs and the three Euler angles),
        ``rotation_r2``, ``translation_rmse``, ``translation_mae``, ``translation_r2`` (scikit-learn's, mean
        over components), ``rotation_error`` and ``rotation_median`` (degrees, isotropic),
        ``translation_error`` and ``translation_median``, ``recall_<degrees>_<distance>`` and, where
        ``chamfer`` [n] is given, its mean.

    Raises:
        ValueError: no poses, shapes that do not fit, or values that are not finite.
    """
    estimate, truth = _array(rotation, (3, 3)), _array(true_rotation, (3, 3))
    shift, true_shift = _array(translation, (3,)), _array(true_translation, (3,))
    counts = {len(array) for array in (estimate, truth, shift, true_shift)}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"poses of {sorted(counts)} pairs; expected as many of each, and at least one")
    if not all(np.isfinite(array).all() for array in (estimate, truth, shift, true_shift)):
        raise ValueError("a pose is not finite; count such a pair as not moved (the identity) instead")
    angles, true_angles = euler_degrees(estimate, convention), euler_degrees(truth, convention)
    turned, moved = rotation_errors(estimate, truth), translation_errors(shift, true_shift)
    several = len(estimate) > 1  # R² of one pair is not defined
    result = {
        "rotation_rmse": float(np.sqrt(np.square(angles - true_angles).mean())),
        "rotation_mae": float(np.abs(angles - true_angles).mean()),
        "rotation_r2": float(r2_score(true_angles, angles)) if several else float("nan"),
        "rotation_error": float(turned.mean()),
        "rotation_median": float(np.median(turned)),
        "translation_rmse": float(np.sqrt(np.square(shift - true_shift).mean())),
        "translation_mae": float(np.abs(shift - true_shift).mean()),
        "translation_r2": float(r2_score(true_shift, shift)) if several else float("nan"),
        "translation_error": float(moved.mean()),
        "translation_median": float(np.median(moved)),
    }
    for degrees, distance in recall:
        result[f"recall_{degrees:g}_{distance:g}"] = float(((turned < degrees) & (moved < distance)).mean())
    if chamfer is not None:
        result["chamfer"] = float(np.mean(chamfer))
    return result


def modified_chamfer(
    source: np.ndarray,
    target: np.ndarray,
    complete: np.ndarray,
    rotation: np.ndarray,
    translation: np.ndarray,
    true_rotation: np.ndarray,
    true_translation: np.ndarray,
) -> float:
    """RPMNet's modified Chamfer distance of one pair: each cloud against the *complete, clean* shape.

    ``mean min ‖moved source − complete in the target's frame‖² + mean min ‖target − complete, moved as the
    source was‖²``; unlike the plain one it is near 0 for a right pose also where the clouds overlap in part.

    Args:
        source, target: [N, 3], [M, 3].
        complete: [L, 3] the whole shape in the source's frame.
        rotation, translation: the estimate; true_rotation, true_translation: the truth.

    Source: Yew & Lee, RPM-Net (CVPR 2020), section 5; yewzijian/RPMNet, ``eval.py``.
    """
    aligned = cKDTree(complete @ true_rotation.T + true_translation)
    forth, _ = aligned.query(source @ rotation.T + translation)
    back, _ = cKDTree(complete @ rotation.T + translation).query(target)
    return float(np.square(forth).mean() + np.square(back).mean())


def without_symmetric(labels: Any, class_names: Sequence[str]) -> np.ndarray:
    """bool [n]: which pairs are of a class whose pose is defined; see ``SYMMETRIC``."""
    known = np.array([name.lower().replace(" ", "_") not in SYMMETRIC for name in class_names] + [True])
    return known[_numpy(labels).astype(int)]  # label -1, no class, is the last


def metrics_table(rows: Mapping[str, Mapping[str, float]], title: str) -> Table:
    """The figures of several methods, a column each, as a table to print; ``title`` names the protocol."""
    names = {
        "rotation_rmse": "RMSE of Euler angles, degrees",
        "rotation_mae": "MAE of Euler angles, degrees",
        "rotation_r2": "R² of Euler angles",
        "rotation_error": "rotation error, degrees: mean",
        "rotation_median": "rotation error, degrees: median",
        "translation_rmse": "RMSE of translation",
        "translation_mae": "MAE of translation",
        "translation_r2": "R² of translation",
        "translation_error": "translation error: mean",
        "translation_median": "translation error: median",
        "chamfer": "modified Chamfer distance",
    }
    for figure in dict.fromkeys(name for row in rows.values() for name in row):
        if figure.startswith("recall_"):
            _, degrees, distance = figure.split("_")
            names[figure] = f"recall at {degrees}° and {distance}"
    table = Table(title=title)
    table.add_column("")
    for method in rows:
        table.add_column(method, justify="right")
    for figure, words in names.items():
        if any(figure in row for row in rows.values()):
            digits = 2 if figure.startswith("rotation") else 5 if figure == "chamfer" else 3
            table.add_row(
                words, *(f"{row[figure]:.{digits}f}" if figure in row else "" for row in rows.values())
            )
    return table


def _numpy(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    return np.asarray(value)


def _array(value: Any, shape: tuple[int, ...]) -> np.ndarray:
    array = _numpy(value).astype(np.float64)
    if array.ndim != 1 + len(shape) or array.shape[1:] != shape:
        expected = ["n", *shape]
        raise ValueError(f"poses have shape {list(array.shape)}; expected {expected}")
    return array
