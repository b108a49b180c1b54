"""Where the files of an adapter are: a directory, or a repository of the hub."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

_HUB_OPTIONS = set(inspect.signature(hf_hub_download).parameters) - {"repo_id", "filename", "subfolder"}


@dataclass(frozen=True)
class AdapterFiles:
    """The files of one adapter, wherever they are.

    Args:
        model_id: A directory, or a repository of the hub.
        subfolder: A folder inside it.
        options: What `hf_hub_download` takes beside: revision, cache_dir, token, local_files_only ...
    """

    model_id: str
    subfolder: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "model_id", os.fspath(self.model_id))  # a pathlib.Path too

    @classmethod
    def from_arguments(cls, model_id: str | os.PathLike[str], arguments: Mapping[str, Any]) -> AdapterFiles:
        """Takes of the arguments of PEFT's `from_pretrained` or `load_adapter` what says where an adapter is."""
        given = {key: value for key, value in arguments.items() if key in _HUB_OPTIONS and value is not None}
        return cls(str(model_id), arguments.get("subfolder"), given)

    def find(self, name: str) -> str | None:
        """Returns the local path of the file `name`, downloaded if need be, or None where the adapter has none.

        Raises:
            ValueError: `model_id` is no directory here, and the hub could not be asked; or one that cannot be read.
        """
        local = os.path.join(self.model_id, self.subfolder or "", name)
        if os.path.isfile(local):
            return local
        if os.path.isdir(self.model_id):
            if not os.access(os.path.dirname(local), os.X_OK) and os.path.isdir(os.path.dirname(local)):
                raise ValueError(f"{os.path.dirname(local)!r} may not be read: change its permissions (chmod u+rx).")
            return None
        try:
            return hf_hub_download(self.model_id, name, subfolder=self.subfolder, **self.options)
        except LocalEntryNotFoundError:  # could not be asked: not the same as absent
            raise ValueError(
                f"{self.model_id!r} is no directory here, and the hub could not be reached for its {name}."
            ) from None
        except EntryNotFoundError:
            return None
        except HFValidationError:  # a path that is not there
            raise ValueError(f"{self.model_id!r} is no directory here, and no name on the hub either.") from None

    def arguments(self) -> dict[str, Any]:
        """Returns subfolder and options as keywords, for PEFT's own readers."""
        return {**self.options, **({} if self.subfolder is None else {"subfolder": self.subfolder})}

    def __str__(self) -> str:
        return self.model_id
