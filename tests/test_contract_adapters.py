"""Each rule of adapters broken once on purpose, and all rules on every preset's every target."""

import pytest
import torch
from families import MICRO, micro
from torch import nn

import archzoo
from archzoo.adapters import Adapter
from archzoo.adapters.attach import adapter_modules, list_targets
from archzoo.block import FORMS
from archzoo.contract import run_check
from archzoo.contract.measure import relative_error
from archzoo.parts import list_parts


class Scaled(archzoo.IA3):
    """A class of one's own that keeps all rules."""


def test_a_class_of_ones_own_keeps_the_rules():
    for rule in ("frozen base", "weight decay", "merged", "copies", "collapsed", "named blocks"):
        finding = run_check(Scaled, rule)
        assert finding.passed, finding.detail


class MovesAtStart(Scaled):
    """It takes from the base what it adds, as PiSSA's authors do."""

    def start(self, weight):
        super().start(weight)
        weight.mul_(0.5)


class MovesInTraining(Scaled):
    def start(self, weight):
        super().start(weight)
        self.seen = [weight]

    def output(self, x, y):
        if self.training:
            self.seen[0].data.mul_(0.999)
        return super().output(x, y)


class Decays(Scaled):
    """Numbers whose neutral value is 1, in a matrix, which decay shrinks."""

    def __init__(self, target, *, targets=None, layers=None):
        super().__init__(target, targets=targets, layers=layers)
        self.decays = {"scale": True}
        self.scale = nn.Parameter(self.scale.detach()[None])

    def output(self, x, y):
        return None if self.of_input else y * (self.scale[0] - 1).unsqueeze(-2)

    def input(self, x):
        return x * (self.scale[0] - 1) if self.of_input else None

    def delta(self, weight):
        scale = self.scale[0] - 1
        return weight * (scale[..., None, :] if self.of_input else scale[..., None])


class DecayingPrompt(archzoo.PromptTuning):
    def __init__(self, target, *, targets=None, layers=None, length: int = 3):
        super().__init__(target, targets=targets, layers=layers, length=length)
        self.decays = True


class AloneForOneToken(Scaled):
    """Of a single token it does something else, which only the recurrent form shows."""

    def output(self, x, y):
        change = super().output(x, y)
        return change if change is None or x.dim() < 3 or x.shape[-2] > 1 else change * 1.001


class WithoutBias(Scaled):
    """It scales y, and merged it leaves the bias as it is."""

    bias_delta = Adapter.bias_delta


class InputUnsaid(Scaled):
    """It scales the input, and says nothing of it when merged."""

    def delta(self, weight):
        return super().delta(weight) * (0 if self.of_input else 1)


class ReadsTheOriginal(Scaled):
    """What all layers share is reached through a function, which no copy copies."""

    @classmethod
    def connect(cls, adapters):
        for adapter in adapters:
            adapter.owner = lambda: adapters[0]

    def delta(self, weight):
        return super().delta(weight) * self.owner().scale.mean()

    def output(self, x, y):
        change = super().output(x, y)
        return None if change is None else change * self.owner().scale.mean()

    def bias_delta(self, bias):
        change = super().bias_delta(bias)
        return None if change is None else change * self.owner().scale.mean()


class HeldTwice(archzoo.LoRA):
    """What all layers share is registered in each."""

    @classmethod
    def connect(cls, adapters):
        shared = nn.Linear(2, 2)
        for adapter in adapters:
            adapter.shared = shared


class CollapsesToElse(archzoo.LoRA):
    def collapse(self):
        with torch.no_grad():
            self.second.mul_(1.001)
        return {}


class EveryRow(archzoo.LoRA):
    """Named a block, it changes all rows of the matrix."""

    def output(self, x, y):
        with torch.no_grad():
            x.mul_(1.01)
        return super().output(x, y)


@pytest.mark.parametrize(
    ("cls", "rule", "says"),
    [
        (MovesAtStart, "frozen base", "switched off, it does not compute what the base computes"),
        (MovesInTraining, "frozen base", "steps of training change"),
        (Decays, "weight decay", "weight decay alone of scale"),
        (DecayingPrompt, "weight decay", "decays, and a prompt or a state is not neutral at 0"),
        (AloneForOneToken, "merged", "merged against beside the weights, recurrent"),
        (WithoutBias, "merged", "FilteredAttention and experts: merged against beside"),
        (InputUnsaid, "merged", "merged against beside"),
        (ReadsTheOriginal, "copies", "a copy still reads parameters of what it was copied from"),
        (HeldTwice, "copies", "its state holds a tensor twice"),
        (CollapsesToElse, "collapsed", "collapsed against before"),
        (EveryRow, "named blocks", "block by block against all"),
    ],
)
def test_each_rule_can_be_broken(cls, rule, says):
    finding = run_check(cls, rule)
    assert not finding.passed
    assert says in finding.detail


# ---------------------------------------------------------------------------- every preset


def takes(name, place):
    """Whether an adapter can change a place; else it is refused by name, in a line."""
    try:
        archzoo.adapt(micro(*place[0]), {"class_path": name, "init_args": {"targets": [place[1]]}})
    except ValueError as error:
        return not (name in str(error) and "\n" not in str(error))
    return True


@pytest.mark.parametrize("name", list_parts("adapter"))
@pytest.mark.parametrize("preset", MICRO)
def test_every_kind_of_target_of_every_preset(name, preset):
    """Zero change, gradients to all of it and nothing else, merged in all forms; or refused."""
    cls = list_parts("adapter")[name]
    net = micro(preset).double()
    places = list_targets(net)
    kinds = {(p.target.kind, p.target.part, p.name): p.target.path for p in places}
    small = {"rank": 2} if "rank" in cls.__signature__.parameters else {}
    taken = [path for path in kinds.values() if takes(name, ((preset,), path))]
    assert {p.target.kind for p in places if p.target.path in taken} == {
        kind for kind in cls.kinds if kind in {p.target.kind for p in places}
    }
    tokens = torch.randint(64, (2, 7))
    base = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with torch.no_grad():
        before = net.eval()(tokens).logits
    recipe = {"class_path": name, "init_args": {"targets": taken, **small}}
    archzoo.adapt(net, recipe)
    if cls.identity_at_start:
        assert relative_error(net(tokens).logits, before) < 1e-12
    with torch.no_grad():
        for _, adapter in adapter_modules(net):
            for parameter in adapter.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    net.train()(tokens).logits.square().mean().backward()
    adapters = {id(p) for _, adapter in adapter_modules(net) for p in adapter.parameters()}
    for parameter_name, parameter in net.named_parameters():
        assert parameter.requires_grad == (id(parameter) in adapters)
        live = parameter.grad is not None and bool(parameter.grad.abs().max())
        assert live == parameter.requires_grad, parameter_name
    learn = [parameter for parameter in net.parameters() if parameter.requires_grad]
    torch.optim.AdamW(learn, lr=0.01).step()
    for key, tensor in base.items():
        assert torch.equal(net.state_dict()[key], tensor)
    net.eval()
    with torch.no_grad():
        beside = {form: net(tokens, form=form).logits for form in FORMS}
        for form, logits in beside.items():
            assert relative_error(logits, beside["recurrent"]) < 1e-12, form
        if cls.mergeable:
            archzoo.merge_adapter(net)
            for form, logits in beside.items():
                assert relative_error(net(tokens, form=form).logits, logits) < 1e-12, form
