#!/usr/bin/env bash
# Every experiment of the report, and some beyond it, one line a run. Results go to results/NAME.
#
#   bash experiments.sh demo           the offline main job: make synthetic data, train a few epochs, analyze
#   bash experiments.sh                run everything: a finished run is skipped, an interrupted one resumes
#   bash experiments.sh final bs16     run these
#   bash experiments.sh --list         print every run with its flags
#   sbatch --array=0-N experiments.sh  on a SLURM cluster: a run a task; --list prints N
#
#   JOBS=2        run several at once (each gets its share of the cores, and a GPU of its own where there are as many)
#   COMPILE=1     torch.compile the network, for a GPU
#   EPOCHS= LIMIT=   shrink every run to a trial, in results/trial/NAME: real results are not touched
#   DATA_DIR=     folder of the data (default: data)      PYTHON=   the interpreter (default: python)
set -u
cd "$(dirname "$0")" || exit
[ -f train.py ] || cd "${SLURM_SUBMIT_DIR:-.}" || exit   # SLURM runs a copy of this file from elsewhere
PYTHON=${PYTHON:-$(command -v python || command -v python3)}
JOBS=${JOBS:-1}
for value in "$JOBS" "${EPOCHS:-1}" "${LIMIT:-1}"; do
    [[ $value =~ ^[1-9][0-9]*$ ]] || { echo "error: JOBS, EPOCHS and LIMIT are numbers from 1 on, not '$value'" >&2; exit 2; }
done
results=results trial="" table=""
if [ -n "${EPOCHS:-}${LIMIT:-}" ]; then
    results=results/trial
    trial="${EPOCHS:+--epochs $EPOCHS --warmup-epochs $((EPOCHS / 6))} ${LIMIT:+--limit $LIMIT}"
fi

# The flags of a run are those in which it differs from the final recipe, which is train.py's defaults.
plain="--schedule cosine --noise 0 --erase 0 --dropout-last 0"   # sections 1 to 1.2: flip and normalize only
tuned="--schedule cosine --dropout-last 0"                       # section 1.3: with the best augmentation of 1.2
wide="--erase-scale 0.02 0.1"
ours="--bs 32 --lr 1e-2 --lr-min 0 --optimizer muon --weight-decay 0.01 --schedule onecycle --label-smoothing 0.1"
ours="$ours --shuffle-digits 1 --shift 1 --flip 0 --flip-picture 0.5 --noise 0 --erase 0 --dropout-last 0"   # beyond the report
taught="$ours --amp --label-smoothing 0 --teacher $results/best/best.pt"
taught2="$ours --amp --epochs 60 --label-share 0.3 --teacher $results/best/best.pt $results/best_shift2/best.pt"
taught3="$taught2 $results/best_dropout/best.pt"
ours12="$ours --epochs 12 --amp"   # leave --amp out on a CPU without bfloat16
fast="$ours --epochs 3 --lr 1.5e-2 --weight-decay 0.05 --start-factor 0.5 --flip-picture 0 --shift 0 --small-epochs 1"

# These run with training seeds 1 and 2 as well, as NAME_seed1 and NAME_seed2.
again="baseline bs32 bs16 rotate_5 noise_0.05_erase_0.3 lr_1e-4 wd_1e-2 wd_5e-3 wd_1e-4 step cosine_50"
again="$again warmup_cosine dropout_all_p0.2 final match0 match0.9 shuffle0.5 shuffle1 match0.9_shuffle1"
again="$again best best_branches best_bs16 best_rotate_5 best12 best12_shuffle0 best12_flip best12_shift0 best12_adamw"
again="$again best12_wd_0.05 best12_warmup_cosine best12_smoothing0 best12_bs16 best12_noise_erase best12_dropout"
again="$again best12_branches fast"

