#!/usr/bin/env bash
# torch's DataLoader: who drops its iterator early waits 5 seconds for each worker that is in the middle of an item, one worker after the other.
#
# Expected: workers are daemons that are told to stop, so that leaving a loop early costs nothing, or 5 seconds (the interval of the status check) for all of them together.
# Seen with torch 2.13.0 (CPU, Python 3.11): items that take 40 seconds, iterator dropped after a second: 5 seconds with one worker, 10 with two, 15 with three; then they are terminated. Each is joined with
# its own timeout before the next one. A loop that makes long items in workers (samples, not files) and is left by an exception stands still for five times the number of workers. Where the
# workers are terminated first (`multiprocessing.active_children()`, SIGTERM, which a worker answers by leaving with status 0 where it comes from its parent) it takes less than a second and nothing is raised.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 2>/dev/null
cat > "$folder/dropped.py" <<'PYTHON'
import multiprocessing
import time

import torch
from torch.utils.data import DataLoader, Dataset


class Slow(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        time.sleep(40)
        return index


def dropped(workers, terminate):
    iterator = iter(DataLoader(Slow(), batch_size=None, num_workers=workers, multiprocessing_context="fork"))
    time.sleep(1)
    start = time.monotonic()
    if terminate:
        for child in multiprocessing.active_children():
            child.terminate()
    del iterator
    return time.monotonic() - start


print("torch", torch.__version__)
for workers in (1, 2, 3):
    print(workers, "workers, dropped:", 5 * round(dropped(workers, False) / 5), "s")
print("3 workers, terminated before:", "under a second" if dropped(3, True) < 1 else "longer")
PYTHON
out=$("$folder/venv/bin/python" "$folder/dropped.py" 2>/dev/null)
echo "$out"
[[ $out == *"1 workers, dropped: 5 s"*"2 workers, dropped: 10 s"*"3 workers, dropped: 15 s"*"under a second"* ]] || { echo "the behaviour has changed"; exit 1; }
