#!/usr/bin/env bash
# What has to be run on a GPU, most important first, within 25 minutes; each stage writes its own file to OUT.
#
#     OUT=results bash benchmarks/gpu_session.sh              # everything
#     OUT=results STAGES="smoke tests" bash benchmarks/gpu_session.sh
#
# PYTHON is an interpreter with torch for this machine's GPU (2.6 or newer). WHEELS, if set, is a folder of wheels from which the
# packages that it lacks are installed without a network. Made where there is one, for Python 3.12, with torch's own left out:
#
#     pip download --dest wheels --only-binary :all: --python-version 3.12 --no-deps accelerate diffusers peft transformers \
#         tokenizers huggingface_hub safetensors tyro tqdm pillow hypothesis pytest ...
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} OUT=${OUT:-runs/gpu-session} STAGES=${STAGES:-smoke tests eager compiled end plan}
END=$((SECONDS + ${LIMIT:-1500}))
mkdir -p "$OUT"

stage() {  # name, seconds at most, command...
    local name=$1 most=$2 left=$((END - SECONDS)) began=$SECONDS
    shift 2
    case " $STAGES " in *" $name "*) ;; *) return ;; esac
    if ((left < 20)); then echo "$name: no time left" | tee -a "$OUT/stages.txt"; return; fi
    timeout "$((most < left ? most : left))" "$@" >"$OUT/$name.log" 2>&1
    echo "$name: status $? after $((SECONDS - began)) s" | tee -a "$OUT/stages.txt"
}

if [ -n "${WHEELS:-}" ]; then
    "$PYTHON" -m venv --system-site-packages runs/gpu-venv && PYTHON=runs/gpu-venv/bin/python
    "$PYTHON" -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl >"$OUT/install.log" 2>&1 \
        || { echo "install failed: see $OUT/install.log"; exit 1; }
fi
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}

stage smoke 90 "$PYTHON" -c "
import torch
assert torch.cuda.is_available(), 'no GPU'
print(torch.__version__, torch.cuda.get_device_name(), torch.cuda.mem_get_info())
from marble_core import shared_cotangent_rows
m = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1)).cuda()
x, w = torch.randn(32, 64, device='cuda'), torch.randn(32, 5, device='cuda')
print(shared_cotangent_rows(lambda: m(x).squeeze(-1), m, w, verify=True).rows['0.weight'].norm())"
stage tests 300 "$PYTHON" -m pytest -q -p no:cacheprovider tests/core/test_shared_cotangent.py tests/core/test_contracts.py tests/reference/test_devices.py \
    tests/core/test_gram.py tests/reference/test_sd3.py
stage eager 360 "$PYTHON" -m benchmarks.trainer --full-size --modes eager --only step --only cycle --limit 330 --out "$OUT/eager.json"
stage compiled 420 "$PYTHON" -m benchmarks.trainer --full-size --modes compiled --only step --only cycle --limit 390 --out "$OUT/compiled.json"
stage end 420 "$PYTHON" -m benchmarks.end_to_end --full-size --folder runs/gpu-end-to-end --out "$OUT/end-to-end.json"
stage plan 120 "$PYTHON" -m reference train --preset sd35m-single-gpu --model.base runs/gpu-end-to-end/pipeline --dry-run \
    --rollout.prompts text:runs/gpu-end-to-end/train.txt --rollout.held-out text:runs/gpu-end-to-end/test.txt
"$PYTHON" -m benchmarks.gpu_table "$OUT" | tee "$OUT/table.md"
cat "$OUT/stages.txt"
