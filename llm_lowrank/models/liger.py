"""Liger's fused kernels in a model: its norms, rotations and activations, never what is adapted or the loss.

    put_in     patch one model, and nothing else of the process
    prove      compare short models with and without the kernels, on the device at hand, before a run

The package patches an instance's norms and activations by methods of its own. For rotations it replaces a function of
transformers' module, for every model of the process; here each attention of the one model gets a copy of its forward
that sees the new function, and transformers stays as it was.

The proof is made before a weight is read, on the first decoder layers of the model's config with random values in their
real shapes, adapted by LoRA. So it is the same under every engine, needs no communication, and shows gradients, which
a sharded model gives to its optimizer alone. The outputs and every gradient are compared in float32, where a kernel
may differ by little, and in the run's dtype, where it may differ by what rounding costs the model without kernels too.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_lowrank.engines.frozen import FrozenLinear
from llm_lowrank.engines.fsdp import decoder_layers

PACKAGE = "liger_kernel"
OFF = "or set use_liger_kernel: false"  # how a refusal ends
LAYERS, ROWS, TOKENS = 2, 2, 32  # of the proof; more layers where the first two are not of every kind
FLOAT32 = 1e-4  # |with kernels - without| / |without| that the order of sums and fast exponentials explain
LOOSE = 3.0  # times the rounding error of the model without kernels

Make = Callable[[torch.dtype], PreTrainedModel]  # a model on the meta device, with adapters


def missing() -> list[str]:
    """What the kernels need and is not here."""
    lacking = [] if importlib.util.find_spec(PACKAGE) else ["liger-kernel"]
    return lacking if torch.cuda.is_available() else [*lacking, "a CUDA device"]


# --- into one model ---------------------------------------------------------------------------------------------------


def put_in(model: PreTrainedModel, overwriting: bool = True) -> str:
    """Put the kernels into the modules of this model; return how many of which kind have them now.

    overwriting: whether rotations, SwiGLU and GeGLU too. These write over the outputs of linears, rotations in forward
    and activations in backward, so that no adapter may need its output in backward. ValueError if the package does not
    support the model.
    """
    patches = importlib.import_module(f"{PACKAGE}.transformers.monkey_patch")
    kind, known = model.config.model_type, patches.MODEL_TYPE_TO_APPLY_LIGER_FN
    if kind not in known:
        raise ValueError(
            f"use_liger_kernel: liger-kernel has no kernels for model type {kind} (it has them for "
            f"{', '.join(sorted(known))}); set use_liger_kernel: false"
        )
    without = {} if overwriting else {"rope": False, "swiglu": False, "geglu": False}
    before = {module: vars(module).get("forward") for module in model.modules()}
    try:
        with _process_unchanged() as changed:
            patches._apply_liger_kernel_to_instance(
                model=model, cross_entropy=False, fused_linear_cross_entropy=False, **without
            )
    except Exception as error:
        raise ValueError(
            f"use_liger_kernel: liger-kernel cannot patch {type(model).__name__} of this version of transformers "
            f"({type(error).__name__}: {error}); install another version of liger-kernel, {OFF}"
        ) from error
    for module in model.modules():
        _see_functions(module, changed)
    patched = [module for module, forward in before.items() if vars(module).get("forward") is not forward]
    if not patched or any(isinstance(module, FrozenLinear) or module is model for module in patched):
        raise ValueError(
            f"use_liger_kernel: liger-kernel patched {_count(patched) or 'nothing'} of {type(model).__name__}, and not "
            f"its norms, rotations and activations alone; install another version of liger-kernel, {OFF}"
        )
    return _count(patched)


def _count(modules: Sequence[nn.Module]) -> str:
    return ", ".join(f"{n} {name}" for name, n in Counter(type(module).__name__ for module in modules).items())


@contextmanager
def _process_unchanged() -> Iterator[dict[str, dict[str, Any]]]:
    """Undo at the end what the block assigned to names of torch.nn and transformers.

    Yield module name -> name -> the value that the block assigned; filled at the end.
    """
    names = [name for name in sys.modules if name == "torch.nn" or name.startswith("transformers.models.")]
    modules = [module for name in names if isinstance(module := sys.modules[name], ModuleType)]
    saved = [(module, dict(vars(module))) for module in modules]
    changed: dict[str, dict[str, Any]] = {}
    try:
        yield changed
    finally:
        for module, values in saved:
            for name, value in values.items():
                found = vars(module).get(name)
                if found is not value:
                    changed.setdefault(module.__name__, {})[name] = found
                    setattr(module, name, value)


def _see_functions(module: nn.Module, changed: dict[str, dict[str, Any]]) -> None:
    """Let the forward of one module see the functions that were replaced in the file of its class."""
    forward = type(module).forward
    if not isinstance(forward, FunctionType) or "forward" in vars(module):
        return
    functions = {k: f for k, f in changed.get(forward.__module__, {}).items() if isinstance(f, FunctionType)}
    if not functions.keys() & set(forward.__code__.co_names):
        return
    ours = FunctionType(
        forward.__code__, forward.__globals__ | functions, forward.__name__, forward.__defaults__, forward.__closure__
    )
    ours.__kwdefaults__ = forward.__kwdefaults__
    module.forward = MethodType(ours, module)


# --- the proof --------------------------------------------------------------------------------------------------------


def prove(make: Make, dtype: torch.dtype, device: torch.device, overwriting: bool = True) -> str:
    """Return a sentence with the figures; ValueError if the kernels change outputs or gradients by more than rounding.

    make: returns a model with adapters that train, in a dtype, without values.
    """
    exact = _measure(make, torch.float32, dtype, device, None)
    worst = {"float32": (_apart(_measure(make, torch.float32, dtype, device, overwriting), exact), FLOAT32)}
    if dtype != torch.float32:
        rounded, name = _apart(_measure(make, dtype, dtype, device, None), exact), str(dtype).removeprefix("torch.")
        fused = _apart(_measure(make, dtype, dtype, device, overwriting), exact)
        worst[name] = fused, LOOSE * rounded[0] + torch.finfo(dtype).eps
    for name, ((away, what), allowed) in worst.items():
        if not away <= allowed:
            raise ValueError(
                f"use_liger_kernel: with liger-kernel's kernels in {name} {what} is {away:.0e} away from what it is "
                f"without them, and rounding explains {allowed:.0e}; install another version of liger-kernel, {OFF}"
            )
    return "; ".join(
        f"{name} at most {found[0]:.0e} away, allowed {allowed:.0e}" for name, (found, allowed) in worst.items()
    )


def _apart(found: dict[str, Tensor], exact: dict[str, Tensor]) -> tuple[float, str]:
    """The largest |found - exact| / |exact|, and of what."""
    away = {name: float((found[name] - value).norm() / value.norm()) for name, value in exact.items()}
    name = max(away, key=lambda name: away[name] if away[name] == away[name] else float("inf"))
    return away[name], name


def _measure(
    make: Make, dtype: torch.dtype, rounded: torch.dtype, device: torch.device, overwriting: bool | None
) -> dict[str, Tensor]:
    """Outputs and gradients, in float32, of a short model whose values are numbers of `rounded`.

    overwriting: as in put_in; None: without kernels.
    """
    random = torch.Generator(device).manual_seed(0)
    model = make(dtype).eval()
    _shorten(model)
    _fill(model, rounded, device, random)
    if overwriting is not None:
        put_in(model, overwriting)
    try:
        return _outputs(model, rounded, device, random)
    except Exception as error:
        how = "without" if overwriting is None else "with"
        raise ValueError(
            f"use_liger_kernel: a short {type(model).__name__} cannot be computed {how} the kernels, so that they "
            f"cannot be compared ({type(error).__name__}: {error}); set use_liger_kernel: false"
        ) from error


def _outputs(
    model: PreTrainedModel, rounded: torch.dtype, device: torch.device, random: torch.Generator
) -> dict[str, Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and not p.is_meta}
    x = torch.randn(ROWS, TOKENS, model.config.get_text_config().hidden_size, device=device, generator=random)
    x = x.to(rounded).to(model.dtype).requires_grad_()
    y = model.base_model(inputs_embeds=x, use_cache=False).last_hidden_state.float()
    dy = torch.randn(y.shape, device=device, generator=random)
    gradients = torch.autograd.grad((y * dy).sum(), [x, *trained.values()])
    names = ["the gradient of the input", *(f"the gradient of {name}" for name in trained)]
    return {"the output": y.detach()} | dict(zip(names, (g.float() for g in gradients), strict=True))


def _shorten(model: PreTrainedModel) -> None:
    """Leave the first decoder layers: at least two, and as many as have one of every kind."""
    layers = decoder_layers(model)
    stack = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) and m[0] is layers[0])
    types = getattr(model.config.get_text_config(), "layer_types", None) or [None] * len(stack)
    kinds = [
        (type(layer), types[i], *((name, p.shape) for name, p in layer.named_parameters()))
        for i, layer in enumerate(stack)
    ]
    del stack[max(LAYERS, 1 + max(map(kinds.index, kinds))) :]


def _fill(model: PreTrainedModel, rounded: torch.dtype, device: torch.device, random: torch.Generator) -> None:
    """Give random values to all parameters but those of the embedding and the output layer, which no kernel reads."""
    outside = [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]
    left = {p for m in outside for p in m.parameters()}
    for module in model.base_model.modules():
        for name, p in module.named_parameters(recurse=False):
            if p not in left:
                value = torch.randn(p.shape, device=device, generator=random)
                if p.ndim > 1:
                    value /= p.shape[-1] ** 0.5
                else:
                    value = 0.1 * value + float(name != "bias")  # of a norm: near one
                setattr(module, name, nn.Parameter(value.to(rounded).to(p.dtype), requires_grad=p.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
