"""jaxkv: functional caches for JAX."""

import ast
import importlib
import pkgutil
import sys
from types import ModuleType
from typing import Any

from . import logs

__version__ = "0.1.0"

# Each public name is said once, in __init__.pyi, and imported when it is first asked for: who decodes never waits for
# the memo, and the command's --help not for JAX.
_HOMES = {
    alias.name: f"{__name__}.{node.module or ''}".rstrip(".")
    for node in ast.parse(pkgutil.get_data(__name__, "__init__.pyi") or b"").body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}
__all__ = sorted(_HOMES)


class _Package(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=self)
        home = vars(importlib.import_module(_HOMES[name]))
        value = home[name] if name in home else importlib.import_module(f"{_HOMES[name]}.{name}")
        vars(self)[name] = value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # Whoever imports jaxkv.generate.loop has this package bound to "generate", where the function belongs.
        if not (name in _HOMES and isinstance(value, ModuleType) and value.__name__ == f"{__name__}.{name}"):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return [*__all__, "__version__"]


sys.modules[__name__].__class__ = _Package
logs.configure()
if "jax" in sys.modules:  # so that jax.export can read a program with a cache before a name of this package is used
    for _module in ("cache.export", "nn.rotary"):
        importlib.import_module(f"{__name__}.{_module}")
