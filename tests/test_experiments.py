"""experiments.sh: its list against the report's settings, and skipping, resuming, trials and names with a stand-in for
python that only records how it was called."""
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import train

ROOT = Path(train.__file__).parent

# bs, epochs, lr, weight_decay, schedule, noise, erase, dropout_last, dropout_p: as the report gives or shows them
REPORT = {
    "baseline": (64, 25, 1e-3, 1e-3, "cosine", 0, 0, 0, None),
    "bs16": (16, 40, 1e-3, 1e-3, "cosine", 0, 0, 0, None),
    "noise_0.05_erase_0.3": (16, 40, 1e-3, 1e-3, "cosine", 0.05, 0.3, 0, None),
    "lr_1e-4": (16, 40, 1e-4, 1e-3, "cosine", 0.05, 0.3, 0, None),
    "wd_1e-2": (16, 40, 1e-3, 1e-2, "cosine", 0.05, 0.3, 0, None),
    "wd_5e-3": (16, 40, 1e-3, 5e-3, "cosine", 0.05, 0.3, 0, None),
    "wd_1e-4": (16, 40, 1e-3, 1e-4, "cosine", 0.05, 0.3, 0, None),
    "warmup_cosine": (16, 50, 1e-3, 1e-3, "warmup_cosine", 0.05, 0.3, 0, None),
    "dropout_all_p0.2": (16, 40, 1e-3, 1e-3, "warmup_cosine", 0.05, 0.3, 5, 0.2),
    "final": (16, 60, 1e-3, 1e-3, "warmup_cosine", 0.05, 0.3, 3, 0.1),
}


def listing():
    return subprocess.run(["bash", ROOT / "experiments.sh", "--list"], capture_output=True, text=True, check=True).stdout


def listed(text=None):
    return [line.split() for line in (text or listing()).splitlines() if not line.startswith("#")]


def test_the_list_has_the_reports_runs_with_its_settings():
    text = listing()
    runs = {name: flags for name, *flags in listed(text)}
    assert len(runs) == len(listed(text))
    theirs, _ = text.split("# a recipe of our own\n")  # what follows is ours, or yours
    theirs = {name for name, *_ in listed(theirs)}
    for name, flags in runs.items():
        if flags[:1] == ["="]:
            assert flags[1] in runs
            continue
        args = train.parse_args(flags)
        recipe, _, seed = name.partition("_seed")
        if seed and recipe in runs:
            assert flags == [*runs[recipe], "--seed", seed]
            continue
        if name not in theirs:
            continue
        assert (args.flip, args.lr_min) == (0.5, 1e-6 if name == "lr_min_1e-6" else 1e-5)
        if not name.startswith(("final_data", "baseline_data", "baseline_match", "match", "shuffle")):  # the report's
            assert (args.seed, args.data_seed, args.match_prob, args.shuffle_digits) == (0, 0, 0.6, 0)
        if name in REPORT:
            got = (args.bs, args.epochs, args.lr, args.weight_decay, args.schedule, args.noise, args.erase,
                   args.dropout_last, args.dropout_p if args.dropout_last else None)
            assert got == REPORT.pop(name), name
    assert not REPORT  # every one was there


@pytest.fixture
def sandbox(tmp_path):
    """A copy of experiments.sh with a python that records its calls and leaves a finished run behind."""
    (tmp_path / "experiments.sh").write_bytes((ROOT / "experiments.sh").read_bytes())
    (tmp_path / "python").write_text("""#!/usr/bin/env bash
echo "$@" >> calls
[ "$1" != data.py ] || [ -z "${NO_DATA:-}" ] || exit 1
[ "$1" = train.py ] || exit 0
echo "${CUDA_VISIBLE_DEVICES-}" >> gpus
echo "${OMP_NUM_THREADS-}" >> threads
out=$4; mkdir -p "$out"; echo '"epochs": 2,' > "$out/args.json"; printf 'epoch\\n1\\n' > "$out/log.csv"
[[ "$*" != *"lr_1e-4 "* ]] || [ -n "${LET_IT:-}" ] || exit 1   # this run fails in its second epoch
echo 2 >> "$out/log.csv"
""")
    (tmp_path / "python").chmod(0o755)

    def call(*words, script="experiments.sh", cwd=tmp_path, **environment):
        (tmp_path / "calls").write_text("")
        result = subprocess.run(["bash", script, *words], cwd=cwd, capture_output=True, text=True,
                                env={**os.environ, "PYTHON": str(tmp_path / "python"), **environment})
        return result, [line for line in (tmp_path / "calls").read_text().splitlines() if line.startswith("train.py")]
    return call


def test_some_runs_by_name_and_again(sandbox):
    result, calls = sandbox("final", "bs16", "lr_1e-3")
    assert result.returncode == 0
    assert calls == ["train.py --resume --out results/final",
                     "train.py --resume --out results/bs16 --schedule cosine --noise 0 --erase 0 --dropout-last 0 --epochs 40",
                     "train.py --resume --out results/noise_0.05_erase_0.3 --schedule cosine --dropout-last 0 --epochs 40"]
    result, calls = sandbox("final", "bs16", "lr_1e-3")
    assert result.returncode == 0 and calls == [] and result.stdout.count("is finished") == 3


