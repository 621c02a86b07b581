"""functional.py against its own equation, written naively, and against what checkpointing, autocast and ZeRO-3 do to a
layer.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from llm_lowrank.numerics.functional import Product, adapter_linear, frozen_linear, product_as

pytestmark = pytest.mark.quick

M, N, R, K, SCALE = 12, 10, 3, 4, 0.7  # out, in, pairs, bank pairs, s


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    return codes * scales  # a codec that builds a new W at every call


class Layer:
    """The operands of one layer; every other argument of the two functions follows from them."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        bias: bool = False,
        bank: bool = False,
        adapter: torch.dtype | None = None,
    ):
        rng = torch.Generator().manual_seed(0)

        def new(*shape: int, dtype: torch.dtype = adapter or dtype) -> Tensor:
            return torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)

        self.parts = (new(M, N, dtype=dtype), new(M, 1, dtype=dtype))
        self.bias = new(M, dtype=dtype) if bias else None
        self.A, self.B = new(R, N).requires_grad_(), new(M, R).requires_grad_()
        self.bank_A, self.bank_B = (new(K, N), new(M, K)) if bank else (None, None)

    def __call__(self, x: Tensor, decode: Callable[..., Tensor] = decode) -> Tensor:
        bank = None if self.bank_A is None or self.bank_B is None else Product(self.bank_A, self.bank_B)
        return adapter_linear(
            x, self.parts, decode=decode, products=[Product(self.A, self.B)], scale=SCALE, bias=self.bias, bank=bank
        )

    def naive(self, x: Tensor) -> Tensor:
        y = x @ decode(*self.parts).T + SCALE * (x @ self.A.T) @ self.B.T
        if self.bank_A is not None and self.bank_B is not None:
            y = y + SCALE * (x @ self.bank_A.T) @ self.bank_B.T
        return y if self.bias is None else y + self.bias

    def gradients(self, x: Tensor, function: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
        """[y, dx, dA, dB] under a fixed, uneven g."""
        y = (function or self)(x)
        g = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
        return [y.detach(), *torch.autograd.grad(y, (x, self.A, self.B), g)]


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (
        torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype).requires_grad_()
    )


def saved_by(run: Callable[[], Tensor]) -> list[Tensor]:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run()
    return kept


def ulp(y: Tensor) -> Tensor:
    return 2.0 ** (y.abs().float().clamp_min(1e-30).log2().floor() - 7)  # of bf16


@pytest.mark.parametrize("bank", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(N,), (3, N), (2, 3, N), (2, 1, 3, N)])
def test_value_and_gradients_are_the_equation(shape, bias, bank):
    layer = Layer(torch.float64, bias, bank)
    x = inputs(*shape, dtype=torch.float64)
    assert layer(x).shape == (*shape[:-1], M)
    torch.testing.assert_close(layer(x), layer.naive(x))
    assert torch.autograd.gradcheck(lambda x, A, B: layer(x), (x, layer.A, layer.B))


@pytest.mark.parametrize("bias", [False, True])
def test_frozen_linear_is_the_equation_and_keeps_references_only(bias):
    layer = Layer(torch.float64, bias)
    x = inputs(2, 3, N, dtype=torch.float64)
    expected = x @ decode(*layer.parts).T + (0 if layer.bias is None else layer.bias)
    torch.testing.assert_close(frozen_linear(x, layer.parts, decode, layer.bias), expected)
    assert torch.autograd.gradcheck(lambda x: frozen_linear(x, layer.parts, decode, layer.bias), x)
    kept = saved_by(lambda: frozen_linear(x, layer.parts, decode, layer.bias))
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in layer.parts]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("gates", ["none", "trained", "constant", "per token"])
def test_two_products_with_gates_and_an_input_of_their_own(gates, dropped, bias):
    """RaSA's pool, DropLoRA's mask, LoRA's dropout: value and gradients of everything that is trained."""
    layer, x = Layer(torch.float64, bias), inputs(2, 3, N, dtype=torch.float64)
    rng = torch.Generator().manual_seed(5)

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64).requires_grad_()

    more = new(K, N), new(M, K)
    none = (None, None)
    d = {
        "none": none,
        "trained": (new(R), new(K)),
        "constant": (new(R).detach(), None),
        "per token": (new(6, R).detach(), None),
    }[gates]
    z = new(2, 3, N) if dropped else None
    products = [Product(layer.A, layer.B, d[0]), Product(*more, d[1])]
    read = x if z is None else z
    wanted = x @ decode(*layer.parts).T + (0 if layer.bias is None else layer.bias)
    for A, B, gate, *_ in products:
        h = (read @ A.T).reshape(6, -1) * (1 if gate is None else gate)
        wanted = wanted + SCALE * (h @ B.T).view(2, 3, M)
    found = adapter_linear(x, layer.parts, decode=decode, products=products, scale=SCALE, bias=layer.bias, dropped=z)
    torch.testing.assert_close(found, wanted)
    leaves = [t for t in (x, z, layer.A, layer.B, *more, *d) if t is not None and t.requires_grad]
    g = torch.linspace(-1, 2, found.numel(), dtype=found.dtype).view(found.shape)
    for ours, true in zip(torch.autograd.grad(found, leaves, g), torch.autograd.grad(wanted, leaves, g), strict=True):
        torch.testing.assert_close(ours, true)


