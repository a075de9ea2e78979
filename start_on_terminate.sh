#!/usr/bin/env bash
# Starts the next trainings once a process has ended; docs/config.md says more.
set -euo pipefail

usage() {
  cat <<'END'
Usage: bash start_on_terminate.sh [--keep-going] PID RUN...
       bash start_on_terminate.sh --identity PID
where each RUN is: CONFIG [RETRIES] [-- OPTIONS... --]

Waits until the process has ended, then runs `bash train.sh CONFIG OPTIONS...` for each run in
order. The second -- ends the options of a run; the last run needs none. So two seeds need one
config: PID CONFIG -- --seed 1 --case a-1 -- CONFIG -- --seed 2 --case a-2
A number after a config retries it that often if it fails. Not retried are a mistake in what was
written (status 2) and a failed audit (3), which would come again, and a run that was asked to end
(75, 130, 143). The queue stops at the first run that does not end with 0.

  PID           a process of this machine, as a number or as PID:STARTTIME, which tells it from
                a later process that was given the same number
  --keep-going  go on with the next config after one that fails or was asked to end
  --identity    print PID:STARTTIME of a process that is running
  -h, --help    print this

Environment:
  POLL_SECONDS    how often to look at the process (default 5)
  REPORT_SECONDS  how often to say so where the output is no terminal (default 600)

Exit status: 0 when every run succeeded, else that of the last run that failed; 2 for a mistake
in what was written, with nothing started; 130 or 143 after SIGINT or SIGTERM.
END
}

fail() {
  printf 'start_on_terminate.sh: error: %s\n' "${1//$'\n'/ }" >&2
  exit 2
}

log() {
  printf '%s %s\n' "$(date '+%F %T')" "$1"
}

