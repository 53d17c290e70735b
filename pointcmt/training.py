"""Cross-modal training of a network that already exists: capture, teach, sum the losses, clean up."""

from __future__ import annotations

import operator
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Literal, Self, SupportsIndex

import numpy as np
import torch
from torch import Tensor, nn

from pointcmt.adapters._untouched import gather_sharded
from pointcmt.adapters.proof import AdapterReport, verify_again, verify_call, verify_tail
from pointcmt.adapters.registry import Adapter, AdapterError, find_adapter, in_precision_of, unwrap
from pointcmt.distributed import KeptEqual
from pointcmt.frozen import Frozen, UntouchedStatistics, device_of
from pointcmt.hooks import Captured, StudentCapture
from pointcmt.objectives.base import Objective, Sizes
from pointcmt.ops._deferred import deferred
from pointcmt.schedules import Guard
from pointcmt.types import ImageFeatures, StudentState, TeacherOutput, Views
from pointcmt.views.sampling import draw_cameras, project_chosen

# after so many steps in which a head got gradients and did not move, its optimizer is asked about
_STEPS_TO_MOVE = 10
# after so many steps the adapter is checked again: what was the identity at the start is so no more
_STEPS_TO_CHECK = 10

_ALL = slice(None)
_UNLABELLED = "unlabelled_"

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
    * The adapter is checked (``verify_adapter``) on entering where ``points`` are given, else on the points
      of the first training pass; and on the same points again after ten steps and on leaving. What cannot be
      checked is a warning.
    * What the objectives train (projection heads, connectors) is complete in :meth:`parameters` on entering,
      for which ``points`` are needed where a head's size depends on the network. In several processes
      (``torch.distributed``) it starts equal on all, and its gradients are averaged, whatever wraps the
      student.
    * The image feature goes through the student's classifier in the student's mode: batch normalisation uses
      the statistics of these features and keeps none of them; dropout is active, and draws from the random
      generator, so that later draws differ from those of a run without the teacher.
    * Wrappers are seen through: ``DataParallel``, ``DistributedDataParallel``, ``torch.compile``, accelerate,
      Lightning Fabric. A compiled student is compiled again on entering and on leaving.
    * Clouds without labels may stand behind the labelled ones of a pass: ``objectives`` are then of the
      labelled ones and ``unlabelled`` of the others, and ``loss`` is given the labels. Both may hold the same
      kinds of objectives, with weights of their own; each is a mean (or sum) over its own clouds.
    * Losses are computed in float32 whatever the autocast state. Scale the sum by your ``GradScaler`` as
      ever.
    * Features that are NaN or infinite are an error: at once on a CPU; on a GPU, where no step waits for the
      device, at a later step or on leaving. After a forward pass in float16 it is a warning on the GPU,
      because a ``GradScaler`` skips the step.

    Args:
        teacher: ``views [B, V, C, H, W] -> TeacherOutput``: an ``ImageTeacher``, with or without a
            classifier. It is moved to the student's device while it is used. Where an objective needs them it
            is asked for more: ``teacher(views, per_view=True, maps=True)``.
        student: the network to be trained; bare or wrapped.
        objectives: what to sum; names must differ.
        generator: point generator for the objectives that need one.
        adapter: where the student's features are: an ``Adapter``, the name of one, or None to find one.
        guard: scales the weights as training goes on (``pointcmt.schedules``); None leaves them.
        points: a few clouds as the network takes them (a tensor, or a tuple of its positional arguments), on
            any device; the network is run on them once, in eval mode, to check the adapter and to measure
            sizes.
        copies: k, where each training pass is of k augmented copies of B shapes as one batch of k·B, copy
            after copy; ``loss`` is given the images of the B shapes.
        train_teacher: train the teacher's weights too: they join :meth:`parameters`.
        unlabelled: objectives of the clouds that ``loss`` has no labels of.

    Raises:
        ValueError: no objectives, equal names, copies below 1 or above 1 with ``unlabelled``, an objective
            that needs labels in ``unlabelled``; on entering: a generator missing, or ``points`` where an
            objective has heads to size by them.
        AdapterError: no adapter fits (on entering), or the one at hand is wrong (when it is checked).
        RuntimeError: the student is in another such context.

    Attributes:
        objectives, unlabelled: ``nn.ModuleList``; weights may be changed between steps. An objective of
            weight 0 is skipped; where all are, the teacher does not run.
        report: what the adapter's check measured; None before it.
        sizes: of features, for the objectives' heads; None outside.
        views_per_step: how many views of each shape :meth:`project` draws; None: all of the rig.
    """

    views_per_step: int | None = None

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        *,
        objectives: Iterable[Objective],
        generator: nn.Module | None = None,
        adapter: Adapter | str | None = None,
        guard: Guard | None = None,
        points: Any = None,
        copies: int = 1,
        train_teacher: bool = False,
        unlabelled: Iterable[Objective] = (),
    ) -> None:
        if copies < 1:
            raise ValueError(f"copies is {copies}; expected at least 1")
        chosen, others = _checked("objectives", objectives), _checked("unlabelled", unlabelled)
        if not chosen and not others:
            raise ValueError("objectives is empty; give at least one, for example [FeatureEnhancement()]")
        if copies > 1 and others:
            raise ValueError(f"copies is {copies}, with unlabelled objectives; expected copies=1 with these")
        for objective in others:
            if any(_UNLABELLED + objective.name == one.name for one in chosen):
                raise ValueError(
                    f"an objective in objectives is named {_UNLABELLED}{objective.name}, as {objective.name} "
                    "in unlabelled is in losses: give one of them another name=..."
                )
            if objective.needs_labels:
                raise ValueError(
                    f"{objective.name} needs labels, and stands in unlabelled, for clouds that have none: "
                    "give it in objectives, which are of the labelled clouds"
                )
            if any(objective is one for one in chosen):
                raise ValueError(
                    f"{objective.name} stands in objectives and in unlabelled; make two of it, for example "
                    "objectives=[SoftLabels()], unlabelled=[SoftLabels()]"
                )
        self.teacher = teacher
        self.student = student
        self.objectives = nn.ModuleList(chosen)
        self.unlabelled = nn.ModuleList(others)
        self.guard = guard
        self.report: AdapterReport | None = None
        self.sizes: Sizes | None = None
        self.copies = copies
        self._adapter = adapter
        self._generator = generator
        self._points = points
        self._train_teacher = train_teacher
        self._capture: StudentCapture | None = None
        self._frozen: Frozen | None = None
        self._statistics: UntouchedStatistics | None = None
        self._kept_equal: KeptEqual | None = None
        self._used: Captured | None = None
        self._losses: dict[str, Tensor] = {}
        self._versions: dict[int, tuple[int, int]] | None = {}
        # the inputs of the adapter's check, and whether they are of its logits_module
        self._checked_on: tuple[tuple, dict[str, Any], bool] | None = None
        self._steps = 0

    # ---- entering and leaving

    def __enter__(self) -> Self:
        if self._capture is not None:
            raise RuntimeError(
                f"this {type(self).__name__} is entered already; leave it before entering it again"
            )
        if unwrap(self.student) in _active:
            raise RuntimeError(
                f"this {type(unwrap(self.student)).__name__} is being trained in another "
                f"{type(self).__name__} already: its losses would be counted twice. Leave that one first; to "
                "combine methods, give one context several objectives"
            )
        self._used, self.report, self._losses, self._versions = None, None, {}, {}
        self._checked_on, self._steps = None, 0
        if self._points is None:
            adapter = find_adapter(self.student, self._adapter)
        else:
            args, kwargs = self._sample()
            self.report = verify_call(self.student, self._adapter, args, kwargs)
            self._checked_on = args, kwargs, False
            adapter = self.report.adapter
        capture = StudentCapture(
            self.student,
            adapter,
            self._prove,
            self._prove_tail,
            local=any(objective.needs_local for objective in self._objectives()),
            global_=any(objective.needs_global for objective in self._objectives()),
        )
        capture.checked = self.report is not None
        _check_adapter_has(adapter, self._objectives())
        try:
            self._statistics = UntouchedStatistics(capture.module)
            self.sizes = self._measured()
            for objective in self._objectives():
                objective.bind(generator=self._generator, classify=self._teacher_logits, sizes=self.sizes)
            capture.open()
            self._capture = capture
            if not self._train_teacher:
                self._frozen = Frozen(self.teacher)
            self._kept_equal = KeptEqual(self._trained_modules())
        except BaseException:
            self._capture = capture
            self._leave()
            raise
        _active[capture.module] = self
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        capture, checked_on = self._capture, self._checked_on
        if capture is not None:
            _active.pop(capture.module, None)
        self._leave()
        if error is None:
            deferred.look(wait=True)  # first: what is not finite any more proves nothing of an adapter
            if capture is not None and checked_on is not None and self._steps not in (0, _STEPS_TO_CHECK):
                self._check_again(capture, checked_on)
        else:
            deferred.forget()

    def _leave(self) -> None:
        capture, frozen, equal = self._capture, self._frozen, self._kept_equal
        self._capture = self._frozen = self._statistics = self._kept_equal = self._used = None
        self.sizes = self._checked_on = None
        if capture is not None:
            capture.close()
        if frozen is not None:
            frozen.restore()
        if equal is not None:
            equal.close()

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Asked by copy, deepcopy and pickle alike."""
        raise TypeError(
            f"a {type(self).__name__} cannot be copied: it hangs on one network. Copy the network, and make "
            f"another {type(self).__name__} for it"
        )

    def _sample(self) -> tuple[tuple, dict[str, Any]]:
        """The points given at first, as arguments of the network on its device."""
        args = self._points if isinstance(self._points, tuple) else (self._points,)
        device = device_of(self.student)
        return tuple(value.to(device) if isinstance(value, Tensor) else value for value in args), {}

    def _measured(self) -> Sizes:
        """What is known of the features' sizes on entering."""
        report = self.report
        feature = None if report is None else report.feature_shape[-1]
        pooled = None if report is None or report.global_shape is None else report.global_shape[-1]
        return Sizes(
            feature=feature,
            global_=feature if pooled is None else pooled,
            local=None if report is None or report.local_shape is None else report.local_shape[-1],
            image=getattr(self.teacher, "feature_dim", None),
            maps=getattr(self.teacher, "map_channels", None),
        )

    def _prove(self, args: tuple, kwargs: dict[str, Any]) -> None:
        capture = self._entered("the adapter's proof")
        capture.paused = True
        try:
            self.report = verify_call(capture.module, self._adapter, args, kwargs)
        finally:
            capture.paused = False
        _check_adapter_has(self.report.adapter, self._objectives())
        capture.use(self.report.adapter)
        self._checked_on = args, kwargs, False

    def _prove_tail(self, args: tuple, kwargs: dict[str, Any]) -> None:
        capture = self._entered("the adapter's proof")
        capture.paused = True
        try:
            self.report = verify_tail(capture.module, args, kwargs, capture.adapter)
        finally:
            capture.paused = False
        if self.report is not None:
            self._checked_on = args, kwargs, True

    def _check_again(self, capture: StudentCapture, inputs: tuple[tuple, dict[str, Any], bool]) -> None:
        """What only training shows, on the inputs of the first check."""
        args, kwargs, tail = inputs
        before, capture.paused = capture.paused, True
        try:
            verify_again(capture.module, capture.adapter, *capture.at_home(args, kwargs), tail=tail)
        except AdapterError:
            raise
        except Exception as error:
            # the network was moved, or torn down by its owner; training itself went well
            warnings.warn(
                f"the adapter {capture.adapter.name!r} could not be checked again after {self._steps} steps: "
                f"{type(error).__name__}: {error}",
                RuntimeWarning,
                stacklevel=3,
            )
        finally:
            capture.paused = before

    # ---- training

    def loss(
        self,
        *,
        views: Tensor | Views | None = None,
        image_features: Tensor | np.ndarray | TeacherOutput | ImageFeatures | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """The weighted sum of the objectives for the latest training pass of the student.

        Args:
            views: [B, V, C, H, W] images of the same B shapes in the same order, bare or with their cameras
                (``Views``); the teacher runs on them.
            image_features: [B, D] what this teacher's ``encode`` gave for them, computed beforehand; or a
                ``TeacherOutput`` or ``ImageFeatures`` with more of it. Exactly one of these two arguments is
                given.
            labels: int64 [n], n ≤ B, the classes of the first n shapes: ``objectives`` are of these, and
                ``unlabelled`` of the rest. None: all are of all shapes, and no objective knows labels.

        Returns:
            A scalar attached to the student's graph: add it to the task loss.

        Raises:
            RuntimeError: outside the ``with``, before a training pass, or again for the same one.
            ValueError: both or neither argument, sizes that do not fit, or something that an objective needs
                is missing.
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
        batch = len(captured.feature)
        if batch % self.copies:
            raise ValueError(
                f"the student's latest training pass had {batch} clouds, which are not {self.copies} copies "
                f"of each shape; give it {self.copies}·B clouds, copy after copy"
            )
        parts = self._parts(batch // self.copies, labels)
        active = [
            (key, objective, weight, of_rest)
            for key, objective, of_rest in self._keyed()
            if (weight := self._weight(objective)) != 0 and parts[of_rest] is not None
        ]
        taught = self._teach(captured, views, image_features, [objective for _, objective, _, _ in active])
        # one backward pass frees the graph, so a pass serves once
        self._used = captured.detached()
        capture.clear()
        self._losses = {}
        if taught is None:
            return captured.feature.new_zeros((), dtype=torch.float32)
        if self._kept_equal is not None:
            self._kept_equal.share_buffers()
        self._ask_about_optimizer()
        self._steps += 1
        if self._steps == _STEPS_TO_CHECK and self._checked_on is not None:
            self._check_again(capture, self._checked_on)
        classify = None if capture.adapter.classify is None else self._classify
        state = StudentState(
            captured.feature,
            captured.logits,
            classify,
            captured.local,
            captured.centers,
            self.copies,
            captured.feature if captured.global_ is None else captured.global_,
        )
        if labels is not None:
            labels = labels.to(captured.feature.device)
        repeated = _repeated(taught, self.copies)
        total: Tensor | None = None
        losses: dict[str, Tensor] = {}
        for key, objective, weight, of_rest in active:
            _follow(objective, captured.feature.device)
            ours, theirs = state, taught if objective.sees_copies else repeated
            rows = parts[of_rest]
            if rows is not None and rows != _ALL:
                # one copy then: the k·B rows of several would not be a slice
                ours, theirs = state.rows(rows), theirs.map(operator.itemgetter(rows))
            if not of_rest:
                ours = ours._replace(labels=labels)
            _check_needs(objective, ours, theirs)
            value = objective(ours, theirs)
            if not isinstance(value, Tensor) or value.ndim != 0:
                raise ValueError(
                    f"objective {objective.name!r} returned "
                    f"{list(value.shape) if isinstance(value, Tensor) else type(value).__name__}; expected a "
                    "scalar"
                )
            losses[key] = value.detach()
            weighted = weight * value
            total = weighted if total is None else total + weighted
        self._losses = losses
        assert total is not None
        return total

    def project(self, points: Tensor) -> Views:
        """Views of clouds [B, N, 3] with their cameras, as the image encoder was trained on: so many of its
        rig's, drawn by chance for each shape, as the method takes in a step (:attr:`views_per_step`).

        Raises:
            ValueError: an encoder that does not know how to make its images of points, or fewer cameras.
        """
        spec = getattr(self.teacher, "view_spec", None)
        if spec is None:
            raise ValueError(
                f"the image encoder ({type(self.teacher).__name__}) does not say how its images are made of "
                "points: make it with view_spec=, or give loss() views of your own"
            )
        if self.views_per_step is None:
            return spec.project(points, cameras=True)
        return project_chosen(spec, points, draw_cameras(len(points), spec.num_views, self.views_per_step))

    @property
    def weights(self) -> dict[str, float]:
        """Each objective's weight as it stands, the guard's factor in it."""
        return {key: self._weight(objective) for key, objective, _ in self._keyed()}

    @property
    def losses(self) -> dict[str, float]:
        """Each objective's value at the last :meth:`loss`, unweighted, by its name; those of ``unlabelled``
        as ``unlabelled_<name>``. Reading waits for the device."""
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

    def parameters(self, side: Literal["both", "points", "images"] = "both") -> Iterator[nn.Parameter]:
        """What this context trains beside the student: the objectives' heads and connectors, and the teacher
        where it is trained. For the optimizer; complete on entering.

        Args:
            side: only what projects ``"images"`` (heads, and the teacher), or only the rest, ``"points"``:
                for parameter groups with a learning rate each.
        """
        found = (p for module in self._trained_modules().values() for p in module.parameters())
        trained = [parameter for parameter in found if parameter.requires_grad]
        if side != "both":
            heads = [getattr(one, name) for one in self._objectives() for name in one.image_side]
            heads += [self.teacher] if self._train_teacher else []
            # before entering an objective has no heads yet
            images = {id(p) for head in heads if head is not None for p in head.parameters()}
            trained = [p for p in trained if (id(p) in images) == (side == "images")]
        yield from trained

    def state_dict(self) -> dict[str, Tensor]:
        """What this context trains, with its buffers: for a checkpoint of the run."""
        return {
            f"{prefix}.{name}": value
            for prefix, module in self._trained_modules().items()
            for name, value in module.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes up what :meth:`state_dict` gave, after entering.

        Raises:
            ValueError: other names or shapes than this context's.
        """
        own = self.state_dict()
        wrong = sorted(own.keys() ^ state.keys()) or [
            name for name in own if own[name].shape != state[name].shape
        ]
        if wrong:
            raise ValueError(
                f"the state does not fit this {type(self).__name__}: {', '.join(wrong[:3])}"
                f"{' …' if len(wrong) > 3 else ''} differ; give the objectives and options it was saved "
                "with, after entering"
            )
        for prefix, module in self._trained_modules().items():
            start = f"{prefix}."
            module.load_state_dict(
                {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}
            )

    @property
    def adapter(self) -> Adapter:
        """The adapter in use."""
        return self._entered("adapter").adapter

    # ---- inside

    def _trained_modules(self) -> dict[str, nn.Module]:
        """By name, what has parameters to train."""
        found: dict[str, nn.Module] = {
            key: objective
            for key, objective, _ in self._keyed()
            if any(parameter.requires_grad for parameter in objective.parameters())
        }
        if self._train_teacher:
            found["teacher"] = self.teacher
        return found

    def _ask_about_optimizer(self) -> None:
        """Warns once where a head has had gradients for some steps and has not moved."""
        if self._versions is None:
            return
        waiting = False
        for parameter in self.parameters():
            version, steps = self._versions.get(id(parameter), (parameter._version, 0))
            if parameter._version != version:
                continue
            waiting = True
            steps += parameter.grad is not None
            self._versions[id(parameter)] = (version, steps)
            if steps > _STEPS_TO_MOVE:
                names = ", ".join(self._trained_modules())
                warnings.warn(
                    f"{names} got gradients in {_STEPS_TO_MOVE} steps and did not move: give the optimizer "
                    f"the parameters of this {type(self).__name__} too, [*network.parameters(), "
                    "*cmt.parameters()]",
                    stacklevel=3,
                )
                waiting = False
                break
        if not waiting:
            self._versions = None

    def _keyed(self) -> Iterator[tuple[str, Objective, bool]]:
        """Every objective with the name that it has among all, and whether it is of unlabelled clouds."""
        for prefix, objectives in (("", self.objectives), (_UNLABELLED, self.unlabelled)):
            for objective in objectives:
                assert isinstance(objective, Objective)
                yield prefix + objective.name, objective, bool(prefix)

    def _objectives(self) -> Iterator[Objective]:
        return (objective for _, objective, _ in self._keyed())

    def _parts(self, shapes: int, labels: Tensor | None) -> tuple[slice | None, slice | None]:
        """Which of the shapes ``objectives`` are of, and which ``unlabelled``; None: of none in this pass."""
        if labels is None:
            if len(self.unlabelled):
                raise ValueError(
                    f"this {type(self).__name__} has objectives for unlabelled clouds, and loss() was given "
                    "no labels, by which it knows them: give labels=<int64 [n]>, the classes of the first n "
                    "clouds of the pass"
                )
            return _ALL, None
        if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(f"labels are {labels.dtype} {list(labels.shape)}; expected int64 [n]")
        count = len(labels)
        if count > shapes or (count < shapes and self.copies > 1):
            raise ValueError(
                f"labels are of {count} shapes, and the student's latest training pass had {shapes}; "
                "expected "
                + ("as many" if self.copies > 1 else "labels of the first of them, at most as many")
            )
        if count == shapes:
            return _ALL, None
        return (slice(count) if count else None), slice(count, shapes)

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
        if capture.adapter.classify is None:
            raise RuntimeError(
                f"the adapter {capture.adapter.name!r} has no classify: give it classify=<the layers after "
                "the feature>"
            )
        gather_sharded(module)
        try:
            with self._statistics():
                return capture.adapter.classify(module, feature)
        finally:
            capture.paused = before

    def _teacher_logits(self, feature: Tensor) -> Tensor:
        teacher = self._teacher_at(feature.device)
        classify = getattr(teacher, "classify", None)
        if classify is None or getattr(teacher, "num_classes", 1) is None:
            raise ValueError(f"this {type(teacher).__name__} has no classifier; {_NEEDS_CLASSIFIER}")
        return classify(in_precision_of(teacher, feature))

    def _teacher_at(self, device: torch.device) -> nn.Module:
        if self._frozen is not None:
            return self._frozen.at(device)
        assert self._train_teacher, "objectives ask the teacher only inside loss()"
        _follow(self.teacher, device)
        return self.teacher

    def _teach(
        self,
        captured: Captured,
        views: Tensor | Views | None,
        image_features: Tensor | np.ndarray | TeacherOutput | ImageFeatures | None,
        active: list[Objective],
    ) -> TeacherOutput | None:
        """What the teacher says, as far as the active objectives need it; None where none is active."""
        device, batch = captured.feature.device, len(captured.feature) // self.copies
        if views is not None:
            given = views if isinstance(views, Views) else Views(_as_tensor(views))
            if given.images.ndim != 5:
                raise ValueError(
                    f"views has shape {list(given.images.shape)}; expected [B, V, C, H, W] (one view per "
                    "shape: views.unsqueeze(1))"
                )
            _check_batch("views", len(given.images), batch)
            if not active:
                return None
            given = given.map(lambda part: part.to(device, non_blocking=True))
            wanted = {
                name: True
                for name, needs in (("per_view", "needs_per_view"), ("maps", "needs_maps"))
                if any(getattr(objective, needs) for objective in active)
            }
            with torch.set_grad_enabled(self._train_teacher):
                teacher = self._teacher_at(device)
                try:
                    output = _as_output(teacher(given.images, **wanted))
                except TypeError as error:
                    if not wanted or "unexpected keyword" not in str(error):
                        raise
                    raise ValueError(
                        f"this {type(teacher).__name__} cannot give {' and '.join(wanted)}, which "
                        f"{', '.join(objective.name for objective in active)} needs: use an ImageTeacher, or "
                        f"take {' and '.join(wanted)} as keyword arguments in its forward()"
                    ) from error
            output = output._replace(views=given)
        else:
            assert image_features is not None
            output = _as_output(image_features)
            feature = output.feature
            size = getattr(self.teacher, "feature_dim", feature.shape[-1])
            if feature.ndim != 2 or feature.shape[1] != size:
                raise ValueError(
                    f"image_features has shape {list(feature.shape)}; expected [B, {size}], features of "
                    "this teacher. Compute them again with it (pointcmt cache-features)"
                )
            _check_batch("image_features", feature.shape[0], batch)
            if not active:
                return None
            output = _moved(output, captured.feature)
        if output.logits is None and any(objective.needs_logits for objective in active):
            with torch.set_grad_enabled(self._train_teacher):
                output = output._replace(logits=self._teacher_logits(output.feature))
        return output if self._train_teacher else output.map(Tensor.detach)

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


_NEEDS_CLASSIFIER = (
    "use an image teacher that was trained to classify (pointcmt train-teacher), or objectives that need no "
    "class scores of it"
)


def _as_output(said: Any) -> TeacherOutput:
    """Whatever a teacher, or a user who ran one, gives, as a ``TeacherOutput``."""
    if isinstance(said, TeacherOutput):
        return said
    if isinstance(said, ImageFeatures):
        return TeacherOutput(said.pooled, None, said.per_view, said.maps)
    if isinstance(said, (tuple, list)) and said and isinstance(said[0], (Tensor, np.ndarray)):
        logits = said[1] if len(said) > 1 else None
        return TeacherOutput(_as_tensor(said[0]), None if logits is None else _as_tensor(logits))
    return TeacherOutput(_as_tensor(said))


def _as_tensor(given: Any) -> Tensor:
    """A copy of what is no tensor: an array may be read-only, or run backwards, which tensors cannot."""
    return given if isinstance(given, Tensor) else torch.from_numpy(np.array(given))


def _moved(output: TeacherOutput, feature: Tensor) -> TeacherOutput:
    """To the student's feature's device, no wider than float32 unless it is, and out of inference mode, whose
    tensors autograd refuses."""

    def move(value: Tensor) -> Tensor:
        value = value.to(feature.device, non_blocking=True)
        if value.dtype == torch.float64 != feature.dtype:
            value = value.float()
        return value.clone() if value.is_inference() else value

    return output.map(move)


def _repeated(output: TeacherOutput, copies: int) -> TeacherOutput:
    """The output for B shapes as one for k copies of them, copy after copy."""
    if copies == 1:
        return output
    return output.map(lambda value: value.repeat(copies, *(1,) * (value.ndim - 1)))


def _check_adapter_has(adapter: Adapter, objectives: Iterable[nn.Module]) -> None:
    for objective in objectives:
        assert isinstance(objective, Objective)
        if objective.needs_local and adapter.local is None:
            raise ValueError(
                f"{objective.name} needs local features, and the adapter {adapter.name!r} does not say where "
                "the network has them: give it local=Tap(...) (docs/adapters.md), or points=<a few clouds> "
                "for the generic adapter to look for them, or leave the local term out"
            )


def _check_needs(objective: Objective, student: StudentState, teacher: TeacherOutput) -> None:
    """What an objective needs and did not get is an error that says what to do."""
    missing = [
        (what, mend)
        for needed, given, what, mend in (
            (objective.needs_logits, teacher.logits, "the teacher's logits", _NEEDS_CLASSIFIER),
            (
                objective.needs_per_view,
                teacher.per_view,
                "features per view",
                "give loss(views=…), or cached features that hold per_view",
            ),
            (
                objective.needs_maps,
                teacher.maps,
                "feature maps",
                "give loss(views=…) of an encoder with maps (a convolutional one, or a vision transformer)",
            ),
            (
                objective.needs_cameras,
                None if teacher.views is None else teacher.views.view_matrix,
                "the views' cameras",
                "give loss(views=teacher.project(points, cameras=True))",
            ),
            (
                objective.needs_classify,
                student.classify,
                "the student's classifier",
                "give the adapter classify=…, or use objectives that need none",
            ),
            (objective.needs_local, student.local, "local features", "give the adapter local=Tap(...)"),
            (
                objective.needs_labels,
                student.labels,
                "the shapes' labels",
                "give loss(…, labels=<int64 [n]>)",
            ),
        )
        if needed and given is None
    ]
    if missing:
        raise ValueError(
            "; ".join(f"{objective.name} needs {what}, and there are none: {mend}" for what, mend in missing)
        )


def _checked(where: str, objectives: Iterable[Objective]) -> list[Objective]:
    """The objectives of one list.

    Raises:
        ValueError: something else in it, or equal names.
    """
    chosen = list(objectives)
    for objective in chosen:
        if not isinstance(objective, Objective):
            given = (
                f"the class {objective.__name__}"
                if isinstance(objective, type)
                else f"a {type(objective).__name__}"
            )
            raise ValueError(
                f"{where} holds {given}; expected instances of pointcmt.objectives.Objective, for example "
                "FeatureEnhancement()"
            )
    names = [objective.name for objective in chosen]
    if len(set(names)) < len(names):
        raise ValueError(
            f"{where} have equal names: {', '.join(names)}; give them name=... to tell them apart"
        )
    return chosen


def _follow(module: nn.Module, device: torch.device) -> None:
    here = device_of(module)
    if here is not None and here != device:
        module.to(device)


def _check_batch(what: str, given: int, expected: int) -> None:
    if given != expected:
        raise ValueError(
            f"{what} holds {given} shapes, but the student's latest training pass had {expected}; give the "
            "images of the same shapes in the same order"
        )
