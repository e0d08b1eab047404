"""The ordinary training loop, to judge train.py by: it trains the report's baseline (section 1), same images.

    python tests/ordinary.py        about an hour on 2 cores
    python tests/ordinary.py --seed 1 --out results/runs/ordinary/seed1

It is written as such loops usually are (ImageFolder, torchvision's transforms, DataLoader, torch's modules,
Adam, CosineAnnealingLR), without what makes train.py fast, but for utils.py's memory settings. The images
are data.py's, written as PNG files, which lose nothing. Writes to --out: args.json, log.csv (a row per
epoch); at the end best.csv.
"""
import argparse
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import MEAN, STD, load_splits  # noqa: E402
from utils import (add_data_dir, device_name, number, pick_device, usage_error, run, write_csv,  # noqa: E402
                   write_text)

TRAIN_EVAL = 5000  # training images that train_acc is measured on
PLAIN = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
AUGMENT = [v2.RandomHorizontalFlip(), *PLAIN]


def network(dropout=0.0):
    """The CNN of the course handout; the report's later recipes have dropout in the last three blocks."""
    net = nn.Sequential(
        nn.Conv2d(3, 16, 7, padding=3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU(), nn.Dropout(dropout), nn.MaxPool2d(2),
        nn.Conv2d(48, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Dropout(dropout), nn.MaxPool2d(2),
        nn.Conv2d(64, 80, 3, padding=1), nn.Dropout(dropout),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(80, 10))
    for layer in net:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return net


def train_epoch(model, loader, optimizer, device):
    """One pass over the training images. Returns the mean loss of the batches."""
    model.train()
    losses = []
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


@torch.no_grad()
def evaluate(model, loader, device):
    """Mean loss and accuracy in percent, in evaluation mode."""
    model.eval()
    loss, correct, n = 0.0, 0, 0
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        logits = model(images)
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        correct += (logits.argmax(1) == labels).sum().item()
        n += len(labels)
    return loss / n, 100 * correct / n


def write_images(split, folder):
    """Write a split's images as `folder`/label/index.png."""
    for label in range(10):
        Path(folder, str(label)).mkdir(parents=True)
    for i, (image, label) in enumerate(zip(split.images, split.labels.tolist())):
        v2.functional.to_pil_image(image).save(Path(folder, str(label), f"{i:05}.png"))


def make_loader(folder, transforms, bs, workers, shuffle=False):
    images = ImageFolder(folder, v2.Compose(transforms), allow_empty=True)  # --limit may leave a class empty
    return DataLoader(images, bs, shuffle=shuffle, num_workers=workers, persistent_workers=workers > 0,
                      pin_memory=torch.cuda.is_available())


def train(args, folder, device):
    """Train on the images in `folder`. Writes log.csv after every epoch, and returns its rows."""
    torch.manual_seed(args.seed)
    train_loader = make_loader(f"{folder}/train", AUGMENT, args.bs, args.workers, shuffle=True)
    train_eval_loader = make_loader(f"{folder}/train_eval", AUGMENT, args.bs, args.workers)
    val_loader = make_loader(f"{folder}/val", PLAIN, args.bs, args.workers)
    model = network().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs, eta_min=1e-5)
    log = []
    for epoch in range(1, args.epochs + 1):
        start = time.perf_counter()
        row = {"epoch": epoch, "lr": scheduler.get_last_lr()[0]}
        row["train_loss"] = train_epoch(model, train_loader, optimizer, device)
        scheduler.step()
        row["train_acc"] = evaluate(model, train_eval_loader, device)[1]
        row["val_loss"], row["val_acc"] = evaluate(model, val_loader, device)
        row["seconds"] = time.perf_counter() - start
        log.append(row)
        write_csv(Path(args.out, "log.csv"), log)
        print("  ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
    return log


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    flag, positive, default = parser.add_argument, number(int, 1), " (default: %(default)s)"
    add_data_dir(parser)
    flag("--epochs", metavar="N", type=positive, default=25, help="passes over the training images" + default)
    flag("--bs", metavar="N", type=positive, default=64, help="batch size, images" + default)
    flag("--limit", metavar="N", type=positive, help="train on the first N images only (default: all)")
    flag("--seed", metavar="N", type=number(int, 0), default=0, help="seed of all draws" + default)
    flag("--workers", metavar="N", type=number(int, 0), default=2, help="processes a DataLoader" + default)
    flag("--device", default="auto", help="auto (cuda, mps or cpu), or a torch device" + default)
    flag("--out", metavar="DIR", default="results/runs/ordinary/seed0", help="folder of results" + default)
    args = parser.parse_args()
    if Path(args.out, "log.csv").exists():
        usage_error(f"{args.out} holds a run already: delete it, or choose another --out")
    torch.set_flush_denormal(False)  # torch's own setting; utils.py changes it, for speed

    device, splits = pick_device(args.device), load_splits(args.data_dir)
    train_split = splits.train.first(args.limit)
    write_text(Path(args.out, "args.json"), json.dumps({
        "epochs": args.epochs, "bs": args.bs, "seed": args.seed, "data": splits.source,
        "train_images": len(train_split.labels), "val_images": len(splits.val.labels),
        "fingerprint": splits.fingerprint, "torch": torch.__version__, "hardware": device_name(device),
        "command": shlex.join(["python", "tests/ordinary.py", *sys.argv[1:]])}, indent=1) + "\n")
    with tempfile.TemporaryDirectory() as folder:
        write_images(train_split, f"{folder}/train")
        write_images(train_split.first(TRAIN_EVAL), f"{folder}/train_eval")
        write_images(splits.val, f"{folder}/val")
        log = train(args, folder, device)
    best = max(log, key=lambda row: row["val_acc"])
    write_csv(Path(args.out, "best.csv"), [{"epoch": best["epoch"], "val_acc": best["val_acc"]}])


if __name__ == "__main__":
    run(main)
