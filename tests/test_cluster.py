"""The SLURM script, with stand-ins for SLURM: it queues a job again where it should, and finds its checkpoint."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "configs" / "cluster" / "slurm.sbatch"


@pytest.fixture
def slurm(tmp_path: Path) -> Path:
    """A folder whose commands write down how they were called; srun ends with the status in a file."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, end in (("srun", 'exit "$(cat status)"'), ("scontrol", "exit 0")):
        (commands / name).write_text(f'#!/usr/bin/env bash\necho "{name} $*" >> calls\n{end}\n')
        (commands / name).chmod(0o755)
    return tmp_path


def submit(folder: Path, status: int) -> tuple[int, list[str]]:
    """The script's status, and the calls that it made."""
    (folder / "status").write_text(str(status))
    (folder / "calls").unlink(missing_ok=True)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "8", "SLURM_CPUS_PER_TASK": "4"}
    path = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", str(SCRIPT), "--config", "c.yaml"], cwd=folder, env=os.environ | job | path)
    return done.returncode, (folder / "calls").read_text().splitlines()


@pytest.mark.parametrize(("status", "again"), [(0, False), (1, False), (75, True), (143, True)])
def test_a_job_that_was_asked_to_leave_is_queued_again(status: int, again: bool, slurm: Path) -> None:
    returned, calls = submit(slurm, status)
    assert returned == status
    assert "fit --last.every_n_steps 100 --config c.yaml --trainer.num_nodes 2 --trainer.devices 8" in calls[0]
    assert calls[0].endswith("--trainer.default_root_dir runs/slurm_7")
    assert calls[1:] == (["scontrol requeue 7"] if again else [])


def test_it_goes_on_from_the_newest_checkpoint(slurm: Path) -> None:
    for number in (0, 1):
        folder = slurm / "runs" / "slurm_7" / f"version_{number}" / "checkpoints"
        (folder / "last-6").mkdir(parents=True)
        (folder / "last.ckpt").symlink_to("last-6")
        os.utime(folder / "last.ckpt", (number, number), follow_symlinks=False)
    _, calls = submit(slurm, 0)
    assert calls[0].endswith("--ckpt_path runs/slurm_7/version_1/checkpoints/last.ckpt")
