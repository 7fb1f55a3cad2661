"""A small GPT that is trained here on Jane Austen's novels: `python tools/novels.py`.

Five novels are learned from; the sixth, *Persuasion*, judges by its perplexity. The tokens are 512 byte pairs of the
five. What was trained is kept in the user's cache and found again as long as the recipe is the same.
"""

from __future__ import annotations

import argparse
import inspect
import struct
import sys
import time
import zlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tools.fetch_data import DataMissing, ensure
from tools.recipes import kept

VOCABULARY = 512
CONTEXT = 128  # tokens
WIDTH, BLOCKS, HEADS = 192, 4, 3
BATCH, STEPS, RATE, DECAY, DROPOUT = 16, 1500, 2e-3, 0.1, 0.05
UNSEEN = "persuasion"
TITLES = ("emma", "mansfieldpark", "northangerabbey", UNSEEN, "prideprejudice", "sensesensibility")  # as in the package


class NovelsGPT(nn.Module):
    """GPT-2 of 1.9 M parameters: four blocks of width 192 over 128 tokens; the head is tied to the embedding.

    Its `Conv1D` layers, which are linear layers under another name, are linear layers: other tools know no others.
    """

    def __init__(self) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.gpt = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=WIDTH, n_layer=BLOCKS, n_head=HEADS,
                resid_pdrop=DROPOUT, embd_pdrop=DROPOUT, attn_pdrop=0.0, use_cache=False,
                bos_token_id=0, eos_token_id=0,
            )
        )  # fmt: skip
        for name, layer in list(self.gpt.named_modules()):
            if isinstance(layer, Conv1D):
                linear = nn.Linear(*layer.weight.shape)
                with torch.no_grad():
                    linear.weight.copy_(layer.weight.T)
                    linear.bias.copy_(layer.bias)
                self.gpt.set_submodule(name, linear)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Tokens [batch × tokens] to scores of the next ones [batch × tokens × vocabulary]."""
        return self.gpt(input_ids).logits


def novels() -> dict[str, str]:
    """The text of each novel, by its title.

    Raises:
        DataMissing: they cannot be fetched.
    """
    folder = ensure("novels") / "usr" / "lib" / "R" / "site-library" / "janeaustenr" / "data"
    rest, texts = (folder / "Rdata.rdb").read_bytes(), []
    while rest:  # four bytes of length, then a compressed vector of lines
        inflate = zlib.decompressobj()
        texts.append("\n".join(_lines(inflate.decompress(rest[4:]))))
        rest = inflate.unused_data
    return dict(zip(TITLES, texts, strict=True))


def _lines(data: bytes) -> list[str]:
    """The elements of a character vector in R's serialization, version 3, XDR."""
    (encoding,) = struct.unpack_from(">i", data, 14)
    place = 18 + encoding
    kind, count = struct.unpack_from(">ii", data, place)
    if data[:2] != b"X\n" or kind & 0xFF != 16:
        raise DataMissing("the package of novels holds no lines of text where they were; run `make data` again")
    place, lines = place + 8, []
    for _ in range(count):
        (length,) = struct.unpack_from(">i", data, place + 4)
        lines.append(data[place + 8 : place + 8 + length].decode())
        place += 8 + length
    return lines


def windows() -> tuple[Tensor, Tensor]:
    """Tokens [windows × 129] to learn from, and those of the unseen novel: each window begins with the last one's end.

    Raises:
        DataMissing: the novels cannot be fetched.
    """
    from tokenizers import ByteLevelBPETokenizer

    texts = novels()
    unseen = texts.pop(UNSEEN)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts.values(), VOCABULARY, show_progress=False)

    def cut(parts: Sequence[str]) -> Tensor:
        ids = torch.tensor([token for part in parts for token in tokenizer.encode(part).ids])
        return ids.unfold(0, CONTEXT + 1, CONTEXT).contiguous()

    return cut(list(texts.values())), cut([unseen])


def fit(model: nn.Module, data: Tensor, seed: int, say: Callable[[str], None]) -> nn.Module:
    """Trains a model; in bfloat16 where the processor multiplies that faster."""
    chance = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=DECAY, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS, pct_start=0.05)
    model.train()
    low, start, losses = torch.cpu._is_amx_tile_supported(), time.monotonic(), []
    for step in range(STEPS):
        batch = data[torch.randint(len(data), (BATCH,), generator=chance)]
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            scores = model(batch[:, :-1])
        loss = nn.functional.cross_entropy(scores.float().flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            mean = sum(losses[-100:]) / 100
            say(f"step {step + 1} of {STEPS}: loss {mean:.3f}, {time.monotonic() - start:.0f} s")
    return model.eval()


@torch.no_grad()
def losses(model: Callable[[Tensor], Tensor], data: Tensor) -> Tensor:
    """The mean cross-entropy of each window's last 128 tokens [windows], each given those before it, in nats."""
    parts = [
        nn.functional.cross_entropy(model(part[:, :-1]).float().transpose(1, 2), part[:, 1:], reduction="none").mean(1)
        for part in data.split(BATCH)
    ]
    return torch.cat(parts)


def perplexity(model: Callable[[Tensor], Tensor], data: Tensor) -> float:
    """Of the windows' last 128 tokens, each given those before it in its window."""
    return float(losses(model, data).mean().exp())


def trained_on_novels(seed: int = 0, say: Callable[[str], None] = lambda line: None) -> nn.Module:
    """The trained GPT, from the user's cache or made now and kept there.

    Raises:
        DataMissing: the novels cannot be fetched.
    """
    sources = [inspect.getsource(part) for part in (NovelsGPT, fit, windows)]
    facts = [VOCABULARY, CONTEXT, WIDTH, BLOCKS, HEADS, BATCH, STEPS, RATE, DECAY, DROPOUT, UNSEEN, *sources]
    torch.manual_seed(seed)
    model = NovelsGPT()
    return kept(f"novels-gpt-*-{seed}", facts, model, lambda: fit(model, windows()[0], seed, say))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        model = trained_on_novels(options.seed, lambda line: print(line, flush=True))
        count = sum(parameter.numel() for parameter in model.parameters())
        print(f"{count:,} parameters, perplexity {perplexity(model, windows()[1]):.3f} on {UNSEEN}")
    except DataMissing as problem:
        print(f"novels: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
