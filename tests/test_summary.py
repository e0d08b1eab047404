"""The results page: verdicts from made-up runs of known accuracies, and the same bytes twice."""
import csv
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import analyze
import train
from utils import UserError, write_csv

ROOT = Path(analyze.__file__).parent
LISTED = subprocess.run(["bash", ROOT / "experiments.sh", "--list"], capture_output=True, text=True, check=True).stdout
FLAGS = {name: flags for name, *flags in map(str.split, LISTED.splitlines())}


def add_run(folder, name, accs, val_acc_agree=None, val_follows_digit=None, whole=True, **others):
    """A run of all the epochs that experiments.sh lists (not `whole`: of those given), `accs` the last of them."""
    args = {**train.what_trains(train.parse_args(FLAGS[name])), "data": "CIFAR-10 and MNIST composites", "torch": "2",
            "hardware": "x", **others}
    accs = [accs[0]] * (args["epochs"] - len(accs)) * whole + accs
    digits = {"val_acc_agree": val_acc_agree, "val_follows_digit": val_follows_digit}
    rows = [{"epoch": i + 1, "val_acc": acc, "train_acc": 90.0, "val_acc_conflict": 60.0, "seconds": 1.0,
             **{key: value for key, value in digits.items() if value is not None}} for i, acc in enumerate(accs)]
    write_csv(folder / name / "log.csv", rows)
    (folder / name / "args.json").write_text(json.dumps(args))


@pytest.fixture
def folder(tmp_path):
    for name in ("report.csv", "report_curves.csv"):
        shutil.copy(ROOT / "results" / name, tmp_path)
    for name, accs in {"final": [60.0, 73.0], "bs64": [65.0], "bs32": [68.0], "bs16": [68.5, 67.0], "lr_1e-4": [52.0],
                       "wd_1e-2": [62.0], "wd_5e-3": [66.0], "wd_1e-4": [75.0], "cosine_50": [60.0], "constant": [70.0]}.items():
        add_run(tmp_path, name, accs)
    return tmp_path


def verdicts(folder):
    results = analyze.Results(folder)
    return {claim.split(" (")[0]: verdict for _, claim, _, verdict in
            analyze.claims(results, folder, analyze.chance(results)[0])}


def test_verdicts_follow_from_the_runs(folder):
    found = verdicts(folder)
    assert found["batch size 32 beats 64"] == "holds"
    assert found["batch size 16 beats 32"] == "within noise"
    assert found["lr 1e-4 ends slightly above 50 %"] == "holds"
    assert found["no weight decay tried beats 70 %"] == "does not hold"
    assert found["cosine beats a constant learning rate"] == "does not hold"
    assert found["cosine beats StepLR"] == "not run"
    assert found["the final model reaches 73.08 %"] == "within noise"


@pytest.mark.parametrize("name, damage", [("args.json", b"{}"), ("args.json", b"[1]"), ("log.csv", b"\xff"),
                                          ("log.csv", b"epoch,val_acc\n1,60\n<<<<<<< HEAD\n2,61\n")])
def test_a_damaged_run_is_named(folder, name, damage):
    (folder / "bs16" / name).write_bytes(damage)
    with pytest.raises(UserError, match="log.csv in .*bs16 is missing or damaged"):
        verdicts(folder)


def test_the_best_augmentation_is_held_against_the_best_other_one(folder):
    others = {name: 60.0 for name in FLAGS if name.startswith(("noise_0.0", "noise_0.1", "erase_", "rotate_"))
              and "_seed" not in name}
    for name, acc in {**others, "noise_0.05_erase_0.3": 69.0, "rotate_5": 72.5}.items():
        add_run(folder, name, [acc])
    row, = (row for row in analyze.claims(analyze.Results(folder), folder, lambda n, m=1: 3) if "best augmentation" in row[1])
    assert row[2:] == ("noise_0.05_erase_0.3 69.00, rotate_5 72.50", "does not hold")


