"""The loop: what it writes and measures, that a stopped run goes on to the same bits, and what it refuses."""
import json
import math
import os
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
from utils import UserError, read_csv

FLAGS = "--epochs 4 --warmup-epochs 1 --limit 52 --bs 8 --device cpu".split()  # seven steps an epoch
WALL_CLOCK = ("seconds", "images_per_s")


def call(data_dir, out, *flags):
    train.train(train.parse_args([*FLAGS, "--data-dir", str(data_dir), "--out", str(out), *flags]))


draw_curves = train.draw_curves


@pytest.fixture(autouse=True)
def quick_curves(monkeypatch):
    """A figure takes as long as a run of this size; the scripts that the tests start do draw it."""
    monkeypatch.setattr(train, "draw_curves", lambda log, steps, title, path: path.touch())


def rows(out):
    """log.csv without the clock's columns, as text, so that NaN equals NaN."""
    return [{key: str(row[key]) for key in row if key not in WALL_CLOCK} for row in read_csv(out / "log.csv")]


def same(a, b):
    """Equal to the last bit, through nested dicts and lists; the clock and the command line aside."""
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw_curves", lambda log, steps, title, path: path.touch())
        call(data_dir, out)
    return out


def assert_same_run(out, whole):
    assert rows(out) == rows(whole)
    for name in ("steps.csv", "best.csv"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    for name in ("best.pt", "last.pt"):
        assert same(*(torch.load(folder / name, weights_only=True) for folder in (out, whole)))


def accuracy(path, images, labels):
    """Accuracy in percent of a checkpoint's network, computed here."""
    net = CNN().eval()
    net.load_state_dict(torch.load(path, weights_only=True)["model"])
    with torch.no_grad():
        return 100 * (net(data.Normalize()(images / 255)).argmax(1) == labels).double().mean().item()


# ---------------------------------------------------------------- what a run writes
def test_a_run_writes_its_files(whole, data_dir):
    log = read_csv(whole / "log.csv")
    assert [row["epoch"] for row in log] == [1, 2, 3, 4]
    assert [row["step"] for row in log] == [7, 14, 21, 28]  # 52 images in batches of 8, the last one of 4
    assert [row["lr"] for row in log][:2] == pytest.approx([1e-4, 1e-3])
    args = json.loads((whole / "args.json").read_text())
    assert args["bs"] == 8 and args["train_images"] == 52 and args["data"] == "synthetic data"
    assert args["fingerprint"] == data.load_splits(data_dir).fingerprint
    best = torch.load(whole / "best.pt", weights_only=True)
    accuracies = [row["val_acc"] for row in log]
    assert best["val_acc"] == pytest.approx(max(accuracies), abs=1e-3)
    assert best["epoch"] == accuracies.index(max(accuracies)) + 1
    assert {**args, **best["args"]} == args and {"seed", "fingerprint", "dropout_last"} <= best["args"].keys()
    assert (whole / "curves.png").exists()


def test_best_csv_has_the_accuracies_of_best_pt(whole, data_dir):
    splits, (best,) = data.load_splits(data_dir), read_csv(whole / "best.csv")
    assert best["val_acc"] == pytest.approx(accuracy(whole / "best.pt", *splits.val[:2]), rel=1e-5)
    assert best["test_acc"] == pytest.approx(accuracy(whole / "best.pt", *splits.test[:2]), rel=1e-5)
    assert best["test_images"] == len(splits.test.labels)
    assert best["epoch"] == torch.load(whole / "best.pt", weights_only=True)["epoch"]


def test_of_equal_epochs_the_first_is_best(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "evaluate", lambda *args: dict.fromkeys(
        ("loss", "acc", "acc_agree", "acc_conflict", "follows_digit"), 50.0))
    call(data_dir, tmp_path, "--limit", "16")
    assert torch.load(tmp_path / "best.pt", weights_only=True)["epoch"] == 1


def test_steps_csv_cuts_each_epoch_into_equal_parts(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "STEPS_PER_ROW", 3)
    call(data_dir, tmp_path)
    steps = read_csv(tmp_path / "steps.csv")
    assert [row["step"] for row in steps] == [4, 7, 11, 14, 18, 21, 25, 28]  # seven steps an epoch
    for row, four, three in zip(read_csv(tmp_path / "log.csv"), steps[::2], steps[1::2]):
        mean = (4 * four["train_loss"] + 3 * three["train_loss"]) / 7
        assert mean == pytest.approx(row["train_loss"], rel=1e-5)


def test_the_last_row_is_that_of_the_last_weights(whole, data_dir):
    """val_loss, val_acc and its groups, computed here image by image from last.pt."""
    net = CNN().eval()
    net.load_state_dict(torch.load(whole / "last.pt", weights_only=True)["model"])
    hits, losses = {"val_acc": [], "val_acc_agree": [], "val_acc_conflict": [], "val_follows_digit": []}, []
    for image, label, digit in zip(*data.load_splits(data_dir).val):
        x = (image / 255 - torch.tensor(data.MEAN).view(3, 1, 1)) / torch.tensor(data.STD).view(3, 1, 1)
        logits = net(x[None])[0].detach()
        predicted = logits.argmax()
        losses.append((logits.exp().sum().log() - logits[label]).item())
        hits["val_acc"].append(predicted == label)
        hits["val_acc_agree" if digit == label else "val_acc_conflict"].append(predicted == label)
        if digit != label:
            hits["val_follows_digit"].append(predicted == digit)
    last = read_csv(whole / "log.csv")[-1]
    for name, values in hits.items():
        expected = 100 * sum(values).item() / len(values) if values else math.nan
        assert last[name] == pytest.approx(expected, abs=1e-3, nan_ok=True)
    assert last["val_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_train_acc_is_that_of_the_first_training_images_augmented(data_dir, tmp_path, monkeypatch):
    """Each mirrored, for certain, and nothing else; in evaluation mode, from last.pt."""
    monkeypatch.setattr(train, "TRAIN_EVAL", 40)
    call(data_dir, tmp_path, "--flip", "1", "--noise", "0", "--erase", "0", "--dropout-p", "0.5", "--lr",
         "0.01")
    images, labels, _ = data.load_splits(data_dir).train.first(40)
    logged = read_csv(tmp_path / "log.csv")[-1]["train_acc"]
    assert logged == pytest.approx(accuracy(tmp_path / "last.pt", images.flip(3), labels), abs=1e-3)


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
    assert [(row["seconds"], row["images_per_s"]) for row in read_csv(tmp_path / "log.csv")] == [(3, 26)] * 4


def test_the_curves_are_those_of_the_logs(whole, tmp_path, monkeypatch):
    shown, log, steps = [], read_csv(whole / "log.csv"), read_csv(whole / "steps.csv")
    monkeypatch.setattr(train, "save_figure", lambda figure, path: shown.append(figure))
    draw_curves(log, steps, "lr$1_$x", tmp_path / "curves.png")
    drawn = [[list(map(list, line.get_data())) for line in axis.lines] for axis in shown[0].axes]
    shown[0].canvas.draw()
    assert not any("$" in label.get_text() for axis in shown[0].axes for label in axis.get_yticklabels())
    ends = [7, 14, 21, 28]
    assert drawn == [[[[row["step"] for row in steps], [row["train_loss"] for row in steps]],
                      [ends, [row["val_loss"] for row in log]]],
                     [[ends, [row["train_acc"] for row in log]], [ends, [row["val_acc"] for row in log]]]]


def test_the_progress_line_counts_from_where_a_run_resumed(monkeypatch, capsys):
    """Half of the third of four epochs, the first one of this process, has taken 10 s."""
    clock = [100.0]
    monkeypatch.setattr(train.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = train.Progress("out", epochs=4, images=100, epochs_done=2)
    clock[0] = 110.0
    progress.show(3, 5, torch.arange(10.0))
    line = capsys.readouterr().err
    assert "epoch 3/4" in line and "step 5/10" in line and "loss 4.000" in line
    assert "5 images/s" in line and "0:00:30 left" in line
    progress.show(3, 6, torch.arange(10.0))  # too soon
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------- the loop
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
    args = train.parse_args(["--bs", str(bs)])
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])

    def recorded(step, images, labels):
        batches.append((images.flatten(), labels))
        return labels[0].float()

    losses = train.train_epoch(torch.nn.Identity(), optimizer, split,
                               [lambda x: augmented.append(len(x)) or x], args, 1, recorded)
    seen = torch.cat([y for _, y in batches])
    assert all(torch.equal(x, y) for x, y in batches) and torch.equal(seen.sort()[0], labels)
    assert [len(y) for _, y in batches] == [bs] * (2100 // bs) + [2100 % bs] * (2100 % bs > 0)
    assert losses.tolist() == [y[0].item() for _, y in batches] and not torch.equal(seen, labels)
    assert sum(augmented) == 2100 and max(augmented) <= max(bs, 1024)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_one_step_is_adam_on_the_augmented_batch(data_dir, tmp_path, optimizer):
    """The first step, done again by hand: gather, augment, cross-entropy on smoothed targets, Adam's formula
    with the weight decay in the gradient, or beside it."""
    call(data_dir, tmp_path / "r", "--limit", "32", "--bs", "32", "--epochs", "1", "--schedule", "constant",
         "--dropout-last", "0", "--weight-decay", "0.1", "--optimizer", optimizer, "--label-smoothing", "0.2",
         "--shift", "2", "--shuffle-digits", "1", "--flip", "0.4", "--flip-picture", "0.6")
    torch.manual_seed(0)
    net = CNN(0).to(memory_format=torch.channels_last)
    split = data.load_splits(data_dir).train.first(32)
    torch.manual_seed(1)
    order = torch.randperm(32)
    augment = data.augmentation(flip=0.4, noise=0.05, erase=0.3, shuffle_digits=1.0, shift=2,
                                flip_picture=0.6)
    x = data.apply(augment, split.images[order])
    targets = 0.8 * F.one_hot(split.labels[order], 10) + 0.2 / 10
    (-targets * net.train()(x).log_softmax(1)).sum(1).mean().backward()
    trained = torch.load(tmp_path / "r" / "last.pt", weights_only=True)["model"]
    for name, p in net.named_parameters():
        gradient, kept = (p.grad + 0.1 * p.detach(), 1) if optimizer == "adam" else (p.grad, 1 - 1e-3 * 0.1)
        settled = gradient.abs() > 1e-6  # else rounding decides: a bias before batch norm has no gradient
        expected = kept * p.detach() - 1e-3 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(trained[name][settled], expected[settled], rtol=0, atol=2e-5)


def test_the_rate_changes_by_the_epoch_or_by_the_batch(data_dir, tmp_path, monkeypatch):
    seen, set_learning_rate = [], train.set_learning_rate
    monkeypatch.setattr(train, "set_learning_rate",
                        lambda optimizer, lr: seen.append(lr) or set_learning_rate(optimizer, lr))
    call(data_dir, tmp_path / "epochs", "--schedule", "cosine")
    expected = [1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4)]
    assert seen == pytest.approx([lr for lr in expected for _ in range(7)])
    seen.clear()
    call(data_dir, tmp_path / "batches", "--schedule", "onecycle", "--lr-min", "0")
    up, down = [1e-3 * (0.1 + 0.9 * i / 7) for i in range(7)], [1e-3 * (1 - i / 21) for i in range(21)]
    assert seen == pytest.approx(up + down)


def test_evaluation_is_in_evaluation_mode_and_changes_nothing(data_dir):
    net, val = CNN(5, 0.5).train(), data.load_splits(data_dir).val
    net(torch.randn(16, 3, 40, 40))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    metrics = train.evaluate(net, val, data.NO_AUGMENT)
    assert same(before, net.state_dict())
    net.eval()
    logits = torch.stack([net(data.apply(data.NO_AUGMENT, image[None]))[0] for image in val.images])
    assert metrics["loss"] == pytest.approx(F.cross_entropy(logits, val.labels).item(), rel=1e-4)
    assert metrics["acc"] == pytest.approx(100 * (logits.argmax(1) == val.labels).double().mean().item())


def test_groups_are_nan_where_digits_are_unknown(data_dir):
    val = data.load_splits(data_dir).val
    unknown = val._replace(digits=torch.full_like(val.digits, -1))
    metrics = train.evaluate(CNN(), unknown, data.NO_AUGMENT)
    assert all(math.isnan(metrics[key]) for key in ("acc_agree", "acc_conflict", "follows_digit"))


# ---------------------------------------------------------------- on a GPU
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@gpu
@pytest.mark.parametrize("optimizer", train.OPTIMIZERS)
def test_gpu_the_recorded_step_gives_the_plain_steps_losses(data_dir, optimizer):
    """Two epochs of 22 batches of 16 and one of 8, with a learning rate that changes in between."""
    device = utils.pick_device("cuda")
    torch.backends.cudnn.deterministic = True
    split, losses = data.load_splits(data_dir).train.first(360).to(device), []
    args = train.parse_args(["--epochs", "2", "--schedule", "cosine"])
    for recorded in (lambda step, *batch: step(*batch), utils.Recorded()):
        torch.manual_seed(0)
        net = CNN().to(device, memory_format=torch.channels_last)
        optimizer_ = train.make_optimizer(optimizer, net, lr=1e-3)
        for epoch in (1, 2):
            augment = data.augmentation(noise=0.05, erase=0.3)
            losses.append(train.train_epoch(net, optimizer_, split, augment, args, epoch, recorded).clone())
    assert len(recorded.graphs) == 1  # of batches of 16; of 8 there are too few to record
    assert len(losses[0]) == 23 and losses[0].std() > 0.01
    torch.testing.assert_close(losses[2:], losses[:2], rtol=1e-4, atol=1e-4)


@gpu
def test_gpu_a_stopped_run_resumes(data_dir, tmp_path, monkeypatch):
    flags = ("--device", "cuda", "--limit", "200", "--bs", "16", "--optimizer", "muon", "--schedule",
             "onecycle")
    call(data_dir, tmp_path / "whole", *flags)
    stop_in_step(2 * 13 + 4, monkeypatch, data_dir, tmp_path / "r", *flags)
    call(data_dir, tmp_path / "r", *flags, "--resume")
    for resumed, whole in zip(read_csv(tmp_path / "r" / "log.csv"), read_csv(tmp_path / "whole" / "log.csv")):
        assert resumed["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-3)


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


@pytest.mark.parametrize("stop_in",
                         ["training", "evaluation", "before last.pt", "before log.csv", "the last figure"])
def test_a_stopped_run_resumes_to_the_same_bits(whole, data_dir, tmp_path, monkeypatch, stop_in):
    """Stopped in its third epoch, at different points, or at the very end."""
    out, calls = tmp_path / "run", []
    target, name = {"training": (train.Progress, "show"), "evaluation": (train, "evaluate"),
                    "before last.pt": (train, "save_checkpoint"), "before log.csv": (train, "write_csv"),
                    "the last figure": (train, "draw_curves")}[stop_in]
    original = getattr(target, name)

    def stop(*args, **kwargs):
        calls.append(args)
        file = str(args[0])
        if (stop_in == "training" and len(calls) == 2 * 7 + 4
                or stop_in == "evaluation" and len(calls) == 2 * 2 + 2
                or stop_in == "before last.pt" and file.endswith("last.pt") and args[1]["epoch"] == 3
                or stop_in == "before log.csv" and file.endswith("log.csv") and len(args[1]) == 3
                or stop_in == "the last figure"):
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(target, name, stop)
        with pytest.raises(KeyboardInterrupt):
            call(data_dir, out)
    if stop_in == "the last figure":  # by then all else is written
        assert_same_run(out, whole)
        return
    assert not (out / "best.csv").exists()  # it does not look finished
    call(data_dir, out, "--resume")
    assert_same_run(out, whole)


def test_a_schedule_that_goes_by_batches_resumes_too(data_dir, tmp_path, monkeypatch):
    flags = ("--schedule", "onecycle", "--optimizer", "muon", "--lr", "0.005", "--shuffle-digits", "1",
             "--shift", "2")
    call(data_dir, tmp_path / "whole", *flags)
    stop_in_step(2 * 7 + 4, monkeypatch, data_dir, tmp_path / "r", *flags)
    call(data_dir, tmp_path / "r", *flags, "--resume")
    assert_same_run(tmp_path / "r", tmp_path / "whole")


def test_a_run_that_goes_on_elsewhere_says_so(data_dir, tmp_path, monkeypatch, capsys):
    said = []
    for epoch, hardware in enumerate(("A, 1 threads", "A, 2 threads", "A, 2 threads"), start=1):
        monkeypatch.setattr(train, "device_name", lambda device: hardware)
        stop_in_step(7 + 1 if epoch < 3 else 7, monkeypatch, data_dir, tmp_path / "r", "--resume")
        said.append("does not go on to the same bits" in capsys.readouterr().err)
    assert said == [False, True, False]
    args = json.loads((tmp_path / "r" / "args.json").read_text())
    assert args["hardware"] == "A, 1 threads, then A, 2 threads"


def test_kill_minus_nine_then_resume(whole, data_dir, tmp_path):
    """While it lives, a second process is refused; once it is dead the next goes on, and removes what was
    half written."""
    out = tmp_path / "run"
    command = [sys.executable, train.__file__, *FLAGS, "--data-dir", data_dir, "--out", out]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not (out / "args.json").exists() and process.poll() is None:
        time.sleep(0.01)
    with pytest.raises(SystemExit) as refused, utils.sole_owner(out):
        pass
    assert refused.value.code == 2
    while not (out / "last.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (out / "last.123.tmp.pt").write_bytes(b"half of a checkpoint")
    with utils.sole_owner(out):
        assert not list(out.glob("*.tmp*"))
        call(data_dir, out, "--resume")
    assert_same_run(out, whole)


# ---------------------------------------------------------------- what it refuses
def test_a_finished_run_says_so_and_changes_nothing(whole, data_dir, capsys):
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in whole.iterdir()}
    for flags in ((), ("--resume",)):
        with pytest.raises(SystemExit) as stop:
            call(data_dir, whole, *flags)
        assert stop.value.code == 0 and "finished" in capsys.readouterr().out
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in whole.iterdir()}


@pytest.mark.parametrize("flags, named", [(("--lr", "0.01"), "lr 0.001 there, 0.01 here"),
                                          (("--match-prob", "0.9"), "match_prob None there, 0.9 here"),
                                          (("--data-seed", "5"), "fingerprint")])
def test_another_run_or_other_images_are_refused(whole, data_dir, capsys, flags, named):
    for resume in ((), ("--resume",)):
        with pytest.raises(SystemExit) as stop:
            call(data_dir, whole, *flags, *resume)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and named in error and error.count("\n") == 1


def test_a_last_pt_of_another_run_is_refused(whole, data_dir, tmp_path, monkeypatch, capsys):
    """Copied in from a run with another learning rate, beside the args.json of this one."""
    stop_in_step(7 + 4, monkeypatch, data_dir, tmp_path / "r")
    call(data_dir, tmp_path / "other", "--lr", "0.01", "--epochs", "2")
    (tmp_path / "r" / "last.pt").write_bytes((tmp_path / "other" / "last.pt").read_bytes())
    with pytest.raises(SystemExit) as stop:
        call(data_dir, tmp_path / "r", "--resume")
    assert stop.value.code == 2 and "lr 0.01 there, 0.001 here" in capsys.readouterr().err


def test_a_run_from_before_a_flag_existed_has_its_default(data_dir, tmp_path, monkeypatch, capsys):
    stop_in_step(7 + 4, monkeypatch, data_dir, tmp_path)
    args = json.loads((tmp_path / "args.json").read_text())
    del args["shuffle_digits"]
    (tmp_path / "args.json").write_text(json.dumps(args))
    with pytest.raises(SystemExit):
        call(data_dir, tmp_path, "--resume", "--shuffle-digits", "1")
    assert "shuffle_digits 0.0 there, 1.0 here" in capsys.readouterr().err
    call(data_dir, tmp_path, "--resume")
    assert len(rows(tmp_path)) == 4


def test_an_unfinished_run_asks_for_resume(data_dir, tmp_path, monkeypatch, capsys):
    stop_in_step(7 + 4, monkeypatch, data_dir, tmp_path)
    with pytest.raises(SystemExit) as refused:
        call(data_dir, tmp_path)
    assert refused.value.code == 2 and "--resume" in capsys.readouterr().err


@pytest.mark.parametrize("name, damage", [("args.json", b""), ("args.json", b"[1]"), ("log.csv", b"\xff"),
                                          ("log.csv", b"<<<<<<< HEAD\nepoch,val_acc\n1,60\n")])
def test_a_damaged_run_is_named_and_kept(whole, data_dir, tmp_path, name, damage):
    for other in ("args.json", "log.csv", "last.pt"):
        (tmp_path / other).write_bytes((whole / other).read_bytes())
    (tmp_path / name).write_bytes(damage)
    with pytest.raises(UserError, match="missing or damaged"):
        call(data_dir, tmp_path, "--resume")
    assert (tmp_path / name).read_bytes() == damage


def test_a_last_pt_that_is_not_train_pys_is_named(whole, data_dir, tmp_path):
    for name in ("args.json", "last.pt"):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    torch.save(state["model"], tmp_path / "last.pt")
    with pytest.raises(UserError, match="args, best_val_acc, log, optimizer, steps"):
        call(data_dir, tmp_path, "--resume")


def write_course_folder(folder, size=40):
    for split in ("train", "val"):
        for name in "0123456789":
            (folder / split / name).mkdir(parents=True)
            save_image(torch.rand(3, size, size), folder / split / name / "1.png")


@pytest.mark.parametrize("flags", [("--shuffle-digits", "1"), ("--shift", "1"), ("--flip-picture", "1"),
                                   ("--match-prob", "0.9"), ("--data-seed", "5")])
def test_flags_that_cannot_act_on_the_data_are_refused(tmp_path, capsys, flags):
    write_course_folder(tmp_path / "course", size=32)
    with pytest.raises(SystemExit) as stop:
        call(tmp_path / "course", tmp_path / "r", *flags)
    assert stop.value.code == 2 and flags[0] in capsys.readouterr().err


def test_a_course_folder_trains(tmp_path):
    """Without digits and without labelled test images: empty cells."""
    write_course_folder(tmp_path / "course")
    call(tmp_path / "course", tmp_path / "r", "--epochs", "1", "--warmup-epochs", "0")
    (best,), (row,) = read_csv(tmp_path / "r" / "best.csv"), read_csv(tmp_path / "r" / "log.csv")
    assert math.isnan(best["test_acc"]) and math.isnan(row["val_acc_conflict"])
    assert not math.isnan(row["val_acc"])


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def stop(args):
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "train", stop)
    out = tmp_path / "my results"
    monkeypatch.setattr(sys, "argv", ["train.py", "--lr", "0.01", "--resume", "--out", str(out)])
    with pytest.raises(SystemExit) as stopped:
        train.main()
    assert stopped.value.code == 130
    assert capsys.readouterr().err.endswith(f"python train.py --lr 0.01 --out '{out}' --resume\n")
    assert not out.exists()  # nothing was written


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_files(data_dir, tmp_path, monkeypatch):
    original, counted = F.cross_entropy, []

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
def test_the_users_settings_and_a_runs_name_cannot_hurt(data_dir, tmp_path):
    """A matplotlibrc that wants TeX, a backend of a notebook, a name that looks like a formula, a closed
    stderr."""
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    out = tmp_path / "lr$1_$x é"
    flags = [*FLAGS, "--epochs", "1", "--warmup-epochs", "0", "--data-dir", str(data_dir), "--out", str(out)]
    result = subprocess.run(
        ["bash", "-c", 'exec "$@" 2>&-', "-", sys.executable, train.__file__, *flags], stdout=subprocess.PIPE,
        env={**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline",
             "MATPLOTLIBRC": str(tmp_path), "LC_ALL": "C"})
    assert result.returncode == 0
    assert (out / "curves.png").stat().st_size > 10_000


