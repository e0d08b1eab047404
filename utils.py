"""What the scripts share: one-line errors, argument types, files that are never half written, checkpoints."""
import argparse
import contextlib
import csv
import ctypes
import json
import math
import os
import platform
import sys

import torch

# Weight decay draws the weights of a filter that has died towards 0, and below 1e-38 a CPU is many times slower: an epoch
# can take three times as long. So such numbers count as 0. Here, since threads take this over from the one that makes them.
torch.set_flush_denormal(True)


class UserError(Exception):
    """Bad data or a run that cannot go on: `run` prints it as one line and exits with status 1."""


def run(main):
    """Call `main()`; turn what a user can cause (bad data, a full disk, Ctrl-C) into one line and an exit code."""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error.strerror or error}: {error.filename or 'while writing'}")
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


def refuse(message):
    """What was asked for cannot be done: one line, exit status 2, as argparse does for a bad flag."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


# ---------------------------------------------------------------- arguments
def number(kind, low, high=math.inf, open_low=False):
    """An argparse type: a finite `kind` (int or float) in [low, high], or in (low, high] with `open_low`."""
    def parse(text):
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)) or (open_low and value == low):
            raise argparse.ArgumentTypeError(f"{text} is not {'above' if open_low else 'at least'} {low}"
                                             + (f" and at most {high}" if high < math.inf else ""))
        return value
    parse.__name__ = kind.__name__  # argparse says "invalid int value: 'x'"
    return parse


def pick_device(name):
    """The torch.device for `--device`; "auto" takes cuda, then mps, then cpu. Exits 2 where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError):
        refuse(f"there is no device '{name}' here; --device cpu always works")
    return torch.device(name)


def device_name(device):
    """The hardware behind a number, for people: 'AMD EPYC, 2 threads' or 'NVIDIA H100'."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        cpu = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), cpu)
    return f"{cpu}, {torch.get_num_threads()} threads" if device.type == "cpu" else f"{cpu}, {device.type}"


def keep_freed_memory():
    """Have the C library (glibc) keep what a training step frees, for the next step. Else it hands the large blocks back to
    the system and gets them again page by page, which takes a tenth of a step on a CPU. Elsewhere it does nothing."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(option, 2**30)


# ---------------------------------------------------------------- files
@contextlib.contextmanager
def atomic(path):
    """Yields a temporary path beside `path`; renames it onto `path` only if the block succeeds."""
    path = os.fspath(path)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    stem, ext = os.path.splitext(path)
    temporary = f"{stem}.{os.getpid()}.tmp{ext}"  # savefig goes by the extension
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


def write_text(path, text):
    with atomic(path) as temporary, open(temporary, "w") as file:
        file.write(text)


def write_csv(path, rows):
    """A list of dicts with the same keys, as CSV; floats in 6 significant digits, NaN as an empty cell."""
    def cell(value):
        return "" if value != value else f"{value:.6g}" if isinstance(value, float) else value
    with atomic(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(rows[0])
        writer.writerows([cell(value) for value in row.values()] for row in rows)


def read_csv(path):
    """The rows of a CSV as dicts; cells that are numbers become floats, empty ones NaN."""
    def value(text):
        try:
            return float(text or "nan")
        except ValueError:
            return text
    with open(path, newline="") as file:
        return [{key: value(text) for key, text in row.items()} for row in csv.DictReader(file)]


def read_run(folder):
    """What train.py wrote into `folder`, a Path: args.json, a dict, and log.csv, a dict of floats an epoch, none before the
    first. UserError where either is damaged, or args.json missing."""
    try:
        args = json.loads((folder / "args.json").read_text())
        log = read_csv(folder / "log.csv") if (folder / "log.csv").exists() else []
        good = {"epochs", "data"} <= args.keys() and all(
            "val_acc" in row and all(isinstance(value, float) for value in row.values()) for row in log)
    except (FileNotFoundError, ValueError, TypeError, AttributeError):
        good = False
    if not good:
        raise UserError(f"args.json or log.csv in {folder} is missing or damaged: restore them, or train the run again "
                        "(--overwrite)")
    return args, log


def load_checkpoint(path, device="cpu"):
    """A file written by train.py, or a bare state dict, read with `weights_only=True`: code in it is refused."""
    if not os.path.isfile(path):
        raise UserError(f"{path} not found; train.py writes best.pt and last.pt into its --out folder")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise UserError(f"{path} is not a checkpoint of this network: truncated, or not only weights "
                        f"({type(error).__name__})") from None
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint or a state dict")
    return checkpoint if "model" in checkpoint else {"model": checkpoint}


def load_weights(model, checkpoint, path):
    """Put a checkpoint's weights into `model`; a file of another network is named, with the first difference."""
    try:
        model.load_state_dict(checkpoint["model"])
    except (RuntimeError, TypeError, AttributeError) as error:
        if "conv1x1" in str(error):
            raise UserError(f"{path} holds a network with --branches; take the best.pt beside it, where they are folded") from None
        detail = str(error).strip().splitlines()
        raise UserError(f"{path} holds another network than model.py: {detail[-1].strip() if detail else ''}") from None