@pytest.mark.parametrize("acc, verdict", [(49.9, "does not hold"), (50.1, "holds"), (54.9, "holds"), (55.1, "does not hold")])
def test_slightly_above_50_is_50_to_55(folder, acc, verdict):
    add_run(folder, "lr_1e-4", [acc])
    assert verdicts(folder)["lr 1e-4 ends slightly above 50 %"] == verdict


@pytest.mark.parametrize("first, last, before, verdict", [(0.04, 0.15, 0.05, "holds"), (0.08, 0.15, 0.05, "does not hold"),
                                                          (0.04, 0.15, 0.08, "does not hold")])
def test_the_experts_need_both_controls(folder, first, last, before, verdict):
    claim = "first-layer filters respond uniformly, last-layer filters are class-specific"
    assert verdicts(folder)[claim] == "not run"
    for layer, index in ((1, first), (5, last)):
        write_csv(folder / "final" / f"experts_layer{layer}.csv",
                  [{"class_selectivity_index": index, "untrained_selectivity_index": before}] * 3)
    assert verdicts(folder)[claim] == verdict


def test_the_yardstick_comes_from_the_seeds_of_the_reports_recipes(folder):
    noise, sd, freedom = analyze.chance(analyze.Results(folder))
    assert freedom == 0 and noise() == pytest.approx(2 * 2 ** 0.5 * 100 * (0.73 * 0.27 / 5000) ** 0.5)
    for name, acc in {"final_seed1": 72.95, "final_seed2": 73.05, "fast": 70.0, "fast_seed1": 75.0,
                      "dropout_all_p0.2": 50.0, "dropout_all_p0.2_seed1": 60.0}.items():
        add_run(folder, name, [acc])
    noise, sd, freedom = analyze.chance(analyze.Results(folder))
    assert sd == pytest.approx(0.05) and freedom == 2  # of 73, 72.95, 73.05; the others don't count
    assert noise() == pytest.approx(4.30 * 2 ** 0.5 * 0.05)
    assert noise(3, float("inf")) == pytest.approx(4.30 * 0.05 / 3 ** 0.5)
    assert verdicts(folder)["batch size 16 beats 32"] == "holds"
    add_run(folder, "bs16_seed1", [68.7])  # another 0.02 of squares
    assert analyze.chance(analyze.Results(folder))[1:] == (pytest.approx(((0.005 + 0.02) / 3) ** 0.5), 3)


def test_verdicts_follow_from_the_means_over_the_seeds(folder):
    for name, acc in {"final_seed1": 72.95, "final_seed2": 73.05}.items():
        add_run(folder, name, [acc])
    assert verdicts(folder)["batch size 16 beats 32"] == "holds"  # 68.5 beside 68.0
    add_run(folder, "bs16_seed1", [67.5])
    assert verdicts(folder)["batch size 16 beats 32"] == "within noise"  # 68.0
    add_run(folder, "bs16_seed2", [58.0])
    add_run(folder, "wd_1e-4_seed1", [20.0])
    found = verdicts(folder)
    assert found["no weight decay tried beats 70 %"] == "within noise"  # 66.0 is the best of the means, but now all is noisy
    row, = (row for row in analyze.claims(analyze.Results(folder), folder, lambda n, m=1: 0) if row[1] == "batch size 16 beats 32")
    assert row[2:] == ("bs16 64.67 (mean of 3), bs32 68.00", "does not hold")


