"""Loading the models that judge pictures, and saying which weights are missing and where they are to be had."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..cli.model import check_weights
from ..cli.report import first_line

T = TypeVar("T")


class Source:
    """A model of transformers that an option names.

    Args:
        option: the option.
        model: a folder or an id on the Hugging Face hub.
        what: what it has to be, with an example.
        allow_pickle: also take weights that are not safetensors.

    Raises:
        ValueError: its weights are pickles, which are not allowed.
    """

    def __init__(self, option: str, model: str, what: str, allow_pickle: bool) -> None:
        self.model = model
        self._option, self._what, self._safe = option, what, None if allow_pickle else True
        if not allow_pickle:
            check_weights(Path(model))

    def processor(self, cls: Any) -> Any:
        """Return its processor.

        Raises:
            OSError: there is none.
        """
        return self._or_absent(lambda: cls.from_pretrained(self.model), " with its processor")

    def weights(self, cls: Any) -> Any:
        """Return the model, on the CPU.

        Raises:
            OSError: there is none, or not all of its weights.
        """

        def load() -> Any:
            model, found = cls.from_pretrained(
                self.model, output_loading_info=True, ignore_mismatched_sizes=True, use_safetensors=self._safe
            )
            # Transformers leaves both as they were initialised.
            if found["missing_keys"]:
                raise ValueError(f"its weights lack {min(found['missing_keys'])}")
            if found["mismatched_keys"]:
                name = min(found["mismatched_keys"])[0]
                raise ValueError(f"its {name} has another shape than its configuration says")
            return model.eval()

        return self._or_absent(load)

    def _or_absent(self, load: Callable[[], T], more: str = "") -> T:
        try:
            return load()
        except Exception as error:
            raise absent(self._option, self.model, self._what + more, error) from error


def absent(option: str, model: str, what: str, error: Exception) -> OSError:
    """Return the error of a model that cannot be used."""
    return OSError(f"{option} {model!r} is not {what}: {first_line(error)}")


def require(option: str, *modules: str) -> None:
    """Raise ImportError unless these are installed."""
    if missing := [name for name in modules if util.find_spec(name) is None]:
        raise ImportError(f'{option} needs {" and ".join(missing)}; run: pip install "attnctl-fast[evaluate]"')


def hub_file(option: str, url: str, allow_pickle: bool) -> Path:
    """Return torch's own copy of a file of weights, fetched where there is none.

    Such files are pickles. The last word of their name begins their SHA-256, and no other file is let in.

    Raises:
        OSError: it is not there and cannot be fetched.
        ValueError: it is another file, which is not allowed.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    digest = path.stem.rpartition("-")[2]
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), digest, progress=False)
        except (OSError, RuntimeError) as error:
            raise OSError(
                f"{option} needs {path}, which cannot be fetched from {url}: {first_line(error)}; copy it there"
            ) from error
    elif not allow_pickle and not hashlib.sha256(path.read_bytes()).hexdigest().startswith(digest):
        raise ValueError(
            f"{path} is a pickle, which can run code when it is loaded, and not the file of its name; remove it, or, "
            "if you trust it, add --allow-pickle"
        )
    return path
