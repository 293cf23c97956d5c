#!/usr/bin/env bash
# lightning: a process that gets SIGTERM inside `trainer.predict` goes on to the end, and inside `trainer.test` or `trainer.fit` it stops with exit status 0.
#
# Expected: SIGTERM ends each of them with status 143 (128 + 15), as it ends any Python program, so that a scheduler, a shell or a supervisor can tell a stopped job from a finished one.
# Seen with lightning 2.6.6 and torch 2.13.0 (CPU, Python 3.11): the trainer puts a handler of its own in place of the default one, which notes the signal and no more. The training
# and the evaluation loop look at the note after a batch and raise SIGTERMException, a SystemExit without a code, which Python ends with status 0, and lines after the call are never
# reached; the predict loop never looks, takes all its batches and returns as if nothing had been. So a test that was killed looks passed. One has to look at `trainer.received_sigterm` oneself.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 lightning==2.6.6 2>/dev/null
cat > "$folder/loop.py" <<'PYTHON'
import os, signal, sys
import lightning as L
import torch

BATCHES = 5


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(1, 1), 0

    def step(self, batch, index):
        self.seen += 1
        print(f"batch {self.seen}", end=" ", flush=True)
        if self.seen == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return self.layer(batch).sum()

    training_step = test_step = predict_step = step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
trainer = L.Trainer(accelerator="cpu", devices=1, max_epochs=1, **quiet)
loader = torch.utils.data.DataLoader(torch.ones(BATCHES, 1))
getattr(trainer, sys.argv[1])(Module(), loader)
print("returned", end=" ")
PYTHON
"$folder/venv/bin/python" -c 'import lightning, torch; print("lightning", lightning.__version__, "torch", torch.__version__)'
for loop in fit test predict; do
  status=0
  out=$("$folder/venv/bin/python" "$folder/loop.py" "$loop" 2>/dev/null) || status=$?
  echo "$loop, SIGTERM in batch 2 of 5: $out-> status $status"
  seen+=("$out$status")
done
[[ ${seen[0]} == "batch 1 batch 2 0" && ${seen[1]} == "batch 1 batch 2 0" && ${seen[2]} == "batch 1 batch 2 batch 3 batch 4 batch 5 returned 0" ]] || { echo "the behaviour has changed"; exit 1; }
