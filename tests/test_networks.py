"""Networks: torchvision's and CIFAR's, as backbones."""

import pytest
import torch
import torch.nn as nn
import torchvision

import common

FAMILIES = """
    resnet18 resnet50 resnext50_32x4d wide_resnet50_2 efficientnet_b0 efficientnet_v2_s mobilenet_v2 mobilenet_v3_large
    mobilenet_v3_small shufflenet_v2_x1_0 regnet_y_400mf densenet121 convnext_tiny vgg11_bn squeezenet1_1
    swin_t resnet8 resnet20
""".split()


@pytest.mark.parametrize("arch", FAMILIES)
def test_backbones_of_every_family(arch):
    """Features of the promised size, no dropout, gradients everywhere, keys that torchvision's network takes."""
    torch.manual_seed(0)
    backbone = common.build_backbone(arch, 224)
    images = torch.randn(2, 3, 64, 64)
    features = backbone(images)
    assert features.shape == (2, backbone.feature_dim)
    features.sum().backward()
    assert all(p.grad is not None for p in backbone.parameters())
    assert all(getattr(module, "p", 0) == 0 for module in backbone.modules())
    if arch in torchvision.models.list_models():
        state = backbone.state_dict()
        missing, unexpected = torchvision.models.get_model(arch).load_state_dict(state, strict=False)
        assert not unexpected and {key.rpartition(".")[0] for key in missing} == {backbone.classifier_name}
        common.load_strict(backbone, dict(state), arch)  # as from a checkpoint


def test_every_torchvision_name_builds():
    with torch.device("meta"):
        for arch in common.NETWORK_NAMES:
            if "regnet" not in arch:  # these compute their widths, which needs real tensors
                assert common.build_backbone(arch).feature_dim >= 64


def test_small_images_get_a_small_stem():
    small, large = common.build_backbone("resnet18", 32), common.build_backbone("resnet18", 33)
    assert small.conv1.weight.shape == (64, 3, 3, 3) and small.conv1.stride == (1, 1)
    assert large.conv1.weight.shape == (64, 3, 7, 7)
    assert small.layer1(small.maxpool(small.conv1(torch.randn(1, 3, 32, 32)))).shape == (1, 64, 32, 32)


@pytest.mark.parametrize("arch, parameters", [("resnet8", 78_042), ("resnet20", 272_474), ("resnet110", 1_730_714)])
def test_cifar_resnets_have_the_known_size(arch, parameters):
    """Parameters of the ten-class networks: those of He et al. (2016), table 6, and projection shortcuts."""
    backbone = common.build_backbone(arch)
    assert sum(p.numel() for p in backbone.parameters()) + 650 == parameters


def test_cifar_resnets_start_as_crds():
    """All BatchNorms weigh 1; convolutions have the deviation of He et al. by the number of outputs."""
    for network in (common.CIFAR_NETWORKS["resnet20"](), common.CIFAR_NETWORKS["wrn_16_1"]()):
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert (module.weight == 1).all()
            if isinstance(module, nn.Conv2d) and module.weight.numel() > 2000:
                deviation = (2 / (module.out_channels * module.kernel_size[0] ** 2)) ** 0.5
                assert module.weight.std().item() == pytest.approx(deviation, rel=0.1)


def test_vgg_of_small_images_is_cifars():
    assert common.build_backbone("vgg13", 32).feature_dim == 512
    assert common.build_backbone("vgg13", 64).feature_dim == 4096


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (3, 3), (5, 4)])
def test_depthwise_convolutions_are_the_same_as_matrix_products(size, stride):
    conv = torch.nn.Conv2d(6, 6, 5, stride, 2, groups=6, bias=False).double()
    images = torch.randn(4, 6, *size, dtype=torch.float64, requires_grad=True)
    expected = conv(images)
    gradients = torch.autograd.grad(expected.square().sum(), [images, conv.weight])
    common.speed_up_depthwise(conv)
    assert type(conv) is common.Depthwise
    result = conv(images)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(torch.autograd.grad(result.square().sum(), [images, conv.weight]), gradients)
    assert conv.to("meta")(images.to("meta")).shape == expected.shape  # not on the CPU: torch's own


def test_depthwise_convolutions_are_replaced_for_small_images_without_avx512(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    kinds = [{type(module) for module in common.build_backbone("mobilenet_v3_small", size).modules()}
             for size in (24, 64)]  # fmt: skip
    assert [common.Depthwise in kind for kind in kinds] == [True, False]
