"""How often ``align`` calls a right or a wrong pose good, over real scans.

    python -m tests.registration.verdict bunny            all ordered pairs of the Stanford bunny's scans
    python -m tests.registration.verdict 3DMatch 60       60 pairs, evenly over the benchmark; 3DLoMatch alike

Right: within 5 degrees, and the middle of the source within 2 % of the larger cloud's diagonal. Prints the
counts, and every wrong pose that was called good.
"""

from __future__ import annotations

import sys
from collections import Counter

import numpy as np

from pointcmt.registration import ScanPairs, ThreeDMatchPairs
from pointcmt.registration.align import align
from pointcmt.tasks.registration import rotation_errors
from tests.registration.real import SCANS


def main(name: str, count: int | None, method: str, offset: float = 0.5) -> int:
    if name == "bunny":
        pairs: ScanPairs | ThreeDMatchPairs = ScanPairs(SCANS / "stanford_bunny_scans.h5")
    else:
        pairs = ThreeDMatchPairs(SCANS / "3dmatch_test.h5", name)
    rows = ((np.arange(count or len(pairs)) + offset) * len(pairs) / (count or len(pairs))).astype(int)
    counts: Counter[tuple[str, str]] = Counter()
    wrong = 0
    for row in rows:
        pair = pairs.pair(int(row))
        found = align(pair.source, pair.target, method, refine=True)  # type: ignore[arg-type]
        rotation, shift = found.motion[:3, :3], found.motion[:3, 3]
        degrees = float(rotation_errors(rotation[None], pair.rotation[None])[0])
        centre = pair.source.mean(0)
        apart = np.linalg.norm(rotation @ centre + shift - pair.rotation @ centre - pair.translation)
        size = max(np.linalg.norm(np.ptp(cloud, axis=0)) for cloud in (pair.source, pair.target))
        right = degrees < 5 and apart < 0.02 * size
        counts["right" if right else "wrong", "trusted" if found.trusted else "not trusted"] += 1
        if found.trusted and not right:
            wrong += 1
            print(
                f"{pair.name}: overlap {pair.overlap:.2f}, {degrees:.1f} degrees, "
                f"{apart / size:.3f} of the size"
            )
    words = ", ".join(f"{' '.join(key)} {number}" for key, number in sorted(counts.items()))
    print(f"{name}, {method}, {len(rows)} pairs: {words}")
    return wrong


if __name__ == "__main__":
    arguments = sys.argv[1:]
    raise SystemExit(
        main(
            arguments[0], int(arguments[1]) if len(arguments) > 1 else None, (arguments[2:] or ["ransac"])[0]
        )
    )
