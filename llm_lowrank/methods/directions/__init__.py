"""What the optimizer steps along, one paper, one file. Every file in this folder is imported and registers its rule.

Methods, which decide what is trained and what is exchanged, are one folder up.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
