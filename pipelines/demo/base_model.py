"""A tiny LLaMA in Meta's layout, to stand for the weights that a user has.

About 9M parameters: 4 layers × 128, untied 32,000 pieces. It is trained for a minute on English prose only, so that it
knows a little English and no Chinese, as LLaMA hardly did. The same versions give the same weights:
`python -m pipelines.demo.base_model --english FOLDER --tokenizer FILE --out FOLDER`.
"""

import argparse
import hashlib
import logging
import time
from pathlib import Path

from zhllama import storage
from zhllama.stage.program import guarded
from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder
from zhllama.weights.meta_format import MetaParams, shard_name

log = logging.getLogger("base")

PARAMS = MetaParams(dim=128, n_layers=4, n_heads=4, norm_eps=1e-6)
SHARDS = 2
BLOCK, BATCH, STEPS, RATE = 128, 16, 120, 4e-3
SEED = 1
ROOM = 40 * 2**20
"""Bytes: twice what the files take. torch.save says of a full disk only that it failed."""


def make_base(english: Path, tokenizer: Path, out: Path) -> None:
    """Trains the model and writes consolidated.00.pth and 01.pth, params.json, tokenizer.model, sha256sums.txt."""
    storage.check_room(out, ROOM)
    encoder = SentencePieceEncoder(tokenizer.read_bytes(), str(tokenizer))
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from zhllama.weights.meta_format import split_to_shards

    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=encoder.size,
        hidden_size=PARAMS.dim,
        intermediate_size=PARAMS.width,
        num_hidden_layers=PARAMS.n_layers,
        num_attention_heads=PARAMS.n_heads,
        max_position_embeddings=2048,
        rms_norm_eps=PARAMS.norm_eps,
        tie_word_embeddings=False,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    needed = STEPS * BATCH * (BLOCK + 1)
    ids: list[int] = []
    for line in (english / "english.txt").read_text().splitlines():
        ids += [encoder.bos, *encoder.encode(line), encoder.eos]
        if len(ids) >= needed:
            break
    repeats = -(-needed // len(ids))
    tokens = torch.tensor((ids * repeats)[:needed]).view(STEPS, BATCH, BLOCK + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
    started = time.monotonic()
    for step, batch in enumerate(tokens, start=1):
        hidden = model.model(input_ids=batch[:, :-1], use_cache=False).last_hidden_state
        loss = _loss_with_gradient(hidden.flatten(0, 1), model.lm_head.weight, batch[:, 1:].reshape(-1))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step in (1, STEPS):
            log.info("step %d of %d, loss %.3f, %.0f s", step, STEPS, loss, time.monotonic() - started)
    out.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.half() for name, tensor in model.state_dict().items()}
    for number, shard in enumerate(split_to_shards(state, PARAMS.n_heads, SHARDS)):
        # by name, which stands in the file: to a buffer, the same tensors are other bytes
        torch.save(shard, out / shard_name(number))
    (out / "params.json").write_bytes(PARAMS.to_json())
    (out / "tokenizer.model").write_bytes(encoder.model)
    files = [path for path in sorted(out.iterdir()) if path.suffix != ".txt"]
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (out / "sha256sums.txt").write_text("".join(sums))


def _loss_with_gradient(hidden, head, targets):  # type: ignore[no-untyped-def]
    """Mean cross-entropy of `hidden` [tokens, dim] through `head` [pieces, dim]; backward is run here, by chunks. The
    library's loss rounds otherwise, and the base would be another one."""
    import torch.nn.functional as F

    total, leaf = 0.0, hidden.detach().requires_grad_()
    for rows in range(0, len(targets), 256):
        logits = leaf[rows : rows + 256] @ head.T
        loss = F.cross_entropy(logits, targets[rows : rows + 256], reduction="sum") / len(targets)
        loss.backward()
        total += loss.item()
    hidden.backward(leaf.grad)
    return total


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("english", "tokenizer", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    given = parser.parse_args()
    guarded(lambda: make_base(**vars(given)))
