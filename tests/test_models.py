import pytest
import torch

from prunestudy import models
from prunestudy.errors import InputError


@pytest.mark.parametrize(("name", "parameters"), [("lenet5", 431_080), ("lenet300", 266_610)])
def test_parameters_of_the_papers_nets(name, parameters):
    net = models.build(name, (1, 28, 28), 10)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert net(torch.zeros(3, 1, 28, 28)).shape == (3, 10)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 16, 16), (2, 17, 30)])
@pytest.mark.parametrize("name", models.names())
def test_any_shape_that_fits(name, shape):
    assert models.build(name, shape, 7)(torch.zeros(2, *shape)).shape == (2, 7)


def test_lenet5_has_no_relu_after_convolutions():
    net = models.build("lenet5", (1, 16, 16), 2)
    seen = []
    net.fc1.register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0]))
    torch.nn.init.constant_(net.conv2.weight, 0.0)
    torch.nn.init.constant_(net.conv2.bias, -1.0)
    net(torch.zeros(1, 1, 16, 16))
    assert seen[0].tolist() == [[-1.0] * 50]


def test_names_and_lines():
    assert models.names() == sorted(models.names())
    assert {"lenet5", "lenet300"} <= set(models.names())
    assert list(models.describe()) == models.names()
    assert all(line and "\n" not in line for line in models.describe().values())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("lenet6", (1, 28, 28), 10), ["model = 'lenet6'", "lenet300, lenet5"]),
        (("lenet5", (1, 15, 28), 10), ["shape = (1, 15, 28)", "16x16"]),
        (("lenet5", (28, 28), 10), ["shape = (28, 28)", "three"]),
        (("lenet300", (1, 28, 0), 10), ["shape = (1, 28, 0)", "positive"]),
        (("lenet300", 28, 10), ["shape = 28", "three"]),
        (("lenet300", (1, 28, 28), 0), ["num_classes = 0", "at least 1"]),
        (("lenet300", (1, 28, 28), 10.0), ["num_classes = 10.0"]),
    ],
)
def test_bad_input_is_one_line(arguments, words):
    with pytest.raises(InputError) as error:
        models.build(*arguments)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words)
