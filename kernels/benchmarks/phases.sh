# Sourced by the scripts for visits to a GPU: phases with a time limit each and one for all.
#
# Before: the working folder is the repository's root. OUT, PYTHON and WHEELS are as those scripts describe them.
# After `begin LOG SECONDS`: $python, $out, and PYTHONPATH with what WHEELS brought.

python=${PYTHON:-python3}
out=$(mkdir -p "${OUT:-gpu-results}" && cd "${OUT:-gpu-results}" && pwd)
started=$SECONDS
names=() results=()
export PYTHONPATH=kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

# begin LOG SECONDS: what phases print goes to this file of $out; after so many seconds no further one begins.
begin() {
    log=$out/$1 total=$2
    : >"$log"
    if [[ -n ${WHEELS:-} ]]; then
        local site
        site=$(mktemp -d)
        phase "install wheels" 60 "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl
        export PYTHONPATH=$PYTHONPATH:$site
    fi
}

# phase NAME SECONDS COMMAND...: runs it with a time limit that also respects the total.
phase() {
    local name=$1 limit=$2 status begun=$SECONDS left
    shift 2
    left=$((total - (SECONDS - started)))
    names+=("$name")
    if ((left < 10)); then
        results+=("skipped: no time left")
        return
    fi
    ((limit > left)) && limit=$left
    echo "== $name (at most $limit s): $*" | tee -a "$log"
    timeout --kill-after=5 "$limit" "$@" >>"$log" 2>&1
    status=$?
    case $status in
        0) results+=("ok, $((SECONDS - begun)) s") ;;
        124 | 137) results+=("out of time after $((SECONDS - begun)) s, partial results kept") ;;
        *) results+=("FAILED with status $status, see ${log##*/}") ;;
    esac
    echo "   ${results[-1]}" | tee -a "$log"
}

# summary: what became of each phase; false if one failed.
summary() {
    local i
    for i in "${!names[@]}"; do
        printf '%-34s %s\n' "${names[$i]}" "${results[$i]}"
    done
    echo "total $((SECONDS - started)) s"
    [[ ! " ${results[*]} " =~ FAILED ]]
}
