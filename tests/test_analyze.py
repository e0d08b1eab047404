"""The analysis against naive loops, closed forms and made-up networks, and what it says of odd inputs."""
import itertools
import math
import shutil
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torchvision.utils import save_image

import analyze
import data
import train
from conftest import write_course_folder
from model import CNN
from synthetic import write_synthetic
from utils import UserError, load_checkpoint, read_csv

SEED, MATCH_PROB = 5, 0.9
CLASSES = tuple(f"class{i}" for i in range(10))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Enough images that all ten digits are drawn for the validation images."""
    write_synthetic(folder := tmp_path_factory.mktemp("data"), train=600, test=60)
    return folder


@pytest.fixture(scope="module")
def splits(data_dir):
    return data.load_splits(data_dir, MATCH_PROB)


@pytest.fixture(scope="module")
def best(data_dir, tmp_path_factory):
    """best.pt of a short run of train.py."""
    out = tmp_path_factory.mktemp("run")
    flags = ["--data-dir", data_dir, "--out", out, "--device", "cpu", "--epochs", 2, "--limit", 200,
             "--match-prob", MATCH_PROB, "--seed", SEED]
    train.train(train.parse_args([*map(str, flags)]))
    return out / "best.pt"


@pytest.fixture
def net(best):
    net = CNN()
    net.load_state_dict(torch.load(best, weights_only=True)["model"])
    return net.eval()


@pytest.fixture
def call(monkeypatch, capsys, data_dir):
    """Runs analyze.py with flags, for the first layer; returns the lines that it prints."""
    def call(*flags, drawn=False):
        for name in [name for name in vars(analyze) if name.startswith("draw_") and not drawn]:
            monkeypatch.setattr(analyze, name, lambda *args: None)  # figures take most of the time
        flags = ["--data-dir", data_dir, "--device", "cpu", "--layer", "first", *flags]
        monkeypatch.setattr(sys, "argv", ["analyze.py", *map(str, flags)])
        analyze.main()
        return capsys.readouterr().out.splitlines()
    return call


@pytest.fixture
def course(tmp_path):
    return write_course_folder(tmp_path / "somewhere" / "my_images")


def keyed(lines):
    """Lines "key value ..." as {key: value}."""
    return {line.split()[0]: line.split()[1] for line in lines}


def forward(net, images, **flags):
    with torch.no_grad():
        return net(data.augment(images), **flags)


def made_up_split():
    """Pictures of one value, 20 * label, with corners of one value, 20 * digit. Some pairs do not occur."""
    labels, digits = torch.arange(200) % 10, torch.randint(0, 10, (200,))
    images = torch.full((200, 3, 40, 40), 127, dtype=torch.uint8)
    images[data.PICTURE] = (20 * labels).byte().view(200, 1, 1, 1)
    images[data.DIGIT] = (20 * digits).byte().view(200, 1, 1, 1)
    return data.Split(images, labels, digits)


# ---------------------------------------------------------------- numbers
def test_class_means_are_means_of_l2_norms(net, splits, monkeypatch):
    monkeypatch.setattr(analyze, "EVAL_BATCH", 15)  # several batches, the last one shorter
    images, labels = splits.val.images, splits.val.digits  # of these some are more frequent than others
    logits, norms = analyze.map_norms(net, images)
    means = analyze.class_means(norms, labels)
    expected, maps = forward(net, images, return_maps=True)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    assert [layer.shape for layer in means] == [(m.shape[1], 10) for m in maps]
    for layer, i, c in itertools.product((0, 1, -1), (0, -1), range(10)):
        of_class = [math.sqrt(sum(v * v for v in image[i].flatten().tolist()))
                    for image, label in zip(maps[layer], labels) if label == c]
        assert means[layer][i, c] == pytest.approx(sum(of_class) / len(of_class), rel=1e-3, abs=1e-6)
    with pytest.raises(UserError, match="class or digit 4"):  # no image is left of it
        analyze.class_means(norms, labels.where(labels != 4, 5))


def test_selectivity_closed_forms():
    norms = [[1] * 10, [5] + [0] * 9, [3] + [1] * 9, [0] * 10, [0, 0, 8, 1, 1, 1, 1, 1, 2, 2]]
    np.testing.assert_allclose(analyze.selectivity(np.array(norms, float)), [0, 1, 0.5, 0, (8 - 1) / (8 + 1)])


def test_the_printed_selectivity_closed_forms():
    norms, untrained = np.ones((7, 10)), np.ones((7, 10))
    norms[range(7), range(7)] = [3, 1, 9, 5 / 3, 2, 1.5, 4]  # indexes 1/2, 0, 4/5, 1/4, 1/3, 1/5, 3/5
    untrained[:, 0] = 3
    lines = [line.split() for line in analyze.selectivity_lines(2, norms, untrained, CLASSES)]
    assert [line[1] for line in lines[:3]] == ["0.3333", "0.2250", "0.5000"]  # the last is the untrained one
    assert " ".join(lines[3][1:]) == "class0 2, class2 1, class3 1, class4 1, class5 1, class6 1"
    assert [line[2:] for line in lines[4:]] == [
        ["3", "class2", "0.8000"], ["7", "class6", "0.6000"], ["1", "class0", "0.5000"],
        ["5", "class4", "0.3333"], ["4", "class3", "0.2500"]]


def test_group_table_against_a_double_loop():
    split, correct = made_up_split(), torch.rand(200) < 0.5
    groups, counts = analyze.group_table(correct, split)
    for label, digit in itertools.product(range(10), range(10)):
        hits = [bool(c) for c, y, d in zip(correct, split.labels, split.digits) if (y, d) == (label, digit)]
        assert counts[label, digit] == len(hits)
        assert groups[label, digit] == 100 * sum(hits) / len(hits) if hits else np.isnan(groups[label, digit])


@pytest.mark.parametrize("cheats", [True, False])
def test_the_counterfactual_tells_a_cheat_from_an_honest_network(cheats, monkeypatch):
    """The one predicts the digit in the corner, the other the label of the picture, which stays the same."""
    split = made_up_split()

    def predict(model, images):
        assert (images[data.PICTURE] == split.images[data.PICTURE]).all()
        seen = images[data.DIGIT if cheats else data.PICTURE].float().mean((1, 2, 3)) / 20
        return torch.nn.functional.one_hot(seen.round().long(), 10)

    monkeypatch.setattr(analyze, "predict", predict)
    rows, before = analyze.counterfactual(None, split), split.digits if cheats else split.labels
    for digit in range(11):
        assert (rows[digit] == (digit % 10 if cheats else split.labels)).all()  # a black corner reads as 0

    groups, counts = analyze.group_table(before == split.labels, split)
    scores = analyze.score(torch.nn.functional.one_hot(before, 10).float(), split)
    printed = keyed(analyze.shortcut_lines(split, before, scores, groups, counts, rows, CLASSES))
    honest = 0 if cheats else 100
    assert {key: float(value) for key, value in printed.items()} == {
        "val_acc_agree": 100, "val_acc_conflict": honest, "val_follows_digit": 100 - honest,
        "worst_group_acc": honest, "acc_digit_of_label": 100, "acc_other_digit": honest,
        "acc_no_digit": 10 if cheats else 100, "another_digit_changes_prediction": 100 - honest}


# ---------------------------------------------------------------- output
def test_what_is_printed_and_what_is_written_agree(best, net, splits, call, tmp_path):
    printed, val, test = call("--ckpt", best, "--out", tmp_path), splits.val, splits.test
    written = (tmp_path / "analysis.txt").read_text(encoding="utf-8").splitlines()
    assert len(written) > 10 and printed[1:len(written) + 1] == written  # the first line is of the loading
    values = {key: float(value) for key, value in keyed(written).items() if value[0].isdigit()}
    hits, test_hits = (forward(net, part.images).argmax(1) == part.labels for part in (val, test))
    assert values["val_acc"] == pytest.approx(100 * hits.double().mean().item(), abs=0.01)
    assert values["test_acc"] == pytest.approx(100 * test_hits.double().mean().item(), abs=0.01)

    norms = analyze.map_norms(net, val.images)[1]
    by_class, by_digit = (analyze.class_means(norms, groups)[0] for groups in (val.labels, val.digits))
    index, digit_index = analyze.selectivity(by_class), analyze.selectivity(by_digit)
    table = read_csv(tmp_path / "experts_layer1.csv")
    columns = {name: [row[name] for row in table] for name in table[0]}
    assert columns["filter"] == [*range(1, len(by_class) + 1)]
    assert columns["best_class"] == [splits.classes[c] for c in by_class.argmax(1)]
    assert columns["best_digit"] == by_digit.argmax(1).tolist()
    np.testing.assert_allclose([columns[name] for name in splits.classes], by_class.T, rtol=1e-4)
    np.testing.assert_allclose(columns["class_selectivity_index"], index, atol=1e-4)
    np.testing.assert_allclose(columns["digit_selectivity_index"], digit_index, atol=1e-4)
    assert values["layer1_selectivity_median"] == pytest.approx(np.median(index), abs=1e-4)
    assert values["layer1_filters_more_selective_for_digit"] == sum(digit_index > index)

    groups, counts = analyze.group_table(hits, val)
    table = read_csv(tmp_path / "groups.csv")
    assert [(row["label"], row["digit"], row["images"]) for row in table] == [
        (splits.classes[label], digit, count) for (label, digit), count in np.ndenumerate(counts)]
    np.testing.assert_allclose([row["acc"] for row in table], groups.flatten(), rtol=1e-4)
    assert values["worst_group_acc"] == pytest.approx(np.nanmin(groups), abs=0.01)


def test_a_checkpoint_of_train_py_brings_its_data_and_its_seed(best, splits, call):
    """So val_acc is the one that it stores, and the control is the network before its training."""
    values, stored = keyed(call("--ckpt", best)), torch.load(best, weights_only=True)
    assert float(values["val_acc"]) == pytest.approx(stored["val_acc"], abs=0.01)
    torch.manual_seed(SEED)
    norms = analyze.class_means(analyze.map_norms(CNN(), splits.val.images)[1], splits.val.labels)[0]
    assert values["layer1_selectivity_median_untrained"] == f"{np.median(analyze.selectivity(norms)):.4f}"


def test_one_map_more_is_the_last_layer(best, call, monkeypatch, tmp_path):
    class Deeper(CNN):
        def forward(self, x, return_maps=False):
            logits, maps = super().forward(x, return_maps=True)
            return (logits, [*maps, maps[0][:, :3]]) if return_maps else logits

    monkeypatch.setattr(analyze, "CNN", Deeper)
    last = len(Deeper()(torch.zeros(1, 3, 40, 40), return_maps=True)[1])
    call("--ckpt", best, "--layer", "last", "--out", tmp_path)
    assert len(read_csv(tmp_path / f"experts_layer{last}.csv")) == 3


def test_predictions_are_written_in_natural_order(best, net, call, tmp_path):
    images = torch.rand(12, 3, 40, 40) * torch.linspace(0.1, 1, 12).view(12, 1, 1, 1)
    (folder := tmp_path / "unlabeled").mkdir()
    for i, image in enumerate(images):
        save_image(image, folder / f"²{i}.png")  # isdigit() says yes to the first, int() no
    call("--ckpt", best, "--predict", folder, "--out", tmp_path)
    expected = forward(net, (images * 255 + 0.5).to(torch.uint8)).argmax(1).tolist()
    written = (tmp_path / "predictions.txt").read_text(encoding="utf-8").splitlines()
    assert written == [f"²{i}.png,{c}" for i, c in enumerate(expected)]


# ---------------------------------------------------------------- figures
def test_kernels_become_images_stretched_to_black_and_white(tmp_path, shown):
    weight = torch.randn(5, 3, 4, 4)  # not the network's own: model.py is there to be edited
    weight[3, 1] = 0.7  # the same everywhere: black
    analyze.draw_filters(weight, "synthetic data", tmp_path)
    low, high = weight.amin((2, 3), True), weight.amax((2, 3), True)
    stretched = ((weight - low) / (high - low).clamp(min=1e-9)).numpy()
    sheet = [axis.images[0].get_array() for axis in shown["filters.png"].axes if axis.images]
    assert len(sheet) == 15
    for i, channel in itertools.product(range(5), range(3)):
        pixels = plt.imread(tmp_path / "filters" / f"filter{i + 1:02}_channel{channel + 1}.png")[:, :, 0]
        np.testing.assert_allclose(pixels, stretched[i, channel], atol=0.01)
        assert any(np.allclose(kernel, stretched[i, channel]) for kernel in sheet)


def test_charts_are_the_class_means_in_the_order_of_selectivity(tmp_path, shown):
    """A chart for each filter, a sheet of them, and of two layers the most uniform and the most selective."""
    norms = np.ones((5, 10))
    norms[range(5), range(5)] = [2, 5, 3, 4, 6]
    analyze.draw_layer(1, norms, CLASSES, "made-up data", tmp_path)
    analyze.draw_summary(norms, norms[:, ::-1], CLASSES, "made-up data", tmp_path)
    heights = {name: [[bar.get_height() for bar in axis.patches] for axis in figure.axes if axis.patches]
               for name, figure in shown.items()}
    charts = (norms / norms.max(1, keepdims=True)).tolist()
    assert [heights[f"filter{i + 1:02}.png"] for i in range(5)] == [[chart] for chart in charts]
    assert heights["experts_layer1.png"] == [charts[i] for i in (4, 1, 3, 2, 0)]
    uniform, selective = [charts[i] for i in (0, 2, 3)], [charts[i][::-1] for i in (4, 1, 3)]
    assert heights["experts.png"] == uniform + selective


def test_the_mistakes_are_the_surest_ones(tmp_path, shown):
    """Labels 0; each second image is got wrong, as class 1, the surer the later. Pixels are its number."""
    n = 90
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).repeat(1, 3, 40, 40)
    split, logits = data.Split(images, torch.zeros(n).long(), torch.arange(n) % 3), torch.zeros(n, 10)
    logits[range(n), torch.arange(n) % 2] = 3 + torch.arange(n) / 20
    analyze.draw_mistakes(split, logits, CLASSES, "made-up data", tmp_path)
    axes = [axis for axis in shown["mistakes.png"].axes if axis.images]
    numbers = [int(axis.images[0].get_array()[0, 0, 0]) for axis in axes]
    assert len(numbers) >= 10 and numbers == list(range(n - 1, 0, -2))[:len(numbers)]
    colors = {(axis.title.get_color(), i % 3 == 1) for axis, i in zip(axes, numbers)}
    assert len(colors) == len(dict(colors)) == 2  # those of their digit's class stand out


def test_the_shortcuts_picture_against_double_loops(tmp_path, shown):
    split, rows, predictions = made_up_split(), torch.randint(0, 10, (11, 200)), torch.randint(0, 10, (200,))
    groups = np.arange(100.0).reshape(10, 10)
    analyze.draw_shortcut(split, predictions, groups, rows, CLASSES, "made-up data", tmp_path)
    labels, rows = split.labels.tolist(), rows.tolist()
    pairs = list(zip(labels, predictions.tolist()))
    confusion = [[100 * pairs.count((y, c)) / labels.count(y) for c in range(10)] for y in range(10)]
    placed = [[100 * row.count(c) / 200 for c in range(10)] for row in rows]
    accs = [[100 * list(zip(labels, row)).count((y, y)) / labels.count(y) for row in rows] for y in range(10)]
    exchanged = [[acc[y], (sum(acc[:10]) - acc[y]) / 9, acc[10]] for y, acc in enumerate(accs)]
    tables = [axis.images[0].get_array() for axis in shown["shortcut.png"].axes]
    for table, expected in zip(tables, (confusion, groups, placed, exchanged), strict=True):
        np.testing.assert_allclose(table, expected)


# ---------------------------------------------------------------- other data, checkpoints and flags
def test_notes_tell_of_other_images_and_another_accuracy(best, call, course, tmp_path):
    """Of train.py's checkpoints only: of other code's, entries of the same names may be anything."""
    stored = torch.load(best, weights_only=True)
    write_synthetic(other := tmp_path / "other", train=600, test=60, seed=1)
    torch.save({**stored, "val_acc": 123.0}, edited := tmp_path / "edited.pt")
    torch.save({**stored, "val_acc": "good", "args": {"seed": "x"}}, foreign := tmp_path / "foreign.pt")
    for said, *flags in [([], best), (["other images"], best, "--data-dir", other),
                         (["other images"], best, "--data-dir", course),
                         (["123.00"], edited), ([], foreign)]:
        printed = call("--out", tmp_path, "--ckpt", *flags)
        notes = [line for line in printed if line.startswith("note")]
        assert len(notes) == len(said) and all(words in note for words, note in zip(said, notes))


def test_other_images_than_the_trainings_need_a_folder_of_their_own(best, call, course, capsys, tmp_path):
    """So that a run's own analysis is not lost."""
    (run := tmp_path / "run").mkdir()
    shutil.copy(best, run)
    (run / "analysis.txt").write_text("old")
    with pytest.raises(SystemExit) as stop:
        call("--ckpt", run / "best.pt", "--data-dir", course)
    assert stop.value.code == 2 and "--out" in capsys.readouterr().err
    assert {path.name: path.read_text() for path in run.glob("*.txt")} == {"analysis.txt": "old"}


