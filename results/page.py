"""Write the results page: every run of experiments.sh beside the report's numbers.

    python results/page.py        writes results/README.md and results/figures/*.png

A run of `experiments.sh --list` counts if it is finished, has the listed command and saw the report's images.
To add a claim or a section, add a line to CLAIMS or SECTIONS.
"""
import math
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean, median, stdev, variance

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from data import COMPOSITES, REPORT_SHA256  # noqa: E402
from utils import UserError, pyplot, read_csv, read_run, run, save_figure, write_text  # noqa: E402

SECTIONS = {title: names.split() for title, names in {  # recipes that are not here go under "other runs"
    "1 baseline": "baseline",
    "1.1 batch size": "bs64 bs32 bs16",
    "1.2 augmentation": "noise_0.01 noise_0.02 noise_0.05 noise_0.1 erase_0.2 erase_0.3 erase_0.4"
                        " erase_0.2_wide erase_0.3_wide erase_0.4_wide rotate_5 rotate_10"
                        " noise_0.05_erase_0.3",
    "1.3 Adam": "lr_1e-4 wd_1e-2 wd_5e-3 wd_1e-4 wd_1e-4_plain lr_min_1e-6",
    "1.4 schedule": "constant step cosine_50 warmup_cosine",
    "1.5 dropout": "dropout_all_p0.1 dropout_all_p0.2 dropout_all_p0.2_cosine dropout_last1_p0.1"
                   " dropout_last2_p0.1 dropout_last1_p0.2 dropout_last2_p0.2 dropout_last3_p0.2",
    "1.6 final model": "final",
    "beyond the report": "best fast shuffle1 match0 match0.9",
    "parts of best": "best12 best12_shuffle0 best12_adamw best12_shift0 best12_noise_erase best12_flip"
                     " best12_smoothing0 best12_warmup_cosine"}.items()}
SAME = {"lr_1e-3": "noise_0.05_erase_0.3", "cosine": "noise_0.05_erase_0.3", "dropout_last3_p0.1": "final"}
CLAIMS = [  # section, claim, left, how, right: recipes, of which the best counts, or val_acc
    ("1.1", "batch size 16 beats 32", ["bs16"], "beats", ["bs32"]),
    ("1.1", "batch size 32 beats 64", ["bs32"], "beats", ["bs64"]),
    ("1.2", "noise 0.05 with erasing 0.3 is the best augmentation", ["noise_0.05_erase_0.3"], "beats",
     SECTIONS["1.2 augmentation"][:-1]),
    ("1.3", "lr 1e-4 ends above 50 %", ["lr_1e-4"], "beats", 50),
    ("1.3", "lr 1e-4 ends slightly above 50 %: below 55", 55, "beats", ["lr_1e-4"]),
    ("1.3", "none of three weight decays gets 70 %", 70, "beats", ["wd_1e-2", "wd_5e-3", "wd_1e-4"]),
    ("1.3", "a smaller lr_min makes no difference", ["lr_min_1e-6"], "equals", ["noise_0.05_erase_0.3"]),
    ("1.4", "cosine beats StepLR", ["cosine_50"], "beats", ["step"]),
    ("1.4", "cosine beats a constant learning rate", ["cosine_50"], "beats", ["constant"]),
    ("1.4", "warm-up and cosine beats cosine", ["warmup_cosine"], "beats", ["cosine_50"]),
    ("1.5", "dropout after every block hurts, p 0.1", ["warmup_cosine"], "beats", ["dropout_all_p0.1"]),
    ("1.5", "dropout after every block hurts, p 0.2", ["warmup_cosine"], "beats", ["dropout_all_p0.2"]),
    ("1.5", "dropout 0.1 after the last three blocks is best", ["final"], "beats", SECTIONS["1.5 dropout"])]


# ---------------------------------------------------------------- what is read
def listing():
    plain = ["env", "-u", "OUT", "-u", "EPOCHS", "-u", "LIMIT", "bash", "experiments.sh", "--list"]
    return subprocess.check_output(plain, cwd=HERE.parent, text=True)


