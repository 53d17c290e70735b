"""CMIGNet: shapes, switches, symmetry, the matching head's two forms, losses, memory, saving."""

from __future__ import annotations

import math

import pytest
import torch

from pointcmt.registration import CMIGNet, LossWeights, registration_loss
from pointcmt.registration import model as model_module
from pointcmt.registration.layers import Attention, FeatureMatcher, PointEncoder
from pointcmt.registration.losses import match_loss, nt_xent, overlap_contrast
from pointcmt.registration.model import draw_keypoints
from pointcmt.registration.pieces import in_pieces

SMALL = {"width": 0.06, "keypoints": 24, "iterations": 2, "size": 16, "k": 8}


def clouds(batch: int = 2, points: int = 60, seed: int = 0) -> torch.Tensor:
    random = torch.randn(batch, points, 3, generator=torch.Generator().manual_seed(seed))
    return random / random.norm(dim=-1).amax(1)[:, None, None]


def turn(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = torch.tensor(0.8), torch.tensor(0.6)
    rotation = torch.stack([cos, -sin, cos * 0, sin, cos, cos * 0, cos * 0, cos * 0, cos / cos]).view(3, 3)
    return rotation.expand(batch, 3, 3), torch.tensor([0.1, -0.2, 0.3]).expand(batch, 3)


def network(**options: object) -> CMIGNet:
    torch.manual_seed(0)
    return CMIGNet(**{**SMALL, **options})


def images(model: CMIGNet, points: torch.Tensor) -> torch.Tensor:
    assert model.views is not None
    return model.views.render(points)


def test_the_encoder_has_the_public_codes_parameters():
    assert sum(p.numel() for p in PointEncoder(512).parameters()) == 242_688


def test_a_registration_is_a_motion_with_its_correspondences():
    model, source, target = network().eval(), clouds(), clouds(points=50, seed=1)
    with torch.no_grad():
        found = model(source, target)
    assert found.trace is None
    assert found.rotation.shape == (2, 3, 3) and found.translation.shape == (2, 3)
    torch.testing.assert_close(torch.linalg.det(found.rotation), torch.ones(2))
    assert found.correspondences.shape == (2, 24, 2) and found.weights.shape == (2, 24)
    torch.testing.assert_close(found.weights.sum(1), torch.ones(2))
    assert (found.weights > 0).sum(1).min() >= 12 and (found.weights == 0).any()
    assert int(found.correspondences[..., 0].max()) < 60 and int(found.correspondences[..., 1].max()) < 50


def test_a_pair_does_not_depend_on_the_others_of_its_batch_nor_on_the_order_of_points():
    model, source, target = network().eval(), clouds(4), clouds(4, seed=1)
    with torch.no_grad():
        whole, one = model(source, target), model(source[2:3], target[2:3])
        shuffled = model(source[:, torch.randperm(60)], target[:, torch.randperm(60)])
    torch.testing.assert_close(whole.rotation[2:3], one.rotation, atol=1e-4, rtol=0)
    torch.testing.assert_close(whole.translation, shuffled.translation, atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_matching_heads_first_layer_on_points_is_that_on_pairs(dtype):
    torch.manual_seed(0)
    head = FeatureMatcher(32, 0.25).to(dtype)
    source = torch.randn(2, 20, 32, dtype=dtype, requires_grad=True)
    target = torch.randn(2, 30, 32, dtype=dtype)
    fast, slow = head(source, target), head.naive(source, target)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(fast, slow, atol=tolerance, rtol=0)
    gradients = [torch.autograd.grad(out.square().sum(), source)[0] for out in (fast, slow)]
    torch.testing.assert_close(*gradients, atol=30 * tolerance, rtol=1e-4)
    # equal features: no direction, and no noise blown up by a division by 0
    same = head(target[:, :5], target[:, :5]).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(
        same, head.naive(target[:, :5], target[:, :5]).diagonal(dim1=1, dim2=2), atol=0.02, rtol=0
    )


def test_attention_to_few_rows_is_attention():
    torch.manual_seed(0)
    attention = Attention(32, 4)
    x, memory = torch.randn(2, 50, 32, requires_grad=True), torch.randn(2, 3, 32, requires_grad=True)
    few = attention(x, memory)
    torch.testing.assert_close(few, attention.to_few(x, memory), atol=0, rtol=0)
    whole = attention(x, memory.repeat(1, 2, 1))  # twice each: another way, and the same weights
    torch.testing.assert_close(few, whole, atol=1e-5, rtol=1e-4)
    gradients = [torch.autograd.grad(out.square().sum(), (x, memory)) for out in (few, whole)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"images": "none"},
        {"images": "canonical"},
        {"fusion": False},
        {"mask": False},
        {"credibility": False},
        {"iterations": 1},
        {"views": 2, "rig": "ring12"},
    ],
)
def test_every_switch_trains_every_parameter_it_leaves(options):
    model, source = network(**options).train(), clouds()
    truth = turn()
    target = source.flip(1) @ truth[0].mT + truth[1][:, None]
    given = images(model, source) if model.images == "canonical" else None
    losses = registration_loss(model(source, target, given, truth), source, target, truth)
    losses["loss"].backward()
    assert torch.isfinite(losses["loss"])
    assert ("cross_modal" in losses) == (model.views is not None)
    assert ("significance" in losses) == (model.significance is not None)
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # a bias added to all keys of an attention has no effect, softmax takes it out; and a residual block of
    # the views' network starts with a last norm of 0
    idle = [name for name in idle if "bias" not in name and "backbone.stages" not in name]
    assert not idle
    with torch.no_grad():
        assert torch.isfinite(model.eval()(source, target, given).rotation).all()


