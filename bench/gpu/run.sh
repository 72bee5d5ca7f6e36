#!/usr/bin/env bash
# Everything of maekit that needs a GPU, in three stages of 150 seconds each.
#
#     bench/gpu/run.sh STAGE... [--dry-run] [--quick] [--seconds N] [--only PART...]
#
#     check      does it work: bf16, compilation, kills, fp16 and fp32 on CUDA, memory that runs out
#     speed      how fast: the step, end to end, the session, embedding, decoding; beside peers, on one card
#     quality    how good: CIFAR-10 for the rest of the time, then neighbours and a linear classifier
#
# --dry-run takes the same way on a CPU, with tiny models and drawn pictures. A part that fails or hangs does not stop the
# others. $OUT (build/gpu by default) gets STAGE.jsonl and STAGE.log, one more entry after every part; the last lines
# are a table. Exits 1 if a part failed.
#
# On a machine without a package index (Python 3.12, torch, timm, transformers), .gpu/ holds what is missing there:
# `.gpu/activate`, if there is one, is sourced; without ONNX Runtime's CUDA build, wheels in .gpu/ are enough for all
# parts that train. `bench/gpu/pack.sh DATA` adds the images, as .gpu/data/; without them, pictures are drawn.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$root"
export OUT=${OUT:-$root/build/gpu} PYTHONUNBUFFERED=1
python=$root/.venv/bin/python
if [ ! -x "$python" ]; then
  python=python3
  if [ -f .gpu/activate ]; then
    mkdir -p "$(dirname "$(mktemp -u)")/maekit-site" # which activate makes only where ONNX Runtime travelled along
    set +eu
    source .gpu/activate
    set -eu
    unset PYTHONSAFEPATH # the scripts of bench/ import each other; no part runs where the folder maekit/ is
    # The wheels by themselves: activate installs them only along with ONNX Runtime.
    if ! python3 -c 'import webdataset' 2>/dev/null && compgen -G '.gpu/*.whl' >/dev/null; then
      python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$PYTHONPATH" .gpu/*.whl
    fi
  fi
fi
exec "$python" bench/gpu/stages.py "$@"
