#!/usr/bin/env bash
# Every experiment of the report, and some beyond it. A row of the table is a recipe, each of its seeds a run.
#
#   bash experiments.sh                    run everything that is not finished; after a stop, this goes on
#   bash experiments.sh final bs16/seed0   run these recipes, or runs
#   bash experiments.sh --list             print each run's command
#   bash experiments.sh demo               make synthetic data, train a few epochs, analyze: no download
#   sbatch --array=0-N experiments.sh      a run per SLURM task (--list prints N); first: python data.py
#
# Environment variables, as in JOBS=2 bash experiments.sh:
#   JOBS=2 (two at once)   EPOCHS=1 LIMIT=64 (a trial, in results/trial)   COMPILE=1 (for a GPU)
#   DATA_DIR=DIR (of the data)   OUT=DIR (of the results, for results/runs)   PYTHON=interpreter
[ -n "${BASH_VERSION:-}" ] || { echo "error: this needs bash: bash experiments.sh" >&2; exit 2; }
set -u -o pipefail
fail() { echo "error: $1" >&2; exit 2; }

# SLURM runs a copy of this file elsewhere: the repository is then the job's folder, or where it was submitted
for repo in "$(dirname "$(readlink -f "$0")")" "$PWD" "${SLURM_SUBMIT_DIR:-.}"; do
    [ -f "$repo/train.py" ] && break
done
# a relative folder is relative to where this was called
[ -z "${DATA_DIR:-}" ] || [ "${DATA_DIR:0:1}" = / ] || DATA_DIR=$PWD/$DATA_DIR
[ -z "${OUT:-}" ] || [ "${OUT:0:1}" = / ] || OUT=$PWD/$OUT
cd "$repo" && [ -f train.py ] || fail "train.py is not in $repo: start this from the repository"
PYTHON=${PYTHON:-$(command -v python || command -v python3)}
export PYTHON ${DATA_DIR:+DATA_DIR}
JOBS=${JOBS:-1}
for value in "$JOBS" "${EPOCHS:-1}" "${LIMIT:-1}"; do
    [[ $value =~ ^[1-9][0-9]*$ ]] || fail "JOBS, EPOCHS and LIMIT are numbers from 1 on, not '$value'"
done
trial="${EPOCHS:+ --epochs $EPOCHS --warmup-epochs $((EPOCHS / 6))}${LIMIT:+ --limit $LIMIT}"
OUT=${OUT:-results/$([ -n "$trial" ] && echo trial || echo runs)}

# A row lists the flags that differ from the final recipe, which is train.py's defaults. Where a flag stands
# twice, the later one counts.
plain="--schedule cosine --noise 0 --erase 0 --dropout-last 0"   # sections 1 to 1.2: flip and normalize only
tuned="--schedule cosine --dropout-last 0"                       # section 1.3: the best augmentation of 1.2
wide="--erase-scale 0.02 0.1"
ours="--bs 32 --lr 1e-2 --lr-min 0 --optimizer muon --weight-decay 0.01 --schedule onecycle"
ours="$ours --shuffle-digits 1 --shift 1 --flip 0 --flip-picture 0.5 --noise 0 --erase 0 --dropout-last 0"
ours="$ours --label-smoothing 0.1 --amp"
ours12="$ours --epochs 12"

