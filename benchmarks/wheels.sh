#!/usr/bin/env bash
# Collect the wheels that a machine without network lacks, to run this repository with its torch and transformers.
#
#   bash benchmarks/wheels.sh FOLDER [CUDA] [PYTHON] [LIMIT]
#
#   CUDA     the library of bitsandbytes that stays, as torch.version.cuda without the dot (130, 128, ...); the others
#            leave the wheel, which is 43 MB with all of them
#   PYTHON   the version of Python there, 3.12 by default
#   LIMIT    MB that all wheels may have together, 64 by default
#
# The versions are those of constraints.txt. What the machine must have: torch, transformers, accelerate, peft,
# safetensors, tokenizers, sentencepiece, pyarrow, pandas, xxhash, fsspec, filelock, einops, ninja, msgpack, py-cpuinfo,
# psutil, pyyaml, tqdm, jinja2 and pytest. There, in the repository's root:
#
#   python3 -m pip install --no-index --no-deps --no-compile --target /tmp/site FOLDER/*.whl
#   PYTHONPATH=$PWD:/tmp/site python3 benchmarks/gpu.py --out OUT
#
# The repository comes first in PYTHONPATH: draccus installs a package `tests`, which would hide this one's.
set -euo pipefail
folder=${1:?FOLDER} cuda=${2:-130} python=${3:-3.12} limit=${4:-64}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "$folder"
rm -f "$folder"/*.whl
folder=$(cd "$folder" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

pinned() { # the line of constraints.txt
  grep -E "^$1==" "$root/constraints.txt" || { echo "constraints.txt does not name $1" >&2; exit 1; }
}

platforms=()
for tag in manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_24_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64 any; do
  platforms+=(--platform "$tag")
done
for name in draccus mergedeep toml typing-inspect mypy-extensions datasets dill multiprocess lion-pytorch hjson \
  pydantic pydantic-core annotated-types typing-inspection bitsandbytes; do
  python3 -m pip download --quiet --no-deps --only-binary=:all: --implementation cp --python-version "$python" \
    "${platforms[@]}" --dest "$folder" "$(pinned "$name")"
done

# DeepSpeed has no wheel of its own; without its ops, which ZeRO does not need here, the wheel is for any Python
DS_BUILD_OPS=0 DS_ACCELERATOR=cpu python3 -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$folder" \
  "$(pinned deepspeed)"

# bitsandbytes with the libraries of one version of CUDA and of the CPU. Its RECORD then names files that are not there,
# which pip accepts only if the lines go too.
python3 - "$folder" "$cuda" "$scratch" <<'EOF'
import sys, zipfile
from pathlib import Path

folder, cuda, scratch = sys.argv[1:]
(wheel,) = Path(folder).glob("bitsandbytes-*.whl")
with zipfile.ZipFile(wheel) as whole:
    libraries = [name for name in whole.namelist() if "/libbitsandbytes_" in name]
    kept = [name for name in libraries if f"_cuda{cuda}." in name or "_cpu." in name]
    if len(kept) < 2:
        there = sorted({name.split("_cuda")[1].split(".")[0] for name in libraries if "_cuda" in name})
        sys.exit(f"bitsandbytes has no library for CUDA {cuda}; it has {', '.join(there)}")
    gone = set(libraries) - set(kept)
    smaller = Path(scratch, wheel.name)
    with zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED) as part:
        for entry in whole.infolist():
            if entry.filename in gone:
                continue
            content = whole.read(entry)
            if entry.filename.endswith(".dist-info/RECORD"):
                lines = content.decode().splitlines(keepends=True)
                content = "".join(line for line in lines if line.split(",")[0] not in gone).encode()
            part.writestr(entry, content, zipfile.ZIP_DEFLATED)
smaller.replace(wheel) if smaller.stat().st_dev == wheel.stat().st_dev else wheel.write_bytes(smaller.read_bytes())
EOF

count=$(find "$folder" -name '*.whl' | wc -l)
bytes=$(cat "$folder"/*.whl | wc -c)
(cd "$folder" && ls -l -- *.whl | awk '{printf "%10.2f MB  %s\n", $5 / 1e6, $NF}')
printf '%10.2f MB  in %d wheels\n' "$(awk "BEGIN {print $bytes / 1e6}")" "$count"
if [ "$bytes" -gt $((limit * 1000 * 1000)) ]; then
  echo "more than $limit MB" >&2
  exit 1
fi
