"""The SLURM script, with stand-ins for SLURM's commands."""

import os
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "recipes" / "pretrain.sbatch"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="needs the source tree")

STAND_INS = {
    # As srun: starts the processes, passes their numbers, gives the highest exit code.
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        for ((i = 0; i < SLURM_NTASKS; i++)); do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & processes+=($!); done
        echo "${processes[@]}" > pids
        highest=0
        for process in "${processes[@]}"; do
            code=0; wait "$process" || code=$?
            ((code > highest)) && highest=$code
        done
        exit $highest
    """,
    "scontrol": """
        if [[ $1 == show ]]; then printf 'node1\\nnode2\\n'; else echo "$@" >> requeued; fi
    """,
    "maekit": """
        echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT: $*" >> calls
        trap 'exit 75' TERM
        for ((i = 0; i < ${SECONDS_OF_WORK:-0} * 20; i++)); do sleep 0.05; done
        exit "${EXIT:-0}"
    """,
}


@pytest.fixture
def submit(tmp_path: Path):
    for name, body in STAND_INS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("#!/usr/bin/env bash\n" + body)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def start(**changes: str) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ,
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "20007",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_NTASKS": "2",
            "SLURM_NTASKS_PER_NODE": "2",
            **changes,
        }
        return subprocess.Popen(["bash", SCRIPT, "my shards/", "--out", "run"], cwd=tmp_path, env=environment)

    return start


def test_each_process_gets_its_place(submit, tmp_path: Path) -> None:
    assert submit().wait(20) == 0
    calls = sorted((tmp_path / "calls").read_text().splitlines())
    assert calls == [f"{rank} {rank} 2 2 node1 20007: pretrain my shards/ --out run" for rank in (0, 1)]
    assert not (tmp_path / "requeued").exists()


def test_a_stopped_run_is_queued_again_and_a_failed_one_is_not(submit, tmp_path: Path) -> None:
    assert submit(EXIT="1").wait(20) == 1
    assert not (tmp_path / "requeued").exists()
    job = submit(SECONDS_OF_WORK="20")
    until = time.monotonic() + 10
    while (tmp_path / "calls").read_text().count("\n") < 4 and time.monotonic() < until:
        time.sleep(0.02)
    # As at the end of a pre-empted job: to the processes and to the script.
    job.send_signal(signal.SIGTERM)
    for process in (tmp_path / "pids").read_text().split():
        os.kill(int(process), signal.SIGTERM)
    assert job.wait(20) == 75
    assert (tmp_path / "requeued").read_text() == "requeue 20007\n"
