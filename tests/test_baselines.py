import math

import pytest
import torch

from raptor.analysis.baselines import DMDSpan, IdentitySpan, LinearSpan, SpanChain, fit_dmd, fit_linear, identity_chain
from raptor.analysis.dynamics import brh_epsilon
from raptor.core import RaptorError
from raptor.model.as_backbone import RaptorBackbone
from raptor.phases import FragmentedPhases, Phases
from raptor.teacher.backbone import Backbone

PHASES = Phases((3, 5))


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def system(dim=6):
    first, second = (torch.linalg.qr(noise(dim, dim, seed=seed))[0] for seed in (0, 1))
    return SpanChain([DMDSpan(0, 3, 0.9*first), DMDSpan(3, 5, 1.1*second)], PHASES, dim)


def trajectories(chain, images=8, seed=2): return chain.rollout(noise(images, 10, chain.dim, seed=seed))


def test_a_linear_system_is_recovered_by_both_fits_from_other_data():
    truth = system()
    train, new = trajectories(truth), trajectories(truth, seed=9)
    dmd, linear = fit_dmd(train, PHASES), fit_linear(train, PHASES, ridge=0)
    for got, want in zip(dmd.spans, truth.spans): assert torch.allclose(got.operator, want.operator, atol=1e-6)
    assert torch.allclose(linear.spans[0].weight, torch.linalg.matrix_power(truth.spans[0].operator, 3), atol=1e-5)
    assert linear.spans[0].bias.abs().max() < 1e-6
    assert torch.allclose(dmd.rollout(new[:, 0]), new, atol=1e-5)
    assert torch.allclose(linear(new[:, 0]), new[:, -1], atol=1e-5)
    assert brh_epsilon([(dmd.rollout(new[:, 0]), new)]).query("quantity == 'relative'").value.max() < 1e-6


def test_an_affine_step_is_recovered_by_the_ridge_fit_only():
    x = noise(20, 10, 4)
    weight, bias = noise(4, 4, seed=1), 3 + noise(4, seed=2)
    states = torch.stack([x, x @ weight.T + bias], 1)
    chain = fit_linear(states, Phases((1,)), ridge=0)
    assert torch.allclose(chain.spans[0].weight.double(), weight, atol=1e-5)
    assert torch.allclose(chain.spans[0].bias.double(), bias, atol=1e-5)
    assert (fit_dmd(states, Phases((1,)))(x) - states[:, 1]).abs().mean() > 1


def test_fits_solve_the_least_squares_problem():
    x = noise(20, 6, 10, 5)
    operator = fit_dmd(x, Phases((5,))).spans[0].operator.double()
    expected = torch.linalg.lstsq(x[:, :5].reshape(-1, 5), x[:, 1:].reshape(-1, 5)).solution.T
    assert torch.allclose(operator, expected, atol=1e-6)
    span = fit_linear(x, Phases((5,)), ridge=0).spans[0]
    rows = torch.cat([x[:, 0].reshape(-1, 5), torch.ones(200, 1, dtype=torch.float64)], 1)
    expected = torch.linalg.lstsq(rows, x[:, 5].reshape(-1, 5)).solution.T
    assert torch.allclose(torch.cat([span.weight, span.bias[:, None]], 1).double(), expected, atol=1e-6)


def test_batches_do_not_change_a_fit_and_ridge_shrinks_to_the_mean():
    x = noise(11, 6, 10, 5) + 2
    for fit in (fit_linear, fit_dmd):
        whole, parts = fit(x, PHASES), fit(iter(x.split(4)), PHASES)
        for a, b in zip(whole.buffers(), parts.buffers()): assert torch.allclose(a, b, atol=1e-6)
    norms = [fit_linear(x, PHASES, ridge=r).spans[0].weight.norm() for r in (0, 1, 100)]
    assert norms[0] > norms[1] > norms[2]
    heavy = fit_linear(x, PHASES, ridge=1e9).spans[1]
    assert heavy.weight.abs().max() < 1e-6 and torch.allclose(heavy.bias.double(), x[:, 5].mean((0, 1)), atol=1e-4)


