"""Log-probs against a full log-softmax in float64, and against sums done by hand."""

import weakref

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_ds.logps import chunked_target_logps, sum_by_response, target_logps
from dpo_ds.models.causal_lm import Head

# Narrow, so that a chunk's logits are larger than the head's weight. Four chunks of 64 columns, the last one cut.
TOKENS, WIDTH, VOCAB = 13, 2, 250
SMALLEST, HALF, ALL = (4 * TOKENS * columns for columns in (64, 128, 256))
"""Bytes of a chunk's logits."""


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that an operator's result has had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def make_head_inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator, requires_grad=True)
    weight = torch.randn(VOCAB, WIDTH, generator=generator, requires_grad=True)
    return hidden, weight, torch.randint(VOCAB, (TOKENS,), generator=generator)


def reference_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = hidden.double() @ weight.double().T
    return logits.log_softmax(-1)[torch.arange(len(targets)), targets]


def test_target_logps_agree_with_log_softmax_in_float64():
    hidden, weight, targets = make_head_inputs()
    logits = (hidden @ weight.T).detach()
    expected = logits.double().log_softmax(-1)[torch.arange(TOKENS), targets]
    torch.testing.assert_close(target_logps(logits, targets).double(), expected, rtol=0, atol=1e-5)


def test_target_logps_of_bfloat16_logits_are_computed_in_float32():
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.tensor([0, 7, 49, 3])
    logps = target_logps(logits, targets)
    expected = logits.double().log_softmax(-1)[torch.arange(4), targets]
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps.double(), expected, rtol=0, atol=1e-5)