def test_of_a_course_folder_nothing_tells_of_digits_and_old_files_go(course, call, shown, tmp_path):
    """All figures name the folder, but not where it lies."""
    (out := tmp_path / "out").mkdir()
    torch.save(CNN().state_dict(), out / "net.pt")
    for name in ("shortcut.png", "groups.csv", "experts_layer99.csv", "notes.txt"):
        (out / name).write_text("old")
    call("--ckpt", out / "net.pt", "--data-dir", course, drawn=True)
    left = {"net.pt", "notes.txt", "experts_layer99.csv", "analysis.txt", "experts_layer1.csv", "filters"}
    assert {path.name for path in out.iterdir()} == left  # and the figures, which are in `shown`
    words = [[text.get_text() for text in figure.findobj(plt.Text)] for figure in shown.values()]
    for texts in [*words, (out / "analysis.txt").read_text(encoding="utf-8").splitlines()]:
        assert any(course.name in text for text in texts)
        assert not any("digit" in text or str(course.parent) in text for text in texts)


def test_checkpoints_of_other_code_are_read(tmp_path):
    """Bare, and with a dict around them."""
    state = CNN().state_dict()
    for key in (None, "state_dict", "model"):
        torch.save({key: state, "epoch": 3} if key else state, tmp_path / "net.pt")
        read = load_checkpoint(tmp_path / "net.pt")["model"]
        torch.testing.assert_close(dict(read), dict(state), rtol=0, atol=0)


def test_a_bare_name_is_found_where_train_py_leaves_it(best, call, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (run := tmp_path / "results" / "run").mkdir(parents=True)
    for folder, epoch in ((run, 41), (tmp_path, 42)):  # the current folder comes first
        torch.save({**torch.load(best, weights_only=True), "epoch": epoch}, folder / "best.pt")
        assert keyed(call("--ckpt", "best.pt"))["epoch"] == str(epoch)
        assert (folder / "analysis.txt").exists()


@pytest.mark.parametrize("layer", ["99", "0", "middle"])
def test_a_layer_that_is_not_there_exits_with_2(layer, best, call, capsys, tmp_path):
    (tmp_path / "groups.csv").write_text("old")
    with pytest.raises(SystemExit) as stop:
        call("--ckpt", best, "--layer", layer, "--out", tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and layer in line
    assert [path.name for path in tmp_path.iterdir()] == ["groups.csv"]  # nothing is touched


def test_an_error_of_the_script_is_one_line_and_status_1(tmp_path):
    command = [sys.executable, analyze.__file__, "--ckpt", "none.pt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and done.stdout == "" and "none.pt" in line
