"""One paper, one file. Every file in this folder is imported, and a new file registers its method by that."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
