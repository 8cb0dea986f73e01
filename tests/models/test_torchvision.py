"""Checkpoints in torchvision's layout, and blocks of the references, in PyTorch."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from otmdr_jax import models
from otmdr_jax.models.densenet import DenseNet as OurDenseNet
from otmdr_jax.models.layers import Layers
from otmdr_jax.models.pyramidnet import PyramidBottleneck
from otmdr_jax.models.wide_resnet import WideBlock
from tests.zoo import shapes

torch = pytest.importorskip("torch")
tn = torch.nn
F = torch.nn.functional
NORM = ("weight", "bias", "running_mean", "running_var")


def conv(inputs, outputs, size, stride=1, **options):
    return tn.Conv2d(
        inputs, outputs, size, stride, (size - 1) // 2, bias=False, **options
    )


# --- torchvision's modules, with its names ------------------------------------------


class BasicBlock(tn.Module):
    def __init__(self, inputs, channels, stride):
        super().__init__()
        self.conv1 = conv(inputs, channels, 3, stride)
        self.bn1 = tn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3)
        self.bn2 = tn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or inputs != channels:
            self.downsample = tn.Sequential(
                conv(inputs, channels, 1, stride), tn.BatchNorm2d(channels)
            )

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(tn.Module):
    def __init__(self, sizes, classes):
        super().__init__()
        self.conv1 = conv(3, 64, 7, 2)
        self.bn1 = tn.BatchNorm2d(64)
        inputs = 64
        for stage, size in enumerate(sizes):
            channels, blocks = 64 * 2**stage, []
            for index in range(size):
                stride = 2 if stage and not index else 1
                blocks.append(BasicBlock(inputs, channels, stride))
                inputs = channels
            setattr(self, f"layer{stage + 1}", tn.Sequential(*blocks))
        self.fc = tn.Linear(inputs, classes)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


class DenseLayer(tn.Module):
    def __init__(self, inputs):
        super().__init__()
        self.norm1, self.conv1 = tn.BatchNorm2d(inputs), conv(inputs, 128, 1)
        self.norm2, self.conv2 = tn.BatchNorm2d(128), conv(128, 32, 3)

    def forward(self, x):
        y = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return torch.cat([x, y], 1)


class DenseNet(tn.Module):
    def __init__(self, classes):
        super().__init__()
        parts = {
            "conv0": conv(3, 64, 7, 2),
            "norm0": tn.BatchNorm2d(64),
            "relu0": tn.ReLU(),
            "pool0": tn.MaxPool2d(3, 2, 1),
        }
        channels = 64
        for stage, size in enumerate((6, 12, 24, 16), 1):
            block = tn.Sequential()
            for index in range(1, size + 1):
                block.add_module(f"denselayer{index}", DenseLayer(channels))
                channels += 32
            parts[f"denseblock{stage}"] = block
            if stage < 4:
                transition = tn.Sequential()
                transition.add_module("norm", tn.BatchNorm2d(channels))
                transition.add_module("relu", tn.ReLU())
                transition.add_module("conv", conv(channels, channels // 2, 1))
                transition.add_module("pool", tn.AvgPool2d(2, 2))
                parts[f"transition{stage}"] = transition
                channels //= 2
        parts["norm5"] = tn.BatchNorm2d(channels)
        self.features = tn.Sequential()
        for name, part in parts.items():
            self.features.add_module(name, part)
        self.classifier = tn.Linear(channels, classes)

    def forward(self, x):
        return self.classifier(F.relu(self.features(x)).mean((2, 3)))


class SqueezeExcitation(tn.Module):
    def __init__(self, channels, squeezed):
        super().__init__()
        self.fc1 = tn.Conv2d(channels, squeezed, 1)
        self.fc2 = tn.Conv2d(squeezed, channels, 1)

    def forward(self, x):
        gate = self.fc2(F.silu(self.fc1(x.mean((2, 3), keepdim=True))))
        return x * torch.sigmoid(gate)


def conv_norm(inputs, outputs, size, stride=1, groups=1, activation=True):
    parts = [conv(inputs, outputs, size, stride, groups=groups)]
    parts += [tn.BatchNorm2d(outputs)] + ([tn.SiLU()] if activation else [])
    return tn.Sequential(*parts)


class MBConv(tn.Module):
    def __init__(self, inputs, outputs, expansion, size, stride):
        super().__init__()
        inner = inputs * expansion
        parts = [conv_norm(inputs, inner, 1)] if expansion > 1 else []
        parts += [
            conv_norm(inner, inner, size, stride, groups=inner),
            SqueezeExcitation(inner, inputs // 4),
            conv_norm(inner, outputs, 1, activation=False),
        ]
        self.block = tn.Sequential(*parts)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x):
        return self.block(x) + x if self.adds else self.block(x)


class EfficientNet(tn.Module):
    def __init__(self, classes):
        super().__init__()
        stages, inputs = [conv_norm(3, 32, 3, 2)], 32
        for expansion, size, stride, outputs, repeats in (
            (1, 3, 1, 16, 1),
            (6, 3, 2, 24, 2),
            (6, 5, 2, 40, 2),
            (6, 3, 2, 80, 3),
            (6, 5, 1, 112, 3),
            (6, 5, 2, 192, 4),
            (6, 3, 1, 320, 1),
        ):
            blocks = []
            for index in range(repeats):
                step = stride if index == 0 else 1
                blocks.append(MBConv(inputs, outputs, expansion, size, step))
                inputs = outputs
            stages.append(tn.Sequential(*blocks))
        self.features = tn.Sequential(*stages, conv_norm(320, 1280, 1))
        self.classifier = tn.Sequential(tn.Dropout(0.2), tn.Linear(1280, classes))

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


# --- helpers ------------------------------------------------------------------------


def randomise(module, seed=0):
    """Weights and statistics that leave nothing at 0 or 1; in evaluation mode."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            shape = tuple(value.shape)
            if name.endswith("running_var"):
                drawn = rng.uniform(0.5, 2.0, shape)
            elif len(shape) > 1:
                drawn = rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)
            elif shape:
                one = 1.0 if name.endswith("weight") else 0.0
                drawn = one + rng.normal(0, 0.2, shape)
            else:  # num_batches_tracked
                continue
            value.copy_(torch.tensor(drawn, dtype=value.dtype))
    return module.eval()


