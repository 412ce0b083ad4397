"""A trained speaker encoder and real speech, read from installed packages; none are downloaded or committed.

* ``resemblyzer``: an LSTM that maps 1.6 s of speech to an embedding of the speaker; weights of the package
  ``resemblyzer`` (Apache-2.0).
* ``voices``: studio speech of the voices in Debian's ``asterisk-core-sounds-{en,es,it}-wav``, as mel spectrograms.
"""

import math
import wave
from pathlib import Path

import torch
from torch import Tensor, nn

from examples.zoo import MissingPackageError, package_file

SOUNDS_DIRECTORY = Path("/usr/share/asterisk/sounds")
SOUNDS_INSTALL = "apt-get install asterisk-core-sounds-{en,es,it}-wav (Debian, Ubuntu)"
_RESEMBLYZER_INSTALL = "pip install --no-deps resemblyzer==0.1.4"

# What the network was trained on.
_RATE = 16000
_WINDOW = 400
_HOP = 160
_MELS = 40
FRAMES = 160
_LOUDNESS_DBFS = -30.0


class SpeakerEncoder(nn.Module):
    """Three layers of LSTM; attribute names are Resemblyzer's, so that its weights file loads as it is."""

    def __init__(self, mels: int = _MELS, width: int = 256) -> None:
        super().__init__()
        self.lstm = nn.LSTM(mels, width, num_layers=3, batch_first=True)
        self.linear = nn.Linear(width, width)
        self.relu = nn.ReLU()

    def forward(self, mels: Tensor) -> Tensor:
        """Embeddings of length 1, (segments, width), of spectrograms, (segments, frames, mels)."""
        _, state = self.lstm(mels)
        embedding: Tensor = self.relu(self.linear(state[0][-1]))
        return nn.functional.normalize(embedding, dim=1)


def resemblyzer() -> nn.Module:
    """Resemblyzer's speaker encoder, in eval mode.

    Raises:
        MissingPackageError: the package is not installed.
    """
    path = package_file("resemblyzer", "pretrained.pt", _RESEMBLYZER_INSTALL)
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)["model_state"]
    model = SpeakerEncoder()
    model.load_state_dict({key: value for key, value in state.items() if not key.startswith("similarity")})
    return model.eval()


def _read_wave(path: Path) -> tuple[Tensor, int]:
    with wave.open(str(path)) as file:
        if file.getnchannels() != 1 or file.getsampwidth() != 2:
            raise ValueError(f"{path}: expected 16-bit mono")
        samples = torch.frombuffer(bytearray(file.readframes(file.getnframes())), dtype=torch.int16)
        return samples.double() / 32768.0, file.getframerate()


def _resample(samples: Tensor, rate: int) -> Tensor:
    # Through the spectrum, which is exact for a signal without content above the old rate's half.
    count = samples.numel() * _RATE // rate
    resampled: Tensor = torch.fft.irfft(torch.fft.rfft(samples), n=count)
    return resampled * (count / samples.numel())


def _mel_filters() -> Tensor:
    """Triangles on the mel scale of Slaney, each of area 1: (mels, frequencies)."""
    step, knee = 200.0 / 3.0, 1000.0
    slope = math.log(6.4) / 27.0
    top = knee / step + math.log(_RATE / 2 / knee) / slope
    mels = torch.linspace(0.0, top, _MELS + 2, dtype=torch.float64)
    edges = torch.where(mels < knee / step, mels * step, knee * torch.exp(slope * (mels - knee / step)))
    frequencies = torch.linspace(0.0, _RATE / 2, _WINDOW // 2 + 1, dtype=torch.float64)
    low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising, falling = (frequencies - low) / (middle - low), (high - frequencies) / (high - middle)
    return torch.minimum(rising, falling).clamp(min=0.0) * (2.0 / (high - low))


def spectrogram(samples: Tensor, rate: int) -> Tensor:
    """Mel spectrogram of a clip as the network expects it: raised to a loudness, powers, not logarithms.

    Args:
        samples: in -1..1.
        rate: samples per second.

    Returns:
        (frames, mels), 100 frames per second.
    """
    samples = _resample(samples, rate)
    loudness = 10.0 * torch.log10(samples.square().mean())
    samples = samples * 10.0 ** (max(0.0, _LOUDNESS_DBFS - loudness.item()) / 20.0)
    window = torch.hann_window(_WINDOW, dtype=torch.float64)
    spectrum = torch.stft(samples, _WINDOW, _HOP, window=window, center=True, pad_mode="constant", return_complex=True)
    return (_mel_filters() @ spectrum.abs().square()).T.float()


def voices(directory: Path = SOUNDS_DIRECTORY, clips: int = 200) -> dict[str, Tensor]:
    """The first 1.6 s of the clips of every voice that are at least as long, in the order of their names.

    Args:
        directory: where Debian's packages put a directory for each voice.
        clips: at most so many of each voice.

    Returns:
        For each voice the spectrograms, (clips, frames, mels).

    Raises:
        MissingPackageError: fewer than two voices are there.
    """
    found = {}
    for voice in sorted(directory.glob("??_??_[fm]_*")) if directory.is_dir() else []:
        segments: list[Tensor] = []
        for path in sorted(voice.glob("*.wav")):
            if len(segments) == clips:
                break
            samples, rate = _read_wave(path)
            if samples.numel() >= FRAMES * _HOP * rate // _RATE:
                segments.append(spectrogram(samples, rate)[:FRAMES])
        if segments:
            found[voice.name] = torch.stack(segments)
    if len(found) < 2:
        raise MissingPackageError(f"{directory} has no two voices; run: {SOUNDS_INSTALL}")
    return found
