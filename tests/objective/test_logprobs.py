"""Log-probs of tokens, chunk by chunk, against autograd over the full logits."""

import pytest
import torch

from lit_isdpo.objective.logprobs import Head, token_logps

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
    with torch.profiler.profile(profile_memory=True) as profile:
        values, _ = token_logps(hidden, torch.arange(2000), Head(weight), chunk_size=100)
        values.sum().backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 1.2e6 <= largest < 2.4e6
