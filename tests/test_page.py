"""results/page.py on made-up runs: which of them count, and means and verdicts computed by hand."""
import json
import math
import re
import shutil

import pytest

from results import page
from utils import read_csv, write_csv

RECIPES = {  # made-up flags
    "final": "", "baseline": "--bs 8", "bs64": "--bs 64", "bs32": "--bs 32", "bs16": "--bs 16",
    "lr_1e-4": "--lr 1e-4", "step": "--a", "wd_1e-2": "--b", "wd_5e-3": "--c", "wd_1e-4": "--d",
    "constant": "--e", "cosine_50": "--f", "noise_0.05_erase_0.3": "--noise 0.05",
    "lr_min_1e-6": "--lr-min 1e-6",
    "warmup_cosine": "--g", "dropout_all_p0.1": "--dropout-last 5", "dropout_all_p0.2": "--dropout-p 0.2",
    "match0": "--match-prob 0", "best": "--h --amp --epochs 60", "best12": "--h --amp --epochs 12",
    "best12_flip": "--h --amp --epochs 12 --flip 0.5", "best12_shuffle0": "--h --amp --shuffle-digits 0",
    "mine": "--my-flag"}


def command(recipe, seed):
    flags = f"{RECIPES[recipe]} --seed {seed}".strip()
    return f"python train.py {flags} --out results/runs/{recipe}/seed{seed}"


def add_run(folder, recipe, accs, first=0, **args):
    """A run of four epochs for each of `accs`, which is the val_acc of the third epoch, the best."""
    for seed, acc in enumerate(accs, start=first):
        out = folder / "runs" / recipe / f"seed{seed}"
        log = [{"epoch": i + 1, "train_acc": 80.0 + i, "val_acc": acc - abs(i - 2), "val_acc_agree": 95.0,
                "val_acc_conflict": 60.0 - abs(i - 2), "val_follows_digit": 5.0, "seconds": 7.0}
               for i in range(4)]
        write_csv(out / "log.csv", log)
        write_csv(out / "best.csv", [{"epoch": 3, "val_acc": acc, "test_acc": acc - 1, "test_images": 10000}])
        settings = {"epochs": 4, "data": page.COMPOSITES, "command": command(recipe, seed),
                    "amp": "--amp" in RECIPES[recipe],
                    "train_images": 45000, "fingerprint": page.REPORT_SHA256["train", 45000],
                    "hardware": "a machine", "torch": "2"}
        (out / "args.json").write_text(json.dumps({**settings, **args}))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Results folder without runs, for a list of three seeds of every recipe."""
    lines = [f"{command(recipe, seed)} --resume" for recipe in RECIPES for seed in range(3)]
    monkeypatch.setattr(page, "HERE", tmp_path)
    monkeypatch.setattr(page, "listing", lambda: "\n".join([*lines, "# a comment"]) + "\n")
    copy_tables(tmp_path)
    return tmp_path


def copy_tables(folder):
    for name in ("report.csv", "report_curves.csv", "claims.csv", "sections.csv"):
        shutil.copy(page.Path(page.__file__).with_name(name), folder)


def rows(name, text):
    """The page's table rows that have `name` in their first or second cell, as lists of cells."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if name in row[:2]]


def claim(text):
    """The verdict on the one claim whose text begins like this."""
    listed = [list(row.values()) for row in read_csv(page.HERE / "claims.csv")]
    sides, = [sides for _, words, *sides in listed if words.startswith(text)]
    return page.judge(page.Results(), *sides)[1]


