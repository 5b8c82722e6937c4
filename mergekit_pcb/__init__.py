"""PCB-Merging for mergekit: ``merge_method: pcb``.

Importing this package makes the method available to mergekit in this process, now or once
mergekit is imported. It imports neither torch nor mergekit itself.
"""

from __future__ import annotations

from mergekit_pcb._autoload import TYPE_CHECKING, register
from mergekit_pcb._autoload import install as _install

if TYPE_CHECKING:
    from typing import Any

    from mergekit_pcb.errors import PCBError
    from mergekit_pcb.host.method import PCBMerge
    from mergekit_pcb.state_dicts import Contributions, combine, contributions
    from mergekit_pcb.tools.adamerge import adamerge
    from mergekit_pcb.tools.search import search_weights

__version__ = "0.2.0"
__all__ = [
    "Contributions",
    "PCBError",
    "PCBMerge",
    "__version__",
    "adamerge",
    "combine",
    "contributions",
    "register",
    "search_weights",
]

_HOMES = {
    "Contributions": "mergekit_pcb.state_dicts",
    "PCBError": "mergekit_pcb.errors",
    "PCBMerge": "mergekit_pcb.host.method",
    "adamerge": "mergekit_pcb.tools.adamerge",
    "combine": "mergekit_pcb.state_dicts",
    "contributions": "mergekit_pcb.state_dicts",
    "search_weights": "mergekit_pcb.tools.search",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


_install()