# Prints words as a shell reads them.
quoted() {
  local word text=''
  for word; do
    [[ $word =~ ^[[:alnum:]_./,:=@%+-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    text+=" $word"
  done
  printf '%s\n' "${text# }"
}

# Prints a number of seconds as hours:minutes:seconds.
duration() {
  printf '%d:%02d:%02d\n' "$(($1 / 3600))" "$(($1 / 60 % 60))" "$(($1 % 60))"
}

# Prints when the process with this PID started, or nothing when there is none or it has ended.
start_time() {
  local stat fields
  if [[ -r /proc/self/stat ]]; then
    stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 0
    # The second field is a name in parentheses that may hold anything; `fields` begins with the third, the
    # state. A zombie has ended, unless it has threads left: these may still hold the accelerator's memory.
    read -r -a fields <<<"${stat##*) }"
    [[ ${fields[0]} == [ZX] && ${fields[17]} -le 1 ]] || printf '%s\n' "${fields[19]}"
  else
    stat=$(LC_ALL=C TZ=UTC ps -o stat= -o lstart= -p "$1") || return 0
    read -r -a fields <<<"$stat"
    [[ ${fields[0]} == Z* ]] || printf '%s\n' "${fields[*]:1}"
  fi
}

# Prints the command line of a process, as far as it can be seen.
describe() {
  { tr '\0' ' ' <"/proc/$1/cmdline" || ps -o args= -p "$1" || true; } 2>/dev/null |
    tr -c '[:print:]' ' ' | sed 's/ *$//'
}

# Waits for the process `child` however many signals come meanwhile; `status` becomes its exit status.
wait_for_child() {
  local before
  while
    before=$signals status=0
    wait "$child" || status=$?
    [[ $signals -ne $before ]]
  do :; done
  child=''
}

# shellcheck disable=SC2329  # called by traps
# The traps of the signals: passes them on to `child`, a run or a pause.
pass_on() {
  stopped_by=$1
  signals=$((signals + 1))
  [[ -z $child ]] || kill -s "$1" "$child" 2>/dev/null || true
}

# Starts a command as `child` and waits for it. Job control gives it a process group of its own: Ctrl-C then
# reaches it once, passed on from here. A plain background process would ignore Ctrl-C.
run_child() {
  set -m
  "$@" </dev/null &
  child=$!
  set +m
  [[ -z $stopped_by ]] || kill -s "$stopped_by" "$child" 2>/dev/null || true # it came just before
  wait_for_child
}

# Ends the queue if a signal asked for it; the arguments are the configs that have not run.
stop_if_asked() {
  [[ -n $stopped_by ]] || return 0
  log "stopped by SIG$stopped_by; not started: ${*:-none}"
  exit $((128 + $(kill -l "$stopped_by")))
}

# Waits until `process` has ended.
wait_for_process() {
  local name text reported=-1
  name=$(describe "$pid")
  text="waiting for process $process (${name:0:80})"
  while [[ $(start_time "$pid") == "$identity" ]]; do
    if [[ -t 1 ]]; then
      printf '\r\033[K%.*s' "$((${COLUMNS:-80} - 1))" "$(duration "$SECONDS") $text, then ${configs[*]}"
    elif [[ $reported -lt 0 || $((SECONDS - reported)) -ge $report_seconds ]]; then
      reported=$SECONDS
      log "$text, then ${configs[*]}"
    fi
    run_child sleep "$poll_seconds"
    [[ -z $stopped_by ]] || break
  done
  [[ ! -t 1 ]] || printf '\r\033[K'
  stop_if_asked "${configs[@]}"
  log "process $process has ended after $(duration "$SECONDS") of waiting"
}

# Runs a config with options, at most 1 + retries times; `status` becomes the exit status of its last run. Arguments:
# its text for the log, retries, the config, the options.
run_config() {
  local config=$1 attempts=$((1 + $2)) attempt began
  shift 2
  for ((attempt = 1; attempt <= attempts; attempt++)); do
    began=$SECONDS
    log "start $config (run $attempt of at most $attempts)"
    run_child bash "$here/train.sh" "$@"
    log "end $config: status $status after $(duration "$((SECONDS - began))")"
    [[ -z $stopped_by ]] || break
    case $status in
      0 | 2 | 3) break ;; # done, or it would fail in the same way again
      75 | 130 | 143)
        log "$config was asked to end, so it is not retried"
        break
        ;;
    esac
  done
}

keep_going=''
case ${1-} in
  -h | --help)
    usage
    exit 0
    ;;
  --identity)
    [[ ${2-} =~ ^[1-9][0-9]*$ && $# -eq 2 ]] || fail "write: bash start_on_terminate.sh --identity PID"
    identity=$(start_time "$2")
    [[ -n $identity ]] || fail "process $2 is not running; write the PID of one that is"
    printf '%s:%s\n' "$2" "$identity"
    exit 0
    ;;
  --keep-going)
    keep_going=yes
    shift
    ;;
esac

here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
poll_seconds=${POLL_SECONDS:-5}
report_seconds=${REPORT_SECONDS:-600}
[[ $poll_seconds =~ ^[0-9]*\.?[0-9]+$ && $poll_seconds =~ [1-9] ]] ||
  fail "POLL_SECONDS is '$poll_seconds'; write a number of seconds above 0"
[[ $report_seconds =~ ^[0-9]+$ ]] ||
  fail "REPORT_SECONDS is '$report_seconds'; write a whole number of seconds"

[[ $# -ge 2 ]] || fail "write: bash start_on_terminate.sh PID config/config.NAME [RETRIES] [more configs]"
process=$1 pid=${1%%:*}
[[ $process =~ ^[1-9][0-9]*(:.+)?$ ]] || fail "'$process' is no process; write its PID, a number"
shift
# Of each run: its text for the log, its retries, and its part of `words`, the config and the options of all.
configs=() retries=() words=() first=() count=()
while [[ $# -gt 0 ]]; do
  [[ ! $1 =~ ^[0-9]+$ ]] || fail "no config before the number '$1'; write PID CONFIG [RETRIES]"
  [[ $1 != -- ]] || fail "no config before --; write PID CONFIG [RETRIES] [-- OPTIONS... --]"
  [[ $1 != -* || ${#configs[@]} -eq 0 ]] ||
    fail "'$1' stands where the config belongs; write the options of a run behind --: ${configs[-1]}$(
      [[ ${count[-1]} -gt 1 ]] || printf ' --'
    ) $(quoted "$@")"
  bash "$here/train.sh" --check "$1"
  first+=("${#words[@]}")
  words+=("$1")
  if [[ ${2-} =~ ^[0-9]+$ ]]; then
    [[ ${#2} -le 6 ]] || fail "'$2' retries are too many; write a number below 1000000"
    retries+=("$((10#$2))")
    shift
  else
    retries+=(0)
  fi
  shift
  if [[ ${1-} == -- ]]; then
    shift
    [[ $# -gt 0 && $1 != -- ]] || fail "no options after --; write CONFIG [RETRIES] -- OPTIONS... --, or leave -- out"
    while [[ $# -gt 0 && $1 != -- ]]; do
      [[ -n $1 ]] || fail "an option of ${words[*]:${first[-1]}:1} is empty; leave it out, or write none for a value"
      [[ $1 != config/config.* && $1 != */config/config.* ]] || fail "the config '$1' is among the options; write -- before it"
      words+=("$1")
      shift
    done
    [[ $# -eq 0 ]] || shift
  fi
  count+=("$((${#words[@]} - ${first[-1]}))")
  configs+=("$(quoted "${words[@]:${first[-1]}}")")
  # What this prints before its last line are warnings, which the run repeats.
  mistake=$(bash "$here/train.sh" --check-options "${words[@]:${first[-1]}}" 2>&1 >/dev/null) ||
    fail "${configs[-1]}: ${mistake##*$'\n'}"
done

child='' stopped_by='' signals=0 status=0 result=0
trap 'pass_on HUP' HUP
trap 'pass_on INT' INT
trap 'pass_on TERM' TERM

identity=$(start_time "$pid")
if [[ -z $identity || ${process#"$pid"} != "" && ${process#*:} != "$identity" ]]; then
  log "process $process is not running; starting at once"
else
  wait_for_process
fi

for i in "${!configs[@]}"; do
  rest=("${configs[@]:i+1}")
  stop_if_asked "${configs[@]:i}"
  run_config "${configs[i]}" "${retries[i]}" "${words[@]:first[i]:count[i]}"
  stop_if_asked "${rest[@]}"
  [[ $status -ne 0 ]] || continue
  result=$status
  if [[ -z $keep_going ]]; then
    [[ ${#rest[@]} -eq 0 ]] || log "not started: ${rest[*]}"
    break
  fi
done
exit "$result"
