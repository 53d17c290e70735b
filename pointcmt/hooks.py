"""What training hangs on somebody's network, and takes off again: hooks that keep what a pass said."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel

from pointcmt.adapters._untouched import copied
from pointcmt.adapters.registry import Adapter, Tap, first_tensor, unwrap
from pointcmt.frozen import device_of


class Captured(NamedTuple):
    """One training forward pass, attached to the student's graph.

    Attributes:
        feature: [B, D] the shape feature.
        logits: [B, K]; None where the adapter knows no classifier.
        global_: [B, D'] the encoder's pooled feature, where it was wanted.
        local: [B, M, C] local features, where they were wanted.
        centers: [B, M, 3] of ``local``.
    """

    feature: Tensor
    logits: Tensor | None
    global_: Tensor | None = None
    local: Tensor | None = None
    centers: Tensor | None = None

    def detached(self) -> Captured:
        return Captured(*(None if value is None else value.detach() for value in self))  # type: ignore[arg-type]


class StudentCapture:
    """Hooks on a student that keep what its latest training forward pass said.

    A pass counts when the student is in training mode and gradients are on; validation is not seen. What an
    autograd backward pass runs again (activation checkpointing) is not seen either. Under ``nn.DataParallel``
    the replicas' parts are put together in batch order.

    The hooks are on the bare network, whatever wraps it. Copies and pickles of it, made while the hooks are
    on, do not carry them.

    Args:
        student: the network as the caller has it, bare or wrapped.
        adapter: says what to capture.
        local: keep local features and their centres too.
        global_: keep the encoder's pooled feature too.
        on_first_pass: called before the first training pass with the arguments of the network, where that is
            possible (not from inside compiled code, nor from a replica); may call :meth:`use`.
        on_first_tail: called in its place, with the arguments of the adapter's ``logits_module``, where the
            network itself is not called.
    """

    def __init__(
        self,
        student: nn.Module,
        adapter: Adapter,
        on_first_pass: Callable[[tuple, dict[str, Any]], None],
        on_first_tail: Callable[[tuple, dict[str, Any]], None],
        *,
        local: bool = False,
        global_: bool = False,
    ) -> None:
        self.student = student
        self._wants_local, self._wants_global = local, global_
        self.module = unwrap(student)
        self.adapter = adapter
        self.paused = False
        # what compiled code may write; it must be a plain attribute of a plain object to be traceable
        self.pending: Tensor | None = None
        self.pending_local: tuple[Tensor, Tensor] | None = None
        self.pending_global: Tensor | None = None
        self.pending_inputs: tuple = ()
        self.pending_beside: Any = None
        self.inputs: tuple[tuple, dict[str, Any]] | None = None
        self._captured: Captured | None = None
        self._on_first_pass = on_first_pass
        self._on_first_tail = on_first_tail
        self._met_first_pass = False
        self._local = threading.local()
        self._lock = threading.Lock()
        self._replicas: dict[int, Captured] = {}
        self._replica_group: Any = None
        self._handles: list[Any] = []
        self._outer = 0
        self._shielded: list[nn.Module] = []
        self.checked = False  # the adapter was checked before entering
        self.tap_fired = False
        self.was_evaluated = False

    # ---- on and off

    def open(self) -> None:
        """Puts the hooks on."""
        _forget_compiled(self.student)
        self._met_first_pass = self.checked
        # outermost first: the only place that is outside of compiled code and of replicas
        outermost = self.student.register_forward_pre_hook(self._before, with_kwargs=True)
        self._handles.append(outermost)
        self._shield(self.student)
        if self.module is not self.student:
            self._handles.append(self.module.register_forward_pre_hook(self._before, with_kwargs=True))
            self._shield(self.module)
        self._outer = len(self._handles)
        self._hook()

    def _hook(self) -> None:
        tapped = self.adapter.submodule(self.module)
        if self.adapter.feature_from == "input":
            self._handles.append(tapped.register_forward_pre_hook(self._tap_input, with_kwargs=True))
        else:
            self._handles.append(tapped.register_forward_hook(self._tap_output))
        last = self.adapter.output_module(self.module)
        if last is not self.module:
            self._handles.append(last.register_forward_pre_hook(self._before_last, with_kwargs=True))
        self._handles.append(last.register_forward_hook(self._complete))
        self._shield(tapped)
        self._shield(last)
        if self._wants_local and self.adapter.local is not None:
            self._hook_tap(self.adapter.local, self._local_input, self._local_output)
        if self._wants_global and self.adapter.global_ is not None:
            self._hook_tap(self.adapter.global_, self._global_input, self._global_output)

    def _hook_tap(self, tap: Tap, on_input: Callable, on_output: Callable) -> None:
        module = self.adapter.tapped(tap, self.module)
        if tap.beside is not None:
            other = self.adapter.beside(tap, self.module)
            if tap.beside[1] == "input":
                self._handles.append(other.register_forward_pre_hook(self._beside_input))
            else:
                self._handles.append(other.register_forward_hook(self._beside_output))
            self._shield(other)
        if tap.where == "input":
            self._handles.append(module.register_forward_pre_hook(on_input))
        else:
            self._handles.append(module.register_forward_hook(on_output))
        self._shield(module)

    def use(self, adapter: Adapter) -> None:
        """Goes over to another adapter."""
        if adapter is self.adapter:
            return
        self.adapter = adapter
        if self._handles:
            for handle in self._handles[self._outer :]:
                handle.remove()
            del self._handles[self._outer :]
            self._hook()

    def close(self) -> None:
        """Takes the hooks off and forgets what was captured."""
        for handle in self._handles:
            handle.remove()
        for module in self._shielded:
            module.__dict__.pop("__getstate__", None)
        self._handles, self._shielded = [], []
        self.clear()
        self.inputs = None
        # what was compiled with the hooks depends on this (dynamo guards on what a hook reads), also inside a
        # compiled function of the caller's
        self.paused = True
        _forget_compiled(self.student)

    def clear(self) -> None:
        self.pending = self.pending_local = self.pending_global = self.pending_beside = None
        self.pending_inputs = ()
        self._captured = self._replica_group = None
        self._local = threading.local()
        self._replicas = {}

    def _shield(self, module: nn.Module) -> None:
        """Keeps the hooks out of copies (an EMA of the student, a pickle) made while they are on."""
        if "__getstate__" in module.__dict__:
            return
        module.__dict__["__getstate__"] = _StateWithoutHooks(module)
        self._shielded.append(module)

    # ---- what was seen

    @property
    def captured(self) -> Captured | None:
        """The latest training pass, whole."""
        if not self._replicas:
            return self._captured
        parts = [self._replicas[order] for order in sorted(self._replicas)]
        device = parts[0].feature.device
        if isinstance(self.student, DataParallel) and self.student.device_ids:
            device = torch.device(parts[0].feature.device.type, self.student.output_device)
        joined = [
            None if values[0] is None else torch.cat([value.to(device) for value in values])
            for values in zip(*parts, strict=True)
        ]
        return Captured(*joined)  # type: ignore[arg-type]

    # ---- hooks; those that run inside the network must be traceable by torch.compile

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.paused or not module.training or not torch.is_grad_enabled():
            return
        if torch.compiler.is_compiling():
            self.inputs = (args, kwargs)
            self.pending_inputs = (*args, *kwargs.values())
            return
        if _in_backward():
            return
        self._local.pending = self._local.local = self._local.global_ = self._local.beside = None
        self._local.inputs = (*args, *kwargs.values())
        if self._met_first_pass:
            return
        if getattr(module, "_is_replica", False):
            with self._lock:
                if self.inputs is None:
                    self.inputs = (args, kwargs)
            return
        self._met_first_pass = True
        self._on_first_pass(*self.at_home(args, kwargs))

    def _before_last(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._met_first_pass or self.paused or not module.training or torch.compiler.is_compiling():
            return
        if torch.is_grad_enabled() and not _in_backward() and not getattr(module, "_is_replica", False):
            self._met_first_pass = True
            self._on_first_tail(*self.at_home(args, kwargs))

    def at_home(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The inputs where the bare network is, in its precision: the wrapper would have seen to that."""
        device = device_of(self.module)
        dtype = next((p.dtype for p in self.module.parameters() if p.is_floating_point()), torch.float32)

        def move(value: Tensor) -> Tensor:
            value = value.detach().to(device, copy=True)
            return value.to(dtype) if value.is_floating_point() and value.dtype.itemsize < 4 else value

        return copied((tuple(args), dict(kwargs)), move)

    def take_inputs(self) -> tuple[tuple, dict[str, Any]] | None:
        """The arguments of a pass that was met too deep inside to call ``on_first_pass``; once."""
        inputs, self.inputs = self.inputs, None
        if inputs is None or self._met_first_pass:
            return None
        self._met_first_pass = True
        return self.at_home(*inputs)

    def _tap_input(self, _module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and not self.paused:
            self._tap(first_tensor((*args, *kwargs.values())))

    def _tap_output(self, _module: nn.Module, _args: tuple, output: Any) -> None:
        if torch.is_grad_enabled() and not self.paused:
            self._tap(first_tensor(output))

    def _tap(self, tensor: Tensor) -> None:
        # a copy, because the next module may work in place
        if torch.compiler.is_compiling():
            self.pending = tensor.clone()
        elif not _in_backward():
            self._local.pending = tensor.clone()
            self.tap_fired = True

    # bound methods, by which a copy of the network tells them from its owner's hooks

    def _local_input(self, _module: nn.Module, args: tuple) -> None:
        self._tap_local(args)

    def _local_output(self, _module: nn.Module, _args: tuple, output: Any) -> None:
        self._tap_local(output)

    def _global_input(self, _module: nn.Module, args: tuple) -> None:
        self._tap_global(args)

    def _global_output(self, _module: nn.Module, _args: tuple, output: Any) -> None:
        self._tap_global(output)

    def _beside_input(self, _module: nn.Module, args: tuple) -> None:
        self._keep_beside(args)

    def _beside_output(self, _module: nn.Module, _args: tuple, output: Any) -> None:
        self._keep_beside(output)

    def _keep_beside(self, value: Any) -> None:
        if self.paused or not torch.is_grad_enabled():
            return
        if torch.compiler.is_compiling():
            self.pending_beside = value
        elif not _in_backward():
            self._local.beside = value

    def _tap_local(self, tapped: Any) -> None:
        if self.paused or not torch.is_grad_enabled():
            return
        tap = self.adapter.local
        assert tap is not None
        if tap.beside is not None:
            compiling = torch.compiler.is_compiling()
            tapped = (tapped, self.pending_beside if compiling else getattr(self._local, "beside", None))
        if torch.compiler.is_compiling():
            local, centers = tap.select(self.module, tapped, self.pending_inputs)
            self.pending_local = (local.clone(), centers.clone())
        elif not _in_backward():
            inputs = self._inputs_of_pass()
            if inputs is not None:
                local, centers = tap.select(self.module, tapped, inputs)
                self._local.local = (local.clone(), centers.detach().clone())

    def _tap_global(self, tapped: Any) -> None:
        if self.paused or not torch.is_grad_enabled():
            return
        tap = self.adapter.global_
        assert tap is not None
        if torch.compiler.is_compiling():
            self.pending_global = tap.select(self.module, tapped, self.pending_inputs).clone()
        elif not _in_backward():
            inputs = self._inputs_of_pass()
            if inputs is not None:
                self._local.global_ = tap.select(self.module, tapped, inputs).clone()

    def _inputs_of_pass(self) -> tuple | None:
        """What the network was called with; () where scripts never call it; None where only a part of it is
        being called now."""
        inputs = getattr(self._local, "inputs", None)
        return () if inputs is None and self.adapter.logits_module else inputs

    def _captured_of(
        self, feature: Tensor, output: Any, local: tuple[Tensor, Tensor] | None, global_: Tensor | None
    ) -> Captured:
        logits = None if self.adapter.classify is None else self.adapter.logits(output)
        feature = self.adapter.feature(feature)
        return Captured(feature, logits, global_, *(local if local is not None else (None, None)))

    def _complete(self, module: nn.Module, _args: tuple, output: Any) -> None:
        if self.paused or not torch.is_grad_enabled():
            return
        if not module.training:
            self.was_evaluated = True
            return
        if torch.compiler.is_compiling():
            if self.pending is not None:
                self._captured = self._captured_of(
                    self.pending, output, self.pending_local, self.pending_global
                )
                self.pending = self.pending_local = self.pending_global = None
                self.pending_inputs = ()
            return
        if _in_backward():
            return
        pending, local, global_ = (
            getattr(self._local, name, None) for name in ("pending", "local", "global_")
        )
        if pending is None:  # the tapped part was compiled by itself
            pending, local, global_ = self.pending, self.pending_local, self.pending_global
        self._local.pending = self._local.local = self._local.global_ = self._local.inputs = None
        self._local.beside = self.pending_beside = None
        self.pending = self.pending_local = self.pending_global = None
        if pending is None:
            return
        captured = self._captured_of(pending, output, local, global_)
        if not getattr(module, "_is_replica", False):
            self._captured = captured
            self._replicas = {}
            return
        group, order = _replica_place(module, captured)
        with self._lock:
            if group is not self._replica_group:
                self._replica_group, self._replicas = group, {}
            self._replicas[order] = captured


class _StateWithoutHooks:
    """Stands in for ``module.__getstate__``, which copy and pickle ask for what to take along."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self) -> Any:
        module = self._module
        state = type(module).__getstate__(module)
        if not isinstance(state, dict):
            return state
        state = dict(state)
        state.pop("__getstate__", None)
        for key in ("_forward_hooks", "_forward_pre_hooks"):
            hooks = state.get(key)
            if hooks:
                ours = [number for number, hook in hooks.items() if _is_ours(hook)]
                state[key] = type(hooks)((n, hook) for n, hook in hooks.items() if n not in ours)
                for flags in ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs"):
                    if state.get(flags):
                        kept = state[flags].items()
                        state[flags] = type(state[flags])((n, flag) for n, flag in kept if n not in ours)
        return state


def _is_ours(hook: Any) -> bool:
    return isinstance(getattr(hook, "__self__", None), StudentCapture)


# --------------------------------------------------------------------------------------------------------
# Private APIs of torch, each behind one function; tests/test_hooks.py says what breaks where one is gone


def _in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread: then a forward pass is a recomputation.

    ``torch._C._current_graph_task_id`` (2.0 to 2.15) is -1 outside of one.
    """
    return torch._C._current_graph_task_id() != -1


def _replica_place(module: nn.Module, captured: Captured) -> tuple[Any, int]:
    """Which DataParallel pass a replica belongs to, and its place in it.

    All replicas' parameters are outputs of one broadcast, replica by replica
    (``nn.parallel.replicate``'s ``_former_parameters``).
    """
    for child in module.modules():
        for parameter in getattr(child, "_former_parameters", {}).values():
            if isinstance(parameter, Tensor) and parameter.grad_fn is not None:
                return parameter.grad_fn, parameter.output_nr
    # nothing to train in it, so no broadcast node: the device's number is the usual order
    return None, captured.feature.device.index or 0


def _forget_compiled(student: nn.Module) -> None:
    """Makes compiled code of this student's own classes be compiled again; other compiled code stays.

    ``torch.compile`` does not guard on hooks that come later: code compiled without them would skip them.
    What is forgotten is kept by the code object of each class's ``forward``
    (``torch._dynamo.eval_frame._debug_get_cache_entry_list``, ``torch._C._dynamo.eval_frame.reset_code``).
    """
    if "torch._dynamo" not in sys.modules:
        return
    from torch._C._dynamo.eval_frame import reset_code
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    for module in student.modules():
        forward = getattr(type(module).forward, "__wrapped__", type(module).forward)
        code = getattr(forward, "__code__", None)
        if code is not None and _debug_get_cache_entry_list(code):
            reset_code(code)
