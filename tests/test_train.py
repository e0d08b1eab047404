"""The loop: what it writes and measures, that a stopped run goes on to the same bits, and what it refuses."""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import data
import train
import utils
from conftest import write_course_folder
from model import CNN
from utils import UserError, read_csv

FLAGS = "--epochs 4 --warmup-epochs 1 --limit 52 --bs 8 --device cpu"  # seven steps an epoch
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module", autouse=True)
def quick_curves():
    """A figure takes as long as a run of this size; the scripts that the tests start do draw it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw_curves", lambda log, steps, title, path: path.touch())
        yield


def call(data_dir, out, flags=""):
    words = f"{FLAGS} {flags}".split()
    train.train(train.parse_args([*words, "--data-dir", str(data_dir), "--out", str(out)]))


@pytest.fixture(scope="module")
def whole(data_dir, tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    call(data_dir, out)
    return out


@pytest.fixture
def unfinished(whole, tmp_path):
    """A run that stopped after its last epoch."""
    return shutil.copytree(whole, tmp_path / "run", ignore=shutil.ignore_patterns("best.csv"))


def assert_same_run(out, whole):
    """The same results to the last bit, the last two columns of log.csv aside: the clock's."""
    a, b = ((folder / "log.csv").read_text().split() for folder in (out, whole))
    assert [row.split(",")[:-2] for row in a] == [row.split(",")[:-2] for row in b]
    for name in ("steps.csv", "best.csv"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    for name in ("best.pt", "last.pt"):
        a, b = (torch.load(folder / name, weights_only=True) for folder in (out, whole))
        for key in {"epoch", "model", "optimizer"} & a.keys():
            torch.testing.assert_close(a[key], b[key], rtol=0, atol=0)


def by_hand(path, images, labels, digits):
    """The loss and accuracies of a checkpoint's network, computed here."""
    net = CNN().eval()
    net.load_state_dict(torch.load(path, weights_only=True)["model"])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.MEAN, data.STD))
    with torch.no_grad():
        logits = net((images / 255 - mean) / std)
    correct, conflict = logits.argmax(1) == labels, digits != labels
    losses = logits.exp().sum(1).log() - logits[range(len(labels)), labels]
    hits = {"acc": correct, "acc_agree": correct[~conflict], "acc_conflict": correct[conflict],
            "follows_digit": (logits.argmax(1) == digits)[conflict]}
    return {"loss": losses.mean().item(),
            **{name: 100 * values.double().mean().item() for name, values in hits.items()}}


def refusal(capsys, function, *args):
    """What a call says that exits with 2."""
    with pytest.raises(SystemExit) as stopped:
        function(*args)
    assert stopped.value.code == 2
    return capsys.readouterr().err


# ---------------------------------------------------------------- what a run writes
def test_a_run_writes_its_files(whole, data_dir):
    log, steps = read_csv(whole / "log.csv"), read_csv(whole / "steps.csv")
    assert [row["epoch"] for row in log] == [1, 2, 3, 4]
    assert [row["step"] for row in log] == [7, 14, 21, 28]  # 52 images in batches of 8, the last one of 4
    assert [row["lr"] for row in log][:2] == pytest.approx([1e-4, 1e-3])
    assert steps == [{key: row[key] for key in ("step", "epoch", "train_loss")} for row in log]
    args = json.loads((whole / "args.json").read_text())
    assert args["bs"] == 8 and args["train_images"] == 52 and args["data"] == "synthetic data"
    assert args["fingerprint"] == data.load_splits(data_dir).fingerprint
    stored = torch.load(whole / "best.pt", weights_only=True)["args"]
    assert {**args, **stored} == args and {"seed", "fingerprint", "dropout_last"} <= stored.keys()


def test_the_accuracies_are_those_of_the_saved_weights(whole, data_dir):
    splits, log = data.load_splits(data_dir), read_csv(whole / "log.csv")
    expected = by_hand(whole / "last.pt", *splits.val)
    assert {name: log[-1][f"val_{name}"] for name in expected} == pytest.approx(expected, rel=1e-4)
    (best,), top = read_csv(whole / "best.csv"), max(log, key=lambda row: row["val_acc"])
    assert (best["epoch"], best["val_acc"]) == (top["epoch"], top["val_acc"])
    assert best["val_acc"] == pytest.approx(by_hand(whole / "best.pt", *splits.val)["acc"], rel=1e-5)
    assert best["test_acc"] == pytest.approx(by_hand(whole / "best.pt", *splits.test)["acc"], rel=1e-5)
    assert best["test_images"] == len(splits.test.labels)