list() {  # name, flags; "name = other" is the same run under a second name
    cat <<TABLE
# 1 baseline
baseline                $plain --bs 64 --epochs 25
# 1.1 batch size
bs64                    $plain --bs 64 --epochs 40
bs32                    $plain --bs 32 --epochs 40
bs16                    $plain --epochs 40
# 1.2 data augmentation
noise_0.01              $plain --epochs 40 --noise 0.01
noise_0.02              $plain --epochs 40 --noise 0.02
noise_0.05              $plain --epochs 40 --noise 0.05
noise_0.1               $plain --epochs 40 --noise 0.1
erase_0.2               $plain --epochs 40 --erase 0.2
erase_0.3               $plain --epochs 40 --erase 0.3
erase_0.4               $plain --epochs 40 --erase 0.4
erase_0.2_wide          $plain --epochs 40 --erase 0.2 $wide
erase_0.3_wide          $plain --epochs 40 --erase 0.3 $wide
erase_0.4_wide          $plain --epochs 40 --erase 0.4 $wide
rotate_5                $plain --epochs 40 --rotate 5
rotate_10               $plain --epochs 40 --rotate 10
noise_0.05_erase_0.3    $tuned --epochs 40
# 1.3 Adam
lr_1e-3                 = noise_0.05_erase_0.3
lr_1e-4                 $tuned --epochs 40 --lr 1e-4
wd_1e-2                 $tuned --epochs 40 --weight-decay 1e-2
wd_5e-3                 $tuned --epochs 40 --weight-decay 5e-3
wd_1e-4                 $tuned --epochs 40 --weight-decay 1e-4
lr_min_1e-6             $tuned --epochs 40 --lr-min 1e-6
# 1.4 schedule
cosine                  = noise_0.05_erase_0.3
constant                --dropout-last 0 --epochs 50 --schedule constant
step                    --dropout-last 0 --epochs 50 --schedule step
cosine_50               --dropout-last 0 --epochs 50 --schedule cosine
warmup_cosine           --dropout-last 0 --epochs 50
# 1.5 dropout
dropout_all_p0.1        --dropout-last 5
dropout_all_p0.2        --dropout-last 5 --dropout-p 0.2 --epochs 40
dropout_last1_p0.1      --dropout-last 1
dropout_last2_p0.1      --dropout-last 2
dropout_last3_p0.1      = final
dropout_last1_p0.2      --dropout-last 1 --dropout-p 0.2
dropout_last2_p0.2      --dropout-last 2 --dropout-p 0.2
dropout_last3_p0.2      --dropout-last 3 --dropout-p 0.2
# 1.6 the final model, and section 2 on it
final
# how much is chance: other splits and digits, another seed; a weaker shortcut; figures 3c and 5b read otherwise
final_data1             --data-seed 1
final_data2             --data-seed 2
final_data3             --data-seed 3
final_data4             --data-seed 4
final_data5             --data-seed 5
baseline_data1          $plain --bs 64 --epochs 25 --data-seed 1
baseline_data2          $plain --bs 64 --epochs 25 --data-seed 2
baseline_data3          $plain --bs 64 --epochs 25 --data-seed 3
dropout_last1_p0.1_seed1  --dropout-last 1 --seed 1
baseline_match0.5       $plain --bs 64 --epochs 25 --match-prob 0.5
wd_1e-4_plain           $plain --epochs 40 --weight-decay 1e-4
dropout_all_p0.2_cosine $tuned --epochs 40 --dropout-last 5 --dropout-p 0.2
# beyond the report: the final recipe without the shortcut, with the digits shuffled, with a stronger shortcut
shuffle0                = final
match0                  --match-prob 0
shuffle0.5              --shuffle-digits 0.5
shuffle1                --shuffle-digits 1
match0.9                --match-prob 0.9
match0.9_shuffle1       --match-prob 0.9 --shuffle-digits 1
# a recipe of our own
best                    $ours --epochs 60 --amp
best_shift2             $ours --epochs 60 --amp --shift 2
best_dropout            $ours --epochs 60 --amp --dropout-last 3
best_shift2_lr2e-2      $ours --epochs 60 --amp --shift 2 --lr 2e-2
best_bs16               $ours --epochs 60 --amp --bs 16
best_bs16_shift2        $ours --epochs 60 --amp --bs 16 --shift 2
best_rotate_5           $ours --epochs 60 --amp --rotate 5
best_branches           $ours --epochs 60 --amp --branches
# our recipe taught: the same network learns the probabilities of best, in place of the labels or beside them
best_taught             $taught --epochs 60
best_taught_seed1       $taught --epochs 60 --seed 1
best_taught_labels      $taught --epochs 50 --label-share 0.3 --label-smoothing 0.1
# taught by several networks at once
taught3                 $taught3 --shift 2 --lr 2e-2
taught3_seed1           $taught3 --shift 2 --lr 2e-2 --seed 1
taught3_lr1e-2          $taught3 --shift 2
taught3_shift1          $taught3 --lr 2e-2
taught3_shift1_lr1e-2   $taught3
taught3_share0.5        $taught3 --label-share 0.5
taught3_share0          $taught3 --shift 2 --label-share 0 --label-smoothing 0
taught2_seed1           $taught2 --seed 1
# what each part of our recipe gives, at 12 epochs: one is changed back, or away, in each run
best12                  $ours12
best12_shuffle0         $ours12 --shuffle-digits 0
best12_flip             $ours12 --flip 0.5 --flip-picture 0
best12_shift0           $ours12 --shift 0
best12_adamw            $ours12 --optimizer adamw --lr 5e-3 --weight-decay 0.05
best12_wd_0.05          $ours12 --weight-decay 0.05
best12_warmup_cosine    $ours12 --schedule warmup_cosine --warmup-epochs 3
best12_smoothing0       $ours12 --label-smoothing 0
best12_bs16             $ours12 --bs 16
best12_noise_erase      $ours12 --noise 0.05 --erase 0.3
best12_dropout          $ours12 --dropout-last 3
best12_branches         $ours12 --branches
# time to the report's accuracy: three epochs, the first on shrunk images
fast                    $fast
TABLE
}

