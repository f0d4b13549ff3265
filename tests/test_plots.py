"Figures: what is drawn is the data (heights, bars, labels), absent results are named, and bad frames are refused."
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from raptor.figures import plots
from raptor.core import RaptorError
from raptor.figures.style import boundaries, draw_lines, group_style, mean_and_spread, new_axes, save_figure, use_style
from raptor.phases import FragmentedPhases, Phases, published_distance

@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")

layers = np.arange(1, 13)
NAN = float("nan")

def by_layer(**heights): return pd.concat([pd.DataFrame({"layer": layers, "token_kind": k, "value": v*layers, "std": .1}) for k, v in heights.items()], ignore_index=True)
def legend(ax): return [t.get_text() for t in ax.get_legend().get_texts()]
def texts(ax): return [t.get_text() for t in ax.texts]
def bars(ax): return [(c.lines[0].get_ydata(), [s[:, 1] for s in c.lines[2][0].get_segments() if len(s)]) for c in ax.containers] # a bar of unknown length has no segment
def ordinary_lines(ax): return [l for l in ax.lines if len(l.get_xdata()) > 2]

# ---- shared pieces

def test_style_is_left_behind_even_after_an_error():
    before = dict(matplotlib.rcParams)
    with pytest.raises(ZeroDivisionError):
        with use_style(): 1/0
    plots.plot_similarity(published_distance())
    assert {k: v for k, v in matplotlib.rcParams.items() if before[k] != v} == {}

def test_colours_are_fixed_when_drawn_and_do_not_follow_the_style_of_the_moment():
    ax = plots.plot_speed(by_layer(cls=1))
    assert ax.lines[0].get_color() == "#0173b2"

def test_token_kinds_look_alike_in_any_order_and_no_two_groups_do():
    assert group_style("patch", 0, ["patch"]) == group_style("patch", 2, ["cls", "register", "patch"])
    styles = [group_style(n, i, list("abcdefg")) for i, n in enumerate("abcdefg")]
    assert len({(s["marker"], s["color"]) for s in styles}) == 7 and len({str(s["linestyle"]) for s in styles}) == 7

def test_many_numeric_groups_take_shades_in_order():
    lightness = [sum(group_style(n, i, [9, 0, 3, 6])["color"][:3]) for i, n in enumerate([9, 0, 3, 6])]
    assert np.argsort(lightness).tolist() == [1, 2, 3, 0]

def test_spread_is_over_replicas_and_else_the_row_own():
    out = mean_and_spread(pd.DataFrame({"k": [1, 1, 2, 3], "value": [1., 2., 4., NAN], "std": [7, 7, .3, NAN]}), ["k"])
    assert out["mean"].tolist()[:2] == [1.5, 4] and out["std"].tolist()[:2] == pytest.approx([np.std([1, 2], ddof=1), .3]) and out["n"].tolist() == [2, 1, 0]

def test_a_replica_that_failed_does_not_count():
    out = mean_and_spread(pd.DataFrame({"k": [1, 1, 1], "value": [1., NAN, 3.]}), ["k"])
    assert (out["mean"][0], out["n"][0]) == (2, 2)

def test_lines_are_sorted_and_gaps_stay_gaps():
    ax = new_axes()
    draw_lines(ax, pd.DataFrame({"x": [3, 1, 2], "value": [9., 1., NAN]}), "x")
    assert ax.lines[0].get_xdata().tolist() == [1, 2, 3] and np.isnan(ax.lines[0].get_ydata()[1])
    assert texts(ax) == ["not run"] and ax.texts[0].get_position()[0] == 2

def test_a_frame_without_a_single_result_says_so():
    ax = plots.plot_norms(by_layer(cls=NAN))
    assert texts(ax) == ["not run"] and not ordinary_lines(ax)
    assert texts(plots.plot_norms(by_layer(cls=1).head(0))) == ["not run"]

def test_absent_places_lie_inside_the_axes():
    ax = plots.plot_ksweep(pd.DataFrame({"k": [1, 2, 8], "value": [1., 2., NAN]}), "y")
    assert ax.get_xlim()[0] <= 1 and ax.get_xlim()[1] >= 8 and "not run" in texts(ax)

def test_boundaries_of_any_partition():
    assert boundaries(Phases((7, 10, 12))) == boundaries((7, 10, 12)) == [7, 10]
    assert boundaries(FragmentedPhases((0, 1, 1, 0))) == [1, 3]
    assert boundaries((12,)) == [] == boundaries(None)

