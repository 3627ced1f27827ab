import io

import pytest
import torch

from permllm.lcp.optimizers import LINEAR_MINIMIZERS, Scion, double_center, orthogonalize, sign_minimizer, spectral_minimizer
from permllm.lcp.schedule import linear_temperature
from permllm.permutation.assignment import best_assignment
from permllm.permutation.permutation import Permutation
from permllm.permutation.sinkhorn import sinkhorn

NORMS = sorted(LINEAR_MINIMIZERS)
LARGEST = 1.21  # the quintic's maximum on [0, 1] is 1.2024


def random_logits(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def step_along(optimizer: torch.optim.Optimizer, logits: torch.nn.Parameter, seed: int) -> None:
    logits.grad = random_logits(*logits.shape, seed=seed)
    optimizer.step()


@pytest.mark.parametrize("shape", [(8, 64, 64), (8, 64, 16), (8, 16, 64)])
def test_orthogonalize_brings_singular_values_near_1_and_none_above_1_21(shape):
    matrix = random_logits(*shape)
    before, after = torch.linalg.svdvals(matrix), torch.linalg.svdvals(orthogonalize(matrix))
    is_large = before > 0.002 * before.norm(dim=-1, keepdim=True)
    assert is_large.float().mean() > 0.95
    assert after.max() <= LARGEST
    assert after[is_large].min() >= 0.68  # the quintic's minimum on [0.0015, 1] is 0.6818


def test_orthogonalize_keeps_the_singular_vectors():
    matrix = random_logits(4, 24, 16)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    core = u.mT @ orthogonalize(matrix) @ vh.mT
    assert torch.allclose(core, torch.diag_embed(core.diagonal(dim1=-2, dim2=-1)), atol=1e-4)


def test_the_spectral_minimizer_reaches_the_nuclear_norm_to_its_accuracy():
    direction = random_logits(8, 64, 64)
    gained = -(direction * spectral_minimizer(direction)).sum((-2, -1))
    nuclear = torch.linalg.svdvals(direction).sum(-1)
    assert ((0.7 * nuclear <= gained) & (gained <= LARGEST * nuclear)).all()


def test_the_sign_minimizer_reaches_the_l1_norm():
    direction = random_logits(8, 64, 64)
    minimizer = sign_minimizer(direction)
    assert minimizer.abs().max() <= 1
    assert torch.equal(-(direction * minimizer).sum(), direction.abs().sum())


@pytest.mark.parametrize("norm", NORMS)
def test_linear_minimizers_treat_every_matrix_by_itself(norm):
    direction = random_logits(2, 3, 64, 16)
    alone = torch.stack([LINEAR_MINIMIZERS[norm](matrix) for matrix in direction.flatten(0, 1)]).view_as(direction)
    assert torch.allclose(LINEAR_MINIMIZERS[norm](direction), alone, atol=1e-5)


@pytest.mark.parametrize("size", [1e-30, 1e30])
@pytest.mark.parametrize("norm", NORMS)
def test_linear_minimizers_ignore_the_size_of_the_direction(norm, size):
    direction = random_logits(2, 16, 16)
    assert torch.allclose(LINEAR_MINIMIZERS[norm](direction * size), LINEAR_MINIMIZERS[norm](direction), atol=1e-3)


@pytest.mark.parametrize("norm", NORMS)
def test_one_matrix_without_a_gradient_gives_zero_and_one_that_is_not_finite_gives_nan(norm):
    direction = random_logits(4, 8, 8)
    direction[0], direction[1, 0, 0], direction[2, 0, 0] = 0, torch.nan, torch.inf
    result = LINEAR_MINIMIZERS[norm](direction)
    assert torch.equal(result[0], torch.zeros(8, 8))
    assert result[1].isnan().any() and result[2].isnan().any()
    assert result[3].isfinite().all()


@pytest.mark.parametrize("norm", NORMS)
def test_a_constrained_step_is_the_written_formula(norm):
    start, gradients = random_logits(2, 8, 8), [random_logits(2, 8, 8, seed=seed) for seed in (1, 2)]
    logits = torch.nn.Parameter(start.clone())
    optimizer = Scion([logits], lr=0.25, radius=3.0, norm=norm, momentum=0.5)
    expected, average = start, torch.zeros_like(start)
    for gradient in gradients:
        logits.grad = gradient
        optimizer.step()
        average = 0.5 * average + 0.5 * gradient
        expected = 0.75 * expected + 0.25 * 3 * LINEAR_MINIMIZERS[norm](double_center(average))
    assert torch.allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_an_unconstrained_step_only_adds(norm):
    start, gradient = random_logits(2, 8, 8), random_logits(2, 8, 8, seed=1)
    logits = torch.nn.Parameter(start.clone())
    logits.grad = gradient
    Scion([logits], lr=2.0, radius=3.0, norm=norm, constrained=False, center=False).step()
    assert torch.allclose(logits, start + 6 * LINEAR_MINIMIZERS[norm](gradient), atol=1e-5)


@pytest.mark.parametrize("radius", [0.7, 2.0])  # (1 - lr) x + lr radius would round to beyond 0.7
@pytest.mark.parametrize("steady", [True, False])
def test_sign_never_leaves_its_radius(radius, steady):
    logits = torch.nn.Parameter(random_logits(2, 16, 16, scale=10).clamp(-radius, radius))
    optimizer = Scion([logits], lr=0.03, radius=radius, norm="sign")
    for step in range(60):
        step_along(optimizer, logits, seed=1 if steady else step)
        assert logits.abs().max() <= torch.tensor(radius)


@pytest.mark.parametrize("steady", [True, False])
def test_spectral_leaves_its_radius_by_no_more_than_its_accuracy(steady):
    logits = torch.nn.Parameter(torch.eye(16).repeat(2, 1, 1))
    optimizer = Scion([logits], lr=0.3, radius=2.0)
    for step in range(60):
        step_along(optimizer, logits, seed=1 if steady else step)
        assert torch.linalg.matrix_norm(logits, ord=2).max() <= 2.0 * LARGEST


def test_outside_the_radius_the_excess_shrinks_by_1_minus_lr_a_step():
    logits = torch.nn.Parameter(random_logits(2, 16, 16, scale=10))
    optimizer = Scion([logits], lr=0.25, radius=1.0, norm="sign")
    for step in range(20):
        excess = logits.abs().max() - 1
        step_along(optimizer, logits, seed=step)
        assert logits.abs().max() - 1 <= max(0.75 * excess, 0) + 1e-6


@pytest.mark.parametrize("norm", NORMS)
def test_without_a_gradient_unconstrained_logits_rest(norm):
    logits = torch.nn.Parameter(random_logits(2, 8, 8))
    before = logits.detach().clone()
    logits.grad = torch.zeros_like(logits)
    Scion([logits], lr=0.5, radius=2.0, norm=norm, constrained=False).step()
    assert torch.equal(logits, before)


@pytest.mark.parametrize("norm", NORMS)
def test_centring_drops_constants_of_rows_and_columns_from_square_gradients_only(norm):
    def moved(shape: tuple[int, ...], center: bool, shifted: bool) -> torch.Tensor:
        parameter = torch.nn.Parameter(torch.zeros(shape))
        parameter.grad = random_logits(*shape) + shifted * (3 * random_logits(2, shape[1], 1, seed=1) + 3 * random_logits(2, 1, shape[2], seed=2))
        Scion([parameter], lr=1.0, radius=1.0, norm=norm, center=center).step()
        return parameter.detach()

    square, factor = (2, 8, 8), (2, 8, 4)
    assert torch.allclose(moved(square, True, True), moved(square, True, False), atol=1e-3)
    assert not torch.allclose(moved(square, False, True), moved(square, False, False), atol=1e-3)
    assert torch.equal(moved(factor, True, True), moved(factor, False, True))


def test_double_centring_leaves_rows_and_columns_that_sum_to_0_and_what_sinkhorn_sees():
    logits = random_logits(2, 8, 8)
    centred = double_center(logits)
    assert centred.sum(-1).abs().max() < 1e-5 and centred.sum(-2).abs().max() < 1e-5
    assert torch.allclose(sinkhorn(centred, 1.0, 100), sinkhorn(logits, 1.0, 100), atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_training_resumes_bit_for_bit_with_one_buffer_per_parameter(norm):
    def run(optimizer, logits, steps):
        for step in steps:
            step_along(optimizer, logits, seed=step)

    straight = torch.nn.Parameter(random_logits(2, 16, 16))
    optimizer = Scion([straight], lr=0.1, radius=4.0, norm=norm, momentum=0.3, constrained=False, center=False)
    run(optimizer, straight, range(5))
    buffer = io.BytesIO()
    torch.save({"logits": straight.detach(), "optimizer": optimizer.state_dict()}, buffer)
    run(optimizer, straight, range(5, 10))

    saved = torch.load(io.BytesIO(buffer.getvalue()))
    assert [list(state) for state in saved["optimizer"]["state"].values()] == [["average"]]
    resumed = torch.nn.Parameter(saved["logits"])
    other = Scion([resumed], lr=1.0, radius=1.0)  # the state brings the settings
    other.load_state_dict(saved["optimizer"])
    run(other, resumed, range(5, 10))
    assert torch.equal(resumed, straight)


def test_all_wrong_settings_are_named_at_once():
    with pytest.raises(ValueError, match=r"lr is 0, not in \(0, 1\]; radius is -1, not in .*; momentum is 1.5, .*; a parameter has shape \(3,\)"):
        Scion([torch.nn.Parameter(torch.zeros(3))], lr=0, radius=-1, momentum=1.5)


@pytest.mark.parametrize("settings", [{"lr": float("nan")}, {"lr": 1.5}, {"radius": float("nan")}, {"momentum": 0.0}])
def test_settings_out_of_range_are_named(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} is "):
        Scion([torch.nn.Parameter(torch.zeros(2, 2))], **{"lr": 0.1, "radius": 1.0, **settings})


def test_an_unknown_norm_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown norm 'sing': choose one of sign, spectral"):
        Scion([torch.nn.Parameter(torch.zeros(2, 2))], lr=0.1, radius=1.0, norm="sing")


def test_a_parameter_group_that_is_refused_is_not_kept():
    optimizer = Scion([torch.nn.Parameter(torch.zeros(2, 2))], lr=0.1, radius=1.0)
    with pytest.raises(ValueError, match="radius is 0"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2, 2))], "radius": 0})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda logits: Scion([logits], lr=0.03, radius=10.0, norm="spectral"),
        lambda logits: Scion([logits], lr=0.03, radius=2.0, norm="sign"),
        lambda logits: torch.optim.AdamW([logits], lr=0.1, weight_decay=0.1),
    ],
    ids=["spectral", "sign", "adamw"],
)
def test_a_planted_permutation_of_16_channels_is_recovered(make):
    planted = Permutation.random(16, torch.Generator().manual_seed(0))
    logits = torch.nn.Parameter(torch.eye(16)[None])
    optimizer = make(logits)
    for step in range(100):
        soft = sinkhorn(logits, linear_temperature(step / 99, 1.0, 0.1), 5)
        optimizer.zero_grad()
        (-(soft * planted.matrix()).sum()).backward()
        optimizer.step()
    assert Permutation(best_assignment(logits.mT)[0]) == planted
