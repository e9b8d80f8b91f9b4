"""The one-file model as files: its source, held against the model, and the weights beside it."""

from __future__ import annotations

import copy
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from archzoo.decoder import Decoder
from archzoo.export.source import source_of

#: Relative RMS in float64 from which a file computes something else: rounding stays far below.
OTHERWISE = 1e-9


def module_of(source: str, path: str = "model.py") -> types.ModuleType:
    """A file's source as a module."""
    module = types.ModuleType("exported")
    module.__file__ = path
    exec(compile(source, path, "exec"), module.__dict__)
    return module


def weights_of(model: Decoder) -> dict[str, Tensor]:
    """A model's weights under their names, on the CPU; tied ones are one tensor."""
    return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}


def check_source(model: Decoder, source: str, build: str = "build()") -> None:
    """Refuse a file that does not compute what the model does: a text, and token by token.

    Args:
        model: The model.
        source: Of the file.
        build: The expression there that builds it.

    Raises:
        ValueError: It computes something else, or cannot run.
    """
    ours: Any = copy.deepcopy(model).cpu().double().eval()
    try:
        theirs = eval(build, module_of(source).__dict__)
        theirs.load_state_dict(weights_of(ours), assign=True)
        theirs.eval()
        time = min(24, model.context_length or 24)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(model.vocab_size, (2, time), generator=generator)
        documents = torch.zeros_like(tokens)
        documents[1, : time // 3] = -1
        seen = documents >= 0
        positions = ours.embedding.prompt_positions(tokens, documents)
        with torch.no_grad():
            wanted = ours(tokens, documents=documents, positions=positions).logits[seen]
            whole = theirs(tokens, documents=documents).logits[seen]
            state, steps = theirs.init_state(2), []
            for t in range(time):
                given = None if positions is None else positions[:, t : t + 1]
                here = documents[:, t : t + 1]
                step = theirs(tokens[:, t : t + 1], state, documents=here, positions=given)
                steps.append(step.logits)
                state = step.state
    except ValueError:
        raise
    except Exception as error:
        line = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"the exported file does not run ({type(error).__name__}: {line}): a part uses "
            "something of archzoo that its plain form lacks"
        ) from error
    for form, found in (("a text at once", whole), ("token by token", torch.cat(steps, 1)[seen])):
        off = ((found - wanted).square().mean() / wanted.square().mean()).sqrt().item()
        if not off <= OTHERWISE:
            raise ValueError(
                f"the exported file computes other logits than the model, {form} (relative RMS "
                f"{off:.1e}): a part of it has no plain form that is the same"
            )


def write_file(path: Path, model: Decoder, name: str, *, weights: bool = True) -> int:
    """Write a model as one file, and its weights beside it; how many lines the file has.

    Args:
        path: Of the file, such as model.py; the weights go into model.pt.
        model: To write.
        name: For the first line of the file.
        weights: Write them; without them the file's model starts anew.

    Raises:
        FileExistsError: There is something at one of the paths.
        ValueError: A part that cannot be exported.
    """
    for target in (path, path.with_suffix(".pt")):
        if target.exists():
            raise FileExistsError(f"{target} exists: name a file that does not, or move it away")
    source = source_of(model, name)
    check_source(model, source)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8")
    if weights:
        torch.save(weights_of(model), path.with_suffix(".pt"))
    return len(source.splitlines())
