"""Log-probs of tokens, chunk by chunk, against autograd over the full logits."""

import pytest
import torch

from lit_isdpo.objective.logprobs import Head, sequence_logps, token_logps
from lit_isdpo.types import TokenBatch

N, H, V = 7, 4, 11


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"softcap": 2.0}, {"scale": 0.5, "softcap": 2.0}])
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients_are_those_of_the_full_logits(
    chunk_size: int, options: dict[str, float], with_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(shape, generator=generator) for shape in ((N, H), (V, H), (V,)))
    inputs = [tensor.requires_grad_() for tensor in ([hidden, weight, bias] if with_bias else [hidden, weight])]
    head = Head(weight, bias if with_bias else None, **options)
    targets = torch.randint(V, (N,), generator=generator)
    upstream = torch.randn(N, generator=generator)

    logps = head(hidden).log_softmax(dim=1)
    expected = logps.gather(1, targets[:, None])[:, 0]
    expected_gradients = torch.autograd.grad(expected @ upstream, inputs)

    values, collisions = token_logps(hidden, targets, head, chunk_size=chunk_size, collisions=True)
    torch.testing.assert_close(values, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(collisions, (2 * logps).logsumexp(dim=1).detach(), atol=1e-6, rtol=1e-6)
    gradients = torch.autograd.grad(values @ upstream, inputs)
    torch.testing.assert_close(gradients, expected_gradients, atol=1e-6, rtol=1e-5)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight = torch.randn(N, H, requires_grad=True), torch.randn(V, H)
    values, collisions = token_logps(hidden, torch.arange(N), Head(weight), chunk_size=4)
    values.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None
    assert collisions.isnan().all()


def test_large_logits_do_not_overflow() -> None:
    values, _ = token_logps(torch.eye(2), torch.tensor([0, 1]), Head(1e4 * torch.eye(2)), chunk_size=2)
    assert values.tolist() == [0.0, 0.0]


def test_memory_of_the_logits_is_a_chunks() -> None:
    """2,000 tokens x 3,000 entries are 24 MB of fp32 logits; in chunks of 100, 1.2 MB at a time, in both directions."""
    hidden, weight = torch.randn(2000, 8, requires_grad=True), torch.randn(3000, 8, requires_grad=True)
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        values, _ = token_logps(hidden, torch.arange(2000), Head(weight), chunk_size=100)
        values.sum().backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 1.2e6 <= largest < 2.4e6


def test_half_precision_is_only_how_values_are_kept() -> None:
    """Products, sums and softmax are fp32, on a CPU whatever ``dtype`` says; gradients come back as they are kept."""
    generator = torch.Generator().manual_seed(0)
    kept = [torch.randn(shape, generator=generator).bfloat16() for shape in ((N, H), (V, H), (V,))]
    hidden, weight, bias = (tensor.clone().requires_grad_() for tensor in kept)
    head = Head(weight, bias, dtype=torch.bfloat16)
    targets = torch.arange(N)
    logits = kept[0].float() @ kept[1].float().T + kept[2].float()
    torch.testing.assert_close(head(hidden), logits, atol=1e-6, rtol=1e-6)
    values, _ = token_logps(hidden, targets, head, chunk_size=3)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, logits.log_softmax(1)[targets, targets], atol=1e-6, rtol=1e-6)
    gradients = torch.autograd.grad(values.sum(), (hidden, weight, bias))
    assert {gradient.dtype for gradient in gradients} == {torch.bfloat16}


def test_gradients_of_the_head_are_summed_in_fp32() -> None:
    """600 equal tokens, one at a time, each worth 1/2 of gradient: a bfloat16 sum would stop growing at 128."""
    weight, bias = (torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True) for shape in ((2, 1), (2,)))
    values, _ = token_logps(torch.ones(600, 1), torch.zeros(600, dtype=torch.long), Head(weight, bias), chunk_size=1)
    values.sum().backward()
    assert weight.grad.flatten().tolist() == bias.grad.tolist() == [300, -300]


def test_alignment_is_computed_where_it_is_asked_for_alone() -> None:
    one = torch.zeros(1, 1, dtype=torch.long)
    tokens = TokenBatch(one, one >= 0, one, one, one >= 0, one, one[0])
    assert sequence_logps(torch.ones(1, 1, 2), tokens, Head(torch.eye(2)), chunk_size=1).alignment.isnan().all()
