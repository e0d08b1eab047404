"""The analysis against naive loops and closed forms, and the files it writes."""
import csv
import importlib
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.datasets.folder import default_loader
from torchvision.utils import save_image

import analyze
import data
from model import CNN
from utils import UserError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A bare state dict, as the course's network would be saved, with running statistics of its own."""
    torch.manual_seed(1)
    net = CNN().train()
    net(torch.randn(32, 3, 40, 40))
    path = tmp_path_factory.mktemp("ckpt") / "net.pt"
    torch.save(net.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Large enough that each class and each digit is in the validation split."""
    folder = tmp_path_factory.mktemp("data")
    data.write_synthetic(folder, train=1000, test=60)
    return folder


def load(checkpoint):
    net = CNN()
    net.load_state_dict(torch.load(checkpoint, weights_only=True))
    return net.eval()


def call(monkeypatch, *flags, script=analyze):
    monkeypatch.setattr(sys, "argv", ["analyze.py", *map(str, flags)])
    script.main()


def test_class_means_are_means_of_l2_norms(checkpoint, data_dir):
    net, val = load(checkpoint), data.load_splits(data_dir).val
    norms = analyze.class_means(analyze.map_norms(net, val.images)[1], val.labels)
    assert [n.shape for n in norms] == [(16, 10), (32, 10), (48, 10), (64, 10), (80, 10)]
    with torch.no_grad():
        maps = net(data.apply(analyze.NO_AUGMENT, val.images), return_maps=True)[1]
    for layer in (1, 3, 5):
        for i in (0, 7):
            for c in range(10):
                of_class = [sum(float(v) ** 2 for v in maps[layer - 1][k, i].flatten()) ** 0.5
                            for k in range(len(val.labels)) if val.labels[k] == c]
                assert norms[layer - 1][i, c] == pytest.approx(sum(of_class) / len(of_class), rel=1e-4)


def test_a_class_without_images_is_named(checkpoint, data_dir):
    val = data.load_splits(data_dir).val
    keep = val.labels != 4
    with pytest.raises(UserError, match="class or digit 4"):
        analyze.class_means(analyze.map_norms(load(checkpoint), val.images[keep])[1], val.labels[keep])


def test_selectivity_closed_forms():
    norms = np.array([[1.0] * 10, [5.0] + [0.0] * 9, [3.0] + [1.0] * 9, [0.0] * 10, [0, 0, 8, 1, 1, 1, 1, 1, 2, 2]])
    np.testing.assert_allclose(analyze.selectivity(norms), [0, 1, 0.5, 0, (8 - 1) / (8 + 1)])


def test_the_printed_selectivity_closed_forms():
    tops = np.array([3.0, 1, 9, 5 / 3, 2, 1.5, 4])  # (top - 1) / (top + 1): 1/2, 0, 4/5, 1/4, 1/3, 1/5, 3/5
    norms, untrained = np.ones((7, 10)), np.ones((7, 10))
    norms[range(7), range(7)], untrained[:, 0] = tops, 3
    assert analyze.selectivity_lines(5, norms, untrained, data.CLASSES) == [
        "layer5_selectivity_median 0.3333 (7 filters)", "layer5_selectivity_quartiles 0.2250 0.5500",
        "layer5_selectivity_median_untrained 0.5000", "layer5_expert filter 3 bird 0.8000", "layer5_expert filter 7 frog 0.6000",
        "layer5_expert filter 1 airplane 0.5000", "layer5_expert filter 5 deer 0.3333", "layer5_expert filter 4 cat 0.2500"]


@pytest.mark.parametrize("width, flags", [(40, {"flip": 1}), (24, {"flip": 0, "flip_picture": 1})])
def test_the_mirror_accuracy_against_an_image_at_a_time(checkpoint, data_dir, width, flags):
    net, val = load(checkpoint), data.load_splits(data_dir).val
    x = data.Normalize()(val.images / 255)
    with torch.no_grad():
        net.fc.bias -= net(x).mean(0)  # else it sees one class everywhere
        net.fc.weight *= 30            # and is so unsure that probabilities average as logits do
        net.fc.bias *= 30
        mirrored = x.clone()
        mirrored[:, :, :width, :width] = x[:, :, :width, :width].flip(3)
        both = [net(one[None]).softmax(1) + net(other[None]).softmax(1) for one, other in zip(x, mirrored)]
        logits, others = net(x), net(mirrored)
    hits = sum(int(p.argmax()) == int(label) for p, label in zip(both, val.labels))
    assert 0 < hits < len(both)
    assert analyze.mirror_acc(net, val, logits, data.augmentation(**flags)) == pytest.approx(100 * hits / len(both))
    assert hits != int((logits.argmax(1) == val.labels).sum())  # else this test could not tell it from the plain accuracy
    val = val._replace(labels=torch.cat(both).argmax(1))
    assert analyze.mirror_acc(net, val, logits, data.augmentation(**flags)) == 100
    for other in (logits, others, logits + others):  # else this test could not tell it from these
        assert (other.argmax(1) != val.labels).any()


def test_statistics_measured_again_against_a_hand_written_pass_and_a_closed_form(checkpoint, data_dir):
    net, images = load(checkpoint), data.load_splits(data_dir).train.images[:200]
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    plain, dropped = analyze.with_statistics(net, images), analyze.with_statistics(net, images, 5, 0.2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    with torch.no_grad():
        outputs, noise = [], []
        for part in (images[:100], images[100:]):  # EVAL_BATCH
            z1 = net.conv1(data.Normalize()(part / 255))
            map1 = F.relu(F.batch_norm(z1, None, None, net.bn1.weight, net.bn1.bias, training=True))
            outputs.append((z1, net.conv2(map1)))
            noise.append(F.conv2d(map1 ** 2, net.conv2.weight ** 2, padding=1).mean((0, 2, 3)) * 0.2 / 0.8)
    for z, bn in ((0, plain.bn1), (1, plain.bn2)):
        torch.testing.assert_close(bn.running_mean, sum(o[z].mean((0, 2, 3)) for o in outputs) / 2, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(bn.running_var, sum(o[z].var((0, 2, 3)) for o in outputs) / 2, rtol=2e-3, atol=0)
    torch.testing.assert_close(dropped.bn1.running_var, plain.bn1.running_var)  # no dropout before it
    # each input is 0 or 1/0.8 of itself, on its own, so the variance grows by the sum of w^2 E[x^2] 0.2/0.8
    torch.testing.assert_close(dropped.bn2.running_var, plain.bn2.running_var + sum(noise) / 2, rtol=0.02, atol=0)
    assert (sum(noise) / 2 > 0.05 * plain.bn2.running_var).all()  # else this test could not see it


def test_the_accuracies_with_statistics_measured_again(checkpoint, data_dir):
    net, splits = load(checkpoint), data.load_splits(data_dir)
    net.bn2.running_mean += 1  # far from what the images give
    with torch.no_grad():
        net.fc.bias -= net(data.Normalize()(splits.val.images / 255)).mean(0)  # else it sees one class everywhere
    lines = analyze.statistics_lines(net, splits.train.images, splits.val, 5, 0.4)

    def acc(net):
        with torch.no_grad():
            logits = net.eval()(data.Normalize()(splits.val.images / 255))
        return f"{100 * (logits.argmax(1) == splits.val.labels).double().mean():.2f}"
    found = [acc(analyze.with_statistics(net, splits.train.images, *dropout)) for dropout in ((5, 0.4), ())]
    assert lines == [f"val_acc_statistics_{word}_dropout {value} (batch norm's, measured again on 900 training images)"
                     for word, value in zip(("with", "without"), found)]
    assert len({*found, acc(net)}) == 3  # else this test could not tell them apart


def test_it_writes_what_it_says(checkpoint, data_dir, tmp_path, monkeypatch, capsys):
    call(monkeypatch, "--ckpt", checkpoint, "--layer", "first", "2", "--out", tmp_path, "--data-dir", data_dir)
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")}
    expected = {"analysis.txt", "filters.png", "filters_rgb.png", "experts.png", "experts_layer1.png", "experts_layer1.csv",
                "experts_layer2.png", "experts_layer2.csv", "mistakes.png", "shortcut.png", "digit_experts.png", "groups.csv",
                "counterfactual.csv"}
    expected |= {f"filters/filter{i:02}_channel{c}.png" for i in range(1, 17) for c in (1, 2, 3)}
    expected |= {f"experts_layer1/filter{i:02}.png" for i in range(1, 17)}
    expected |= {f"experts_layer2/filter{i:02}.png" for i in range(1, 33)}
    assert names == expected

    lines = capsys.readouterr().out.splitlines()
    assert (tmp_path / "analysis.txt").read_text().splitlines() == lines[:-1]  # all but "figures DIR"
    printed = dict(line.split(" ", 1) for line in lines)
    assert not any("statistics" in key for key in printed)  # a bare state dict: nothing is known of its dropout
    net, splits = load(checkpoint), data.load_splits(data_dir)
    correct = [net(data.apply(analyze.NO_AUGMENT, splits.val.images)).argmax(1) == splits.val.labels]
    assert printed["val_acc"] == f"{100 * correct[0].double().mean():.2f} (100 images)"
    assert printed["test_acc"].endswith("(60 images)")
    image_norms = analyze.map_norms(net, splits.val.images)[1]
    norms, digit_norms = (analyze.class_means(image_norms, groups) for groups in (splits.val.labels, splits.val.digits))

    def selectivity(means):
        return [(max(r) - np.mean(sorted(r)[:9])) / (max(r) + np.mean(sorted(r)[:9])) for r in means]
    index = sorted(selectivity(norms[0]))
    assert printed["layer1_selectivity_median"] == f"{(index[7] + index[8]) / 2:.4f} (16 filters)"

    torch.manual_seed(0)  # the untrained control: a bare state dict has no seed, so 0
    before = analyze.selectivity(analyze.class_means(analyze.map_norms(CNN(), splits.val.images)[1], splits.val.labels)[0])
    assert printed["layer1_selectivity_median_untrained"] == f"{np.median(before):.4f}"

    with open(tmp_path / "experts_layer1.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 16 and list(table[0]) == ["filter", *splits.classes, "class_selectivity_index", "best_class",
                                                  "untrained_selectivity_index", "digit_selectivity_index", "best_digit"]
    for row, means, b in zip(table, norms[0], before):
        np.testing.assert_allclose([float(row[c]) for c in splits.classes], means, rtol=1e-5)
        assert row["best_class"] == splits.classes[int(means.argmax())]
        assert float(row["untrained_selectivity_index"]) == pytest.approx(b, rel=1e-4)

    for row, means, by_digit in zip(table, digit_norms[0], selectivity(digit_norms[0])):
        assert float(row["digit_selectivity_index"]) == pytest.approx(by_digit, rel=1e-4)
        assert int(row["best_digit"]) == means.argmax()
    more = sum(digit > label for label, digit in zip(selectivity(norms[4]), selectivity(digit_norms[4])))
    assert printed["layer5_filters_more_selective_for_digit"] == f"{more} of 80" and more != 40

    kernel = net.conv1.weight[4, 2].detach()  # stretched to [0, 255]
    expected = (255 * (kernel - kernel.min()) / (kernel.max() - kernel.min())).round()
    pixels = np.array(default_loader(str(tmp_path / "filters" / "filter05_channel3.png")))
    assert pixels.shape == (7, 7, 3) and pixels.min() == 0 and pixels.max() == 255
    np.testing.assert_allclose(pixels[:, :, 0], expected, atol=1)


def test_a_checkpoint_of_train_py_brings_its_splits_its_seed_and_its_mirror(checkpoint, data_dir, tmp_path, monkeypatch, capsys):
    net = load(checkpoint)
    splits = {seed: data.load_splits(data_dir, seed=seed) for seed in (0, 3)}
    with torch.no_grad():
        net.fc.bias -= net(data.apply(analyze.NO_AUGMENT, splits[3].val.images)).mean(0)  # else it sees one class everywhere
    trained = {"seed": 5, "data_seed": 3, "flip_picture": 0.5, "dropout_last": 5, "dropout_p": 0.4}
    torch.save({"model": net.state_dict(), "args": trained, "epoch": 7}, tmp_path / "best.pt")
    monkeypatch.setattr(analyze, "TRAIN_EVAL", 200)
    for name in ("filters", "layer", "summary", "mistakes", "shortcut", "digit_experts"):
        monkeypatch.setattr(analyze, f"draw_{name}", lambda *args: None)

    def printed(*flags):
        call(monkeypatch, "--ckpt", tmp_path / "best.pt", "--data-dir", data_dir, *flags)
        return dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines())

    def acc(val, transforms=None):
        with torch.no_grad():
            logits = net(data.apply(analyze.NO_AUGMENT, val.images)).softmax(1)
            if transforms:
                logits = logits + net(data.apply(transforms, val.images)).softmax(1)
        return f"{100 * (logits.argmax(1) == val.labels).double().mean():.2f}"

    val, found = splits[3].val, printed()
    assert found["epoch"] == "7" and found["val_acc"].split()[0] == acc(val) != acc(splits[0].val)
    assert found["val_acc_mirror"].split()[0] == acc(val, data.augmentation(flip=0, flip_picture=1)) != acc(
        val, data.augmentation(flip=1))
    lines = analyze.statistics_lines(net, splits[3].train.images[:200], val, 5, 0.4)
    assert [f"{key} {found[key]}" for key in found if "statistics" in key] == lines
    torch.manual_seed(5)
    before = analyze.selectivity(analyze.class_means(analyze.map_norms(CNN(), val.images)[1], val.labels)[0])
    assert found["layer1_selectivity_median_untrained"] == f"{np.median(before):.4f}"
    assert printed("--data-seed", "0")["val_acc"].split()[0] == acc(splits[0].val)


def test_figure_8_shows_the_most_uniform_of_the_first_and_the_most_selective_of_the_last(tmp_path, shown):
    first, last = np.ones((5, 10)), np.ones((5, 10))
    first[range(5), range(5)], last[range(5), range(5)] = [2, 5, 3, 4, 6], [2, 5, 3, 4, 6]
    analyze.draw_summary(first, last, data.CLASSES, "synthetic data", tmp_path)
    axes = shown["experts.png"].axes
    assert [axis.get_title() for axis in axes] == [
        "first layer, filter 1: airplane, index 0.33", "first layer, filter 3: bird, index 0.50",
        "first layer, filter 4: cat, index 0.60", "last layer, filter 5: deer, index 0.71",
        "last layer, filter 2: automobile, index 0.67", "last layer, filter 4: cat, index 0.60"]
    for axis, norms in zip(axes, (first[0], first[2], first[3], last[4], last[1], last[3])):
        np.testing.assert_allclose([bar.get_height() for bar in axis.patches], norms / norms.max())


def test_the_mistakes_are_the_surest_ones(tmp_path, shown):
    """Labels 0; every second image is got wrong, as class 1, the surer the later; one in three has the digit 1."""
    n = 90
    split = data.Split(torch.zeros(n, 3, 40, 40, dtype=torch.uint8), torch.zeros(n, dtype=torch.long), torch.arange(n) % 3)
    logits = torch.zeros(n, 10)
    logits[range(n), torch.arange(n) % 2] = 3 + torch.arange(n) / 20
    analyze.draw_mistakes(split, logits, data.CLASSES, "synthetic data", tmp_path)
    sure = logits.softmax(1).max(1).values
    expected = [(f"airplane, digit {i % 3}\n→ automobile {sure[i]:.3f}", "C3" if i % 3 == 1 else "black")
                for i in range(n - 1, n - 49, -2)]
    assert [(axis.get_title(), axis.title.get_color()) for axis in shown["mistakes.png"].axes] == expected


def test_the_shortcuts_picture_against_double_loops(tmp_path, shown):
    split = made_up_split()
    rows, labels = torch.randint(0, 10, (11, 200)), split.labels.tolist()
    rows[:, :10], predictions, groups = torch.arange(10), torch.randint(0, 10, (200,)), np.arange(100.0).reshape(10, 10)
    analyze.draw_shortcut(split, predictions, groups, rows, data.CLASSES, "synthetic data", tmp_path)
    confusion, accuracy, exchanged, bars = shown["shortcut.png"].axes
    np.testing.assert_array_equal(accuracy.images[0].get_array(), groups)
    tables = confusion.images[0].get_array(), exchanged.images[0].get_array()
    assert [table.shape for table in tables] == [(10, 10), (11, 10)]
    for c in range(10):
        for label in range(10):
            of_label = [int(p) for p, y in zip(predictions, labels) if y == label]
            assert tables[0][label, c] == pytest.approx(100 * of_label.count(c) / len(of_label))
        for digit in range(11):
            assert tables[1][digit, c] == pytest.approx(100 * rows[digit].tolist().count(c) / 200)
    assert confusion.texts[3].get_text() == f"{tables[0][0, 3]:.0f}"
    for label in range(10):
        right = [[int(rows[digit, k]) == label for k in range(200) if labels[k] == label] for digit in range(11)]
        for bar, hits in zip((container[label] for container in bars.containers),
                             (right[label], sum(right[:label] + right[label + 1:10], []), right[10])):
            assert bar.get_width() == pytest.approx(100 * sum(hits) / len(hits))
    assert bars.yaxis_inverted() and bars.get_yticklabels()[3].get_text() == "cat 3"


def test_the_picture_of_digit_experts(tmp_path, shown):
    by_class, by_digit = [np.ones((6, 10)), np.ones((8, 10))], [np.ones((6, 10)), np.ones((8, 10))]
    by_class[0][range(6), range(6)], by_digit[0][range(6), 3] = [2, 3, 7, 5, 4, 6], [9, 8, 2, 2, 2, 2]
    by_class[1][range(8), range(8)], by_digit[1][range(8), 4] = [2, 3, 4, 9, 8, 7, 6, 5], [2, 2, 8, 2, 2, 2, 2, 2]
    analyze.draw_digit_experts(by_class, by_digit, data.CLASSES, "synthetic data", tmp_path)
    first, last, *charts = shown["digit_experts.png"].axes
    for axis, classed, digited in ((first, by_class[0], by_digit[0]), (last, by_class[1], by_digit[1])):
        expected = [((a.max() - 1) / (a.max() + 1), (b.max() - 1) / (b.max() + 1)) for a, b in zip(classed, digited)]
        np.testing.assert_allclose(axis.collections[0].get_offsets(), expected)
    named = [[text.get_text() for text in axis.get_legend().get_texts()] for axis in (first, last)]
    assert named == [["filter 3: bird", "filter 1: digit 3"], ["filter 4: cat", "filter 3: digit 4"]]
    assert first.get_title() == "first layer: 2 of 6 filters answer more to the digit"
    assert last.get_title() == "last layer: 1 of 8 filters answer more to the digit"
    for axis, norms in zip(charts, (by_class[1][3], by_digit[1][3], by_class[1][2], by_digit[1][2])):
        np.testing.assert_allclose([bar.get_height() for bar in axis.patches], norms / norms.max())


@pytest.mark.parametrize("filters", [16, 13, 3])
def test_the_sheets_show_each_filter_once(filters, tmp_path, shown):
    """model.py is there to be edited: other numbers of filters than its own, too."""
    analyze.draw_filters(torch.rand(filters, 3, 7, 7), tmp_path)
    analyze.draw_layer(1, np.random.RandomState(0).rand(filters, 10), data.CLASSES, "synthetic data", tmp_path)

    def numbers(texts, place):
        return sorted(int(text.split()[place]) for text in texts if text)

    kernels, colours, charts = (shown[f"{name}.png"].axes for name in ("filters", "filters_rgb", "experts_layer1"))
    assert numbers([axis.get_ylabel() for axis in kernels], -1) == [*range(1, filters + 1)]
    assert numbers([axis.get_title() for axis in colours], -1) == [*range(1, filters + 1)]
    assert numbers([text.get_text() for axis in charts for text in axis.texts], 0) == [*range(1, filters + 1)]
    for axes, pictures in ((kernels, 3 * filters), (colours, filters)):
        drawn = [axis for axis in axes if axis.images]
        assert len(drawn) == pictures and not any(axis.axison for axis in axes if axis not in drawn)
    for axis in charts:
        places = [bar.get_x() + bar.get_width() / 2 for bar in axis.patches]
        assert len(places) == len(set(places)) == 10 * len(axis.texts)  # ten bars a filter, none upon another
        assert all(places[10 * i] < text.get_position()[0] < places[10 * i + 9] for i, text in enumerate(axis.texts))


def test_a_layer_more_in_model_py_is_the_last(data_dir, tmp_path, monkeypatch, capsys):
    """The scripts in a folder of their own, where model.py is edited, in place of those that are imported already."""
    for script in Path(analyze.__file__).parent.glob("*.py"):
        shutil.copy(script, tmp_path)
        monkeypatch.delitem(sys.modules, script.stem, raising=False)
    source = (tmp_path / "model.py").read_text()
    for old, new in (("self.fc = nn.Linear(80, 10)", "self.conv6 = nn.Conv2d(80, 9, 3); self.fc = nn.Linear(9, 10)"),
                     ("logits = self.fc(self.drop5(map5)", "map6 = self.conv6(map5); logits = self.fc(self.drop5(map6)"),
                     ("F.relu(z4), map5]", "F.relu(z4), map5, map6]")):
        assert source.count(old) == 1
        source = source.replace(old, new)
    (tmp_path / "model.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    torch.save(importlib.import_module("model").CNN().state_dict(), tmp_path / "net.pt")
    edited = importlib.import_module("analyze")
    monkeypatch.setattr(edited, "save_figure", lambda figure, path: None)
    call(monkeypatch, "--ckpt", tmp_path / "net.pt", "--layer", "last", "--data-dir", data_dir, script=edited)
    printed = capsys.readouterr().out
    assert re.search(r"^layer6_selectivity_median .* \(9 filters\)$", printed, re.MULTILINE)
    assert re.search(r"^layer6_filters_more_selective_for_digit \d of 9$", printed, re.MULTILINE)
    assert len(list((tmp_path / "experts_layer6").iterdir())) == 9 and (tmp_path / "experts_layer6.csv").exists()


class Reader(torch.nn.Module):
    """Sees one pixel of a normalized image: of the picture (the label) or of the corner (the digit), value / 20."""

    def __init__(self, y, x):
        super().__init__()
        self.at = y, x

    def forward(self, images):
        red = (images[:, 0, self.at[0], self.at[1]] * data.STD[0] + data.MEAN[0]) * 255
        return torch.nn.functional.one_hot((red / 20).round().long().clamp(0, 9), 10).float()


def made_up_split(n=200):
    """Pictures of one value 20 * label, corners of one value 20 * digit."""
    labels, digits = torch.randint(0, 10, (2, n), generator=torch.Generator().manual_seed(3))
    labels[:10], digits[:10] = torch.arange(10), torch.arange(10).roll(1)
    images = data.compose((20 * labels).byte().view(n, 1, 1, 1).expand(n, 3, 24, 24),
                          (20 * digits).byte().view(n, 1, 1, 1).expand(n, 1, 16, 16))
    return data.Split(images, labels, digits)


@pytest.mark.parametrize("cheats", [True, False])
def test_the_counterfactual_tells_a_cheat_from_an_honest_network(cheats):
    split, model = made_up_split(), Reader(35, 35) if cheats else Reader(5, 5)
    before = analyze.predict(model, split.images, analyze.NO_AUGMENT).argmax(1)
    rows = analyze.counterfactual(model, split)
    assert rows.shape == (11, 200) and torch.equal(before, split.digits if cheats else split.labels)
    table = analyze.counterfactual_table(rows, before, split)
    for digit in range(10):
        other = split.digits != digit
        assert table[digit]["images"] == other.sum()
        assert table[digit]["changed"] == table[digit]["changed_to_digit"] == (100 if cheats else 0)
        expected = 100 * (split.labels[other] == digit).double().mean() if cheats else 100
        assert table[digit]["acc"] == pytest.approx(float(expected))
    assert table[10]["digit"] == "none" and (rows[10] == (0 if cheats else split.labels)).all()

    groups, counts = analyze.group_table(before == split.labels, split)
    printed = dict(line.split(" ", 1) for line in analyze.shortcut_lines(
        split, analyze.score(torch.nn.functional.one_hot(before, 10).float(), split), groups, counts, rows, table,
        [f"class{i}" for i in range(10)]))
    first = {name: float(text.split()[0]) for name, text in printed.items()}
    assert first == {"val_acc_agree": 100, "val_acc_conflict": 0 if cheats else 100, "val_follows_digit": 100 if cheats else 0,
                     "worst_group_acc": 0 if cheats else 100, "acc_digit_of_label": 100,
                     "acc_other_digit": 0 if cheats else 100,
                     "acc_no_digit": pytest.approx(100 * float((split.labels == 0).double().mean()) if cheats else 100, abs=0.01),
                     "another_digit_changes_prediction": 100 if cheats else 0,
                     "another_digit_changes_prediction_to_it": 100 if cheats else 0,
                     "prediction_depends_on_digit": 100 if cheats else 0}


def test_the_counterfactual_changes_the_corner_only_and_takes_real_corners():
    split = made_up_split()
    seen = []

    class Spy(Reader):
        def forward(self, images):
            seen.append(images)
            return super().forward(images)

    analyze.counterfactual(Spy(5, 5), split)
    images = torch.cat(seen).view(11, 200, 3, 40, 40)
    own = data.apply(analyze.NO_AUGMENT, split.images)
    outside = torch.ones(40, 40, dtype=torch.bool)
    outside[24:, 24:] = False
    assert (images[..., outside] == own[..., outside]).all()
    for digit in range(10):
        corners = (images[digit, :, 0, 24:, 24:] * data.STD[0] + data.MEAN[0]) * 255
        assert (corners - 20 * digit).abs().max() < 1e-3
    assert ((images[10, :, 0, 24:, 24:] * data.STD[0] + data.MEAN[0]).abs() < 1e-6).all()


def test_group_table_against_a_double_loop():
    split = made_up_split()
    correct = torch.rand(200, generator=torch.Generator().manual_seed(0)) < 0.5
    groups, counts = analyze.group_table(correct, split)
    for label in range(10):
        for digit in range(10):
            hits = [bool(c) for c, y, d in zip(correct, split.labels, split.digits) if (y, d) == (label, digit)]
            assert counts[label, digit] == len(hits)
            assert np.isnan(groups[label, digit]) if not hits else groups[label, digit] == 100 * sum(hits) / len(hits)


@pytest.mark.parametrize("name", ["img", "²"])  # isdigit() says yes to the second, int() no
def test_predictions_in_natural_order(checkpoint, tmp_path, monkeypatch, name):
    images, folder = torch.rand(12, 3, 40, 40), tmp_path / "test_unlabeled"
    folder.mkdir()
    for i, image in enumerate(images):
        save_image(image, folder / f"{name}{i}.png")
    call(monkeypatch, "--ckpt", checkpoint, "--predict", folder, "--out", tmp_path)
    pixels = (images * 255 + 0.5).to(torch.uint8)
    expected = load(checkpoint)(data.apply(analyze.NO_AUGMENT, pixels)).argmax(1).tolist()
    assert (tmp_path / "predictions.txt").read_text() == "".join(f"{name}{i}.png,{c}\n" for i, c in enumerate(expected))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no PNG"):
        call(monkeypatch, "--ckpt", checkpoint, "--predict", tmp_path / "empty", "--out", tmp_path)


@pytest.mark.parametrize("flags", [["--layer", "6"], ["--layer", "middle"], []])
def test_bad_flags_exit_with_2(monkeypatch, flags):
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, *(["--ckpt", "x.pt", *flags] if flags else []))
    assert stop.value.code == 2
