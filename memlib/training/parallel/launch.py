"""Write the files that start a run on Slurm or Kubernetes; they start torchrun, nothing else.

The templates are the files in `templates/`. Both save when the scheduler asks the run to stop, and resume.
"""

from __future__ import annotations

import json
import re
import shlex
from importlib.resources import files
from pathlib import Path
from string import Template

from memlib.config import Config, ConfigError
from memlib.training.parallel.ranks import check_launch

TEMPLATES = {"slurm": "slurm.sh", "kubernetes": "kubernetes.yaml"}


class AtTemplate(Template):
    """`@name` is replaced and `@@` is @, since $ has a meaning in shell scripts."""

    delimiter = "@"


def launch_file(
    system: str,
    config: Config,
    words: list[str],
    nodes: int,
    gpus_per_node: int,
    image: str = "memlib:latest",
) -> str:
    """The text of an sbatch script ("slurm") or a PyTorchJob ("kubernetes").

    words: the configuration's name and changes, as `memlib train` takes them; nodes x gpus_per_node processes
    are started. Raises ConfigError if these do not fit the configuration.
    """
    for name, number in (("nodes", nodes), ("gpus-per-node", gpus_per_node)):
        if number < 1:
            raise ConfigError(f"--{name} {number}: use at least 1")
    if config.adapter.base_model_name is not None:
        raise ConfigError(
            f"adapter.base_model_name = {config.adapter.base_model_name!r}: pretrained models train in one "
            "process; use memlib train"
        )
    check_launch(config, nodes * gpus_per_node)
    if config.training.device == "cpu":
        words = [*words, "training.device=cuda"]
    name = Path(words[0]).stem
    train = ["-m", "memlib", "train", *words, "--out", f"runs/{name}", "--resume"]
    template = files("memlib.training.parallel") / "templates" / TEMPLATES[system]
    return AtTemplate(template.read_text(encoding="utf-8")).substitute(
        name=shlex.quote(name),
        label=re.sub("[^a-z0-9]+", "-", name.lower()).strip("-"),
        nodes=nodes,
        gpus=gpus_per_node,
        words=shlex.join(words),
        out=shlex.quote(f"runs/{name}"),
        image=json.dumps(image),
        command=json.dumps(["torchrun", "--shutdown-timeout", "100", *train]),
    )
