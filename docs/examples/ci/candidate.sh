#!/bin/sh
# From a new label file to a gated candidate, without anybody at the keyboard.
#
#     FED=fed SITE=site LABELS=patients SIMULATE="north.csv south.csv" sh candidate.sh study.toml
#
# FED       the server's folder: the federation runs, and its sites allow the study
# SITE      the client's folder of the site whose labels are new, and LABELS its data set; leave both out elsewhere
# SIMULATE  tables to try the study on first, a site each; no site's records need to be among them
# MARGIN    how much a site or group may fall in the gate (0.01)
# WORK      where the bundle and the simulation's report go (a new folder candidate)
#
# It ends with the exit code of the command that stopped it: 1 failed, 2 wrong input, 3 refused (by a policy, a budget, the
# gate), 4 a signature or hash is wrong. 0: the version is the candidate and passed its gate; promoting it is for a person.
set -eu

study=${1:?usage: candidate.sh STUDY}
work=${WORK:-candidate}
mkdir -p "$work"

field() { # field KEY < a JSON object
    python3 -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$1"
}

echo "== check"
consortium study check "$study" --json > "$work/study.json"
if [ -n "${SITE:-}" ]; then
    consortium client data check "$LABELS" --study "$study" --dir "$SITE"
fi
name=$(field study < "$work/study.json")

echo "== simulate"
# shellcheck disable=SC2086 # one word a table
consortium simulate "$study" --data $SIMULATE --no-baselines --out "$work/simulated"

echo "== build"
consortium study build "$study" --out "$work/study.fab"

echo "== train, export and sign"
consortium study submit "$work/study.fab" --dir "$FED"
consortium study start "$name" --dir "$FED"
consortium study watch "$name" --dir "$FED"
consortium study show "$name" --dir "$FED" --json > "$work/run.json"
model=$(field model < "$work/run.json")
consortium server status --dir "$FED" --json > "$work/status.json"
root=$(field root < "$work/status.json")
consortium model verify "$model" --root "$root"

echo "== gate"
consortium model register "$model" --registry "$FED/models" --root "$root"
consortium model gate "$name" --dir "$FED" --margin "${MARGIN:-0.01}" --json > "$work/gate.json"
echo "$name: the candidate passed; next: consortium model promote $name --registry $FED/models"