def draw_images(*shape):
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def run(module, images):
    with torch.no_grad():
        out = module(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    return out.numpy()


# --- whole networks -----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("resnet_10", lambda: ResNet((1, 1, 1, 1), 7)),
        ("resnet_18", lambda: ResNet((2, 2, 2, 2), 7)),
        ("densenet_121", lambda: DenseNet(7)),
        ("efficientnet_b0", lambda: EfficientNet(7)),
    ],
)
def test_logits_equal_those_of_pytorch(name, make):
    module = randomise(make())
    model = models.create(name, 7, stem="imagenet")
    params, state = models.from_torchvision(model, module.state_dict())
    images = draw_images(2, 64, 64, 3)
    assert jax.tree.structure((params, state)) == jax.tree.structure(
        shapes(model, images.shape)
    )
    got, _ = jax.jit(model.apply, static_argnames="train")(
        params, state, images, train=False
    )
    want = run(module, images)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * abs(want).max())


def test_names_of_the_published_densenet():
    """Its file is older than the module: norm.1 for norm1."""
    model = models.Model(
        "small", 7, OurDenseNet, (("growth", 32), ("stage_sizes", (2,)))
    )
    new = {}
    for name, value in DenseNet(7).state_dict().items():
        if re.search("denseblock1.denselayer[12]|conv0|norm0", name):
            new[name] = value
    new |= {f"features.norm5.{k}": np.ones(128) for k in NORM}
    new |= {"classifier.weight": np.ones((7, 128)), "classifier.bias": np.ones(7)}
    old = {re.sub(r"(layer\d\.)(norm|conv)", r"\1\2.", k): v for k, v in new.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    assert jax.tree.structure(models.from_torchvision(model, old)) == (
        jax.tree.structure(shapes(model, (1, 32, 32, 3)))
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        models.from_torchvision(model, old),
        models.from_torchvision(model, new),
    )


def test_the_cifar_stem_in_the_same_layout():
    module = randomise(ResNet((1, 1, 1, 1), 7))
    module.conv1 = conv(1, 64, 3)
    model = models.create("resnet_10", 7)
    params, _ = models.from_torchvision(model, module.state_dict())
    np.testing.assert_array_equal(
        params["stem"]["kernel"],
        module.conv1.weight.detach().numpy().transpose(2, 3, 1, 0),
    )


def test_checkpoints_that_do_not_fit():
    checkpoint = dict(ResNet((1, 1, 1, 1), 7).state_dict())
    model = models.create("resnet_10", 7, stem="imagenet")
    more = {**checkpoint, "fc2.weight": np.zeros(3)}
    with pytest.raises(ValueError, match="1 tensor is of no use here: fc2.weight"):
        models.from_torchvision(model, more)
    less = {k: v for k, v in checkpoint.items() if k != "layer2.0.downsample.0.weight"}
    with pytest.raises(ValueError, match="1 tensor is missing: layer2.0.downsample"):
        models.from_torchvision(model, less)
    with pytest.raises(ValueError, match=r"40 tensors are missing: layer1.1.bn1"):
        other = models.create("resnet_18", 7, stem="imagenet")
        models.from_torchvision(other, checkpoint)
    with pytest.raises(ValueError, match=r"fc.bias is \(7,\).*\(10,\).*num_classes"):
        other = models.create("resnet_10", 10, stem="imagenet")
        models.from_torchvision(other, checkpoint)
    with pytest.raises(ValueError, match=r"conv1.weight is \(64, 3, 7, 7\)"):
        models.from_torchvision(models.create("resnet_10", 7), checkpoint)
    for name in ("mobilenet", "wide_resnet_28_10", "efficientnet_b0"):
        with pytest.raises(ValueError, match=f"knows the layouts of .*'{name}'"):
            models.from_torchvision(models.create(name, 7), {})


# --- blocks of the other references -------------------------------------------------


class TorchWideBlock(tn.Module):
    """Of Zagoruyko's network."""

    def __init__(self, inputs, channels, stride):
        super().__init__()
        self.norm1, self.conv1 = (
            tn.BatchNorm2d(inputs),
            conv(inputs, channels, 3, stride),
        )
        self.norm2, self.conv2 = tn.BatchNorm2d(channels), conv(channels, channels, 3)
        self.shortcut = conv(inputs, channels, 1, stride)

    def forward(self, x):
        h = F.relu(self.norm1(x))
        y = self.conv2(F.relu(self.norm2(self.conv1(h))))
        return y + self.shortcut(h)


class TorchPyramidBlock(tn.Module):
    """Of Han's network."""

    def __init__(self, inputs, width, stride):
        super().__init__()
        self.norm1, self.conv1 = tn.BatchNorm2d(inputs), conv(inputs, width, 1)
        self.norm2, self.conv2 = tn.BatchNorm2d(width), conv(width, width, 3, stride)
        self.norm3, self.conv3 = tn.BatchNorm2d(width), conv(width, 4 * width, 1)
        self.norm4 = tn.BatchNorm2d(4 * width)
        self.pool = tn.AvgPool2d((2, 2), stride=(2, 2), ceil_mode=True)

    def forward(self, x):
        y = self.conv1(self.norm1(x))
        y = self.conv2(F.relu(self.norm2(y)))
        y = self.norm4(self.conv3(F.relu(self.norm3(y))))
        x = self.pool(x)
        zeros = torch.zeros(len(x), y.shape[1] - x.shape[1], *x.shape[2:])
        return y + torch.cat([x, zeros], 1)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(WideBlock, TorchWideBlock), (PyramidBottleneck, TorchPyramidBlock)],
)
@pytest.mark.parametrize("side", [8, 7])
def test_a_block_of_stride_2_equals_pytorchs(ours, theirs, side):
    theirs = randomise(theirs(12, 8, 2))
    float32 = jnp.dtype("float32")
    block = ours(Layers(nnx.Rngs(0), float32, float32, None), 12, 8, 2)
    tensors = {name: value.numpy() for name, value in theirs.state_dict().items()}
    for name, child in theirs.named_children():
        layer = getattr(block, name, None)
        if isinstance(child, tn.Conv2d):
            kernel = tensors[f"{name}.weight"].transpose(2, 3, 1, 0)
            layer.kernel[...] = jnp.asarray(kernel)
        elif isinstance(child, tn.BatchNorm2d):
            layer.scale[...] = jnp.asarray(tensors[f"{name}.weight"])
            layer.bias[...] = jnp.asarray(tensors[f"{name}.bias"])
            layer.mean[...] = jnp.asarray(tensors[f"{name}.running_mean"])
            layer.var[...] = jnp.asarray(tensors[f"{name}.running_var"])
    images = draw_images(2, side, side, 12)
    got = np.asarray(jax.jit(lambda x: block(x, train=False))(images))
    want = run(theirs, images).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * abs(want).max())
