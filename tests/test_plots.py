"Figures: what is drawn is the data (heights, bars, labels), absent results are named, and bad frames are refused."
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from raptor.core import RaptorError
from raptor.figures import curves, plots, tradeoffs
from raptor.figures.style import boundaries, draw_lines, group_style, mean_and_spread, new_axes, save_figure, use_style
from raptor.phases import FragmentedPhases, Phases, published_distance


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")

layers = np.arange(1, 13)
NAN = float("nan")

def by_layer(**heights):
    kinds = [pd.DataFrame({"layer": layers, "token_kind": k, "value": v*layers, "std": .1}) for k, v in heights.items()]
    return pd.concat(kinds, ignore_index=True)

def legend(ax): return [t.get_text() for t in ax.get_legend().get_texts()]
def texts(ax): return [t.get_text() for t in ax.texts]
def bars(ax): # heights and ends; a bar of unknown length has no segment
    return [(c.lines[0].get_ydata(), [s[:, 1] for s in c.lines[2][0].get_segments() if len(s)]) for c in ax.containers]

def collisions(figure):
    "Pairs of texts, legends included, that overlap in the drawn figure."
    figure.canvas.draw()
    pieces = [t for ax in figure.axes for t in [*ax.texts, ax.title, ax.xaxis.label, ax.yaxis.label] if t.get_text()]
    pieces += [ax.get_legend() for ax in figure.axes if ax.get_legend()]
    boxes = [(str(p), p.get_window_extent().shrunk(.9, .9)) for p in pieces]
    return [(a, b) for i, (a, first) in enumerate(boxes) for b, second in boxes[i+1:] if first.overlaps(second)]

def ordinary_lines(ax): return [l for l in ax.lines if len(l.get_xdata()) > 2]

# ---- shared pieces

def test_style_is_left_behind_even_after_an_error():
    before = dict(matplotlib.rcParams)
    with pytest.raises(ZeroDivisionError):
        with use_style(): 1/0
    plots.plot_similarity(published_distance())
    assert {k: v for k, v in matplotlib.rcParams.items() if before[k] != v} == {}

def test_colours_are_fixed_when_drawn_and_do_not_follow_the_style_of_the_moment():
    ax = curves.plot_speed(by_layer(cls=1))
    assert ax.lines[0].get_color() == "#0173b2"

def test_token_kinds_look_alike_in_any_order_and_no_two_groups_do():
    assert group_style("patch", 0, ["patch"]) == group_style("patch", 2, ["cls", "register", "patch"])
    styles = [group_style(n, i, list("abcdefg")) for i, n in enumerate("abcdefg")]
    assert len({(s["marker"], s["color"]) for s in styles}) == 7 and len({str(s["linestyle"]) for s in styles}) == 7
    points = [{k: v for k, v in group_style(n, i, list("abcdefghijklmnopqrst")).items() if k != "linestyle"} for i, n in enumerate("abcdefghijklmnopqrst")]
    assert len({tuple(p.items()) for p in points}) == 20, "points without a line, too"

def test_many_numeric_groups_take_shades_in_order():
    lightness = [sum(group_style(n, i, [9, 0, 3, 6])["color"][:3]) for i, n in enumerate([9, 0, 3, 6])]
    assert np.argsort(lightness).tolist() == [1, 2, 3, 0]

def test_spread_is_over_replicas_and_else_the_row_own():
    out = mean_and_spread(pd.DataFrame({"k": [1, 1, 2, 3], "value": [1., 2., 4., NAN], "std": [7, 7, .3, NAN]}), ["k"])
    assert out["mean"].tolist()[:2] == [1.5, 4] and out["n"].tolist() == [2, 1, 0]
    assert out["std"].tolist()[:2] == pytest.approx([np.std([1, 2], ddof=1), .3])

def test_a_replica_that_failed_does_not_count():
    out = mean_and_spread(pd.DataFrame({"k": [1, 1, 1], "value": [1., NAN, 3.]}), ["k"])
    assert (out["mean"][0], out["n"][0]) == (2, 2)

