"""experiments.sh: its table against the report's settings; skipping, trials and names with a stand-in for
python that only records how it was called."""
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

import train

ROOT = Path(train.__file__).parent

# bs, epochs, lr, weight_decay, schedule, noise, erase, dropout_last, dropout_p: as the report has them
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


def listed(*words, **environment):
    """The commands of --list, each a list of words."""
    text = subprocess.run(["bash", ROOT / "experiments.sh", "--list", *words], capture_output=True, text=True,
                          check=True, env={**os.environ, **environment}).stdout
    return [shlex.split(line) for line in text.splitlines() if not line.startswith("#")]


def test_every_run_is_a_command_of_train_py_with_a_folder_of_its_own():
    folders = []
    for command in listed():
        assert command[:2] == ["python", "train.py"]
        args = train.parse_args(command[2:])
        assert args.out.startswith("results/runs/") and args.out.endswith(f"/seed{args.seed}") and args.resume
        folders.append(args.out)
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("name", REPORT)
def test_the_reports_runs_have_the_reports_settings(name):
    seeds = []
    for command in listed():
        args = train.parse_args(command[2:])
        if Path(args.out).parent.name != name:
            continue
        seeds.append(args.seed)
        settings = (args.bs, args.epochs, args.lr, args.weight_decay, args.schedule, args.noise, args.erase,
                    args.dropout_last, args.dropout_p if args.dropout_last else None)
        assert settings == REPORT[name]
        assert (args.flip, args.rotate, args.erase_scale, args.lr_min) == (0.5, 0, [0.02, 0.05], 1e-5)
        assert (args.optimizer, args.init) == ("adam", "fan_in")
        assert args.match_prob is None and not args.amp
        assert args.warmup_epochs == 10 or args.schedule != "warmup_cosine"
    assert seeds[:3] == [0, 1, 2]


@pytest.fixture
def sandbox(tmp_path):
    """A copy of experiments.sh with a python that records its calls and leaves a finished run behind."""
    repo = tmp_path / "a repo"
    repo.mkdir()
    shutil.copy(ROOT / "experiments.sh", repo)
    (repo / "train.py").touch()
    (repo / "python").write_text("""#!/usr/bin/env bash
cd "$(dirname "$0")"
echo "$*" >> calls
echo "${OMP_NUM_THREADS-} ${DATA_DIR-}" >> environment
[ "$1" != data.py ] || exit "${NO_DATA:-0}"
[ "$1" = train.py ] || exit 0
[[ "$*" != *"/lr_1e-4/"* ]] || [ -n "${LET_IT:-}" ] || exit 1
words=("$@")
for i in "${!words[@]}"; do [ "${words[i]}" != --out ] || out=${words[i + 1]}; done
mkdir -p "$out"
command="python $*"
echo " \\"command\\": \\"${command%% --resume*}\\"," > "$out/args.json"
touch "$out/best.csv" "$out/best.pt"
""")
    (repo / "python").chmod(0o755)

    def call(*words, script=repo / "experiments.sh", cwd=repo, **environment):
        for name in ("calls", "environment"):
            (repo / name).write_text("")
        kept = dict(os.environ)
        for name in ("DATA_DIR", "OUT", "OMP_NUM_THREADS"):
            kept.pop(name, None)
        result = subprocess.run(["bash", script, *words], cwd=cwd, capture_output=True, text=True,
                                env={**kept, "PYTHON": str(repo / "python"), **environment})
        calls = (repo / "calls").read_text().splitlines()
        return result, [line for line in calls if line.startswith("train.py")]
    call.repo = repo
    return call


def out_of(command):
    return command.split("--out ")[1].split(" --resume")[0]


def test_runs_by_name_once_and_not_again(sandbox):
    result, calls = sandbox("bs16", "final/seed1")
    assert result.returncode == 0
    folders = {command[command.index("--out") + 1] for command in listed()}
    assert {out_of(call) for call in calls} == {folder for folder in folders if "/bs16/" in folder} | {
        "results/runs/final/seed1"}
    result, calls = sandbox("bs16", "final/seed1")
    assert result.returncode == 0 and calls == [] and (sandbox.repo / "calls").read_text() == ""


def test_an_edited_or_unfinished_run_is_run_again(sandbox):
    sandbox("bs16/seed0", "bs32/seed0", "bs64/seed0")
    (sandbox.repo / "results/runs/bs16/seed0/best.csv").unlink()
    script = sandbox.repo / "experiments.sh"
    script.write_text(script.read_text().replace("--bs 32 --epochs 40", "--bs 33 --epochs 40"))
    _, calls = sandbox("bs16/seed0", "bs32/seed0", "bs64/seed0")
    assert [out_of(call) for call in calls] == ["results/runs/bs16/seed0", "results/runs/bs32/seed0"]


