"""Train the CNN. The defaults are the report's final recipe (section 1.6: 73.08 % validation accuracy).

    python train.py --bs 16 --lr 1e-3 --epochs 60
    python train.py --epochs 5 --warmup-epochs 1 --limit 5000 --out results/trial
    python train.py ... --resume        go on after a stop, to the same result bit for bit

Writes to --out: args.json, log.csv (one row an epoch), steps.csv (the training loss), curves.png,
best.pt (the epoch with the best val_acc) and last.pt (what --resume needs).
"""
import argparse
import inspect
import json
import math
import os
import shlex
import sys
import time
from collections import Counter
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F

from data import Shrink, apply, augmentation, load_splits, mirror
from model import CNN, add_branches, fold
from schedules import EVERY_BATCH, SCHEDULES, make_schedule
from utils import (UserError, atomic, device_name, keep_freed_memory, load_checkpoint, load_weights, number, pick_device,
                   read_run, refuse, run, write_csv, write_text)

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import LogLocator, NullLocator  # noqa: E402

EVAL_BATCH = 100     # images a forward pass in evaluation
AHEAD = 1024         # images augmented at once, in whole batches: few, larger operations; digits are exchanged among them
TRAIN_EVAL = 5000    # training images that train_acc is measured on
WINDOW = 50          # steps averaged into one row of steps.csv, about: an epoch is cut into equal parts


