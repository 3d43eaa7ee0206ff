"""A module of which only what was added to a base is saved and loaded: by PyTorch, in folders, on the hub.

transformers' Trainer calls `state_dict` and `load_state_dict`, so its checkpoints are small and resume.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self, cast

from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from memlib.pretrained.extras import extra
from memlib.pretrained.saving import load_adapter, save_adapter


class SavedModule(nn.Module):
    """`MemoryAdapter` without what it computes: its tensors and its files."""

    def added(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of what is saved, each once."""
        raise NotImplementedError

    def state_dict(  # type: ignore[override]
        self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """The tensors of `added`, each once, although the modules of one memory share some."""
        whole = super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        own = {prefix + name for name, _ in self.added()}
        for name in [name for name in whole if name.startswith(prefix) and name not in own]:
            del whole[name]
        return whole

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> _IncompatibleKeys:
        """Load what `state_dict` gave; with strict, RuntimeError for missing and for surplus tensors."""
        found = super().load_state_dict(state_dict, strict=False, assign=assign)
        own = {name for name, _ in self.added()}
        missing, surplus = [name for name in found.missing_keys if name in own], found.unexpected_keys
        if strict and (missing or surplus):
            raise RuntimeError(
                f"not the tensors of this adapter; missing: {missing[:3] or 'none'}, without a place: "
                f"{surplus[:3] or 'none'}; build it with the configuration they were saved with"
            )
        return _IncompatibleKeys(missing, surplus)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write what was added to a folder, with a model card; returns the folder. See `saving.py`.

        Pairs in attached stores are not part of it: `memlib.models.stores.save_stores` writes them.
        """
        return save_adapter(cast(Any, self), folder)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        base: Any = None,
        *,
        check_base: bool = True,
        download: bool = False,
    ) -> Self:
        """Put a saved adapter into a base, or into the model it names: see `saving.load_adapter`."""
        return cast(Self, load_adapter(folder, base, check_base, download))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        commit_message: str = "Upload memory adapter",
        token: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Save to a repository on the hub, which is created if it does not exist; returns its address.

        Raises ConnectionError, with the reason and another way, if the hub cannot be reached.
        """
        hub = extra("huggingface_hub")
        client_error = extra("huggingface_hub.errors").HfHubHTTPError.__base__  # also of a refused connection
        with tempfile.TemporaryDirectory() as scratch:
            self.save_pretrained(scratch)
            try:
                hub.create_repo(repo_id, token=token, private=private, exist_ok=True)
                done = hub.upload_folder(
                    repo_id=repo_id,
                    folder_path=scratch,
                    commit_message=commit_message,
                    token=token,
                    revision=revision,
                    create_pr=create_pr,
                )
            except (OSError, client_error) as error:
                raise ConnectionError(
                    f"push_to_hub({repo_id!r}): the hub did not accept the upload ({error}). Offline: "
                    "save_pretrained(folder) now and `hf upload` the folder later; else check name and token"
                ) from error
        return str(done)