def test_states_of_low_rank_are_no_failure_and_rank_truncates():
    basis = torch.linalg.qr(noise(6, 6))[0][:, :2]
    turn = torch.tensor([[math.cos(.5), -math.sin(.5)], [math.sin(.5), math.cos(.5)]], dtype=torch.float64)
    K = basis @ turn @ basis.T
    x = torch.stack([s := noise(5, 10, 2) @ basis.T, s @ K.T, s @ K.T @ K.T], 1)
    for rank in (None, 2, 6):
        chain = fit_dmd(x, Phases((2,)), rank=rank)
        assert torch.allclose(chain.spans[0].operator.double(), K, atol=1e-6)
    assert torch.linalg.matrix_rank(fit_dmd(x, Phases((2,)), rank=1).spans[0].operator, atol=1e-4) == 1
    assert torch.allclose(fit_linear(x, Phases((2,)), ridge=0)(x[:, 0]), x[:, 2], atol=1e-5)


def test_identity_and_chains_advance_and_roll_out_alike():
    truth, x = system(), noise(2, 10, 6)
    states = truth.rollout(x)
    for a, b in ((truth(x), states[:, -1]), (truth.advance(states[:, 2], 2, 4), states[:, 4]), (truth.rollout(states[:, 2], 2, 4), states[:, 2:5])):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12) # the last bits of a product depend on the memory layout
    assert torch.equal(truth.advance(x, 2, 2), x)
    assert torch.equal(identity_chain(PHASES, 6).rollout(x), x[:, None].expand(2, 6, 10, 6))
    assert (truth.depth, truth.k, truth.dim, truth.assignment) == (5, 2, 6, (0, 0, 0, 1, 1))


def test_fragmented_phases_get_one_map_a_run():
    phases = FragmentedPhases((0, 1, 0))
    x = noise(6, 4, 10, 3)
    assert [(s.start, s.end) for s in fit_dmd(x, phases).spans] == [(0, 1), (1, 2), (2, 3)]


def test_a_chain_stands_in_a_raptor_backbone():
    backbone = Backbone.create("vit_nano_patch4_reg4_24", pretrained=False)
    model = RaptorBackbone(backbone, identity_chain(Phases((6,)), 32))
    images = noise(2, 3, 24, 24, dtype=torch.float32)
    assert torch.equal(model.features(images), backbone.norm(backbone.embed(images)))
    assert torch.equal(model.trajectory(images)[:, 6], backbone.embed(images))


def two(): return noise(2, 6, 3, 2)


@pytest.mark.parametrize("call, says", [
    (lambda: fit_linear(two()[:, :4], PHASES), "ending at 5"),
    (lambda: fit_dmd(iter([]), PHASES), "no batch"),
    (lambda: fit_dmd(two()[:0], PHASES), "no image"),
    (lambda: fit_linear(two(), PHASES, ridge=-1), "0 or more"),
    (lambda: fit_dmd(two(), PHASES, ridge=float("nan")), "0 or more"),
    (lambda: fit_dmd(two(), PHASES, rank=0), "at least 1"),
    (lambda: fit_dmd(two()/0, PHASES), "NaN or infinity"),
    (lambda: SpanChain([IdentitySpan(0, 5)], PHASES, 2), "not those"),
    (lambda: fit_linear(two(), PHASES).rollout(noise(1, 3, 2)), "no states in between"),
    (lambda: identity_chain(PHASES, 2).advance(noise(1, 3, 2), 3, 6), "state 3 to state 6"),
    (lambda: LinearSpan(0, 3, torch.eye(2), torch.zeros(2)).advance(noise(1, 3, 2), 1, 3), "from 1 to 3")])
def test_mistakes_say_what_was_wrong(call, says):
    with pytest.raises(RaptorError, match=says): call()