FIELDS = ("A", "B", "gate", "core", "out")
Q = 5  # columns of B beside a core


def product_of(fields: str, trained: str) -> Product:
    """A product with these fields beside A and B, of which some are trained."""
    rng = torch.Generator().manual_seed(6)
    sizes = {"A": (R, N), "B": (M, Q if "core" in fields else R), "gate": (R,), "core": (Q, R), "out": (M,)}
    made = {name: torch.randn(sizes[name], generator=rng, dtype=torch.float64) for name in ("A", "B", *fields.split())}
    return Product(**{name: t.requires_grad_(name in trained.split()) for name, t in made.items()})


def whole_of(product: Product) -> Tensor:
    """diag(out) B core diag(gate) A, (m, n)."""
    A, B, gate, core, out = product
    B = B if core is None else B @ core
    B = B if gate is None else B * gate
    return (B if out is None else out[:, None] * B) @ A


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("trained", ["core", "out", "gate", "gate out", "core out", "A B gate core out", "B"])
@pytest.mark.parametrize("fields", ["core", "out", "core out", "gate core out", "gate out"])
def test_a_core_and_weights_of_the_outputs(fields, trained, dropped, magnitude):
    """LoRA-XS's and CORE's matrix, VeRA's and OSoRA's vectors: value, and gradients of whatever is trained."""
    layer, x = Layer(torch.float64, bias=True), inputs(2, 3, N, dtype=torch.float64)
    product = product_of(fields, trained)
    if magnitude and product.out is not None:
        return  # row lengths know no weights of the outputs
    z = inputs(2, 3, N, dtype=torch.float64).detach().mul(2).requires_grad_() if dropped else None
    w, change = decode(*layer.parts), whole_of(product)
    growth = torch.ones(M, dtype=torch.float64)
    if magnitude:
        lengths = torch.linspace(1, 2, M, dtype=torch.float64)
        norms = w.norm(dim=1)
        growth = lengths / (w + SCALE * change.detach() if product.gate is None else _ungated(w, product)).norm(dim=1)
    wanted = (x @ w.T + SCALE * (x if z is None else z) @ change.T) * growth + layer.bias
    found = adapter_linear(
        x,
        layer.parts,
        decode=decode,
        products=[product],
        scale=SCALE,
        bias=layer.bias,
        dropped=z,
        direction=(lengths, norms) if magnitude else None,
    )
    torch.testing.assert_close(found, wanted)
    leaves = [t for t in (x, z, *product) if t is not None and t.requires_grad]
    g = torch.linspace(-1, 2, found.numel(), dtype=found.dtype).view(found.shape)
    for ours, true in zip(torch.autograd.grad(found, leaves, g), torch.autograd.grad(wanted, leaves, g), strict=True):
        torch.testing.assert_close(ours, true)


def _ungated(w: Tensor, product: Product) -> Tensor:
    return w + SCALE * whole_of(product._replace(gate=None)).detach()