table() {  # recipe, seeds, flags; in the order of running, so some recipes have their other seeds later
    cat <<TABLE
final                   0,1,2
baseline                0,1,2   $plain --bs 64 --epochs 25
bs16                    0,1,2   $plain --epochs 40
noise_0.05_erase_0.3    0,1,2   $tuned --epochs 40
lr_1e-4                 0,1,2   $tuned --epochs 40 --lr 1e-4
wd_1e-2                 0,1,2   $tuned --epochs 40 --weight-decay 1e-2
wd_5e-3                 0,1,2   $tuned --epochs 40 --weight-decay 5e-3
wd_1e-4                 0,1,2   $tuned --epochs 40 --weight-decay 1e-4
warmup_cosine           0,1,2   --dropout-last 0 --epochs 50 --warmup-epochs 10
dropout_all_p0.2        0,1,2   --dropout-last 5 --dropout-p 0.2 --epochs 40 --warmup-epochs 10
best                    0,1,2   $ours --epochs 60
fast                    0,1,2   $ours --epochs 3 --lr 1.5e-2 --weight-decay 0.05 --flip-picture 0 --shift 0
shuffle1                0,1,2   --shuffle-digits 1
match0                  0,1,2   --match-prob 0
match0.9                0,1,2   --match-prob 0.9
baseline_fan_out        0,1,2   $plain --bs 64 --epochs 25 --init fan_out
final_fan_out           0       --init fan_out
bs16_fan_out            0       $plain --epochs 40 --init fan_out
bs64                    0       $plain --bs 64 --epochs 40
bs32                    0       $plain --bs 32 --epochs 40
noise_0.01              0       $plain --epochs 40 --noise 0.01
noise_0.02              0       $plain --epochs 40 --noise 0.02
noise_0.05              0       $plain --epochs 40 --noise 0.05
noise_0.1               0       $plain --epochs 40 --noise 0.1
erase_0.2               0       $plain --epochs 40 --erase 0.2
erase_0.3               0       $plain --epochs 40 --erase 0.3
erase_0.4               0       $plain --epochs 40 --erase 0.4
erase_0.2_wide          0       $plain --epochs 40 --erase 0.2 $wide
erase_0.3_wide          0       $plain --epochs 40 --erase 0.3 $wide
erase_0.4_wide          0       $plain --epochs 40 --erase 0.4 $wide
rotate_5                0       $plain --epochs 40 --rotate 5
rotate_10               0       $plain --epochs 40 --rotate 10
lr_min_1e-6             0       $tuned --epochs 40 --lr-min 1e-6
constant                0       --dropout-last 0 --epochs 50 --schedule constant
step                    0       --dropout-last 0 --epochs 50 --schedule step
cosine_50               0       --dropout-last 0 --epochs 50 --schedule cosine
dropout_all_p0.1        0       --dropout-last 5
dropout_last1_p0.1      0       --dropout-last 1
dropout_last2_p0.1      0       --dropout-last 2
dropout_last1_p0.2      0       --dropout-last 1 --dropout-p 0.2
dropout_last2_p0.2      0       --dropout-last 2 --dropout-p 0.2
dropout_last3_p0.2      0       --dropout-last 3 --dropout-p 0.2
dropout_all_p0.2_cosine 0       $tuned --epochs 40 --dropout-last 5 --dropout-p 0.2
lr_1e-4_plain           0       $plain --epochs 40 --lr 1e-4
wd_1e-2_plain           0       $plain --epochs 40 --weight-decay 1e-2
wd_5e-3_plain           0       $plain --epochs 40 --weight-decay 5e-3
wd_1e-4_plain           0       $plain --epochs 40 --weight-decay 1e-4
bs32                    1,2     $plain --bs 32 --epochs 40
rotate_5                1,2     $plain --epochs 40 --rotate 5
step                    1,2     --dropout-last 0 --epochs 50 --schedule step
cosine_50               1,2     --dropout-last 0 --epochs 50 --schedule cosine
dropout_last1_p0.1      1,2     --dropout-last 1
best12                  0,1,2   $ours12
best12_shuffle0         0,1,2   $ours12 --shuffle-digits 0
best12_adamw            0,1,2   $ours12 --optimizer adamw --lr 5e-3 --weight-decay 0.05
best12_shift0           0,1,2   $ours12 --shift 0
best12_noise_erase      0,1,2   $ours12 --noise 0.05 --erase 0.3
best12_flip             0,1,2   $ours12 --flip 0.5 --flip-picture 0
best12_smoothing0       0,1,2   $ours12 --label-smoothing 0
best12_warmup_cosine    0,1,2   $ours12 --schedule warmup_cosine --warmup-epochs 3
TABLE
}

list=$(table | grep -v '^ *#' | while read -r recipe seeds flags; do   # RECIPE/seedN, a tab, the command
    for seed in ${seeds//,/ }; do
        printf '%s\tpython train.py %s--seed %s --out %q --resume%s\n' "$recipe/seed$seed" \
            "${flags:+$flags }" "$seed$trial" "$OUT/$recipe/seed$seed" "${COMPILE:+ --compile}"
    done
done)
case ${1:-} in
    --help|-h)
        sed -n '2,12s/^# \{0,1\}//p' experiments.sh
        exit ;;
    --list)
        cut -f 2 <<< "$list"
        echo "# as a SLURM array: sbatch --array=0-$(($(wc -l <<< "$list") - 1)) experiments.sh"
        exit ;;
    demo)
        set -e
        rm -rf results/demo  # the code may have changed
        "$PYTHON" tests/synthetic.py data/synthetic
        "$PYTHON" data.py --data-dir data/synthetic --sheet results/demo/dataset.png
        "$PYTHON" train.py --data-dir data/synthetic --out results/demo --epochs 8
        "$PYTHON" analyze.py --data-dir data/synthetic --ckpt results/demo/best.pt
        echo "demo done, on synthetic data: look at results/demo/shortcut.png and mistakes.png"
        exit ;;
esac
for name in "$@"; do
    [[ $'\n'$list = *$'\n'"$name"[$'/\t']* ]] || fail "there is no '$name', see --list"
done
chosen=$(while IFS=$'\t' read -r run command; do
    [[ $# = 0 || " $* " = *" $run "* || " $* " = *" ${run%/*} "* ]] && printf '%s\t%s\n' "$run" "$command"
done <<< "$list")
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || chosen=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" <<< "$chosen")
[ -n "$chosen" ] || fail "there is no run number $SLURM_ARRAY_TASK_ID, see --list"

todo=""  # the commands that have not finished; train.py checks each again, with the data
while IFS=$'\t' read -r run command; do
    this="\"command\": \"${command%% --out*} --out "
    if [ -f "$OUT/$run/best.csv" ] && grep -qF "$this" "$OUT/$run/args.json"; then
        echo "$run is finished"
    else
        todo+="\"\$PYTHON\" ${command#python }"$'\n'
    fi
done <<< "$chosen"
if [ "$JOBS" -gt 1 ]; then
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > JOBS ? cores / JOBS : 1))}
fi
status=0
if [ -n "$todo" ]; then
    [ -n "${SLURM_ARRAY_TASK_ID:-}" ] || "$PYTHON" data.py || exit   # downloads the data once, not in each job
    # each line of $todo is a shell command
    printf %s "$todo" | tr '\n' '\0' | xargs -0 -n 1 -P "$JOBS" bash -c || status=$?
fi
for run in final/seed0 best/seed0; do  # section 2, on the final model and on ours
    [[ $chosen = *"/$run "* && -f $OUT/$run/best.csv && ! -f $OUT/$run/analysis.txt ]] || continue
    "$PYTHON" analyze.py --ckpt "$OUT/$run/best.pt" || status=$?
done
exit $status