def test_images_take_part_and_can_be_given():
    model, source, target = network().eval(), clouds(), clouds(seed=1)
    own = (images(model, source), images(model, target))
    with torch.no_grad():
        rendered, given = model(source, target), model(source, target, own)
        other = model(source, target, tuple(torch.zeros_like(part) for part in own))
    torch.testing.assert_close(rendered.rotation, given.rotation)
    assert not torch.allclose(rendered.rotation, other.rotation) or not torch.allclose(
        rendered.weights, other.weights
    )


def test_the_loss_falls():
    model, source = network(iterations=1).train(), clouds(4)
    truth = turn(4)
    target = source @ truth[0].mT + truth[1][:, None]
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    first = last = None
    for _ in range(15):
        loss = registration_loss(model(source, target, None, truth), source, target, truth)
        optimizer.zero_grad()
        loss["loss"].backward()
        optimizer.step()
        first, last = first or loss, loss
    assert last["match"] < first["match"] and last["loss"] < 0.9 * first["loss"]


def test_keypoints_of_a_training_step_are_half_with_a_counterpart():
    source = clouds(points=100)
    target = torch.cat([source[:, :50], source[:, :50] + 10], 1)
    truth = torch.eye(3).expand(2, 3, 3), torch.zeros(2, 3)
    (rows, partners), matched = draw_keypoints(source, target, truth, 40)
    assert [len(set(row.tolist())) for row in rows] == [40, 40]
    assert matched[:, :20].all() and 0 <= int(matched[:, 20:].sum()) <= 20
    exact = rows < 50
    assert torch.equal(rows[exact], partners[exact]) and matched[exact].all()


def test_nt_xent_is_that_of_lightly():
    lightly = pytest.importorskip("lightly.loss", reason="lightly is the peer of this test")
    a, b = clouds(1, 6).squeeze(0), clouds(1, 6, seed=1).squeeze(0)
    torch.testing.assert_close(nt_xent(a, b), lightly.NTXentLoss(temperature=0.1)(a, b))
    assert float(nt_xent(torch.ones(6, 3), torch.ones(6, 3))) == pytest.approx(2.3979, abs=1e-3)  # ln 11


def test_overlap_contrast_is_least_for_features_that_say_where_a_point_is():
    points = clouds(2, 80)
    torch.manual_seed(0)
    code = torch.randn(3, 64) * 8
    sure = torch.cat([(points @ code).sin(), (points @ code).cos()], -1)
    alike = torch.ones(2, 80, 128)
    noise = torch.randn(2, 2, 80, 128)
    features = ((sure, sure), (alike, alike), tuple(noise))
    losses = [float(overlap_contrast(*both, points, points)) for both in features]
    assert losses[0] < 0.3 * min(losses[1:])
    # no overlap at all: no positive, no loss, a gradient of 0
    features = sure.clone().requires_grad_()
    nothing = overlap_contrast(features, sure, points, points + 5)
    nothing.backward()
    assert float(nothing) == 0 and torch.isfinite(features.grad).all()


