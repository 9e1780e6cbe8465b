"""The public face: README's lines, every method on nets of one's own."""

import re
import threading
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import prunestudy as ps
from prunestudy import measure

README = Path(__file__).parents[1] / "README.md"
METHODS = {
    "SparseGates": {"target": 0.8},
    "Force": {"target": 0.5, "of": "rank"},
    "GDP": {"target": 0.4, "of": "macs"},
    "MagnitudeAttention": {"target": 0.8},
    "ComponentAware": {"target": 0.4},
    "Magnitude": {"target": 0.8},
    "GradualMagnitude": {"target": 0.8},
    "L1": {"target": 0.8},
    "Snip": {"target": 0.8},
    "Dpf": {"target": 0.8},
    "Random": {"target": 0.4, "of": "macs"},
    "GroupL2": {"target": 0.4},
    "L1Filter": {"target": 0.4},
    "HardConcrete": {"target": 0.4},
    "Uniform": {"target": 0.4},
    "PlainLowRank": {"target": 0.5, "of": "rank"},
}


class MyNet(nn.Module):
    """A small convolutional net that no registry knows."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 16, 3, stride=2)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        return self.head(F.relu(self.body(x)).mean((2, 3)))


def loader(count=96, shape=(1, 8, 8), seed=0, size=16):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, *shape, generator=generator)
    y = (x.flatten(1)[:, :4] + 0.5 * x.flatten(1)[:, 4:8]).argmax(1)
    return DataLoader(TensorDataset(x, y), batch_size=size, shuffle=True)


def blocks():
    """The blocks of Python in README."""
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)


def test_the_lines_of_readme_run_as_they_stand(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"MyNet": MyNet, "train_loader": loader(), "val_loader": loader(seed=1)}
    exec(blocks()[0].replace("epochs=10", "epochs=3"), names)
    assert "MACs: " in capsys.readouterr().out
    x = torch.randn(5, 1, 8, 8)
    result, net = names["result"], names["net"]
    assert torch.equal(net(x), result.model(x))
    assert sum(p.numel() for p in net.parameters()) < sum(p.numel() for p in MyNet().parameters())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.onnx", "small.safetensors"]


def test_the_loop_of_readme_runs_as_it_stands():
    net, batches = MyNet(), [batch for _ in range(10) for batch in loader()]
    names = {"net": net, "batches": batches, "steps": len(batches), "x": batches[0][0]}
    namespace = names | {"ps": ps, "torch": torch, "F": F}
    exec(blocks()[1], namespace)
    small = namespace["small"]
    weights = [m.weight for m in small.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    total, kept = sum(w.numel() for w in weights), sum(int(w.count_nonzero()) for w in weights)
    assert kept == round(0.1 * total)
    assert type(small) is MyNet


@pytest.mark.parametrize("name", METHODS)
def test_the_loop_of_readme_takes_every_method(name):
    net, batches = MyNet(), [batch for _ in range(4) for batch in loader()]
    method = getattr(ps, name)(**METHODS[name])
    method.check(net)
    names = {"net": net, "batches": batches, "steps": len(batches), "x": batches[0][0]}
    namespace = names | {"ps": ps, "torch": torch, "F": F, "method": method}
    more = "(x,), train=lambda epoch: batches, loss=lambda o, x, y: F.cross_entropy(o, y)"
    code = blocks()[1].replace("(x,)", more, 1).replace("ps.SparseGates(target=0.9)", "method", 1)
    exec(code, namespace)
    small = namespace["small"]
    left = sum(int((p != 0).sum()) for p in small.parameters())
    assert left < 0.8 * sum(p.numel() for p in MyNet().parameters())
    assert torch.isfinite(small(torch.randn(2, 1, 8, 8))).all()


@pytest.mark.parametrize("name", ["Snip", "TaylorChannels", "ComponentAware"])
def test_what_a_method_looks_at_is_asked_for(name):
    method, x = getattr(ps, name)(target=0.4), torch.randn(2, 1, 8, 8)
    loss = lambda output, x, y: F.cross_entropy(output, y)  # noqa: E731
    for given in ({}, {"loss": loss}):
        with pytest.raises(ps.InputError, match=r"^context\.(loss|train) = "):
            method.attach(MyNet(), ps.Context(example=(x,), **given))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_a_net_and_loaders_in_the_same_lines(name, tmp_path):
    torch.manual_seed(0)
    net, before = MyNet(), None
    before = {key: value.clone() for key, value in net.state_dict().items()}
    method = getattr(ps, name)(**METHODS[name])
    recipe = ps.Recipe(epochs=4, lr=0.02)
    result = ps.prune(net, method, loader(), recipe, validation=loader(seed=1))
    assert result.status == "done"
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(p.requires_grad for p in result.model.parameters())
    result.model(torch.randn(2, 1, 8, 8)).sum().backward()
    assert method.title in result.report()
    result.save(tmp_path / "net.safetensors")
    loaded = ps.load(tmp_path / "net.safetensors", MyNet())
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(loaded(x), result.model(x))
    result.export(tmp_path / "net.onnx")
    program = torch.export.export(loaded, (x,))
    torch.testing.assert_close(program.module()(x), loaded(x))


NETS = {
    "numbers": (lambda: nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4)), (16,)),
    "signals": (
        lambda: nn.Sequential(
            *(nn.Conv1d(2, 8, 3), nn.ReLU(), nn.Conv1d(8, 8, 3), nn.ReLU()),
            *(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 4)),
        ),
        (2, 16),
    ),
    "volumes": (
        lambda: nn.Sequential(
            *(nn.Conv3d(1, 4, 3), nn.ReLU(), nn.Conv3d(4, 8, 3), nn.ReLU()),
            *(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 4)),
        ),
        (1, 6, 6, 6),
    ),
}


@pytest.mark.parametrize("shape", NETS)
@pytest.mark.parametrize("name", ["SparseGates", "Force", "GDP", "MagnitudeAttention"])
def test_inputs_of_any_rank(name, shape):
    make, size = NETS[shape]
    torch.manual_seed(0)
    options = METHODS[name] | ({"factorise": "*", "layers": "*"} if name == "Force" else {})
    method = getattr(ps, name)(**options)
    data = loader(shape=size)
    result = ps.prune(make(), method, data, ps.Recipe(epochs=3, lr=0.02), validation=data)
    assert result.status == "done"
    assert result.model(torch.randn(3, *size)).shape == (3, 4)


class Tokens(nn.Module):
    """Sequences (n, T, d) through linear layers and a layer norm."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(6, 12), nn.LayerNorm(12)
        self.second, self.head = nn.Linear(12, 10), nn.Linear(10, 4)

    def forward(self, x):
        return self.head(F.gelu(self.second(self.norm(self.first(x))))).mean(1)


