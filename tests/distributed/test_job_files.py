"""The job files of docs/cluster do what they say, on a machine that plays the cluster."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import flags, treadle
from tests.training.test_resume import rows_of, same_end, start
from treadle.distributed.launch import free_port

from .test_command_line import LONG, children, line, wait_for_rows

FILES = Path(__file__).parents[2] / "docs" / "cluster"

SRUN = f"""#!{sys.executable}
import os, subprocess, sys
own = {{"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_LOCALID": "0"}}
ranks = [subprocess.Popen(sys.argv[1:], env={{**os.environ, **own, "SLURM_PROCID": str(n)}}) for n in range(2)]
open(os.environ["PIDS"], "w").write(" ".join(str(rank.pid) for rank in ranks))
codes = [rank.wait() for rank in ranks]
sys.exit(max(128 - code if code < 0 else code for code in codes))
"""


@pytest.fixture()
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a SLURM job of two machines with one task each; `srun` and `scontrol` are played."""
    tools, home = tmp_path / "tools", tmp_path / "env" / "bin"
    for folder in (tools, home):
        folder.mkdir(parents=True)
    (home / "activate").write_text(f'export PATH="{tools}:$PATH"\n')
    scripts = {
        "srun": SRUN,
        "treadle": f'#!/bin/bash\nexec {sys.executable} -m treadle "$@"\n',
        "scontrol": '#!/bin/bash\necho "requeued: $*"\n',
    }
    for name, script in scripts.items():
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    return {**os.environ, "TREADLE_ENV": str(tmp_path / "env"), "SLURM_JOB_ID": str(free_port()), "SLURM_CPUS_PER_TASK": "1",
            "PIDS": str(tmp_path / "pids"), "MASTER_PORT": str(free_port())}  # fmt: skip


@pytest.mark.slow
def test_slurm_trains_stops_at_its_limit_and_continues(text_file: Path, tmp_path: Path, cluster: dict[str, str]) -> None:
    whole = subprocess.run(line(text_file, tmp_path / "whole"), capture_output=True, timeout=120)
    assert whole.returncode == 0
    job = ["bash", str(FILES / "slurm.sh"), str(text_file), "--output_dir", str(tmp_path / "run"), *flags(**LONG)]
    first = start(job, **cluster)
    wait_for_rows(first, tmp_path / "run", 5)
    for pid in Path(cluster["PIDS"]).read_text().split():  # as --signal=TERM@300 does
        os.kill(int(pid), signal.SIGTERM)
    out, _ = first.communicate(timeout=90)
    assert first.returncode == 0 and f"requeued: requeue {cluster['SLURM_JOB_ID']}" in out, out
    second = start(job, **cluster, SLURM_RESTART_COUNT="1")
    out, _ = second.communicate(timeout=90)
    assert second.returncode == 0 and "2 processes (ddp)" in out and "Resumed from step" in out and "requeued" not in out, out
    same_end(tmp_path / "whole", tmp_path / "run")


def test_slurm_does_not_repeat_what_cannot_work(text_file: Path, cluster: dict[str, str]) -> None:
    job = ["bash", str(FILES / "slurm.sh"), str(text_file), "--hiden_size", "3"]
    done = subprocess.run(job, env=cluster, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "requeued" not in done.stdout and "hidden_size" in done.stderr


def test_preparing_as_an_array(text_file: Path, tmp_path: Path, cluster: dict[str, str]) -> None:
    common = [str(text_file), "--output", str(tmp_path / "many"), "--tokenizer", "byte"]
    for number in (1, 0):
        array = {"SLURM_ARRAY_TASK_ID": str(number + 4), "SLURM_ARRAY_TASK_MIN": "4", "SLURM_ARRAY_TASK_COUNT": "2"}
        job = ["bash", str(FILES / "prepare.sh"), common[0], common[2], *common[3:]]
        done = subprocess.run(job, env={**cluster, **array}, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
    assert treadle("data", "prepare", *common).returncode == 0
    assert treadle("data", "prepare", text_file, "--output", tmp_path / "one", "--tokenizer", "byte").returncode == 0
    for made in (tmp_path / "one").rglob("*.bin"):
        assert made.read_bytes() == (tmp_path / "many" / made.relative_to(tmp_path / "one")).read_bytes()


@pytest.mark.slow
def test_kubernetes_and_a_process_that_dies(text_file: Path, tmp_path: Path) -> None:
    """The container's own command, on one machine: torchrun starts the processes again when one is killed."""
    service, job = yaml.safe_load_all((FILES / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    own = {entry["name"]: entry["value"] for entry in container["env"]}
    assert own["FIRST"].split(":")[0] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"] and int(own["MACHINES"]) == job["spec"]["completions"]
    assert (FILES.parents[1] / shlex.split(own["TRAIN"])[0].removeprefix("treadle/")).is_file()
    whole = subprocess.run(line(text_file, tmp_path / "whole"), capture_output=True, timeout=120)
    assert whole.returncode == 0
    (tmp_path / "torchrun").write_text(f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    wanted = shlex.join([str(text_file), "--output_dir", str(tmp_path / "run"), *flags(**LONG)])
    environ = {**os.environ, **own, "MACHINES": "1", "PROCESSES": "2", "FIRST": f"localhost:{free_port()}", "TRAIN": wanted,
               "INSTALL": "true", "PATH": f"{tmp_path}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}  # fmt: skip
    process = start([*container["command"], *container["args"]], **environ)
    wait_for_rows(process, tmp_path / "run", 7)
    os.kill(children(process)[1], signal.SIGKILL)
    try:
        out, _ = process.communicate(timeout=100)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        raise AssertionError(f"it hangs:\n{process.communicate()[0]}") from None
    assert process.returncode == 0 and "Resumed from step" in out, out
    same_end(tmp_path / "whole", tmp_path / "run")
    assert len(rows_of(tmp_path / "run")) == len(rows_of(tmp_path / "whole"))
