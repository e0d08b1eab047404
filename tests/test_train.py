"""The loop: what it writes, what it measures, that a stopped run goes on to the same bits, and what it refuses."""
import csv
import json
import math
import platform
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torchvision.utils import save_image

import data
import train
import utils
from model import CNN
from utils import UserError

FLAGS = ["--epochs", "4", "--warmup-epochs", "1", "--limit", "52", "--bs", "8", "--device", "cpu"]  # seven batches an epoch
WALL_CLOCK = ("seconds", "images_per_s")


def call(data_dir, out, *flags):
    train.train(train.parse_args([*FLAGS, "--data-dir", str(data_dir), "--out", str(out), *flags]))


draw_curves = train.draw_curves


@pytest.fixture(autouse=True)
def quick_curves(monkeypatch):
    """A figure takes as long as a run of this size. `whole`, below, and the scripts that the tests start do draw it."""
    monkeypatch.setattr(train, "draw_curves", lambda log, steps, title, path: path.touch())


def rows(out):
    with open(out / "log.csv", newline="") as file:
        return [{key: value for key, value in row.items() if key not in WALL_CLOCK} for row in csv.DictReader(file)]


def same(a, b):
    """Equal to the last bit, through nested dicts and lists."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key not in WALL_CLOCK)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or a != a and b != b


@pytest.fixture(scope="module")
def whole(data_dir, tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    call(data_dir, out)
    return out


def assert_same_run(out, whole):
    assert rows(out) == rows(whole)
    assert (out / "steps.csv").read_bytes() == (whole / "steps.csv").read_bytes()
    for name in ("best.pt", "last.pt"):
        assert same(*(torch.load(folder / name, weights_only=True) for folder in (out, whole)))


# ---------------------------------------------------------------- what a run writes
def test_a_run_writes_its_files(whole):
    assert sorted(path.name for path in whole.iterdir()) == ["args.json", "best.pt", "curves.png", "last.pt", "log.csv",
                                                             "steps.csv"]
    log = rows(whole)
    assert [row["epoch"] for row in log] == ["1", "2", "3", "4"]
    assert [row["step"] for row in log] == ["7", "14", "21", "28"]  # 52 images in batches of 8, the last one of 4
    assert [float(row["lr"]) for row in log][:2] == [1e-4, 1e-3]
    args = json.loads((whole / "args.json").read_text())
    assert args["bs"] == 8 and args["train_images"] == 52 and args["data"] == "synthetic data"
    best = torch.load(whole / "best.pt", weights_only=True)
    accuracies = [float(row["val_acc"]) for row in log]
    assert best["val_acc"] == pytest.approx(max(accuracies)) and best["epoch"] == accuracies.index(max(accuracies)) + 1
    assert {**args, **best["args"]} == args and {"seed", "data_seed", "dropout_last", "flip_picture"} <= best["args"].keys()


def test_of_equal_epochs_the_first_is_best(data_dir, tmp_path, monkeypatch):
    """As on the results page, which names the first row of log.csv with the best val_acc."""
    monkeypatch.setattr(train, "evaluate", lambda *args: dict.fromkeys(("loss", "acc", "acc_agree", "acc_conflict",
                                                                        "follows_digit"), 50.0))
    call(data_dir, tmp_path, "--limit", "16")
    assert torch.load(tmp_path / "best.pt", weights_only=True)["epoch"] == 1


def test_steps_csv_cuts_each_epoch_into_equal_parts(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "WINDOW", 3)
    call(data_dir, tmp_path)
    with open(tmp_path / "steps.csv", newline="") as file:
        steps = list(csv.DictReader(file))
    assert [int(row["step"]) for row in steps] == [4, 7, 11, 14, 18, 21, 25, 28]  # seven steps an epoch
    for row, four, three in zip(rows(tmp_path), steps[::2], steps[1::2]):
        assert four["epoch"] == three["epoch"] == row["epoch"]
        assert (4 * float(four["train_loss"]) + 3 * float(three["train_loss"])) / 7 == pytest.approx(
            float(row["train_loss"]), rel=1e-5)


def test_the_last_rows_are_the_last_weights(whole, data_dir):
    """val_loss, val_acc and its groups, computed here image by image from last.pt."""
    net = CNN().eval()
    net.load_state_dict(torch.load(whole / "last.pt", weights_only=True)["model"])
    val = data.load_splits(data_dir).val
    hits, losses = {"val_acc": [], "val_acc_agree": [], "val_acc_conflict": [], "val_follows_digit": []}, []
    for image, label, digit in zip(val.images, val.labels, val.digits):
        x = (image / 255 - torch.tensor(data.MEAN).view(3, 1, 1)) / torch.tensor(data.STD).view(3, 1, 1)
        logits = net(x[None])[0].detach()
        predicted = logits.argmax()
        losses.append((logits.exp().sum().log() - logits[label]).item())
        hits["val_acc"].append(predicted == label)
        hits["val_acc_agree" if digit == label else "val_acc_conflict"].append(predicted == label)
        if digit != label:
            hits["val_follows_digit"].append(predicted == digit)
    for name, values in hits.items():
        assert float(rows(whole)[-1][name]) == pytest.approx(100 * sum(values).item() / len(values), abs=1e-3)
    assert float(rows(whole)[-1]["val_loss"]) == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_the_end_tells_the_accuracies_of_best(data_dir, tmp_path, monkeypatch, capsys):
    """Of the second of four epochs here, on all of val and test."""
    accs, splits, original = iter([50.0, 60, 50, 90, 50, 70, 50, 80]), data.load_splits(data_dir), train.evaluate

    def evaluate(*args):
        return {**original(*args), **{"acc": acc for acc in [next(accs, None)] if acc}}
    monkeypatch.setattr(train, "evaluate", evaluate)
    call(data_dir, tmp_path, "--flip", "1")
    net = CNN().eval()
    net.load_state_dict(torch.load(tmp_path / "best.pt", weights_only=True)["model"])
    expected = ["best_epoch 2"]
    for name, split in (("val", splits.val), ("test", splits.test)):
        hits = net(data.Normalize()(split.images / 255)).argmax(1) == split.labels
        expected.append(f"{name}_acc {100 * hits.double().mean():.2f} ({len(split.labels)} images)")
    assert capsys.readouterr().out.splitlines()[-3:] == expected


def test_seconds_are_the_epochs_and_images_per_s_those_of_training(data_dir, tmp_path, monkeypatch):
    """On a clock that training moves by 2 s, and each of the two evaluations by half a second."""
    clock = [0.0]
    monkeypatch.setattr(train.time, "perf_counter", lambda: clock[0])
    for name, seconds in (("train_epoch", 2), ("evaluate", 0.5)):
        def slow(*args, original=getattr(train, name), seconds=seconds):
            clock[0] += seconds
            return original(*args)
        monkeypatch.setattr(train, name, slow)
    call(data_dir, tmp_path)
    with open(tmp_path / "log.csv", newline="") as file:
        assert [(row["seconds"], row["images_per_s"]) for row in csv.DictReader(file)] == [("3", "26")] * 4


def test_the_curves_are_those_of_the_logs(whole, tmp_path, monkeypatch):
    shown, log, steps = [], utils.read_csv(whole / "log.csv"), utils.read_csv(whole / "steps.csv")
    monkeypatch.setattr(train.plt, "close", shown.append)
    draw_curves(log, steps, "title", tmp_path / "curves.png")
    assert (whole / "curves.png").stat().st_size > 10_000
    drawn = [[(line.get_label().split()[0], *map(list, line.get_data())) for line in axis.lines] for axis in shown[0].axes]
    ends = [7, 14, 21, 28]
    assert drawn == [[("training", [row["step"] for row in steps], [row["train_loss"] for row in steps]),
                      ("validation", ends, [row["val_loss"] for row in log])],
                     [("training", ends, [row["train_acc"] for row in log]), ("validation", ends, [row["val_acc"] for row in log])]]


@pytest.mark.parametrize("val_loss", [0.2, 3.0])
def test_no_legend_lies_on_a_curve(tmp_path, monkeypatch, val_loss):
    """A validation loss that falls with the training loss, and one that stays high, as under a strong shortcut."""
    shown = []
    monkeypatch.setattr(train.plt, "close", shown.append)
    steps = [{"step": i, "train_loss": 0.1 + 2 / i} for i in range(1, 201)]
    log = [{"step": 10 * i, "val_loss": val_loss + 1 / i, "train_acc": 97 - 40 / i, "val_acc": 50 - 30 / i} for i in range(1, 21)]
    draw_curves(log, steps, "title", tmp_path / "curves.png")
    for axis in shown[0].axes:
        box = axis.get_legend().get_window_extent()
        assert not any(box.contains(*point) for line in axis.lines for point in axis.transData.transform(line.get_xydata()))


def test_the_progress_line_counts_from_where_a_run_resumed(monkeypatch, capsys):
    """Half of the third of four epochs, the first one of this process, has taken 10 s."""
    clock = [100.0]
    monkeypatch.setattr(train.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = train.Progress(epochs=4, images=100, first_epoch=3)
    clock[0] = 110.0
    progress.show(3, 4, 10, torch.arange(10.0))
    assert capsys.readouterr().err == "\r\033[Kepoch 3/4  step 5/10  loss 4.000  5 images/s  0:00:30 left"
    progress.show(3, 5, 10, torch.arange(10.0))  # too soon
    assert capsys.readouterr().err == ""


def test_same_seed_same_bits_and_another_seed_others(whole, data_dir, tmp_path):
    call(data_dir, tmp_path / "again")
    assert_same_run(tmp_path / "again", whole)
    call(data_dir, tmp_path / "other", "--seed", "1")
    assert rows(tmp_path / "other") != rows(whole)


@pytest.mark.parametrize("bs", [16, 700, 2000])
def test_an_epoch_takes_each_image_once_with_its_label(bs):
    """Whatever is augmented at once: the steps get batches of `bs`, only the last is smaller."""
    labels, augmented, batches = torch.arange(2100), [], []
    split = data.Split(labels.view(-1, 1, 1, 1), labels, labels)
    losses = train.train_epoch(lambda x, y: batches.append((x.flatten(), y)) or y[0].float(), split,
                               [lambda x: augmented.append(len(x)) or x], bs)
    seen = torch.cat([y for _, y in batches])
    assert all(torch.equal(x, y) for x, y in batches) and torch.equal(seen.sort()[0], labels)
    assert [len(y) for _, y in batches] == [bs] * (2100 // bs) + [2100 % bs] * (2100 % bs > 0)
    assert losses.tolist() == [y[0].item() for _, y in batches] and not torch.equal(seen, labels)
    assert sum(augmented) == 2100 and max(augmented) <= max(bs, 1024)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_one_step_is_adam_on_the_augmented_batch(data_dir, tmp_path, optimizer):
    """The first step, done again by hand: gather, augment, cross-entropy on smoothed targets, Adam's formula with the
    weight decay in the gradient, or beside it."""
    call(data_dir, tmp_path / "r", "--limit", "32", "--bs", "32", "--epochs", "1", "--schedule", "constant", "--dropout-last", "0",
         "--weight-decay", "0.1", "--optimizer", optimizer, "--label-smoothing", "0.2", "--shift", "2", "--shuffle-digits", "1",
         "--flip", "0.4", "--flip-picture", "0.6")
    torch.manual_seed(0)
    net = CNN(0).to(memory_format=torch.channels_last)
    images = data.load_splits(data_dir).train.first(32)
    torch.manual_seed(1)
    order = torch.randperm(32)
    x = data.apply(data.augmentation(0.4, 0, 0.05, 0.3, shuffle_digits=1.0, shift=2, flip_picture=0.6), images.images[order])
    targets = 0.8 * F.one_hot(images.labels[order], 10) + 0.2 / 10
    (-targets * net.train()(x).log_softmax(1)).sum(1).mean().backward()
    trained = torch.load(tmp_path / "r" / "last.pt", weights_only=True)["model"]
    assert {name for name, p in net.named_parameters() if p.grad is None} == {f"conv{n}.bias" for n in range(1, 5)}
    for name, p in net.named_parameters():
        if p.grad is None:  # see test_model.py
            assert (trained[name] == 0).all()
            continue
        gradient, kept = (p.grad + 0.1 * p.detach(), 1) if optimizer == "adam" else (p.grad, 1 - 1e-3 * 0.1)
        expected = kept * p.detach() - 1e-3 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(trained[name], expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind, expected", [(torch.optim.SGD, 0.75), (torch.optim.RMSprop, 0.0), (torch.optim.Adam, 0.9)])
def test_another_of_torchs_optimizers_is_one_entry_more(monkeypatch, kind, expected):
    """A step from 1 with the gradient 2 and a weight decay of 0.5, so 2.5: down by lr * 2.5; by that over 0.1 * 2.5, the root
    of the running mean square; by lr."""
    monkeypatch.setitem(train.OPTIMIZERS, "other", kind)
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1)
    model.weight.grad = torch.full((1, 1), 2.0)
    train.make_optimizer("other", model, 0.1, weight_decay=0.5).step()
    assert model.weight.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("shape", [(4, 7), (16, 147), (80, 576), (10, 3), (6, 6)])
def test_orthogonal_keeps_the_singular_vectors_and_evens_the_values(shape):
    matrix = torch.randn(shape)
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    values = u.T @ train.orthogonal(matrix) @ vt.T
    torch.testing.assert_close(values, values.diag().diag(), rtol=0, atol=2e-4)
    if shape != (6, 6):  # a square matrix can have values so close to 0 that five iterations don't lift them
        assert 0.6 < values.diag().min() and values.diag().max() < 1.25
    assert not train.orthogonal(torch.zeros(shape)).any()  # a filter that gets no gradient stays where it is


def test_muon_is_torchs_on_the_kernels_and_adamw_on_the_rest():
    """Three steps beside torch.optim.Muon (which rounds to bfloat16) on the flattened kernels, and AdamW."""
    net, settings = CNN(0), {"lr": 1e-2, "weight_decay": 0.5}
    flat = {name: p.detach().clone().flatten(1) if p.ndim == 4 else p.detach().clone() for name, p in net.named_parameters()}
    start = {name: p.clone() for name, p in flat.items()}
    kernels = [flat[name] for name, p in net.named_parameters() if p.ndim == 4]
    others = [flat[name] for name, p in net.named_parameters() if p.ndim != 4]
    optimizers = (torch.optim.Muon(kernels, adjust_lr_fn="match_rms_adamw", **settings),
                  torch.optim.AdamW(others, **settings))
    ours = train.Muon(net.to(memory_format=torch.channels_last).parameters(), fused=True, **settings)
    for _ in range(3):
        for name, p in net.named_parameters():
            p.grad = torch.randn_like(p)
            flat[name].grad = p.grad.reshape(flat[name].shape).clone()
        for optimizer in (ours, *optimizers):
            optimizer.step()
    for name, p in net.named_parameters():
        difference = (p.detach().reshape(flat[name].shape) - flat[name]).norm() / (flat[name] - start[name]).norm()
        assert difference < (0.02 if p.ndim == 4 else 1e-5), name


# ---------------------------------------------------------------- learning from a teacher
@pytest.mark.parametrize("width, teachers, flags", [
    (40, 1, ()), (24, 2, ("--flip", "0", "--flip-picture", "0.5", "--label-share", "0.3"))])
def test_a_taught_first_step(whole, data_dir, tmp_path, width, teachers, flags):
    """The loss of a first step, against the probabilities of one teacher or two for each augmented image and its mirror
    image, one by one; the labels play no part, or one of 30 %."""
    torch.manual_seed(7)
    torch.save(CNN().state_dict(), tmp_path / "other.pt")
    paths = [whole / "best.pt", tmp_path / "other.pt"][:teachers]
    flags = ("--teacher", *map(str, paths), *flags)
    call(data_dir, tmp_path / "r", "--limit", "16", "--bs", "16", "--epochs", "1", "--schedule", "constant", "--dropout-last", "0",
         *flags)
    args = train.parse_args(flags)
    nets = [CNN().eval() for _ in paths]
    for net, path in zip(nets, paths):
        weights = torch.load(path, weights_only=True)
        net.load_state_dict(weights.get("model", weights))
    torch.manual_seed(0)
    net = CNN(0).to(memory_format=torch.channels_last).train()
    split = data.load_splits(data_dir).train
    torch.manual_seed(1)
    order = torch.randperm(16)
    x = data.apply(data.augmentation(args.flip, 0, 0.05, 0.3, flip_picture=args.flip_picture), split.images[order])
    other = x.clone()
    other[:, :, :width, :width] = torch.from_numpy(x.numpy()[:, :, :width, width - 1::-1].copy())
    with torch.no_grad():
        targets = torch.cat([torch.stack([teacher(image[None]).softmax(1) for teacher in nets for image in pair]).mean(0)
                             for pair in zip(x, other)])
    if args.label_share:
        targets = 0.7 * targets + 0.3 * torch.eye(10)[split.labels[order]]
    expected = -(targets * net(x).log_softmax(1)).sum(1).mean().item()
    assert float(rows(tmp_path / "r")[0]["train_loss"]) == pytest.approx(expected, rel=1e-4)


def test_a_teacher_is_named_when_it_is_missing_and_a_taught_run_resumes(whole, data_dir, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="none.pt not found"):
        call(data_dir, tmp_path / "r", "--teacher", str(tmp_path / "none.pt"))
    flags = ("--teacher", str(whole / "best.pt"))
    call(data_dir, tmp_path / "whole", *flags)
    stop_in_step(2 * 7 + 4, monkeypatch, data_dir, tmp_path / "r", *flags)
    call(data_dir, tmp_path / "r", *flags, "--resume")
    assert_same_run(tmp_path / "r", tmp_path / "whole")


# ---------------------------------------------------------------- evaluation
def test_evaluation_is_in_evaluation_mode_and_changes_nothing(data_dir):
    net, val = CNN(5, 0.5).train(), data.load_splits(data_dir).val
    net(torch.randn(16, 3, 40, 40))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    metrics = train.evaluate(net, val, data.augmentation(flip=0))
    assert same(before, net.state_dict())
    net.eval()
    logits = torch.stack([net(data.apply(data.augmentation(flip=0), image[None]))[0] for image in val.images])
    assert metrics["loss"] == pytest.approx(F.cross_entropy(logits, val.labels).item(), rel=1e-4)
    assert metrics["acc"] == pytest.approx(100 * (logits.argmax(1) == val.labels).double().mean().item())


def test_train_acc_is_that_of_the_first_training_images_augmented(data_dir, tmp_path, monkeypatch):
    """Each mirrored, for certain, and nothing else; in evaluation mode, from last.pt."""
    monkeypatch.setattr(train, "TRAIN_EVAL", 40)
    call(data_dir, tmp_path, "--flip", "1", "--noise", "0", "--erase", "0", "--dropout-p", "0.5")
    net = CNN().eval()
    net.load_state_dict(torch.load(tmp_path / "last.pt", weights_only=True)["model"])
    images, labels, _ = data.load_splits(data_dir).train.first(40)

    def acc(images):
        return 100 * (net(data.Normalize()(images / 255)).argmax(1) == labels).double().mean().item()
    assert float(rows(tmp_path)[-1]["train_acc"]) == pytest.approx(acc(images.flip(3)), abs=1e-3) != acc(images)


def test_groups_are_nan_where_digits_are_unknown(data_dir):
    val = data.load_splits(data_dir).val
    unknown = val._replace(digits=torch.full_like(val.digits, -1))
    metrics = train.evaluate(CNN(), unknown, data.augmentation(flip=0))
    assert all(math.isnan(metrics[key]) for key in ("acc_agree", "acc_conflict", "follows_digit"))


# ---------------------------------------------------------------- on a GPU
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@gpu
@pytest.mark.parametrize("optimizer", train.OPTIMIZERS)
def test_gpu_the_graph_gives_the_plain_loops_losses(data_dir, optimizer):
    """Two epochs of 22 batches of 16 and one of 8, with a learning rate that changes in between."""
    torch.backends.cudnn.deterministic = True
    torch.cuda.set_stream(torch.cuda.Stream())
    split = data.load_splits(data_dir).train.to("cuda")
    losses = []
    for graphed in (False, True):
        torch.manual_seed(0)
        net = CNN().to("cuda", memory_format=torch.channels_last).train()
        adam = train.make_optimizer(optimizer, net, lr=1e-3)
        step = train.make_step(net, adam)
        for factor in (1, 0.5):
            adam.param_groups[0]["lr"].mul_(factor)
            losses.append(train.train_epoch(step if graphed else step.step, split, data.augmentation(noise=0.05, erase=0.3), 16))
        assert len(step.graphs) == graphed  # batches of 16; of 8 there are too few to record
    assert len(losses[0]) == 23 and losses[0].std() > 0.01
    torch.testing.assert_close(losses[2:], losses[:2], rtol=1e-4, atol=1e-4)


@gpu
def test_gpu_a_stopped_run_resumes(data_dir, tmp_path, monkeypatch):
    flags = ("--device", "cuda", "--limit", "200", "--bs", "16", "--optimizer", "muon", "--schedule", "onecycle", "--small-epochs", "1")
    call(data_dir, tmp_path / "whole", *flags)
    stop_in_step(2 * 13 + 4, monkeypatch, data_dir, tmp_path / "r", *flags)
    assert len(rows(tmp_path / "r")) == 2
    call(data_dir, tmp_path / "r", *flags, "--resume")
    resumed, whole = ([float(row["train_loss"]) for row in rows(tmp_path / name)] for name in ("r", "whole"))
    assert resumed == pytest.approx(whole, rel=1e-3)


# ---------------------------------------------------------------- stop and resume
def stop_in_step(n, monkeypatch, data_dir, out, *flags):
    """A run that Ctrl-C stops in its n-th step."""
    original, calls = train.Progress.show, []

    def stop(*args):
        calls.append(args)
        if len(calls) == n:
            raise KeyboardInterrupt
        return original(*args)
    with monkeypatch.context() as patch:
        patch.setattr(train.Progress, "show", stop)
        with pytest.raises(KeyboardInterrupt):
            call(data_dir, out, *flags)


@pytest.mark.parametrize("stop_in", ["training", "evaluation", "before last.pt", "before log.csv", "the last figure"])
def test_a_stopped_run_resumes_to_the_same_bits(whole, data_dir, tmp_path, monkeypatch, stop_in):
    """Stopped in its third epoch, at different points, or at the very end."""
    out, calls = tmp_path / "run", []
    target, name = {"training": (train.Progress, "show"), "evaluation": (train, "evaluate"),
                    "before last.pt": (train, "save"), "before log.csv": (train, "write_logs"),
                    "the last figure": (train, "draw_curves")}[stop_in]
    original = getattr(target, name)

    def stop(*args, **kwargs):
        calls.append(args)
        if {"training": len(calls) == 2 * 7 + 4, "evaluation": len(calls) == 2 * 2 + 2,
                "before last.pt": len(calls) > 2 and str(args[0]).endswith("last.pt") and args[1]["epoch"] == 3,
                "before log.csv": len(calls) == 3, "the last figure": True}[stop_in]:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(target, name, stop)
        with pytest.raises(KeyboardInterrupt):
            call(data_dir, out)
    assert len(rows(out)) < 4  # it does not look finished
    call(data_dir, out, "--resume")
    assert_same_run(out, whole)
    assert (out / "curves.png").exists()


def test_a_schedule_that_goes_by_batches_resumes_too(data_dir, tmp_path, monkeypatch):
    flags = ("--schedule", "onecycle", "--optimizer", "muon", "--lr", "0.005", "--shuffle-digits", "1", "--shift", "2",
             "--small-epochs", "3", "--branches")
    call(data_dir, tmp_path / "whole", *flags)
    rates = [float(row["lr"]) for row in rows(tmp_path / "whole")]
    assert rates[0] == pytest.approx(0.0005) and max(rates) == rates[1] > 0.0045  # 28 batches: the top at the seventh
    stop_in_step(2 * 7 + 4, monkeypatch, data_dir, tmp_path / "r", *flags)
    call(data_dir, tmp_path / "r", *flags, "--resume")
    assert_same_run(tmp_path / "r", tmp_path / "whole")


def test_branches_are_trained_and_best_pt_is_the_plain_network(data_dir, tmp_path, monkeypatch):
    names, make_optimizer = [], train.make_optimizer

    def spy(name, model, *rest):
        names.extend(key for key, p in model.named_parameters() if p.requires_grad)
        return make_optimizer(name, model, *rest)
    monkeypatch.setattr(train, "make_optimizer", spy)
    call(data_dir, tmp_path / "r", "--branches")
    assert sum("1x1" in name for name in names) == 4 * 3  # four kernels, four scales, four shifts
    best, net = torch.load(tmp_path / "r" / "best.pt", weights_only=True), CNN().eval()
    net.load_state_dict(best["model"])
    val = data.load_splits(data_dir).val
    hits = (net(data.apply(data.augmentation(flip=0), val.images)).argmax(1) == val.labels).sum().item()
    assert best["val_acc"] == pytest.approx(100 * hits / len(val.labels))
    assert float(rows(tmp_path / "r")[best["epoch"] - 1]["val_acc"]) == pytest.approx(best["val_acc"], rel=1e-5)
    last = tmp_path / "r" / "last.pt"  # what --resume needs is no plain network
    with pytest.raises(UserError, match="take the best.pt"):
        utils.load_weights(CNN(), utils.load_checkpoint(last), last)


def test_a_run_that_goes_on_elsewhere_says_so(data_dir, tmp_path, monkeypatch, capsys):
    said = []
    for epoch, hardware in enumerate(("A, 1 threads", "A, 2 threads", "A, 2 threads"), start=1):
        monkeypatch.setattr(train, "device_name", lambda device: hardware)
        stop_in_step(7 + 1 if epoch < 3 else 7, monkeypatch, data_dir, tmp_path / "r", "--resume")
        assert len(torch.load(tmp_path / "r" / "last.pt", weights_only=True)["log"]) == min(epoch, 2)
        said.append("does not go on to the same bits" in capsys.readouterr().err)
    assert said == [False, True, False]
    assert json.loads((tmp_path / "r" / "args.json").read_text())["hardware"] == "A, 1 threads, then A, 2 threads"


def test_the_first_epochs_see_small_images_and_evaluation_never(data_dir, tmp_path, monkeypatch):
    sizes, forward = [], CNN.forward

    def spy(model, x):
        sizes.append((model.training, x.shape[2]))
        return forward(model, x)
    monkeypatch.setattr(CNN, "forward", spy)
    call(data_dir, tmp_path / "r", "--small-epochs", "1", "--small-size", "16", "--epochs", "2")
    trained = [size for training, size in sizes if training]
    assert trained == [16] * 7 + [40] * 7  # seven batches an epoch
    assert {size for training, size in sizes if not training} == {40}


def test_kill_minus_nine_then_resume(whole, data_dir, tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen([sys.executable, train.__file__, *FLAGS, "--data-dir", data_dir, "--out", out],
                               stdout=subprocess.DEVNULL)
    while not (out / "last.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    call(data_dir, out, "--resume")
    assert_same_run(out, whole)


def test_a_finished_run_says_so_and_changes_nothing(whole, data_dir, capsys):
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in whole.iterdir()}
    for flags in ((), ("--resume",)):
        with pytest.raises(SystemExit) as stop:
            call(data_dir, whole, *flags)
        assert stop.value.code == 0 and "finished" in capsys.readouterr().out
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in whole.iterdir()}


def test_data_that_moved_are_the_same_run(whole, data_dir, tmp_path, capsys):
    (tmp_path / "moved").symlink_to(data_dir)
    with pytest.raises(SystemExit) as stop:
        call(tmp_path / "moved", whole)
    assert stop.value.code == 0 and "is finished" in capsys.readouterr().out


def test_another_runs_results_are_not_overwritten(whole, data_dir, capsys):
    for flags in (("--lr", "0.01"), ("--lr", "0.01", "--resume")):
        with pytest.raises(SystemExit) as stop:
            call(data_dir, whole, *flags)
        assert stop.value.code == 2
        assert "lr 0.001 there, 0.01 here" in capsys.readouterr().err


def test_a_run_older_than_a_flag_had_its_default(whole, data_dir, tmp_path, capsys):
    (tmp_path / "r").mkdir()
    for name in ("args.json", "log.csv"):
        (tmp_path / "r" / name).write_text((whole / name).read_text().replace('"shuffle_digits": 0.0,', ""))
    assert "shuffle_digits" not in (tmp_path / "r" / "args.json").read_text()
    with pytest.raises(SystemExit) as stop:
        call(data_dir, tmp_path / "r")
    assert stop.value.code == 0 and "is finished" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        call(data_dir, tmp_path / "r", "--shuffle-digits", "1")
    assert stop.value.code == 2 and "shuffle_digits 0.0 there, 1.0 here" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--shuffle-digits", "--shift", "--flip-picture"])
def test_what_knows_of_digits_needs_composites(tmp_path, flag):
    for split in ("train", "val"):
        for name in "abcdefghij":
            (tmp_path / "course" / split / name).mkdir(parents=True)
            save_image(torch.rand(3, 32, 32), tmp_path / "course" / split / name / "1.png")
    with pytest.raises(UserError, match="40x40"):
        call(tmp_path / "course", tmp_path / "r", flag, "1")


def test_an_unfinished_run_asks_for_resume(data_dir, tmp_path, monkeypatch, capsys):
    def stop(*args):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(train, "write_logs", stop)
        with pytest.raises(KeyboardInterrupt):
            call(data_dir, tmp_path / "r")
    with pytest.raises(SystemExit) as refused:
        call(data_dir, tmp_path / "r")
    assert refused.value.code == 2 and "--resume" in capsys.readouterr().err
    call(data_dir, tmp_path / "r", "--overwrite")
    assert len(rows(tmp_path / "r")) == 4
    with monkeypatch.context() as patch:  # an overwriting run that is stopped at once does not pass for the old one
        patch.setattr(train, "train_epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            call(data_dir, tmp_path / "r", "--overwrite", "--lr", "0.01")
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == ["args.json"]


@pytest.mark.parametrize("name, damage", [("args.json", b""), ("args.json", b"[1]"), ("log.csv", b"\xff"),
                                          ("log.csv", b"<<<<<<< HEAD\nepoch,val_acc\n1,60\n")])
def test_a_damaged_run_is_named_and_kept(whole, data_dir, tmp_path, name, damage):
    for other in ("args.json", "log.csv", "last.pt"):
        (tmp_path / other).write_bytes((whole / other).read_bytes())
    (tmp_path / name).write_bytes(damage)
    with pytest.raises(UserError, match=f"log.csv in {re.escape(str(tmp_path))} is missing or damaged"):
        call(data_dir, tmp_path, "--resume")
    assert (tmp_path / name).read_bytes() == damage


def test_a_last_pt_that_is_not_train_pys_is_named(whole, data_dir, tmp_path):
    for name in ("args.json", "last.pt"):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    state.pop("schedule")
    for saved, lacks in ((state, "schedule"), (state["model"], "best_val_acc, log, optimizer, schedule, steps")):
        torch.save(saved, tmp_path / "last.pt")
        with pytest.raises(UserError, match=f"it has no {lacks};"):
            call(data_dir, tmp_path, "--resume")


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def stop(args):
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "train", stop)
    for flag in ("--resume", "--overwrite"):
        monkeypatch.setattr(sys, "argv", ["train.py", "--lr", "0.01", flag, "--out", "my results"])
        with pytest.raises(SystemExit) as stopped:
            train.main()
        assert stopped.value.code == 130
        assert capsys.readouterr().err.endswith("Go on with: python train.py --lr 0.01 --out 'my results' --resume\n")


def test_ctrl_c_in_another_script_is_one_line(capsys):
    def main():
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as stopped:
        utils.run(main)
    assert stopped.value.code == 130 and capsys.readouterr().err == "\ninterrupted\n"


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_files(data_dir, tmp_path, monkeypatch):
    original = F.cross_entropy
    counted = []

    def cross_entropy(logits, labels, **options):
        counted.append(labels)
        loss = original(logits, labels, **options)
        return loss * math.nan if len(counted) == 7 + 2 + 3 else loss  # 7 steps and 2 evaluations an epoch

    monkeypatch.setattr(F, "cross_entropy", cross_entropy)
    with pytest.raises(UserError, match=r"not finite from step 10 \(epoch 2\)"):
        call(data_dir, tmp_path / "r")
    assert len(rows(tmp_path / "r")) == 1
    assert torch.load(tmp_path / "r" / "last.pt", weights_only=True)["epoch"] == 1


# ---------------------------------------------------------------- files and flags
def in_a_process(code):
    """The number that `code` prints in a Python of its own, which finds the scripts."""
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                              cwd=Path(train.__file__).parent).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_freed_memory_is_kept():
    """Twenty tensors of 40 MB, one after the other, get their pages from the system anew; kept memory has them there."""
    code = ("import resource, torch, utils; faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
            "def use(): start = faults(); [len(torch.ones(10_000_000)) for _ in range(20)]; return faults() - start\n"
            "use(); anew = use(); utils.keep_freed_memory(); use(); print(round(100 * use() / anew))")
    assert in_a_process(code) < 33  # percent


def test_the_smallest_numbers_count_as_zero_on_every_thread():
    """Here, where the scripts are imported; in a Python without them they don't."""
    code = ("import torch; x = torch.full((4_000_000,), 700_000, dtype=torch.int32).view(torch.float32) * 1; "
            "print((x.view(torch.int32) != 0).sum().item())")
    tiny = torch.full((4_000_000,), 700_000, dtype=torch.int32).view(torch.float32)
    assert in_a_process(code) == 4_000_000 and (tiny * 1).view(torch.int32).count_nonzero() == 0


