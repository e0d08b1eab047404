"""Write the results page: every run of experiments.sh beside the report's numbers.

    python results/page.py        writes results/README.md and results/figures/*.png

It reads results/runs, report.csv and report_curves.csv; `experiments.sh --list` says which runs there should be. A run
counts if it is finished, has the listed command, and was trained on the report's own images.
To add a claim or a section, add a line to CLAIMS or SECTIONS.
"""
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean, median, stdev, variance

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from data import REPORT_SHA256  # noqa: E402
from utils import pyplot, read_csv, read_run, run, save_figure, write_text  # noqa: E402

SECTIONS = {  # a recipe of experiments.sh that is not here goes under "other runs"
    "1 baseline": "baseline",
    "1.1 batch size": "bs64 bs32 bs16",
    "1.2 augmentation": "noise_0.01 noise_0.02 noise_0.05 noise_0.1 erase_0.2 erase_0.3 erase_0.4 erase_0.2_wide "
                        "erase_0.3_wide erase_0.4_wide rotate_5 rotate_10 noise_0.05_erase_0.3",
    "1.3 Adam": "lr_1e-4 wd_1e-2 wd_5e-3 wd_1e-4 wd_1e-4_plain lr_min_1e-6",
    "1.4 schedule": "constant step cosine_50 warmup_cosine",
    "1.5 dropout": "dropout_all_p0.1 dropout_all_p0.2 dropout_all_p0.2_cosine dropout_last1_p0.1 dropout_last2_p0.1 "
                   "dropout_last1_p0.2 dropout_last2_p0.2 dropout_last3_p0.2",
    "1.6 final model": "final",
    "beyond the report": "best fast shuffle1 match0 match0.9",
    "parts of best": "best12 best12_shuffle0 best12_adamw best12_shift0 best12_noise_erase best12_flip "
                     "best12_smoothing0 best12_warmup_cosine"}
SECTIONS = {title: names.split() for title, names in SECTIONS.items()}
SAME = {"lr_1e-3": "noise_0.05_erase_0.3", "cosine": "noise_0.05_erase_0.3", "dropout_last3_p0.1": "final"}
CLAIMS = [  # section, claim, left, how, right: lists are recipes, of which the best counts; a str is the report's run
    ("1.1", "batch size 16 beats 32", ["bs16"], "beats", ["bs32"]),
    ("1.1", "batch size 32 beats 64", ["bs32"], "beats", ["bs64"]),
    ("1.2", "noise 0.05 with erasing 0.3 is the best augmentation", ["noise_0.05_erase_0.3"], "beats",
     SECTIONS["1.2 augmentation"][:-1]),
    ("1.3", "lr 1e-4 ends slightly above 50 % (we test 50 to 55)", ["lr_1e-4"], "between", (50, 55)),
    ("1.3", "no weight decay tried beats 70 %", 70, "beats", ["wd_1e-2", "wd_5e-3", "wd_1e-4"]),
    ("1.3", "a smaller lr_min makes no difference", ["lr_min_1e-6"], "equals", ["noise_0.05_erase_0.3"]),
    ("1.4", "cosine beats StepLR", ["cosine_50"], "beats", ["step"]),
    ("1.4", "cosine beats a constant learning rate", ["cosine_50"], "beats", ["constant"]),
    ("1.4", "warm-up and cosine beats cosine", ["warmup_cosine"], "beats", ["cosine_50"]),
    ("1.5", "dropout after every block hurts, p 0.1", ["warmup_cosine"], "beats", ["dropout_all_p0.1"]),
    ("1.5", "dropout after every block hurts, p 0.2", ["warmup_cosine"], "beats", ["dropout_all_p0.2"]),
    ("1.5", "dropout 0.1 after the last three blocks is best", ["final"], "beats", SECTIONS["1.5 dropout"]),
    ("1.6", "the final model reaches 73.08 %", ["final"], "beats", "final")]


# ---------------------------------------------------------------- what is read
def listing():
    env = {key: value for key, value in os.environ.items() if key not in ("OUT", "EPOCHS", "LIMIT", "COMPILE")}
    return subprocess.run(["bash", "experiments.sh", "--list"], cwd=HERE.parent, env=env, capture_output=True,
                          text=True, check=True).stdout


