"""What a hook, a pruner or a replacement sees of the reference students, and what their encoders say."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from pointcmt.adapters import find_adapter
from pointcmt.students import _blocks as blocks

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.ReLU, nn.LeakyReLU)
UNUSED = "bn_xyz_raising"  # of RS-CNN's second level, as in the public code


def layers(student: nn.Module) -> dict[str, nn.Module]:
    """Every layer that takes part, under one of its names."""
    return {
        name: module
        for name, module in student.named_modules()
        if isinstance(module, LAYERS)
        and not name.endswith(f"SA_modules.1.mlps.0.RSConvLayer0.RS_Conv.{UNUSED}")
    }


def step(student: nn.Module, points: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of a training step, without dropout."""
    student.zero_grad()
    logits = student(points)
    F.cross_entropy(logits, torch.arange(len(points)) % 3).backward()
    return logits.detach(), {n: p.grad for n, p in student.named_parameters() if p.grad is not None}


def mixed(student: nn.Module) -> nn.Module:
    """BatchNorm weights of either sign, as after training; in double precision, so that rounding shows."""
    generator = torch.Generator().manual_seed(3)
    for module in student.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.weight.data.uniform_(-0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.1, generator=generator)
    return student.double()


def test_every_layer_is_called_once_it_is_hooked(small, clouds):
    points = clouds(4).double()
    student = mixed(small(3, dropout=0.0))
    twin = copy.deepcopy(student)
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str):
        def hook(_: nn.Module, inputs: tuple, output: Tensor) -> None:
            seen[name] = inputs[0].detach(), output.detach().clone()

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in layers(twin).items()]
    expected, gradients = step(student, points)
    got, others = step(twin, points)
    assert set(seen) == set(layers(twin))
    torch.testing.assert_close(got, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-6, atol=1e-8, msg=name)
    for name, value in student.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[name], value, msg=name)
    for name, module in layers(twin).items():
        given, output = seen[name]
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            assert given.dim() == (3 if isinstance(module, nn.Conv1d) else 4), name
            assert given.shape[1] == module.in_channels and output.shape[1] == module.out_channels, name
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            assert given.shape[1] == module.num_features and output.shape == given.shape, name
    seen.clear()
    with torch.no_grad():
        torch.testing.assert_close(twin.eval()(points), student.eval()(points))
    assert set(seen) == set(layers(twin))
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(twin(points), student(points))


def test_a_global_hook_sees_every_layer(small, clouds):
    student = small(3)
    called = set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.add(module))
    try:
        student(clouds(4))
    finally:
        handle.remove()
    assert set(layers(student).values()) <= called