def test_a_row_can_be_commented_out_and_its_seeds_are_free(sandbox):
    script = sandbox.repo / "experiments.sh"
    text = script.read_text().replace("\nbs64 ", "\n # bs64 ").replace("\nbs32 ", "\n#bs32 ")
    script.write_text(text.replace("\nfast ", "\nmy 4,7 --bs 8\nfast "))
    _, calls = sandbox("my")
    assert [out_of(call) for call in calls] == ["results/runs/my/seed4", "results/runs/my/seed7"]
    for name in ("bs64", "bs32", "#bs32", "#", "m"):
        assert sandbox(name)[0].returncode == 2


def test_the_data_are_checked_first_and_the_final_model_is_analyzed(sandbox):
    sandbox("bs16/seed0", "final/seed0")
    calls = [line.split()[0] for line in (sandbox.repo / "calls").read_text().splitlines()]
    assert calls == ["data.py", "train.py", "train.py", "analyze.py"]
    result, calls = sandbox("baseline", NO_DATA="1")
    assert result.returncode == 1 and calls == []


def test_everything_once_and_a_failure_is_told_but_stops_nothing(sandbox):
    expected = sorted(command[command.index("--out") + 1] for command in listed())
    result, calls = sandbox(JOBS="3")
    assert result.returncode != 0 and sorted(map(out_of, calls)) == expected
    result, calls = sandbox(JOBS="3", LET_IT="1")
    assert result.returncode == 0 and {out_of(call).split("/")[2] for call in calls} == {"lr_1e-4"}


@pytest.mark.parametrize("jobs, given, expected", [("1", None, ""), ("3", None, "2"), ("9", None, "1"),
                                                   ("3", "4", "4")])
def test_jobs_share_the_cores(sandbox, jobs, given, expected):
    """Of seven; where there is no nproc either."""
    (sandbox.repo / "nproc").write_text("#!/bin/sh\necho 7\n")
    (sandbox.repo / "nproc").chmod(0o755)
    sandbox("bs64", JOBS=jobs, PATH=f"{sandbox.repo}:{os.environ['PATH']}",
            **({"OMP_NUM_THREADS": given} if given else {}))
    assert (sandbox.repo / "environment").read_text().splitlines()[-1].split(" ")[0] == expected


def test_a_trial_shrinks_the_runs_and_stays_out_of_the_results(sandbox):
    _, calls = sandbox("final/seed0", EPOCHS="12", LIMIT="100")
    assert out_of(calls[0]) == "results/trial/final/seed0"
    args = train.parse_args(shlex.split(calls[0])[1:])
    assert (args.epochs, args.warmup_epochs, args.limit) == (12, 2, 100)


def test_other_data_and_another_folder_of_results(sandbox, tmp_path):
    """Relative folders are the caller's, who is elsewhere, and comes through a link."""
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    (elsewhere / "link.sh").symlink_to(sandbox.repo / "experiments.sh")
    _, calls = sandbox("final/seed0", script=elsewhere / "link.sh", cwd=elsewhere, DATA_DIR="my data",
                       OUT="my runs")
    assert out_of(calls[0]) == f"{elsewhere}/my runs/final/seed0"
    assert (sandbox.repo / "environment").read_text().splitlines()[-1] == f" {elsewhere}/my data"


@pytest.mark.parametrize("words, environment", [
    (("bs16", "nonsense"), {}), ((), {"JOBS": "0"}), ((), {"EPOCHS": "x"}), ((), {"LIMIT": "1e3"}),
    ((), {"SLURM_ARRAY_TASK_ID": "1000"})])
def test_what_makes_no_sense_exits_with_2_and_runs_nothing(sandbox, words, environment):
    result, calls = sandbox(*words, **environment)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and calls == []


def test_a_slurm_task_takes_its_run(sandbox, tmp_path):
    """SLURM runs a copy of the script from a folder of its own, in the folder of --chdir or of sbatch."""
    spool = tmp_path / "spool"
    spool.mkdir()
    shutil.copy(sandbox.repo / "experiments.sh", spool / "slurm_script")
    commands = listed()
    for number in (0, len(commands) - 1):
        for cwd, submitted in ((spool, sandbox.repo), (sandbox.repo, "/")):
            shutil.rmtree(sandbox.repo / "results", ignore_errors=True)
            _, calls = sandbox(script=spool / "slurm_script", cwd=cwd, SLURM_ARRAY_TASK_ID=str(number),
                               SLURM_SUBMIT_DIR=str(submitted))
            assert [out_of(call) for call in calls] == [commands[number][commands[number].index("--out") + 1]]


def test_under_sh_it_says_one_line():
    result = subprocess.run(["sh", ROOT / "experiments.sh", "--list"], capture_output=True, text=True)
    if result.returncode:  # where sh is bash, it works
        assert result.returncode == 2
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_help_is_the_head_of_the_script():
    for flag in ("--help", "-h"):
        result = subprocess.run(["bash", ROOT / "experiments.sh", flag], capture_output=True, text=True)
        assert result.returncode == 0 and "--list" in result.stdout and "DATA_DIR=" in result.stdout
        assert "#" not in result.stdout and "error" not in result.stdout