def read_finished(folder, command):
    """The run in `folder` as a dict; or a string, why it does not count."""
    if not (folder / "best.csv").exists():
        return "not finished"
    args, log = read_run(folder)
    if args.get("command") != command:
        return "experiments.sh lists another command"
    if len(log) != args["epochs"]:
        return "the log lacks epochs"
    theirs = "--match-prob" in command or args.get("fingerprint") == REPORT_SHA256["train", 45000]
    if args.get("train_images") != 45000 or not theirs:
        return "trained on other images than the report's"
    best = read_csv(folder / "best.csv")[0]
    at_best = next(row for row in log if row["epoch"] == best["epoch"])
    return {**at_best, **best, "train_acc": log[-1]["train_acc"], "args": args, "log": log}


class Results:
    """flags {recipe: its flags}, runs {recipe: [its runs that count]}, missing [recipe/seedN], and report.csv by run."""

    def __init__(self):
        self.report = {row["run"]: row for row in read_csv(HERE / "report.csv")}
        self.flags, self.runs, self.missing = {}, {}, []
        for line in listing().splitlines():
            if line.startswith("#"):
                continue
            command = line.removesuffix(" --compile").removesuffix(" --resume")
            flags, recipe, seed = re.search(r"train.py (.*?)--seed .*?([^/ ]+)/(seed\d+)$", command).groups()
            self.flags[recipe] = flags.strip()
            found = read_finished(HERE / "runs" / recipe / seed, command)
            if isinstance(found, dict):
                self.runs.setdefault(recipe, []).append(found)
            else:
                self.missing.append(f"{recipe}/{seed}")
                if (HERE / "runs" / recipe / seed).exists():
                    print(f"{recipe}/{seed} does not count: {found}")

    def values(self, recipe, key="val_acc"):
        """One number for each seed that has run."""
        return [found[key] for found in self.runs.get(recipe, [])]

    def mean(self, recipe, key="val_acc"):
        return mean(self.values(recipe, key) or [math.nan])

    def spread(self, recipe):
        """The standard deviation of one run, in points, pooled over the recipes with several seeds that have dropout
        after every block, or over those that have not, as `recipe` does. Returns it (NaN if none), and their number."""
        groups = [self.values(name) for name in self.runs
                  if name.startswith("dropout_all") == recipe.startswith("dropout_all")]
        groups = [accs for accs in groups if len(accs) > 1]
        squares, freedom = sum((len(accs) - 1) * variance(accs) for accs in groups), sum(map(len, groups)) - len(groups)
        return (math.sqrt(squares / freedom) if groups else math.nan), len(groups)

    def error(self, recipe):
        """The standard error of the recipe's mean."""
        return self.spread(recipe)[0] / math.sqrt(len(self.values(recipe)) or math.nan)

    def show(self, recipe):
        """Such as '71.95 (3 seeds, sd 0.25)'."""
        accs = self.values(recipe)
        more = f"{len(accs)} seeds, sd {stdev(accs):.2f}" if len(accs) > 1 else "1 seed"
        return f"{mean(accs):.2f} ({more})" if accs else "not run"


# ---------------------------------------------------------------- chance, and the report's claims
def verdict(margin, *errors, yes="yes", no="yes"):
    """`yes` where `margin` is above two standard errors, `no` where it is below minus that. `errors` are those of the
    two sides."""
    error = math.hypot(*errors)
    if math.isnan(margin) or math.isnan(error):
        return "" if math.isnan(margin) else "spread not known"
    return "within noise" if abs(margin) <= 2 * error else yes if margin > 0 else no


def judge(results, left, how, right):
    """What was measured, and the verdict on the claim `left` `how` `right`, see CLAIMS."""
    recipes = [name for side in (left, right) if isinstance(side, list) for name in side]
    if missing := [name for name in recipes if not results.values(name)]:
        return "not run: " + ", ".join(missing), "not run"

    def measure(side):  # a number, its standard error, both as text
        if isinstance(side, str):
            value = results.report[side]["val_acc"]
            return value, results.spread(side)[0], f"report {value:.2f}"
        if isinstance(side, int):
            return side, 0, f"{side} %"
        name = max(side, key=results.mean)
        return results.mean(name), results.error(name), f"{name} {results.show(name)}"

    if how == "between":
        value, error, text = measure(left)
        return text, verdict(min(value - right[0], right[1] - value), error, yes="holds", no="does not hold")
    (value, error, text), (other, other_error, other_text) = measure(left), measure(right)
    found = verdict(value - other, error, other_error, yes="holds", no="does not hold")
    if how == "equals" and found != "spread not known":
        found = "holds" if found == "within noise" else "does not hold"
    return f"{text}; {other_text}", found