def test_a_failed_write_keeps_the_old_file(tmp_path):
    utils.write_text(tmp_path / "f.txt", "old")
    with pytest.raises(OSError):
        with utils.atomic(tmp_path / "f.txt") as temporary:
            Path(temporary).write_text("half of the ne")
            raise OSError("no space left on device")
    assert (tmp_path / "f.txt").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_csv_reads_back_with_empty_cells_for_what_is_not_known(tmp_path):
    utils.write_csv(tmp_path / "t.csv", [{"name": "a", "n": 7, "x": 2 / 3}, {"name": "b, c", "n": 8, "x": math.nan}])
    assert (tmp_path / "t.csv").read_text() == 'name,n,x\na,7,0.666667\n"b, c",8,\n'
    first, second = utils.read_csv(tmp_path / "t.csv")
    assert first == {"name": "a", "n": 7, "x": 0.666667} and second["name"] == "b, c" and math.isnan(second["x"])


def test_a_file_is_replaced_not_written_over(tmp_path):
    """What has the old file open, or a kill in the middle of a write, finds it whole."""
    utils.write_text(tmp_path / "f.txt", "old")
    with open(tmp_path / "f.txt") as reader:
        utils.write_text(tmp_path / "f.txt", "new")
        assert reader.read() == "old" and (tmp_path / "f.txt").read_text() == "new"


