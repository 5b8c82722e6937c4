"""How mergekit's own commands learn of ``pcb``: standard library only, and never in the way.

mergekit loads no plugins, so two start-up files at the root of the installation call
:func:`install` in every Python process. That adds a finder to ``sys.meta_path`` which lets a few
modules of mergekit load as always and then does its one job in each.
"""

from __future__ import annotations

import sys
from _thread import get_ident  # threading would have to be imported first

TYPE_CHECKING = False  # typing itself would triple the cost of this module
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

SWITCH = "MERGEKIT_PCB_AUTOLOAD"


def install() -> None:
    """Provide ``pcb`` in this process, unless the environment switches that off."""
    import os

    if os.environ.get(SWITCH) != "0":
        watch()


def watch() -> None:
    """Act on mergekit's modules that are loaded already, and on the others once they are."""
    for name, act in _ACTIONS.items():
        module = sys.modules.get(name)
        # A module still being imported is the business of the finder that is importing it.
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            _attempt(act, module)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        missing = [name for name in _ACTIONS if name not in sys.modules]
        if missing:
            sys.meta_path.insert(0, _Finder(missing))


def register(*, replace: bool = False) -> None:
    """Register ``pcb`` with mergekit, importing mergekit if need be.

    Does nothing where it is registered already; the environment cannot switch it off. Where the
    name belongs to another method, it is refused, or with ``replace`` taken over for this
    process. Raises :class:`~mergekit_pcb.errors.PCBError`.
    """
    import mergekit.merge_methods.registry as registry

    watch()
    foreign = _foreign(registry)
    if foreign and replace:
        from mergekit_pcb.host.method import PCBMerge

        registry._METHODS["pcb"] = PCBMerge()
    elif foreign:
        from mergekit_pcb.errors import PCBError

        raise PCBError(
            "use merge_method: pcb of mergekit-pcb",
            f"mergekit already has a method of that name, {foreign}",
            "uninstall its provider, or run merges by mergekit-pcb with `mergekit-pcb yaml`",
        )


def _foreign(registry: ModuleType) -> str:
    """Class and module of a method named ``pcb`` that is not ours; empty where there is none."""
    registered = {method.spec.name: method for method in registry.registered_methods()}
    kind = type(registered["pcb"]) if "pcb" in registered else None
    if kind is None or kind.__module__.startswith("mergekit_pcb."):
        return ""
    return f"{kind.__qualname__} in {kind.__module__}"


def _register(registry: ModuleType) -> None:
    if foreign := _foreign(registry):
        raise RuntimeError(
            f"mergekit already has a method named pcb, {foreign}, which is left alone"
        )
    import mergekit_pcb.host.method  # noqa: F401 - registers itself


def _wrap_planner(plan: ModuleType) -> None:
    from mergekit_pcb.host import planning

    planning.wrap_planner(plan)


def _wrap_raw_planner(merge_raw_pytorch: ModuleType) -> None:
    from mergekit_pcb.host import planning

    planning.wrap_raw_planner(merge_raw_pytorch)


def _wrap_executor(multigpu_executor: ModuleType) -> None:
    from mergekit_pcb.host import multi_gpu

    multi_gpu.wrap_executor(multigpu_executor)


def _extend_genome(genome: ModuleType) -> None:
    genome.METHOD_PARAM_MAPS.setdefault("pcb", ["weight", "density"])


_ACTIONS: dict[str, Callable[[ModuleType], None]] = {
    "mergekit.merge_methods.registry": _register,
    "mergekit.plan": _wrap_planner,
    "mergekit.multigpu_executor": _wrap_executor,
    "mergekit.scripts.merge_raw_pytorch": _wrap_raw_planner,
    "mergekit.evo.genome": _extend_genome,
}


_SAID: set[str] = set()


def _attempt(act: Callable[[ModuleType], None], module: ModuleType) -> None:
    """Mergekit has to keep working whatever is wrong with this package."""
    try:
        act(module)
    except Exception as error:
        if str(error) in _SAID:
            return
        _SAID.add(str(error))
        import warnings

        warnings.warn(
            f"cannot provide all of merge_method: pcb, because {type(error).__name__}: {error}; "
            "install mergekit 0.1.5 and mergekit-pcb anew, or uninstall mergekit-pcb",
            RuntimeWarning,
            stacklevel=2,
        )


class _Finder:
    """A meta path finder for the modules that wait for their action."""

    def __init__(self, names: Sequence[str]) -> None:
        self._waiting = set(names)
        self._asking: set[tuple[int, str]] = set()

    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        asked = get_ident(), name
        # Another finder of this kind may ask all others, too.
        if name not in self._waiting or asked in self._asking:
            return None
        self._asking.add(asked)
        try:
            for finder in [finder for finder in sys.meta_path if finder is not self]:
                find = getattr(finder, "find_spec", None)
                spec: ModuleSpec | None = find(name, path, target) if find else None
                if spec is not None:
                    if spec.loader is not None:
                        spec.loader = _Loader(name, spec.loader, self)  # type: ignore[assignment]
                    return spec
        finally:
            self._asking.discard(asked)
        return None

    def loaded(self, name: str) -> None:
        self._waiting.discard(name)
        if not self._waiting and self in sys.meta_path:
            sys.meta_path.remove(self)


class _Loader:
    """Lets the real loader do everything, then acts on the loaded module."""

    def __init__(self, name: str, loader: Any, finder: _Finder) -> None:
        self._name, self._loader, self._finder = name, loader, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_loader"], name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        # Whoever asks the module for its source or resources later wants the real loader.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._finder.loaded(self._name)
        _attempt(_ACTIONS[self._name], module)