def test_target_logps_take_any_leading_shape():
    logits = torch.randn(2, 3, VOCAB, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(6).view(2, 3)
    flat = target_logps(logits.view(6, VOCAB), targets.view(6))
    assert torch.equal(target_logps(logits, targets), flat.view(2, 3))


def test_target_logps_stay_finite_for_large_logits():
    logps = target_logps(torch.tensor([[1e4, 0.0, -1e4]]), torch.tensor([2]))
    assert logps.tolist() == [-2e4]


def chunked(hidden: Tensor, targets: Tensor, weight: Tensor, *, chunk_bytes: int, kept_bytes: int = 0) -> Tensor:
    logps, _ = chunked_target_logps(
        hidden,
        targets,
        weight=weight,
        bias=None,
        logits=F.linear,
        slope=None,
        chunk_bytes=chunk_bytes,
        kept_bytes=kept_bytes,
    )
    return logps


@pytest.mark.parametrize("kept_bytes", [0, HALF, ALL])
@pytest.mark.parametrize("chunk_bytes", [0, SMALLEST, HALF, ALL, 10 * ALL])
def test_chunks_change_neither_value_nor_gradient(chunk_bytes, kept_bytes):
    hidden, weight, targets = make_head_inputs()
    upstream = torch.linspace(-1, 1, TOKENS)

    expected = reference_logps(hidden, weight, targets)
    expected_grads = torch.autograd.grad(expected, (hidden, weight), upstream.double())
    logps = chunked(hidden, targets, weight, chunk_bytes=chunk_bytes, kept_bytes=kept_bytes)
    grads = torch.autograd.grad(logps, (hidden, weight), upstream)

    # Log-probs are of the order of 5 nats, gradients of the order of 1.
    torch.testing.assert_close(logps.double(), expected, rtol=1e-6, atol=1e-6)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad.double(), expected_grad.double(), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("vocab", [65, 129, VOCAB])
def test_targets_at_the_bounds_of_chunks_are_found_once(vocab):
    hidden, weight, _ = make_head_inputs()
    weight = weight[:vocab].detach().requires_grad_()
    targets = torch.tensor([0, 1, 63, 64, vocab - 1] * 3)[:TOKENS]
    expected = reference_logps(hidden, weight, targets)
    logps = chunked(hidden, targets, weight, chunk_bytes=SMALLEST)
    torch.testing.assert_close(logps.double(), expected, rtol=1e-6, atol=1e-6)
    grad, expected_grad = (torch.autograd.grad(x.sum(), weight)[0] for x in (logps, expected))
    torch.testing.assert_close(grad, expected_grad, rtol=1e-6, atol=2e-6)


def test_chunks_stay_finite_for_large_logits():
    hidden, weight, targets = make_head_inputs()
    expected = reference_logps(300 * hidden, weight, targets)
    assert expected.min() < -100
    logps = chunked(300 * hidden, targets, weight, chunk_bytes=SMALLEST)
    torch.testing.assert_close(logps.double(), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(("kept_bytes", "again"), [(0, 4), (SMALLEST - 1, 4), (SMALLEST, 3), (HALF, 2), (ALL, 0)])
def test_only_logits_that_were_not_kept_are_computed_again(kept_bytes, again):
    hidden, weight, targets = make_head_inputs()
    calls = []

    def logits(*inputs):
        calls.append(1)
        return F.linear(*inputs)

    options = {"weight": weight, "bias": None, "logits": logits, "slope": None}
    logps, _ = chunked_target_logps(hidden, targets, chunk_bytes=SMALLEST, kept_bytes=kept_bytes, **options)
    assert len(calls) == 4
    logps.sum().backward()
    assert len(calls) == 4 + again


def test_a_second_backward_is_like_the_first():
    hidden, weight, targets = make_head_inputs()
    logps = chunked(hidden, targets, weight, chunk_bytes=SMALLEST, kept_bytes=ALL)
    first, second = (torch.autograd.grad(logps.sum(), weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_kept_logits_are_those_that_would_be_computed_again():
    hidden, weight, targets = make_head_inputs()
    found = []
    for kept_bytes in (0, HALF, ALL):
        leaves = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
        logps = chunked(leaves[0], targets, leaves[1], chunk_bytes=SMALLEST, kept_bytes=kept_bytes)
        found.append([logps, *torch.autograd.grad(logps.sum(), leaves)])
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


@pytest.mark.parametrize("kept_bytes", [0, ALL])
def test_a_head_with_bias_scale_and_softcap_has_the_gradients_of_the_plain_formula(kept_bytes):
    hidden, weight, targets = (x.detach().double() if x.is_floating_point() else x for x in make_head_inputs())
    bias = torch.linspace(-1, 1, VOCAB, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    head = Head(weight, bias, scale=0.5, softcap=2.0)

    expected = (2 * torch.tanh(0.5 * (hidden @ weight.T + bias) / 2)).log_softmax(-1)[torch.arange(TOKENS), targets]
    logps, _ = chunked_target_logps(
        hidden,
        targets,
        weight=weight,
        bias=bias,
        logits=head.logits,
        slope=head.slope,
        chunk_bytes=SMALLEST,
        kept_bytes=kept_bytes,
    )
    expected_grads = torch.autograd.grad(expected.sum(), leaves)
    grads = torch.autograd.grad(logps.sum(), leaves)
    torch.testing.assert_close(logps.double(), expected.detach(), rtol=1e-6, atol=1e-6)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-5)


def test_near_its_cap_a_bfloat16_head_has_the_slope_of_float32():
    # There the slope is a small difference of large numbers, of which bfloat16 would keep one digit or none.
    cap = 2.0
    hidden, weight = torch.tensor([[5.0]]).bfloat16(), torch.linspace(0.8, 1.2, 8)[:, None].bfloat16()
    bias = torch.zeros(8, dtype=torch.bfloat16, requires_grad=True)
    head = Head(weight, bias, scale=1.0, softcap=cap)
    logits = head.logits(hidden, weight, bias).detach().double()
    assert logits.min() > 0.9 * cap
    expected = (F.one_hot(torch.tensor([3]), 8) - logits.softmax(-1)) * (1 - (logits / cap) ** 2)
    options = {"weight": weight, "bias": bias, "logits": head.logits, "slope": head.slope, "chunk_bytes": ALL}
    logps, _ = chunked_target_logps(hidden, torch.tensor([3]), **options)
    (grad,) = torch.autograd.grad(logps.sum(), bias)
    torch.testing.assert_close(grad.double(), expected[0], rtol=2**-8, atol=0)


def test_where_there_is_no_backward_no_logits_outlive_their_chunk():
    hidden, weight, targets = make_head_inputs()
    found = []

    def logits(*inputs):
        assert sum(earlier() is not None for earlier in found) <= 1
        result = F.linear(*inputs)
        found.append(weakref.ref(result))
        return result

    options = {"weight": weight, "bias": None, "logits": logits, "slope": None, "chunk_bytes": SMALLEST}
    with torch.no_grad():
        chunked_target_logps(hidden, targets, kept_bytes=ALL, **options)
    assert len(found) == 4


@pytest.mark.parametrize("frozen", [("hidden",), ("weight",), ("hidden", "weight")])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen):
    hidden, weight, targets = make_head_inputs()
    chunked(hidden, targets, weight, chunk_bytes=SMALLEST).sum().backward()
    some_hidden, some_weight = (
        x.detach().clone().requires_grad_(name not in frozen) for name, x in (("hidden", hidden), ("weight", weight))
    )
    logps = chunked(some_hidden, targets, some_weight, chunk_bytes=SMALLEST)
    assert logps.requires_grad == (len(frozen) < 2)
    if logps.requires_grad:
        logps.sum().backward()
    for name, leaf, expected in (("hidden", some_hidden, hidden.grad), ("weight", some_weight, weight.grad)):
        assert leaf.grad is None if name in frozen else torch.equal(leaf.grad, expected)


@pytest.mark.parametrize(
    ("chunk_bytes", "columns"), [(0, 64), (SMALLEST, 64), (HALF, 128), (HALF + 1, 128), (ALL, 250)]
)
def test_no_more_than_one_chunk_of_logits_exists_forward_or_backward(chunk_bytes, columns):
    hidden, weight, targets = make_head_inputs()
    with LargestTensor() as largest:
        chunked(hidden, targets, weight, chunk_bytes=chunk_bytes).sum().backward()
    assert largest.elements == max(TOKENS * columns, weight.numel())


def test_no_logits_are_kept_for_backward():
    hidden, weight, targets = make_head_inputs()
    kept = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        chunked(hidden, targets, weight, chunk_bytes=SMALLEST)
    assert sum(kept) == hidden.numel() + weight.numel() + 2 * TOKENS  # the targets and a log-sum-exp each


def test_entropies_are_those_of_the_whole_distributions():
    hidden, weight, targets = make_head_inputs()
    expected = torch.distributions.Categorical(logits=(hidden @ weight.T).double()).entropy()
    for chunk_bytes in (SMALLEST, HALF, ALL):
        logps, entropies = chunked_target_logps(
            hidden,
            targets,
            weight=weight,
            bias=None,
            logits=F.linear,
            slope=None,
            chunk_bytes=chunk_bytes,
            wants_entropies=True,
        )
        assert torch.equal(logps, chunked(hidden, targets, weight, chunk_bytes=chunk_bytes))
        assert not entropies.requires_grad
        torch.testing.assert_close(entropies.double(), expected.detach(), rtol=1e-5, atol=1e-5)


def test_without_gradients_the_chunks_are_as_small():
    hidden, weight, targets = make_head_inputs()
    with torch.no_grad(), LargestTensor() as largest:
        logps = chunked(hidden, targets, weight, chunk_bytes=HALF)
    assert largest.elements == TOKENS * 128
    torch.testing.assert_close(logps.double(), reference_logps(hidden, weight, targets).detach(), rtol=1e-6, atol=1e-6)


def test_sum_by_response_adds_each_token_to_its_response():
    logps = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0])
    sums = sum_by_response(logps, torch.tensor([2, 0, 2, 0, 3]), responses=4)
    assert sums.dtype == torch.float64
    assert sums.tolist() == [-10.0, 0.0, -5.0, -16.0]


def test_sum_by_response_does_not_depend_on_the_order_of_tokens():
    logps = -torch.rand(4096, generator=torch.Generator().manual_seed(0)) * 12
    response_of = torch.arange(4096) % 3
    order = torch.randperm(4096, generator=torch.Generator().manual_seed(1))
    shuffled = sum_by_response(logps[order], response_of[order], responses=3)
    assert torch.equal(sum_by_response(logps, response_of, responses=3), shuffled)


def test_the_gradient_of_a_sum_reaches_every_token_of_its_response():
    logps = torch.zeros(4, requires_grad=True)
    sums = sum_by_response(logps, torch.tensor([0, 1, 1, 0]), responses=2)
    (sums * torch.tensor([3.0, 5.0])).sum().backward()
    assert logps.grad.tolist() == [3.0, 5.0, 5.0, 3.0]