class LowRank(nn.Module):
    """What an adapter of weights does to a convolution or a linear layer: a wrapper around it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        size = layer.weight.shape
        self.down = nn.Parameter(torch.randn(2, size[1], dtype=layer.weight.dtype) * 0.3)
        self.up = nn.Parameter(torch.randn(size[0], 2, dtype=layer.weight.dtype) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        equation = "b...c,rc,or->b...o" if isinstance(self.layer, nn.Linear) else "bc...,rc,or->bo..."
        return self.layer(x) + torch.einsum(equation, x, self.down, self.up)


def test_a_replaced_layer_is_called_with_the_same_result_as_changed_weights(small, clouds):
    points = clouds(4).double()
    torch.manual_seed(0)
    student = mixed(small(3, dropout=0.0))
    wrapped = copy.deepcopy(student)
    for name, module in list(layers(wrapped).items()):
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
            wrapper = LowRank(module)
            wrapped.set_submodule(name, wrapper)
            change = (wrapper.up @ wrapper.down).detach()
            weight = student.get_submodule(name).weight
            weight.data += change.view_as(weight)
    expected, gradients = step(student, points)
    got, others = step(wrapped, points)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)
    assert all(value.grad is not None for name, value in wrapped.named_parameters() if value.requires_grad)
    for name in layers(student):
        if isinstance(student.get_submodule(name), nn.Conv1d | nn.Conv2d | nn.Linear):
            torch.testing.assert_close(
                others[f"{name}.layer.weight"], gradients[f"{name}.weight"], rtol=1e-5, atol=1e-7, msg=name
            )


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


@pytest.mark.parametrize("way", ["pruned", "parametrized"])
def test_pruning_and_parametrisations_are_computed_anew(way, small, clouds):
    points = clouds(4).double()
    student = mixed(small(3, dropout=0.0))
    changed = copy.deepcopy(student)
    for name, module in list(layers(changed).items()):
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
            if way == "pruned":
                prune.l1_unstructured(module, "weight", 0.3)
                student.get_submodule(name).weight.data = module.weight.detach().clone()
            else:
                parametrize.register_parametrization(module, "weight", Halved())
                student.get_submodule(name).weight.data /= 2
    for _ in range(2):  # the second step after a change of the original weights
        expected, _ = step(student, points)
        got, _ = step(changed, points)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)
        for name in layers(student):
            module, other = student.get_submodule(name), changed.get_submodule(name)
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
                original = other.weight_orig if way == "pruned" else other.parametrizations.weight.original
                with torch.no_grad():
                    original *= 1.5
                    module.weight *= 1.5


def test_synchronised_batch_norm_still_runs(small, clouds):
    points = clouds(4)
    student = small(3).eval()
    expected = student(points)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(student)).eval()
    assert not any(type(module) in (nn.BatchNorm1d, nn.BatchNorm2d) for module in converted.modules())
    torch.testing.assert_close(converted(points), expected, rtol=1e-4, atol=1e-5)


def test_what_is_plain():
    layer = nn.Conv2d(3, 4, 1)
    assert blocks.is_plain(layer) and blocks.is_plain(nn.ReLU(), nn.BatchNorm2d(3))
    assert not blocks.is_plain(layer, nn.Identity()), "another class"
    for register in (layer.register_forward_hook, layer.register_forward_pre_hook):
        handle = register(lambda *_: None)
        assert not blocks.is_plain(layer)
        handle.remove()
    handle = layer.register_full_backward_hook(lambda *_: None)
    assert not blocks.is_plain(layer)
    handle.remove()
    assert blocks.is_plain(layer)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    assert not blocks.is_plain(layer)


def test_the_encoder_says_what_the_head_reads(small, clouds):
    points = clouds(4, 96)
    student = small(3).eval()
    global_, local, centers = student.encode(points)
    assert torch.equal(student.head(global_), student(points))
    assert local.shape[:2] == centers.shape[:2] and centers.shape[2] == 3
    # every centre is one of the points
    assert (centers[:, :, None] == points[:, None]).all(-1).any(-1).all()
    if type(student).__name__ in ("DGCNN", "PointMLP"):  # pool nothing but the local features
        torch.testing.assert_close(global_[:, : local.shape[2]], local.amax(1))


def test_the_adapter_taps_what_the_encoder_says(small, variant, clouds):
    points = clouds(3, 96)
    student = small(3).eval()
    tap = find_adapter(student).local
    seen = []
    tapped = student.get_submodule(tap.path(student))
    tapped.register_forward_hook(
        lambda _, inputs, output: seen.append(tap.select(student, output, (points,)))
    )
    student(points)
    _, local, centers = student.encode(points)
    assert torch.equal(seen[0][0], local) and torch.equal(seen[0][1], centers)
    if variant == "dgcnn":  # one feature per point: they follow the order of the points
        order = torch.randperm(96, generator=torch.Generator().manual_seed(1))
        turned = student.encode(points[:, order])
        torch.testing.assert_close(turned.local, local[:, order], rtol=1e-4, atol=1e-5)
        assert torch.equal(turned.centers, centers[:, order])


STAGES = {
    "pointnet2": ("sa1", "sa2", "sa3"),
    "dgcnn": ("conv1", "conv2", "conv3", "conv4"),
    "rscnn": ("SA_modules.0", "SA_modules.1", "SA_modules.2"),
    "pointmlp": tuple(f"pos_blocks_list.{i}" for i in range(4)),
    "pointnext": tuple(f"encoder.encoder.{i}.0" for i in range(6)),
}


def test_a_hook_sees_centres_and_features_of_every_stage(small, variant, clouds):
    student = small(3)
    seen = {}
    for name in STAGES[variant.split("-")[0]]:
        student.get_submodule(name).register_forward_hook(
            lambda _, inputs, output, name=name: seen.update({name: (inputs, output)})
        )
    student(clouds(4))
    assert tuple(seen) == STAGES[variant.split("-")[0]]
    for inputs, (centres, features) in seen.values():
        assert inputs[0].shape[2] == centres.shape[2] == 3
        assert features.shape[:2] == centres.shape[:2]
