"""Train the small codec that ships with the demo: the real Higgs Audio v2 codec class, on real and synthetic speech.

Reconstruction losses only (multi-resolution spectrograms and mel bands), no discriminator; minutes to an hour on a CPU.

    python examples/demo_assets/train_codec.py CLIPS.jsonl OUTPUT_DIR --minutes 60
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from speechtune.audio import read_audio
from speechtune.families.base import AudioRef
from speechtune.families.tiny import codec_from_config, draw_codebooks

RATE = 24_000
SEGMENT = 960 * 20


def mel_filters(bands: int, n_fft: int) -> torch.Tensor:
    """Triangular filters on the mel scale (HTK formula), shape (n_fft // 2 + 1, bands)."""
    edges = 700 * (10 ** (torch.linspace(0, 2595 * np.log10(1 + RATE / 2 / 700), bands + 2) / 2595) - 1)
    frequencies = torch.linspace(0, RATE / 2, n_fft // 2 + 1)[:, None]
    up = (frequencies - edges[:-2]) / (edges[1:-1] - edges[:-2])
    down = (edges[2:] - frequencies) / (edges[2:] - edges[1:-1])
    return torch.minimum(up, down).clamp(min=0)


MELS = {n: mel_filters(bands, n) for n, bands in ((2048, 80), (1024, 64), (512, 40), (256, 20))}
WINDOWS = {n: torch.hann_window(n) for n in MELS}


def spectral_loss(a_BT: torch.Tensor, b_BT: torch.Tensor) -> torch.Tensor:
    """Mean L1 distance of log-mel bands and log magnitudes over four resolutions."""
    total = a_BT.new_zeros(())
    for n in MELS:
        spectra = [
            torch.stft(x, n, n // 4, window=WINDOWS[n], return_complex=True).abs().clamp(min=1e-5) for x in (a_BT, b_BT)
        ]
        logs = [s.clamp(min=1e-3).log() for s in spectra]
        mels = [(s.transpose(1, 2) @ MELS[n]).clamp(min=1e-3).log() for s in spectra]
        total = total + F.l1_loss(*mels) + 0.3 * F.l1_loss(*logs) + 0.5 * F.l1_loss(*spectra)
    return total


def quantize(codec: nn.Module, books: nn.ParameterList, e_BDT: torch.Tensor, used: list[torch.Tensor]) -> tuple:
    """Residual quantisation with straight-through gradients; a random number of stages per call."""
    stages = len(books) if torch.rand(()) < 0.5 else int(torch.randint(1, len(books) + 1, ()))
    residual, out, loss = e_BDT.transpose(1, 2), 0.0, 0.0
    for stage in range(stages):
        layer, book = codec.quantizer.quantizers[stage], books[stage]
        z = layer.project_in(residual)
        flat = z.reshape(-1, z.shape[-1])
        codes = torch.cdist(flat.detach(), book.detach()).argmin(1)
        chosen = book[codes].view_as(z)
        used[stage] *= 0.99
        used[stage] += 0.01 * torch.bincount(codes, minlength=len(book)).float()
        loss = loss + F.mse_loss(chosen, z.detach()) + 0.25 * F.mse_loss(z, chosen.detach())
        quantized = layer.project_out(z + (chosen - z).detach())
        out, residual = out + quantized, residual - quantized
        dead = used[stage] < 0.002
        if dead.any():  # a code nobody uses takes the place of a vector just seen
            with torch.no_grad():
                book[dead] = flat[torch.randint(len(flat), (int(dead.sum()),))]
            used[stage][dead] = 0.1
    return out.transpose(1, 2), loss


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("clips", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--batch", type=int, default=8)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in arguments.clips.read_text(encoding="utf-8").splitlines()]
    clips = [read_audio(AudioRef(arguments.clips.parent / row["audio"]), RATE) for row in rows]
    waves = [torch.from_numpy(clip.samples / max(0.1, np.abs(clip.samples).max()) * 0.7) for clip in clips]
    codec = codec_from_config(codebook_size=256, width=3)
    draw_codebooks(codec, clips[::7])
    codec.train().semantic_model.eval().requires_grad_(False)
    books = nn.ParameterList([q.codebook.embed.clone() for q in codec.quantizer.quantizers])
    used = [torch.ones(len(book)) for book in books]
    parameters = [p for p in codec.parameters() if p.requires_grad] + list(books)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.8, 0.98), weight_decay=0.0)
    started, step, smooth = time.monotonic(), 0, None
    while (elapsed := time.monotonic() - started) < 60 * arguments.minutes:
        rate = 1e-3 * min(1, (step + 1) / 200) * (1 - 0.95 * elapsed / (60 * arguments.minutes))
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = [waves[i] for i in torch.randint(len(waves), (arguments.batch,))]
        starts = [int(torch.randint(max(1, len(w) - SEGMENT), ())) for w in chosen]
        parts = [
            F.pad(w[s : s + SEGMENT], (0, max(0, SEGMENT - len(w[s : s + SEGMENT]))))
            for w, s in zip(chosen, starts, strict=True)
        ]
        x_B1T = torch.stack(parts)[:, None]
        semantic = codec.encoder_semantic(codec._extract_semantic_features(x_B1T).detach().transpose(1, 2))
        acoustic = codec.acoustic_encoder(x_B1T)
        if acoustic.shape[2] != semantic.shape[2]:
            acoustic = codec.acoustic_encoder(F.pad(x_B1T, (codec.pad, codec.pad)))
        e_BDT = codec.fc(torch.cat([acoustic, semantic], 1).transpose(1, 2)).transpose(1, 2)
        q_BDT, vq_loss = quantize(codec, books, e_BDT, used)
        y_B1T = codec.acoustic_decoder(codec.fc2(q_BDT.transpose(1, 2)).transpose(1, 2))
        width = min(y_B1T.shape[2], SEGMENT)
        reconstruction = spectral_loss(y_B1T[:, 0, :width], x_B1T[:, 0, :width])
        loss = reconstruction + vq_loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        step += 1
        smooth = (
            float(reconstruction.detach()) if smooth is None else 0.99 * smooth + 0.01 * float(reconstruction.detach())
        )
        if step % 100 == 0:
            alive = [int((u > 0.01).sum()) for u in used]
            print(f"step {step}  {elapsed / 60:.1f} min  spectral {smooth:.4f}  codes in use {alive}", flush=True)
        if step % 500 == 0:
            save(codec, books, arguments.output)
    save(codec, books, arguments.output)


def save(codec: nn.Module, books: nn.ParameterList, output: Path) -> None:
    """Write the codec with the trained codebooks, in float16."""
    with torch.no_grad():
        for layer, book in zip(codec.quantizer.quantizers, books, strict=True):
            layer.codebook.embed.copy_(book)
    half = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in codec.state_dict().items()
    }
    codec.save_pretrained(output, state_dict=half)


if __name__ == "__main__":
    main()
