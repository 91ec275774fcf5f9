"""Growth criteria, one a module. A module that is put here is found, and what it registers is a method."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
