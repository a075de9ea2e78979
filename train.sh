#!/usr/bin/env bash
# Starts a training as a config file describes it; docs/config.md explains configs.
set -euo pipefail

usage() {
  cat <<'END'
Usage: bash train.sh [--print | --check | --check-options] CONFIG [SCRIPT] [options...]

Starts main.py (or SCRIPT, such as tools.py) with the settings of the shell file CONFIG,
then the options given here, which win. Runs in the repository's folder.

  --print     print the command, quoted for the shell, instead of running it
  --check     only check that CONFIG can be read and is spelt right; nothing of it is executed
  --check-options
              execute CONFIG, and only check the options that main.py would get
  -h, --help  print this

CONFIG may set: dataset root model base epochs train_batch val_batch case keyword pretrained
options script nproc torchrun.

Environment:
  PYTHON      the interpreter; otherwise .venv/bin/python if there is one, else python3
  NPROC       processes on this machine; more than one, or a -g that names several devices,
              go through torchrun (utils.processes.launch)
  TORCHRUN    options of torchrun, for a run on several machines

Exit status: the training's own; 2 for a mistake in what was written, with nothing started.
END
}

fail() {
  trap - ERR EXIT
  printf 'train.sh: error: %s\n' "${1//$'\n'/ }" >&2
  exit 2
}

# Prints the interpreter to use; the working directory is the repository.
find_python() {
  local found=python3
  [[ ! -x .venv/bin/python ]] || found=.venv/bin/python
  printf '%s\n' "${PYTHON:-$found}"
}

