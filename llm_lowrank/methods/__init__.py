"""One paper, one file. Every file in this folder is imported, and a new file registers its method by that."""

import importlib
import pkgutil

# LoRA first: --help shows the others as what they add to it.
for _name in sorted((module.name for module in pkgutil.iter_modules(__path__)), key=lambda name: name != "lora"):
    importlib.import_module(f"{__name__}.{_name}")
