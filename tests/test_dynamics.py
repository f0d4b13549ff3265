import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from raptor.analysis.dynamics import (
    ALL_TOKENS, Moments, angle, angular_basins, angular_speed, brh_epsilon, check_stream, class_angles,
    cls_directions, directional_convergence, effective_rank, patch_coherence, stable_rank, state_norms, token_kinds,
    update_ranks, update_spectra
)
from raptor.analysis.interventions import perturbation_decay
from raptor.core import RaptorError

from stand_ins import System, noise, rotation

KINDS = token_kinds(3, True, 10)


# angles

@settings(deadline=None)
@given(st.floats(0, math.pi), st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
def test_angle_is_exact_for_every_angle_and_length(t, a, b):
    u, v = torch.tensor([a, 0], dtype=torch.float64), b*torch.tensor([math.cos(t), math.sin(t)], dtype=torch.float64)
    assert abs(angle(u, v).item() - t) < 4e-16*(1 + t) + 1e-15
    assert angle(u, v) == angle(v, u)


def test_tiny_angles_survive_where_arccos_loses_them():
    t = 1e-10
    u, v = torch.tensor([[1, 0, 0], [math.cos(t), math.sin(t), 0]], dtype=torch.float64)
    assert (u @ v).clamp(-1, 1).arccos() == 0 and angle(u, v).item() == pytest.approx(t, rel=1e-9)
    assert angle(noise(4, 8), torch.zeros(8)).isnan().all()


# streams

def of_shifted(stream): return brh_epsilon(((b + 0.1*b.roll(1, -1), b) for b in stream), KINDS)


def of_pushed(stream):
    return perturbation_decay(System(rotation(6, .1), 4), (b[:, :1] for b in stream), [0, 2], [.1, .5], KINDS)


QUANTITIES = [lambda s: directional_convergence(s, KINDS), lambda s: angular_speed(s, KINDS),
              lambda s: patch_coherence(s, KINDS), lambda s: state_norms(s, KINDS), lambda s: update_ranks(s, KINDS),
              lambda s: update_ranks(s, centred=True), of_shifted, of_pushed]


@pytest.mark.parametrize("measure", QUANTITIES)
def test_batches_do_not_change_a_result(measure):
    x = noise(11, 5, 10, 6)
    whole, parts = measure(iter([x])), measure(iter(x.split(3)))
    pd.testing.assert_frame_equal(whole, parts, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("measure", QUANTITIES)
def test_streams_without_batches_or_with_nan_are_refused(measure):
    with pytest.raises(RaptorError, match="no batch"): measure(iter([]))
    bad = noise(2, 5, 10, 6); bad[1, 3:] = float("nan"); bad[1, 0, 4] = float("nan")
    with pytest.raises(RaptorError, match="finite"): measure(iter([bad]))


def test_a_stream_is_one_tensor_or_batches_of_which_empty_ones_are_left_out():
    x = noise(3, 5, 10, 6)
    assert [len(b) for b in check_stream(x)] == [3] and [len(b) for b in check_stream([x[:0], x[:2], x[2:]])] == [2, 1]


@pytest.mark.parametrize("stream, says", [
    ([noise(2, 5, 6)], "trajectories"), ([noise(2, 1, 3, 6)], "at least 2"), (["x"], "str"),
    ([noise(2, 5, 10, 6), noise(2, 4, 10, 6)], "changes shape")])
def test_wrong_shapes_are_refused(stream, says):
    with pytest.raises(RaptorError, match=says): angular_speed(stream, ALL_TOKENS)


def test_measured_tables_match_a_direct_computation():
    x = noise(4, 5, 10, 6)
    u = torch.nn.functional.normalize(x.double(), dim=-1)
    gamma = directional_convergence(x, KINDS).set_index(["token_kind", "layer"])
    direct = (u[:, 2, 1:3]*u[:, 4, 1:3]).sum(-1)
    assert gamma.loc[("register", 2), "value"] == pytest.approx(direct.mean().item(), abs=1e-12)
    assert gamma.loc[("register", 2), "std"] == pytest.approx(direct.std(correction=0).item(), abs=1e-12)
    assert gamma.loc[("register", 2), "count"] == 8 and list(gamma.loc["cls"].index) == [0, 1, 2, 3, 4]
    assert gamma.xs(4, level="layer").value.tolist() == pytest.approx([1]*3, abs=1e-12)
    speed = angular_speed(x, KINDS).set_index(["token_kind", "layer"])
    assert list(speed.loc["patch"].index) == [1, 2, 3, 4]
    expected = (u[:, 2, 3:]*u[:, 3, 3:]).sum(-1).arccos().mean().item()
    assert speed.loc[("patch", 3), "value"] == pytest.approx(expected, abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.floats(-1e6, 1e6), st.integers(0, 1000))
def test_moments_merge_to_those_of_the_whole(sizes, shift, seed):
    parts = [noise(n, seed=seed + i, dtype=torch.float64) + shift for i, n in enumerate(sizes)]
    m, whole = Moments(), torch.cat(parts)
    for p in parts: m.add(p)
    assert m.count == len(whole)
    if len(whole):
        assert m.mean == pytest.approx(whole.mean().item(), abs=1e-8)
        assert m.std == pytest.approx(whole.std(correction=0).item(), abs=1e-8)


# known systems

@pytest.mark.parametrize("theta", [1e-6, 0.2, 3.0])
def test_a_rotation_has_constant_speed(theta):
    x = System(rotation(6, theta), 5).trajectory(noise(3, 10, 6, dtype=torch.float64))
    speed = angular_speed(x, KINDS)
    assert speed.value.values == pytest.approx(theta, abs=1e-13) and speed["std"].max() < 1e-13
    gamma = directional_convergence(x, KINDS)
    assert gamma.value.values == pytest.approx(np.cos(theta*(5 - gamma.layer)), abs=1e-12)
    norms = state_norms(x, KINDS).pivot(index="layer", columns="token_kind", values="value")
    assert np.ptp(norms.values, axis=0).max() < 1e-12


def test_scale_changes_norms_only():
    x = noise(4, 5, 10, 6, dtype=torch.float64)
    for f in (directional_convergence, angular_speed, patch_coherence):
        np.testing.assert_allclose(f(x, KINDS).value, f(1000*x, KINDS).value, atol=1e-12)
    np.testing.assert_allclose(1000*state_norms(x, KINDS).value, state_norms(1000*x, KINDS).value)
    np.testing.assert_allclose(update_ranks(x).value, update_ranks(1000*x).value, rtol=1e-9)


def test_isotropic_noise_has_cosine_zero_and_the_known_spread():
    gamma = directional_convergence(noise(60, 2, 100, 64), ALL_TOKENS).query("layer == 0")
    assert abs(gamma.value.item()) < 5e-3 and gamma["std"].item() == pytest.approx(1/math.sqrt(64), rel=0.05)


def test_patch_coherence_is_the_resultant_length_of_each_image():
    x = noise(5, 2, 10, 6)
    u = torch.nn.functional.normalize(x[:, :, 3:].double(), dim=-1)
    expected = u.mean(2).norm(dim=-1).mean(0)
    assert patch_coherence(x, KINDS).value.tolist() == pytest.approx(expected.tolist(), abs=1e-12)
    same = noise(5, 2, 1, 6).expand(5, 2, 10, 6) # images differ, the patches of one do not
    assert patch_coherence(same, KINDS).value.tolist() == pytest.approx([1, 1], abs=1e-12)


# ranks

@settings(deadline=None)
@given(st.lists(st.just(0) | st.floats(1e-300, 1e6, allow_subnormal=False), min_size=1, max_size=8).filter(any),
       st.floats(1e-3, 1e3))
@example([1e-300, 0, 1e6], 1e-3)
def test_ranks_are_between_one_and_the_count_and_ignore_scale_and_order(s, scale):
    s = np.array(s)
    for rank in (stable_rank, effective_rank):
        assert 1 - 1e-9 <= rank(s) <= np.count_nonzero(s) + 1e-9
        assert rank(scale*s[::-1]) == pytest.approx(rank(s))


@pytest.mark.parametrize("rank", [stable_rank, effective_rank])
def test_rank_of_flat_spectra_and_bad_input(rank):
    assert [rank([5.0]*n) for n in (1, 3, 10)] == pytest.approx([1, 3, 10])
    assert rank([1, 0, 0, 0]) == 1
    for bad in ([], [0, 0], [1, -1], [1, float("nan")]):
        with pytest.raises(RaptorError, match="singular values"): rank(bad)


def test_spectra_are_the_singular_values_of_the_updates():
    x = noise(6, 4, 10, 5, dtype=torch.float64)
    spectra, centred = update_spectra(x, KINDS), update_spectra(x, KINDS, centred=True)
    u = (x[:, 2, 3:] - x[:, 1, 3:]).flatten(0, 1)
    np.testing.assert_allclose(spectra[2, "patch"], torch.linalg.svdvals(u), rtol=1e-9)
    np.testing.assert_allclose(centred[2, "patch"], torch.linalg.svdvals(u - u.mean(0)), rtol=1e-9)


def test_rounding_errors_are_no_singular_values():
    line = noise(4, 50, 1, dtype=torch.float64)*noise(200, seed=1, dtype=torch.float64)
    x = torch.stack([torch.zeros_like(line), line], 1) # updates along one line in 200 dimensions
    for centred in (False, True):
        values = update_spectra(x, centred=centred)[1, "all"]
        assert values[0] > 1 and (values[1:] == 0).all(), "below the noise floor a value is exactly 0, and never NaN"
    basis = torch.linalg.qr(noise(8, 8, dtype=torch.float64))[0]
    sizes = torch.tensor([1, 1e-6, 1e-9], dtype=torch.float64)
    x = torch.stack([torch.zeros(1, 3, 8, dtype=torch.float64), (sizes[:, None]*basis[:3])[None]], 1)
    values = update_spectra(x)[1, "all"]
    assert values[:2] == pytest.approx([1, 1e-6], rel=1e-2) and (values[2:] == 0).all(), "the floor is at about 1e-7"


def test_rank_one_updates_have_rank_one_even_in_many_dimensions_and_half_precision():
    steps = noise(4, 1, 50, 1)*noise(200, seed=1)
    x = torch.cat([torch.zeros(4, 1, 50, 200), steps, steps*2], 1)
    assert update_ranks(x).value.tolist() == pytest.approx([1]*4, abs=1e-4)
    r = update_ranks(x.half()).set_index(["layer", "quantity"]).value
    assert r[1, "stable_rank"] == pytest.approx(1, abs=1e-4)


def test_a_common_drift_counts_only_when_not_centred():
    x = torch.stack([torch.zeros(50, 40, 6), noise(50, 40, 6) + 100*torch.eye(6)[0]], 1)
    ranks = {c: update_ranks(x, centred=c).set_index("quantity").value for c in (False, True)}
    stable = {centred: r["stable_rank"] for centred, r in ranks.items()}
    assert stable[False] == pytest.approx(1, abs=.01) and stable[True] == pytest.approx(6, abs=.7)


def test_updates_in_three_equal_orthogonal_directions_have_rank_three():
    basis = torch.linalg.qr(noise(8, 8, dtype=torch.float64))[0][:3]
    x = torch.stack([torch.zeros(1, 3, 8, dtype=torch.float64), basis[None]], 1)
    assert update_ranks(x).value.tolist() == pytest.approx([3, 3])


# basins

def two_classes():
    centres = torch.eye(6, dtype=torch.float64)[:2]
    labels = torch.arange(20) % 2
    final = centres[labels] + 0.01*noise(20, 6, dtype=torch.float64)
    start = noise(20, 6, seed=1, dtype=torch.float64)
    x = torch.stack([start, start + final, final], 1)[:, :, None].repeat(1, 1, 10, 1)
    x[:, :, 1:] = noise(20, 3, 9, 6, seed=2, dtype=torch.float64)
    return x, labels


def test_class_angles_match_all_pairs():
    x, labels = two_classes()
    directions, found = cls_directions(zip(x.split(7), labels.split(7)), KINDS)
    assert torch.equal(found, labels) and directions.shape == (20, 3, 6)
    table = class_angles(directions, found).set_index(["layer", "pair"])
    for layer in range(3):
        a = angle(x[:, layer, 0][:, None], x[:, layer, 0][None])
        upper = torch.ones(20, 20).triu(1).bool()
        for pair, same in (("within", labels[:, None] == labels), ("between", labels[:, None] != labels)):
            expected = a[upper & same]
            row = table.loc[(layer, pair)]
            assert row.value == pytest.approx(expected.mean().item(), abs=1e-6) and row["count"] == len(expected)
            assert row["std"] == pytest.approx(expected.std(correction=0).item(), abs=1e-6)
    assert table.loc[(2, "between"), "value"] == pytest.approx(math.pi/2, abs=.02)
    assert table.loc[(2, "within"), "value"] < .05


def test_class_angles_do_not_depend_on_the_strips():
    d = torch.nn.functional.normalize(noise(1100, 1, 3), dim=-1)
    labels = torch.arange(1100) % 3
    table = class_angles(d, labels).set_index("pair")
    assert table["count"].sum() == 1100*1099//2 and table.value.tolist() == pytest.approx([math.pi/2]*2, abs=.02)


def test_cls_directions_limit_without_cls_and_task_dictionaries():
    x, labels = two_classes()
    def stream():
        yield x[:8], {"classification": labels[:8], "depth": None}
        yield x[8:], {"classification": labels[8:], "depth": None}
    directions, found = cls_directions(stream(), token_kinds(0, False, 10), limit=10)
    assert torch.equal(found, labels[:10])
    assert torch.allclose(directions[3, 1].double(), torch.nn.functional.normalize(x[3, 1].mean(0), dim=-1), atol=1e-6)
    with pytest.raises(RaptorError, match="no image"): cls_directions(iter([]), KINDS)


def test_basins_are_principal_axes_with_a_fixed_sign():
    x, labels = two_classes()
    directions, found = cls_directions([(x, labels)], KINDS)
    table, share = angular_basins(directions, found, dims=2)
    assert share[0] > .99 and len(table) == 60
    assert list(table.columns) == ["image", "label", "layer", "axis_1", "axis_2"]
    final = table.query("layer == 2").groupby("label").axis_1
    assert abs(final.mean()[0] - final.mean()[1]) == pytest.approx(math.sqrt(2), abs=.02) and final.std().max() < .05
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    again = angular_basins(directions[order], found[order], dims=2)[0].query("layer == 1").axis_1.values
    np.testing.assert_allclose(again, table.query("layer == 1").axis_1.values[order.numpy()], atol=1e-6)
    for dims in (0, 7):
        with pytest.raises(RaptorError, match="dims in 1..6"): angular_basins(directions, found, dims=dims)
    with pytest.raises(RaptorError, match="between classes"): class_angles(directions, torch.zeros(20))


# epsilon

def test_epsilon_is_the_mean_norm_of_the_error_by_layer():
    f, e = noise(6, 5, 10, 4), 0.1*noise(6, 5, 10, 4, seed=1)
    e[:, 0] = 0
    table = brh_epsilon(zip((f + e).split(4), f.split(4)))
    wide = table.pivot(index="layer", columns="quantity", values="value")
    norms = e.double().flatten(2).norm(dim=-1)[:, 1:]
    assert wide.index.tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(wide.absolute, norms.mean(0), rtol=1e-5)
    length = f.double().flatten(2).norm(dim=-1)[:, 1:].mean(0)
    np.testing.assert_allclose(wide.relative, norms.mean(0)/length, rtol=1e-5)
    np.testing.assert_allclose(wide.angle, angle(f + e, f).mean((0, 2))[1:], rtol=1e-9)
    absolute = table.query("quantity == 'absolute'")
    assert absolute["count"].unique().tolist() == [6]
    np.testing.assert_allclose(absolute["std"], norms.std(0, correction=0), rtol=1e-5)
    relative = table.query("quantity == 'relative'")
    np.testing.assert_allclose(relative["std"], norms.std(0, correction=0)/length, rtol=1e-5)
    assert relative["count"].unique().tolist() == [6] and relative.layer.tolist() == [1, 2, 3, 4]


def test_epsilon_by_kind_squares_to_the_whole_and_a_perfect_model_has_zero():
    f, g = noise(1, 4, 10, 4), noise(1, 4, 10, 4, seed=1)
    by_kind = brh_epsilon([(g, f)], KINDS).query("quantity == 'absolute'")
    parts = by_kind.groupby("layer").value.apply(lambda v: (v**2).sum()**.5)
    whole = brh_epsilon([(g, f)]).query("quantity == 'absolute'").set_index("layer").value
    np.testing.assert_allclose(parts, whole)
    assert brh_epsilon([(f, f)]).value.max() == 0
    with pytest.raises(RaptorError, match="differ in shape"): brh_epsilon([(f[:, :3], f)])


# kinds

def test_token_kinds_cover_every_token_once():
    for prefix, has_cls in ((0, False), (1, True), (5, True), (4, False)):
        kinds = token_kinds(prefix, has_cls, 41)
        covered = [i for s in kinds.values() for i in range(41)[s]]
        assert covered == list(range(41)) and ("cls" in kinds) == has_cls and kinds["patch"] == slice(prefix, 41)
        assert ("register" in kinds) == (prefix > has_cls)
    for bad in ((0, True, 10), (11, True, 10)):
        with pytest.raises(RaptorError, match="does not fit"): token_kinds(*bad)