def test_steps_csv_cuts_an_epoch_into_equal_parts(monkeypatch):
    monkeypatch.setattr(train, "STEPS_PER_ROW", 3)
    assert train.step_rows(torch.arange(7.0), epoch=2) == [{"step": 11, "epoch": 2, "train_loss": 1.5},
                                                           {"step": 14, "epoch": 2, "train_loss": 5.0}]


def test_train_acc_is_that_of_the_first_training_images_augmented(data_dir, tmp_path, monkeypatch):
    """Each mirrored, for certain, and nothing else; in evaluation mode, from last.pt."""
    monkeypatch.setattr(train, "TRAIN_EVAL", 40)
    call(data_dir, tmp_path, "--flip 1 --noise 0 --erase 0 --dropout-p 0.5 --lr 0.01")
    images, labels, digits = data.load_splits(data_dir).train.first(40)
    expected = by_hand(tmp_path / "last.pt", images.flip(3), labels, digits)["acc"]
    assert read_csv(tmp_path / "log.csv")[-1]["train_acc"] == pytest.approx(expected, abs=1e-3)


# ---------------------------------------------------------------- the loop
def test_another_seed_gives_another_run(whole, data_dir, tmp_path):
    """The same one gives the same bits: the tests of --resume compare with a run of the same seed."""
    call(data_dir, tmp_path / "other", "--seed 1")
    assert (tmp_path / "other" / "steps.csv").read_text() != (whole / "steps.csv").read_text()


@pytest.mark.parametrize("bs", [16, 700, 2000])
def test_an_epoch_takes_each_image_once_with_its_label(bs):
    """In batches of `bs`, whatever is augmented at once; only the last is smaller."""
    labels, batches = torch.arange(2100), []
    split = data.Split(labels.view(-1, 1, 1, 1), labels, labels)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])

    def run_step(step, images, labels):
        assert torch.equal(images.flatten(), labels)
        batches.append(labels)
        return labels[0].float()

    args = train.parse_args(["--bs", str(bs)])
    losses = train.train_epoch(torch.nn.Identity(), optimizer, split, torch.nn.Identity(), args, 1, run_step)
    assert losses.tolist() == [batch[0] for batch in batches]
    assert [len(batch) for batch in batches] == [bs] * (2100 // bs) + [2100 % bs] * (2100 % bs > 0)
    assert torch.equal(torch.cat(batches).sort()[0], labels) and not torch.equal(torch.cat(batches), labels)


@pytest.mark.parametrize("optimizer, init", [("adam", "fan_in"), ("adamw", "fan_out")])
def test_one_step_is_adam_on_the_augmented_batch(data_dir, tmp_path, optimizer, init):
    """The first step, done again by hand; the weight decay is in the gradient, or beside it."""
    call(data_dir, tmp_path, f"--limit 32 --bs 32 --epochs 1 --schedule constant --optimizer {optimizer} "
         "--dropout-last 0 --weight-decay 0.1 --label-smoothing 0.2 --shift 2 --shuffle-digits 1 --flip 0.4 "
         f"--flip-picture 0.6 --init {init}")
    torch.manual_seed(0)
    net = CNN(0, init=init).to(memory_format=torch.channels_last)
    split = data.load_splits(data_dir).train.first(32)
    torch.manual_seed(1)
    order = torch.randperm(32)
    x = data.augment(split.images[order], flip=0.4, noise=0.05, erase=0.3, shuffle_digits=1, shift=2,
                     flip_picture=0.6)
    targets = 0.8 * F.one_hot(split.labels[order], 10) + 0.2 / 10
    (-targets * net.train()(x).log_softmax(1)).sum(1).mean().backward()
    trained = torch.load(tmp_path / "last.pt", weights_only=True)["model"]
    for name, p in net.named_parameters():
        gradient, kept = (p.grad + 0.1 * p.detach(), 1) if optimizer == "adam" else (p.grad, 1 - 1e-3 * 0.1)
        settled = gradient.abs() > 1e-6  # else rounding decides: a bias before batch norm has no gradient
        expected = kept * p.detach() - 1e-3 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(trained[name][settled], expected[settled], rtol=0, atol=2e-5)


def test_the_rate_changes_by_the_epoch_or_by_the_batch(data_dir, tmp_path, monkeypatch):
    seen, set_learning_rate = [], train.set_learning_rate
    monkeypatch.setattr(train, "set_learning_rate",
                        lambda optimizer, lr: seen.append(lr) or set_learning_rate(optimizer, lr))
    call(data_dir, tmp_path / "epochs", "--schedule cosine")
    expected = [1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4)]
    assert seen == pytest.approx([lr for lr in expected for _ in range(7)])
    seen.clear()
    call(data_dir, tmp_path / "batches", "--schedule onecycle --lr-min 0")
    up, down = [1e-3 * (0.1 + 0.9 * i / 7) for i in range(7)], [1e-3 * (1 - i / 21) for i in range(21)]
    assert seen == pytest.approx(up + down)


