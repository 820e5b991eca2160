"""speechtune fine-tunes speech language models with LoRA and proves that the fine-tuning happened.

`save_lora_adapters` and `LoRACheckpointCallback` are for training loops other than speechtune's own.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "save_lora_adapters": "speechtune.lora.save",
    "LoRACheckpointCallback": "speechtune.integrations.transformers",
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use: `import speechtune` alone must not take the seconds that torch takes."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'speechtune' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    """Names for completion, the public ones included."""
    return sorted([*globals(), *_PUBLIC])