@pytest.mark.parametrize("target", ["figure", "axes", "array"])
def test_save_figure_writes_both_files_and_leaves_nothing_else(tmp_path, target):
    axes = plots.plot_accuracy_r2(pd.DataFrame({"k": [2], "accuracy": [.8], "r2": [.5]}), .9)
    paths = save_figure({"figure": axes[0].figure, "axes": axes[0], "array": axes}[target], tmp_path/"deep"/"figure.v2.png")
    assert [p.name for p in paths] == ["figure.v2.png", "figure.v2.pdf"] and sorted(p.name for p in (tmp_path/"deep").iterdir()) == ["figure.v2.pdf", "figure.v2.png"]
    width = int.from_bytes(paths[0].read_bytes()[16:20], "big")
    assert .9*5.6*150 < width < 1.1*5.6*150

# ---- phases and training

def test_similarity_is_one_minus_distance_with_a_frame_a_phase():
    ax = plots.plot_similarity(published_distance(), Phases((4, 12)))
    assert np.allclose(np.reshape(ax.collections[0].get_array(), (12, 12)), 1 - published_distance())
    assert [(p.get_x(), p.get_y(), p.get_width()) for p in ax.patches] == [(0, 0, 4), (4, 4, 8)] # seaborn draws layer 1 from 0 to 1
    with pytest.raises(RaptorError, match="covers 7 layers"): plots.plot_similarity(published_distance(), (3, 7))

