"""A LightningModule trains with PointCMT by a callback alone."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from pointcmt.methods import PointCMT
from tests.toys import Generator, Student, Teacher, batch, hooks

lightning = pytest.importorskip("lightning.pytorch", reason="needs Lightning: pip install lightning")
PointCMTCallback = pytest.importorskip("pointcmt.integrations.lightning").PointCMTCallback

LR = 0.1


class Inside(lightning.LightningModule):
    """Holds the network as ``model``; validates too."""

    def __init__(self, student, form: str = "tensor"):
        super().__init__()
        self.model, self.form, self.validated = student, form, 0

    def training_step(self, batch, index):
        loss = F.cross_entropy(self.model(batch["points"]), batch["labels"])
        return {"tensor": loss, "mapping": {"loss": loss, "other": 1}, "none": None}[self.form]

    def validation_step(self, batch, index):
        self.model(batch["points"])
        self.validated += 1

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), LR)


class Itself(lightning.LightningModule):
    """Is the network."""

    def __init__(self, student):
        super().__init__()
        self.encoder, self.norm, self.neck, self.head = (
            student.encoder,
            student.norm,
            student.neck,
            student.head,
        )

    def forward(self, points):
        return self.head(F.leaky_relu(self.neck(self.norm(self.encoder(points).amax(1))), 0.2))

    def training_step(self, batch, index):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), LR)


@pytest.fixture
def teacher():
    torch.manual_seed(400)
    return Teacher()


@pytest.fixture
def generator():
    torch.manual_seed(401)
    return Generator()


def make():
    torch.manual_seed(402)
    return Student()


def batches():
    return [batch(410 + step) for step in range(3)]


def named(parts):
    return {"points": parts[0], "labels": parts[1], "views": parts[2]}


def fit(module, callback, data, tmp_path, **options):
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **options,
    )
    loader = DataLoader(data, batch_size=None)
    trainer.fit(module, loader, loader if hasattr(module, "validated") else None)
    return trainer


@pytest.fixture
def expected(teacher, generator):
    student = make()
    optimizer = torch.optim.SGD(student.parameters(), LR)
    with PointCMT(teacher, student, generator=generator) as cmt:
        for points, labels, views in batches():
            optimizer.zero_grad()
            (F.cross_entropy(student(points), labels) + cmt.loss(views=views)).backward()
            optimizer.step()
    return student.state_dict(), cmt.losses


def assert_trained(student, expected):
    for name, tensor in expected[0].items():
        torch.testing.assert_close(student.state_dict()[name], tensor, msg=name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["tensor", "mapping"])
def test_the_module_trains_as_by_hand_and_is_left_as_it_was(form, teacher, generator, expected, tmp_path):
    student = make()
    module = Inside(student, form)
    callback = PointCMTCallback(teacher, generator=generator, student="model")
    trainer = fit(module, callback, [named(parts) for parts in batches()], tmp_path)
    assert_trained(student, expected)
    assert module.validated > 0
    for name, value in expected[1].items():
        assert trainer.callback_metrics[f"pointcmt/{name}"].item() == pytest.approx(value, rel=1e-4)
    assert hooks(student) == 0
    assert "training_step" not in module.__dict__
    assert callback.training is None
    assert teacher.training


@pytest.mark.filterwarnings("ignore")
def test_a_module_that_is_the_network(teacher, generator, expected, tmp_path):
    student = make()
    module = Itself(student)
    callback = PointCMTCallback(teacher, generator=generator, images=lambda batch: {"views": batch[2]})
    fit(module, callback, batches(), tmp_path)
    assert_trained(student, expected)
    assert hooks(module) == 0


@pytest.mark.filterwarnings("ignore")
def test_a_failure_leaves_nothing_behind(teacher, generator, tmp_path):
    student = make()
    module = Inside(student)
    callback = PointCMTCallback(teacher, generator=generator, student="model")
    data = [named(parts) for parts in batches()]
    del data[1]["views"]
    with pytest.raises(ValueError, match=r"cannot find the images in the batch \(keys points, labels\)"):
        fit(module, callback, data, tmp_path)
    assert hooks(student) == 0
    assert "training_step" not in module.__dict__
    assert teacher.training


@pytest.mark.filterwarnings("ignore")
def test_manual_optimization_is_explained(teacher, generator, tmp_path):
    module = Inside(make())
    module.automatic_optimization = False
    with pytest.raises(ValueError, match="with PointCMT"):
        fit(module, PointCMTCallback(teacher, generator=generator), [named(p) for p in batches()], tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_a_skipped_batch_is_skipped(teacher, generator, tmp_path):
    student = make()
    before = {name: tensor.clone() for name, tensor in student.named_parameters()}
    fit(
        Inside(student, "none"),
        PointCMTCallback(teacher, generator=generator, student="model"),
        [named(parts) for parts in batches()],
        tmp_path,
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in student.named_parameters())