runs() {  # the list, then the runs of $again with other training seeds
    list | awk -v again="$again" '{ print; name = $1; $1 = ""; flags[name] = $0 }
        END { print "# how much is chance: other training seeds"; n = split(again, names)
            for (i = 1; i <= n; i++) for (seed = 1; seed <= 2; seed++)
                printf "%-26s%s --seed %d\n", names[i] "_seed" seed, flags[names[i]], seed }'
}

demo() {
    set -e
    "$PYTHON" data.py --synthetic data/synthetic
    "$PYTHON" data.py --data-dir data/synthetic --sheet results/demo/dataset.png
    "$PYTHON" train.py --data-dir data/synthetic --out results/demo --resume --epochs 8 --warmup-epochs 1
    "$PYTHON" analyze.py --data-dir data/synthetic --ckpt results/demo/best.pt
    echo "demo done, on synthetic data: see results/demo/curves.png, filters.png and experts.png there"
}

finished() {  # name flags: the log has a row for every epoch, and the command was this one
    local out=$results/$1 epochs
    [ -f "$out/log.csv" ] && [ "$2" = "$(cat "$out/flags.txt" 2>/dev/null)" ] || return 1
    epochs=$(sed -n 's/.*"epochs": \([0-9]*\).*/\1/p' "$out/args.json")
    [ "$(wc -l < "$out/log.csv")" -eq $((epochs + 1)) ]
}

run_one() {  # name flags
    local out=$results/$1 teacher
    for teacher in $(grep -o '[^/ ]*/best\.pt' <<< "$2"); do
        teacher=${teacher%/best.pt}   # while it trains, its best.pt is not its best yet
        finished "$teacher" "$(flags_of "$teacher")" || { echo "error: $1 learns from $teacher: run that first" >&2; return 1; }
    done
    "$PYTHON" train.py --resume --out "$out" $2 ${COMPILE:+--compile} || return
    case $out in results/final | results/best) "$PYTHON" analyze.py --ckpt "$out/best.pt" || return ;; esac
    echo "$2" > "$out/flags.txt"   # last: marks it as finished
}

flags_of() { echo $(awk -v name="$1" '$1 == name { $1 = ""; print }' <<< "${table:-$(runs)}") $trial; }

case ${1:-} in
    demo) demo; exit ;;
    --one)  # name flags: one run of a sweep, called by xargs below
        name=$2 flags=${*:3}
        if [ "$JOBS" -gt 1 ]; then
            export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( $(nproc) / JOBS > 0 ? $(nproc) / JOBS : 1 ))}
            IFS=, read -ra gpus <<< "${GPUS:-}"
            [ ${#gpus[@]} -eq 0 ] || export CUDA_VISIBLE_DEVICES=${gpus[SLOT % ${#gpus[@]}]}
            run_one "$name" "$flags" 2>&1 | sed -u "s/^/$name: /"
            exit "${PIPESTATUS[0]}"
        fi
        echo "== $name $flags"
        run_one "$name" "$flags"
        exit ;;
esac

table=$(runs)
all=($(awk '!/^#/ && $2 != "=" { print $1 }' <<< "$table"))
if [ "${1:-}" = --list ]; then
    echo "$table"
    echo "# ${#all[@]} runs; as a SLURM array: sbatch --array=0-$((${#all[@]} - 1)) experiments.sh"
    exit
fi

names=()
for name in "$@"; do
    other=$(awk -v name="$name" '$1 == name { print $2 == "=" ? $3 : name }' <<< "$table")
    [ -n "$other" ] || { echo "error: no run is called '$name'; --list prints them" >&2; exit 2; }
    names+=("$other")
done
[ $# -gt 0 ] || names=("${all[@]}")
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then  # this task's run only
    [ "$SLURM_ARRAY_TASK_ID" -lt ${#names[@]} ] || { echo "error: array tasks go from 0 to $((${#names[@]} - 1))" >&2; exit 2; }
    names=("${names[SLURM_ARRAY_TASK_ID]}")
    JOBS=1
fi
todo="" pupils=""
for name in "${names[@]}"; do
    flags=$(flags_of "$name")
    if finished "$name" "$flags"; then echo "$name is finished"
    elif [[ $flags == *--teacher* ]]; then pupils+="$name $flags"$'\n'   # when their teachers are done
    else todo+="$name${flags:+ $flags}"$'\n'; fi
done
[ -n "$todo$pupils" ] || exit 0
"$PYTHON" data.py --sheet "$results/dataset.png" || exit   # checks the data, and downloads them once, not once a job
GPUS=${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd, -)}
export GPUS JOBS
status=0
for wave in "$todo" "$pupils"; do
    [ -z "$wave" ] || printf %s "$wave" | xargs -P "$JOBS" ${GPUS:+--process-slot-var=SLOT} -L 1 bash experiments.sh --one || status=$?
done
exit $status