def test_the_recipes_with_several_seeds_have_their_tables(folder):
    for name, acc in {"fast": 74.0, "fast_seed1": 75.0, "fast_seed2": 76.0, "taught2_seed1": 80.0, "final_seed1": 72.0,
                      "best12": 80.0, "best12_seed1": 82.0, "best12_flip": 78.0, "best12_flip_seed1": 79.0,
                      "best12_shift0": 77.0}.items():
        add_run(folder, name, [acc])
    analyze.summary(folder)
    page = (folder / "README.md").read_text()
    theirs, own, parts = (page.split(f"## {title}")[1].split("\n\n## ")[0] for title in (
        "The report's numbers with several", "Beyond the report, with several", "What each part of our recipe gives"))
    rows = [re.findall(r"^\| (\w.*) \|$", text, re.MULTILINE)[1:] for text in (theirs, own, parts)]
    assert rows == [["dropout_last3_p0.1 | 73.00, 72.00 | 72.50 | 0.71 | 72.64 | -0.14",
                     "final | 73.00, 72.00 | 72.50 | 0.71 | 73.08 | -0.58"],
                    ["fast | 74.00, 75.00, 76.00 | 75.00 | 1.00"],
                    ["best12 | 80.00 (amp), 82.00 (amp) | 81.00 | 1.41 |  | ",
                     "best12_flip | 78.00 (amp), 79.00 (amp) | 78.50 | 0.71 | 81.00 | -2.50"]]
    assert "standard deviation of 1.12 points, pooled (2 degrees of freedom)" in parts  # squares: 2 and 0.5


@pytest.mark.parametrize("n, m", [(1, 1), (3, 1), (3, 3)])
def test_means_of_one_recipe_differ_by_more_than_the_yardstick_once_in_twenty(n, m):
    rng, over = np.random.default_rng(0), []
    for _ in range(4000):
        groups = rng.normal(70, 0.3, (2, 3)) + [[0], [10]]  # two recipes with three seeds each: four degrees of freedom
        a, b = rng.normal(73, 0.3, n).mean(), rng.normal(73, 0.3, m).mean()
        over.append(abs(a - b) > analyze.yardstick(groups.tolist())[0](n, m))
    assert np.mean(over) == pytest.approx(0.05, abs=0.01)


def test_the_page_shows_ours_the_reports_and_what_is_missing_and_is_the_same_twice(folder):
    analyze.summary(folder)
    page = (folder / "README.md").read_text()
    assert "| bs16 | " in page and "68.50 (1) | 67.00" in page and "70.12 | -1.62 |" in page
    assert "| dropout_last3_p0.1 | the same run as final | 60 | 73.00 (60)" in page
    assert "| step | `--dropout-last 0 --epochs 50 --schedule step` |  | not run yet" in page
    short = dict(re.findall(r"^  - `(\$\w+)`: `(.*)`$", page, re.MULTILINE))  # written out, the flags are experiments.sh's
    shown = dict(re.findall(r"^\| (\S+) \| `(.*?)` \|", page, re.MULTILINE))
    assert len(shown) > 50 and sorted(short) == ["$ours", "$plain", "$tuned", "$wide"]
    for name, text in shown.items():
        assert [flag for word in text.split() for flag in short.get(word, word).split()] == FLAGS[name]
    drawn = sorted(path.name for path in (folder / "figures").iterdir())
    assert drawn == ["figure2.png", "figure3.png", "figure5.png", "figure6.png", "overview.png"]  # no run of 1 and 4 yet
    shutil.rmtree(folder / "figures")
    (folder / "README.md").unlink()
    analyze.summary(folder)
    assert (folder / "README.md").read_text() == page


def test_where_we_differ_is_computed(folder):
    for name in ("final", "lr_1e-4"):
        shutil.rmtree(folder / name)
    for name in ("bs16", "wd_1e-2", "wd_5e-3", "wd_1e-4"):
        shutil.rmtree(folder / name)
    assert analyze.differences(analyze.Results(folder)) == ["No run that the report has a number for is done yet."]
    add_run(folder, "baseline", [62.0], val_acc_agree=92.0)   # the report: 64.90, 89.8 in training; ours conflicts at 60
    add_run(folder, "bs16", [70.0])                           # 70.12, no training accuracy
    add_run(folder, "wd_5e-3", [72.4])                        # 66.40, 86.5: the median is not moved by one far away
    add_run(folder, "baseline_data1", [64.0])
    add_run(folder, "baseline_match0.5", [66.0])
    lines = analyze.differences(analyze.Results(folder))
    assert "1 of 3 numbers lie within 1.5 points" in lines[0]
    assert "the median difference is -0.12 (from -2.90 to +6.00)" in lines[0]
    assert lines[0].endswith("in one case of twenty: baseline -2.90, wd_5e-3 +6.00 (dropout after every block, whose spread is "
                             "larger, aside).")
    assert "the median difference is +1.85 (from +0.20 to +3.50, 2 numbers)" in lines[1]
    assert "baseline 62.00, baseline_data1 64.00 (mean 63.00, standard deviation 1.41); the report 64.90" in lines[2]
    assert ("baseline val_acc 66.00, train_acc 90.00, for val_acc 62.00, train_acc 90.00; the report val_acc 64.90, "
            "train_acc 89.80") in lines[3]
    assert "Were it 15 %" in lines[4]  # 60 + 0.153 * 32 = 64.9