@gpu
@pytest.mark.parametrize("optimizer", train.OPTIMIZERS)
def test_gpu_the_recorded_step_gives_the_plain_steps_losses(data_dir, optimizer):
    """Two epochs of 22 batches of 16 and one of 8, with a learning rate that changes in between."""
    device = utils.pick_device("cuda")
    torch.backends.cudnn.deterministic = True
    split, losses = data.load_splits(data_dir).train.first(360).to(device), []
    args = train.parse_args(["--epochs", "2", "--schedule", "cosine"])
    transform = train.augmentation_of(args, split)
    for run_step in (lambda step, *batch: step(*batch), utils.GraphedStep()):
        torch.manual_seed(0)
        net = CNN().to(device, memory_format=torch.channels_last)
        optimizer_ = train.make_optimizer(optimizer, net, lr=1e-3)
        for epoch in (1, 2):
            losses.append(train.train_epoch(net, optimizer_, split, transform, args, epoch, run_step).clone())
    assert len(run_step.graphs) == 1  # of batches of 16; of 8 there are too few to record
    assert len(losses[0]) == 23 and losses[0].std() > 0.01
    torch.testing.assert_close(losses[2:], losses[:2], rtol=1e-4, atol=1e-4)


@gpu
def test_gpu_a_stopped_run_resumes(data_dir, tmp_path):
    flags = "--device cuda --limit 200 --bs 16 --optimizer muon --schedule onecycle"
    call(data_dir, tmp_path / "whole", flags)
    stop(data_dir, tmp_path / "r", flags, n=2 * 13 + 4)
    call(data_dir, tmp_path / "r", flags + " --resume")
    for resumed, whole in zip(read_csv(tmp_path / "r" / "log.csv"), read_csv(tmp_path / "whole" / "log.csv")):
        assert resumed["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-3)


# ---------------------------------------------------------------- stop and resume
def stop(data_dir, out, flags="", n=2 * 7 + 4, name="set_learning_rate", file=""):
    """A run that Ctrl-C stops in the n-th call of a function, or in its n-th writing of `file`."""
    original, calls = getattr(train, name), []

    def interrupted(*args, **settings):
        calls.append(str(args[0]).endswith(file))
        if sum(calls) == n:
            raise KeyboardInterrupt
        return original(*args, **settings)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, name, interrupted)
        call(data_dir, out, flags)


@pytest.mark.parametrize("name, file, n", [
    ("set_learning_rate", "", 2 * 7 + 4), ("evaluate", "", 2 * 2 + 2), ("write_csv", "log.csv", 3),
    ("save_checkpoint", "last.pt", 3), ("save_checkpoint", "last.pt", 1), ("draw_curves", "", 1)
])
def test_a_stopped_run_resumes_to_the_same_bits(whole, data_dir, tmp_path, name, file, n):
    """Stopped in its third epoch, at different points; in its first, before last.pt; at the very end."""
    stop(data_dir, tmp_path / "run", name=name, file=file, n=n)
    assert not (tmp_path / "run" / "best.csv").exists()  # it does not look finished
    call(data_dir, tmp_path / "run", "--resume")
    assert_same_run(tmp_path / "run", whole)


def test_a_schedule_that_goes_by_batches_resumes_too(data_dir, tmp_path):
    flags = "--schedule onecycle --optimizer muon --lr 0.005 --shuffle-digits 1 --shift 2"
    call(data_dir, tmp_path / "whole", flags)
    stop(data_dir, tmp_path / "r", flags)
    call(data_dir, tmp_path / "r", flags + " --resume")
    assert_same_run(tmp_path / "r", tmp_path / "whole")