def test_means_and_spreads_are_those_computed_by_hand(folder):
    add_run(folder, "bs16", [69.0, 70.0, 71.0])             # squares from the mean: 1 + 0 + 1
    add_run(folder, "bs32", [66.0, 67.0])                   # 0.25 + 0.25
    add_run(folder, "bs64", [60.0])                         # a single run says nothing of the spread
    add_run(folder, "dropout_all_p0.2", [50.0, 60.0])       # 25 + 25, apart
    add_run(folder, "best", [84.0, 84.2])                   # 0.01 + 0.01, apart
    add_run(folder, "best12_shuffle0", [70.0, 72.0])        # 1 + 1, apart
    results = page.Results()
    sd = math.sqrt((2 + 0.5) / 3)
    assert results.spread("bs64") == pytest.approx(sd)
    assert results.spread("dropout_all_p0.1") == pytest.approx(math.sqrt(50))
    assert results.spread("best12") == pytest.approx(math.sqrt(0.02))
    assert results.spread("best12_shuffle0") == pytest.approx(math.sqrt(2))
    assert results.ours("bs16") == (70.0, pytest.approx(sd / math.sqrt(3)), "70.00 (3 seeds, sd 1.00)")
    assert results.ours("bs64") == (60.0, pytest.approx(sd), "60.00 (1 seed)")
    assert results.ours("final")[2] == "not run"
    assert results.mean("bs16", "train_acc") == 83.0        # the last epoch's
    assert results.mean("bs16", "val_acc_conflict") == 60.0  # the best epoch's


def test_the_page_has_the_reports_numbers_beside_ours(folder):
    add_run(folder, "final", [71.0, 72.0, 73.0])            # the sd of a run is 1
    add_run(folder, "bs16", [67.0])  # 3.12 below the report: more than 2 * sqrt(2) = 2.83
    add_run(folder, "best12", [80.0, 81.0, 82.0])           # here it is 1, too
    add_run(folder, "best12_flip", [78.0, 79.0, 80.0])      # 2.00 below: more than 2 * sqrt(2 / 3) = 1.63
    page.main()
    text = (folder / "README.md").read_text()
    assert rows("final", text)[0][3:6] == ["72.00 (3 seeds, sd 1.00)", "-1.08", "within noise"]
    assert rows("dropout_last3_p0.1 (our final)", text)[0][4] == "-0.64"  # 72.64 in the report
    assert rows("bs16", text)[0][2:8] == ["70.12", "67.00 (1 seed)", "-3.12", "yes", "", "83.00"]
    assert rows("baseline", text)[0][2:6] == ["≈64.90", "not run", "", ""]
    flags, _, acc = rows("best12_flip", text)[0][1:4]
    assert flags == "`BEST --epochs 12 --flip 0.5`" and acc == "79.00 (3 seeds, sd 1.00)"
    assert rows("best12 beats best12_flip", text)[0][3] == "holds"
    assert rows("a machine", text) == [["a machine", "4", "7"]]
    assert rows("a machine, --amp", text) == [["a machine, --amp", "6", "7"]]
    assert "10 of 69 runs are in" in text
    assert text.splitlines()[-1].startswith("Not run yet: baseline, bs64, bs32, bs16 (2 of its seeds), ")


def test_verdicts_follow_from_two_standard_errors(folder):
    add_run(folder, "final", [72.0, 73.0, 74.0])            # the sd of a run is 1; two single runs: 2.83
    singles = {"bs64": 60.0, "bs32": 62.9, "bs16": 65.7, "cosine_50": 65.0, "constant": 68.0, "wd_1e-2": 60.0,
               "wd_5e-3": 66.0, "wd_1e-4": 67.9, "lr_min_1e-6": 69.0, "noise_0.05_erase_0.3": 71.8}
    for name, acc in singles.items():
        add_run(folder, name, [acc])
    assert claim("batch size 32 beats 64") == "holds"
    assert claim("batch size 16 beats 32") == "within noise"
    assert claim("cosine beats a constant") == "does not hold"
    assert claim("cosine beats StepLR") == "not run"
    assert claim("none of three weight decays gets 70 %") == "holds"  # 2.1 below a fixed number: more than 2
    assert claim("a smaller lr_min") == "holds"             # 2.8 apart
    assert claim("lr 1e-4 ends above 50") == "not run"
    add_run(folder, "lr_min_1e-6", [68.9])
    assert claim("a smaller lr_min") == "does not hold"     # 2.9 apart
    add_run(folder, "lr_1e-4", [52.5])                      # between 50 and 55, by more than 2
    assert claim("lr 1e-4 ends above 50") == claim("lr 1e-4 ends slightly above 50") == "holds"
    for acc, above, below in ((47.9, "does not hold", "holds"), (49.0, "within noise", "holds"),
                              (51.9, "within noise", "holds"), (53.1, "holds", "within noise"),
                              (57.1, "holds", "does not hold")):
        add_run(folder, "lr_1e-4", [acc])
        assert (claim("lr 1e-4 ends above"), claim("lr 1e-4 ends slightly")) == (above, below)
    add_run(folder, "wd_5e-3", [72.1])
    assert claim("none of three weight decays gets 70 %") == "does not hold"