def judge_filters():
    """The claim on the filters, from what analyze.py measured on the final model."""
    paths = [HERE / f"runs/final/seed0/experts_layer{layer}.csv" for layer in (1, 5)]
    if not all(path.exists() for path in paths):
        return "not run: analyze.py on final/seed0", "not run"
    first, last = (median(row["class_selectivity_index"] for row in read_csv(path)) for path in paths)
    before = median(row["untrained_selectivity_index"] for row in read_csv(paths[1]))
    return (f"median selectivity: first layer {first:.3f}, last {last:.3f}, last before training {before:.3f}",
            "holds" if last > 2 * max(first, before) else "does not hold")


# ---------------------------------------------------------------- the page, as lists of lines
def table(header, *rows):
    cells = [[("" if cell != cell else f"{cell:.2f}") if isinstance(cell, float) else str(cell) for cell in row]
             for row in rows]
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *cells)] + [""]


def signed(value):
    return "" if math.isnan(value) else f"{value:+.2f}"


def beside_report(results):
    rows, off = [], []
    for name, row in results.report.items():
        recipe = SAME.get(name, name)
        off.append(results.mean(recipe) - row["val_acc"])
        rows.append([row["section"], name if recipe == name else f"{name} (our run: {recipe})", row["val_acc"],
                     results.show(recipe), signed(off[-1]),
                     verdict(off[-1], results.error(recipe), results.spread(recipe)[0]),
                     row["train_acc"], results.mean(recipe, "train_acc"), row["how"]])
    off = [value for value in off if not math.isnan(value)]
    lines = [f"{len(off)} of the report's {len(rows)} numbers are run here. "]
    if off:
        lines[0] += (f"{sum(abs(value) <= 1 for value in off)} of them are within 1.0 point of the report. The median "
                     f"difference, ours minus the report's, is {median(off):+.2f} points.")
    return lines + [""] + table(["section", "run", "report's val_acc", "ours, mean", "difference", "beyond chance?",
                                 "report's train_acc", "ours", "how the report gives it"], *rows)


def chance_rule(results):
    (sd, recipes), (wide, _) = results.spread("final"), results.spread("dropout_all")
    return [
        "**The rule for chance.** A difference is beyond chance if it is larger than two standard errors of it. \"Within "
        "noise\" means that it is smaller. "
        + (f"One run has a standard deviation of {sd:.2f} points, pooled over the {recipes} recipes that ran with several "
           "seeds. " if recipes else "The standard deviation of one run is not known until a recipe has several seeds. ")
        + "A number of the report counts as one run. Recipes with dropout after every block spread more and use their own "
        f"standard deviation, {'not known yet' if math.isnan(wide) else f'{wide:.2f} points'}.", ""]


def every_recipe(results):
    sections = {**SECTIONS, "other runs": [name for name in results.flags if name not in sum(SECTIONS.values(), [])]}
    short, rows = results.flags.get("best", "").split(" --epochs")[0] or "-", []
    for title, names in sections.items():
        names = [name for name in names if name in results.flags]
        rows += [[f"**{title}**"] + [""] * 6] if names else []
        for name in names:
            args = results.values(name, "args")
            rows.append([name, f"`{results.flags[name].replace(short, 'BEST')}`" if results.flags[name] else "none",
                         args[0]["epochs"] if args else "", results.show(name), results.mean(name, "test_acc"),
                         results.mean(name, "val_acc_conflict"), results.report.get(name, {}).get("val_acc", "")])
    return table(["recipe", "flags", "epochs", "best val_acc", "test_acc", "val_acc, digit conflicts", "report"], *rows) + [
        f"\"Flags\" are those that differ from the final recipe, which has none; BEST is short for `{short}`. test_acc and "
        "the accuracy where digit and label conflict are those of the best epoch, and means as well.", ""]


def parts(results):
    rows = []
    for name in SECTIONS["parts of best"]:
        off = results.mean(name) - results.mean("best12") if name != "best12" else math.nan
        change = results.flags.get(name, "").removeprefix(results.flags.get("best12", "")).strip()
        rows.append([name, f"`{change}`" if change else "", results.show(name), signed(off),
                     verdict(off, results.error(name), results.error("best12"))])
    return table(["recipe", "what is changed", "best val_acc", "minus best12", "beyond chance?"], *rows)


def machines(results):
    seconds = {}
    for found in sum(results.runs.values(), []):
        seconds.setdefault(found["args"]["hardware"], []).append(median(row["seconds"] for row in found["log"]))
    return table(["hardware", "runs", "median seconds an epoch"],
                 *([name, len(times), f"{median(times):.1f}"] for name, times in sorted(seconds.items())))