def test_the_smallest_numbers_count_as_zero():
    tiny = torch.full((4_000_000,), 700_000, dtype=torch.int32).view(torch.float32)
    assert (tiny * 1).view(torch.int32).count_nonzero() == 0


def test_a_failed_write_keeps_the_old_file(tmp_path):
    utils.write_text(tmp_path / "f.txt", "old")
    with pytest.raises(OSError):
        with utils.atomic(tmp_path / "f.txt") as temporary:
            Path(temporary).write_text("half of the ne")
            raise OSError("no space left on device")
    assert (tmp_path / "f.txt").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_csv_reads_back_with_empty_cells_for_what_is_not_known(tmp_path):
    table = [{"name": "a", "n": 7, "x": 2 / 3}, {"name": "b, c", "n": 8, "x": math.nan}]
    utils.write_csv(tmp_path / "t.csv", table)
    assert (tmp_path / "t.csv").read_text() == 'name,n,x\na,7,0.666667\n"b, c",8,\n'
    first, second = read_csv(tmp_path / "t.csv")
    assert first == {"name": "a", "n": 7, "x": 0.666667}
    assert second["name"] == "b, c" and math.isnan(second["x"])


class Malicious:
    def __reduce__(self):
        return exec, ("raise SystemExit('code in the checkpoint was executed')",)


