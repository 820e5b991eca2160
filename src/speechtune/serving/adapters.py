"""Adapters that a server may use, by name: found, verified, loaded at the strengths that are asked for."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speechtune.errors import AdapterError, ConfigError
from speechtune.export.verify import verify_adapter
from speechtune.inference.adapter_set import AdapterSet, LoadedAdapter
from speechtune.inference.load import open_adapter
from speechtune.serving.batches import Batches

MAX_LOADED = 64
"""Adapters on the base at once, each strength counted."""


@dataclass(slots=True)
class _Loaded:
    adapter: LoadedAdapter
    users: int = 0


@dataclass(slots=True)
class Adapters:
    """The adapters of one base; `folders` are those that may be used, by name.

    Another one is found by its name alone among the folders in `root`; nothing else on the disk is looked at.
    """

    models: AdapterSet
    batches: Batches[Any, Any, Any]
    folders: dict[str, Path]
    root: Path | None = None
    _loaded: dict[tuple[str, float], _Loaded] = field(default_factory=dict)
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def find(self, name: str) -> Path | None:
        """Folder of an adapter by name: a known one, or one that lies in the root."""
        if name in self.folders or self.root is None:
            return self.folders.get(name)
        return next((path for path in self.root.iterdir() if path.name == name and path.is_dir()), None)

    async def register(self, name: str) -> LoadedAdapter:
        """Verify an adapter and prove on the base that it is active; from then on its name may be used.

        Raises AdapterError: it is none, or does not fit; ConfigError: there is none of that name, or no room.
        """
        async with self.in_use(name) as adapter:
            assert adapter is not None
            return adapter

    @asynccontextmanager
    async def in_use(self, name: str | None, strength: float = 1.0) -> AsyncIterator[LoadedAdapter | None]:
        """Hold an adapter at a strength, loaded if need be; None holds the base.

        Raises AdapterError, ConfigError: as `register`.
        """
        if name is None:
            yield None
            return
        if (folder := self.find(name)) is None:
            raise ConfigError(f"no adapter {name!r}: there are {', '.join(sorted(self.folders)) or 'none'}")
        async with self._lock:  # two requests for one adapter load it once
            if (name, strength) not in self._loaded:
                await self._make_room()
                loaded = await self.batches.call(lambda: _load(self.models, name, folder, strength))
                self._loaded[name, strength] = _Loaded(loaded)
                self.folders[name] = folder
            held = self._loaded[name, strength]
            held.users += 1
        try:
            yield held.adapter
        finally:
            held.users -= 1

    async def _make_room(self) -> None:
        """Take off one that nobody uses, of those at a strength of their own, where there are too many."""
        if len(self._loaded) < MAX_LOADED:
            return
        idle = [key for key, one in self._loaded.items() if not one.users and key[1] != 1]
        if not idle:
            raise ConfigError(f"{MAX_LOADED} adapters are loaded already, each strength counted")
        adapter = self._loaded.pop(idle[0]).adapter
        await self.batches.call(lambda: self.models.remove(adapter))

    def describe(self) -> Mapping[str, float]:
        """Name of each adapter at full strength, and by how much it moves the base's logits."""
        return {name: one.adapter.effect for (name, strength), one in self._loaded.items() if strength == 1}


def _load(models: AdapterSet, name: str, folder: Path, strength: float) -> LoadedAdapter:
    checked = verify_adapter(folder, look_up_base=False)
    if not checked.valid:
        raise AdapterError(f"{name}: {'; '.join(checked.issues)}")
    return models.add(open_adapter(folder, strength))
