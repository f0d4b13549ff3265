"Intervals: what the bootstrap covers, what Student, Welch and Fisher give, and the verdict on a claim."
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from raptor.analysis.intervals import (
    Interval, bootstrap, by_group, claim_table, correlation_interval, difference_interval, mean_interval,
    over_groups, rank_correlation, share_interval
)
from raptor.core import RaptorError

NAN = math.nan


def test_the_bootstrap_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    found = [bootstrap(np.mean, rng.exponential(size=60), draws=300, seed=s) for s in range(200)]
    hits = [i.low <= 1 <= i.high for i in found]
    assert 0.88 <= np.mean(hits) <= 0.98


def test_the_bootstrap_resamples_rows_and_the_level_is_the_share_inside():
    table = np.stack([np.arange(30.), np.arange(30.)**2], 1)
    assert bootstrap(lambda t: (t[:, 1] - t[:, 0]**2).max(), table) == Interval(0, 0, 0), "rows stay whole"
    plain, curved = bootstrap(np.mean, table[:, 0]/10), bootstrap(lambda v: np.exp(v.mean()), table[:, 0]/10)
    assert list(curved) == pytest.approx(np.exp(plain).tolist(), rel=1e-3), "percentiles follow a monotone function"
    widths = [i.high - i.low for i in (bootstrap(lambda t: t[:, 0].mean(), table, level=level) for level in (.5, .95))]
    error = table[:, 0].std()/30**.5
    assert widths == pytest.approx([2*.674*error, 2*1.96*error], rel=.1)


def test_pairs_stay_together_and_the_seed_decides():
    x = np.arange(30.)
    paired = bootstrap(lambda a, b: np.mean(a - b), x, x + 2, paired=True)
    assert paired == Interval(-2, -2, -2)
    apart = bootstrap(lambda a, b: np.mean(a - b), x, x + 2)
    assert apart.estimate == -2 and apart.high - apart.low == pytest.approx(2*1.96*x.std()*(2/30)**.5, rel=.1)
    assert bootstrap(np.mean, x, seed=1) == bootstrap(np.mean, x, seed=1) != bootstrap(np.mean, x, seed=2)
    with pytest.raises(RaptorError, match="equally long"): bootstrap(lambda a, b: 0, x, x[:-1], paired=True)
    with pytest.raises(RaptorError, match="at least two"): bootstrap(lambda a, b: 0, x, x[:1])


def test_rank_correlation_is_that_of_the_ranks():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 50)).round(1) # with ties
    assert rank_correlation(x, y) == pytest.approx(pd.Series(x).rank().corr(pd.Series(y).rank()))
    assert rank_correlation(x, np.exp(x)) == pytest.approx(1) and math.isnan(rank_correlation(x, x*0))
    with pytest.raises(RaptorError, match="50 and 49 values"): rank_correlation(x, y[1:])


def test_correlation_interval_is_fishers_with_the_error_of_bonett_and_wright():
    x, y = [1, 2, 3, 4, 5, 6, 7], [2, 1, 4, 3, 7, 5, 6]
    r = 1 - 6*(1 + 1 + 1 + 1 + 4 + 1 + 1)/(7*48)
    half = 1.96*math.sqrt((1 + r**2/2)/4)
    expected = [r, math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half)]
    assert list(correlation_interval(x, y)) == pytest.approx(expected)


@pytest.mark.parametrize("interval, null, side, word", [
    (Interval(1, .5, 2), 0, "above", "shown"),
    (Interval(1, -.5, 2), 0, "above", "not shown"),
    (Interval(-1, -2, -.5), 0, "above", "the opposite"),
    (Interval(-1, -2, -.5), 0, "below", "shown"),
    (Interval(.5), 0, "below", "not as claimed, no interval"),
    (Interval(0), 0, "below", "not as claimed, no interval"),
    (Interval(NAN), 0, "above", "not run"),
])
def test_the_verdict_follows_from_the_interval(interval, null, side, word):
    assert claim_table({"x": (interval, null, side)}).verdict.item() == word


def test_student_for_two_replicas_is_wide_and_many_are_normal():
    assert mean_interval([0., 2.]).high == pytest.approx(1 + 12.7062, rel=1e-6)
    many = np.random.default_rng(0).normal(size=1000)
    assert mean_interval(many).high - many.mean() == pytest.approx(1.96/1000**.5, rel=.05)
    assert mean_interval([.5, .5]) == Interval(.5, .5, .5) and math.isnan(mean_interval([]).estimate)
    assert share_interval(0.0, 50) == Interval(0, 0, 0)


@pytest.mark.filterwarnings("error")
def test_welch_is_that_of_scipy_and_has_no_ends_without_spread():
    a, b = np.random.default_rng(0).normal(size=(2, 9))
    expected = stats.ttest_ind(a, b[:4], equal_var=False).confidence_interval()
    assert difference_interval(a, b[:4])[1:] == pytest.approx(tuple(expected))
    one_constant = difference_interval([1., 1.], [2., 3.]) # one degree of freedom
    assert one_constant.high - one_constant.estimate == pytest.approx(12.7062*.5, rel=1e-5)
    for pair in (([], [1.]), ([1.], [2., 3.]), ([1., 1.], [2., 2.])): assert not difference_interval(*pair).known


def test_groups_are_weighted_by_what_they_hold():
    def measure(b): return pd.DataFrame({"layer": [0], "value": [b.mean()], "std": [b.std()], "count": [len(b)]})
    groups = by_group(measure, [np.ones(3), np.full(1, 5.)])
    pooled = over_groups(groups, ["layer"])
    assert pooled.value.item() == 2.0 and pooled["std"].item() == pytest.approx(np.std([1, 1, 1, 5]))
    assert list(over_groups(groups.drop(columns=["std", "count"]), ["layer"])) == ["layer", "value"]
