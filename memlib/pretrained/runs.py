"""Find and open what was trained around a pretrained model: by a folder, a run, or the name of a preset."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from memlib.config import Config, load_config, preset_names
from memlib.pretrained.saving import MANIFEST, load_adapter, saved_config

if TYPE_CHECKING:
    from memlib.pretrained.adapter import MemoryAdapter

ADAPTER = "adapter"  # the folder, in a run's folder, of what was trained


class Opened(NamedTuple):
    """An adapter in eval mode, the tokenizer of its base, and where it is from: None is the untaught base."""

    adapter: MemoryAdapter
    tokenizer: Any
    folder: Path | None


def saved_folder(path: Path) -> Path | None:
    """The folder of a saved adapter: the path itself, its `adapter`, or that of its first seed."""
    seeds = sorted(path.glob("seed-*"))
    folders = (path, path / ADAPTER, *(seed / ADAPTER for seed in seeds))
    return next((folder for folder in folders if (folder / MANIFEST).is_file()), None)


def adapter_config(name: str, runs: Path = Path("runs")) -> tuple[Config, Path | None] | None:
    """The configuration of an adapter, and the folder of what was trained, if any; None for anything else.

    name: the folder of a saved adapter, of a run or of its seeds, or a preset: then the run of that name in
    `runs`. Raises FileNotFoundError for a run that has not ended.
    """
    path = Path(name)
    if (found := saved_folder(path)) is not None:
        return saved_config(found), found
    if path.exists():
        settings = path / "config.yaml"
        if settings.is_file() and load_config(settings).adapter.base_model_name is not None:
            raise FileNotFoundError(
                f"{path}: no adapter here yet; end the run with memlib train {settings} --resume --out {path}"
            )
        return None
    if name not in preset_names() or (config := load_config(name)).adapter.base_model_name is None:
        return None
    found = saved_folder(runs / name)
    return (config if found is None else saved_config(found)), found


def open_adapter(config: Config, folder: Path | None, download: bool = False) -> Opened:
    """Load a saved adapter with its base, or the base with nothing taught if `folder` is None."""
    from memlib.pretrained.adapter import MemoryAdapter
    from memlib.pretrained.fitting import load_with_tokenizer

    base, tokenizer = load_with_tokenizer(config, download)
    base = base.to(config.training.device)
    adapter = MemoryAdapter(config, base).eval() if folder is None else load_adapter(folder, base)
    return Opened(adapter, tokenizer, folder)
