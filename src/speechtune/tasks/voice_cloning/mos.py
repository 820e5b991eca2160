"""Predicted mean opinion scores: DistillMOS and DNSMOS, both by Microsoft, with weights inside their packages."""

import contextlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from speechtune.errors import ConfigError
from speechtune.tasks.voice_cloning.support import RATE, identity, need, package_file, waveform
from speechtune.types import Audio

INSTALL_DISTILLMOS = "pip install --no-deps distillmos==0.9.1 xls-r-sqa==0.1.0"
INSTALL_DNSMOS = "pip install 'speechtune[mos]'"
DNSMOS_SECONDS = 9.01
"""Length of DNSMOS's window; shorter clips are repeated until they fill it."""
DNSMOS_OVERALL = np.poly1d([-0.06766283, 1.11546468, 0.04602535])
"""From the network's output to the scale of human ratings (speechmos/dnsmos.py, not personalised)."""
DNSMOS_MODEL = "dnsmos_models/sig_bak_ovr.onnx"


class DistillMos:
    """DistillMOS (Stahl & Gamper 2025): a small network taught by one on XLS-R features, for speech at 16 kHz."""

    def __init__(self, spec: str, device: str) -> None:
        # distillmos uses torchaudio in its command line alone, and torchaudio loads beside one exact torch build only
        present = sys.modules.get("torchaudio")
        sys.modules["torchaudio"] = ModuleType("torchaudio")
        try:
            package = need("distillmos.sqa", spec, INSTALL_DISTILLMOS)
        finally:
            del sys.modules["torchaudio"]
            if present is not None:
                sys.modules["torchaudio"] = present
        self.name = identity("distillmos", Path(package.DEFAULT_WEIGHTS_CHKPT))
        with contextlib.redirect_stdout(io.StringIO()):  # it prints the path of its weights, which would break --json
            self._model = package.ConvTransformerSQAModel().eval().to(device)
        self._device = device

    @torch.inference_mode()
    def predict(self, audios: Sequence[Audio]) -> np.ndarray:
        """Scores from 1 to 5, float64 of shape (clips,); one clip at a time, for sums of a batch depend on its size."""
        clips = (torch.from_numpy(waveform(audio))[None].to(self._device) for audio in audios)
        return np.array([float(self._model(clip)) for clip in clips], dtype=np.float64)


class Dnsmos:
    """DNSMOS P.835 (Reddy, Gopal & Cutler 2022), the overall score, as the package speechmos computes `ovrl_mos`.

    The package's own code imports librosa for another score; here its network runs alone.
    """

    def __init__(self, spec: str, device: str) -> None:
        weights = package_file("speechmos", DNSMOS_MODEL, spec, INSTALL_DNSMOS)
        runtime = need("onnxruntime", spec, INSTALL_DNSMOS)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = 1  # the same sums on every machine
        self.name = identity("speechmos", weights, "DNSMOS overall")
        try:
            self._session = runtime.InferenceSession(str(weights), options, providers=["CPUExecutionProvider"])
        except RuntimeError as error:
            raise ConfigError(f"{spec}: {weights} does not load ({error}); {INSTALL_DNSMOS}") from None

    def predict(self, audios: Sequence[Audio]) -> np.ndarray:
        """Scores of about 1 to 5, float64 of shape (clips,): the mean over windows of 9.01 s, a second apart."""
        return np.array([self._predict(waveform(audio)) for audio in audios], dtype=np.float64)

    def _predict(self, samples: np.ndarray) -> float:
        size = int(DNSMOS_SECONDS * RATE)
        while len(samples) < size:
            samples = np.concatenate([samples, samples])
        count = int(len(samples) // RATE - DNSMOS_SECONDS) + 1
        # ends as the package computes them: by rounding some windows lack a sample, and those it leaves out
        windows = [samples[i * RATE : int((i + DNSMOS_SECONDS) * RATE)] for i in range(count)]
        outputs = [self._session.run(None, {"input_1": w[None]})[0][0][2] for w in windows if len(w) == size]
        return float(np.mean([DNSMOS_OVERALL(output) for output in outputs]))