# Prints the path of a file named from the caller's working directory or, failing that, from the repository.
locate() {
  local path=$1
  [[ $path == /* || ! -e $caller_directory/$path ]] || path=$caller_directory/$path
  printf '%s\n' "${path#"$repository"/}"
}

# Prints those of the names after the first two arguments that are close to the first, a word of any case; the second
# is the least similarity. Prints nothing where there is no Python.
close_names() {
  "$(find_python)" - "$@" 2>/dev/null <<'END' || true
import difflib, sys
word, cutoff, *names = sys.argv[1:]
print(", ".join(difflib.get_close_matches(word.lower(), names, cutoff=float(cutoff))))
END
}

# Prints the names of variables that shell files assign, line by line, with `export:` before exported ones: not those that
# are set for one command, nor what quotes and here-documents hold. Prints nothing where there is no Python.
assigned_names() {
  "$(find_python)" - "$@" 2>/dev/null <<'END' || true
import re, sys

ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\[.*\])?\+?=")
DECLARING = ("declare", "export", "local", "readonly", "typeset")
BEFORE = ("!", "{", "}", "do", "elif", "else", "if", "then", "time", "until", "while")


def behind(text, i, end):
    """The index behind the next `end` that no quotes or brackets enclose."""
    while i < len(text) and text[i] != end:
        if text[i] == "\\":
            i += 2
        elif text[i : i + 2] in ("$(", "${"):
            i = behind(text, i + 2, ")" if text[i + 1] == "(" else "}")
        elif text[i] == "(" and end == ")":
            i = behind(text, i + 1, ")")
        elif text[i] in "\"`" or (text[i] == "'" and end != '"'):
            i = text.find("'", i + 1) + 1 or len(text) if text[i] == "'" else behind(text, i + 1, text[i])
        else:
            i += 1
    return i + 1


def commands(text):
    """The words of each command; what is quoted or expanded is a quote in them."""
    words, word, documents, i = [], "", [], 0
    while i < len(text):
        char, document = text[i], re.compile(r"<<(-?)[ \t]*([^\s;&|<>()]+)").match(text, i)
        if char in " \t\n;&|()#":
            if char == "#" and word:
                word, i = word + char, i + 1
                continue
            if char == "(" and word.endswith("="):  # an array
                i = behind(text, i + 1, ")")
                continue
            words, word = words + [word] * (word != ""), ""
            if char not in " \t#":
                yield words
                words = []
            if char == "#":
                i = text.find("\n", i)
                i = len(text) if i < 0 else i
            elif text.startswith("((", i):
                i = behind(text, i + 1, ")")
            else:
                i += 1
            while char == "\n" and documents:
                dash, mark = documents.pop(0)
                for line in text[i:].splitlines(keepends=True):
                    i += len(line)
                    if (line.lstrip("\t") if dash else line).rstrip("\n") == mark:
                        break
        elif text.startswith("<<<", i):
            word, i = word + "<<<", i + 3
        elif document:
            documents.append((document[1], re.sub(r"[\\'\"]", "", document[2])))
            word, i = word + "<<", document.end()
        elif text.startswith("\\\n", i):
            i += 2
        elif char == "\\":
            word, i = word + '"', i + 2
        elif text.startswith("$'", i):
            word, i = word + '"', re.compile(r"(\\.|[^'\\])*'?", re.S).match(text, i + 2).end()
        elif char == "'":
            word, i = word + '"', text.find("'", i + 1) + 1 or len(text)
        elif char in "\"`":
            word, i = word + '"', behind(text, i + 1, char)
        elif text[i : i + 2] in ("$(", "${", "<(", ">("):
            word, i = word + '"', behind(text, i + 2, "}" if text[i + 1] == "{" else ")")
        else:
            word, i = word + char, i + 1
    yield words + [word] * (word != "")


names = set()
for path in sys.argv[1:]:
    for words in commands(open(path, encoding="utf-8", errors="replace").read()):
        while words and words[0] in BEFORE:
            words = words[1:]
        found = [match[1] for match in map(ASSIGNMENT.match, words) if match]
        if words and words[0] in DECLARING:
            exported = words[0] == "export" or any(re.fullmatch("-[A-Za-z]*x[A-Za-z]*", word) for word in words)
            names.update(f"export:{name}" if exported else name for name in found)
        elif len(found) == len(words):
            names.update(found)
print("\n".join(sorted(names)))
END
}

# Prints those of the assigned names that the files never read. Prints none where a file reads variables whose names it
# makes itself.
unused_names() {
  local code found name
  code=$(sed 's/^[[:space:]]*#.*//' -- "$@")
  ! grep -qE '\$\{!|(^|[^[:alnum:]_-])(eval|envsubst|allexport|set +-[[:alpha:]]*a|(declare|local|typeset) +-n)([^[:alnum:]_-]|$)' <<<"$code" || return 0
  while read -r found; do
    name=${found#export:}
    [[ -n $name && " ${known_names[*]} " != *" $name "* ]] || continue
    # $name, ${name...}, ${#name...}; by its bare name in arithmetic and in commands that take names.
    grep -qE '\$\{?#?'"$name"'([^[:alnum:]_]|$)|(\(\(|-v|let|unset)([^;]*[^[:alnum:]_;-])?'"$name"'([^[:alnum:]_]|$)|(export|declare|typeset|readonly)([^;]*[^[:alnum:]_;-])?'"$name"'([^][:alnum:]_=+[]|$)' <<<"$code" ||
      printf '%s\n' "$found"
  done < <(assigned_names "$@")
}

# Ends with an error for an unused name close to one that a config may set, and warns of the others; an exported one may
# be for another program, so that a close one is a warning. The first argument is the config, the others are unused names.
report_unused() {
  local config=$1 name meant others=()
  shift
  for name; do
    meant=$(close_names "${name#export:}" 0.8 "${known_names[@]}")
    if [[ $name == export:* ]]; then
      [[ -z $meant ]] ||
        printf 'train.sh: warning: %s exports %s, which nothing here reads; did you mean %s?\n' \
          "$config" "${name#export:}" "$meant" >&2
      continue
    fi
    [[ -z $meant ]] || fail "$config sets $name and never uses it; did you mean $meant?"
    others+=("$name")
  done
  # shellcheck disable=SC2016  # this is what to write
  [[ ${#others[@]} -eq 0 ]] ||
    printf 'train.sh: warning: %s sets %s and never uses it; another setting is written options="$options --NAME VALUE"\n' \
      "$config" "${others[*]}" >&2
}

# Prints the files that a config sources, without executing it, the config first. Fails where that cannot be known.
sourced_files() {
  local file word files=("$1")
  for ((file = 0; file < ${#files[@]}; file++)); do
    while read -r word; do
      word=${word//[\"\']/}
      [[ -f $word ]] || return 1
      [[ " ${files[*]} " == *" $word "* ]] || files+=("$word")
    done < <(sed -nE 's/^(.*[;&|])?[[:space:]]*(source|\.)[[:space:]]+([^[:space:];&|]+).*/\3/p' -- "${files[file]}")
  done
  printf '%s\n' "${files[@]}"
}

# Ends with an error unless the file is one that can be sourced.
check_shell_file() {
  local close message existing
  [[ ! -d $1 ]] || fail "'$1' is a directory; name a config file in it"
  if [[ ! -e $1 ]]; then
    mapfile -t existing < <(printf '%s\n' config/*)
    close=$(close_names "${1##*/}" 0.6 "${existing[@]#config/}")
    close=${close:+config/${close//, /, config/}}
    fail "no config '$1'; ${close:+close names: $close; }the folder config/ has those that exist"
  fi
  [[ -f $1 && -r $1 ]] || fail "'$1' is not a file that can be read; name a config file"
  ! grep -q $'\r' -- "$1" || fail "'$1' has the line ends of Windows; remove them: sed -i 's/\r\$//' '$1'"
  message=$(LC_ALL=C bash -n -- "$1" 2>&1) || fail "not valid shell, correct it: ${message%%$'\n'*}"
}

# Called after a command in a user's file has failed. A command that does not exist is nearly always an
# assignment with spaces in it, and going on would train something else.
# shellcheck disable=SC2329  # called by a trap
check_status() {
  [[ $1 -ne 127 ]] || fail "$2: no such command: $3 (an assignment is NAME=\"VALUE\", no spaces around =)"
}

# Prints how many devices the last -g among the words names (`-g 0,1`, `-g 0 1`, `--device-ids=0,1`), or 0.
count_devices() {
  local word inside='' ids=() more
  for word; do
    case $word in
      -g | --device_ids | --device-ids)
        inside=yes ids=()
        continue
        ;;
      -g=* | --device_ids=* | --device-ids=*) inside=yes ids=() word=${word#*=} ;;
      -g[0-9]*) inside=yes ids=() word=${word#-g} ;;
    esac
    if [[ -n $inside && $word =~ ^[0-9]+(,[0-9]+)*,?$ ]]; then
      IFS=, read -r -a more <<<"$word"
      ids+=("${more[@]}")
    else
      inside=''
    fi
  done
  printf '%s\n' "${#ids[@]}"
}

# The variables that become options or are read here.
known_names=(dataset root model base epochs train_batch val_batch case keyword pretrained options script nproc torchrun)
known_names+=(FASTDIR PYTHON NPROC TORCHRUN)

launcher_mode=run
case ${1-} in
  -h | --help)
    usage
    exit 0
    ;;
  --print | --check | --check-options)
    launcher_mode=${1#--}
    shift
    ;;
esac
[[ -n ${1-} ]] || fail "no config given; write: bash train.sh config/config.NAME [SCRIPT] [options...]"
[[ $1 != -* ]] || fail "'$1' stands where the config belongs; write: bash train.sh config/config.NAME $1"

caller_directory=$PWD
repository=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
cd -- "$repository"

config_file=$(locate "$1")
shift
for word; do
  [[ $word != --check && $word != --print && $word != --check-options ]] ||
    fail "$word comes before the config; write: bash train.sh $word $config_file"
done
check_shell_file "$config_file"
if [[ $launcher_mode == check ]]; then
  if sources=$(sourced_files "$config_file"); then
    mapfile -t source_list <<<"$sources"
    mapfile -t unused < <(unused_names "${source_list[@]}")
    report_unused "$config_file" "${unused[@]}"
  fi
  exit 0
fi
[[ $config_file == */* ]] || config_file=./$config_file # `source` would search PATH for a bare name

script_argument=''
if [[ -n ${1-} && $1 != -* ]]; then
  script_argument=$(locate "$1")
  shift
fi
command_line=("$@")

# Config variables start empty, whatever the caller's environment holds under these common names.
unset dataset root model base epochs train_batch val_batch case keyword pretrained nproc torchrun script
options=''

# User files run by the rules of a plain shell: an unset variable is empty, a test may be false.
# shellcheck disable=SC2329  # bash calls it in place of its own message; check_status reports the mistake
command_not_found_handle() { return 127; }
user_files=("$config_file")
if [[ -f .env ]]; then
  check_shell_file .env
  user_files=(./.env "$config_file")
fi
for user_file in "${user_files[@]}"; do
  [[ $user_file == ./.env ]] || : "${FASTDIR:=.}" # older configs build their paths on it
  trap 'check_status $? "${BASH_SOURCE[0]}: line $LINENO" "$BASH_COMMAND"' ERR
  trap 'fail "${BASH_SOURCE[0]}: ends the shell; leave the exit out, or write return"' EXIT
  names_before=" $(compgen -v | tr '\n' ' ')"
  set +euo pipefail
  # shellcheck source=/dev/null
  source "$user_file"
  set -euo pipefail
  trap - ERR EXIT
done
unset -f command_not_found_handle

# Of the names that the config assigns, those that it has set.
names_not_used=()
if sources=$(sourced_files "$config_file"); then
  mapfile -t source_list <<<"$sources"
  while read -r name; do
    [[ ! -v ${name#export:} || $names_before == *" ${name#export:} "* ]] || names_not_used+=("$name")
  done < <(unused_names "${source_list[@]}")
fi
report_unused "$config_file" "${names_not_used[@]}"

[[ $(declare -p options 2>/dev/null) != "declare -a"* ]] ||
  fail "$config_file: options is an array; write options=\"\$options --name VALUE\""
# xargs splits into words as a shell does, quotes included, and expands nothing.
words=$(xargs -r printf '%s\n' <<<"${options:-}" 2>&1 && echo end) ||
  fail "$config_file: options has a quote without its partner: $words"
mapfile -t option_words <<<"$words"
unset 'option_words[-1]' # the word end, without which an empty last word would get lost
IFS=$' \t\n' read -r -d '' -a torchrun_words <<<"${TORCHRUN:-${torchrun:-}}" || true

arguments=()
add() { [[ -z $2 ]] || arguments+=("$1" "$2"); }
add --dataset "${dataset:-}"
add --root "${root:-}"
add --model "${model:-}"
add --base "${base:-}"
add --epochs "${epochs:-}"
add -b "${train_batch:-}"
add -v "${val_batch:-}"
add --case "${case:-}"
add --keyword "${keyword:-}"
add --pretrained "${pretrained:-}"
arguments+=("${option_words[@]}" "${command_line[@]}")

python=$(find_python)
[[ -n $(type -P -- "$python") ]] || fail "no interpreter '$python'; set PYTHON to the one to use"
script=${script_argument:-${script:-main.py}}
[[ -f $script ]] || fail "no script '$script'; name a file such as tools.py, and begin options with a dash"

processes=${NPROC:-${nproc:-}}
[[ -z $processes || $processes =~ ^[1-9][0-9]*$ ]] ||
  fail "'$processes' processes make no sense; set NPROC (or nproc in the config) to 1 or more"
devices=$(count_devices "${arguments[@]}")
[[ $devices -eq 0 || $devices -eq ${processes:-$devices} ]] ||
  fail "$processes processes but $devices device(s) in -g; set NPROC=$devices or change -g"
[[ $devices -eq 0 ]] || processes=$devices

if [[ $launcher_mode == check-options ]]; then
  [[ $script == main.py ]] || exit 0
  exec "$python" -m utils.processes.start "${arguments[@]}"
fi

launch=("$python")
if [[ ${#torchrun_words[@]} -gt 0 ]]; then
  launch+=(-m utils.processes.launch --nproc_per_node "${processes:-1}" "${torchrun_words[@]}")
elif [[ ${processes:-1} -gt 1 ]]; then
  launch+=(-m utils.processes.launch --standalone --nproc_per_node "$processes")
fi
launch+=("$script" "${arguments[@]}")

if [[ $launcher_mode == print ]]; then
  printf -v quoted '%q ' "${launch[@]}"
  printf '%s\n' "${quoted% }"
else
  exec "${launch[@]}" # signals reach the training itself, and its exit status is ours
fi