def test_a_run_that_goes_on_elsewhere_says_so(unfinished, data_dir, monkeypatch, capsys):
    monkeypatch.setattr(train, "device_name", lambda device: "another CPU")
    call(data_dir, unfinished, "--resume")
    assert "does not go on to the same bits" in capsys.readouterr().err
    assert json.loads((unfinished / "args.json").read_text())["hardware"].endswith(", then another CPU")


def test_kill_minus_nine_then_resume(whole, data_dir, tmp_path, capsys):
    """While it lives, a second process is refused. The next one goes on, to the same bits."""
    out = tmp_path / "run"
    command = [sys.executable, train.__file__, *FLAGS.split(), "--data-dir", data_dir, "--out", out]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not (out / "last.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    assert "another process" in refusal(capsys, utils.sole_owner, out)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    call(data_dir, out, "--resume")
    assert_same_run(out, whole)


# ---------------------------------------------------------------- what it refuses
def test_a_finished_run_says_so_and_changes_nothing(whole, data_dir, capsys):
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in whole.iterdir()}
    for flags in ("", "--resume"):
        with pytest.raises(SystemExit) as stopped:
            call(data_dir, whole, flags)
        assert stopped.value.code == 0 and "finished" in capsys.readouterr().out
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in whole.iterdir()}


@pytest.mark.parametrize("flags, named", [("--lr 0.01", "lr 0.001 there, 0.01 here"),
                                          ("--match-prob 0.9", "match_prob None there, 0.9 here")])
def test_another_run_is_refused(whole, data_dir, capsys, flags, named):
    for resume in ("", " --resume"):
        error = refusal(capsys, call, data_dir, whole, flags + resume)
        assert "another run" in error and named in error and error.count("\n") == 1


def test_a_run_does_not_go_on_with_other_images(unfinished, capsys, tmp_path):
    write_course_folder(tmp_path / "course")
    assert "fingerprint" in refusal(capsys, call, tmp_path / "course", unfinished, "--resume")


def test_an_unfinished_run_asks_for_resume_and_takes_new_flags_defaults(unfinished, whole, data_dir, capsys):
    args = json.loads((unfinished / "args.json").read_text())
    del args["shuffle_digits"]
    (unfinished / "args.json").write_text(json.dumps(args))
    assert "--resume goes on" in refusal(capsys, call, data_dir, unfinished)
    error = refusal(capsys, call, data_dir, unfinished, "--resume --shuffle-digits 1")
    assert "shuffle_digits 0.0 there, 1.0 here" in error
    call(data_dir, unfinished, "--resume")
    assert capsys.readouterr().err == ""  # no note of another machine
    assert_same_run(unfinished, whole)


@pytest.mark.parametrize("name, damage", [("args.json", b""), ("args.json", b"[1]"), ("log.csv", b"\xff"),
                                          ("log.csv", b"<<<<<<< HEAD\nepoch,val_acc\n1,60\n")])
def test_a_damaged_run_is_named_and_kept(unfinished, data_dir, name, damage):
    (unfinished / name).write_bytes(damage)
    with pytest.raises(UserError, match="missing or damaged"):
        call(data_dir, unfinished, "--resume")
    assert (unfinished / name).read_bytes() == damage


def test_a_last_pt_that_is_missing_or_has_no_optimizer_is_named(unfinished, data_dir):
    for change in (Path.unlink, lambda path: shutil.copy(unfinished / "best.pt", path)):
        change(unfinished / "last.pt")
        with pytest.raises(UserError, match="last.pt is missing or not train.py's"):
            call(data_dir, unfinished, "--resume")


def test_a_course_folder_trains(tmp_path):
    """Without digits and without labelled test images: empty cells."""
    write_course_folder(tmp_path / "course")
    call(tmp_path / "course", tmp_path / "r", "--epochs 1 --warmup-epochs 0")
    (best,), (row,) = read_csv(tmp_path / "r" / "best.csv"), read_csv(tmp_path / "r" / "log.csv")
    assert math.isnan(best["test_acc"]) and math.isnan(row["val_acc_conflict"])
    assert not math.isnan(row["val_acc"]) and "nan" not in (tmp_path / "r" / "log.csv").read_text()


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_files(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "rate", lambda args, passed: math.nan if passed == 1 else args.lr)
    with pytest.raises(UserError, match=r"not finite from step 9 \(epoch 2\)"):
        call(data_dir, tmp_path)
    assert len(read_csv(tmp_path / "log.csv")) == 1
    assert torch.load(tmp_path / "last.pt", weights_only=True)["epoch"] == 1


