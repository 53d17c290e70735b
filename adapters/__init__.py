"""Adapters: where classifiers keep their shape feature (imports as ``pointcmt.adapters``).

Every file in this folder is imported when an adapter is first looked for; adding one is all it takes to add a
codebase. Other packages add theirs through the entry-point group ``pointcmt.adapters``.
"""

from pointcmt.adapters.generic import generic_adapter
from pointcmt.adapters.proof import AdapterReport, fit_adapter, verify_adapter
from pointcmt.adapters.registry import (
    ENTRY_POINT_GROUP,
    INPUT_LAYOUTS,
    Adapter,
    AdapterError,
    Tap,
    adapter_problems,
    find_adapter,
    first_tensor,
    get_adapter,
    list_adapters,
    module_tree,
    register_adapter,
    unregister_adapter,
    unwrap,
)

__all__ = [
    "ENTRY_POINT_GROUP",
    "INPUT_LAYOUTS",
    "Adapter",
    "AdapterError",
    "AdapterReport",
    "Tap",
    "adapter_problems",
    "find_adapter",
    "first_tensor",
    "fit_adapter",
    "generic_adapter",
    "get_adapter",
    "list_adapters",
    "module_tree",
    "register_adapter",
    "unregister_adapter",
    "unwrap",
    "verify_adapter",
]