@pytest.mark.parametrize("kind", ["missing", "a folder", "truncated", "code", "a list", "another network"])
def test_bad_checkpoints_are_named(whole, tmp_path, kind):
    path = tmp_path / "bad.pt"
    if kind == "a folder":
        path.mkdir()
    elif kind == "truncated":
        path.write_bytes((whole / "best.pt").read_bytes()[:-1000])
    elif kind == "code":
        torch.save({"model": Malicious()}, path)
    elif kind == "a list":
        torch.save([1, 2], path)
    elif kind == "another network":
        torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(UserError, match="bad.pt"):
        utils.load_weights(CNN(), utils.load_checkpoint(path), path)


@pytest.mark.parametrize("flags", [
    "--bs 0", "--bs 1.5", "--epochs 0", "--lr nan", "--lr 0", "--lr inf", "--lr-min -1", "--erase 1.5",
    "--shift 13", "--erase-scale 0.1 0.02", "--dropout-last -1", "--dropout-p 2", "--noise -1",
    "--rotate 200", "--match-prob 1.1", "--shuffle-digits 2", "--label-smoothing 2", "--optimizer none",
    "--schedule none", "--limit 0", "--seed -1", "--warmup-epochs 10 --epochs 10"
])
def test_bad_flags_exit_with_2(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        train.parse_args(flags.split())
    assert stop.value.code == 2
    assert flags.split()[0] in capsys.readouterr().err


def test_flags_under_the_names_that_people_try():
    args = train.parse_args(
        ["--batch-size", "32", "--learning-rate", "0.1", "--data-dir", "~/data", "--epochs", "2"])
    assert (args.bs, args.lr, args.data_dir, args.warmup_epochs) == (32, 0.1, os.path.expanduser("~/data"), 0)


def test_an_absent_device_exits_with_2(capsys):
    for name in ("toaster", "cuda:99"):
        with pytest.raises(SystemExit) as stop:
            utils.pick_device(name)
        assert stop.value.code == 2 and "--device cpu" in capsys.readouterr().err


def test_the_defaults_are_the_reports_final_recipe():
    args = train.parse_args([])
    expected = dict(bs=16, epochs=60, lr=1e-3, lr_min=1e-5, weight_decay=1e-3, schedule="warmup_cosine",
                    warmup_epochs=10, flip=0.5, noise=0.05, erase=0.3, erase_scale=[0.02, 0.05], rotate=0,
                    dropout_last=3, dropout_p=0.1, match_prob=None, optimizer="adam")
    assert {key: getattr(args, key) for key in expected} == expected