@pytest.mark.parametrize("ends", [(7, 10, 12), [7, 10, 12], "7-10-12", "(7, 10, 12)", "7 10 12"])
def test_segmentations_read_ends_in_any_writing(ends):
    ax = plots.plot_segmentations(pd.DataFrame({"solver": ["exact"], "k": [3], "ends": [ends]}))
    assert [(p.get_x(), p.get_width()) for p in ax.patches] == [(.5, 7), (7.5, 3), (10.5, 2)] and texts(ax) == ["7", "3", "2"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["exact, k = 3"]

def test_a_segmentation_that_was_not_found_is_named():
    ax = plots.plot_segmentations(pd.DataFrame({"model": ["A", "B"], "solver": "exact", "k": [2, 2], "ends": ["3-6", NAN]}))
    assert len(ax.patches) == 2 and texts(ax)[-1] == "not run" and ax.get_yticklabels()[1].get_text() == "B, exact, k = 2"

def test_loss_curve_draws_what_is_recorded():
    history = pd.DataFrame({"step": [10, 20, 30], "loss": [3., 2., 1.], "tf": [1., .5, NAN], "lambda": [1, .5, 0]})
    ax = plots.plot_loss_curve(history)
    assert ax.lines[0].get_ydata().tolist() == [3, 2, 1] and ax.lines[1].get_ydata().tolist() == [1, .5]
    assert ax.figure.axes[1].lines[0].get_ydata().tolist() == [1, .5, 0] and ax.get_yscale() == "log"
    assert plots.plot_loss_curve(history[["step", "loss"]]).get_legend() is None

def test_loss_curve_of_several_runs():
    ax = plots.plot_loss_curve(pd.DataFrame({"step": [1, 2, 1, 2], "loss": [2., 1., 4., 3.], "run": ["a", "a", "b", "b"]}))
    assert legend(ax) == ["a", "b"] and ax.lines[1].get_ydata().tolist() == [4, 3]

# ---- scores

def test_accuracy_is_relative_to_the_teacher_with_error_bars_over_replicas():
    frame = pd.DataFrame({"k": [3, 2, 2, 4], "accuracy": [.9, .7, .8, NAN], "r2": [.6, .4, .5, NAN]})
    left, right = plots.plot_accuracy_r2(frame, teacher=1/1.1, references={"small": .5})
    (height, ends), = bars(left)
    assert height[:2] == pytest.approx([82.5, 99]) and ends[0] == pytest.approx([82.5 - 110*np.std([.7, .8], ddof=1), 82.5 + 110*np.std([.7, .8], ddof=1)])
    assert bars(right)[0][0][:2] == pytest.approx([.45, .6]) and texts(left) == texts(right) == ["not run"]
    dashed = [l for l in left.lines if l.get_label() == "small"][0]
    assert dashed.get_ydata()[0] == pytest.approx(55) and dashed.get_linestyle() == "--"

def test_ksweep_has_a_line_a_partition():
    frame = pd.DataFrame([dict(k=k, partition=p, value=v*k) for p, v in (("max-cut", 2.), ("random", 1.)) for k in (1, 2, 3)])
    ax = plots.plot_ksweep(frame, "score")
    assert [h.tolist() for h, _ in bars(ax)] == [[2, 4, 6], [1, 2, 3]] and legend(ax) == ["max-cut", "random"] and ax.get_ylabel() == "score"

def test_partitions_average_replicas_of_the_same_partition_only():
    frame = pd.DataFrame({"partition": ["max-cut", "max-cut", "random", "random"], "ends": ["5-12", "5-12", "3-12", "9-12"], "cut_weight": [9., 9, 5, 6], "r2": [.8, .9, .5, .7]})
    ax = plots.plot_partitions(frame)
    assert [h.tolist() for h, _ in bars(ax)] == [[pytest.approx(.85)], [.5, .7]]
    assert ax.containers[0].lines[0].get_marker() == "*"

def test_stochastic_depth_draws_the_panels_there_are():
    frame = pd.DataFrame({"step": [0, 100], "accuracy": [.1, .8], "similarity": [.9, .5]})
    axes = plots.plot_stochastic_depth(frame, x="step")
    assert [a.get_ylabel() for a in axes] == ["mean similarity of layers", "accuracy of the ViT (%)"] and bars(axes[1])[0][0] == pytest.approx([10, 80])
    with pytest.raises(RaptorError, match="similarity, r2, accuracy"): plots.plot_stochastic_depth(frame[["step"]], x="step")

def test_swaps_put_within_before_across_and_mark_the_baseline():
    frame = pd.DataFrame({"gap": [1, 1, 1, 2], "within": [False, True, True, False], "accuracy": [.3, .7, .8, .2]})
    ax = plots.plot_swaps(frame, baseline=.85)
    assert legend(ax) == ["within a phase", "across phases"]
    assert [h.tolist() for h, _ in bars(ax)] == [[pytest.approx(75)], [pytest.approx(30), pytest.approx(20)]]
    assert any(l.get_linestyle() == "--" and list(l.get_ydata()) == [85, 85] for l in ax.lines)

def test_cost_bars_have_units_and_skip_what_was_not_measured():
    frame = pd.DataFrame({"model": ["A", "B"], "flops": [23e9, NAN], "latency_ms": [5., 7.], "latency_ms_std": [.5, .7]})
    flops, time = plots.plot_cost(frame)
    assert [p.get_width() for p in flops.patches] == [23] and texts(flops) == ["not run"] and flops.get_xlabel() == "GFLOPs per image"
    assert [p.get_width() for p in time.patches] == [5, 7]
    assert [s[:, 0].tolist() for s in time.containers[0].lines[2][0].get_segments()] == [[4.5, 5.5], [pytest.approx(6.3), pytest.approx(7.7)]]
    assert [t.get_text() for t in flops.get_yticklabels()] == ["A", "B"]

def test_scene_masks_unlabelled_pixels_and_names_classes():
    classes, depth = np.full((4, 6), 10), np.full((4, 6), 5.)
    classes[1:3, 1:3], classes[0], depth[:, 0] = 3, 255, 0
    axes = plots.plot_scene(np.zeros((3, 4, 6)), classes, depth, class_names={3: "three", 10: "wall"})
    assert axes.shape == (1, 3) and texts(axes[0, 1]) == ["three"]
    assert axes[0, 1].images[0].get_array().mask.sum() == 6 and axes[0, 2].images[0].get_array().mask.sum() == 4
    axes = plots.plot_scene(np.zeros((4, 6, 3)), classes, depth, predicted_depth=depth + 1)
    assert axes.shape == (2, 3) and texts(axes[1, 1]) == ["not run"]
    assert axes[0, 2].images[0].get_clim() == axes[1, 2].images[0].get_clim() == (1, 6)

# ---- curves over depth

@pytest.mark.parametrize("plot", [plots.plot_convergence, plots.plot_speed, plots.plot_coherence, plots.plot_norms])
def test_curves_draw_each_kind_of_token_with_its_band_and_the_phases(plot):
    ax = plot(by_layer(cls=1., patch=2.), phases=(7, 12))
    assert [l.get_ydata().tolist() for l in ordinary_lines(ax)] == [layers.tolist(), (2*layers).tolist()] and legend(ax) == ["cls", "patch"]
    low, high = np.array([p.vertices[:, 1] for p in ax.collections[0].get_paths()])[0][[1, -2]]
    assert sorted([low, high]) == pytest.approx([.9, 1.1])
    assert [l.get_xdata()[0] for l in ax.lines if len(l.get_xdata()) == 2] == [7.5]
    assert ax.get_xlabel() == "layer" and ax.get_ylabel()

def test_curves_of_replicas_and_models():
    frame = pd.concat([by_layer(cls=v).assign(model="Raptor") for v in (1., 3.)])
    ax = plots.plot_speed(frame, hue="model")
    assert ordinary_lines(ax)[0].get_ydata() == pytest.approx(2.*layers) and legend(ax) == ["Raptor"]

def test_class_angles_and_ranks_name_their_lines():
    assert legend(plots.plot_class_angles(by_layer(within=1, between=2).rename(columns={"token_kind": "pair"}))) == ["within", "between"]
    rank = pd.concat([by_layer(cls=1, patch=2).assign(quantity=q) for q in ("stable_rank", "effective_rank")])
    assert legend(plots.plot_rank(rank)) == ["stable rank, cls", "stable rank, patch", "effective rank, cls", "effective rank, patch"]

def test_epsilon_is_the_worst_layer_of_the_mean_over_replicas():
    frame = pd.concat([by_layer(all=v).assign(model="k = 3", quantity="relative") for v in (1., 3.)])
    assert legend(plots.plot_epsilon(frame)) == [r"k = 3, $\epsilon$ = 24"]
    with pytest.raises(RaptorError, match="several token kinds"): plots.plot_epsilon(by_layer(cls=1, patch=2).assign(model="k = 3", quantity="relative"))
    assert legend(plots.plot_epsilon(by_layer(cls=1, patch=2).assign(quantity="angle"), "angle")) == [r"cls, $\epsilon$ = 12", r"patch, $\epsilon$ = 24"]

def test_perturbation_has_a_panel_a_kind_and_a_line_a_start():
    frame = pd.DataFrame([dict(start_layer=s, size=z, layer=l, token_kind=k, value=z/(1 + l - s), std=0.) for s in (0, 2) for z in (.1, .5) for l in range(s, 5) for k in ("cls", "patch")])
    axes = plots.plot_perturbation(frame, size=.5)
    assert [a.get_title() for a in axes] == ["cls", "patch"] and legend(axes[1]) == ["0", "2"]
    assert axes[0].lines[1].get_xdata().tolist() == [2, 3, 4] and axes[0].lines[1].get_ydata() == pytest.approx([.5, .25, .5/3])
    with pytest.raises(RaptorError, match="one size of push"): plots.plot_perturbation(frame)
    with pytest.raises(RaptorError, match="has 0.1, 0.5"): plots.plot_perturbation(frame, size=.2)

def test_basins_end_where_the_images_end():
    frame = pd.DataFrame([dict(image=i, label=i % 2, layer=l, axis_1=float(l*i), axis_2=float(-l)) for i in range(4) for l in (2, 0, 1)])
    ax = plots.plot_basins(frame, share=[.7, .2], class_names=["even", "odd"])
    assert texts(ax) == ["even", "odd"] and [t.get_position() for t in ax.texts] == [(2, -2), (4, -2)]
    assert ax.lines[1].get_xdata().tolist() == [0, 2, 4] and ax.get_xlabel() == "principal axis 1 (70 % of variance)"

@pytest.mark.parametrize("draw", [lambda f: plots.plot_segmentations(f), lambda f: plots.plot_loss_curve(f), lambda f: plots.plot_accuracy_r2(f, 1.),
    lambda f: plots.plot_ksweep(f, "y"), lambda f: plots.plot_partitions(f), lambda f: plots.plot_stochastic_depth(f), lambda f: plots.plot_swaps(f), lambda f: plots.plot_cost(f),
    lambda f: plots.plot_speed(f), lambda f: plots.plot_rank(f), lambda f: plots.plot_epsilon(f), lambda f: plots.plot_perturbation(f), lambda f: plots.plot_basins(f)])
def test_a_frame_without_the_columns_is_refused_by_name(draw):
    with pytest.raises(RaptorError, match="needs the column.*and got wrong"): draw(pd.DataFrame({"wrong": [1]}))
    assert plt.get_fignums() == []
