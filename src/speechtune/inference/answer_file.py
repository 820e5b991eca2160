"""Answers of a model on disk, so that an interrupted evaluation goes on: the model's identity, then the answers."""

import json
import logging
from pathlib import Path
from typing import Any

from speechtune.config import RunConfig
from speechtune.family import Family
from speechtune.lora.files import StoredAdapter
from speechtune.storage.files import folder_fingerprint, write_atomically

log = logging.getLogger("speechtune")


class AnswerFile:
    """Answers by key, one line each after a line that identifies the model; answers of another model are moved away.

    A key names a clip's content and a task, so answers to other data or tasks in the same file stay valid.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self.texts: dict[str, str] = {}
        head = json.dumps({"answers of": identity}, sort_keys=True)
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
        if lines and lines[0] != head:
            old = path.with_suffix(".old.jsonl")
            path.replace(old)
            log.warning("%s: answers of another model; moved to %s", path, old)
            lines = []
        kept = [line for line in lines[1:] if self._take(line)]
        if self.texts:
            log.info("%s: %d answers of the same model are taken over", path, len(self.texts))
        write_atomically(path, ("\n".join([head, *kept]) + "\n").encode())

    def _take(self, line: str) -> bool:
        """Whether a line holds an answer; one cut off by a kill does not, and is asked again."""
        try:
            row = json.loads(line)
            key, text = row["key"], row["text"]
        except (ValueError, KeyError, TypeError):
            return False
        self.texts[str(key)] = str(text)
        return True

    def add(self, key: str, sample_id: str, text: str) -> None:
        """Keep one answer."""
        self.texts[key] = text
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"id": sample_id, "key": key, "text": text}) + "\n")


def model_identity(config: RunConfig, family: Family, adapter: StoredAdapter | None) -> dict[str, Any]:
    """Identity of a model: the base as it is prepared, by path, revision and (local, without adapter) content.

    Of an adapter its weights count, and what scales them: its configuration and its strength.
    """
    model, base = config.model, Path(config.model.path)
    who: dict[str, Any] = {"model": model.path, "revision": model.revision, "prepared": family.recipe()}
    if adapter is None:
        return who | {"content": folder_fingerprint(base) if base.is_dir() else None}
    scaled = {} if adapter.strength == 1 else {"strength": adapter.strength}
    return who | {"adapter": list(adapter.sha256.values())} | scaled