def test_lines_are_sorted_and_gaps_stay_gaps():
    ax = new_axes()
    draw_lines(ax, pd.DataFrame({"x": [3, 1, 2], "value": [9., 1., NAN]}), "x")
    assert ax.lines[0].get_xdata().tolist() == [1, 2, 3] and np.isnan(ax.lines[0].get_ydata()[1])
    assert texts(ax) == ["not run"] and ax.texts[0].get_position()[0] == 2

def test_a_frame_without_a_single_result_says_so():
    ax = curves.plot_norms(by_layer(cls=NAN))
    assert texts(ax) == ["not run"] and not ordinary_lines(ax)
    assert texts(curves.plot_norms(by_layer(cls=1).head(0))) == ["not run"]

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
    drawn = {"figure": axes[0].figure, "axes": axes[0], "array": axes}[target]
    paths = save_figure(drawn, tmp_path/"deep"/"figure.v2.png")
    assert [p.name for p in paths] == ["figure.v2.png", "figure.v2.pdf"]
    assert set((tmp_path/"deep").iterdir()) == set(paths)
    width = int.from_bytes(paths[0].read_bytes()[16:20], "big")
    assert .9*5.6*150 < width < 1.1*5.6*150

# ---- phases and training

def test_similarity_is_one_minus_distance_with_a_frame_a_phase():
    ax = plots.plot_similarity(published_distance(), Phases((4, 12)))
    assert np.allclose(np.reshape(ax.collections[0].get_array(), (12, 12)), 1 - published_distance())
    frames = [(p.get_x(), p.get_y(), p.get_width()) for p in ax.patches]
    assert frames == [(0, 0, 4), (4, 4, 8)] # seaborn draws layer 1 from 0 to 1
    with pytest.raises(RaptorError, match="covers 7 layers"): plots.plot_similarity(published_distance(), (3, 7))

def test_similarities_in_one_figure_share_their_colours():
    axes = plt.subplots(1, 2)[1]
    for ax, scale in zip(axes, (.5, 1)): plots.plot_similarity(scale*published_distance(), ax=ax)
    lowest = 1 - published_distance().max()
    assert [ax.collections[0].get_clim() for ax in axes] == [(pytest.approx(lowest), 1)]*2
    shades = [ax.collections[0].cmap(ax.collections[0].norm(.5)) for ax in axes]
    assert shades[0] == shades[1]
    assert plots.plot_similarity(.5*published_distance()).collections[0].get_clim()[0] > lowest, "a figure of its own"