class Malicious:
    def __reduce__(self):
        return exec, ("raise SystemExit('code in the checkpoint was executed')",)


@pytest.mark.parametrize("kind", ["missing", "truncated", "code", "a list", "another network"])
def test_bad_checkpoints_are_named(whole, tmp_path, kind):
    path = tmp_path / "bad.pt"
    if kind == "truncated":
        path.write_bytes((whole / "best.pt").read_bytes()[:-1000])
    elif kind == "code":
        torch.save({"model": Malicious()}, path)
    elif kind == "a list":
        torch.save([1, 2], path)
    elif kind == "another network":
        torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(UserError, match="bad.pt"):
        utils.load_weights(CNN(), utils.load_checkpoint(path), path)


@pytest.mark.parametrize("flags", ["--bs 0", "--bs 1.5", "--epochs 0", "--lr nan", "--lr 0", "--lr inf", "--lr-min -1",
                                   "--erase 1.5", "--erase-scale 0.1 0.02", "--dropout-last 6", "--dropout-p 2",
                                   "--noise -1", "--rotate 200", "--match-prob 1.1", "--shuffle-digits 2", "--shift 13", "--shift 0.5", "--flip-picture 1.1",
                                   "--small-epochs -1", "--small-size 7", "--label-smoothing 2", "--optimizer none", "--schedule none", "--limit 0",
                                   "--seed -1", "--teacher a.pt --small-epochs 1", "--label-share 2", "--label-share 0.3", "--warmup-epochs 10 --epochs 10", "--resume --overwrite", "--gamma x"])
