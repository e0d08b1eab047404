"""Train the CNN. The defaults are the report's final recipe (section 1.6).

    python train.py --bs 16 --lr 1e-3 --epochs 60
    python train.py --epochs 2 --limit 5000 --out results/trial/quick
    python train.py ... --resume        go on after a stop, to the same result

Writes to --out: args.json, log.csv (a row per epoch), steps.csv (the training
loss), best.pt (the epoch with the best val_acc), last.pt (what --resume needs);
at the end best.csv (best.pt's accuracies) and curves.png.
"""
import argparse
import json
import math
import os
import shlex
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from data import augment, load_splits
from model import CNN
from schedules import EVERY_BATCH, OPTIMIZERS, SCHEDULES, learning_rate, make_optimizer, set_learning_rate
from utils import (GraphedStep, UserError, add_data_dir, device_name, load_checkpoint, load_weights, number,
                   pick_device, pyplot, read_run, run, save_checkpoint, save_figure, sole_owner, usage_error,
                   write_csv, write_text)

EVAL_BATCH = 100      # images per forward pass in evaluation
AUGMENT_CHUNK = 1024  # images augmented at once, in whole batches; digits are exchanged among them
TRAIN_EVAL = 5000     # training images that train_acc is measured on
STEPS_PER_ROW = 50    # about so many steps are averaged into a row of steps.csv


def train(args):
    out, device = Path(args.out), pick_device(args.device)
    print(f"{out}: loading the images of {args.data_dir}", flush=True)
    splits = load_splits(args.data_dir, args.match_prob)
    settings = {**result_flags(args), "fingerprint": splits.fingerprint}
    state = resume_state(out, settings, args.resume, device)
    train_set, val_set = splits.train.first(args.limit).to(device), splits.val.to(device)
    transform = augmentation_of(args, train_set)

    torch.backends.cudnn.deterministic = not args.compile
    torch.backends.cudnn.benchmark = args.compile  # try each convolution's algorithms, and keep the fastest
    torch.manual_seed(args.seed)
    model = CNN(args.dropout_last, args.dropout_p, args.init).to(device, memory_format=torch.channels_last)
    net = torch.compile(model, dynamic=False) if args.compile else model
    optimizer = make_optimizer(args.optimizer, model, args.lr, args.weight_decay)
    log, steps, best = [], [], -1.0
    if state:
        load_weights(model, state, out / "last.pt")
        groups = optimizer.state_dict()["param_groups"]  # those of this device: on a GPU lr is a tensor
        optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        log, steps, best = state["log"], state["steps"], state["best_val_acc"]
    write_args(out, args, settings, splits, device, resumed=bool(state))

    run_step, live = GraphedStep(), sys.stderr.isatty()
    for epoch in range(len(log) + 1, args.epochs + 1):
        # Every draw of an epoch follows from (seed, epoch), so a resumed run needs no generator states.
        torch.manual_seed(args.seed * 1_000_000 + epoch)
        start = time.perf_counter()
        losses = train_epoch(net, optimizer, train_set, transform, args, epoch, run_step, live).cpu()
        train_seconds = time.perf_counter() - start
        steps += step_rows(losses, epoch)
        train_acc = evaluate(model, train_set.first(TRAIN_EVAL), transform, args.amp)["acc"]
        val = {f"val_{key}": value for key, value in evaluate(model, val_set, amp=args.amp).items()}
        row = {"epoch": epoch, "step": steps[-1]["step"], "lr": rate(args, epoch - 1),
               "train_loss": losses.mean().item(), "train_acc": train_acc, **val,
               "seconds": time.perf_counter() - start, "images_per_s": len(train_set.labels) / train_seconds}
        log.append(row)

        checkpoint = {"model": model.state_dict(), "args": settings, "epoch": epoch,
                      "val_acc": val["val_acc"]}
        if val["val_acc"] > best:
            best = val["val_acc"]
            save_checkpoint(out / "best.pt", checkpoint)
        write_csv(out / "steps.csv", steps)
        write_csv(out / "log.csv", log)
        save_checkpoint(out / "last.pt", {**checkpoint, "optimizer": optimizer.state_dict(), "log": log,
                                          "steps": steps, "best_val_acc": best})
        print(f"{out}: epoch {epoch}/{args.epochs}  lr {row['lr']:.2e}  train_loss {row['train_loss']:.4f}  "
              f"train_acc {train_acc:.2f}  val_loss {val['val_loss']:.4f}  val_acc {val['val_acc']:.2f}  "
              f"{row['seconds']:.1f} s  {row['images_per_s']:.0f} images/s", flush=True)
    finish(out, args, splits, log, steps, model, device)


