"""Memory of `maekit embed` as it goes on: that of the command and its decoders at 10, 50 and 100 % of the samples.

    python bench/embed_memory.py encoder.onnx SHARDS [--json FILE]

What processes share counts once (proportional set size). The run ends with `--verify`: all keys are accounted for.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("shards")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    seen: list[tuple[int, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = [sys.executable, "-m", "maekit", "embed", options.model, options.shards, "--out", str(out)]
        command += ["--device", "cpu", "--json", "--verify"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            while process.poll() is None:
                time.sleep(0.5)
                if megabytes := proportional_mb(process.pid):
                    seen.append((_committed(out), megabytes))
            assert process.stdout is not None
            lines = process.stdout.read().splitlines()
        assert process.returncode == 0, f"exit {process.returncode}"
        summary = json.loads(lines[-1])
    total = summary["rows"] + summary["errors"]
    print("\n".join(lines[:-1]))
    shares = {}
    for share in (0.1, 0.5, 1.0):
        shares[f"{share:.0%}"] = next(megabytes for done, megabytes in seen if done >= share * total)
        print(f"{share:4.0%} of {total} samples: {shares[f'{share:.0%}']:.0f} MB")
    print(f"largest at any time: {max(megabytes for _, megabytes in seen):.0f} MB")
    if options.json:
        figures = {"samples": total, "mb": shares, "largest_mb": max(megabytes for _, megabytes in seen), **summary}
        options.json.write_text(json.dumps({**figures, "out": None}, indent=1) + "\n")


def proportional_mb(pid: int) -> float:
    """Return the memory of a process and its children in megabytes; 0 where they are gone."""
    total = 0.0
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for one in (str(pid), *children):
            text = Path(f"/proc/{one}/smaps_rollup").read_text()
            total += int(next(line for line in text.splitlines() if line.startswith("Pss:")).split()[1]) / 1000
    except (OSError, StopIteration):
        return 0.0
    return total


def _committed(out: Path) -> int:
    done = 0
    for path in (out / "_maekit").glob("*.json"):
        try:
            record = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        done += record.get("rows", 0) + record.get("errors", 0) if "rows" in record else 0
    return done


if __name__ == "__main__":
    main()