@pytest.mark.parametrize("ends", [(7, 10, 12), [7, 10, 12], "7-10-12", "(7, 10, 12)", "7 10 12"])
def test_segmentations_read_ends_in_any_writing(ends):
    ax = plots.plot_segmentations(pd.DataFrame({"solver": ["exact"], "k": [3], "ends": [ends]}))
    assert [(p.get_x(), p.get_width()) for p in ax.patches] == [(.5, 7), (7.5, 3), (10.5, 2)]
    assert texts(ax) == ["7", "3", "2"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["exact, k = 3"]

def test_a_segmentation_that_was_not_found_is_named():
    frame = pd.DataFrame({"model": ["A", "B"], "solver": "exact", "k": [2, 2], "ends": ["3-6", NAN]})
    ax = plots.plot_segmentations(frame)
    assert len(ax.patches) == 2 and texts(ax)[-1] == "not run"
    assert [t.get_text() for t in ax.get_yticklabels()] == ["A, exact, k = 2", "B, exact, k = 2"]

def test_no_two_segmentations_have_the_same_label():
    frame = pd.DataFrame({"model": "A", "solver": ["exact", "recursive", "recursive"], "k": 2, "eps": [NAN, .1, .05],
                          "ends": ["3-6", "3-6", "4-6"]})
    labels = [t.get_text() for t in plots.plot_segmentations(frame).get_yticklabels()]
    assert len(labels) == len(set(labels)) and labels[2] == r"A, recursive ($\epsilon$ = 0.05), k = 2"
    with pytest.raises(RaptorError, match="two rows with the same"): plots.plot_segmentations(frame.drop(columns="eps"))

def test_loss_curve_draws_what_is_recorded():
    history = pd.DataFrame({"step": [10, 20, 30], "loss": [3., 2., 1.], "tf": [1., .5, NAN], "lambda": [1, .5, 0]})
    ax = plots.plot_loss_curve(history)
    assert ax.lines[0].get_ydata().tolist() == [3, 2, 1] and ax.lines[1].get_ydata().tolist() == [1, .5]
    assert ax.figure.axes[1].lines[0].get_ydata().tolist() == [1, .5, 0] and ax.get_yscale() == "log"
    assert plots.plot_loss_curve(history[["step", "loss"]]).get_legend() is None

def test_loss_curve_of_several_runs():
    ax = plots.plot_loss_curve(pd.DataFrame({"step": [1, 2]*2, "loss": [2., 1., 4., 3.], "run": list("aabb")}))
    assert legend(ax) == ["a", "b"] and ax.lines[1].get_ydata().tolist() == [4, 3]

# ---- scores

def test_accuracy_is_relative_to_the_teacher_with_error_bars_over_replicas():
    frame = pd.DataFrame({"k": [3, 2, 2, 4], "accuracy": [.9, .7, .8, NAN], "r2": [.6, .4, .5, NAN]})
    left, right = plots.plot_accuracy_r2(frame, teacher=1/1.1, references={"small": .5})
    ((height, ends),), error = bars(left), 110*np.std([.7, .8], ddof=1)
    assert height[:2] == pytest.approx([82.5, 99]) and ends[0] == pytest.approx([82.5 - error, 82.5 + error])
    assert bars(right)[0][0][:2] == pytest.approx([.45, .6]) and texts(left) == texts(right) == ["not run"]
    level = {l.get_label(): l for l in left.lines if l.get_label() in legend(left)}
    assert {name: l.get_ydata()[0] for name, l in level.items()} == {"teacher": 100, "small": pytest.approx(55)}
    assert level["teacher"].get_linestyle() != level["small"].get_linestyle() and left.get_ylim()[1] > 100

def test_ksweep_has_a_line_a_partition():
    frame = pd.DataFrame({"k": [1, 2, 3]*2, "partition": ["max-cut"]*3 + ["random"]*3, "value": [2., 4, 6, 1, 2, 3]})
    ax = plots.plot_ksweep(frame, "score")
    assert [h.tolist() for h, _ in bars(ax)] == [[2, 4, 6], [1, 2, 3]]
    assert legend(ax) == ["max-cut", "random"] and ax.get_ylabel() == "score"

def test_partitions_average_replicas_of_the_same_partition_only():
    frame = pd.DataFrame({"partition": ["max-cut"]*2 + ["random"]*2, "ends": ["5-12", "5-12", "3-12", "9-12"],
                          "cut_weight": [9., 9, 5, 6], "r2": [.8, .9, .5, .7]})
    ax = plots.plot_partitions(frame)
    assert [h.tolist() for h, _ in bars(ax)] == [[pytest.approx(.85)], [.5, .7]]
    assert ax.containers[0].lines[0].get_marker() == "*"

def test_stochastic_depth_draws_the_panels_there_are():
    frame = pd.DataFrame({"step": [0, 100], "accuracy": [.1, .8], "similarity": [.9, .5]})
    axes = plots.plot_stochastic_depth(frame, x="step")
    assert [a.get_ylabel() for a in axes] == ["mean similarity of layers", "accuracy of the ViT (%)"]
    assert bars(axes[1])[0][0] == pytest.approx([10, 80])
    with pytest.raises(RaptorError, match="similarity, r2, accuracy"):
        plots.plot_stochastic_depth(frame[["step"]], x="step")

def test_swaps_put_within_before_across_and_mark_the_baseline():
    frame = pd.DataFrame({"gap": [1, 1, 1, 2], "within": [False, True, True, False], "accuracy": [.3, .7, .8, .2]})
    ax = plots.plot_swaps(frame, baseline=.85)
    assert legend(ax) == ["all in place", "within a phase", "across phases"]
    assert [h.tolist() for h, _ in bars(ax)] == [[pytest.approx(75)], [pytest.approx(30), pytest.approx(20)]]
    assert [c.lines[0].get_xdata().tolist() for c in ax.containers] == [[.9], [1.1, 2.1]], "beside each other"
    assert ax.get_xticks().tolist() == [1, 2] and texts(ax) == [], "what could collide is in the legend"
    assert any(l.get_linestyle() == "--" and list(l.get_ydata()) == [85, 85] for l in ax.lines)

def test_cost_bars_have_units_and_skip_what_was_not_measured():
    frame = pd.DataFrame({"model": ["A", "B"], "flops": [23e9, NAN], "latency_ms": [5., 7], "latency_ms_std": [.5, .7]})
    flops, time = plots.plot_cost(frame)
    assert [p.get_width() for p in flops.patches] == [23] and texts(flops) == ["not run"]
    assert flops.get_xlabel() == "GFLOPs per image" and [p.get_width() for p in time.patches] == [5, 7]
    ends = [s[:, 0] for s in time.containers[0].lines[2][0].get_segments()]
    assert np.allclose(ends, [[4.5, 5.5], [6.3, 7.7]])
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

@pytest.mark.parametrize("plot", [curves.plot_convergence, curves.plot_speed, curves.plot_coherence, curves.plot_norms])
def test_curves_draw_each_kind_of_token_with_its_band_and_the_phases(plot):
    ax = plot(by_layer(cls=1., patch=2.), phases=(7, 12))
    assert [l.get_ydata().tolist() for l in ordinary_lines(ax)] == [layers.tolist(), (2*layers).tolist()]
    assert legend(ax) == ["cls", "patch"]
    low, high = np.array([p.vertices[:, 1] for p in ax.collections[0].get_paths()])[0][[1, -2]]
    assert sorted([low, high]) == pytest.approx([.9, 1.1])
    assert [l.get_xdata()[0] for l in ax.lines if len(l.get_xdata()) == 2] == [7.5]
    assert ax.get_xlabel() == "layer" and ax.get_ylabel()

def test_curves_of_replicas_and_models():
    frame = pd.concat([by_layer(cls=v).assign(model="Raptor") for v in (1., 3.)])
    ax = curves.plot_speed(frame, hue="model")
    assert ordinary_lines(ax)[0].get_ydata() == pytest.approx(2.*layers) and legend(ax) == ["Raptor"]

def test_class_angles_and_ranks_name_their_lines():
    pairs = by_layer(within=1, between=2).rename(columns={"token_kind": "pair"})
    assert legend(curves.plot_class_angles(pairs)) == ["same class", "different classes"]
    rank = pd.concat([by_layer(cls=1, patch=2).assign(quantity=q) for q in ("stable_rank", "effective_rank")])
    names = ["stable rank, cls", "stable rank, patch", "effective rank, cls", "effective rank, patch"]
    assert legend(curves.plot_rank(rank)) == names

def test_panels_with_the_same_lines_share_one_legend():
    axes = plt.subplots(1, 3)[1]
    for ax, kinds in zip(axes, (dict(cls=1, patch=2), dict(cls=2, patch=1), dict(cls=1, patch=NAN))):
        curves.plot_speed(by_layer(**kinds), ax=ax)
    assert legend(axes[0]) == ["cls", "patch"] and axes[1].get_legend() is None
    assert legend(axes[2]) == ["cls", "patch (not run)"], "another set of lines has its own"

def test_epsilon_is_the_worst_layer_of_the_mean_over_replicas():
    frame = pd.concat([by_layer(all=v).assign(model="k = 3", quantity="relative") for v in (1., 3.)])
    assert legend(curves.plot_epsilon(frame)) == [r"k = 3, $\epsilon$ = 24"]
    kinds = by_layer(cls=1, patch=2).assign(quantity="angle")
    assert legend(curves.plot_epsilon(kinds, "angle")) == [r"cls, $\epsilon$ = 12", r"patch, $\epsilon$ = 24"]
    with pytest.raises(RaptorError, match="several token kinds"):
        curves.plot_epsilon(kinds.assign(model="k = 3"), "angle")

def test_perturbation_has_a_panel_a_kind_and_a_line_a_start():
    frame = pd.DataFrame([dict(start_layer=s, size=z, layer=l, token_kind=k, value=z/(1 + l - s), std=0.)
                          for s in (0, 2) for z in (.1, .5) for l in range(s, 5) for k in ("cls", "patch")])
    axes = curves.plot_perturbation(frame, size=.5)
    assert [a.get_title() for a in axes] == ["cls", "patch"] and legend(axes[1]) == ["0", "2"]
    assert axes[0].lines[1].get_xdata().tolist() == [2, 3, 4]
    assert axes[0].lines[1].get_ydata() == pytest.approx([.5, .25, .5/3])
    assert [bool(a.get_ylabel()) for a in axes] == [True, False]
    with pytest.raises(RaptorError, match="one size of push"): curves.plot_perturbation(frame)
    with pytest.raises(RaptorError, match="has 0.1, 0.5"): curves.plot_perturbation(frame, size=.2)

def test_basins_end_where_the_images_end():
    frame = pd.DataFrame([dict(image=i, label=i % 2, layer=l, axis_1=float(l*i), axis_2=float(-l))
                          for i in range(4) for l in (2, 0, 1)])
    ax = curves.plot_basins(frame, share=[.7, .2], class_names=["even", "odd"])
    assert texts(ax) == ["even", "odd"] and [t.get_position() for t in ax.texts] == [(2, -2), (4, -2)]
    assert ax.lines[1].get_xdata().tolist() == [0, 2, 4] and ax.get_xlabel() == "principal axis 1 (70 % of variance)"

def test_no_line_runs_along_the_floor_of_the_tradeoffs():
    "Points below it stand at the edge with their number; the curve ends above."
    frame = pd.DataFrame([dict(kind="layers dropped", steps=s, value=v, flops=s) for s, v in ((3, 10.), (4, 20.), (6, 70.), (12, 88.))])
    ax, = tradeoffs.plot_pareto(frame, {"flops": "GFLOPs"}, "top-1 (%)", floor=60)
    curve, points = (np.asarray(line.get_ydata()) for line in ax.lines)
    assert np.isnan(curve[:2]).all() and list(curve[2:]) == [70, 88] and list(points) == [60, 60, 70, 88]
    assert texts(ax) == ["3: 10", "4: 20", "6", ""] and [t.xyann[1] for t in ax.texts] == [3, 11, 3, 3], "numbers side by side"

# ---- all figures

@pytest.mark.parametrize("draw", [
    plots.plot_segmentations, plots.plot_loss_curve, lambda f: plots.plot_accuracy_r2(f, 1.),
    lambda f: plots.plot_ksweep(f, "y"), plots.plot_partitions, plots.plot_stochastic_depth, plots.plot_swaps,
    plots.plot_cost, curves.plot_speed, curves.plot_rank, curves.plot_epsilon, curves.plot_perturbation,
    curves.plot_basins])
def test_a_frame_without_the_columns_is_refused_by_name(draw):
    with pytest.raises(RaptorError, match="needs the column.*and got wrong"): draw(pd.DataFrame({"wrong": [1]}))
    assert plt.get_fignums() == []

def swapped(top): # accuracies that reach the baseline, where the legend and the label once collided
    return pd.DataFrame([dict(gap=g, within=w, accuracy=top - .1*g*(not w)) for g in (1, 2, 3) for w in (True, False)])

@pytest.mark.parametrize("draw", [
    lambda: plots.plot_swaps(swapped(.9), baseline=.9), lambda: plots.plot_swaps(swapped(.4), baseline=.4),
    lambda: plots.plot_similarity(published_distance(), (7, 12), title="a model"),
    lambda: plots.plot_accuracy_r2(pd.DataFrame({"k": [2, 3], "accuracy": [.8, .9], "r2": [.5, .6]}), .9, {"B": .8}),
    lambda: curves.plot_speed(by_layer(cls=1, patch=2), (7, 12)),
    lambda: plots.plot_cost(pd.DataFrame({"model": ["A", "B"], "flops": [1e9, NAN], "latency_ms": [5., 7.]}))])
def test_no_text_lies_over_another(draw):
    assert collisions(np.ravel(draw())[0].figure) == []