@pytest.mark.parametrize("name", ["SparseGates", "GDP", "MagnitudeAttention", "GroupL2"])
def test_sequences_of_tokens(name):
    data = loader(shape=(5, 6))
    method = getattr(ps, name)(**(METHODS[name] | {"target": 0.3}))
    result = ps.prune(Tokens(), method, data, ps.Recipe(epochs=3, lr=0.02), validation=data)
    assert result.model(torch.randn(3, 5, 6)).shape == (3, 4)


class Two(nn.Module):
    """Two inputs of different size."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Linear(5, 8), nn.Linear(3, 8), nn.Linear(8, 1)

    def forward(self, a, b):
        return self.head(torch.relu(self.left(a) + self.right(b)))


@pytest.mark.parametrize("form", ["tuple", "dict"])
@pytest.mark.parametrize("name", ["SparseGates", "GDP", "GroupL2"])
def test_several_inputs_and_a_regression(name, form):
    torch.manual_seed(0)
    a, b = torch.randn(64, 5), torch.randn(64, 3)
    parts = [(a[i : i + 16], b[i : i + 16]) for i in range(0, 64, 16)]
    batches = [
        ((x if form == "tuple" else dict(zip("ab", x, strict=True))), x[0].sum(1, keepdim=True))
        for x in parts
    ]
    method = getattr(ps, name)(**METHODS[name])
    recipe = ps.Recipe(epochs=4, lr=0.02)
    result = ps.prune(Two(), method, batches, recipe, validation=batches)
    assert list(result.history[-1])[:4] == ["epoch", "phase", "train_loss", "validation_loss"]
    assert result.model(a, b).shape == (64, 1)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("hook", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_a_weight_made_by_a_hook_is_refused_and_folding_the_net_helps(hook):
    net = MyNet()
    hook(net.body)
    recipe = ps.Recipe(epochs=0, lr=0.1)
    for kind in (ps.GDP, ps.SparseGates, ps.GroupL2):
        with pytest.raises(ps.InputError, match=r"^module = 'body': its weight is computed"):
            ps.prune(net, kind(target=0.4), loader(), recipe)
        result = ps.prune(ps.fold(net).requires_grad_(), kind(target=0.4), loader(), recipe)
        assert measure.nonzeros(result.model) < measure.nonzeros(net)


def test_only_nets_are_folded():
    with pytest.raises(ps.InputError, match=r"^model = 'int': a torch module$"):
        ps.fold(3)


@pytest.mark.parametrize("kind", [torch.int32, torch.bool])
def test_labels_are_whole_numbers_of_any_kind(kind):
    x, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 1, 0])
    recipe, found = ps.Recipe(epochs=1, lr=0.1), []
    for labels in (y, y.to(kind)):
        torch.manual_seed(0)
        method, batches = ps.Magnitude(target=0.5), [(x, labels)]
        result = ps.prune(MyNet(), method, batches, recipe, validation=batches)
        found.append([result.history[-1][n] for n in ("train_loss", "validation_top1")])
    assert found[0] == found[1]


def test_a_target_out_of_reach_is_said_in_the_report():
    result = ps.prune(MyNet(), ps.GroupL2(target=0.999), loader(), ps.Recipe(epochs=0, lr=0.1))
    removed = 1 - measure.macs(result.model, X) / measure.macs(MyNet(), X)
    assert f"target not met: {removed:.4f} of MACs removed, no more can be" in result.report()


X = torch.zeros(1, 1, 8, 8)


def test_a_method_prunes_one_net():
    method, recipe = ps.Dpf(target=0.5), ps.Recipe(epochs=1, lr=0.1)
    ps.prune(MyNet(), method, loader(), recipe)
    with pytest.raises(ps.InputError, match=r"^method = 'dpf': has pruned a net already"):
        ps.prune(MyNet(), method, loader(), recipe)


def scripted():
    """A net with a part of another kind."""
    with warnings.catch_warnings(action="ignore"):
        return nn.Sequential(nn.Conv2d(1, 8, 3), torch.jit.script(nn.ReLU()))


class Short:
    """Says that it has more batches than it gives."""

    def __len__(self):
        return 9

    def __iter__(self):
        return iter(loader())


class Empty(Short):
    """Has none of the batches that it says it has."""

    def __iter__(self):
        return iter(())


DETACHED = lambda output, y: output.detach().sum()  # noqa: E731
PAIR = torch.zeros(2, 1, 8, 8), torch.zeros(2).long()


class Hidden(MyNet):
    """A net whose copies still call its own stem."""

    def __init__(self):
        super().__init__()
        self.call = lambda x: F.relu(self.stem(x))

    def forward(self, x):
        return self.head(F.relu(self.body(self.call(x))).mean((2, 3)))


class Teacher(nn.Conv2d):
    """Every net has the same one."""

    def __deepcopy__(self, memo):
        return self


USED = "model = 'stem.weight': its copy still uses that of the original (a function made in"


def test_nets_whose_copies_are_not_their_own_are_left_alone():
    with pytest.raises(ps.InputError) as caught:
        ps.shrink_to(Hidden(), 0.5, X, of="sparsity", by="magnitude")
    assert str(caught.value).startswith(USED)
    net = nn.Sequential(Teacher(1, 8, 3), nn.Conv2d(8, 4, 3))
    before = net[0].weight.clone()
    for call in (ps.groups, lambda net, x: ps.shrink_to(net, 0.5, x)):
        with pytest.raises(ps.InputError, match=r"^model = 'Sequential': a copy of it has"):
            call(net, X)
    assert torch.equal(net[0].weight, before) and net[0].weight.requires_grad


class Endless(IterableDataset):
    """A data set without a length."""

    def __iter__(self):
        return iter(loader().dataset)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"model": 3}, "model = 'int': a torch module, not a scripted one"),
        ({"model": scripted()}, "module = '1': a torch module, not a scripted one"),
        ({"model": Hidden()}, USED),
        ({"method": "gdp"}, "method = 'str': a method such as GDP(target=0.5)"),
        ({"recipe": {"epochs": 1}}, "recipe = 'dict': a Recipe"),
        ({"train": 3}, "train = 'int': batches (x, y) with a length, such as a DataLoader"),
        ({"train": []}, "train = 'list of length 0': batches (x, y) with a length"),
        ({"train": [torch.zeros(2, 1, 8, 8)]}, "train = 'a batch that is Tensor': batches are"),
        ({"validation": iter([])}, "validation = 'list_iterator': batches (x, y) with a length"),
        ({"loss": 5}, "loss = 'int': a function of (output, y) or (output, x, y)"),
        ({"loss": lambda output, y: output}, "loss = '<lambda>': a function that gives one number"),
        ({"loss": F.mse_loss}, "loss = 'mse_loss': fails on a batch: "),
        ({"train": Short()}, "train = 'Short': ends after 6 batches, its length is 9"),
        ({"train": [*loader(), (torch.zeros(0, 1, 8, 8), 0)]}, "train = [(0, 1, 8, 8)]: x is a"),
        ({"train": [*loader(), (torch.zeros(2, 2, 8, 8), 0)]}, "train = 'batch 6': cannot be used"),
        ({"train": Empty()}, "train = 'Empty': ends after 0 batches, its length is 9"),
        ({"train": DataLoader(loader().dataset, batch_size=None)}, "train = 'a y that is one numb"),
        ({"loss": DETACHED}, "loss = 'a number without gradient': must have a gr"),
        ({"train": DataLoader(Endless(), 4)}, "train = 'DataLoader': batches (x, y) with a length"),
        ({"train": [({"y": torch.zeros(2, 1, 8, 8)}, 0)]}, "train = ['y']: not what forward takes"),
        ({"train": [(torch.zeros(2, 1, 8, 8), torch.zeros(2))]}, "y = (2,): the shape of the"),
        ({"train": [(PAIR[0].byte(), PAIR[1])]}, "train = [(2, 1, 8, 8)]: MyNet does not take it"),
        ({"train": [(PAIR[0], [0, 1])]}, "y = 'list': a tensor; of others, give the loss"),
        ({"example": torch.zeros(2, 3)}, "example = [(2, 3)]: MyNet does not take it"),
        (
            {"train": [(PAIR[0][:, :, :2], PAIR[1])], "example": torch.zeros(2, 1, 8, 8)},
            "train = (2, 1, 2, 8): the net does not take a batch: ",
        ),
        ({"metric": lambda net, batches: "good"}, "metric = '<lambda>': fails on a batch: could"),
        ({"metric": lambda net, batches: {}}, "metric = '<lambda>': fails on a batch: gives no"),
        ({"metric": 3}, "metric = 3: a function of (model, batches)"),
        ({"metric": lambda net, batches: 1 / 0}, "metric = '<lambda>': fails on a batch: division"),
        ({"validation": [(*PAIR, 0)]}, "validation = 'a batch that is tuple': batches are pairs"),
        ({"validation": [(PAIR[0][:, :, :2], PAIR[1])]}, "validation = 'list': fails on a batch: "),
        ({"validation": [(PAIR[0], PAIR[1][:1])]}, "validation = 'list': fails on a batch: "),
        ({"validation": Empty()}, "validation = 'Empty': ends after 0 batches"),
        ({"metrics": 3}, "metrics = 'int': a Metrics"),
        ({"probe": 5}, "probe = 'int': a Probe"),
        ({"checkpoint_seconds": "a"}, "checkpoint_seconds = 'str': a number"),
        ({"seed": -1}, "seed = -1: a whole number of at least 0"),
        ({"seed": 1.5}, "seed = 1.5: a whole number of at least 0"),
        ({"device": "gpu"}, "device = 'gpu': "),
        ({"device": "meta"}, "device = 'meta': a device that computes"),
        ({"checkpoint": "/nowhere/x"}, "checkpoint = '/nowhere/x': a file in a folder that exists"),
        ({"checkpoint": 3}, "checkpoint = 3: the path of a file"),
        ({"model": MyNet().to("meta")}, "model = 'MyNet': 'stem.weight' has no values yet"),
        ({"model": nn.Sequential(nn.LazyLinear(3))}, "model = 'Sequential': '0.weight' has no"),
        ({"model": MyNet().requires_grad_(False)}, "model = 'MyNet': a net with parameters that"),
        ({"precision": "fp16"}, "precision = 'fp16': allowed are fp32, tf32, bf16"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(change, line):
    options = {"model": MyNet(), "method": ps.Magnitude(target=0.5), "train": loader()}
    options |= {"recipe": ps.Recipe(epochs=1, lr=0.1), "validation": loader()} | change
    with pytest.raises(ps.InputError) as caught:
        ps.prune(**options)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)
    in_training = change.keys() & {"train", "loss"}
    assert in_training or not getattr(options["method"], "attached", False)


def test_a_metric_may_need_more_than_a_batch_and_the_trial_leaves_no_trace():
    class Counts(MyNet):
        seen = 0

        def forward(self, x):
            self.seen += 1
            return super().forward(x)

    def whole(net, batches):
        classes = {int(y) for _, labels in batches for y in labels}
        if len(classes) < 4:
            raise ValueError("of four classes")
        return net.seen

    data = [(x, y) for x, y in zip(*loader().dataset.tensors, strict=True)]
    data = [(x[None], y[None]) for x, y in sorted(data, key=lambda pair: int(pair[1]))]
    made = []
    for more in ({}, {"validation": data, "metric": whole}):
        torch.manual_seed(0)
        result = ps.prune(Counts(), ps.Method(), loader(), ps.Recipe(epochs=1, lr=0.1), **more)
        made.append(result)
    # Seen by the copy that trains: the example, in each layout and to fold; one loss, six steps.
    assert made[1].history[0]["validation_metric"] == 10
    for a, b in zip(*(result.model.parameters() for result in made), strict=True):
        assert torch.equal(a, b)


class Named(nn.Module):
    """Its mask can be given in several ways."""

    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x, scale=None, mask=None):
        return self.o(self.a(x).relu() * (1 if mask is None else mask))


class Only(Named):
    def forward(self, x, *, mask):
        return super().forward(x, None, mask)


class Starred(Named):
    def forward(self, x, **more):
        return super().forward(x, None, **more)


@pytest.mark.parametrize("kind", [Named, Only, Starred])
def test_what_a_trace_would_leave_out_of_a_dict_is_refused(kind):
    x = {"x": torch.randn(4, 6), "mask": torch.ones(4, 8)}
    with pytest.raises(ps.InputError) as caught:
        ps.prune(kind(), ps.GDP(target=0.5), [(x, torch.zeros(4).long())])
    assert str(caught.value) == (
        "train = ['mask', 'x']: forward takes ['mask'] by keyword only, or behind an argument "
        "that is not given: cannot be traced"
    )


class Keeps(Named):
    """Keeps what it computed, wherever one can."""

    def forward(self, x):
        hidden = self.a(x).relu()
        self.one, self.seen, self.by = hidden, [hidden], {"h": (hidden, {1: hidden})}
        return self.o(hidden)


class Versioned(Named):
    def get_extra_state(self):
        return {"version": 2}

    def set_extra_state(self, state):
        pass


@pytest.mark.parametrize("kind", [Keeps, Versioned])
@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"Force", "PlainLowRank"}))
def test_nets_that_keep_results_or_more_state_are_taken(kind, name, tmp_path):
    torch.manual_seed(0)
    net, x = kind(), torch.randn(16, 6)
    net(x)
    method = getattr(ps, name)(**METHODS[name])
    result = ps.prune(net, method, [(x, torch.arange(16) % 3)] * 2, ps.Recipe(epochs=1, lr=0.1))
    assert result.status == "done"
    assert method.title in result.report()
    if kind is Keeps:
        assert net.one.grad_fn
        result.save(tmp_path / "net")
        assert torch.equal(ps.load(tmp_path / "net", kind())(x), result.model(x))
    if name == "GroupL2":
        assert ps.shrink_to(net, 0.4, x)(x).shape == (16, 3)


def test_a_net_that_cannot_be_copied_is_refused_in_one_line():
    net = Named()
    net.lock = threading.Lock()
    method, data = ps.GDP(target=0.5), [(torch.randn(4, 6), torch.zeros(4).long())]
    line = r"^model = 'Named': cannot be copied: cannot pickle '_thread.lock' object$"
    with pytest.raises(ps.InputError, match=line):
        ps.prune(net, method, data)
    with pytest.raises(ps.InputError, match=line):
        ps.fold(net)
    assert not method.attached


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_on_wherever_prune_is_called(mode):
    net, data, made = MyNet(), loader(count=16), []
    for each in (torch.enable_grad, mode):
        with each():
            made.append(ps.prune(net, ps.GDP(target=0.4), data, ps.Recipe(epochs=1, lr=0.1)))
            assert torch.is_grad_enabled() == (each is torch.enable_grad)
    for a, b in zip(*(result.model.parameters() for result in made), strict=True):
        assert torch.equal(a, b)


def test_a_method_that_was_refused_can_be_used():
    method, data = ps.GDP(target=0.4), [(torch.randn(4, 6), torch.zeros(4).long())]
    recipe = ps.Recipe(epochs=1, lr=0.1)
    with pytest.raises(ps.InputError, match="has no channels that could go"):
        ps.prune(nn.Linear(6, 3), method, data, recipe)
    assert ps.prune(Named(), method, data, recipe).status == "done"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_finishes_what_it_is_attached_to(name):
    method, x = getattr(ps, name)(**METHODS[name]), torch.randn(2, 1, 8, 8)
    with pytest.raises(ps.InputError) as caught:
        method.finish(MyNet(), ps.Context(example=(x,)))
    line = f"method = {method.name!r}: is not attached to a model: call attach first"
    assert str(caught.value) == line


@pytest.mark.parametrize("step", [0, 11])
def test_a_step_lies_within_the_training(step):
    with pytest.raises(ps.InputError, match=rf"^step = {step}: from 1 to total, 10$"):
        ps.GDP(target=0.5).at(step, 10, torch.zeros(()))


def test_the_report_of_a_net_of_zeros():
    net, data = Named(), [(torch.randn(4, 6), torch.zeros(4).long())]
    for parameter in net.parameters():
        parameter.data.zero_()
    result = ps.prune(net, ps.GroupL2(target=0.4), data, ps.Recipe(epochs=0, lr=0.1))
    assert "nonzero parameters: 0 -> 0 (0.0% removed)" in result.report()


@pytest.mark.parametrize(
    ("target", "of"), [(0.0, "macs"), (1.0, "macs"), ("half", "macs"), (None, "macs"), (0.5, "x")]
)
def test_wrong_targets_are_refused_in_one_line(target, of):
    with pytest.raises(ps.InputError) as caught:
        ps.GDP(target=target, of=of)
    assert str(caught.value).startswith("of = 'x'" if of == "x" else f"target = {target!r}")


def test_a_wrong_recipe_is_refused_in_one_line():
    with pytest.raises(ps.InputError, match=r"^epochs = 1\.5: input should be a valid integer$"):
        ps.Recipe(epochs=1.5, lr=0.1)


@pytest.mark.parametrize("keep", [[True, False], torch.ones(8) > 0, [0.5], 3, None, "01"])
def test_only_numbers_of_channels_are_kept(keep):
    with pytest.raises(ps.InputError, match=r"^keep\['stem'\] = .*: numbers of channels"):
        ps.remove(MyNet(), {"stem": keep}, torch.randn(2, 1, 8, 8))


def test_what_is_no_net_or_no_path_is_refused_in_one_line(tmp_path):
    x = torch.randn(2, 1, 8, 8)
    for function in (ps.groups, lambda net, x: ps.remove(net, {}, x), ps.shrink_to):
        with pytest.raises(ps.InputError, match=r"^model = 'int': a torch module"):
            function(3, *([0.5] if function is ps.shrink_to else []), x)
    for path in (None, 3, b"net", "a\0b"):
        with pytest.raises(ps.InputError, match=r"^path = .*: the path of a file"):
            ps.save(MyNet(), path)
        with pytest.raises(ps.InputError, match=r"^path = .*: the path of a file"):
            ps.load(path, MyNet())


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    path, recipe = tmp_path / "run", ps.Recipe(epochs=1, lr=0.1)
    options = {"train": loader(), "recipe": recipe, "checkpoint": path, "checkpoint_seconds": 0}
    net = MyNet()
    ps.prune(net, ps.Magnitude(target=0.5), **options)
    assert ps.prune(net, ps.Magnitude(target=0.5), **options).status == "done"
    with pytest.raises(ps.InputError, match="of another run; delete it"):
        ps.prune(MyNet(), ps.Magnitude(target=0.9), **options)


def test_low_rank_twice_comes_back_from_the_file(tmp_path):
    net, x = MyNet(), torch.randn(3, 1, 8, 8)
    for _ in range(2):
        method = ps.PlainLowRank(target=0.4, of="rank")
        net = ps.prune(net, method, loader(), ps.Recipe(epochs=1, lr=0.02)).model
    ps.save(net, tmp_path / "net")
    assert torch.equal(ps.load(tmp_path / "net", MyNet())(x), net(x))


def test_a_repeated_module_under_soft_coefficients():
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, padding=1)
    body = (nn.Conv2d(1, 8, 3), nn.ReLU(), conv, nn.ReLU(), conv, nn.ReLU())
    net = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    result = ps.prune(net, ps.ComponentAware(target=0.4), loader(), ps.Recipe(epochs=1, lr=0.02))
    assert result.model[2] is result.model[4]
    assert result.model[2].out_channels < 8


def test_numbers_of_numpy_and_torch_are_numbers():
    import numpy as np

    method = ps.GDP(target=np.float32(0.5), gate_lr=torch.tensor(0.25))
    assert (method.target, method.gate_lr) == (0.5, 0.25)
    assert ps.Recipe(epochs=np.int64(2), lr=torch.tensor(0.5)).epochs == 2


def test_a_smaller_net_in_one_line():
    x = torch.randn(2, 1, 8, 8)
    net = MyNet()
    for by, of in (("group_l2", "macs"), ("l1_filter", "parameters"), ("random", "macs")):
        small = ps.shrink_to(net, 0.4, x, of=of, by=by)
        assert small(x).shape == (2, 4)
        assert small.stem.out_channels < 8 or small.body.out_channels < 16
    sparse = ps.shrink_to(net, 0.5, x, of="sparsity", by="magnitude")
    assert int(sparse.head.weight.count_nonzero()) < 64
    assert [p.requires_grad for p in small.parameters()] == [True] * 8
    net.stem.requires_grad_(False)
    net.norm.eval()
    for of, by in (("macs", "group_l2"), ("sparsity", "magnitude")):
        small = ps.shrink_to(net, 0.4, x, of=of, by=by)
        assert [p.requires_grad for p in small.parameters()] == [False, False] + [True] * 6
        assert [m.training for m in small.modules()] == [m.training for m in net.modules()]
    with pytest.raises(ps.InputError, match="by = 'gdp': allowed are"):
        ps.shrink_to(net, 0.5, x, by="gdp")