def test_a_mean_of_two_seeds_is_further_off_than_chance_sooner_than_one_run(folder):
    add_run(folder, "baseline", [62.4])
    add_run(folder, "baseline_seed1", [62.6])  # one degree of freedom, sd 0.1414: a mean of two 2.20, one run 2.54
    add_run(folder, "bs16", [67.6])            # -2.52
    add_run(folder, "dropout_all_p0.2", [64.9])  # +10, but it has a spread of its own
    line = analyze.differences(analyze.Results(folder))[0]
    assert line.split("case of twenty: ")[1].split(" (")[0] == "baseline -2.40, wd_1e-4 +5.80"


def test_figure_3c_is_compared_with_and_without_noise_and_erasing(folder):
    add_run(folder, "wd_1e-4", [10.0] * 2 + [60.0] * 10)
    assert not any("Figure 3c" in line for line in analyze.differences(analyze.Results(folder)))
    add_run(folder, "wd_1e-4_plain", [61.0] * 10)
    with open(folder / "report_curves.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["run"] == "wd_1e-4" and int(row["epoch"]) > 30]
    train_acc, val_acc = (sum(float(row[key]) for row in rows) / 10 for key in ("train_acc", "val_acc"))
    line, = (line for line in analyze.differences(analyze.Results(folder)) if "Figure 3c" in line)
    assert f"with 90.00 / 60.00, without 90.00 / 61.00; the report {train_acc:.2f} / {val_acc:.2f}." in line


def test_figure_5bs_course_is_compared(folder):
    assert not any("Figure 5b" in line for line in analyze.differences(analyze.Results(folder)))
    add_run(folder, "dropout_all_p0.2", [20.0] + [40.0] * 9 + [50.0] * 10)
    add_run(folder, "warmup_cosine", [30.0] * 10 + [37.5] * 10)
    with open(folder / "report_curves.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["run"] == "dropout_all_p0.2"]
    start, rise = ([f"{number:{form}}" for number in numbers] for form, numbers in (
        (".1f", [float(rows[0][key]) for key in ("train_acc", "val_acc")]),
        ("+.1f", [sum(float(row[key]) * sign for row, sign in zip(rows[20:], [-0.1] * 10 + [0.1] * 10))
                  for key in ("train_acc", "val_acc")])))
    line, = (line for line in analyze.differences(analyze.Results(folder)) if "Figure 5b" in line)
    assert len(rows) == 40 and f"the report {' / '.join(start)}, {' / '.join(rise)};" in line
    assert "; ours 90.0 / 20.0, +0.0 / +12.0; without dropout 90.0 / 30.0, +0.0 / +7.5." in line


def test_the_shortcuts_figure_waits_for_its_runs_and_shows_a_recipe_once(folder, monkeypatch):
    shown, draw = [], analyze.draw_stopped
    monkeypatch.setattr(analyze, "draw_stopped", lambda results, names, path: shown.append(names) or draw(results, names, path))
    analyze.summary(folder)
    assert not (folder / "figures" / "shortcut.png").exists()
    for name in ("final", "shuffle1", "match0", "match0_seed1"):
        add_run(folder, name, [70.0], val_acc_agree=71.0, val_follows_digit=5.0)
    analyze.summary(folder)
    assert (folder / "figures" / "shortcut.png").exists() and "figures/shortcut.png" in (folder / "README.md").read_text()
    assert len(shown) == 1 and sorted(shown[0]) == ["final", "match0", "shuffle1"]


def test_what_the_figures_show(folder, shown):
    add_run(folder, "final_seed1", [70.0, 72.0], val_acc_agree=94.0, val_follows_digit=8.0)
    add_run(folder, "taught2_seed1", [85.0])  # the only one of its recipe
    for name in ("final", "shuffle1"):
        add_run(folder, name, [50.0, 71.5 if name == "final" else 80.5], val_acc_agree=90.0, val_follows_digit=5.0)
    analyze.summary(folder)

    with open(folder / "report_curves.csv") as file:
        traced = [row for row in csv.DictReader(file) if row["run"] == "final"]
    theirs = {key: [float(row[key]) for row in traced] for key in ("train_acc", "val_acc")}
    axis, = shown["figure6.png"].axes
    drawn = {(line.get_color(), line.get_linestyle(), line.get_linewidth()): line.get_ydata().tolist() for line in axis.lines}
    assert drawn == {("C0", "-", 1.5): [90.0] * 60, ("C0", "-", 0.6): [90.0] * 60, ("C0", "--", 1): theirs["train_acc"],
                     ("C1", "-", 1.5): [50.0] * 59 + [71.5], ("C1", "-", 0.6): [70.0] * 59 + [72.0],
                     ("C1", "--", 1): theirs["val_acc"]}

    axis, = shown["overview.png"].axes
    names = [label.get_text() for label in axis.get_yticklabels()]
    dots, reported = ([(x, names[round(y)]) for x, y in zip(*line.get_data())] for line in axis.lines)
    assert names[0] == "lr_1e-4" and names[-3:] == ["wd_1e-4", "shuffle1", "taught2_seed1"]  # by the best val_acc
    assert {(71.5, "final"), (72.0, "final"), (68.5, "bs16")} <= set(dots) and len(dots) == len(names) + 1
    assert {(73.08, "final"), (70.12, "bs16"), (62.1, "wd_1e-2")} <= set(reported)

    axis, = shown["shortcut.png"].axes
    assert [label.get_text().split("\n")[0] for label in axis.get_xticklabels()] == ["final", "shuffle1"]
    assert [[bar.get_height() for bar in bars] for bars in axis.containers] == [[71.75, 80.5], [92, 90], [60, 60], [6.5, 5]]
    dots = [sorted(zip(line.get_xdata().round(1), line.get_ydata())) for line in axis.lines]
    assert dots == [[(-0.3, 71.5), (-0.3, 72), (0.7, 80.5)], [(-0.1, 90), (-0.1, 94), (0.9, 90)],
                    [(0.1, 60), (0.1, 60), (1.1, 60)], [(0.3, 5), (0.3, 8), (1.3, 5)]]


def test_only_whole_runs_as_they_are_listed_on_all_the_images_count(folder):
    add_run(folder, "bs16", [80.0], whole=False)
    add_run(folder, "bs32", [80.0], limit=1000)
    add_run(folder, "bs64", [80.0], data="synthetic data")
    add_run(folder, "erase_0.2", [80.0], noise=0.05)  # left by an older line of experiments.sh
    add_run(folder, "rotate_5", [80.0], amp=True)
    found = analyze.Results(folder).log
    assert not {"bs16", "bs32", "bs64", "erase_0.2"} & set(found) and "rotate_5" in found


def test_a_folder_without_runs_is_named(tmp_path):
    with pytest.raises(UserError, match="report.csv not found"):
        analyze.summary(tmp_path)
    for name in ("report.csv", "report_curves.csv"):
        shutil.copy(ROOT / "results" / name, tmp_path)
    with pytest.raises(UserError, match="no finished run"):
        analyze.summary(tmp_path)
