"""Load a pretrained language model and its tokenizer, without a network unless asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from memlib.pretrained.cache import WeightsError, check_model, model_folder
from memlib.pretrained.extras import extra, without_progress_bars
from memlib.pretrained.fetch import NAME

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Weights in safetensors only, once: Mistral's repositories hold a second copy, consolidated.safetensors.
WANTED, UNWANTED = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "LICENSE*"], ["consolidated*"]


def load_base(
    name: str, dtype: torch.dtype = torch.float32, *, download: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model in eval mode, and its tokenizer.

    name: "smollm2-135m-instruct", which `make model` puts into the cache; else a local folder in the format
        of transformers; else the name of a model on the hub
    dtype: type of the weights
    download: allow a hub model to be fetched. By default only the hub's local cache is searched, and a
        failure is immediate. HF_HUB_OFFLINE=1 forbids downloads in any case.

    Weights are read from safetensors only, and no code from a model's folder is run. The sizes of the cache's
    files are compared with its manifest; `make model` also compares checksums.

    Raises WeightsError if the model is missing, damaged or out of reach; ImportError without transformers.
    """
    folder = find(name, download)
    transformers = extra("transformers")
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        with without_progress_bars():
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, **options
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    except ImportError:
        raise
    except Exception as error:  # tokenizers and safetensors raise types of their own
        raise WeightsError(
            f"{name!r}: {folder} does not hold a model that transformers can read, with its tokenizer and "
            f"with weights in safetensors; repair or replace the folder ({error})"
        ) from error
    return model.eval(), tokenizer


def find(name: str, download: bool = False) -> Path:
    """The local folder of a model; raises WeightsError if there is none."""
    if name == NAME:
        folder = model_folder(NAME)
        check_model(folder)
        return folder
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or name.startswith((".", "~")):
        raise WeightsError(f"{name!r}: no such folder; name a folder, a model of the hub, or {NAME}")
    # Not left to transformers: with peft installed it asks the hub even if told not to (23 s of retries).
    hub = extra("huggingface_hub")
    try:
        return Path(
            hub.snapshot_download(
                name, allow_patterns=WANTED, ignore_patterns=UNWANTED, local_files_only=not download
            )
        )
    except (OSError, ValueError) as error:
        if hub.is_offline_mode():
            remedy = "HF_HUB_OFFLINE forbids fetching it; unset it and pass download=True (--download)"
        elif download:
            remedy = "it could not be fetched; check the name and the connection"
        else:
            remedy = "pass download=True to fetch it (--download on the command line)"
        raise WeightsError(
            f"{name!r}: not a local folder, and not in the hub's local cache; {remedy}, or use {NAME} "
            f"({error})"
        ) from error