def test_dropout_after_every_block_has_a_spread_of_its_own(folder):
    add_run(folder, "warmup_cosine", [71.0, 72.0, 73.0])
    add_run(folder, "dropout_all_p0.1", [64.0])
    assert claim("dropout after every block hurts, p 0.1") == "not known"
    add_run(folder, "dropout_all_p0.2", [48.0, 53.0, 58.0])  # an sd of 5; 2 * sqrt(25 + 1 / 3) = 10.07
    assert claim("dropout after every block hurts, p 0.1") == "within noise"
    assert claim("dropout after every block hurts, p 0.2") == "holds"


def test_runs_that_do_not_count(folder, capsys):
    add_run(folder, "bs16", [70.0])
    add_run(folder, "bs16", [1.0], first=1, fingerprint="other images")
    add_run(folder, "bs16", [1.0], first=2, epochs=5)
    add_run(folder, "bs32", [1.0], command=command("bs32", 0) + " --lr 1")
    add_run(folder, "bs32", [1.0], first=1, train_images=5000)
    add_run(folder, "bs32", [1.0], first=2)
    (folder / "runs/bs32/seed2/best.csv").unlink()
    add_run(folder, "match0", [66.0], fingerprint="other digits")  # as its flags say
    results = page.Results()
    assert {name: results.values(name) for name in results.runs} == {"bs16": [70.0], "match0": [66.0]}
    assert len(re.findall("does not count", capsys.readouterr().out)) == 4


def test_twice_the_same_bytes(folder):
    for name in ("final", "best", "mine", "noise_0.05_erase_0.3"):
        add_run(folder, name, [70.0, 71.5])
    page.main()
    files = [folder / "README.md", *sorted((folder / "figures").iterdir())]
    figures = ["figure2", "figure4", "figure5", "figure6", "overview", "shortcut"]
    assert [path.stem for path in files[1:]] == figures
    before = [path.read_bytes() for path in files]
    page.main()
    assert [path.read_bytes() for path in files] == before
    text = before[0].decode()
    assert rows("**other runs**", text) and rows("mine", text)[0][3].startswith("70.75 (2 seeds")


@pytest.mark.parametrize("runs", [[], ["bs16"]])
def test_few_runs_are_enough(folder, runs):
    for name in runs:
        add_run(folder, name, [70.0])
    page.main()
    assert "nan" not in (folder / "README.md").read_text()
    assert (folder / "figures" / "overview.png").exists() == bool(runs)


def test_without_best_the_flags_are_written_out(folder, monkeypatch):
    monkeypatch.setattr(page, "listing", lambda: f"{command('bs16', 0)} --resume\n")
    add_run(folder, "bs16", [70.0])
    page.main()
    text = (folder / "README.md").read_text()
    assert "BEST" not in text and f"`{RECIPES['bs16']}`" in text


def test_the_ordinary_loop_stands_on_the_page(folder):
    for seed, acc in enumerate([61.0, 62.0]):
        write_csv(folder / f"runs/ordinary/seed{seed}/best.csv", [{"epoch": 3, "val_acc": acc}])
    page.main()
    assert "on the same images to 61.50 (2 seeds, sd 0.71). " in (folder / "README.md").read_text()


def test_the_real_list_is_read(tmp_path, monkeypatch):
    listed = page.listing()
    copy_tables(tmp_path)
    monkeypatch.setattr(page, "HERE", tmp_path)
    monkeypatch.setattr(page, "listing", lambda: listed)
    results = page.Results()
    assert len(results.missing) == listed.count("python train.py ") > 0
    named = [row["recipes"] for row in read_csv(tmp_path / "sections.csv")]
    named += [row["recipe"] for row in results.report]
    named += [row[side] for row in read_csv(tmp_path / "claims.csv") for side in ("left", "right")
              if isinstance(row[side], str)]
    assert results.flags.keys() >= set(" ".join(named).split()) and results.flags["final"] == ""