def train(args):
    out = Path(args.out)
    device = pick_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream(device))  # a CUDA graph can't be recorded on the default one
    elif args.compile:
        refuse("--compile is for NVIDIA GPUs only; leave it out")
    state = claim(out, args)
    teacher = make_teacher(args.teacher, args.label_share, args.flip_picture, device, args.amp) if args.teacher else None
    splits = load_splits(args.data_dir, args.match_prob, args.data_seed)
    train_set, val_set = splits.train.first(args.limit).to(device), splits.val.to(device)
    train_eval_set = train_set.first(TRAIN_EVAL)
    augment = augmentation(args.flip, args.rotate, args.noise, args.erase, args.erase_scale, args.shuffle_digits,
                           args.shift, args.flip_picture)
    if (args.shuffle_digits or args.shift or args.flip_picture) and train_set.images.shape[2:] != (40, 40):
        raise UserError("--shuffle-digits, --shift and --flip-picture need the 40x40 composites, not images of "
                        f"{splits.source}")
    no_augment = augmentation(flip=0)
    keep_freed_memory()

    torch.backends.cudnn.deterministic = not args.compile
    torch.backends.cudnn.benchmark = args.compile  # try each convolution's algorithms, and keep the fastest
    torch.manual_seed(args.seed)
    model = CNN(args.dropout_last, args.dropout_p)
    if args.branches:
        add_branches(model)
    model.to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(args.optimizer, model, args.lr, args.weight_decay)
    schedule = make_schedule(args.schedule, optimizer, args.epochs, args.lr_min, args.warmup_epochs,
                             args.start_factor, args.step_size, args.gamma, math.ceil(len(train_set.labels) / args.bs))
    log, steps, best = [], [], -1.0
    if state:
        load_weights(model, state, out / "last.pt")
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        log, steps, best = state["log"], state["steps"], state["best_val_acc"]

    if args.overwrite:  # now, when the data are good; a half overwritten run must not look finished
        for name in ("log.csv", "last.pt", "best.pt", "steps.csv", "curves.png"):
            (out / name).unlink(missing_ok=True)
    settings = what_trains(args)
    facts = {"data": splits.source, "train_images": len(train_set.labels), "val_images": len(val_set.labels),
             "torch": torch.__version__, "hardware": device_name(device) + (", compiled" if args.compile else "")}
    if state:
        begun, here = json.loads((out / "args.json").read_text()).get("hardware", facts["hardware"]), facts["hardware"]
        facts["hardware"] = begun if begun.endswith(here) else f"{begun}, then {here}"
        if begun != facts["hardware"]:
            print(f"note: this run began on {begun}; on {here} it does not go on to the same bits", file=sys.stderr)
    write_text(out / "args.json", json.dumps({**settings, **facts}, indent=1) + "\n")
    print(f"{out}: {len(train_set.labels)} training and {len(val_set.labels)} validation images ({splits.source}), "
          f"{facts['hardware']}, torch {torch.__version__}", flush=True)

    if args.amp and device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
        print("note: this CPU has no bfloat16 instructions, so --amp is many times slower than without", file=sys.stderr)

    step = make_step(model, optimizer, args.amp, args.label_smoothing, args.compile)
    progress = Progress(args.epochs, len(train_set.labels), first_epoch=len(log) + 1)

    def after_step(i, losses):
        if args.schedule in EVERY_BATCH:
            schedule.step()
        progress.show(epoch, i, args.bs, losses)

    for epoch in range(len(log) + 1, args.epochs + 1):
        # Every draw of an epoch follows from (seed, epoch), so a resumed run needs no generator states.
        torch.manual_seed(args.seed * 1_000_000 + epoch)
        start = time.perf_counter()
        lr = float(optimizer.param_groups[0]["lr"])
        transforms = [*augment, Shrink(args.small_size)] if epoch <= args.small_epochs else augment
        model.train()
        losses = train_epoch(step, train_set, transforms, args.bs, after_step, teacher)
        if args.schedule not in EVERY_BATCH:
            schedule.step()

        losses = losses.cpu()  # waits for the device
        train_seconds = time.perf_counter() - start
        if not losses.isfinite().all():
            first = len(losses) * (epoch - 1) + int(losses.isfinite().logical_not().nonzero()[0]) + 1
            raise UserError(f"the loss is not finite from step {first} (epoch {epoch}) on; the files of the epochs "
                            f"before are kept. Try a lower --lr than {args.lr:g}")
        plain = fold(model)
        train_metrics = evaluate(plain, train_eval_set, augment, args.amp)
        val_metrics = evaluate(plain, val_set, no_augment, args.amp)
        done = len(losses) * (epoch - 1)
        for part in losses.tensor_split(max(1, round(len(losses) / WINDOW))):
            done += len(part)
            steps.append({"step": done, "epoch": epoch, "train_loss": part.mean().item()})
        log.append({
            "epoch": epoch, "step": done, "lr": lr,
            "train_loss": losses.mean().item(), "train_acc": train_metrics["acc"],
            "val_loss": val_metrics["loss"], "val_acc": val_metrics["acc"],
            "val_acc_agree": val_metrics["acc_agree"], "val_acc_conflict": val_metrics["acc_conflict"],
            "val_follows_digit": val_metrics["follows_digit"],
            "seconds": time.perf_counter() - start, "images_per_s": len(train_set.labels) / train_seconds})

        about = {"args": settings, "epoch": epoch, "classes": list(splits.classes),
                 "val_acc": val_metrics["acc"], "train_acc": train_metrics["acc"]}
        if val_metrics["acc"] > best:
            best = val_metrics["acc"]
            save(out / "best.pt", {"model": plain.state_dict(), **about})
        save(out / "last.pt", {"model": model.state_dict(), **about, "optimizer": optimizer.state_dict(),
                               "schedule": schedule.state_dict(), "log": log, "steps": steps, "best_val_acc": best})
        if epoch < args.epochs:
            write_logs(out, log, steps)
        progress.epoch_line(log[-1])

    draw_curves(log, steps, f"{out.name}: best val_acc {best:.2f} %", out / "curves.png")
    write_logs(out, log, steps)  # last of all: a log.csv with every epoch marks a finished run
    report(out, splits, device, args.amp)


