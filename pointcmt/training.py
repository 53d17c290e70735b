"""Cross-modal training of a network that already exists: capture, teach, sum the losses, clean up."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from pointcmt.adapters.registry import (
    Adapter,
    AdapterReport,
    find_adapter,
    in_precision_of,
    verify_adapter,
    verify_tail,
)
from pointcmt.borrowed import Lent, UntouchedStatistics, device_of
from pointcmt.capture import Captured, StudentCapture
from pointcmt.objectives import ClassifierEnhancement, FeatureEnhancement, Objective
from pointcmt.ops._deferred import deferred
from pointcmt.schedules import Guard
from pointcmt.types import StudentState, TeacherOutput

_active: weakref.WeakKeyDictionary[nn.Module, CrossModalTraining] = weakref.WeakKeyDictionary()


class CrossModalTraining:
    """Lets an image teacher teach a point-cloud student by any set of objectives.

    Used as a context manager around a training loop that stays as it is::

        with CrossModalTraining(teacher, student, objectives=[SoftLabels()]) as cmt:
            for points, labels, views in loader:
                loss = criterion(student(points), labels) + cmt.loss(views=views)

    Entering hooks the student; leaving, also by an exception, takes the hooks off and gives the teacher back
    in the mode and on the device it had. Nothing else of either is changed, and nothing remains.

    * Forward passes in eval mode or without gradients are ignored, so validation may go on inside the
      ``with``.
    * :meth:`loss` belongs to the latest training pass, and is called once for each.
    * On the first training pass the adapter is proved on its points (``verify_adapter``).
    * The image feature goes through the student's classifier in the student's mode: batch normalisation uses
      the statistics of these features and keeps none of them; dropout is active, and draws from the random
      generator, so that later draws differ from those of a run without the teacher.
    * Wrappers are seen through: ``DataParallel``, ``DistributedDataParallel``, ``torch.compile``, accelerate,
      Lightning Fabric. A compiled student is compiled again on entering and on leaving.
    * Losses are computed in float32 whatever the autocast state. Scale the sum by your ``GradScaler`` as
      ever.
    * Features that are NaN or infinite are an error: at once on a CPU; on a GPU, where no step waits for the
      device, at a later step or on leaving. After a forward pass in float16 it is a warning on the GPU,
      because a ``GradScaler`` skips the step.

    Args:
        teacher: ``views [B, V, C, H, W] -> TeacherOutput``, with ``classify(feature [B, D]) -> logits [B,
            K]``: an ``ImageTeacher``. It is moved to the student's device while it is used.
        student: the network to be trained, ending in a classifier; bare or wrapped.
        objectives: what to sum; names must differ.
        generator: point generator for the objectives that need one.
        adapter: where the student's feature is: an ``Adapter``, the name of one, or None to find one.
        guard: scales the weights as training goes on (``pointcmt.schedules``); None leaves them.

    Raises:
        ValueError: no objectives, equal names, or a generator missing.
        AdapterError: no adapter fits (on entering), or the one at hand is wrong (on the first training pass).
        RuntimeError: the student is in another such context.

    Attributes:
        objectives: ``nn.ModuleList``; weights may be changed between steps. An objective of weight 0 is
            skipped.
        report: what the adapter's proof measured; None before the first training pass.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        *,
        objectives: Iterable[Objective],
        generator: nn.Module | None = None,
        adapter: Adapter | str | None = None,
        guard: Guard | None = None,
    ) -> None:
        chosen = list(objectives)
        if not chosen:
            raise ValueError("objectives is empty; give at least one, for example [FeatureEnhancement()]")
        for objective in chosen:
            if not isinstance(objective, Objective):
                raise ValueError(
                    f"objectives holds a {type(objective).__name__}; expected instances of "
                    "pointcmt.objectives.Objective"
                )
        names = [objective.name for objective in chosen]
        if len(set(names)) < len(names):
            raise ValueError(
                f"objectives have equal names: {', '.join(names)}; give them name=... to tell them apart"
            )
        self.teacher = teacher
        self.student = student
        self.objectives = nn.ModuleList(chosen)
        self.guard = guard
        self.report: AdapterReport | None = None
        self._adapter = adapter
        self._generator = generator
        for objective in chosen:
            objective.bind(generator=generator, classify=self._teacher_logits)
        self._capture: StudentCapture | None = None
        self._lent: Lent | None = None
        self._statistics: UntouchedStatistics | None = None
        self._used: Captured | None = None
        self._losses: dict[str, Tensor] = {}

    # ---- entering and leaving

    def __enter__(self) -> Self:
        if self._capture is not None:
            raise RuntimeError(
                f"this {type(self).__name__} is entered already; leave it before entering it again"
            )
        adapter = find_adapter(self.student, self._adapter)
        capture = StudentCapture(self.student, adapter, self._prove, self._prove_tail)
        if capture.module in _active:
            raise RuntimeError(
                f"this {type(capture.module).__name__} is being trained in another {type(self).__name__} "
                "already: its losses would be counted twice. Leave that one first; to combine methods, give "
                "one context several objectives"
            )
        try:
            capture.open()
            self._lent = Lent(self.teacher)
        except BaseException:
            capture.close()
            raise
        _active[capture.module] = self
        self._capture = capture
        self._statistics = UntouchedStatistics(capture.module)
        self._used, self.report, self._losses = None, None, {}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        capture, lent = self._capture, self._lent
        self._capture = self._lent = self._statistics = self._used = None
        if capture is not None:
            _active.pop(capture.module, None)
            capture.close()
        if lent is not None:
            lent.give_back()
        if error is None:
            deferred.look(wait=True)
        else:
            deferred.forget()

    def _prove(self, args: tuple, kwargs: dict[str, Any]) -> None:
        capture = self._entered("the adapter's proof")
        capture.paused = True
        try:
            adapter = find_adapter(capture.module, self._adapter, points=(args, kwargs))
            self.report = verify_adapter(capture.module, args, adapter, **kwargs)
        finally:
            capture.paused = False
        capture.use(adapter)

    def _prove_tail(self, args: tuple, kwargs: dict[str, Any]) -> None:
        capture = self._entered("the adapter's proof")
        capture.paused = True
        try:
            self.report = verify_tail(capture.module, args, kwargs, capture.adapter)
        finally:
            capture.paused = False

    # ---- training

    def loss(
        self, *, views: Tensor | None = None, image_features: Tensor | TeacherOutput | None = None
    ) -> Tensor:
        """The weighted sum of the objectives for the latest training pass of the student.

        Args:
            views: [B, V, C, H, W] images of the same B shapes in the same order; the teacher runs on them.
            image_features: [B, D] what this teacher's ``encode`` gave for them, computed beforehand; or a
                ``TeacherOutput`` with its logits too. Exactly one of the two arguments is given.

        Returns:
            A scalar attached to the student's graph: add it to the task loss.

        Raises:
            RuntimeError: outside the ``with``, before a training pass, or again for the same one.
            ValueError: both or neither argument, or sizes that do not fit.
        """
        capture = self._entered("loss()")
        if (views is None) == (image_features is None):
            given = "neither" if views is None else "both"
            raise ValueError(
                f"loss() was given {given} of views and image_features; expected exactly one: views=<[B, V, "
                "C, H, W] images>, or image_features=<[B, D] features computed beforehand>"
            )
        captured = capture.captured
        if captured is None:
            raise RuntimeError(self._why_nothing_captured(capture))
        inputs = capture.take_inputs()
        if inputs is not None:
            tapped = capture.adapter
            self._prove(*inputs)
            if capture.adapter.feature_path(capture.module) != tapped.feature_path(capture.module):
                capture.clear()
                raise RuntimeError(
                    f"the generic adapter tapped {tapped.feature_path(capture.module)!r}, but the linear "
                    f"layer that runs last is {capture.adapter.feature_path(capture.module)!r}; pass the "
                    f"student to {type(self).__name__} as it is called in the loop (with its wrapper), or "
                    "give an adapter"
                )
        taught = self._teach(captured, views, image_features)
        # one backward pass frees the graph, so a pass serves once
        self._used = Captured(captured.feature.detach(), captured.logits.detach())
        capture.clear()
        state = StudentState(captured.feature, captured.logits, self._classify)
        total: Tensor | None = None
        losses: dict[str, Tensor] = {}
        for objective in self._objectives():
            weight = self._weight(objective)
            if weight == 0:
                continue
            _follow(objective, captured.feature.device)
            value = objective(state, taught)
            if not isinstance(value, Tensor) or value.ndim != 0:
                raise ValueError(
                    f"objective {objective.name!r} returned "
                    f"{list(value.shape) if isinstance(value, Tensor) else type(value).__name__}; expected a "
                    "scalar"
                )
            losses[objective.name] = value.detach()
            weighted = weight * value
            total = weighted if total is None else total + weighted
        self._losses = losses
        return captured.logits.new_zeros((), dtype=torch.float32) if total is None else total

    @property
    def weights(self) -> dict[str, float]:
        """Each objective's weight as it stands, the guard's factor in it."""
        return {objective.name: self._weight(objective) for objective in self._objectives()}

    @property
    def losses(self) -> dict[str, float]:
        """Each objective's value at the last :meth:`loss`, unweighted. Reading waits for the device."""
        return {name: value.item() for name, value in self._losses.items()}

    @property
    def loss_tensors(self) -> dict[str, Tensor]:
        """As :attr:`losses`, but detached tensors on the device: for a logger, without waiting."""
        return dict(self._losses)

    @property
    def feature(self) -> Tensor:
        """[B, D] the student's feature in the latest training pass; detached once :meth:`loss` was called.

        Raises:
            RuntimeError: outside the ``with``, or before a training pass.
        """
        capture = self._entered("feature")
        captured = capture.captured or self._used
        if captured is None:
            raise RuntimeError(self._why_nothing_captured(capture))
        return captured.feature

    def classify(self, feature: Tensor) -> Tensor:
        """Class scores [B, K] that the student's own classifier gives to a feature [B, D].

        In the student's current mode, without touching its running statistics, differentiable in both.

        Raises:
            RuntimeError: outside the ``with``.
        """
        self._entered("classify()")
        return self._classify(feature)

    def parameters(self) -> Iterator[nn.Parameter]:
        """What the objectives themselves train (connectors); most have nothing. For the optimizer."""
        return (parameter for parameter in self.objectives.parameters() if parameter.requires_grad)

    def state_dict(self) -> dict[str, Any]:
        """The state of what the objectives train."""
        return self.objectives.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave."""
        self.objectives.load_state_dict(state)

    @property
    def adapter(self) -> Adapter:
        """The adapter in use."""
        return self._entered("adapter").adapter

    # ---- inside

    def _objectives(self) -> Iterator[Objective]:
        for objective in self.objectives:
            assert isinstance(objective, Objective)
            yield objective

    def _weight(self, objective: Objective) -> float:
        return objective.weight * (1.0 if self.guard is None else self.guard.factor(objective.name))

    def _entered(self, what: str) -> StudentCapture:
        if self._capture is None:
            name = type(self).__name__
            raise RuntimeError(f"{what} outside the context: use it inside `with {name}(...) as cmt:`")
        return self._capture

    def _classify(self, feature: Tensor) -> Tensor:
        capture = self._entered("classify")
        assert self._statistics is not None
        module = capture.module
        feature = in_precision_of(module, feature)
        # the classifier may begin with the tapped module
        before, capture.paused = capture.paused, True
        try:
            with self._statistics():
                return capture.adapter.logits(capture.adapter.classify(module, feature))
        finally:
            capture.paused = before

    def _teacher_logits(self, feature: Tensor) -> Tensor:
        assert self._lent is not None, "objectives ask the teacher only inside loss()"
        teacher = self._lent.at(feature.device)
        return teacher.classify(in_precision_of(teacher, feature))  # type: ignore[operator]

    def _teach(
        self, captured: Captured, views: Tensor | None, image_features: Tensor | TeacherOutput | None
    ) -> TeacherOutput:
        assert self._lent is not None
        device, batch = captured.feature.device, captured.feature.shape[0]
        with torch.no_grad():
            if views is not None:
                if views.ndim != 5:
                    raise ValueError(
                        f"views has shape {list(views.shape)}; expected [B, V, C, H, W] (one view per shape: "
                        "views.unsqueeze(1))"
                    )
                _check_batch("views", views.shape[0], batch)
                output = self._lent.at(device)(views.to(device, non_blocking=True))
                feature, logits = output[0], output[1]
            else:
                assert image_features is not None
                feature, logits = (
                    image_features if isinstance(image_features, tuple) else (image_features, None)
                )
                size = getattr(self.teacher, "feature_dim", feature.shape[-1])
                if feature.ndim != 2 or feature.shape[1] != size:
                    raise ValueError(
                        f"image_features has shape {list(feature.shape)}; expected [B, {size}], features of "
                        "this teacher. Compute them again with it (pointcmt cache-features)"
                    )
                _check_batch("image_features", feature.shape[0], batch)
                feature = feature.to(device, non_blocking=True)
                if logits is None:
                    logits = self._teacher_logits(feature)
        return TeacherOutput(feature.detach(), logits.detach().to(device, non_blocking=True))

    def _why_nothing_captured(self, capture: StudentCapture) -> str:
        student = type(capture.module).__name__
        if self._used is not None:
            return (
                f"loss() was already called for this forward pass of {student}; call it once per training "
                "pass, after student(points)"
            )
        if capture.was_evaluated:
            return (
                f"only passes of {student} in eval mode were seen, which count as validation; call "
                "student.train() before the training pass"
            )
        if capture.tap_fired:
            return (
                f"the feature of {student} was seen, but its forward pass never ended: call student(points), "
                "not student.forward(points). Where a script calls another method of the student, use an "
                "adapter with logits_module"
            )
        return (
            f"loss() before a training pass of {student}: call student(points) inside the `with` first, in "
            "training mode and with gradients on. If a function that contains that call was compiled before "
            "entering, it does not see the hooks: compile it inside the `with`, or call "
            "torch.compiler.reset() after entering. If the whole student is under reentrant activation "
            "checkpointing, use use_reentrant=False"
        )


class PointCMT(CrossModalTraining):
    """PointCMT's stage III: feature enhancement and classifier enhancement under an image teacher.

    ::

        teacher = ImageTeacher.load("runs/mn40/teacher.safetensors")
        with PointCMT(teacher, student, generator="runs/mn40/generator.safetensors") as cmt:
            for points, labels, views in loader:
                loss = criterion(student(points), labels) + cmt.loss(views=views)

    See :class:`CrossModalTraining` for what entering, training and leaving do.

    Args:
        teacher: image teacher.
        student: the network to be trained.
        generator: trained point generator, or the path of its file; feature enhancement needs it.
        adapter: where the student's feature is: an ``Adapter``, the name of one, or None to find one.
        objectives: in place of the paper's ``[FeatureEnhancement(weight=30.0),
            ClassifierEnhancement(weight=0.3)]``.
        guard: scales the weights as training goes on (``pointcmt.schedules``); None leaves them.

    Raises:
        ValueError: feature enhancement without a generator.
        FileNotFoundError: no file at the generator's path.

    Source: Yan et al., "Let Images Give You More: Point Cloud Cross-Modal Training for Shape Analysis",
    NeurIPS 2022.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        *,
        generator: nn.Module | str | os.PathLike[str] | None = None,
        adapter: Adapter | str | None = None,
        objectives: Iterable[Objective] | None = None,
        guard: Guard | None = None,
    ) -> None:
        if objectives is None:
            objectives = [FeatureEnhancement(weight=30.0), ClassifierEnhancement(weight=0.3)]
        super().__init__(
            teacher,
            student,
            objectives=objectives,
            generator=_loaded(generator),
            adapter=adapter,
            guard=guard,
        )


def _loaded(generator: nn.Module | str | os.PathLike[str] | None) -> nn.Module | None:
    if generator is None or isinstance(generator, nn.Module):
        return generator
    from pointcmt.generator import PointGenerator

    return PointGenerator.load(generator)


def _follow(objective: Objective, device: torch.device) -> None:
    here = device_of(objective)
    if here is not None and here != device:
        objective.to(device)


def _check_batch(what: str, given: int, expected: int) -> None:
    if given != expected:
        raise ValueError(
            f"{what} holds {given} shapes, but the student's latest training pass had {expected}; give the "
            "images of the same shapes in the same order"
        )