def test_the_data_are_checked_first_and_the_final_model_is_analyzed(sandbox, tmp_path):
    sandbox("bs16", "final", "bs32")
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0] == "data.py --sheet results/dataset.png"
    assert [call.split()[0] for call in calls[1:]] == ["train.py", "train.py", "analyze.py", "train.py"]
    assert calls[3] == "analyze.py --ckpt results/final/best.pt"
    result, calls = sandbox("baseline", NO_DATA="1")
    assert result.returncode == 1 and calls == []


@pytest.mark.parametrize("jobs, given, expected", [(1, None, ""), (3, None, "2"), (9, None, "1"), (3, "4", "4")])
def test_jobs_share_the_cores(sandbox, tmp_path, monkeypatch, jobs, given, expected):
    (tmp_path / "nproc").write_text("#!/bin/sh\necho 7\n")
    (tmp_path / "nproc").chmod(0o755)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    sandbox("bs16", "bs32", PATH=f"{tmp_path}:{os.environ['PATH']}", JOBS=str(jobs),
            **({"OMP_NUM_THREADS": given} if given else {}))
    assert (tmp_path / "threads").read_text().splitlines() == [expected] * 2


def test_an_unfinished_or_edited_run_is_run_again(sandbox, tmp_path):
    sandbox("bs16", "bs32")
    (tmp_path / "results/bs16/log.csv").write_text("epoch\n1\n")
    script = tmp_path / "experiments.sh"
    script.write_text(script.read_text().replace("--bs 32", "--bs 33"))
    assert len(sandbox("bs16", "bs32")[1]) == 2


def test_an_unknown_name_exits_with_2_and_runs_nothing(sandbox):
    result, calls = sandbox("bs16", "nonsense")
    assert result.returncode == 2 and "nonsense" in result.stderr and calls == []


@pytest.mark.parametrize("setting, value", [("JOBS", "0"), ("EPOCHS", "x"), ("LIMIT", "1e3"), ("EPOCHS", "-1")])
def test_a_setting_that_is_no_number_exits_with_2_and_runs_nothing(sandbox, setting, value):
    result, calls = sandbox("bs16", **{setting: value})
    assert result.returncode == 2 and f"'{value}'" in result.stderr and result.stderr.count("\n") == 1 and calls == []


def test_a_taught_run_waits_for_its_teachers(sandbox):
    result, calls = sandbox("taught2_seed1", "best")
    assert result.returncode != 0 and [call.split()[3] for call in calls] == ["results/best"]
    assert result.stderr.endswith("error: taught2_seed1 learns from best_shift2: run that first\n")
    result, calls = sandbox("taught2_seed1", "best_shift2", JOBS="2")
    assert result.returncode == 0 and [call.split()[3] for call in calls] == ["results/best_shift2", "results/taught2_seed1"]


@pytest.mark.parametrize("jobs", ["1", "3"])
def test_everything_once_and_a_failure_is_told_but_stops_nothing(sandbox, jobs):
    expected = [name for name, *flags in listed() if flags[:1] != ["="]]
    result, calls = sandbox(JOBS=jobs)
    assert result.returncode != 0
    assert sorted(call.split()[3] for call in calls) == sorted(f"results/{name}" for name in expected)
    result, calls = sandbox(JOBS=jobs, LET_IT="1")
    assert result.returncode == 0 and [call.split()[3] for call in calls] == ["results/lr_1e-4"]


def test_a_slurm_task_takes_its_run(sandbox, tmp_path):
    names = [name for name, *flags in listed() if flags[:1] != ["="]]
    spool, elsewhere = tmp_path / "spool", tmp_path / "elsewhere"  # slurmd runs a copy of the script from its own folder
    spool.mkdir(), elsewhere.mkdir()
    shutil.copy(tmp_path / "experiments.sh", spool / "slurm_script")
    (tmp_path / "train.py").touch()

    def task(number, *words):
        return sandbox(*words, script=spool / "slurm_script", cwd=elsewhere, SLURM_ARRAY_TASK_ID=str(number),
                       SLURM_SUBMIT_DIR=str(tmp_path))
    for i in (0, len(names) - 1):
        assert [call.split()[3] for call in task(i)[1]] == [f"results/{names[i]}"]
    assert [call.split()[3] for call in task(1, "wd_1e-2", "bs16")[1]] == ["results/bs16"]
    result, calls = task(len(names))
    assert result.returncode == 2 and str(len(names) - 1) in result.stderr and calls == []
    assert f"sbatch --array=0-{len(names) - 1} experiments.sh" in sandbox("--list")[0].stdout


@pytest.mark.parametrize("visible, expected", [(None, {"0", "1", "2"}), ("4,7", {"4", "7"}), ("", {""})])
def test_jobs_spread_over_the_gpus(sandbox, tmp_path, visible, expected):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nprintf '0\\n1\\n2\\n'\n")  # a machine with three
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "JOBS": "3"}
    visible = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    sandbox("baseline", "bs64", "bs32", "bs16", "final", **environment, **visible)
    assert set((tmp_path / "gpus").read_text().split("\n")[:-1]) == expected


def test_a_trial_shrinks_the_runs_and_stays_out_of_the_results(sandbox, tmp_path):
    _, calls = sandbox("final", "bs16", EPOCHS="12", LIMIT="100")
    assert [call.split()[3] for call in calls] == ["results/trial/final", "results/trial/bs16"]
    assert all(call.endswith("--epochs 12 --warmup-epochs 2 --limit 100") for call in calls)
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["trial"]