def test_bad_flags_exit_with_2(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        train.parse_args(flags.split())
    assert stop.value.code == 2
    assert flags.split()[0] in capsys.readouterr().err


def test_compiling_is_for_gpus(data_dir, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        call(data_dir, tmp_path, "--compile")
    assert stop.value.code == 2 and "--compile" in capsys.readouterr().err


def test_an_absent_device_exits_with_2(capsys):
    for name in ("toaster", "cuda:99"):
        with pytest.raises(SystemExit) as stop:
            utils.pick_device(name)
        assert stop.value.code == 2 and "--device cpu" in capsys.readouterr().err


def test_the_defaults_are_the_reports_final_recipe():
    args = train.parse_args([])
    expected = dict(bs=16, epochs=60, lr=1e-3, lr_min=1e-5, weight_decay=1e-3, schedule="warmup_cosine", warmup_epochs=10,
                    start_factor=0.1, flip=0.5, noise=0.05, erase=0.3, erase_scale=[0.02, 0.05], rotate=0, dropout_last=3,
                    dropout_p=0.1, match_prob=0.6)
    assert {key: getattr(args, key) for key in expected} == expected


def test_errors_are_one_line_and_status_1(tmp_path):
    result = subprocess.run([sys.executable, Path(train.__file__).with_name("analyze.py"), "--ckpt", tmp_path / "no.pt"],
                            capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and "no.pt not found" in result.stderr
