"""A name that is not known, answered by the known ones nearest to it."""

from __future__ import annotations

import difflib

SHOWN = 12  # names that an error message lists at most

# What settings are called elsewhere, and here.
ELSEWHERE = {
    **dict.fromkeys(("lr", "max_lr", "peak_lr"), "learning_rate"),
    **dict.fromkeys(("min_lr", "final_lr"), "final_learning_rate"),
    **dict.fromkeys(("warmup", "warmup_iters", "num_warmup_steps"), "warmup_steps"),
    **dict.fromkeys(("wd", "decay"), "weight_decay"),
    **dict.fromkeys(("n_layer", "n_layers", "num_layers", "num_hidden_layers", "layers"), "depth"),
    **dict.fromkeys(("n_head", "n_heads", "num_heads", "num_attention_heads"), "heads"),
    **dict.fromkeys(("d_model", "n_embd", "hidden_size", "embed_dim"), "dim"),
    **dict.fromkeys(("d_ff", "ffn_dim", "intermediate_size", "hidden_dim"), "width"),
    **dict.fromkeys(("block_size", "seq_len", "max_seq_len", "n_ctx"), "context_length"),
    **dict.fromkeys(("bs", "micro_batch_size"), "batch_size"),
    **dict.fromkeys(("grad_clip", "clip", "max_grad_norm"), "gradient_clip_val"),
    **dict.fromkeys(("steps", "max_iters", "num_steps", "iters"), "max_steps"),
    **dict.fromkeys(("epochs", "num_epochs"), "max_epochs"),
    **dict.fromkeys(("grad_accum", "gradient_accumulation_steps"), "accumulate_grad_batches"),
    **dict.fromkeys(("seed",), "seed_everything"),
}


def nearest(name: str, known: list[str]) -> str:
    """'nearest: a, b or c', the known names most like a given one, for error messages.

    Where none is like it: 'there are a, b, c', or the first of them if they are many.
    """
    above, dot, last = name.rpartition(".")
    meant = above + dot + ELSEWHERE.get(last.lower().lstrip("-"), "")
    close = [entry for entry in known if entry.lstrip("-") == meant]
    close = close or difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    if not close:
        lowered = {entry.lower(): entry for entry in known}
        close = [lowered[m] for m in difflib.get_close_matches(name.lower(), lowered, n=3)]
    if close:
        return "nearest: " + " or ".join(
            [", ".join(close[:-1]), close[-1]] if len(close) > 1 else close
        )
    names = sorted(known)
    if not names:
        return "there are none"
    if len(names) <= SHOWN:
        return f"there {'are' if len(names) > 1 else 'is'} {', '.join(names)}"
    return f"there are {len(names)}: {', '.join(names[:3])} and others"