def train_epoch(step, split, transforms, bs, after_step=lambda i, losses: None, teacher=None):
    """One pass over `split` in random order: gather, augment, `step`. Returns the losses of the batches, float
    [ceil(N/bs)], on the device; `after_step(i, losses)` is called after each. With a `teacher` (make_teacher) a
    step learns `teacher(images, labels)`, without one the labels."""
    order = torch.randperm(len(split.labels), device=split.labels.device)
    losses = torch.zeros(math.ceil(len(order) / bs), device=order.device)
    i = 0
    for part in order.split(bs * max(1, AHEAD // bs)):
        images, targets = apply(transforms, split.images[part]), split.labels[part]
        if teacher:
            targets = teacher(images, targets)
        for batch in zip(images.split(bs), targets.split(bs)):
            losses[i] = step(*batch)
            after_step(i, losses)
            i += 1
    return losses


def make_teacher(paths, label_share, flip_picture, device, amp=False):
    """A function of augmented images, float [N,3,H,W], and labels [N]: the probabilities [N,10] that the networks in `paths`
    give the images, mean over the networks and over an image and its mirror image (`flip_picture`: see data.mirror), and the
    labels with a share of `label_share`. Knowledge distillation (G. Hinton et al., 2015), from teachers of the same size
    (T. Furlanello et al., *Born-again neural networks*, ICML 2018)."""
    models = [CNN().to(device, memory_format=torch.channels_last) for _ in paths]
    for model, path in zip(models, paths):
        load_weights(model, load_checkpoint(path, device), path)
    views = [], [mirror(flip_picture)]

    def teacher(images, labels):
        taught = sum(predict(model, images, view, amp).softmax(1) for model in models for view in views)
        return label_share * F.one_hot(labels, 10) + (1 - label_share) * taught / (len(models) * len(views))
    return teacher


def make_optimizer(name, model, lr, weight_decay=0.0):
    """One of OPTIMIZERS: torch's that take a weight decay. On a GPU its lr is a tensor, which the schedule writes to and a
    recorded step reads from."""
    device = next(model.parameters()).device
    cuda = device.type == "cuda"
    fast = {"fused": True, "capturable": cuda}  # where it has them
    return OPTIMIZERS[name](model.parameters(), lr=torch.tensor(lr, device=device) if cuda else lr, weight_decay=weight_decay,
                            **{key: fast[key] for key in fast.keys() & inspect.signature(OPTIMIZERS[name]).parameters})


def make_step(model, optimizer, amp=False, label_smoothing=0.0, compiled=False):
    """A function `step(images, targets)`, float [N,3,H,W] and int64 labels [N] or probabilities [N,10]: forward, backward,
    Adam. It returns the loss, on the device."""
    net = torch.compile(model, dynamic=False) if compiled else model

    def step(images, targets):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
            logits = net(images)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()
    return Graphed(step) if next(model.parameters()).is_cuda else step


class Graphed:
    """`step` as a CUDA graph, one for each shape of its images: three calls run plainly, the fourth is recorded, and from
    then on a call copies its batch to where the graph reads it, and replays the graph. A step of batch 16 has some
    hundred small kernels, which take longer to launch one by one than to run. Same draws and losses as `step`."""

    def __init__(self, step, warmup=3):
        self.step, self.warmup, self.calls, self.graphs = step, warmup, Counter(), {}

    def __call__(self, *batch):
        shape = batch[0].shape
        if shape not in self.graphs:
            self.calls[shape] += 1
            if self.calls[shape] <= self.warmup:
                return self.step(*batch)
            inputs, graph = [tensor.clone() for tensor in batch], torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
                loss = self.step(*inputs)
            self.graphs[shape] = inputs, graph, loss
        inputs, graph, loss = self.graphs[shape]
        for tensor, value in zip(inputs, batch):
            tensor.copy_(value)
        graph.replay()
        return loss


class Muon(torch.optim.AdamW):
    """AdamW, but for the kernels of convolutions, whose step is their momentum (0.95, Nesterov) made orthogonal, as a
    matrix [out, in*h*w], and scaled to the size of AdamW's steps, so that lr and weight_decay mean the same (K. Jordan,
    *Muon: an optimizer for hidden layers in neural networks*, 2024; J. Liu et al., *Muon is scalable for LLM training*,
    2025). torch.optim.Muon takes matrices only, and computes in bfloat16, which most CPUs only emulate."""

    @torch.no_grad()
    def step(self, closure=None):
        kernels = [(p, p.grad, group) for group in self.param_groups for p in group["params"] if p.ndim == 4]
        for p, _, _ in kernels:
            p.grad = None  # AdamW passes by what has no gradient
        super().step(closure)
        for p, grad, group in kernels:
            if not self.state[p]:  # AdamW can't load a state without a step
                self.state[p] = {"step": torch.zeros(()), "momentum": torch.zeros_like(p)}
            momentum = self.state[p]["momentum"].lerp_(grad, 0.05)
            update = orthogonal(grad.lerp(momentum, 0.95).flatten(1))
            p.mul_(1 - group["lr"] * group["weight_decay"])
            size = 0.2 * max(update.shape) ** 0.5
            if torch.is_tensor(group["lr"]):  # on a GPU, where alpha would have to wait for it
                p.sub_(group["lr"] * size * update.view_as(p))
            else:
                p.sub_(update.view_as(p), alpha=group["lr"] * size)


def orthogonal(matrix):
    """The matrix [n,m] with its singular values brought near 1 (0.7 to 1.2), by five Newton-Schulz iterations."""
    x = matrix / matrix.norm().clamp(min=1e-7)
    x = x if len(x) <= len(x.T) else x.T
    for _ in range(5):
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.addmm(x, polynomial, x, beta=3.4445)
    return x if x.shape == matrix.shape else x.T


OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "muon": Muon}


@torch.inference_mode()
def predict(model, images, transforms, amp=False):
    """Logits, float [N,10], of uint8 images [N,3,H,W] passed through `transforms`, in evaluation mode."""
    model.eval()
    logits = []
    for part in images.split(EVAL_BATCH * 10 if images.is_cuda else EVAL_BATCH):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
            logits.append(model(apply(transforms, part)).float())
    return torch.cat(logits)


def evaluate(model, split, transforms, amp=False):
    """Loss and accuracies of `model` in evaluation mode on `split`, each image passed through `transforms`."""
    return score(predict(model, split.images, transforms, amp), split)


def score(logits, split):
    """A dict, accuracies in percent: loss, acc; and, NaN where no digits are known: acc_agree and acc_conflict, the
    accuracies where digit and label agree or conflict, and follows_digit, the share of conflicting images that are
    predicted as the digit's class."""
    predictions = logits.argmax(1)
    correct, digits = predictions == split.labels, split.digits
    agree, conflict = digits == split.labels, (digits != split.labels) & (digits >= 0)
    return {"loss": F.cross_entropy(logits, split.labels).item(), "acc": percent(correct),
            "acc_agree": percent(correct[agree]), "acc_conflict": percent(correct[conflict]),
            "follows_digit": percent((predictions == digits)[conflict])}


def percent(hits):
    """The share of True in a bool tensor, in percent; NaN where it is empty."""
    return 100 * (hits.sum().item() / len(hits)) if len(hits) else math.nan


def report(out, splits, device, amp):
    """Print the accuracies of best.pt, each with the number of images behind it."""
    checkpoint = load_checkpoint(out / "best.pt", device)
    model = CNN().to(device, memory_format=torch.channels_last)
    load_weights(model, checkpoint, out / "best.pt")
    print(f"best_epoch {checkpoint['epoch']}")
    for name in ("val", "test"):
        if split := getattr(splits, name):
            print(f"{name}_acc {evaluate(model, split.to(device), augmentation(flip=0), amp)['acc']:.2f} "
                  f"({len(split.labels)} images)")


# ---------------------------------------------------------------- files
def what_trains(args):
    """The flags that decide the result; where it is computed and written is left out."""
    return {key: value for key, value in vars(args).items()
            if key not in ("out", "data_dir", "device", "compile", "resume", "overwrite")}


def differing(there, args):
    """The settings in which a run's args.json, `there`, is not what `args` ask for: {flag: (value there, value here)}."""
    there = {**what_trains(parse_args([])), **there}  # a flag that is newer than the run had its default
    return {key: (there[key], value) for key, value in what_trains(args).items() if there[key] != value}


def claim(out, args):
    """Look at what `out` holds. Returns the state to resume from, or None for a fresh start; exits where the run is
    finished (0) or where another run's results would be lost (2)."""
    if args.overwrite or not ((out / "log.csv").exists() or (out / "last.pt").exists()):
        return None
    there, log = read_run(out)
    if others := differing(there, args):
        others = "; ".join(f"{key} {value} there, {asked} here" for key, (value, asked) in others.items())
        refuse(f"{out} holds another run ({others}): choose another --out, or --overwrite")
    if len(log) == args.epochs:
        best = max(log, key=lambda row: row["val_acc"])
        print(f"{out} is finished: {args.epochs} epochs, best val_acc {best['val_acc']:.2f} in epoch "
              f"{best['epoch']:.0f}. --overwrite trains it again, --out elsewhere")
        sys.exit(0)
    if not args.resume:
        refuse(f"{out} holds {len(log)} of {args.epochs} epochs of this run: --resume goes on, --overwrite starts again")
    if not (out / "last.pt").exists():
        raise UserError(f"{out / 'last.pt'} is missing, so this run cannot go on; --overwrite starts it again")
    state = load_checkpoint(out / "last.pt", pick_device(args.device))
    if lacks := {"optimizer", "schedule", "log", "steps", "best_val_acc"} - state.keys():
        raise UserError(f"{out / 'last.pt'} is not train.py's: it has no {', '.join(sorted(lacks))}; --overwrite starts again")
    return state


def save(path, checkpoint):
    try:
        with atomic(path) as temporary:
            torch.save(checkpoint, temporary)
    except RuntimeError as error:  # torch's word for a failed write
        raise UserError(f"{path} could not be written, is the disk full? The old file is kept ({error})") from None


def write_logs(out, log, steps):
    write_csv(out / "steps.csv", steps)
    write_csv(out / "log.csv", log)


def draw_curves(log, steps, title, path):
    """The report's kind of figure: losses on a log axis over the steps, accuracies below."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 6.5), sharex=True, layout="constrained")
    figure.suptitle(title)
    ends = [row["step"] for row in log]
    top.semilogy([row["step"] for row in steps], [row["train_loss"] for row in steps], color="C0", alpha=0.6, lw=0.8,
                 label=f"training (mean of {WINDOW} steps)")
    top.semilogy(ends, [row["val_loss"] for row in log], color="C1", marker=".", label="validation")
    top.set_ylabel("cross-entropy loss")
    bottom.plot(ends, [row["train_acc"] for row in log], color="C0", marker=".", label="training (augmented images)")
    bottom.plot(ends, [row["val_acc"] for row in log], color="C1", marker=".", label="validation")
    bottom.set(xlabel="step", ylabel="accuracy (%)")
    top.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))  # as many labels as there is room for
    top.yaxis.set_major_formatter("{x:g}")
    top.yaxis.set_minor_locator(NullLocator())
    for axis, corner in ((top, "best"), (bottom, "lower right")):  # away from the curves
        axis.grid(alpha=0.3)
        axis.legend(loc=corner)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)


class Progress:
    """On a terminal one line that is written over and over; elsewhere one plain line an epoch."""

    def __init__(self, epochs, images, first_epoch):
        self.epochs, self.images, self.first_epoch = epochs, images, first_epoch
        self.start = self.shown = time.perf_counter()
        self.live = sys.stderr.isatty()

    def show(self, epoch, step, bs, losses):
        now = time.perf_counter()
        if not self.live or now - self.shown < 0.5:
            return
        self.shown = now
        loss = losses[step].item()  # waits for the device, twice a second at most
        done = min((step + 1) * bs, self.images) / self.images
        rate = (epoch - self.first_epoch + done) / (time.perf_counter() - self.start)  # epochs a second
        left = int((self.epochs - epoch + 1 - done) / rate)
        print(f"\r\033[Kepoch {epoch}/{self.epochs}  step {step + 1}/{len(losses)}  loss {loss:.3f}  "
              f"{rate * self.images:.0f} images/s  {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left",
              end="", file=sys.stderr, flush=True)

    def epoch_line(self, row):
        if self.live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        print(f"epoch {row['epoch']}/{self.epochs}  lr {row['lr']:.2e}  train_loss {row['train_loss']:.4f}  "
              f"train_acc {row['train_acc']:.2f}  val_loss {row['val_loss']:.4f}  val_acc {row['val_acc']:.2f}  "
              f"{row['seconds']:.1f} s  {row['images_per_s']:.0f} images/s", flush=True)


# ---------------------------------------------------------------- command line
def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)

    def flag(name, help, **options):
        if "type" in options:
            options.setdefault("metavar", "N" if options["type"].__name__ == "int" else "X")
        shown = " (default: %(default)s)" if options.get("default") is not None else ""
        parser.add_argument(name, help=help + shown, **options)

    positive, share, amount = number(int, 1), number(float, 0, 1), number(float, 0)
    flag("--bs", "batch size, images", type=positive, default=16)
    flag("--epochs", "passes over the training images", type=positive, default=60)
    flag("--lr", "learning rate, at its highest", type=number(float, 0, open_low=True), default=1e-3)
    flag("--lr-min", "learning rate at the end of cosine, warmup_cosine and onecycle", type=amount, default=1e-5)
    flag("--optimizer", "adam (weight decay as L2 in the gradient), adamw (decoupled), or muon (adamw, with the steps of\n"
         "the convolutions made orthogonal)", choices=OPTIMIZERS, metavar="NAME", default="adam")
    flag("--weight-decay", "weight decay", type=amount, default=1e-3)
    flag("--schedule", "learning-rate schedule: " + ", ".join(SCHEDULES), choices=SCHEDULES, metavar="NAME",
         default="warmup_cosine")
    flag("--warmup-epochs", "epochs of linear warm-up in warmup_cosine", type=number(int, 0), default=10)
    flag("--start-factor", "the warm-up of warmup_cosine and onecycle starts at this share of --lr",
         type=number(float, 0, 1, open_low=True), default=0.1)
    flag("--step-size", "epochs between the steps of step", type=positive, default=20)
    flag("--gamma", "factor on the learning rate at each step of step", type=number(float, 0, 1, open_low=True), default=0.1)
    flag("--flip", "probability of a horizontal flip, digit included", type=share, default=0.5)
    flag("--rotate", "rotation by up to this many degrees", type=number(float, 0, 180), default=0.0)
    flag("--noise", "standard deviation of GaussianNoise, in units of normalized images", type=amount, default=0.05)
    flag("--erase", "probability of RandomErasing", type=share, default=0.3)
    flag("--erase-scale", "lowest and highest share of the image that is erased", type=share, nargs=2,
         metavar=("LOW", "HIGH"), default=[0.02, 0.05])
    flag("--shuffle-digits", "probability that an image's digit is exchanged for another image's, among the\n"
         "1024 that are augmented at once; breaks the shortcut", type=share, default=0.0)
    flag("--shift", "the picture, not the digit, moves by up to N pixels each way", type=number(int, 0, 12), default=0)
    flag("--flip-picture", "probability that the picture, not the digit, is mirrored where it is; use it with --flip 0",
         type=share, default=0.0)
    flag("--small-epochs", "train the first N epochs on images shrunk to --small-size: faster", type=number(int, 0), default=0)
    flag("--small-size", "height and width of those images, pixels", type=number(int, 8), default=24)
    flag("--label-smoothing", "share of the target that is spread over all classes", type=share, default=0.0)
    flag("--branches", "train the first four convolutions with a 1x1 convolution and a batch norm beside each, which are folded\n"
         "into them in best.pt: the same network", action="store_true")
    flag("--teacher", "best.pt of one or more finished runs: their probabilities, mean over the runs and over an image and its\n"
         "mirror image, are learned in place of the labels", nargs="+", metavar="CKPT")
    flag("--label-share", "share that the labels keep in what is learned from a --teacher", type=share, default=0.0)
    flag("--dropout-last", "dropout after the last N convolutional blocks, 0 to 5", type=number(int, 0, 5), default=3)
    flag("--dropout-p", "probability of dropout", type=share, default=0.1)
    flag("--match-prob", "probability that a training digit is set to the label's index;\nelse it is uniform",
         type=share, default=0.6)
    flag("--limit", "train on the first N training images only (default: all)", type=positive)
    flag("--seed", "seed of weights, order, augmentation and dropout", type=number(int, 0, 10**9), default=0)
    flag("--data-seed", "seed of the splits and of which digit meets which image", type=number(int, 0, 10**9), default=0)
    flag("--data-dir", "folder of the data, see data.py; $DATA_DIR sets the default", metavar="DIR",
         default=os.environ.get("DATA_DIR", "data"))
    flag("--out", "folder of the results", metavar="DIR", default="results/final")
    flag("--device", "auto (cuda, mps or cpu), or a torch device", default="auto")
    flag("--amp", "bfloat16 autocast (slower than without on a CPU that lacks its instructions)", action="store_true")
    flag("--compile", "on a GPU: torch.compile the network, and let cudnn try its algorithms: half as fast again, after half\n"
         "a minute; not the same bits twice", action="store_true")
    flag("--resume", "go on from last.pt in --out (start, where there is none)", action="store_true")
    flag("--overwrite", "start again, whatever --out holds", action="store_true")
    args = parser.parse_args(argv)
    if args.schedule == "warmup_cosine" and args.warmup_epochs >= args.epochs:
        parser.error(f"--warmup-epochs {args.warmup_epochs} must be fewer than --epochs {args.epochs}")
    if args.label_share and not args.teacher:
        parser.error("--label-share needs a --teacher; without one the labels are all that is learned")
    if args.teacher and args.small_epochs:
        parser.error("--teacher and --small-epochs exclude each other: a teacher knows images of full size only")
    if args.erase_scale[0] > args.erase_scale[1]:
        parser.error("--erase-scale takes the lower share first")
    if args.resume and args.overwrite:
        parser.error("--resume and --overwrite exclude each other")
    return args


def main():
    try:
        train(parse_args())
    except KeyboardInterrupt:
        flags = [word for word in sys.argv if word not in ("--resume", "--overwrite")]
        print(f"\ninterrupted; finished epochs are saved. Go on with: python {shlex.join(flags)} --resume", file=sys.stderr)
        sys.exit(130)
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        sys.exit(f"error: torch.compile failed, leave --compile out ({str(error).strip().splitlines()[0]})")


if __name__ == "__main__":
    run(main)
