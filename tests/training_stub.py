"""Stands for `python -m perfusion.train` in tests of what is around it: `training_stub.py from=<config.yaml>`.

Leaves what a run leaves, and notes in `attempts` that it was called. The concept's name says how it ends: `broken` with
an exception, `killed` by SIGKILL, and `slow` waits until a file `go` lies in the working directory.
"""

import os
import signal
import sys
import time
from pathlib import Path

from perfusion.training.run_folder import RunFolder, read_config

config = read_config(Path(sys.argv[1].removeprefix("from=")))
folder = RunFolder.of(config)
folder.begin(config)
with open(folder.path / "attempts", "a") as attempts:
    attempts.write("x")
print(f"training seed {config.seed}")
print(f"GPU {os.environ.get('CUDA_VISIBLE_DEVICES')}")
mended = Path("mended").exists()
if config.concept.name == "broken" and not mended:
    raise RuntimeError("the loss went up")
if config.concept.name == "mistaken" and not mended:
    print("error: concept.images: none there", file=sys.stderr)
    sys.exit(2)
if config.concept.name == "killed" and not mended:
    os.kill(os.getpid(), signal.SIGKILL)
while config.concept.name == "slow" and not Path("go").exists():
    time.sleep(0.02)
rate = float(config.method.get("value_rate", 0))
scores = {"harmonic": 1 - (rate - 0.01) ** 2, "clip_i": 0.5 + config.seed}
folder.concept.touch()
folder.finish({"seconds": {"training": 1.0, "total": 12.3}, "scores": scores})