def train_epoch(model, optimizer, split, transform, args, epoch, run_step, live=False):
    """One pass over `split` in random order, through `transform`. Returns the loss of each batch, float
    [ceil(N/bs)]. With `live` a line on the terminal is written over and over."""
    def step(images, labels):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=args.amp):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=args.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    model.train()
    order = torch.randperm(len(split.labels), device=split.labels.device)
    losses = torch.zeros(math.ceil(len(order) / args.bs), device=order.device)
    i = 0
    for part in order.split(args.bs * max(1, AUGMENT_CHUNK // args.bs)):
        images, labels = transform(split.images[part]), split.labels[part]
        for batch in zip(images.split(args.bs), labels.split(args.bs)):
            passed = epoch - 1 + (i / len(losses) if args.schedule in EVERY_BATCH else 0)
            set_learning_rate(optimizer, rate(args, passed))
            losses[i] = run_step(step, *batch)  # step(*batch), as a CUDA graph on a GPU
            i += 1
            if live and i % 50 == 0:
                print(f"\r\033[Kepoch {epoch}/{args.epochs}  step {i}/{len(losses)}  "
                      f"loss {losses[i - 1]:.3f}", end="", file=sys.stderr, flush=True)
    if live:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    return losses


def step_rows(losses, epoch):
    """An epoch's rows of steps.csv, means of STEPS_PER_ROW losses. UserError where one is not finite."""
    done, rows = len(losses) * (epoch - 1), []
    if not losses.isfinite().all():
        first = done + int(losses.isfinite().int().argmin()) + 1
        raise UserError(f"the loss is not finite from step {first} (epoch {epoch}) on: try a lower --lr. The "
                        "files of the epochs before are kept")
    for part in losses.tensor_split(max(1, round(len(losses) / STEPS_PER_ROW))):
        done += len(part)
        rows.append({"step": done, "epoch": epoch, "train_loss": part.mean().item()})
    return rows


def rate(args, passed):
    """The learning rate when so many epochs have passed."""
    return learning_rate(args.schedule, passed, args.epochs, args.lr, args.lr_min, args.warmup_epochs)


def augmentation_of(args, split):
    """data.augment with the settings of the flags; exits with 2 where they need composites and `split` has
    other images."""
    if (args.shuffle_digits or args.shift or args.flip_picture) and split.images.shape[2:] != (40, 40):
        usage_error("--shuffle-digits, --shift and --flip-picture need 40x40 composites")
    return partial(augment, flip=args.flip, rotate=args.rotate, noise=args.noise, erase=args.erase,
                   erase_scale=args.erase_scale, shuffle_digits=args.shuffle_digits, shift=args.shift,
                   flip_picture=args.flip_picture)


# ---------------------------------------------------------------- evaluation
@torch.inference_mode()
def predict(model, images, transform=augment, amp=False):
    """Logits, float [N,10], of uint8 images [N,3,H,W] passed through `transform`, in evaluation mode."""
    model.eval()
    logits = []
    for part in images.split(EVAL_BATCH * 10 if images.is_cuda else EVAL_BATCH):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
            logits.append(model(transform(part)).float())
    return torch.cat(logits)


def evaluate(model, split, transform=augment, amp=False):
    """Loss and accuracies (see score) of `model` in evaluation mode on `split` through `transform`."""
    return score(predict(model, split.images, transform, amp), split)


def score(logits, split):
    """A dict, accuracies in percent: loss, acc; and, NaN where no digits are known: acc_agree and
    acc_conflict, the accuracies where digit and label agree or conflict, and follows_digit, the share of
    conflicting images that are predicted as the digit's class."""
    predictions = logits.argmax(1)
    correct, digits = predictions == split.labels, split.digits
    agree, conflict = digits == split.labels, (digits != split.labels) & (digits >= 0)
    return {"loss": F.cross_entropy(logits, split.labels).item(), "acc": percent(correct),
            "acc_agree": percent(correct[agree]), "acc_conflict": percent(correct[conflict]),
            "follows_digit": percent((predictions == digits)[conflict])}


def percent(hits):
    """The share of True in a bool tensor, in percent; NaN where it is empty."""
    return 100 * (hits.sum().item() / len(hits)) if len(hits) else math.nan


# ---------------------------------------------------------------- a run's files
def result_flags(args):
    """The flags that decide the result, without those that say where and how it is computed."""
    return {key: value for key, value in vars(args).items()
            if key not in ("command", "out", "data_dir", "device", "compile", "resume")}


def resume_state(out, settings, resume, device):
    """Look at what `out` holds. Returns last.pt to go on from, or None for a fresh start. Exits with 0 where
    the run is finished, with 2 where it is another run or --resume was not given. UserError: bad last.pt."""
    if not ((out / "log.csv").exists() or (out / "last.pt").exists()):
        return None
    stored, log = read_run(out)
    stored = {**result_flags(parse_args([])), **stored}  # a flag that is newer than the run had its default
    others = [f"{key} {stored.get(key)} there, {value} here"
              for key, value in settings.items() if stored.get(key) != value]
    if others:
        usage_error(f"{out} holds another run ({'; '.join(others)}): choose another --out, or delete it")
    again = f"to start again, delete {out}"
    if (out / "best.csv").exists() and len(log) == settings["epochs"]:
        best = max(log, key=lambda row: row["val_acc"])
        print(f"{out} is finished: {len(log)} epochs, best val_acc {best['val_acc']:.2f} in epoch "
              f"{best['epoch']:.0f}; {again}, or choose another --out")
        sys.exit(0)
    if not resume:
        usage_error(f"{out} holds {len(log)} epochs of {settings['epochs']}: --resume goes on; {again}")
    if len(log) == 1 and not (out / "last.pt").exists():
        return None  # it was stopped between the two files of its first epoch
    state = load_checkpoint(out / "last.pt", device) if (out / "last.pt").exists() else {}
    if "optimizer" not in state:
        raise UserError(f"{out / 'last.pt'} is missing or not train.py's, so this run cannot go on; {again}")
    return state


def write_args(out, args, settings, splits, device, resumed):
    """Write args.json, and print the images and the machine."""
    hardware = device_name(device) + (", compiled" if args.compile else "")
    if resumed:
        begun = read_run(out)[0].get("hardware", hardware)
        if not begun.endswith(hardware):
            print(f"note: this run began on {begun}: it does not go on to the same bits", file=sys.stderr)
        hardware = begun if begun.endswith(hardware) else f"{begun}, then {hardware}"
    facts = {"command": args.command, "data": splits.source,
             "train_images": min(len(splits.train.labels), args.limit or math.inf),
             "val_images": len(splits.val.labels), "torch": torch.__version__, "hardware": hardware}
    write_text(out / "args.json", json.dumps({**settings, **facts}, indent=1) + "\n")
    print(f"{out}: {facts['train_images']} training and {facts['val_images']} validation images "
          f"({splits.source}), {hardware}, torch {torch.__version__}", flush=True)
    if args.amp and device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
        print("note: this CPU has no bfloat16 instructions: --amp is many times slower", file=sys.stderr)


def finish(out, args, splits, log, steps, model, device):
    """Measure best.pt on the test images, write best.csv (it marks a finished run) and draw the curves."""
    checkpoint = load_checkpoint(out / "best.pt", device)
    load_weights(model, checkpoint, out / "best.pt")
    best = {"epoch": checkpoint["epoch"], "val_acc": checkpoint["val_acc"], "test_acc": math.nan,
            "test_images": 0}
    if splits.test:
        best["test_images"] = len(splits.test.labels)
        best["test_acc"] = evaluate(model, splits.test.to(device), amp=args.amp)["acc"]
    print(f"{out}: best epoch {best['epoch']}, val_acc {best['val_acc']:.2f}, "
          f"test_acc {best['test_acc']:.2f} ({best['test_images']} images)")
    title = f"{out.parent.name}/{out.name}, {splits.source}: best val_acc {best['val_acc']:.2f} %"
    draw_curves(log, steps, title, out / "curves.png")
    write_csv(out / "best.csv", [best])


def draw_curves(log, steps, title, path):
    """The report's kind of figure: losses on a log axis over the steps, accuracies below."""
    plt = pyplot()
    from matplotlib.ticker import LogLocator, NullLocator
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 7.5), sharex=True, layout="constrained")
    figure.suptitle(title)
    ends = [row["step"] for row in log]
    top.semilogy([row["step"] for row in steps], [row["train_loss"] for row in steps], color="C0", alpha=0.6,
                 lw=0.8, label=f"training (mean of about {STEPS_PER_ROW} steps)")
    top.semilogy(ends, [row["val_loss"] for row in log], color="C1", marker=".", label="validation")
    top.set_ylabel("cross-entropy loss")
    bottom.plot(ends, [row["train_acc"] for row in log], color="C0", marker=".",
                label="training (augmented images)")
    bottom.plot(ends, [row["val_acc"] for row in log], color="C1", marker=".", label="validation")
    bottom.set(xlabel="step", ylabel="accuracy (%)")
    top.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    top.yaxis.set_major_formatter("{x:g}")
    top.yaxis.set_minor_locator(NullLocator())
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
        axis.legend()
    save_figure(figure, path)


