# Sourced by psa.sh and classify.sh from the project's root: where things are, and how a check is counted.
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
