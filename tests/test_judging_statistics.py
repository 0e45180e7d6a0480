"""Intervals that cover what they say, paired differences, and how they are written."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from judging.statistics import as_array, detectable, differences, errors, holm, interval, p_value
from runs.interval import Difference, Interval, describe_difference, format_difference, format_interval


def draws(values):
    """(prompts, seeds) -> prompt -> seed -> value."""
    return {f"prompt {row}": dict(enumerate(map(float, seeds))) for row, seeds in enumerate(np.asarray(values))}


# --- intervals --------------------------------------------------------------------------------------------------------

# standard deviations of: trainings, prompts, seeds, trainings × prompts, prompts × seeds, and of each picture
MIXES = {
    "noise": (0, 0, 0, 0, 0, 1),
    "prompts": (0, 1, 0, 0, 0, 1),
    "trainings": (1, 0, 0, 0, 0, 1),
    "a little of the seeds": (0, 0, 0.3, 0, 0, 1),
    "seeds and prompts": (0.3, 0.5, 0.5, 0, 0, 1),
    "all": (0.5, 1, 0.2, 0.3, 0.5, 0.5),
    "trainings differ by prompt": (0.2, 0.7, 0.1, 0.7, 0.2, 0.7),
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("shape", [(1, 6, 4), (1, 6, 2), (3, 6, 4), (5, 6, 4)], ids=str)
def test_intervals_of_95_percent_cover_the_truth_in_93_and_more(shape, mix):
    """Of one training the truth is that training's own mean; of several it is the method's."""
    (trainings, prompts, seeds), deviations = shape, MIXES[mix]
    rng = np.random.default_rng(7)
    shapes = [(trainings, 1, 1), (1, prompts, 1), (1, 1, seeds), (trainings, prompts, 1), (1, prompts, seeds), shape]
    covered, repeats = 0, 400
    for _ in range(repeats):
        effects = [size * rng.normal(size=one) for size, one in zip(deviations, shapes)]
        own = effects[0].mean() if trainings == 1 else 0.0
        found = interval([draws(one) for one in np.broadcast_to(sum(effects), shape)])
        covered += found.low <= own <= found.high
    # the error of such a share is 0.011: 0.93 and two of them
    assert covered / repeats >= 0.93 - 0.022, covered / repeats


def test_all_mixes_together_cover_93_percent():
    rng, covered, repeats = np.random.default_rng(8), [], 250
    for shape in ((1, 6, 4), (3, 6, 4), (5, 6, 4)):
        for deviations in MIXES.values():
            shapes = [(shape[0], 1, 1), (1, 6, 1), (1, 1, 4), (shape[0], 6, 1), (1, 6, 4), shape]
            for _ in range(repeats):
                effects = [size * rng.normal(size=one) for size, one in zip(deviations, shapes)]
                own = effects[0].mean() if shape[0] == 1 else 0.0
                found = interval([draws(one) for one in np.broadcast_to(sum(effects), shape)])
                covered.append(found.low <= own <= found.high)
    assert np.mean(covered) >= 0.93


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=12))
@example([0.0, 1.2e-161])  # whose variance has no square
def test_where_one_thing_varies_the_interval_is_student_s(values):
    for name, found in (
        ("trainings", interval([draws([[value]]) for value in values])),
        ("prompts", interval([draws([[value] for value in values])])),
        ("seeds", interval([draws([values])])),
    ):
        assert (found.varies, found.count) == ((name,), (len(values),))
        assert found.estimate == pytest.approx(np.mean(values))
        if np.ptp(values) > 1e-3:
            expected = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
            assert (found.low, found.high) == pytest.approx(expected, abs=1e-9)


def test_two_ways_count_both_and_never_less_than_the_prompts_alone():
    values = np.random.default_rng(0).normal(size=(6, 4)) + np.arange(6)[:, None]
    found = interval([draws(values)])
    assert found.varies == ("prompts", "seeds") and found.count == (6, 4) and found.units == "6 prompts × 4 seeds"
    alone = interval([draws(values.mean(axis=1, keepdims=True))])
    assert found.high - found.low >= alone.high - alone.low
    rows, columns = values.mean(axis=1).var(ddof=1) / 6, values.mean(axis=0).var(ddof=1) / 4
    both = errors(values[None])[0]
    assert both.size**2 == pytest.approx(rows + columns)
    assert both.freedom == pytest.approx((rows + columns) ** 2 / (rows**2 / 5 + columns**2 / 3))


def test_an_interval_ends_where_no_score_can_be():
    values = np.array([[0.2, 1.0], [0.9, 1.0]])
    free, cut = interval([draws(values)]), interval([draws(values)], (0.0, 1.0))
    assert free.low < 0 and free.high > 1 and (cut.low, cut.high) == (0.0, 1.0) and cut.estimate == free.estimate
    inside = interval([draws(values)], (-9.0, 9.0))
    assert inside == free and interval([draws([[0.25]])], (0.0, 1.0)).low is None


def test_one_picture_has_no_interval():
    alone = interval([draws([[0.25]])])
    assert alone == Interval(0.25) and format_interval(alone) == "0.250" and alone.units == "one draw"
    assert p_value(np.full((1, 1, 1), 0.3)) is None


def test_prompts_without_the_same_seeds_count_once_each():
    """Folders of --images may have other seeds for each prompt."""
    found = interval([{"a": {0: 0.1, 1: 0.3}, "b": {7: 0.6}, "c": {0: 0.5, 9: 0.5}}])
    assert found.varies == ("prompts",) and found.estimate == pytest.approx((0.2 + 0.6 + 0.5) / 3)
    assert as_array([{"a": {0: 1.0}, "b": {0: 2.0}}, {"b": {0: 4.0}}]).tolist() == [[[2.0]], [[4.0]]]


# --- paired differences -----------------------------------------------------------------------------------------------


def test_trainings_are_paired_by_their_seed():
    """As scipy's paired t test of the trainings, where each is one number."""
    rng = np.random.default_rng(3)
    first, other = rng.normal(size=4), rng.normal(0.5, 1, size=4)
    methods = [{seed: draws([[value]]) for seed, value in enumerate(one)} for one in (first, other)]
    found = differences(methods[0], {"nora": methods[1]})["nora"]
    expected = stats.ttest_rel(other, first)
    assert found.p_value == pytest.approx(expected.pvalue) and found.interval.count == (4,)
    assert (found.interval.low, found.interval.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    shuffled = {seed: methods[1][seed] for seed in (2, 0, 3, 1)}
    assert differences(methods[0], {"nora": shuffled})["nora"].interval.low == pytest.approx(found.interval.low)


def test_what_the_methods_share_cancels():
    """Prompts differ far more than the methods do: only pairs show it."""
    rng = np.random.default_rng(4)
    prompts = rng.normal(0, 1, size=(6, 1))
    lora = prompts + rng.normal(0, 0.02, size=(6, 4))
    nora = prompts + 0.1 + rng.normal(0, 0.02, size=(6, 4))
    found = differences({0: draws(lora)}, {"nora": {0: draws(nora)}})["nora"]
    assert found.shown and 0.05 < found.interval.low < 0.1 < found.interval.high < 0.15
    one, other = interval([draws(lora)]), interval([draws(nora)])
    assert one.high > other.low  # their own intervals overlap


def test_only_shared_draws_are_compared():
    first, other = {0: draws([[1, 2], [3, 4]])}, {0: {"prompt 1": {1: 5.0, 2: 9.0}, "prompt 7": {0: 1.0}}}
    found = differences(first, {"x": other})["x"]
    assert found == Difference(Interval(1.0)) and format_difference(found) == "+1.000"
    assert differences(first, {"x": {0: {"prompt 7": {0: 1.0}}}, "y": {5: draws([[1]])}}) == {}


def test_holm_is_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # Holm 1979, by hand
    assert holm([0.02, None, 0.3]) == [pytest.approx(0.06), None, 0.6] and holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_several_methods_are_corrected_for_their_number():
    rng = np.random.default_rng(5)
    methods = {f"m{n}": {0: draws(rng.normal(size=(6, 2)))} for n in range(4)}
    first = methods.pop("m0")
    together = differences(first, methods)
    for name, own in methods.items():
        alone = differences(first, {name: own})[name]
        assert together[name].p_value >= alone.p_value and together[name].detectable > alone.detectable
        assert together[name].interval.low < alone.interval.low and together[name].interval.level > 0.98


def test_false_differences_are_shown_in_at_most_five_percent():
    """Two equal methods and a third, over prompts that differ, 3 trainings: the error of the family."""
    rng, shown, repeats = np.random.default_rng(6), 0, 300
    for _ in range(repeats):
        prompts = rng.normal(size=(1, 6, 1))
        values = prompts + rng.normal(0, 0.3, size=(3, 3, 1, 1)) + rng.normal(0, 0.3, size=(3, 3, 6, 2))
        methods = [{seed: draws(one) for seed, one in enumerate(method)} for method in values]
        found = differences(methods[0], {"b": methods[1], "c": methods[2]})
        shown += any(one.shown for one in found.values())
    assert shown / repeats <= 0.07


def test_the_detectable_difference_is_found_in_80_percent():
    values = np.array([-0.2, 0.1, 0.05, -0.1, 0.15]).reshape(5, 1, 1)
    size, rng = detectable(values, 0.05), np.random.default_rng(0)
    samples = rng.normal(size, values.std(ddof=1), size=(4000, 5))
    assert np.mean(stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize("value", [0.1, 1.0, 5 / 6])  # a mean of tenths is rounded
def test_what_does_not_vary_says_nothing_of_others(value):
    """Six of six scenes followed are no proof that all are."""
    rows = [[value] * 2] * 3
    found = interval([draws(rows)], (0.0, 1.0))
    assert (found.low, found.high) == (None, None) and found.estimate == pytest.approx(value)
    assert found.varies == ("prompts", "seeds")
    for first in ([[0.0] * 2] * 3, rows):
        less = differences({0: draws(first)}, {"nora": {0: draws(rows)}})["nora"]
        assert (less.interval.low, less.p_value, less.detectable, less.shown) == (None, None, None, False)
        assert "which doesn't say how others would vary" in describe_difference("nora", "lora", "Scene", less)


def test_identical_methods_do_not_differ():
    one = {0: draws([[0.1, 0.2], [0.3, 0.4]])}
    found = differences(one, {"same": one})["same"]
    assert found.interval.estimate == 0 and found.interval.low is None and found.p_value is None and not found.shown


def test_a_difference_that_is_constant_but_for_rounding_is_constant():
    first, other = [[0.7], [0.6], [0.3]], [[0.8], [0.7], [0.4]]  # 0.8 - 0.7 is not 0.4 - 0.3
    assert differences({0: draws(first)}, {"nora": {0: draws(other)}})["nora"].p_value is None


@pytest.mark.parametrize("rows", [[[1.0, 0.0], [0.0, 1.0]], [[0.1, 0.2, 0.3], [0.2, 0.3, 0.1], [0.3, 0.1, 0.2]]])
def test_prompts_and_seeds_of_one_mean_leave_the_pictures_to_vary(rows):
    found, pictures = interval([draws(rows)]), np.ravel(rows)
    half = stats.t.ppf(0.975, len(pictures) - 1) * stats.sem(pictures)
    assert (found.low, found.high) == (pytest.approx(np.mean(rows) - half), pytest.approx(np.mean(rows) + half))


def test_a_thing_that_does_not_vary_takes_nothing_from_the_others():
    """Two trainings of the same mean beside prompts that differ."""
    first = {seed: draws([[0.0], [0.0]]) for seed in (0, 1)}
    found = differences(first, {"nora": {seed: draws([[0.1], [0.3]]) for seed in (0, 1)}})["nora"]
    assert found.p_value == pytest.approx(stats.ttest_1samp([0.1, 0.3], 0).pvalue)


# --- words ------------------------------------------------------------------------------------------------------------


def test_scores_are_written_in_one_way():
    found = Interval(0.8971, 0.8752, 0.919, 0.95, ("trainings", "prompts"), (3, 6))
    assert format_interval(found) == "0.897 [0.875, 0.919]" and format_interval(None) == "–"
    assert Interval.read(found.fields()) == found and found.units == "3 trainings × 6 prompts"
    difference = Difference(Interval(-0.007, -0.028, 0.014, 0.95, ("trainings",), (3,)), 0.2912, 0.0304)
    assert format_difference(difference) == "-0.007 [-0.028, +0.014], p 0.291"
    assert Difference.read(difference.fields()) == difference
    assert describe_difference("nora", "lora", "DINO", difference) == (
        "nora and lora in DINO: no difference shown at 3 trainings; "
        "one of 0.030 would have been (with a chance of 80 %)."
    )
    shown = Difference(Interval(0.031, 0.012, 0.05, 0.95, ("trainings",), (3,)), 0.0004, 0.02)
    assert describe_difference("nora", "lora", "DINO", shown) == (
        "nora is 0.031 higher than lora in DINO: +0.031 [+0.012, +0.050], p < 0.001."
    )
    assert "one draw of each shows nothing" in describe_difference("a", "b", "DINO", Difference(Interval(1.0)))
    assert not math.isnan(found.high)