# ---------------------------------------------------------------- files and flags
def test_the_users_settings_and_a_runs_name_cannot_hurt(data_dir, tmp_path):
    """TeX in a matplotlibrc, an unknown backend, a name that looks like a formula."""
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    out = tmp_path / "lr$1_$x é"
    command = [sys.executable, train.__file__, *FLAGS.split(), "--data-dir", data_dir, "--out", out]
    environment = {**os.environ, "MPLBACKEND": "unknown", "MATPLOTLIBRC": str(tmp_path), "LC_ALL": "C"}
    subprocess.run(command, env=environment, check=True)
    assert (out / "curves.png").stat().st_size > 10_000


def test_the_smallest_numbers_count_as_zero():
    tiny = torch.full((4_000_000,), 700_000, dtype=torch.int32).view(torch.float32)
    assert (tiny * 1).view(torch.int32).count_nonzero() == 0


def test_two_processes_may_write_one_file_at_once(tmp_path):
    path, other = tmp_path / "file", "import sys, utils; utils.write_text(sys.argv[1], 'theirs')"
    with utils.atomic(path) as temporary:
        Path(temporary).write_text("ours")
        subprocess.run([sys.executable, "-c", other, path], cwd=Path(utils.__file__).parent, check=True)
        assert path.read_text() == "theirs"
    assert path.read_text() == "ours" and list(tmp_path.iterdir()) == [path]


def test_a_failed_write_keeps_the_old_file(tmp_path):
    (tmp_path / "f.txt").write_text("old")
    with pytest.raises(OSError), utils.atomic(tmp_path / "f.txt") as temporary:
        Path(temporary).write_text("half of the ne")
        raise OSError("no space left on device")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("content", ["missing", "a folder", "truncated", [1, 2], {"model": {"weight": 1}},
                                     {"model": CNN().state_dict(), "code": Path()},
                                     torch.nn.Linear(2, 2).state_dict(), math.nan, -math.inf])
def test_bad_checkpoints_are_named(whole, tmp_path, content):
    path = tmp_path / "bad.pt"
    if content == "truncated":
        path.write_bytes((whole / "best.pt").read_bytes()[:-1000])
    elif content == "a folder":
        path.mkdir()
    elif isinstance(content, float):  # one weight
        torch.save({**CNN().state_dict(), "fc.bias": torch.tensor([content] * 10)}, path)
    elif content != "missing":
        torch.save(content, path)
    with pytest.raises(UserError, match="NaN or inf in fc.bias" if isinstance(content, float) else "bad.pt"):
        utils.load_weights(CNN(), utils.load_checkpoint(path), path)


@pytest.mark.parametrize("flags", [
    "--bs 0", "--bs 1.5", "--epochs 0", "--lr nan", "--lr 0", "--lr inf", "--lr-min -1",
    "--lr-min 1e-3 --lr 1e-4", "--erase 1.5", "--shift 13", "--erase-scale 0.1 0.02", "--dropout-last -1",
    "--dropout-p 2", "--noise -1", "--rotate 200", "--match-prob 1.1", "--shuffle-digits 2",
    "--label-smoothing 2", "--optimizer none", "--schedule none", "--limit 0", "--seed -1",
    "--warmup-epochs 10 --epochs 10", "--device toaster",
    "--shuffle-digits 1", "--shift 1", "--flip-picture 1", "--match-prob 0.9"
])
def test_bad_flags_exit_with_2(flags, capsys, tmp_path):
    """A wrong value, or, in the last line, one that cannot act on these data."""
    write_course_folder(tmp_path / "course", size=32)
    error = refusal(capsys, call, tmp_path / "course", tmp_path / "run", flags)
    assert flags.split()[0] in error.splitlines()[-1]


def test_long_names_a_home_folder_and_the_length_of_the_warmup():
    args = train.parse_args("--epochs 12 --batch-size 32 --learning-rate 0.1 --data-dir ~/data".split())
    assert args.warmup_epochs == 2  # a sixth
    assert (args.bs, args.lr, args.data_dir) == (32, 0.1, os.path.expanduser("~/data"))
