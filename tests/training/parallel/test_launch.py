"""Launch files equal the stored ones, and Slurm's and Kubernetes' own syntax accepts them."""

import subprocess
from pathlib import Path

import pytest
import yaml

from memlib.cli import main
from memlib.config import load_config, override
from memlib.training.parallel.launch import launch_file

GOLDEN = Path(__file__).parent / "launch"
WORDS = ["hds_100m", "parallel.distributed_strategy=fsdp"]


@pytest.mark.parametrize("system, name", [("slurm", "slurm.sh"), ("kubernetes", "kubernetes.yaml")])
def test_a_launch_file_equals_the_stored_one(system, name, tmp_path):
    out = tmp_path / name
    assert main(["launch", *WORDS, f"--{system}", "--nodes", "2", "--out", str(out)]) == 0
    assert out.read_text(encoding="utf-8") == (GOLDEN / name).read_text(encoding="utf-8")


def test_the_sbatch_script_is_bash_with_its_options_first():
    subprocess.run(["bash", "-n", str(GOLDEN / "slurm.sh")], check=True)
    lines = (GOLDEN / "slurm.sh").read_text(encoding="utf-8").splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    options = [line for line in lines if line.startswith("#SBATCH")]
    assert options == [line for line in lines[:first_command] if line.startswith("#SBATCH")]
    assert "#SBATCH --requeue" in options and "#SBATCH --signal=B:USR1@120" in options


@pytest.mark.parametrize("signal", [False, True])
def test_the_sbatch_script_queues_the_job_again_if_it_was_asked_to_stop(tmp_path, signal):
    """Slurm's commands are replaced: training takes 0.5 s after the signal, as if it saved."""
    fakes = {
        "srun": "trap 'sleep 0.5; touch saved; exit 138' USR1; echo $$ > pid; touch started; "
        + ("while :; do sleep 0.05; done" if signal else "exit 0"),
        "scontrol": 'if [ "$1" = show ]; then echo node1; else ls > "$1"; fi',
        "scancel": 'kill -USR1 "$(cat pid)"',
    }
    for name, text in fakes.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    send = "(until [ -e started ]; do sleep 0.05; done; kill -USR1 $$) &" if signal else ""
    script = (GOLDEN / "slurm.sh").read_text(encoding="utf-8")
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-2]",
    }
    result = subprocess.run(["bash", "-c", f"{send}\n{script}"], cwd=tmp_path, env=environment, timeout=30)
    assert (tmp_path / "requeue").exists() is signal
    if signal:
        assert "saved" in (tmp_path / "requeue").read_text(encoding="utf-8").split()  # only after saving
    else:
        assert result.returncode == 0


def test_the_pytorchjob_has_its_fields():
    job = yaml.safe_load((GOLDEN / "kubernetes.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert job["metadata"]["name"] == "hds-100m"
    spec = job["spec"]
    worker = spec["pytorchReplicaSpecs"]["Worker"]
    assert worker["replicas"] == spec["elasticPolicy"]["minReplicas"] == 2 and spec["nprocPerNode"] == "8"
    (container,) = worker["template"]["spec"]["containers"]
    assert container["name"] == "pytorch" and container["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert container["command"][-7:-2] == ["train", *WORDS, "training.device=cuda", "--out"]


def test_words_are_quoted():
    text = launch_file("slurm", load_config("tiny"), ["my runs/a b.yaml", "task.name=copy"], 1, 1)
    assert "memlib train 'my runs/a b.yaml' task.name=copy training.device=cuda --out 'runs/a b'" in text


@pytest.mark.parametrize(
    "changes, nodes, gpus, said",
    [
        ({}, 0, 8, "--nodes 0: use at least 1"),
        ({}, 1, 0, "--gpus-per-node 0: use at least 1"),
        ({}, 5, 8, "training.batch_size = 48: its rows are divided among 40 data-parallel ranks"),
        ({"parallel.num_gpus": 4}, 1, 8, "parallel.num_gpus = 4: the launcher started 8"),
    ],
)
def test_what_does_not_fit_is_refused(changes, nodes, gpus, said):
    with pytest.raises(ValueError, match=said):
        launch_file("slurm", override(load_config("hds_100m"), changes), ["hds_100m"], nodes, gpus)


def test_pretrained_models_are_refused(capsys):
    assert main(["launch", "adapter_smollm2", "--slurm"]) == 2
    assert "pretrained models train in one process" in capsys.readouterr().err