def test_columns_of_one_target_point_count_together():
    logits = torch.tensor([[[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]])
    same = torch.tensor([[[True, True, False], [True, True, False], [False, False, True]]])
    one = match_loss(logits, same, torch.tensor([[True, False, False]]))
    assert float(one) == pytest.approx(-math.log(2 * math.e / (2 * math.e + 1)))
    assert float(match_loss(logits, same, torch.zeros(1, 3, dtype=torch.bool))) == 0


def test_what_training_keeps_stays_below_half_a_gigabyte_at_batch_8(monkeypatch):
    """Of the paper's network; benchmarks/registration_cost.py measures what the whole process takes."""
    kept: dict[int, int] = {}
    alive = []  # a storage that is freed gives its address to another

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        alive.append(storage)
        return tensor

    # a fourth of the batch, and a fourth of the limit: what is kept is in proportion
    monkeypatch.setattr(model_module, "KEPT_NUMBERS", model_module.KEPT_NUMBERS // 4)
    model = CMIGNet(keypoints=256).train()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    source, truth = clouds(2, 768), turn()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(source, source, None, truth)
    size = 4 * sum(size for pointer, size in kept.items() if pointer not in parameters)
    assert 1e8 < size < 5e8, f"{size / 1e6:.0f} MB"


def test_a_translation_changes_nothing_but_the_translation():
    model, source, target = network().eval(), clouds(), clouds(seed=1)
    shifts = torch.tensor([[0.5, -2.0, 1.0]]), torch.tensor([[3.0, 0.0, -0.5]])
    with torch.no_grad():
        here, there = model(source, target), model(source + shifts[0], target + shifts[1])
    torch.testing.assert_close(here.rotation, there.rotation, atol=1e-3, rtol=0)
    expected = here.translation + shifts[1] - shifts[0] @ here.rotation[0].mT
    torch.testing.assert_close(there.translation[:1], expected[:1], atol=1e-3, rtol=0)


def test_what_is_computed_in_pieces_is_that_computed_at_once(monkeypatch):
    source, truth = clouds().double(), tuple(part.double() for part in turn())
    target = source.flip(1) @ truth[0].mT + truth[1][:, None]
    results, calls = [], []
    monkeypatch.setattr(
        model_module, "in_pieces", lambda *given: calls.append(len(given[1])) or in_pieces(*given)
    )
    for limit in (2**26, 32_000):
        monkeypatch.setattr(model_module, "KEPT_NUMBERS", limit)
        model = network().double().train()
        given = tuple(images(model, cloud.float()).double() for cloud in (source, target))
        torch.manual_seed(1)
        loss = registration_loss(model(source, target, given, truth), source, target, truth)["loss"]
        loss.backward()
        with torch.no_grad():
            found = model.eval()(source, target, given).rotation
        gradients = {name: p.grad for name, p in model.named_parameters()}
        results.append({"loss": loss.detach(), "rotation": found, **gradients})
        calls.append(0)
    # at once; then fusion (2 + 2 of 2 pairs) and matching (1 + 2 of rows), in training and without gradient
    assert calls[0] == 0 and calls[1:5] == [2, 2, 2, 2] and min(calls[5:8]) > 4
    for name, one in results[0].items():
        torch.testing.assert_close(one, results[1][name], atol=1e-7, rtol=1e-5, msg=name)


def test_a_function_in_pieces_has_its_gradient_and_precision():
    random = torch.Generator().manual_seed(0)
    rows, others = torch.randn(3, 7, 4, generator=random), torch.randn(3, 5, 4, generator=random)
    weight, idle = torch.randn(4, generator=random), torch.ones(2)
    for tensor in (rows, others, weight, idle):
        tensor.requires_grad_()
    pieces = [(slice(b, b + 1), slice(r, r + 3)) for b in range(3) for r in (0, 3, 6)]
    seen = []

    def function(a, b):
        product = (a * weight) @ b.mT
        seen.append((len(a), a.shape[1], product.dtype))
        return product, a.float().sin()

    given = rows, others, weight
    for precision in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision):
            found = in_pieces(function, pieces, [rows], [others], [weight, idle])
            expected = function(rows, others)
        dtype = torch.bfloat16 if precision else torch.float32
        assert [x.dtype for x in found] == [dtype, torch.float32] and found[0].shape == (3, 7, 5)
        gradients = []
        for first, second in (found, expected):
            gradients.append(torch.autograd.grad(first.float().square().sum() + second.sum(), given))
        tolerance = {"atol": 0.1, "rtol": 0.02} if precision else {"atol": 1e-5, "rtol": 1e-5}
        for one, other in zip((*found, *gradients[0]), (*expected, *gradients[1]), strict=True):
            torch.testing.assert_close(one, other, **tolerance)
    assert [piece[:2] for piece in seen[:9]] == [(1, 3), (1, 3), (1, 1)] * 3
    # computed again in the backward pass, in the precision of the forward pass
    assert len(seen) == 2 * (9 + 1 + 9) and seen[-1][2] == torch.bfloat16


def test_scores_of_the_keypoints_are_theirs_among_all_points():
    model, source, truth = network().train(), clouds(points=80), turn()
    target = source.flip(1) @ truth[0].mT + truth[1][:, None]
    trace = model(source, target, None, truth).trace
    centred = [x - x.mean(1, keepdim=True) for x in (source, target)]
    fused = model._fuse(*model._encode(*centred), *model._tokens(*centred, None))
    every = [model.significance(own, other.amax(1)) for own, other in zip(fused, fused[::-1], strict=True)]
    rows = trace.source_index, trace.target_index
    expected = [scores.gather(1, index) for scores, index in zip(every, rows, strict=True)]
    found = [trace.source_scores, trace.target_scores]
    layers = [model.significance.own.weight, model.fusion.across.out.weight, model.encoder.fuse.weight]
    gradients = [torch.autograd.grad(sum(x.square().sum() for x in xs), layers) for xs in (found, expected)]
    for one, other in zip((*found, *gradients[0]), (*expected, *gradients[1]), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_the_overlap_contrast_is_its_formula():
    """In a loop, with all features normalised first."""
    points, features = clouds(2, 40), [torch.randn(2, 40, 16, requires_grad=True) for _ in range(2)]
    aligned = points + 0.03 * torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(3))
    found = overlap_contrast(*features, aligned, points)
    a, b = (torch.nn.functional.normalize(x, dim=-1) for x in features)
    terms = []
    for pair in range(2):
        term = []
        for i in range(40):
            distances = (points[pair] - aligned[pair, i]).norm(dim=1)
            j = int(distances.argmin())
            if distances[j] >= 0.05:
                continue
            wrong = (b[pair] @ a[pair, i]).masked_fill(distances < 0.1, -9).argmax()
            back = (points[pair, j] - aligned[pair]).norm(dim=1) < 0.1
            other = (a[pair] @ b[pair, j]).masked_fill(back, -9).argmax()
            apart = [
                (x - y).norm()
                for x, y in (
                    (a[pair, i], b[pair, j]), (a[pair, i], b[pair, wrong]), (b[pair, j], a[pair, other])
                )
            ]  # fmt: skip
            repelled = sum((1.4 - d).clamp(min=0) ** 2 for d in apart[1:]) / 2
            term.append((apart[0] - 0.1).clamp(min=0) ** 2 + repelled)
        terms.append(torch.stack(term).mean())
    expected = torch.stack(terms).mean()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    for one, other in zip(*(torch.autograd.grad(x, features) for x in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_a_saved_network_is_complete_by_itself(tmp_path):
    model, source, target = network(mask=False).eval(), clouds(), clouds(seed=1)
    model.save(tmp_path / "net.safetensors")
    again = CMIGNet.load(tmp_path / "net.safetensors")
    with torch.no_grad():
        assert torch.equal(model(source, target).rotation, again(source, target).rotation)
    assert not again.training


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        (torch.zeros(1, 9, 2), torch.zeros(1, 9, 3), "source must be"),
        (torch.zeros(1, 2, 3), torch.zeros(1, 9, 3), "at least 3"),
        (torch.zeros(1, 9, 3), torch.full((1, 9, 3), torch.nan), "target holds a NaN"),
        (torch.zeros(2, 9, 3), torch.zeros(1, 9, 3), "expected as many"),
    ],
)
def test_bad_clouds_are_named(source, target, words):
    with pytest.raises(ValueError, match=words):
        network().eval()(source, target)


def test_mistakes_in_use_are_named():
    model, source = network(), clouds()
    with pytest.raises(ValueError, match=r"\.eval\(\)"):
        model.train()(source, source)
    with pytest.raises(ValueError, match=r"\.train\(\)"):
        model.eval()(source, source, None, turn())
    with pytest.raises(ValueError, match="images must be a pair"):
        model(source, source, images(model, source))
    with pytest.raises(ValueError, match="expected \\[2, 6, 1, 16, 16\\]"):
        model(source, source, (images(model, source), torch.zeros(2, 6, 1, 8, 8)))
    with pytest.raises(ValueError, match="complete object"):
        network(images="canonical").eval()(source, source)
    with pytest.raises(ValueError, match="images='none'"):
        network(images="none").eval()(source, source, images(model, source))
    with pytest.raises(ValueError, match="trace"):
        registration_loss(model(source, source), source, source, turn())
    for options in ({"images": "rendered"}, {"keypoints": 2}, {"views": 7}, {"width": 0.0}):
        with pytest.raises(ValueError):
            CMIGNet(**options)
    found = network().train()(source, source, None, turn())
    with pytest.raises(ValueError, match="no term"):
        registration_loss(found, source, source, turn(), LossWeights(0, 0, 0, 0, 0))


def test_identical_and_collapsed_clouds_have_a_pose():
    model = network().eval()
    with torch.no_grad():
        for cloud in (
            clouds(),
            torch.zeros(2, 30, 3),
            torch.linspace(0, 1, 30)[None, :, None].expand(2, 30, 3),
        ):
            found = model(cloud, cloud)
            assert torch.isfinite(found.rotation).all()
            torch.testing.assert_close(torch.linalg.det(found.rotation), torch.ones(2))