# ---------------------------------------------------------------- command line
def parse_args(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)

    def flag(*names, help, **options):
        if "type" in options:
            options.setdefault("metavar", "N" if options["type"].__name__ == "int" else "X")
        shown = " (default: %(default)s)" if options.get("default") is not None else ""
        group.add_argument(*names, help=help + shown, **options)

    positive, share, amount = number(int, 1), number(float, 0, 1), number(float, 0)
    group = parser.add_argument_group("the report's recipe")
    flag("--bs", "--batch-size", type=positive, default=16, help="batch size, images")
    flag("--epochs", type=positive, default=60, help="passes over the training images")
    flag("--lr", "--learning-rate", type=number(float, 1e-9), default=1e-3,
         help="learning rate, at its highest")
    flag("--lr-min", type=amount, default=1e-5,
         help="learning rate at the end of cosine, warmup_cosine and onecycle")
    flag("--weight-decay", type=amount, default=1e-3,
         help="weight decay: L2 in the gradient with adam, else decoupled")
    flag("--schedule", choices=SCHEDULES, metavar="NAME", default="warmup_cosine",
         help=f"learning-rate schedule: {', '.join(SCHEDULES)}")
    flag("--warmup-epochs", type=number(int, 0),
         help="epochs of linear warm-up in warmup_cosine (default: a sixth of --epochs)")
    flag("--flip", type=share, default=0.5, help="probability of a horizontal flip, digit included")
    flag("--rotate", type=number(float, 0, 180), default=0.0, help="rotate by up to X degrees each way")
    flag("--noise", type=amount, default=0.05,
         help="standard deviation of GaussianNoise, in units of normalized images")
    flag("--erase", type=share, default=0.3, help="probability of RandomErasing")
    flag("--erase-scale", type=share, nargs=2, metavar=("LOW", "HIGH"), default=[0.02, 0.05],
         help="lowest and highest share of the image that is erased")
    flag("--dropout-last", type=number(int, 0, 5), default=3,
         help="dropout after the last N convolutional blocks, 0 to 5")
    flag("--dropout-p", type=share, default=0.1, help="probability of dropout")
    flag("--init", choices=("fan_in", "fan_out"), metavar="NAME", default="fan_in",
         help="initial weights: Kaiming normal with fan_in or with fan_out")

    group = parser.add_argument_group("beyond the report")
    flag("--optimizer", choices=OPTIMIZERS, metavar="NAME", default="adam",
         help=f"{', '.join(OPTIMIZERS)}; muon is adamw, but with orthogonal steps for convolutions")
    flag("--shuffle-digits", type=share, default=0.0,
         help="probability that an image swaps digits with other training images: digits then no longer tell "
              "the label")
    flag("--shift", type=number(int, 0, 12), default=0,
         help="the CIFAR-10 image, not the digit, moves by up to N pixels each way")
    flag("--flip-picture", type=share, default=0.0,
         help="probability that the CIFAR-10 image is mirrored, and the digit is not; use it with --flip 0")
    flag("--label-smoothing", type=share, default=0.0,
         help="share of the target that is spread over all classes")

    group = parser.add_argument_group("data")
    add_data_dir(group)
    flag("--match-prob", type=share,
         help="draw the training digits anew: with probability X the digit is the label, else it is random "
              "(default: the report's digits, which were drawn with 0.6)")
    flag("--limit", type=positive, help="train on the first N training images only (default: all)")

    group = parser.add_argument_group("files and machine")
    flag("--seed", type=number(int, 0, 10**9), default=0,
         help="seed of weights, order, augmentation and dropout")
    flag("--out", metavar="DIR", type=os.path.expanduser, default="results/run", help="folder of the results")
    flag("--resume", action="store_true", help="go on from last.pt in --out; start if --out is empty")
    flag("--device", default="auto", help="auto (cuda, mps or cpu), or a torch device")
    flag("--amp", action="store_true",
         help="compute in bfloat16 (much slower on a CPU that has no bfloat16 instructions)")
    flag("--compile", action="store_true",
         help="torch.compile the network: faster on a GPU after half a minute, but not the same bits twice")
    args = parser.parse_args(argv)
    if args.warmup_epochs is None:
        args.warmup_epochs = args.epochs // 6
    if args.schedule == "warmup_cosine" and args.warmup_epochs >= args.epochs:
        parser.error(f"--warmup-epochs {args.warmup_epochs} must be fewer than --epochs {args.epochs}")
    if args.schedule not in ("constant", "step") and args.lr_min > args.lr:
        parser.error(f"--lr-min {args.lr_min} must not be above --lr {args.lr}")
    if args.erase_scale[0] > args.erase_scale[1]:
        parser.error("--erase-scale takes the lower share first")
    typed = [word for word in argv if word not in ("--resume", "--compile")]
    args.command = shlex.join(["python", "train.py", *typed])
    return args


def main():
    args = parse_args()
    sole_owner(Path(args.out))
    train(args)


if __name__ == "__main__":
    run(main)
