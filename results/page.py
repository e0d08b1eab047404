"""Write the results page: every run of experiments.sh beside the report's numbers.

    python results/page.py        writes results/README.md and results/figures/*.png

It reads the runs' CSVs, report.csv (the report's numbers, and our recipe of the same settings),
report_curves.csv, claims.csv (each side is a val_acc, or recipes, of which the best counts) and sections.csv.
A run of `experiments.sh --list` counts if it is finished, has the listed command and saw the report's images.
"""
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from statistics import mean, median, stdev, variance

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from data import COMPOSITES, REPORT_SHA256  # noqa: E402
from results.draw import draw  # noqa: E402
from utils import UserError, read_csv, read_run, run, write_text  # noqa: E402


# ---------------------------------------------------------------- what is read
def listing():
    return subprocess.check_output(["bash", "experiments.sh", "--list"], cwd=HERE.parent, text=True,
                                   env={"PATH": os.environ["PATH"]})  # without OUT, EPOCHS and the like


def read_finished(folder, command):
    """The run in `folder` as a dict; None where it does not count. Its train_acc is the last epoch's."""
    if not (folder / "best.csv").exists():
        return None
    args, log = read_run(folder)
    try:
        (best,) = read_csv(folder / "best.csv")
        at_best = next(row for row in log if row["epoch"] == best["epoch"])
    except (ValueError, TypeError, KeyError, StopIteration):
        raise UserError(f"{folder / 'best.csv'} is damaged: restore it, or train the run again") from None
    images = "--match-prob" in command or args.get("fingerprint") == REPORT_SHA256["train", 45000]
    settings = args["data"], args.get("train_images"), args.get("command"), args["epochs"]
    if not images or settings != (COMPOSITES, 45000, command, len(log)):
        print(f"{folder} does not count: other flags or images than in experiments.sh, or too few epochs")
        return None
    return {**at_best, **best, "train_acc": log[-1]["train_acc"], "args": args, "log": log}


class Results:
    """flags {recipe: its flags}, runs {recipe: [runs that count]}, missing [recipe/seedN], report [rows]."""

    def __init__(self):
        self.flags, self.runs, self.missing, self.report = {}, {}, [], read_csv(HERE / "report.csv")
        listed = re.compile(r"^(python train.py (.*?) ?--seed .*?([^/ ]+)/(seed\d+)) --resume", re.MULTILINE)
        for command, flags, recipe, seed in listed.findall(listing()):
            self.flags[recipe] = flags
            if found := read_finished(HERE / "runs" / recipe / seed, command):
                self.runs.setdefault(recipe, []).append(found)
            else:
                self.missing.append(f"{recipe}/{seed}")

    def values(self, recipe, key="val_acc"):
        """One for each seed that has run."""
        return [found[key] for found in self.runs.get(recipe, [])]

    def mean(self, recipe, key="val_acc"):
        return mean(self.values(recipe, key) or [math.nan])

    def spread(self, recipe):
        """The standard deviation of one run (NaN if not known), pooled over the recipes of its kind that have
        several seeds. The kinds: dropout after every block, our own recipes, those of them without
        --shuffle-digits (with the shortcut, seeds differ more), all others."""
        def kind(name):
            flags = self.flags.get(name, "")
            return name.startswith("dropout_all"), "--amp" in flags, "--shuffle-digits 0" in flags
        groups = [self.values(name) for name in self.runs if kind(name) == kind(recipe)]
        groups = [accs for accs in groups if len(accs) > 1]
        squares = sum((len(accs) - 1) * variance(accs) for accs in groups)
        return math.sqrt(squares / sum(len(accs) - 1 for accs in groups)) if groups else math.nan

    def ours(self, recipe):
        """The mean best val_acc (NaN where nothing has run), its standard error, and the mean as text."""
        accs = self.values(recipe)
        return self.mean(recipe), self.spread(recipe) / math.sqrt(len(accs) or 1), in_words(accs)


def in_words(accs):
    more = f"{len(accs)} seeds, sd {stdev(accs):.2f}" if len(accs) > 1 else "1 seed"
    return f"{mean(accs):.2f} ({more})" if accs else "not run"


# ---------------------------------------------------------------- chance, and the claims
def verdict(difference, error, other_error, above="yes", below="yes", within="within noise"):
    """The one rule for chance, by the standard errors of the two sides; "" where one of them has not run."""
    limit = 2 * math.hypot(error, other_error)
    if math.isnan(difference) or math.isnan(limit):
        return "" if math.isnan(difference) else "not known"
    return within if abs(difference) <= limit else below if difference < 0 else above


def judge(results, left, how, right):
    """What was measured, and the verdict on the claim `left` `how` `right`, a row of claims.csv."""
    def measure(side):  # a val_acc, its standard error, and both as text
        if isinstance(side, float):
            return side, 0, f"{side:g} %"
        missing = [name for name in side.split() if name not in results.runs]
        name = missing[0] if missing else max(side.split(), key=results.mean)
        value, error, text = results.ours(name)
        return value, error, f"{name} {text}"

    words = {"beats": ("holds", "does not hold"), "equals": ("does not hold", "does not hold", "holds")}[how]
    (value, error, text), (other, other_error, other_text) = measure(left), measure(right)
    return f"{text}; {other_text}", verdict(value - other, error, other_error, *words) or "not run"


