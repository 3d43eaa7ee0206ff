"""Memory states as safetensors files, written atomically and bound to the model that wrote them.

Axes: `...` stands for all axes of a parameter.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from memlib.config import to_dict
from memlib.files import write_bytes
from memlib.memory.address import SlotAddress
from memlib.memory.key_attention import MemoryAttention
from memlib.models import MemoryState
from memlib.models.protocol import RecurrentModel

FORMAT = "memlib memory state 1"
SAMPLED = 64  # values of each parameter that enter the fingerprint
RANDOM = "random"
KINDS_OF_0_1 = ("internal", "external", "hds", "ltm", "ring", "chapters")


class StateError(ValueError):
    """A state file cannot be used; the message names the file and the remedy."""


def save_state(
    state: MemoryState,
    path: str | os.PathLike[str],
    model: RecurrentModel,
    random: Tensor | None = None,
) -> None:
    """Write a state of this model, and the state of a random generator if given.

    With attached stores, the state holds cursors into them: save the stores too.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.named_tensors()}
    if random is not None:
        tensors[RANDOM] = random
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, save(tensors, {"format": FORMAT, "model": fingerprint(model)}))


def load_state(path: str | os.PathLike[str], model: RecurrentModel) -> tuple[MemoryState, Tensor | None]:
    """Load what `save_state` wrote: the state, and the random generator's state if there is one.

    Raises StateError for a file that is missing, damaged, or written by a model with another configuration
    or other weights, because its values would have another meaning in this model.
    """
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except FileNotFoundError:
        raise StateError(f"{path}: no such file; save_state writes it") from None
    except (SafetensorError, OSError) as error:
        raise StateError(f"{path}: incomplete or damaged state file ({error}); start a new one") from None
    if about.get("format") != FORMAT:
        raise StateError(f"{path}: format {about.get('format')!r}, not {FORMAT!r}; start a new one")
    if about["model"] not in [fingerprint(model, version) for version in (3, 2, 1)]:
        raise StateError(
            f"{path}: of another model, or of this model with other weights; open it with the checkpoint "
            "that wrote it, or start a new one"
        )
    try:
        state = model.init_state(1).load(tensors)
    except KeyError as error:
        raise StateError(f"{path}: {error.args[0]}; attach stores as they were when it was saved") from None
    return state.to(model.device), tensors.get(RANDOM)


@torch.no_grad()
def fingerprint(model: RecurrentModel, version: int = 3) -> str:
    """A hash of the configuration and of sampled weights.

    version 3 leaves out the options of memories that the model does not have; 2 has those that memlib 0.1
    knew; 1 is the hash of memlib 0.1, in which a single sharpness was a parameter without an axis.
    """
    lone = [
        f"{name}.sharpness"
        for name, m in model.named_modules()
        if isinstance(m, (SlotAddress, MemoryAttention))
    ]
    memory = to_dict(model.config.memory)
    kept = {*model.config.memory.kinds, *(KINDS_OF_0_1 if version < 3 else ())}
    memory = {name: value for name, value in memory.items() if name in kept or not isinstance(value, dict)}
    size = to_dict(model.config.model)
    if size["attention_window"] is None:  # an option that states of earlier versions do not know
        del size["attention_window"]
    config = [size, memory]
    if model.config.adapter.base_model_name is not None:
        config.append(to_dict(model.config.adapter))
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, parameter in model.named_parameters():
        flat = rearrange(parameter, "... -> (...)")
        sample = flat[:: max(1, flat.numel() // SAMPLED)].double().cpu().numpy()
        shape = () if version == 1 and name in lone else tuple(parameter.shape)
        digest.update(f"{name} {shape} {parameter.dtype}".encode() + sample.tobytes())
    return digest.hexdigest()
