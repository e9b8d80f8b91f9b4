"""`archzoo new`: a directory to start from."""

from __future__ import annotations

import re
from pathlib import Path

from archzoo import shipped

PARTS = '''"""Parts of your own, known by name where --import my_parts is given."""

import torch
from torch import nn
from torch.nn import functional as F

import archzoo


class FadingMemory(archzoo.Mixer):
    """A running mean of the past, whose rate each token chooses.

        f_n = sigmoid(x_n Wf);  m_n = f_n m_(n-1) + (1 - f_n) x_n Wv;  y_n = (silu(x_n Wg) m_n) Wo

    `init_state` and `step` are all that a mixer has to have. The base class applies `step` to one
    token after the other; `chunkwise` and `parallel` may do the same faster.

    Args:
        dim: Width of x.
        heads: Unused: every channel is alone.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.fade, self.value, self.gate = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.output = nn.Linear(dim, dim, bias=False)
        self.output.residual_projection = True  # the decoder starts these smaller

    def init_state(self, batch_size, *, capacity=None, device=None, dtype=None):
        # A sum over time is kept in float32 at least, whatever the model's dtype.
        dtype = torch.promote_types(dtype or self.output.weight.dtype, torch.float32)
        shape = (batch_size, 1, self.output.in_features)
        return {"mean": torch.zeros(shape, device=device, dtype=dtype)}

    def step(self, x, state, context):
        fade = torch.sigmoid(self.fade(x)).to(state["mean"].dtype)
        mean = fade * state["mean"] + (1 - fade) * self.value(x)
        return self.output(F.silu(self.gate(x)) * mean.to(x.dtype)), {"mean": mean}
'''

README = """# {title}

`{name}.yaml` says what is trained, on what and how; every line says why. Change it, then:

```bash
archzoo fit {name}.yaml
archzoo test --ckpt_path runs/{name}/last.ckpt
archzoo curves runs/{name}
```

`my_parts.py` holds a mixer of your own. The first line checks it against every rule of the
interface, the second trains it instead of the preset's, with the same number of parameters:

```bash
archzoo check my_parts.FadingMemory --import my_parts
archzoo fit {name}.yaml --import my_parts --name mine {swap}
archzoo curves runs/{name} runs/mine
```

`archzoo list` shows the models of the zoo, `archzoo --help` all commands.
"""


def _named(comment: str, source: Path) -> str:
    """A comment whose commands read the copy, and all others that are shipped by their names."""

    def name(found: re.Match[str]) -> str:
        command, short = found.groups()
        if source == shipped.root() / "configs" / f"{short}.yaml":
            return f"{command} {source.name}"
        return f"{command.removesuffix(' --config')} {short}"

    return re.sub(r"(archzoo \w+(?: --config)?) configs/([\w/]+)\.yaml", name, comment)


def _copies(source: Path, found: dict[str, tuple[Path, str]]) -> None:
    """A configuration and those that it reads, such as its base, by their names side by side."""
    try:
        content = source.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8, as a configuration is: {error}") from None
    name = source.stem + ".yaml"
    if name in found:
        if found[name][0] != source.resolve():
            raise ValueError(f"{found[name][0]} and {source} have one name: rename one")
        return
    found[name] = source.resolve(), ""
    # Its comments were written for a checkout, where `train.py` and `configs/` are.
    lines = content.replace("python train.py ", "archzoo ").splitlines(keepends=True)
    for number, line in enumerate(lines):
        if line.startswith("#"):
            lines[number] = _named(line, source).replace("configs/", "")
            continue
        settings, dash, comment = line.partition(" #")
        for file in set(re.findall(r"[\w./-]+\.yaml", settings)):
            if (source.parent / file).is_file():
                _copies(source.parent / file, found)
                settings = settings.replace(file, Path(file).name)
        lines[number] = settings + dash + comment.replace("configs/", "")
    found[name] = source.resolve(), "".join(lines)


SWAP = "--model.mixer FadingMemory --model.match parameters"


def new_command(directory: str, /, config: str = "addition") -> None:
    """Make a directory to start from: a configuration, a mixer of your own, and what to run.

    Args:
        directory: Made; one that exists is refused.
        config: The configuration that is copied: the name of one that comes with archzoo, such as
            text, or a file.

    Raises:
        FileExistsError: The directory exists.
        FileNotFoundError: There is no such configuration.
    """
    place, source = Path(directory), shipped.configuration(config)
    found: dict[str, tuple[Path, str]] = {}
    _copies(source, found)
    if place.exists():
        raise FileExistsError(f"{place} exists: give the name of a new directory")
    name = source.stem
    try:
        place.mkdir(parents=True)
    except OSError as error:
        raise OSError(f"{directory} cannot be made: {error}; give another place") from None
    for file, (_, content) in found.items():
        (place / file).write_text(content, encoding="utf-8")
    (place / "my_parts.py").write_text(PARTS, encoding="utf-8")
    readme = README.format(title=place.resolve().name, name=name, swap=SWAP)
    (place / "README.md").write_text(readme, encoding="utf-8")
    print(f"{directory} holds {', '.join(found)}, my_parts.py, README.md; begin with")
    print(f"  cd {directory}")
    print(f"  archzoo fit {name}.yaml")
