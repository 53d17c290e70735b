"""One of two processes of tests/test_students_ddp.py: every student and method, three steps under DDP."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from pointcmt import ImageTeacher, PointCMT, students
from pointcmt.distributed import leave
from pointcmt.generator import PointGenerator
from pointcmt.methods import CrossPoint, MMPoint, PicAtPoint
from pointcmt.methods.unused import freeze_unused
from pointcmt.objectives import ClassifierEnhancement, FeatureEnhancement, SoftLabels, SoftmaxRegression
from pointcmt.views import ViewSpec

CLASSES, FEATURE, POINTS, BATCH = 5, 16, 96, 4
SMALL = {
    "pointnet2": {"npoints": (32, 8), "nsamples": (8, 8)},
    "dgcnn": {"k": 6, "embedding": 64},
    "rscnn": {"npoints": (32, 8), "nsamples": (8, 8)},
    "pointmlp": {"variant": "elite", "points": POINTS, "k": 6},
    "pointnext": {},
}


def networks() -> list[str]:
    return [name for name in SMALL if hasattr(students, name)]


def encoder(classes: int | None) -> ImageTeacher:
    torch.manual_seed(1)
    return ImageTeacher(
        classes,
        "simpleview_resnet",
        in_chans=1,
        feature_dim=FEATURE,
        backbone_options={"width": 0.0625, "layers": [1, 1], "stem_kernel": 2, "stem_stride": 2},
        view_spec=ViewSpec(size=32),
    )


def apart(modules: list[nn.Module]) -> float:
    """Largest difference of a parameter between the two processes."""
    worst = 0.0
    for parameter in (p for module in modules for p in module.parameters()):
        other = parameter.detach().clone()
        distributed.broadcast(other, 0)
        worst = max(worst, float((other - parameter.detach()).abs().max()))
    return worst


def three_steps(name: str, method: str) -> dict[str, float]:
    torch.manual_seed(0)
    network = getattr(students, name)(CLASSES, width=0.125, feature_dim=FEATURE, **SMALL[name])
    rank = distributed.get_rank()
    sample = torch.randn(2, POINTS, 3, generator=torch.Generator().manual_seed(3)).clamp(-1, 1)
    if method != "pointcmt":
        freeze_unused(network, sample)  # the classifier, which pre-training does not reach
    wrapped = DistributedDataParallel(network)
    if method == "pointcmt":
        context = PointCMT(
            encoder(CLASSES),
            wrapped,
            generator=PointGenerator(FEATURE, 16),
            objectives=[
                FeatureEnhancement(1.0),
                ClassifierEnhancement(0.1),
                SoftLabels(1.0),
                SoftmaxRegression(1.0, FEATURE, FEATURE),
            ],
        )
    else:
        kind = {"pic_at_point": PicAtPoint, "mm_point": MMPoint, "crosspoint": CrossPoint}[method]
        options = {"views": 6} if method == "mm_point" else {}
        context = kind(encoder(None), wrapped, points=sample, **options)
    with context as cmt:
        optimizer = torch.optim.Adam([*network.parameters(), *cmt.parameters()], lr=1e-3)
        for step in range(3):
            random = torch.Generator().manual_seed(10 * step + rank)
            points = torch.randn(BATCH, POINTS, 3, generator=random).clamp(-1, 1)
            labels = torch.randint(CLASSES, (BATCH,), generator=random)
            views = encoder(None).project(points, cameras=True)
            logits = wrapped(torch.cat([points] * cmt.copies))
            loss = cmt.loss(views=views)
            if method == "pointcmt":
                loss = loss + F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        trained = [network, *cmt._trained_modules().values()]
        return {"loss": loss.item(), "apart": apart(trained)}


def main() -> None:
    distributed.init_process_group("gloo")
    methods = ("pointcmt", "pic_at_point", "mm_point", "crosspoint")
    results: dict[str, dict[str, float]] = {}
    for name in networks():
        # every student under the method that uses all of it; every method on one that has all it needs
        for method in methods if name == "dgcnn" else methods[:1]:
            results[f"{name} {method}"] = three_steps(name, method)
    Path(sys.argv[1], f"{distributed.get_rank()}.json").write_text(json.dumps(results))
    distributed.barrier()
    leave(0)


main()
