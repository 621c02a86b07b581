"""What a checkpoint costs.  python benchmarks/saving.py [--name value of launch/train.py ...]

The demo model (SmolLM2-135M-Instruct, SRLoRA of rank 16 through 32 directions) is trained for 16 steps of 8 with a
checkpoint after every fourth step. The script prints medians over the checkpoints: bytes; seconds in which the
training waited (while tensors were copied and the folder got its name); seconds in which a thread wrote during the
training; both times in steps of this run; and the share of the time that waiting takes with a checkpoint every ten
minutes. A checkpoint holds three float32 numbers for each trained number, and the pairs that are frozen so far.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
STEPS, EVERY, INTERVAL = 16, 4, 600.0


def main(argv: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "output_dir": folder,
            "overwrite_output_dir": True,
            "engine": "plain",
            "max_steps": STEPS,
            "save_steps": EVERY,
            "logging_steps": 1,
            "data.held_out": 8,
            "data.size": 8 * STEPS + 8,
            "save_merged": False,
            "report_to": "none",
        }
        command = [
            sys.executable,
            str(ROOT / "launch" / "train.py"),
            *(f"--{name}={value}" for name, value in settings.items()),
            *argv,
        ]
        subprocess.run(command, check=True, stdout=sys.stderr)
        records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    saves = [record for record in records if record["kind"] == "save"]
    saved = {record["step"] for record in saves}
    step = statistics.median(
        r["seconds_per_step"] for r in records if r["kind"] == "train" and not {r["step"], r["step"] - 1} & saved
    )
    waited, beside, size = (statistics.median(record[key] for record in saves) for key in ("waited", "beside", "bytes"))
    print(f"{len(saves)} checkpoints of {size / 1e6:.1f} MB; a step takes {step:.2f} s")
    print(
        f"training waited {waited:.2f} s ({waited / step:.2f} steps), written beside it in {beside:.2f} s "
        f"({beside / step:.2f} steps)"
    )
    print(f"one every {INTERVAL / 60:g} minutes: {waited / INTERVAL:.3%} of the time")


if __name__ == "__main__":
    main(sys.argv[1:])