def read_finished(folder, command):
    """The run in `folder` as a dict; None where it does not count. Its train_acc is the last epoch's."""
    if not (folder / "best.csv").exists():
        return None
    args, log = read_run(folder)
    try:
        (best,) = read_csv(folder / "best.csv")
        at_best = next(row for row in log if row["epoch"] == best["epoch"])
    except (ValueError, KeyError, StopIteration):
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
        report = read_csv(HERE / "report.csv")
        self.report = [{**row, "recipe": SAME.get(row["run"], row["run"])} for row in report]
        self.flags, self.runs, self.missing = {}, {}, []
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
        several seeds. The kinds: dropout after every block, our own recipes, all others."""
        def kind(name):
            return name.startswith("dropout_all"), "--amp" in self.flags[name]
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


# ---------------------------------------------------------------- chance, and the report's claims
def verdict(difference, error, other_error, words=("yes", "yes")):
    """The one rule for chance, by the standard errors of the two sides; `words` say above and below."""
    limit = 2 * math.hypot(error, other_error)
    if math.isnan(difference) or math.isnan(limit):
        return "" if math.isnan(difference) else "not known"
    return "within noise" if abs(difference) <= limit else words[difference < 0]


def judge(results, left, how, right):
    """What was measured, and the verdict on the claim `left` `how` `right`, see CLAIMS."""
    recipes = [name for side in (left, right) if isinstance(side, list) for name in side]
    if not all(name in results.runs for name in recipes):
        return "", "not run"

    def measure(side):  # a val_acc, its standard error, and both as text
        if not isinstance(side, list):
            return side, 0, f"{side} %"
        name = max(side, key=results.mean)
        value, error, text = results.ours(name)
        return value, error, f"{name} {text}"

    words = "holds", "does not hold"
    value, error, text = measure(left)
    other, other_error, other_text = measure(right)
    found = verdict(value - other, error, other_error, words)
    if how == "equals" and found != "not known":
        found = "holds" if found == "within noise" else "does not hold"
    return f"{text}; {other_text}", found


def judge_filters():
    """The claim on the filters, from what analyze.py measured on the final model."""
    paths = [HERE / f"runs/final/seed0/experts_layer{layer}.csv" for layer in (1, 5)]
    if not all(path.exists() for path in paths):
        return "", "not run"
    first, last = (median(row["class_selectivity_index"] for row in read_csv(path)) for path in paths)
    before = median(row["untrained_selectivity_index"] for row in read_csv(paths[1]))
    return (f"median index: first layer {first:.3f}; last layer {last:.3f}, before training {before:.3f}",
            "holds" if last > 2 * max(first, before) else "does not hold")


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
        run, recipe = row["run"], row["recipe"]
        value, error, text = results.ours(recipe)
        off = value - row["val_acc"]
        rows.append([f"{row['section']:g}", run if run == recipe else f"{run} (our {recipe})", in_report(row),
                     text, f"{round(off, 2) + 0:+.2f}".replace("+nan", ""),  # + 0: no -0.00
                     verdict(off, error, results.spread(recipe)),
                     f"≈{row['train_acc']:.2f}".replace("≈nan", ""), results.mean(recipe, "train_acc")])
    return table("section, run, report's val_acc, our val_acc, difference, beyond chance?, "
                 "report's train_acc, our train_acc", rows)


def ordinary_loop(results):
    """What tests/ordinary.py got on the same images, and whether our loop can be why the report is higher."""
    accs = [read_csv(path)[0]["val_acc"] for path in sorted(HERE.glob("runs/ordinary/seed*/best.csv"))]
    if not accs or "baseline" not in results.runs:
        return ""
    ours, error, text = results.ours("baseline")
    found = verdict(mean(accs) - ours, error, results.spread("baseline") / math.sqrt(len(accs)),
                    ("beyond chance", "beyond chance, but the ordinary loop is the lower one"))
    so = "" if found in ("beyond chance", "not known") else ", so our loop is not why the report is higher"
    return ("An ordinary loop (`tests/ordinary.py`: ImageFolder, torchvision's transforms, DataLoader)"
            f" trained the baseline on the same images to {in_words(accs)}, ours to {text}. The difference is"
            f" {found}{so}.")


def every_recipe(results):
    others = [name for name in results.flags if name not in sum(SECTIONS.values(), [])]
    theirs = {row["run"]: in_report(row) for row in results.report}
    best, rows = results.flags.get("best", "-").split(" --epochs")[0], []
    for title, names in {**SECTIONS, "other runs": others}.items():
        names = [name for name in names if name in results.runs]
        rows += [[f"**{title}**"] + [""] * 6] if names else []
        for name in names:
            flags = results.flags[name].replace(best, "BEST")
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
        of_run = median(row["seconds"] for row in found["log"])
        precision = ", --amp" if found["args"]["amp"] else ""
        seconds.setdefault(found["args"]["hardware"] + precision, []).append(of_run)
    return table("hardware, runs, median seconds an epoch",
                 [[name, len(times), f"{median(times):.0f}"] for name, times in sorted(seconds.items())])


# ---------------------------------------------------------------- the figures, 800 pixels wide
def save(figure, name):
    save_figure(figure, HERE / "figures" / f"{name}.png")
    return f"![{name}](figures/{name}.png)"


def draw_report_figure(results, number):
    """Figure `number` of the report, a panel for each of its runs that has run here."""
    rows = [row for row in results.report
            if str(row["figure"])[0] == number and row["recipe"] in results.runs]
    if not rows:
        return ""
    curves = read_csv(HERE / "report_curves.csv")
    figure, axes = pyplot().subplots(1, len(rows), figsize=(8, 3.8), layout="constrained", sharey=True,
                                     squeeze=False)
    for axis, row in zip(axes[0], rows):
        theirs = [point for point in curves if point["run"] == row["run"]]
        for key, label, color in (("train_acc", "training", "C0"), ("val_acc", "validation", "C1")):
            for i, points in enumerate([theirs, *results.values(row["recipe"], "log")]):
                axis.plot([point["epoch"] for point in points], [point[key] for point in points],
                          "-" if i else "--", lw=(1.2, 1.5, 0.6)[min(i, 2)], color=color,
                          label="" if i else label)
        axis.set_title(row["run"], fontsize=10)
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("accuracy (%)")
    axes[0, 0].legend(loc="lower right", fontsize=9)
    figure.suptitle("dashed: the report; solid: ours, other seeds thin", fontsize=10)
    return save(figure, f"figure{number}")


def draw_shortcut(results):
    """Bars that show how far a recipe reads the digit; nothing where no such recipe has run."""
    names = [name for name in ("final", "match0", "match0.9", "shuffle1", "best") if name in results.runs]
    if not names:
        return ""
    figure, axis = pyplot().subplots(figsize=(8, 4.2), layout="constrained")
    bars = {"val_acc": "all images", "val_acc_agree": "digit agrees with the label",
            "val_acc_conflict": "digit conflicts", "val_follows_digit": "conflicts, and taken for the digit"}
    for i, (key, label) in enumerate(bars.items()):
        places = [place + 0.2 * (i - 1.5) for place in range(len(names))]
        drawn = axis.bar(places, [results.mean(name, key) for name in names], 0.19, label=label)
        axis.bar_label(drawn, fmt="%.0f", fontsize=8)
    axis.set(xticks=range(len(names)), xticklabels=names, ylim=(0, 110), ylabel="validation images (%)")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return save(figure, "shortcut")


def draw_overview(results):
    """A line for each recipe, in the order of their mean best val_acc."""
    names = sorted(results.runs, key=results.mean)
    if not names:
        return ""
    figure, axis = pyplot().subplots(figsize=(8, 1.4 + 0.19 * len(names)), layout="constrained")
    ours = [(acc, name) for name in names for acc in results.values(name)]
    theirs = [(row["val_acc"], row["recipe"]) for row in results.report if row["recipe"] in names]
    for dots, label, style in ((ours, "ours, a dot is a seed", "C0o"), (theirs, "the report", "C3d")):
        axis.plot([acc for acc, _ in dots], [names.index(name) for _, name in dots], style, label=label,
                  mfc="none")
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set(ylim=(-0.7, len(names) - 0.3), xlabel="best validation accuracy (%)")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return save(figure, "overview")


# ---------------------------------------------------------------- the page
def main():
    results = Results()
    runs = sum(len(found) for found in results.runs.values())
    missing = [name for name in results.flags if name not in results.runs]
    missing += [name for name in results.missing if name.split("/")[0] in results.runs]
    sds = [results.spread(name) for name in ("final", "best", "dropout_all_p0.2")]
    sds = ["not known yet" if math.isnan(sd) else f"{sd:.2f} points" for sd in sds]
    claims = [(section, claim, *judge(results, *sides)) for section, claim, *sides in CLAIMS]
    claims.append(("2.2", "first-layer filters respond uniformly, the last layer's are class-specific",
                   *judge_filters()))
    claims += [("", f"best12 beats {name}", *judge(results, ["best12"], "beats", [name]))
               for name in SECTIONS["parts of best"][1:]]
    tested = [row for row in claims if row[-1] != "not run"]
    page = [
        "# Every experiment of the report, beside the report",
        f"`python results/page.py` writes this page from the runs' files. {runs} of "
        f"{runs + len(results.missing)} runs are in; the last line names the others.",
        "## The report's numbers",
        beside_report(results),
        "val_acc is the best epoch's, train_acc the last epoch's. ≈ marks what was read off a figure of the"
        " report, as each of its train_acc was. In brackets stands our run of the same settings.",
        "A difference is beyond chance if it is larger than two standard errors. \"Within noise\" means that"
        " it is smaller. The standard error of a mean of n runs is sd / √n; a number of the report counts as"
        " one run. The sd, the standard deviation of one run, is pooled over the recipes that have several"
        f" seeds: {sds[0]}; for our own recipes (those with `--amp`) {sds[1]}; with dropout after every block"
        f" {sds[2]}. With few seeds it is uncertain.",
        ordinary_loop(results),
        *(draw_report_figure(results, number) for number in "123456"),
        "## Every recipe that has run",
        "The flags are those in which a recipe differs from `final`. All accuracies are the best epoch's, and"
        " means over the seeds; test_acc is that of the test images that were there, in CIFAR-10's order."
        " `best` and `fast` are our own recipes.",
        every_recipe(results),
        draw_overview(results),
        draw_shortcut(results),
        "The machines did other work too, often another run.",
        machines(results),
        "## Claims",
        "First the report's claims; then, for each part of `best`, whether 12 epochs without it are worse."
        f" {len(tested)} of {len(claims)} could be tested with the runs that are in.",
        table("section, claim, measured, verdict", tested),
        "Where a claim is about several recipes, the best of them is compared. \"No difference\" holds if the"
        " difference is within noise. The claim on the filters holds if the last layer's median class"
        " selectivity index is over twice the first layer's, and over twice its own before training.",
        f"Not run yet: {', '.join(missing) or 'none'}."]
    write_text(HERE / "README.md", "\n\n".join(part for part in page if part) + "\n")
    print(f"wrote {HERE / 'README.md'}")


if __name__ == "__main__":
    run(main)
