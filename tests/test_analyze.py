"""The analysis against naive loops, closed forms and made-up networks, and what it says of odd inputs."""
import csv
import functools
import itertools
import math
import subprocess
import sys
from pathlib import Path

import matplotlib.text
import numpy as np
import pytest
import torch
from torchvision.datasets.folder import default_loader
from torchvision.utils import save_image

import analyze
import data
import train
from model import CNN
from utils import UserError, load_checkpoint

MATCH_PROB, SEED = 0.9, 5  # of the network that is looked into
CLASSES = tuple(f"class{i}" for i in range(10))
load_splits = functools.cache(data.load_splits)


@pytest.fixture(scope="module")
def seeds(data_dir):
    """Two data seeds that draw each digit for some validation image: there are only a few images."""
    def good(seed):
        return len(load_splits(str(data_dir), MATCH_PROB, seed).val.digits.unique()) == 10
    return list(itertools.islice(filter(good, range(1, 100)), 2))


@pytest.fixture(scope="module")
def best(data_dir, seeds, tmp_path_factory):
    """best.pt of a short run of train.py."""
    out = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "load_splits", load_splits)
        patch.setattr(train, "draw_curves", lambda *args: None)
        flags = ["--data-dir", data_dir, "--out", out, "--device", "cpu", "--epochs", 2, "--limit", 200,
                 "--data-seed", seeds[0], "--match-prob", MATCH_PROB, "--seed", SEED]
        train.train(train.parse_args([*map(str, flags)]))
    return out / "best.pt"


@pytest.fixture
def net(best):
    net = CNN()
    net.load_state_dict(torch.load(best, weights_only=True)["model"])
    return net.eval()


@pytest.fixture
def splits(data_dir, seeds):
    return load_splits(str(data_dir), MATCH_PROB, seeds[0])


@pytest.fixture
def call(monkeypatch, capsys, data_dir):
    """Runs analyze.py with flags; returns the lines that it prints."""
    def call(*flags):
        monkeypatch.setattr(analyze, "load_splits", load_splits)
        flags = ["--data-dir", data_dir, "--device", "cpu", *flags]
        monkeypatch.setattr(sys, "argv", ["analyze.py", *map(str, flags)])
        capsys.readouterr()
        analyze.main()
        return capsys.readouterr().out.splitlines()
    return call


@pytest.fixture
def undrawn(monkeypatch):
    """Without the figures, which take most of the time."""
    for name in [name for name in vars(analyze) if name.startswith("draw_")]:
        monkeypatch.setattr(analyze, name, lambda *args: None)


@pytest.fixture
def quick(call, undrawn, monkeypatch):
    """`call` for the first layer, without figures and exchanged digits."""
    monkeypatch.setattr(analyze, "analyze_shortcut", lambda *args: [])
    return functools.partial(call, "--layer", "first", "--ckpt")


@pytest.fixture
def edited(best, tmp_path):
    """Saves best.pt with some of its entries changed; returns the path."""
    def edited(**changes):
        torch.save({**torch.load(best, weights_only=True), **changes}, tmp_path / "edited.pt")
        return tmp_path / "edited.pt"
    return edited


@pytest.fixture
def course(tmp_path):
    """A folder in the course's layout, with two images of each class."""
    folder = tmp_path / "somewhere" / "my_images"
    for path in [folder / name / str(c) for name in ("train", "val") for c in range(10)]:
        path.mkdir(parents=True)
        for i in range(2):
            save_image(torch.rand(3, 40, 40), path / f"{i}.png")
    return folder


def keyed(lines):
    """Lines "key value ..." as {key: value}."""
    return {line.split()[0]: line.split()[1] for line in lines}


def notes(lines):
    return [line for line in lines if line.startswith("note")]


def logits_of(net, images):
    with torch.no_grad():
        return net(data.Normalize()(images / 255))


def depth_of(net):
    return len(net(torch.zeros(1, 3, 40, 40), return_maps=True)[1])


def texts(figure):
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text)]


