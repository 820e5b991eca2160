"""Write the trained base as a model folder of the native classes, in fp16, and its codec beside it.

    python examples/speaking_base/write_base.py --run run --codec codec --tokenizer tokenizer --output base

`speechtune generate --model base/model --codec base/codec` speaks with it.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from model import SpeakingBase, entry_features, make_config
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from speechtune.families.higgs_audio_v2.codec_world import WorldCodec

TEMPERATURE, TOP_K = 0.3, 20


def load_average(run: Path, config: Any, codec: WorldCodec) -> Any:
    """The averaged weights of a run as a native model."""
    state = json.loads((run / "state.json").read_text(encoding="utf-8"))
    tensors = load_file(run / state["tensors"])
    average = {key.removeprefix("average."): value for key, value in tensors.items() if key.startswith("average.")}
    print(f"step {state['step']}, {state['positions'] / 1e6:.1f} M positions, {state['seconds'] / 60:.0f} minutes")
    model = SpeakingBase(config, entry_features(codec)).native(average)
    settings = model.generation_config
    settings.update(pad_token_id=config.pad_token_id, do_sample=True, temperature=TEMPERATURE, top_k=TOP_K)
    settings.update(allow_custom_entries=True, ras_win_len=None, ras_win_max_num_repeat=None)
    settings._from_model_config = False  # or the settings are dropped when the folder is loaded
    return model


def write_base(run: Path, codec: Path, tokenizer: Path, output: Path) -> None:
    """Model, tokenizer and codec."""
    state = json.loads((run / "state.json").read_text(encoding="utf-8"))
    words = cast(PreTrainedTokenizerFast, AutoTokenizer.from_pretrained(tokenizer))
    tables = WorldCodec(str(codec))
    hidden, layers = (int(state["arguments"][name]) for name in ("hidden", "layers"))
    model = load_average(run, make_config(words, tables, hidden, layers), tables)
    model.to(torch.float16).save_pretrained(output / "model")
    words.save_pretrained(output / "model")
    shutil.copytree(codec, output / "codec", dirs_exist_ok=True)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file()) / 1e6
    print(f"{output}: {size:.1f} MB")


def main() -> None:
    """Write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("--run", "--codec", "--tokenizer", "--output"):
        parser.add_argument(name, type=Path, required=True)
    arguments = parser.parse_args()
    write_base(arguments.run, arguments.codec, arguments.tokenizer, arguments.output)


if __name__ == "__main__":
    main()
