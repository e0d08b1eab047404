"""What the scripts share: one-line errors, argument types, the device, files, checkpoints, the CUDA graph."""
import argparse
import contextlib
import csv
import ctypes
import json
import os
import platform
import sys

import torch

# Weight decay drives the weights of a dead filter below 1e-38. A CPU is many times slower with such numbers,
# so they count as 0. This is set here, before torch starts its threads.
torch.set_flush_denormal(True)

# The C library returns to the system what a step frees, and the next step waits to get it back. Here it
# keeps all blocks of up to 32 MB. This makes training on a CPU faster.
with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library than glibc
    ctypes.CDLL(None).mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
    ctypes.CDLL(None).mallopt(-3, 2**25)  # M_MMAP_THRESHOLD


# ---------------------------------------------------------------- errors
class UserError(Exception):
    """Bad data, or a run that cannot go on: `run` prints it as one line and exits with status 1."""


def run(main):
    """Call `main()`; turn what a user can cause (bad data, a full disk, Ctrl-C) into a line and a status."""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error.strerror or error}: {error.filename2 or error.filename or 'while writing'}")
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


def usage_error(message):
    """Print one line and exit with status 2, as argparse does: what the flags ask for cannot be done."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


# ---------------------------------------------------------------- arguments and device
def number(kind, low, high=10**9):
    """An argparse type: a `kind` (int or float) in [low, high]."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low} to {high}")
        return value
    parse.__name__ = kind.__name__  # argparse says "invalid int value: 'x'"
    return parse


def add_data_dir(parser):
    """The flag --data-dir, which every script has."""
    parser.add_argument("--data-dir", metavar="DIR", type=os.path.expanduser,
                        default=os.environ.get("DATA_DIR") or "data",
                        help="folder of the data, see README.md; $DATA_DIR sets the default "
                             "(default: %(default)s)")


def pick_device(name):
    """The torch.device for `--device`; "auto" takes cuda, mps or cpu. Exits with 2 if it is absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except Exception:  # torch raises many kinds
        usage_error(f"there is no device '{name}' here; --device cpu always works")
    device = torch.device("cpu" if name.startswith("cpu:") else name)
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream(device))  # the default stream can't record a CUDA graph
    return device


def device_name(device):
    """The hardware behind a number: 'AMD EPYC, 2 threads' or 'NVIDIA H100'."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        cpu = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), cpu)
    return f"{cpu}, {torch.get_num_threads()} threads" if device.type == "cpu" else f"{cpu}, {device.type}"


# ---------------------------------------------------------------- files
@contextlib.contextmanager
def atomic(path):
    """Yields a temporary path beside `path`; renames it onto `path` only if the block succeeds."""
    path = os.fspath(path)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = f"{path}.{os.getpid()}.tmp"  # two processes may write the same file at once
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


def sole_owner(folder):
    """Hold `folder` (a Path, made if missing) until this process ends, however it ends; exits with 2 while
    another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        usage_error(f"another process is training into {folder}: wait for it, or choose another --out")
    except (ImportError, OSError):
        pass  # Windows, or a file system without locks


def write_text(path, text):
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)


def write_csv(path, rows):
    """A list of dicts with the same keys, as CSV; floats in 6 significant digits, NaN as an empty cell."""
    def cell(value):
        return "" if value != value else f"{value:.6g}" if isinstance(value, float) else value
    with atomic(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
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
    with open(path, newline="", encoding="utf-8") as file:
        return [{key: value(text) for key, text in row.items()} for row in csv.DictReader(file)]


def read_run(folder):
    """What train.py wrote into `folder`, a Path: args.json as a dict, and log.csv as a list of one dict an
    epoch. UserError where either is damaged, or args.json is missing."""
    try:
        args = json.loads((folder / "args.json").read_text(encoding="utf-8"))
        log = read_csv(folder / "log.csv") if (folder / "log.csv").exists() else []
        good = {"epochs", "data"} <= args.keys() and all(
            "val_acc" in row and all(isinstance(value, float) for value in row.values()) for row in log)
    except (FileNotFoundError, ValueError, TypeError, AttributeError):
        good = False
    if not good:
        raise UserError(f"args.json or log.csv in {folder} is missing or damaged: restore it, or delete "
                        f"{folder} and train the run again")
    return args, log


def pyplot():
    """matplotlib's pyplot, drawing into files, whatever the user's own matplotlib settings say."""
    os.environ["MPLBACKEND"] = "agg"
    import matplotlib
    matplotlib.rcdefaults()
    matplotlib.use("agg")
    matplotlib.rcParams["text.parse_math"] = False  # a name with $ in it is no formula
    import matplotlib.pyplot as plt
    return plt


def save_figure(figure, path):
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
    pyplot().close(figure)


# ---------------------------------------------------------------- checkpoints
def save_checkpoint(path, checkpoint):
    try:
        with atomic(path) as temporary:
            torch.save(checkpoint, temporary)
    except RuntimeError as error:  # what torch raises for a failed write
        raise UserError(f"{path} could not be written, is the disk full? The old file is kept "
                        f"({error})") from None


def load_checkpoint(path, device="cpu"):
    """A file of train.py, a bare state dict, or {"state_dict": ...}: a dict whose "model" is the state dict.
    `weights_only=True` refuses code in it. UserError for anything else, and for NaN or inf in it."""
    if not os.path.isfile(path):
        raise UserError(f"there is no file {path}; train.py writes best.pt and last.pt into its --out folder")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        if "model" not in checkpoint:
            checkpoint = {"model": checkpoint.get("state_dict", checkpoint)}
        bad = [name for name, value in checkpoint["model"].items() if not value.isfinite().all()]
    except Exception as error:  # torch.load raises many kinds
        raise UserError(f"{path} is not a checkpoint of this network: truncated, or not only weights "
                        f"({type(error).__name__})") from None
    if bad:
        raise UserError(f"{path} has NaN or inf in {bad[0]}: its training broke down")
    return checkpoint


def load_weights(model, checkpoint, path):
    """Put a checkpoint's weights into `model`; UserError for another network, with the last difference."""
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        detail = str(error).splitlines()[-1].strip()
        raise UserError(f"{path} holds another network than model.py: {detail}") from None


# ---------------------------------------------------------------- speed
class GraphedStep:
    """Calls `step(*tensors)`; on a GPU as a CUDA graph, one for each shape of the first tensor: three calls
    run plainly, the fourth is recorded, later ones copy their tensors to where the graph reads them and
    replay it. A step of batch 16 has some hundred small kernels, which are slower to launch than to run."""

    def __init__(self):
        self.calls, self.graphs = {}, {}

    def __call__(self, step, *tensors):
        shape = tensors[0].shape
        self.calls[shape] = self.calls.get(shape, 0) + 1
        if not tensors[0].is_cuda or self.calls[shape] <= 3:
            return step(*tensors)
        if shape not in self.graphs:
            inputs = [tensor.clone() for tensor in tensors]
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                output = step(*inputs)
            self.graphs[shape] = inputs, graph, output
        inputs, graph, output = self.graphs[shape]
        for tensor, value in zip(inputs, tensors):
            tensor.copy_(value)
        graph.replay()
        return output