@pytest.mark.parametrize("trained", ["B", "core", "out", "gate", "gate out"])
def test_beside_a_frozen_a_no_input_is_kept(trained):
    """What a layer keeps of the forward is (t, r), and the input, (t, n), is freed."""
    layer, x = Layer(torch.float64), inputs(7, N, dtype=torch.float64).detach()
    product = product_of(trained if trained != "B" else "", trained)
    kept = saved_by(lambda: adapter_linear(x, layer.parts, decode=decode, products=[product], scale=SCALE))
    passed = {t.data_ptr() for t in (*product, *layer.parts) if t is not None}
    own = [t for t in kept if t.data_ptr() not in passed]
    assert [t.shape for t in own] == [(7, R)]


def test_a_trained_core_costs_no_gradient_of_b():
    """dS = s (g U)^T (x V): two products with (t, .) beside W's, where U S made first would cost a third, (m, p)."""
    layer, x = Layer(torch.float64), inputs(7, N, dtype=torch.float64).detach()
    product = product_of("core", "core")
    y = adapter_linear(x, layer.parts, decode=decode, products=[product], scale=SCALE)
    shapes = []
    with _Products(shapes):
        y.sum().backward()
    assert shapes == [(7, M, Q), (Q, 7, R)]  # u = g B, and u^T h: nothing of shape (m, .)


class _Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Note the sizes (rows, sum, columns) of all matrix products."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.shapes = shapes

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten.mm.default:
            self.shapes.append((*args[0].shape, args[1].shape[1]))
        return operation(*args, **(kwargs or {}))


