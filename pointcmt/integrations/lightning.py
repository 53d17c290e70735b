"""PointCMT for Lightning: a callback, so that a LightningModule trains with it without an edit."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from pointcmt.adapters import Adapter, list_adapters
from pointcmt.methods import PointCMT
from pointcmt.objectives import Objective
from pointcmt.types import TeacherOutput

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:
    try:
        from pytorch_lightning import Callback, LightningModule, Trainer  # type: ignore[assignment]
    except ImportError as error:
        raise ImportError("pointcmt.integrations.lightning needs Lightning: pip install lightning") from error

Images = Mapping[str, Tensor | TeacherOutput]


def images_of(batch: Any) -> Images:
    """``views`` or ``image_features`` of a batch that is a mapping: the callback's default.

    Raises:
        ValueError: the batch is no mapping, or has neither.
    """
    if isinstance(batch, Mapping):
        for key in ("image_features", "views"):
            if key in batch:
                return {key: batch[key]}
    described = f"keys {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
    raise ValueError(
        f"cannot find the images in the batch ({described}); give PointCMTCallback images=<function from the "
        "batch to {'views': tensor} or {'image_features': tensor}>"
    )


class PointCMTCallback(Callback):
    """Enters PointCMT when training starts, adds its loss to that of ``training_step``, leaves at the end.

    ::

        callback = PointCMTCallback(
            teacher, generator="generator.safetensors", images=lambda batch: {"views": batch[2]}
        )
        Trainer(callbacks=[callback]).fit(module, loader)

    The losses are logged as ``pointcmt/<name>``. The module is left also when training fails or is
    interrupted.

    Args:
        teacher: image teacher.
        generator: trained point generator, or the path of its file.
        images: batch -> ``{"views": [B, V, C, H, W]}`` or ``{"image_features": [B, D]}``, the images of the
            shapes of that batch. By default the batch is a mapping with such a key.
        student: path of the network inside the LightningModule (``"model"``), where ``training_step`` calls
            that. None: the child that a registered adapter describes, if it is the only one, else the
            LightningModule itself, which ``training_step`` must then call as ``self(points)``.
        adapter: as in ``PointCMT``.
        objectives: as in ``PointCMT``. Parameters that they train belong into ``configure_optimizers``.

    Raises:
        ValueError: manual optimization; a ``training_step`` without a loss; no images in the batch.
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        generator: nn.Module | str | os.PathLike[str] | None = None,
        images: Callable[[Any], Images] = images_of,
        student: str | None = None,
        adapter: Adapter | str | None = None,
        objectives: Iterable[Objective] | None = None,
    ) -> None:
        super().__init__()
        self._arguments = {"generator": generator, "adapter": adapter, "objectives": objectives}
        self._teacher = teacher
        self._images = images
        self._path = student
        self._module: LightningModule | None = None
        self.training: PointCMT | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"{type(pl_module).__name__} optimizes manually, so there is no returned loss to add to; use "
                "`with PointCMT(...) as cmt` in its training loop and add cmt.loss(...) there"
            )
        student = self._student(pl_module)
        self.training = PointCMT(self._teacher, student, **self._arguments)  # type: ignore[arg-type]
        self.training.__enter__()
        self._module = pl_module
        pl_module.__dict__["training_step"] = self._with_images(pl_module.training_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._leave(exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._leave()

    def _leave(self, error: BaseException | None = None) -> None:
        training, module = self.training, self._module
        self.training = self._module = None
        if module is not None:
            module.__dict__.pop("training_step", None)
        if training is not None:
            training.__exit__(None if error is None else type(error), error, None)

    def _student(self, module: LightningModule) -> nn.Module:
        if self._path is not None:
            return module.get_submodule(self._path)
        parts = [module, *module.children()]
        known = [part for part in parts if any(adapter.describes(part) for adapter in list_adapters())]
        return known[0] if len(known) == 1 else module

    def _with_images(self, training_step: Callable) -> Callable:
        @functools.wraps(training_step)
        def step(*args: Any, **kwargs: Any) -> Any:
            output = training_step(*args, **kwargs)
            training, module = self.training, self._module
            if output is None or training is None or module is None:  # a skipped batch has no loss
                return output
            batch = args[0] if args else kwargs["batch"]
            extra = training.loss(**self._images(batch))  # type: ignore[arg-type]
            module.log_dict({f"pointcmt/{name}": value for name, value in training.loss_tensors.items()})
            if isinstance(output, Tensor):
                return output + extra
            if isinstance(output, Mapping) and isinstance(output.get("loss"), Tensor):
                return {**output, "loss": output["loss"] + extra}
            raise ValueError(
                f"{type(module).__name__}.training_step returned a {type(output).__name__}; expected a loss, "
                "or a mapping with the loss under 'loss'"
            )

        return step
