import math

import pytest
import torch

from permllm.permutation import learnable as learnable_module
from permllm.permutation.assignment import best_assignment
from permllm.permutation.learnable import LearnableBlocks, gumbel_noise
from permllm.permutation.sinkhorn import sinkhorn

KINDS = {"identity": {}, "uniform": {"draws": True}, "low rank": {"rank": 2}}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def learnable(blocks=3, size=4, draws=True, rank=None, seed=0):
    return LearnableBlocks(blocks, size, generator(seed) if draws else None, rank)


def moved(kind, blocks=5, size=6):
    """Blocks in float64 whose factors are no longer where they started."""
    module = learnable(blocks, size, **{"draws": False, **KINDS[kind]}).double()
    with torch.no_grad():
        for seed, factor in enumerate(module.factors):
            factor += normal(*factor.shape, seed=seed + 10)
    return module


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 12])
def test_the_hard_value_is_exactly_a_permutation_of_every_block(size):
    module = learnable(size=size)
    module.relax(0.5, 5)
    assert torch.equal(module.harden().sort(-1).values, torch.arange(size).expand(3, size))


def test_the_hard_permutation_is_the_nearest_to_the_soft_one():
    """Entry (i, j) of the soft one pulls channel i to slot j."""
    module = learnable()
    soft = module.relax(0.5, 5).detach()
    for block, order in zip(soft, module.harden(), strict=True):
        assert torch.equal(order.argsort(), best_assignment(block[None])[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("noise", [None, 1.0])
def test_the_soft_value_is_sinkhorn_of_the_logits_and_the_noise(kind, noise):
    module = moved(kind)
    drawn = None if noise is None else normal(5, 6, 6, seed=3)
    expected = sinkhorn(module.logits(*module.factors) + (0 if drawn is None else drawn), 0.5, 5)
    relaxed = module.relax(0.5, 5, drawn)
    torch.testing.assert_close(relaxed, expected)
    assert relaxed.is_leaf and relaxed.requires_grad


@pytest.mark.parametrize("at_once", [1, 80, 2**22])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("noise", [None, 1.0])
@pytest.mark.parametrize("iterations", [0, 5])
def test_the_gradient_of_the_logits_is_what_autograd_computes(kind, noise, iterations, at_once, monkeypatch):
    """Also a few blocks at a time: one (36 entries), two, and all five."""
    monkeypatch.setattr(learnable_module, "RELAXED_AT_ONCE", at_once)
    module, upstream = moved(kind), normal(5, 6, 6, seed=1)
    drawn = None if noise is None else normal(5, 6, 6, seed=3)
    soft = sinkhorn(module.logits(*module.factors) + (0 if drawn is None else drawn), 0.5, iterations)
    expected = torch.autograd.grad((soft.sin() * upstream).sum(), list(module.factors))

    (module.relax(0.5, iterations, drawn).sin() * upstream).sum().backward()
    module.pull_back(0.5, iterations, drawn)
    assert all(gradient.abs().max() > 1e-6 for gradient in expected)
    torch.testing.assert_close([factor.grad for factor in module.factors], list(expected))


def test_gradients_of_several_uses_add_up_and_the_next_step_starts_at_zero():
    module, upstream = moved("uniform"), normal(5, 6, 6, seed=1)
    relaxed = module.relax(0.5, 5)
    for _ in range(3):
        (relaxed * upstream).sum().backward()
    module.pull_back(0.5, 5)
    threefold = module.factors[0].grad.clone()
    (module.relax(0.5, 5) * upstream).sum().backward()
    module.pull_back(0.5, 5)
    torch.testing.assert_close(threefold, 3 * module.factors[0].grad)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_gradient_of_the_value_the_logits_get_zero(kind):
    module = moved(kind)
    module.relax(0.5, 5)
    module.pull_back(0.5, 5)
    assert all(torch.equal(factor.grad, torch.zeros_like(factor)) for factor in module.factors)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
@pytest.mark.parametrize("iterations", [0, 5])
@pytest.mark.parametrize("rank", [None, 1, 4])
@pytest.mark.parametrize(("blocks", "size"), [(3, 8), (1, 24), (2, 128)])
def test_without_a_generator_the_first_permutation_changes_nothing(temperature, iterations, rank, blocks, size):
    module = LearnableBlocks(blocks, size, rank=rank)
    module.relax(temperature, iterations)
    assert torch.equal(module.harden(), torch.arange(size).expand(blocks, size))


def test_low_rank_logits_have_few_parameters_and_a_gradient_at_their_start():
    module = LearnableBlocks(3, 64, rank=4)
    assert sum(factor.numel() for factor in module.factors) == 3 * 2 * 64 * 4
    torch.testing.assert_close(module.logits(*module.factors), torch.eye(64).expand(3, 64, 64))
    upstream = torch.randn(3, 64, 64, generator=generator(1))
    (module.relax(0.5, 5) * upstream).sum().backward()
    module.pull_back(0.5, 5)
    assert max(factor.grad.abs().max() for factor in module.factors) > 0


@pytest.mark.parametrize("rank", [None, 32])
def test_a_planted_permutation_of_a_whole_layer_can_be_learned(rank):
    """One block of 48 channels, trained as the learning of permutations does."""
    planted = torch.eye(48)[torch.randperm(48, generator=generator(1))]
    module = LearnableBlocks(1, 48, rank=rank)
    optimizer = torch.optim.AdamW(module.parameters(), 0.1)
    for _ in range(60):
        (-(module.relax(1.0, 5)[0] * planted).sum()).backward()
        module.pull_back(1.0, 5)
        optimizer.step()
    module.relax(1.0, 5)
    assert torch.equal(module.harden()[0], planted.argmax(0))


def test_equal_generators_draw_equal_logits_between_minus_one_and_one():
    first, second, other = (learnable(4, 16, seed=seed).factors[0] for seed in (3, 3, 4))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert first.min() < -0.9 and first.max() > 0.9 and first.abs().max() <= 1


def test_gumbel_noise_has_the_moments_of_its_distribution():
    noise = gumbel_noise((200, 50, 50), 2.0, generator())
    assert noise.dtype == torch.float32 and noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(2 * 0.5772, abs=0.02)  # Euler's constant
    assert noise.std().item() == pytest.approx(2 * math.pi / 6**0.5, abs=0.02)


def test_the_largest_of_noisy_logits_is_drawn_from_their_softmax():
    """What Gumbel noise is for."""
    logits = torch.tensor([0.0, 1.0, 2.0])
    winners = (logits + gumbel_noise((100_000, 3), 1.0, generator())).argmax(-1)
    torch.testing.assert_close(winners.bincount() / 100_000, logits.softmax(0), atol=0.01, rtol=0)


def test_equal_generators_draw_equal_noise_and_then_other_noise():
    shared = generator(5)
    first, second = (gumbel_noise((2, 4, 4), 1.0, shared) for _ in range(2))
    assert torch.equal(first, gumbel_noise((2, 4, 4), 1.0, generator(5))) and not torch.equal(first, second)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rank", [None, 2])
def test_a_permutation_learns_on_a_gpu(rank):
    modules = [learnable(draws=rank is None, rank=rank), learnable(draws=rank is None, rank=rank).cuda()]
    for module in modules:
        (module.relax(0.5, 5) * torch.arange(16.0, device=module.factors[0].device).view(4, 4)).sum().backward()
        module.pull_back(0.5, 5)
    assert modules[1].relaxed.is_cuda and torch.equal(modules[1].harden().cpu(), modules[0].harden())
    for on_cpu, on_gpu in zip(modules[0].factors, modules[1].factors, strict=True):
        torch.testing.assert_close(on_gpu.grad.cpu(), on_cpu.grad, atol=1e-5, rtol=1e-4)