def test_a_bank_does_not_read_the_dropped_input():
    layer, x = Layer(torch.float64, bank=True), inputs(5, N, dtype=torch.float64)
    z = inputs(5, N, dtype=torch.float64).detach().mul(2).requires_grad_()
    bank = Product(layer.bank_A, layer.bank_B)
    found = adapter_linear(
        x, layer.parts, decode=decode, products=[Product(layer.A, layer.B)], scale=SCALE, bank=bank, dropped=z
    )
    w = decode(*layer.parts) + SCALE * layer.bank_B @ layer.bank_A
    wanted = x @ w.T + SCALE * z @ layer.A.T @ layer.B.T
    torch.testing.assert_close(found, wanted)
    leaves = (x, z, layer.A, layer.B)
    for ours, true in zip(
        torch.autograd.grad(found.sum(), leaves), torch.autograd.grad(wanted.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(ours, true)


def test_strided_input_and_expanded_gradient():
    layer = Layer(torch.float64, bank=True)
    x = inputs(2, N, 5, dtype=torch.float64)
    ours = torch.autograd.grad(layer(x.mT).sum(), (x, layer.A, layer.B))
    torch.testing.assert_close(ours, torch.autograd.grad(layer.naive(x.mT).sum(), (x, layer.A, layer.B)))


@pytest.mark.parametrize("shape", [(0, N), (2, 0, N)])
def test_zero_tokens(shape):
    layer = Layer(bias=True, bank=True)
    y, dx, dA, dB = layer.gradients(inputs(*shape))
    assert y.shape == (*shape[:-1], M) and dx.shape == shape
    assert torch.equal(dA, torch.zeros(R, N)) and torch.equal(dB, torch.zeros(M, R))
    frozen_linear(inputs(*shape), layer.parts, decode).sum().backward()


@pytest.mark.parametrize("bank", [False, True])
def test_keeps_x_and_the_trainable_part_of_h_only(bank):
    layer, x = Layer(bank=bank), inputs(2, 5, N)
    kept = saved_by(lambda: layer(x))
    passed = [t for t in (layer.A, layer.B, layer.bank_A, layer.bank_B, *layer.parts) if t is not None]
    own = [t for t in kept if t.data_ptr() not in {p.data_ptr() for p in passed}]
    assert len(kept) == len(passed) + 2, "every parameter once, as it was passed in"
    assert own[0].data_ptr() == x.data_ptr()
    assert own[1].shape == (10, R) and own[1].untyped_storage().nbytes() == 10 * R * 4, (
        "a view would keep the bank's part too"
    )


@pytest.mark.parametrize("trained", ["x", "A", "B", "xA", "xB", "AB", ""])
def test_only_what_is_asked_for_is_computed_and_kept(trained):
    layer = Layer(bank=True)
    x = inputs(5, N).requires_grad_("x" in trained)
    everything = dict(zip(("y", "x", "A", "B"), Layer(bank=True).gradients(inputs(5, N)), strict=True))
    layer.A.requires_grad_("A" in trained)
    layer.B.requires_grad_("B" in trained)
    sides = {"x": x, "A": layer.A, "B": layer.B}
    own = {t.data_ptr() for t in saved_by(lambda: layer(x))} - {
        t.data_ptr() for t in (layer.A, layer.B, layer.bank_A, layer.bank_B)
    }
    own -= {t.data_ptr() for t in layer.parts}
    assert (x.data_ptr() in own) == ("A" in trained) and len(own) == ("A" in trained) + ("B" in trained)
    y = layer(x)
    assert y.requires_grad == bool(trained)
    if trained:
        y.backward(torch.linspace(-1, 2, y.numel()).view(y.shape))
    for name, side in sides.items():
        if name in trained:
            torch.testing.assert_close(side.grad, everything[name])
        else:
            assert side.grad is None


def test_w_is_decoded_again_in_backward_and_only_for_dx():
    calls = []

    def counted(*parts: Tensor) -> Tensor:
        calls.append(1)
        return decode(*parts)

    layer, x = Layer(), inputs(5, N)
    y = layer(x, counted)
    assert len(calls) == 1
    y.sum().backward()
    assert len(calls) == 2
    layer(x.detach(), counted).sum().backward()
    assert len(calls) == 3


def test_parameters_whose_storage_is_swapped_between_forward_and_backward():
    """ZeRO-3 frees a parameter after the forward and gathers it elsewhere before the backward."""
    layer, x = Layer(bias=True, bank=True), inputs(2, 5, N)
    expected = layer.gradients(x)
    y = layer(x)
    parameters = [layer.A, layer.B, layer.bank_A, layer.bank_B, layer.bias, *layer.parts]
    values = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.data.fill_(torch.nan)  # whoever kept the old storage sees this
        p.data = torch.empty(0)
    for p, value in zip(parameters, values, strict=True):
        p.data = value
    g = torch.linspace(-1, 2, y.numel()).view(y.shape)
    for gradient, before in zip(torch.autograd.grad(y, (x, layer.A, layer.B), g), expected[1:], strict=True):
        assert torch.equal(gradient, before)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    layer, x = Layer(bias=True, bank=True), inputs(2, 5, N)
    y = checkpoint(lambda x: layer(layer(x)[..., :N].tanh()), x, use_reentrant=reentrant)
    y.square().sum().backward()
    got = [x.grad, layer.A.grad, layer.B.grad]
    plain = layer(layer(x)[..., :N].tanh()).square().sum()
    for a, b in zip(got, torch.autograd.grad(plain, (x, layer.A, layer.B)), strict=True):
        assert a is not None and torch.equal(a, b)


def test_no_grad():
    layer, x = Layer(bias=True, bank=True), inputs(2, 5, N)
    expected = layer(x)
    with torch.no_grad():
        y = layer(x)
    assert torch.equal(y, expected) and y.grad_fn is None


@pytest.mark.parametrize("bank", [False, True])
def test_low_precision_backbone_with_fp32_adapters(bank):
    layer, x = Layer(torch.bfloat16, bank=bank, adapter=torch.float32), inputs(2, 5, N, dtype=torch.bfloat16)
    y, dx, dA, dB = layer.gradients(x)
    assert (y.dtype, dx.dtype, dA.dtype, dB.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32)
    exact = Layer(torch.float64, bank=bank)
    exact.parts = (layer.parts[0].double() * layer.parts[1].double(), exact.parts[1].new_ones(M, 1))
    for ours, true in zip((y, dx, dA, dB), exact.gradients(x.detach().double().requires_grad_()), strict=True):
        assert (ours.double() - true).norm() < 0.01 * true.norm()


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def test_autocast(device):
    """Values in autocast's dtype, gradients in their leaves' dtype, and the backward does not care whether autocast is
    still on.
    """

    def own_precision(*parts: Tensor) -> Tensor:
        assert not torch.is_autocast_enabled(device), "W would come out differently in forward and backward"
        return decode(*parts)

    layer = Layer(bias=True, bank=True)
    for name in ("bias", "bank_A", "bank_B"):
        setattr(layer, name, getattr(layer, name).to(device))
    layer.parts = tuple(p.to(device) for p in layer.parts)
    layer.A, layer.B = (p.detach().to(device).requires_grad_() for p in (layer.A, layer.B))
    x = inputs(2, 5, N).detach().to(device).requires_grad_()
    leaves = (x, layer.A, layer.B)
    with torch.autocast(device, torch.bfloat16):
        y = layer(x, own_precision)
        assert frozen_linear(x, layer.parts, own_precision, layer.bias).dtype == torch.bfloat16
        inside = torch.autograd.grad(y.float().square().sum(), leaves, retain_graph=True)
    outside = torch.autograd.grad(y.float().square().sum(), leaves)
    exact = torch.autograd.grad(layer.naive(x).square().sum(), leaves)
    assert y.dtype == torch.bfloat16
    for a, b, true in zip(inside, outside, exact, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)
        assert (a - true).norm() < 0.03 * true.norm()
    full = layer(x, own_precision)  # a full precision forward stays one when autocast is on in backward
    with torch.autocast(device, torch.bfloat16):
        late = torch.autograd.grad(full.square().sum(), leaves)
    torch.testing.assert_close(late, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moving_pairs_between_trainable_and_bank_changes_the_order_of_a_sum_only(dtype):
    """s B A + s bank_B bank_A keeps its pairs, so y keeps its value: 1e-6 relative in fp32, one ulp in bf16."""
    m, n, r, k = 96, 64, 8, 24
    rng = torch.Generator().manual_seed(2)
    w, x = torch.randn(m, n, generator=rng).to(dtype), torch.randn(200, n, generator=rng).to(dtype)
    A, B = torch.randn(r + k, n, generator=rng), torch.randn(m, r + k, generator=rng) / 10

    def y(order: Tensor) -> Tensor:
        a, b = A[order], B[:, order]
        return adapter_linear(
            x,
            (w,),
            decode=lambda w: w,
            products=[Product(a[:r], b[:, :r])],
            scale=SCALE,
            bank=Product(a[r:], b[:, r:]),
        )

    before, after = y(torch.arange(r + k)), y(torch.randperm(r + k, generator=rng))
    if dtype is torch.float32:
        assert (before - after).norm() < 1e-6 * before.norm()
    else:
        assert ((before - after).abs().float() <= ulp(before)).all()


def test_a_pair_weighs_the_same_on_either_side():
    layer, x = Layer(torch.float64, bank=True), inputs(5, N, dtype=torch.float64)
    apart = layer(x)
    layer.A, layer.B = torch.cat([layer.A, layer.bank_A]), torch.cat([layer.B, layer.bank_B], 1)
    layer.bank_A = layer.bank_B = None
    torch.testing.assert_close(layer(x), apart)


def test_an_adapter_without_pairs_is_the_frozen_linear():
    layer, x = Layer(bias=True), inputs(5, N)
    y = adapter_linear(
        x,
        layer.parts,
        decode=decode,
        products=[Product(torch.zeros(0, N), torch.zeros(M, 0))],
        scale=SCALE,
        bias=layer.bias,
    )
    assert torch.equal(y, frozen_linear(x, layer.parts, decode, layer.bias))
    assert torch.equal(
        torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(frozen_linear(x, layer.parts, decode).sum(), x)[0]
    )


@pytest.mark.parametrize("frozen", ["bias", "bank_A", "bank_B", "parts"])
def test_frozen_operands_that_ask_for_a_gradient_are_not_ignored_silently(frozen):
    layer = Layer(bias=True, bank=True)
    operand = layer.parts[0] if frozen == "parts" else getattr(layer, frozen)
    operand.requires_grad_()
    with pytest.raises(AssertionError, match="must not require gradients"):
        layer(inputs(5, N))


def test_a_second_derivative_is_refused():
    layer, x = Layer(), inputs(5, N)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_product_is_float32_where_it_is_kept_as_float32(dtype):
    a, b = (torch.randn(s, generator=torch.Generator().manual_seed(0)).to(dtype) for s in ((3, 40), (40, 5)))
    assert torch.equal(product_as(a, b, torch.float32), (a @ b).float())
    # tensors without values stand for those of a CUDA device: the operation is known, nothing runs
    with FakeTensorMode():
        there = product_as(
            torch.empty(3, 40, dtype=dtype, device="cuda"),
            torch.empty(40, 5, dtype=dtype, device="cuda"),
            torch.float32,
        )
        assert there.shape == (3, 5) and there.dtype == torch.float32 and there.device.type == "cuda"