def heights(figure):
    """The bars' heights of each chart of a figure."""
    return [[bar.get_height() for bar in axis.patches] for axis in figure.axes if axis.patches]


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------- norms and selectivity
def test_class_means_are_means_of_l2_norms(net, splits, monkeypatch):
    monkeypatch.setattr(analyze, "EVAL_BATCH", 15)  # several batches, the last one shorter
    images, labels = splits.val.images, splits.val.labels
    logits, image_norms = analyze.map_norms(net, images)
    norms = analyze.class_means(image_norms, labels)
    torch.testing.assert_close(logits, logits_of(net, images), rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        maps = net(data.Normalize()(images / 255), return_maps=True)[1]
    assert [layer.shape for layer in norms] == [(m.shape[1], 10) for m in maps]
    for layer in (0, len(maps) // 2, len(maps) - 1):
        for i in (0, maps[layer].shape[1] - 1):
            for c in range(10):
                of_class = [math.sqrt(sum(v * v for v in maps[layer][k, i].flatten().tolist()))
                            for k in range(len(labels)) if labels[k] == c]
                assert norms[layer][i, c] == pytest.approx(sum(of_class) / len(of_class), rel=1e-3, abs=1e-6)


def test_a_class_without_images_is_named():
    with pytest.raises(UserError, match="class or digit 4"):
        analyze.class_means([torch.rand(9, 6)], torch.tensor([0, 1, 2, 3, 5, 6, 7, 8, 9]))


def test_selectivity_closed_forms():
    norms = [[1] * 10, [5] + [0] * 9, [3] + [1] * 9, [0] * 10, [0, 0, 8, 1, 1, 1, 1, 1, 2, 2]]
    np.testing.assert_allclose(analyze.selectivity(np.array(norms, float)), [0, 1, 0.5, 0, (8 - 1) / (8 + 1)])


def test_the_printed_selectivity_closed_forms():
    norms, untrained = np.ones((7, 10)), np.ones((7, 10))
    norms[range(7), range(7)] = [3, 1, 9, 5 / 3, 2, 1.5, 4]  # indexes 1/2, 0, 4/5, 1/4, 1/3, 1/5, 3/5
    untrained[:, 0] = 3
    lines = analyze.selectivity_lines(2, norms, untrained, CLASSES)
    printed = {line.split()[0]: line.split()[1] for line in lines if "expert" not in line}
    assert printed == {"layer2_selectivity_median": "0.3333", "layer2_selectivity_quartiles": "0.2250",
                       "layer2_selectivity_median_untrained": "0.5000"}
    assert [line.split()[-3:] for line in lines if "expert" in line] == [
        ["3", "class2", "0.8000"], ["7", "class6", "0.6000"], ["1", "class0", "0.5000"],
        ["5", "class4", "0.3333"], ["4", "class3", "0.2500"]]


# ---------------------------------------------------------------- what is printed and written
def test_what_is_printed_and_what_is_written_agree(best, net, splits, call, undrawn, tmp_path):
    printed = call("--ckpt", best, "--layer", "first", "--out", tmp_path)
    written = (tmp_path / "analysis.txt").read_text(encoding="utf-8").splitlines()
    assert written and [line for line in printed if line in written] == written
    values, val, test = keyed(written), splits.val, splits.test
    hits = logits_of(net, val.images).argmax(1) == val.labels
    test_hits = logits_of(net, test.images).argmax(1) == test.labels
    for key, right in (("val_acc", hits), ("test_acc", test_hits)):
        assert float(values[key]) == pytest.approx(100 * sum(right.tolist()) / len(right), abs=0.01)

    norms = analyze.map_norms(net, val.images)[1]
    by_class, by_digit = (analyze.class_means(norms, groups)[0] for groups in (val.labels, val.digits))
    index, digit_index = analyze.selectivity(by_class), analyze.selectivity(by_digit)
    table = read(tmp_path / "experts_layer1.csv")
    assert [int(row["filter"]) for row in table] == [*range(1, len(by_class) + 1)]
    for row, means, digit_means in zip(table, by_class, by_digit):
        np.testing.assert_allclose([float(row[name]) for name in splits.classes], means, rtol=1e-4)
        assert row["best_class"] == splits.classes[means.argmax()]
        assert int(row["best_digit"]) == digit_means.argmax()
    for column, expected in (("class_selectivity_index", index), ("digit_selectivity_index", digit_index)):
        np.testing.assert_allclose([float(row[column]) for row in table], expected, atol=1e-4)
    assert float(values["layer1_selectivity_median"]) == pytest.approx(np.median(index), abs=1e-4)
    assert int(values["layer1_filters_more_selective_for_digit"]) == sum(digit_index > index)

    groups, counts = analyze.group_table(hits, val)
    table, pairs = read(tmp_path / "groups.csv"), itertools.product(splits.classes, range(10))
    assert [(row["label"], int(row["digit"])) for row in table] == [*pairs]
    assert [int(row["images"]) for row in table] == counts.flatten().tolist()
    np.testing.assert_allclose([float(row["acc"] or "nan") for row in table], groups.flatten(), rtol=1e-4)
    assert float(values["worst_group_acc"]) == pytest.approx(np.nanmin(groups), abs=0.01)


def test_a_checkpoint_of_train_py_brings_its_data_and_its_seed(best, data_dir, seeds, splits, quick):
    """Its val_acc is measured again to the same figure, on its own images, without a note."""
    printed, stored = quick(best), torch.load(best, weights_only=True)
    values = keyed(printed)
    assert float(values["val_acc"]) == pytest.approx(stored["val_acc"], abs=0.01)
    assert int(values["epoch"]) == stored["epoch"] and notes(printed) == []
    other = load_splits(str(data_dir), None, seeds[0])  # a note would tell that match_prob was not taken
    assert other.fingerprint != splits.fingerprint == stored["args"]["fingerprint"]
    medians = []
    for seed in (SEED, 0):
        torch.manual_seed(seed)
        norms = analyze.class_means(analyze.map_norms(CNN(), splits.val.images)[1], splits.val.labels)[0]
        medians.append(f"{np.median(analyze.selectivity(norms)):.4f}")
    assert values["layer1_selectivity_median_untrained"] == medians[0] != medians[1]


def test_one_map_more_is_the_last_layer(best, call, undrawn, monkeypatch, tmp_path):
    class Deeper(CNN):
        def forward(self, x, return_maps=False):
            logits, maps = super().forward(x, return_maps=True)
            return (logits, [*maps, maps[0][:, :3]]) if return_maps else logits

    monkeypatch.setattr(analyze, "CNN", Deeper)
    last = depth_of(Deeper())
    printed = call("--ckpt", best, "--layer", "last", "--out", tmp_path)
    assert f"layer{last}_selectivity_median" in keyed(printed)
    assert len(read(tmp_path / f"experts_layer{last}.csv")) == 3


# ---------------------------------------------------------------- figures
def test_kernels_become_images_stretched_to_black_and_white(tmp_path, shown):
    """Five filters of 4x4, not the network's own: model.py is there to be edited."""
    weight = torch.randn(5, 3, 4, 4)
    weight[3, 1] = 0.7  # the same everywhere: black
    analyze.draw_filters(weight, "synthetic data", tmp_path)
    low, high = weight.amin((2, 3), True), weight.amax((2, 3), True)
    stretched = ((weight - low) / (high - low).clamp(min=1e-9)).numpy()
    for i, channel in itertools.product(range(5), range(3)):
        path = tmp_path / "filters" / f"filter{i + 1:02}_channel{channel + 1}.png"
        pixels = np.array(default_loader(str(path)))[:, :, 0]
        np.testing.assert_allclose(pixels, 255 * stretched[i, channel], atol=2)

    kernels = [axis.images[0].get_array() for axis in shown["filters.png"].axes if axis.images]
    assert len(kernels) == 15
    for expected in stretched.reshape(15, 4, 4):
        assert any(np.allclose(expected, kernel) for kernel in kernels)


def test_a_layers_sheet_has_a_chart_for_each_filter_the_most_selective_first(tmp_path, shown):
    norms = np.ones((5, 10))
    norms[range(5), range(5)] = [2, 5, 3, 4, 6]
    analyze.draw_layer(1, norms, CLASSES, "made-up data", tmp_path)
    charts = [norms[i] / norms[i].max() for i in range(5)]
    for i in range(5):
        np.testing.assert_allclose(heights(shown[f"filter{i + 1:02}.png"]), [charts[i]])
    np.testing.assert_allclose(heights(shown["experts_layer1.png"]), [charts[i] for i in (4, 1, 3, 2, 0)])


def test_figure_8_picks_the_most_uniform_and_the_most_selective(tmp_path, shown):
    first, last = np.ones((5, 10)), np.ones((6, 10))
    first[range(5), range(5)], last[range(6), range(6)] = [2, 5, 3, 4, 6], [2, 5, 3, 4, 6, 1]
    analyze.draw_summary(first, last, CLASSES, "made-up data", tmp_path)
    expected = [first[0], first[2], first[3], last[4], last[1], last[3]]
    np.testing.assert_allclose(heights(shown["experts.png"]), [norms / norms.max() for norms in expected])


@pytest.mark.parametrize("known", [True, False])
def test_the_mistakes_are_the_surest_ones(known, tmp_path, shown):
    """Labels 0; each second image is got wrong, as class 1, the surer the later; its pixels are its number.
    Where digits are known those of their digit's class stand out, else nothing is said of digits."""
    n = 90
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).repeat(1, 3, 40, 40)
    digits = torch.arange(n) % 3 if known else torch.full((n,), -1)
    split, logits = data.Split(images, torch.zeros(n, dtype=torch.long), digits), torch.zeros(n, 10)
    logits[range(n), torch.arange(n) % 2] = 3 + torch.arange(n) / 20
    analyze.draw_mistakes(split, logits, CLASSES, "made-up data", tmp_path)
    axes = [axis for axis in shown["mistakes.png"].axes if axis.images]
    numbers = [int(axis.images[0].get_array()[0, 0, 0]) for axis in axes]
    assert len(numbers) >= 10 and numbers == list(range(n - 1, 0, -2))[:len(numbers)]
    assert any("digit" in text for text in texts(shown["mistakes.png"])) == known
    follow, plain = ({axis.title.get_color() for axis, i in zip(axes, numbers) if (digits[i] == 1) == follows}
                     for follows in (True, False))
    assert len(plain) == 1 and len(follow) == known and not follow & plain


def test_the_shortcuts_picture_against_double_loops(tmp_path, shown):
    split, rows, predictions = made_up_split(), torch.randint(0, 10, (11, 200)), torch.randint(0, 10, (200,))
    labels, groups = split.labels.tolist(), np.arange(100.0).reshape(10, 10)
    analyze.draw_shortcut(split, predictions, groups, rows, CLASSES, "made-up data", tmp_path)
    pairs = list(zip(labels, predictions.tolist()))
    confusion = [[100 * pairs.count((y, c)) / labels.count(y) for c in range(10)] for y in range(10)]
    placed = [[100 * row.count(c) / 200 for c in range(10)] for row in rows.tolist()]
    tables = [axis.images[0].get_array() for axis in shown["shortcut.png"].axes if axis.images]
    for expected in (confusion, placed, groups):
        assert any(table.shape == np.shape(expected) and np.allclose(table, expected) for table in tables)


# ---------------------------------------------------------------- the shortcut
class Reader(torch.nn.Module):
    """Sees one pixel of a normalized image, of the picture (label) or the corner (digit): its value / 20."""

    def __init__(self, y, x):
        super().__init__()
        self.at, self.seen = (y, x), []

    def forward(self, images):
        self.seen.append(images)
        red = (images[:, 0, self.at[0], self.at[1]] * data.STD[0] + data.MEAN[0]) * 255
        return torch.nn.functional.one_hot((red / 20).round().long().clamp(0, 9), 10).float()


def made_up_split(n=200):
    """Pictures of one value, 20 * label, with corners of one value, 20 * digit."""
    labels, digits = torch.randint(0, 10, (2, n), generator=torch.Generator().manual_seed(3))
    labels[:10], digits[:10] = torch.arange(10), torch.arange(10).roll(1)
    images = torch.full((n, 3, 40, 40), 127, dtype=torch.uint8)
    images[data.PICTURE] = (20 * labels).byte().view(n, 1, 1, 1)
    images[data.DIGIT] = (20 * digits).byte().view(n, 1, 1, 1)
    return data.Split(images, labels, digits)


@pytest.mark.parametrize("cheats", [True, False])
def test_the_counterfactual_tells_a_cheat_from_an_honest_network(cheats):
    split, model = made_up_split(), Reader(35, 35) if cheats else Reader(5, 5)
    before = split.digits if cheats else split.labels
    rows = analyze.counterfactual(model, split)
    for digit in range(10):
        assert (rows[digit] == (digit if cheats else split.labels)).all()
    assert (rows[10] == (0 if cheats else split.labels)).all()

    groups, counts = analyze.group_table(before == split.labels, split)
    scores = analyze.score(torch.nn.functional.one_hot(before, 10).float(), split)
    printed = keyed(analyze.shortcut_lines(split, before, scores, groups, counts, rows, CLASSES))
    honest, zeros = 0 if cheats else 100, 100 * float((split.labels == 0).double().mean())
    assert {key: float(value) for key, value in printed.items()} == {
        "val_acc_agree": 100, "val_acc_conflict": honest, "val_follows_digit": 100 - honest,
        "worst_group_acc": honest, "acc_digit_of_label": 100, "acc_other_digit": honest,
        "acc_no_digit": pytest.approx(zeros if cheats else 100, abs=0.01),
        "another_digit_changes_prediction": 100 - honest,
        "another_digit_changes_prediction_to_it": 100 - honest, "prediction_depends_on_digit": 100 - honest}


def test_the_counterfactual_changes_the_corner_only_and_takes_real_corners():
    split, spy = made_up_split(), Reader(5, 5)
    analyze.counterfactual(spy, split)
    images = torch.cat(spy.seen).view(11, *split.images.shape)
    outside = torch.ones(40, 40, dtype=torch.bool)
    outside[24:, 24:] = False
    own = data.Normalize()(split.images / 255)
    torch.testing.assert_close(images[..., outside], own[..., outside].expand(11, -1, -1, -1))
    corners = (images[:, :, 0, 24:, 24:] * data.STD[0] + data.MEAN[0]) * 255
    for digit in range(11):
        assert (corners[digit] - 20 * (digit % 10)).abs().max() < 1e-3  # the eleventh is black


def test_group_table_against_a_double_loop():
    split, correct = made_up_split(), torch.rand(200) < 0.5
    groups, counts = analyze.group_table(correct, split)
    for label, digit in itertools.product(range(10), range(10)):
        hits = [bool(c) for c, y, d in zip(correct, split.labels, split.digits) if (y, d) == (label, digit)]
        assert counts[label, digit] == len(hits)
        assert groups[label, digit] == 100 * sum(hits) / len(hits) if hits else np.isnan(groups[label, digit])


# ---------------------------------------------------------------- predictions
@pytest.mark.parametrize("name", ["img", "²"])  # isdigit() says yes to the second, int() no
def test_predictions_in_natural_order_and_the_normalization_that_is_assumed(best, net, call, tmp_path, name):
    images = torch.rand(12, 3, 40, 40) * torch.linspace(0.1, 1, 12).view(12, 1, 1, 1)
    (folder := tmp_path / "unlabeled").mkdir()
    for i, image in enumerate(images):
        save_image(image, folder / f"{name}{i}.png")
    printed = call("--ckpt", best, "--predict", folder, "--out", tmp_path)
    assert sum("normalized" in line for line in printed) == 1
    expected = logits_of(net, (images * 255 + 0.5).to(torch.uint8)).argmax(1).tolist()
    written = (tmp_path / "predictions.txt").read_text(encoding="utf-8").splitlines()
    assert written == [f"{name}{i}.png,{c}" for i, c in enumerate(expected)]


# ---------------------------------------------------------------- other data than those of the training
def test_a_note_where_the_network_was_trained_on_other_images(best, quick, seeds, course, tmp_path):
    for flags in (["--data-seed", seeds[1]], ["--data-dir", course]):
        printed = quick(best, "--out", tmp_path, *flags)
        (note,) = [line for line in notes(printed) if "other images" in line]
        assert note in (tmp_path / "analysis.txt").read_text(encoding="utf-8").splitlines()
    assert notes(quick(best, "--out", tmp_path, "--data-seed", seeds[0])) == []


def test_a_note_where_the_stored_accuracy_is_not_the_measured_one(best, edited, quick):
    stored = torch.load(best, weights_only=True)["val_acc"]
    (note,) = notes(quick(edited(val_acc=stored + 5)))
    assert f"{stored + 5:.2f}" in note


def test_a_note_where_the_classes_have_other_names(edited, quick):
    (note,) = notes(quick(edited(classes=list(CLASSES))))
    assert all(name in note for name in CLASSES)


def test_a_course_folder_has_short_titles_without_digits(net, course, call, shown, monkeypatch, tmp_path):
    """Its digits are unknown, so nothing tells of them, and no old file does beside the new ones."""
    draw_layer = analyze.draw_layer
    monkeypatch.setattr(analyze, "draw_layer", lambda n, norms, *args: draw_layer(n, norms[:2], *args))
    (out := tmp_path / "out").mkdir()
    torch.save(net.state_dict(), out / "net.pt")
    old = [out / name for name in ("shortcut.png", "groups.csv", "experts_layer99.csv")]
    for path in [*old, out / "notes.txt"]:
        path.write_text("old")
    printed = call("--ckpt", out / "net.pt", "--layer", "first", "--data-dir", course)
    assert not any(path.exists() for path in old)
    assert (out / "notes.txt").exists() and (out / "net.pt").exists()
    for name in ("mistakes.png", "experts.png", "experts_layer1.png"):
        assert course.name in shown[name].get_suptitle()
    words = [text for figure in shown.values() for text in texts(figure)]
    words += (out / "analysis.txt").read_text(encoding="utf-8").splitlines()
    assert not any("digit" in text or str(course.parent) in text for text in words)
    assert any(line.startswith("source") and course.name in line for line in printed)


# ---------------------------------------------------------------- checkpoints
@pytest.mark.parametrize("key", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_checkpoints_of_other_code_are_read(key, prefix, net, tmp_path):
    """Those of DataParallel and torch.compile, whose names have a prefix, and with a dict around them."""
    expected = net.state_dict()
    state = {prefix + name: value for name, value in expected.items()}
    torch.save({key: state, "epoch": 3} if key else state, tmp_path / "net.pt")
    state = load_checkpoint(tmp_path / "net.pt")["model"]
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_that_are_no_numbers_are_one_line(value, net, tmp_path):
    state = net.state_dict()
    state[name := next(iter(state))].view(-1)[3] = value
    torch.save({"model": state}, tmp_path / "net.pt")
    with pytest.raises(UserError) as error:
        load_checkpoint(tmp_path / "net.pt")
    assert name in str(error.value) and "\n" not in str(error.value)


def test_a_folder_is_no_checkpoint(call, tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        call("--ckpt", tmp_path)


def test_a_bare_name_is_found_where_train_py_leaves_it(edited, quick, monkeypatch, tmp_path):
    """In results/run, where there is none in the current folder."""
    monkeypatch.chdir(tmp_path)
    (run := tmp_path / "results" / "run").mkdir(parents=True)
    edited(epoch=41).rename(run / "best.pt")
    assert keyed(quick("best.pt"))["epoch"] == "41"
    assert (run / "analysis.txt").exists() and not (tmp_path / "analysis.txt").exists()
    edited(epoch=42).rename(tmp_path / "best.pt")
    assert keyed(quick("best.pt"))["epoch"] == "42"


@pytest.mark.parametrize("changes", [
    {"args": [1]}, {"args": {"seed": "x", "data_seed": "x", "match_prob": "high", "fingerprint": 1}},
    {"val_acc": "good", "epoch": None}], ids=["list", "words", "entries"])
def test_entries_of_other_types_are_no_traceback(changes, edited, quick, seeds):
    values = keyed(quick(edited(**changes), "--data-seed", seeds[0]))
    assert 0 <= float(values["val_acc"]) <= 100


# ---------------------------------------------------------------- flags
@pytest.mark.parametrize("layer", ["beyond", "0", "middle"])
def test_a_layer_that_is_not_there_exits_with_2(layer, best, net, call, capsys, tmp_path):
    (tmp_path / "groups.csv").write_text("old")
    layer = str(depth_of(net) + 1) if layer == "beyond" else layer
    with pytest.raises(SystemExit) as stop:
        call("--ckpt", best, "--layer", layer, "--out", tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and layer in line
    assert [path.name for path in tmp_path.iterdir()] == ["groups.csv"]  # nothing is touched


def test_the_checkpoint_is_asked_for(call):
    with pytest.raises(SystemExit) as stop:
        call()
    assert stop.value.code == 2


def test_an_error_of_the_script_is_one_line_and_status_1(tmp_path):
    script = Path(analyze.__file__).resolve()
    command = [sys.executable, script, "--ckpt", "none.pt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and done.stdout == "" and "none.pt" in line
