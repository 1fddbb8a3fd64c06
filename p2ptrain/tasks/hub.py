"""Models and tokenizers as folders: one that the peer file names, or a copy of one on the Hugging Face hub.

Only data is fetched: configurations, safetensors and tokenizers. What would be code, or is pickled, is left
there, and a run's own words are never taken for a path (`config.Named`).
"""

from __future__ import annotations

from pathlib import Path

from p2ptrain.errors import ConfigError
from p2ptrain.tasks.extras import needs
from p2ptrain.tasks.tokens import brief

FETCHED = ("*.json", "*.safetensors", "tokenizer.model", "*.txt", "*.jinja")


def folder_of(what: str, name: str, revision: str, own: str) -> Path:
    """Where the `model` or `tokenizer` is: `own`, from the peer file, or else fetched from the hub.

    Files that were fetched before are not fetched again, and do without a network. Raises ConfigError.
    """
    if own:
        path = Path(own).expanduser()
        if not path.is_dir():
            raise ConfigError(f"there is no folder {path.absolute()}; correct {what} in the peer file")
        return path
    with needs("hf"):
        from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(FETCHED)))
    except Exception as error:  # of the network, the hub or the disk, in the kinds of several libraries
        raise ConfigError(
            f"the {what} {name} (revision {revision}) could not be fetched from the Hugging Face hub "
            f"({brief(error)}); check the name and the network, or set {what} in the peer file to a folder "
            "that has it"
        ) from error
