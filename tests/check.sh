# Sourced by psa.sh, classify.sh and demo.sh from the project's root: where things are, and how a check is counted.
# BUILD=dir looks for the programs elsewhere. What a check prints goes to $tmp/log.
export LC_ALL=C
build=$(cd "${BUILD:-build}" && pwd) || exit 1
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT
passed=0 failed=0

# check NAME COMMAND...: the command succeeds
check() {
    name=$1
    shift
    if "$@" >"$tmp/log" 2>&1; then
        passed=$((passed + 1))
        echo "ok    $name"
    else
        failed=$((failed + 1))
        echo "FAIL  $name: $(tail -n 1 "$tmp/log")"
    fi
}

# prints TEXT COMMAND...: exit status 0, and the output says this
prints() {
    text=$1
    shift
    "$@" >"$tmp/report" 2>&1 && grep -q -e "$text" "$tmp/report" || { cat "$tmp/report"; false; }
}

# rejected TEXT COMMAND...: exit status 2, this text in the only line on stderr, nothing printed, no file in $made
made=$tmp/made
rejected() {
    text=$1
    shift
    rm -rf "$made"
    mkdir "$made"
    "$@" >"$tmp/stdout" 2>"$tmp/stderr"
    status=$?
    echo "status $status: $(cat "$tmp/stderr") $(ls "$made")"
    [ $status -eq 2 ] && [ "$(wc -l <"$tmp/stderr")" -eq 1 ] && grep -q -e "$text" "$tmp/stderr" &&
        [ ! -s "$tmp/stdout" ] && [ -z "$(ls -A "$made")" ]
}