# ---------------------------------------------------------------- the tables
def table(header, rows):
    def cell(value):
        return f"{value:.2f}".replace("nan", "") if isinstance(value, float) else str(value)
    lines = [header.split(", "), ["---"] * len(header.split(", ")), *([cell(x) for x in row] for row in rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def in_report(row):
    """The report's val_acc as text; ≈ marks what was read off a figure."""
    return f"{'≈' if row['how'].startswith('traced') else ''}{row['val_acc']:.2f}"


def beside_report(results):
    rows = []
    for row in results.report:
        recipe = row["recipe"]
        value, error, text = results.ours(recipe)
        off = value - row["val_acc"]
        name = row["run"] if row["run"] == recipe else f"{row['run']} (our {recipe})"
        rows.append([f"{row['section']:g}", name, in_report(row), text,
                     f"{round(off, 2) + 0:+.2f}".replace("+nan", ""),  # + 0: no -0.00
                     verdict(off, error, results.spread(recipe)),
                     f"≈{row['train_acc']:.2f}".replace("≈nan", ""), results.mean(recipe, "train_acc")])
    return table("section, run, report's val_acc, our val_acc, difference, beyond chance?, "
                 "report's train_acc, our train_acc", rows)


def every_recipe(results):
    sections = {row["section"]: row["recipes"].split() for row in read_csv(HERE / "sections.csv")}
    others = [name for name in results.flags if name not in sum(sections.values(), [])]
    theirs = {row["run"]: in_report(row) for row in results.report}
    best, rows = results.flags.get("best", "").split(" --epochs")[0], []
    for title, names in {**sections, "other runs": others}.items():
        names = [name for name in names if name in results.runs]
        rows += [[f"**{title}**"] + [""] * 6] if names else []
        for name in names:
            flags = results.flags[name].replace(best, "BEST") if best else results.flags[name]
            rows.append([name, f"`{flags}`" if flags else "", results.values(name, "args")[0]["epochs"],
                         results.ours(name)[2],
                         f"{results.mean(name, 'test_acc'):.2f} of {results.mean(name, 'test_images'):.0f}",
                         results.mean(name, "val_acc_conflict"), theirs.get(name, "")])
    short = f"\n\nBEST is short for `{best}`." if "BEST" in str(rows) else ""
    return table("recipe, flags, epochs, best val_acc, test_acc of images, "
                 "val_acc where the digit conflicts, report", rows) + short


def machines(results):
    seconds = {}
    for found in sum(results.runs.values(), []):
        name = found["args"]["hardware"] + (", --amp" if found["args"]["amp"] else "")
        seconds.setdefault(name, []).append(median(row["seconds"] for row in found["log"]))
    return table("hardware, runs, median seconds an epoch",
                 [[name, len(times), f"{median(times):.0f}"] for name, times in sorted(seconds.items())])


# ---------------------------------------------------------------- the page
def main():
    results = Results()
    figures = draw(results, read_csv(HERE / "report_curves.csv"), HERE / "figures")
    runs = sum(len(found) for found in results.runs.values())
    missing = Counter(name.split("/")[0] for name in results.missing)
    missing = [f"{name} ({n} of its seeds)" if name in results.runs else name for name, n in missing.items()]
    sds = [results.spread(name) for name in ("final", "best", "best12_shuffle0", "dropout_all_p0.2")]
    sds = ["not known yet" if math.isnan(sd) else f"{sd:.2f} points" for sd in sds]
    claims = [[f"{section:g}".replace("nan", ""), claim, *judge(results, *sides)]
              for section, claim, *sides in (row.values() for row in read_csv(HERE / "claims.csv"))]
    ordinary = [read_csv(path)[0]["val_acc"] for path in sorted(HERE.glob("runs/ordinary/seed*/best.csv"))]
    tested = [row for row in claims if row[-1] != "not run"]
    page = f"""\
# Every run, beside the report

`python results/page.py` writes this page from the runs' files. {runs} of {runs + len(results.missing)} runs \
are in; the last line names the others.

## The report's numbers

{beside_report(results)}

val_acc is the best epoch's, train_acc the last epoch's. ≈ marks what was read off a figure of the report, \
to about 0.1. In brackets stands our run of the same settings.

A difference is beyond chance if it is larger than two standard errors, else within noise. The standard \
error of a mean of n runs is sd / √n; a number of the report counts as one run. The sd, the standard \
deviation of one run, is pooled over the recipes that have several seeds: {sds[0]}; for our own recipes \
(with `--amp`) {sds[1]}, without exchanged digits {sds[2]}; with dropout after every block {sds[3]}. With \
few seeds it is uncertain.

An ordinary loop (`tests/ordinary.py`: ImageFolder, torchvision's transforms, DataLoader) trained the \
baseline on the same images to {in_words(ordinary)}. It shares the images with `train.py`, but no code that \
trains, so our loop is not why the report's baseline is higher.

{figures["report"]}

## Every recipe that has run

The flags are those in which a recipe differs from `final`. All accuracies are the best epoch's, and means \
over the seeds; test_acc is that of the test images that were there: CIFAR-10's first. `best` and `fast` are \
our own.

{every_recipe(results)}

{figures["overview"]}

{figures["shortcut"]}

The machines did other work too, often another run.

{machines(results)}

## Claims

First the report's claims; then ours: is `--init fan_out` better, and is `best`, in 12 epochs, worse without \
one of its parts? {len(tested)} of {len(claims)} could be tested with the runs that are in.

{table("section, claim, measured, verdict", tested)}

Where a claim is about several recipes, the best of them counts. "No difference" holds if the difference \
is within noise.

Not run yet: {", ".join(missing) or "none"}.
"""
    write_text(HERE / "README.md", re.sub(r"\n{3,}", "\n\n", page))
    print(f"wrote {HERE / 'README.md'}")


if __name__ == "__main__":
    run(main)
