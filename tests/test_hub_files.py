"""Files as timm, Hugging Face and trainers distribute them: their networks, wrappers, normalisation and damages."""

import functools
import json
import re
import shutil
import time
import types

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from conftest import GOLDEN, ROOT, error_lines, golden_fill, refused, run

import common
import sskd

HUB = json.loads((GOLDEN / "hub_teachers.json").read_text())
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.bool: "BOOL"}
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def write_safetensors(state, path):
    """As the package does: keys sorted, a header padded to 8 bytes, the data in its order."""
    header, data = {"__metadata__": {"format": "pt"}}, bytearray()
    for key, value in sorted(state.items()):
        content = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        offsets = [len(data), len(data) + len(content)]
        header[key] = {"dtype": DTYPES[value.dtype], "shape": list(value.shape), "data_offsets": offsets}
        data += content
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def converted(images, old, new=common.IMAGENET_MEAN_STD):
    """Images (N, 3, H, W) normalised with `new` numbers in the place of the `old` ones."""
    (mean, std), (new_mean, new_std) = torch.tensor([old, new])[..., None, None]
    return (images * std + mean - new_mean) / new_std


@functools.cache
def golden_state(name):
    return golden_fill(HUB[name]["state_dict"])


def hub_folder(name, folder, file="model.safetensors", **changes):
    """A folder with the golden file `name` and what is beside it; changes: of values of its config.json."""
    folder.mkdir(exist_ok=True)
    state = golden_state(name)
    write = write_safetensors if file.endswith(".safetensors") else torch.save
    write(state, folder / file)
    for beside, content in HUB[name]["beside"].items():
        (folder / beside).write_text(json.dumps(content | changes))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{name: a folder with the golden file}, each written when it is asked for."""
    root = tmp_path_factory.mktemp("hub")

    class Folders(dict):
        def __missing__(self, name):
            return self.setdefault(name, hub_folder(name, root / name))

    return Folders()


def small_resnet(seed=0, classes=10):
    torch.manual_seed(seed)
    network = torchvision.models.resnet18(num_classes=classes)
    return network.eval()


def without_fc(network):
    return {key: value for key, value in network.state_dict().items() if not key.startswith("fc.")}


def prefixed(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def zeros(state):
    return {key: torch.zeros_like(value) for key, value in state.items()}


# ------------------------------------------------------------------------------------ Networks of timm and Hugging Face


@pytest.mark.parametrize("form", ["folder", "model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("name", HUB)
def test_files_of_hubs_give_the_golden_features_for_the_same_pictures(name, form, folders, tmp_path):
    """In each form, images come normalised with ImageNet's numbers, as those of a folder."""
    facts, vectors = HUB[name], np.load(GOLDEN / "hub_teachers.npz")
    path = folders[name] if form == "folder" else folders[name] / form
    if form == "pytorch_model.bin":
        path = hub_folder(name, tmp_path / name, form) / form
    teacher = common.load_teacher(path)
    own = torch.from_numpy(vectors[f"{name}.images"])
    features = teacher.features(converted(own, facts["mean_std"]))
    np.testing.assert_allclose(features, vectors[f"{name}.features"], rtol=0, atol=2e-5)
    assert teacher.backbone.feature_dim == facts["feature_dim"] == teacher.dim
    assert teacher.mean_std == tuple(map(tuple, facts["mean_std"]))
    digits = " / ".join(" ".join(f"{value:.4g}" for value in values) for values in facts["mean_std"])
    assert str(path) in teacher.description and digits in teacher.description, teacher.description
    teacher.convert_from(teacher.mean_std)
    torch.testing.assert_close(teacher.features(own), features, rtol=0, atol=2e-5)


OLD_NAMES = {
    r"vit\.layers\.": "vit.encoder.layer.",
    r"attention\.([qkv])_proj": lambda m: "attention.attention." + {"q": "query", "k": "key", "v": "value"}[m[1]],
    r"attention\.o_proj": "attention.output.dense",
    r"mlp\.fc1": "intermediate.dense",
    r"mlp\.fc2": "output.dense",
}


def test_hugging_faces_older_names_are_read(tmp_path):
    vectors, state = np.load(GOLDEN / "hub_teachers.npz"), golden_state("hf_vit_google")
    for pattern, name in OLD_NAMES.items():
        state = {re.sub(pattern, name, key): value for key, value in state.items()}
    assert "vit.encoder.layer.0.attention.attention.query.weight" in state
    state["vit.pooler.dense.weight"] = torch.zeros(192, 192)
    torch.save(state, tmp_path / "vit.bin")
    teacher = common.load_teacher(tmp_path / "vit.bin", mean_std=[0.5, 0.5])
    images = converted(torch.from_numpy(vectors["hf_vit_google.images"]), HALF)
    np.testing.assert_allclose(teacher.features(images), vectors["hf_vit_google.features"], rtol=0, atol=2e-5)


def test_convnexts_authors_names_are_read(tmp_path):
    vectors, state = np.load(GOLDEN / "hub_teachers.npz"), golden_state("timm_convnext_tiny")
    for pattern, name in (
        (r"^stem\.", "downsample_layers.0."),
        (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
        (r"^(stages\.\d)\.blocks\.", r"\1."),
        ("conv_dw", "dwconv"),
        (r"mlp\.fc", "pwconv"),
        (r"head\.(norm|fc)", lambda m: {"norm": "norm", "fc": "head"}[m[1]]),
    ):
        state = {re.sub(pattern, name, key): value for key, value in state.items()}
    torch.save({"model": state | prefixed("norms.3.", {"weight": state["norm.weight"]})}, tmp_path / "convnext.pth")
    features = common.load_teacher(tmp_path / "convnext.pth").features(
        torch.from_numpy(vectors["timm_convnext_tiny.images"])
    )
    np.testing.assert_allclose(features, vectors["timm_convnext_tiny.features"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["hf_vit_google", "hf_resnet50", "timm_convnext_tiny"])
def test_labelled_files_of_hubs_have_their_classifier(name, folders):
    state = golden_state(name)
    (weight,) = [value for key, value in state.items() if re.match(r"(head\.fc|classifier).*weight", key)]
    network = sskd.load_classifier(folders[name], num_classes=len(weight))
    assert torch.equal(network.classifier.weight, weight) and network.mean_std == tuple(
        map(tuple, HUB[name]["mean_std"])
    )


def test_a_classifier_of_other_features_is_refused(tmp_path):
    """DINOv2's in Hugging Face takes the class token and the mean of the patches."""
    state = prefixed("dinov2.", golden_state("hf_dinov2"))
    state |= {"classifier.weight": torch.zeros(10, 384), "classifier.bias": torch.zeros(10)}
    torch.save(state, tmp_path / "dinov2.bin")
    assert common.load_teacher(tmp_path / "dinov2.bin").dim == 192
    with pytest.raises(common.UserError, match=r"dinov2.bin holds no linear classifier of its features"):
        sskd.load_classifier(tmp_path / "dinov2.bin")


def test_a_resnet_of_26_layers_is_read(tmp_path):
    blocks = torchvision.models.resnet.Bottleneck
    network = torchvision.models.ResNet(blocks, [2, 2, 2, 2], num_classes=9).eval()
    torch.save(network.state_dict(), tmp_path / "resnet26.pth")
    teacher = common.load_teacher(tmp_path / "resnet26.pth")
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(network.fc(teacher(images)), network(images))
    assert ": resnet26," in teacher.description


def test_positions_are_interpolated_as_the_code_of_the_files_origin_does(tmp_path, folders):
    """timm's and those with registers antialiased, Hugging Face's others plainly, both to the very size."""
    for name, antialias in (("timm_dinov2_reg4", True), ("hf_dinov2_with_registers", True), ("hf_dinov2", False)):
        own, other = (common.load_teacher(folders[name], image_size=size) for size in (None, 56))
        first = own.backbone.class_token.shape[1]
        old, new = (
            x.backbone.encoder.pos_embedding[:, first:].unflatten(1, (-1, n)) for x, n in ((own, 7), (other, 4))
        )
        expected = F.interpolate(old.permute(0, 3, 1, 2), size=(4, 4), mode="bicubic", antialias=antialias)
        torch.testing.assert_close(new.permute(0, 3, 1, 2), expected)


CONFIGS = {
    "heads": ("hf_vit_google", {"num_attention_heads": 6}, lambda network: network.encoder.layers[0].num_heads, 6),
    "timm's heads": ("timm_dinov2_reg4", {"num_heads": 12}, lambda network: network.encoder.layers[0].num_heads, 12),
    "heads of a part": (
        "hf_vit_google",
        {"vision_config": {"num_attention_heads": 6}},
        lambda network: network.encoder.layers[0].num_heads,
        6,
    ),
    "heads as a fraction": (
        "hf_vit_google",
        {"num_attention_heads": 6.0, "global_pool": None},
        lambda network: network.encoder.layers[0].num_heads,
        6,
    ),
    "epsilon": ("hf_vit_google", {"layer_norm_eps": 1e-3}, lambda network: network.encoder.ln.eps, 1e-3),
    "epsilon of ViT": ("hf_vit_google", {}, lambda network: network.encoder.layers[0].ln_1.eps, 1e-12),
    "epsilon of MSN": ("hf_vit_google", {"model_type": "vit_msn"}, lambda network: network.encoder.ln.eps, 1e-6),
    "epsilon of DINOv2": ("hf_dinov2", {}, lambda network: network.encoder.ln.eps, 1e-6),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_values_of_config_json_are_the_networks(case, tmp_path):
    name, changes, value, expected = CONFIGS[case]
    teacher = common.load_teacher(hub_folder(name, tmp_path / "hub", **changes))
    assert value(teacher.backbone) == expected
    assert "heads (config.json)" in teacher.description or "heads" in HUB[name]["beside"]["config.json"]


REFUSED_CONFIGS = {
    "another activation": ("hf_vit_google", {"hidden_act": "quick_gelu"}, ["hidden_act quick_gelu", ".pt2"]),
    "strides of another place": (
        "hf_resnet50",
        {"downsample_in_bottleneck": True},
        ["downsample_in_bottleneck", ".pt2"],
    ),
    "timm's activation": ("timm_dinov2_reg4", {"model_args": {"act_layer": "relu"}}, ["act_layer relu", ".pt2"]),
    "timm's pooling": ("timm_dinov2_reg4", {"global_pool": "avg"}, ["global_pool avg", ".pt2"]),
    "timm's pooling of a ConvNeXt": ("timm_convnext_tiny", {"global_pool": "max"}, ["global_pool max", ".pt2"]),
    "timm's blur": ("hf_resnet50", {"architecture": "resnetblur50"}, ["architecture resnetblur50", ".pt2"]),
    "another network's": ("hf_resnet50", {"architecture": "vit_base_patch16_224"}, ["architecture vit_base", ".pt2"]),
    "another width": ("hf_vit_google", {"hidden_size": 768}, ["192 dimensions", "768"]),
    "no number": ("hf_vit_google", {"image_mean": [0.5, float("nan"), 0.5]}, ["nan", "--teacher-mean-std"]),
    "numbers of bytes": ("hf_vit_google", {"image_mean": [123.0] * 3, "image_std": [58.0] * 3}, ["in [0, 1]"]),
    "heads that do not divide": ("hf_vit_google", {"num_attention_heads": 5}, ["5 heads of 192", ".pt2"]),
    "no deviation": ("hf_vit_google", {"image_std": [0.5, 0.5, 0]}, ["hub: ", "--teacher-mean-std"]),
}


@pytest.mark.parametrize("case", REFUSED_CONFIGS)
def test_a_config_json_of_a_network_that_is_not_known_here_is_refused(case, tmp_path):
    name, changes, words = REFUSED_CONFIGS[case]
    with pytest.raises(common.UserError) as error:
        common.load_teacher(hub_folder(name, tmp_path / "hub", **changes))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), error.value


def test_a_file_that_names_another_network_is_refused(tmp_path):
    """timm's trainer keeps the name."""
    torch.save({"arch": "resnetblur18", "state_dict": small_resnet().state_dict()}, tmp_path / "file.pth")
    with pytest.raises(common.UserError, match="arch resnetblur18"):
        common.load_teacher(tmp_path / "file.pth")


def test_torchvisions_old_names_of_densenet_are_read(tmp_path):
    network = torchvision.models.densenet121(num_classes=10).eval()
    state = {re.sub(r"(denselayer\d+\.(norm|conv))", r"\1.", key): value for key, value in network.state_dict().items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in state
    torch.save(state, tmp_path / "file.pth")
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(sskd.load_classifier(tmp_path / "file.pth")(images), network(images))


def test_deit_iii_of_its_authors_is_read(tmp_path):
    network, images = golden_state("timm_dinov2_reg4"), torch.randn(1, 3, 56, 56)
    state = {re.sub(r"ls(\d)\.gamma", r"gamma_\1", key): value for key, value in network.items()}
    assert "blocks.0.gamma_2" in state
    torch.save({"model": state}, tmp_path / "authors.pth")
    torch.save({"model": network}, tmp_path / "timm.pth")
    authors, timm = (common.load_teacher(tmp_path / f"{name}.pth", image_size=56) for name in ("authors", "timm"))
    assert torch.equal(authors(images), timm(images))


def test_simsiams_projector_is_its_head(tmp_path):
    """MoCo's layout without a queue: `encoder.fc` is an MLP, the last BatchNorm of which has no weights."""
    network, images = small_resnet(), torch.randn(3, 3, 64, 64)
    norm = nn.BatchNorm1d(8, affine=False)
    network.fc = nn.Sequential(nn.Linear(512, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8), norm)
    norm.running_var.fill_(0.1)
    state = prefixed("module.encoder.", network.eval().state_dict()) | {"module.predictor.0.weight": torch.zeros(4, 8)}
    torch.save({"arch": "resnet18", "state_dict": state}, tmp_path / "file.pth")
    torch.testing.assert_close(common.load_teacher(tmp_path / "file.pth")(images), network(images))


@pytest.mark.parametrize("last", ["0", "1"])
def test_a_part_of_a_head_is_no_classifier(last, tmp_path):
    """MAE's linear probe has BatchNorm before it."""
    state = prefixed("backbone.", without_fc(small_resnet()))
    state |= prefixed(f"head.{last}.", {"weight": torch.ones(512), "bias": torch.ones(512)})
    if last == "0":
        state |= {
            "head.0.running_mean": torch.ones(512),
            "head.1.weight": torch.ones(7, 512),
            "head.1.bias": torch.ones(7),
        }
    torch.save(state, tmp_path / "file.pth")
    with pytest.raises(common.UserError, match="holds no linear classifier"):
        sskd.load_classifier(tmp_path / "file.pth")


# -------------------------------------------------------------------------------------------------------- Normalisation


@pytest.mark.parametrize("part", ["model_args", "default_cfg"])
def test_an_empty_part_of_config_json_hides_no_other(part, tmp_path):
    """transformers writes it for networks of timm."""
    torch.save(small_resnet().state_dict(), tmp_path / "pytorch_model.bin")
    config = {part: None, "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}, "arguments": []}
    (tmp_path / "config.json").write_text("\ufeff" + json.dumps(config))
    assert common.load_teacher(tmp_path).mean_std == HALF


def test_a_network_whose_images_are_not_normalised(tmp_path):
    folder = hub_folder("hf_vit_google", tmp_path / "hub", do_normalize=False)
    assert common.load_teacher(folder).mean_std == ((0, 0, 0), (1, 1, 1))


def test_images_are_converted_to_the_numbers_of_the_network_and_left_alone_where_they_are_equal(tmp_path):
    network = small_resnet()
    torch.save(network.state_dict(), tmp_path / "resnet18.pth")
    pictures = torch.rand(2, 3, 64, 64)
    for numbers in ([0.5, 0.25], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [[0.5] * 3, [0.5] * 3], None):
        teacher = common.load_teacher(tmp_path / "resnet18.pth", mean_std=numbers)
        network.fc = nn.Identity()
        expected = network(common.normalize(pictures.clone(), teacher.mean_std))
        for come in (None, common.CIFAR_MEAN_STD, ((0.1,) * 3, (0.9,) * 3), teacher.mean_std):
            if come:
                teacher.convert_from(come)
            images = common.normalize(pictures.clone(), come or common.IMAGENET_MEAN_STD)
            torch.testing.assert_close(teacher(images), expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(teacher.features(images), expected, rtol=1e-4, atol=1e-4)
        assert teacher.shift_scale is None
    assert teacher.mean_std == common.IMAGENET_MEAN_STD and "assumed" in teacher.description
    for numbers in ([0.5], [0.5, 0.0], [0.5, 0.5, 0.5, 0.5], [float("nan"), 0.5]):
        with pytest.raises(common.UserError, match=r"resnet18.pth: .*--teacher-mean-std"):
            common.load_teacher(tmp_path / "resnet18.pth", mean_std=numbers)


def test_the_conversion_moves_with_the_network_and_is_no_part_of_its_state(folders):
    teacher = common.load_teacher(folders["hf_vit_google"])
    assert teacher.shift_scale.shape == (2, 3, 1, 1) and not any("scale" in key for key in teacher.state_dict())
    assert teacher.to("meta").shift_scale.is_meta


USUAL = {
    "CRD's network": ({}, None, common.CIFAR_MEAN_STD),
    "kept in the checkpoint": ({"mean_std": HALF}, None, HALF),
    "kept in config.json": ({}, {"mean_std": HALF}, HALF),
    "of a run before, on CIFAR": ({}, {"arguments": {"data": "cifar10"}}, common.CIFAR_MEAN_STD),
    "of a run before, on a folder": ({}, {"arguments": {"data": "shapes"}}, common.IMAGENET_MEAN_STD),
    "flat, as older timm": ({}, {"mean": [0.5] * 3, "std": [0.5] * 3}, HALF),
}


@pytest.mark.parametrize("case", USUAL)
def test_our_checkpoints_and_cifars_networks_have_numbers_of_their_own(case, tmp_path):
    content, beside, expected = USUAL[case]
    state = common.build_backbone("resnet8", 32).state_dict()
    torch.save(content | {"state_dict": state}, tmp_path / "checkpoint.pth")
    if beside:
        (tmp_path / "config.json").write_text(json.dumps(beside))
    assert common.load_teacher(tmp_path / "checkpoint.pth").mean_std == expected


def test_efficientnet_v2_l_of_torchvision_expects_half(tmp_path):
    with torch.device("meta"):
        shapes = {
            key: list(value.shape) for key, value in common.build_backbone("efficientnet_v2_l").state_dict().items()
        }
    torch.save({key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}, tmp_path / "file.pth")
    assert common.load_teacher(tmp_path / "file.pth").mean_std == HALF


# ------------------------------------------------------------------------------------------------ Prefixes and wrappers


def by_number(state):
    """Keys of a ResNet's layers in a Sequential, as lightly saves them."""
    numbers = {"conv1": "0", "bn1": "1"} | {f"layer{n}": str(n + 3) for n in range(1, 5)}
    return {re.sub(r"^\w+", lambda m: numbers[m[0]], key): value for key, value in state.items()}


def shortcuts(state):
    """Keys of a ResNet in kuangliu's code."""
    names = {".downsample.": ".shortcut.", "fc.": "linear."}
    return {re.sub(r"\.downsample\.|^fc\.", lambda m: names[m[0]], key): value for key, value in state.items()}


def wrapped(bare, full):
    """{case: (content, part of the description)} of what trainers wrap a ResNet in."""
    other = zeros(bare)
    head = {"0.weight": torch.zeros(8, 512), "0.bias": torch.zeros(8)}
    return {
        "torch.compile": (prefixed("_orig_mod.", full), "resnet18, no head"),
        "DDP of torch.compile": ({"state_dict": prefixed("module._orig_mod.", full)}, "of state_dict,"),
        "torch.compile of a part": ({"model": prefixed("net._orig_mod.module.", full)}, "of model.net,"),
        "Lightning": ({"state_dict": prefixed("model.", full), "epoch": 1}, "of state_dict.model,"),
        "Lightning in Lightning": ({"state_dict": prefixed("model.backbone.", bare)}, "of state_dict.model.backbone,"),
        "lightly": (
            {"state_dict": prefixed("backbone.", by_number(bare)) | prefixed("projection_head.layers.", head)},
            "",
        ),
        "lightly's MoCo": ({"state_dict": prefixed("backbone_momentum.", other) | prefixed("backbone.", bare)}, ""),
        "lightly's DINO": (
            prefixed("student_backbone.", other) | prefixed("teacher_backbone.", bare),
            "of teacher_backbone,",
        ),
        "solo-learn": (
            {
                "state_dict": prefixed("momentum_backbone.", other)
                | prefixed("backbone.", bare)
                | prefixed("projector.", head)
            },
            "of state_dict.backbone,",
        ),
        "solo-learn's older": (
            {"state_dict": prefixed("encoder.", bare) | prefixed("projector.", head)},
            "state_dict.encoder,",
        ),
        "MMSelfSup": ({"meta": {}, "state_dict": prefixed("backbone.", bare) | prefixed("neck.", head)}, ""),
        "a student of another trainer": (prefixed("student_backbone.", bare), "of student_backbone,"),
        "VICReg": (
            {"model": prefixed("module.backbone.", bare) | prefixed("module.projector.", head)},
            "model.backbone,",
        ),
        "averaged weights beside others": (
            {"state_dict": zeros(full), "state_dict_ema": full},
            "averaged (EMA) weights of state_dict_ema",
        ),
        "averaged weights of a model": (
            {"model": zeros(full), "model_ema": full},
            "averaged (EMA) weights of model_ema",
        ),
        "averaged weights alone": ({"state_dict_ema": full}, "EMA"),
        "AveragedModel": ({"n_averaged": torch.tensor(3), **prefixed("module.", full)}, "resnet18, no head"),
        "model_state_dict": ({"model_state_dict": full, "optimizer_state_dict": {}}, "model_state_dict"),
        "net": ({"net": full, "acc": 93.1}, "of net,"),
        "network": ({"network": full}, "of network,"),
        "numpy's numbers": ({"model": full, "acc": np.float64(93.1), "epoch": np.int64(3)}, "of model,"),
        "FSDP": ({key.replace("1.0.", "1.0._fsdp_wrapped_module."): full[key] for key in full}, "resnet18, no head"),
        "an average that holds no weights": ({"model": full, "ema": {"decay": 0.9, "shadow": [1]}}, "of model,"),
        "a tensor of no dimensions": ({"model": full, "ema": {"decay": torch.tensor(0.9)}}, "of model,"),
        "a name of a teacher": ({"model": full, "teacher": {"name": "dino"}}, "of model,"),
        "MSN's authors": ({"encoder": zeros(bare), "target_encoder": bare, "opt": {}}, "of target_encoder,"),
        "VISSL": (
            {"classy_state_dict": {"base_model": {"model": {"trunk": prefixed("_feature_blocks.", bare)}}}},
            "trunk._feature_blocks,",
        ),
        "kuangliu's names": ({"net": shortcuts(full)}, "of net,"),
        "kuangliu's in another order": (dict(sorted(shortcuts(full).items())), "resnet18, no head"),
        "SupContrast": ({"model": prefixed("encoder.", shortcuts(bare)) | prefixed("head.", head)}, "model.encoder,"),
        "a classifier behind a dropout": (prefixed("fc.1.", {"weight": full["fc.weight"]}) | bare, "resnet18, no head"),
        "a Sequential with a classifier": (prefixed("0.", bare) | {"1.weight": torch.zeros(8, 512)}, "of 0,"),
    }


def test_what_trainers_wrap_networks_in_is_stripped(tmp_path):
    network, images = small_resnet(), torch.randn(1, 3, 64, 64)
    cases = wrapped(without_fc(network), network.state_dict())
    network.fc = nn.Identity()
    expected = network(images)
    for case, (content, words) in cases.items():
        torch.save(content, tmp_path / "file.pth")
        teacher = common.load_teacher(tmp_path / "file.pth")
        torch.testing.assert_close(teacher(images), expected, msg=case)
        assert words in teacher.description, (case, teacher.description)


def test_lightning_around_moco_keeps_the_head(tmp_path):
    network, head = small_resnet(), common.mlp_head(512, 512, 32)
    state = prefixed("model.encoder_q.", without_fc(network)) | prefixed("model.encoder_q.fc.", head.state_dict())
    torch.save({"state_dict": state | prefixed("model.encoder_k.", zeros(without_fc(network)))}, tmp_path / "moco.ckpt")
    teacher, images = common.load_teacher(tmp_path / "moco.ckpt"), torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(teacher(images), head(teacher.features(images)))
    assert teacher.dim == 32 and "embedding of 32 of its head" in teacher.description


# --------------------------------------------------------------------------------------------- Messages and safetensors


def test_the_golden_safetensors_file_is_read():
    state = common.load_file(GOLDEN / "tiny.safetensors")
    assert state["a.long"].dtype == torch.int64 and state["a.long"].tolist() == [3, 1]
    assert torch.equal(state["b.half"], torch.arange(6, dtype=torch.float16).view(2, 3))
    assert torch.equal(state["c.bf16"], torch.tensor([1.5, -2], dtype=torch.bfloat16))
    assert state["d.scalar"].shape == () and state["d.scalar"] == 7


def test_safetensors_are_known_by_their_content_and_a_damage_is_one_line(tmp_path):
    path, state = (
        tmp_path / "weights.pth",
        {"a": torch.arange(5.0), "empty": torch.zeros(0, 3), "b": torch.tensor([True])},
    )
    write_safetensors(state, path)
    loaded = common.load_file(path)
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[key], state[key]) for key in state)
    content = path.read_bytes()
    named = tmp_path / "weights.safetensors"
    damages = [content[:n] for n in (0, 4, 8, 20, len(content) - 3)] + [content.replace(b"F32", b"F99")]
    for damage in damages + [content.replace(b'"shape": [5]', b'"shape": [6]')]:
        named.write_bytes(damage)
        with pytest.raises(
            common.UserError, match=r"weights.safetensors is not a readable .* cut off or damaged"
        ) as error:
            common.load_file(named)
        assert "\n" not in str(error.value)


def traced(path):
    with pytest.warns(FutureWarning, match="jit"):
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), path)


class Vgg(nn.Module):
    """kuangliu's for CIFAR, with five max-poolings, where CRD's of the same shapes has three."""

    def __init__(self, row):
        super().__init__()
        self.features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs[row], batch_norm=True)
        self.classifier = nn.Linear(512, 10)


def not_finite(path, value):
    state = small_resnet().state_dict()
    state["layer1.0.conv1.weight"][0, 0] = value
    torch.save(state, path)


MISTAKES = {
    "a TorchScript program": (traced, ["TorchScript", "state_dict()"]),
    "a git-lfs pointer": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
        ["git lfs pull"],
    ),
    "text": (lambda path: path.write_text("<html>404</html>"), ["neither"]),
    "a folder": (lambda path: path.mkdir(), ["is a folder without model.safetensors", "save_pretrained"]),
    "lightly's ResNet without a ReLU": (
        lambda path: torch.save(
            {
                re.sub(r"^\w+", lambda m: {"conv1": "0", "bn1": "1"}.get(m[0], str(int(m[0][-1]) + 1)), key): value
                for key, value in shortcuts(without_fc(small_resnet())).items()
            },
            path,
        ),
        ["fits no network", ".pt2"],
    ),
    "weights that are not numbers": (lambda path: not_finite(path, torch.nan), ["not finite (layer1.0.conv1.weight)"]),
    "infinite weights": (lambda path: not_finite(path, -torch.inf), ["not finite (layer1.0.conv1.weight)"]),
    "a VGG of five poolings": (lambda path: torch.save({"net": Vgg("D").state_dict()}, path), ["file", ".pt2"]),
    "a smaller one": (lambda path: torch.save({"net": Vgg("A").state_dict()}, path), ["file", ".pt2"]),
    "GoogLeNet": (
        lambda path: torch.save(
            {
                "conv1.conv.weight": torch.zeros(64, 3, 7, 7),
                "inception3a.branch1.conv.weight": torch.zeros(64, 192, 1, 1),
            },
            path,
        ),
        ["fits no network", ".pt2"],
    ),
    "another network of timm": (
        lambda path: torch.save(
            {"conv_stem.weight": torch.zeros(32, 3, 3, 3), "blocks.0.0.x": torch.zeros(2, 3)}, path
        ),
        ["fits no network", "conv_stem.weight [32, 3, 3, 3]", ".pt2"],
    ),
    "a stem of three convolutions": (
        lambda path: torch.save(
            without_fc(small_resnet()) | {"conv1.0.weight": torch.zeros(64, 3, 3, 3), "conv1.weight": None}, path
        ),
        ["conv1.0.weight", ".pt2"],
    ),
}


def test_one_of_several_parts_is_named(tmp_path):
    write_safetensors(small_resnet().state_dict(), path := tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(common.UserError, match="one of several parts: join them"):
        common.load_teacher(path)


@pytest.mark.parametrize("case", MISTAKES)
def test_a_file_that_does_not_do_is_refused_soon_and_in_one_line(case, tmp_path):
    write, words = MISTAKES[case]
    write(tmp_path / "file.pth")
    start = time.process_time()
    with pytest.raises(common.UserError, match=r"file.pth") as error:
        common.load_teacher(tmp_path / "file.pth")
    assert time.process_time() - start < 2
    text = str(error.value)
    assert all(word in text for word in words) and "\n" not in text and "eights_only" not in text, text


def test_arch_googlenet_is_unknown():
    with pytest.raises(common.UserError, match="unknown network googlenet"):
        common.build_backbone("googlenet")


# ------------------------------------------------------------------------------------------------- Programs and scripts


def export(network, path, size=32):
    program = torch.export.export(network.eval(), (torch.randn(2, 3, size, size),),
                                  dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))  # fmt: skip
    torch.export.save(program, path)


class HubNetwork(nn.Module):
    """Stands in for a network of Hugging Face: its keyword is pixel_values, and it returns several tensors by name."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 16, 16)

    def forward(self, pixel_values):
        x = self.patches(pixel_values).flatten(2).mT
        return types.SimpleNamespace(last_hidden_state=x, pooler_output=x.mean(dim=1))


def test_the_documented_wrapper_makes_a_program_that_takes_imagenets_numbers(tmp_path):
    page = (ROOT / "docs" / "teachers.md").read_text()
    (block,) = [text for text in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if "class Wrapper" in text]
    names = {"MyNetwork": HubNetwork}
    exec(block, names)
    export(names["network"], tmp_path / "teacher.pt2")
    teacher, images = common.load_teacher(tmp_path / "teacher.pt2", trust=True), torch.randn(3, 3, 32, 32)
    expected = names["network"].network(converted(images, common.IMAGENET_MEAN_STD, HALF)).pooler_output
    torch.testing.assert_close(teacher(images), expected, rtol=1e-4, atol=1e-5)


class SeveralOutputs(nn.Module):
    def forward(self, images):
        return {"features": images.mean(dim=(2, 3))}


def test_a_program_of_several_outputs_is_told_to_be_wrapped_and_a_thousand_are_doubted(tmp_path):
    export(SeveralOutputs(), tmp_path / "several.pt2")
    with pytest.raises(common.UserError, match=r"several.pt2 .*'dict'.* a wrapper that returns one tensor"):
        common.load_teacher(tmp_path / "several.pt2", trust=True)
    export(nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Flatten(), nn.Linear(64, 1000)), tmp_path / "logits.pt2")
    teacher = common.load_teacher(tmp_path / "logits.pt2", trust=True, mean_std=[0.5, 0.5])
    assert "1000 numbers look like logits" in teacher.description and teacher.mean_std == HALF


LINE = "--data cifar10 --image-size 64 --student resnet8 --batch-size 16 --epochs 1"


@pytest.mark.parametrize("script", ["disco.py --queue-size 32", "seed.py --queue-size 32", "sskd.py"])
def test_scripts_take_a_folder_say_what_they_read_and_keep_it(script, folders, tmp_path, capfd, monkeypatch):
    teacher, images, converted_from = folders["hf_vit_google"], common.draw_shapes(48, 64, 0), []
    convert_from = common.Encoder.convert_from
    monkeypatch.setattr(common, "load_small_set", lambda *_: (*images, "0123456789"))
    monkeypatch.setattr(
        common.Encoder,
        "convert_from",
        lambda self, numbers: converted_from.append(numbers) or convert_from(self, numbers),
    )
    if script == "sskd.py":
        script += " --head-epochs 1 --batch-size 8"
    run(f"{script} {LINE} --teacher {teacher} --out {tmp_path}/run")
    lines = error_lines(capfd.readouterr().err)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    words = "a vision transformer of 2 blocks, 3 heads (config.json), weights of vit, no head, features of 192"
    assert config["loaded"] == [lines[0]] and f"{teacher}: {words}, images normalised by 0.5 0.5 0.5 / 0.5" in lines[0]
    assert config["mean_std"] == [list(values) for values in common.CIFAR_MEAN_STD]
    assert converted_from.count(common.CIFAR_MEAN_STD) == 1
    assert config["inputs"]["teacher"] != [str(teacher)]  # its hash
    student = common.load_teacher(tmp_path / "run" / "backbone.pth")
    assert student.mean_std == common.CIFAR_MEAN_STD and "(read)" in student.description
    with pytest.raises(SystemExit):
        run(f"{script} {LINE} --teacher {teacher} --teacher-mean-std 0.5 --out {tmp_path}/other")
    assert "--teacher-mean-std" in capfd.readouterr().err


def test_a_teacher_without_its_head_keeps_its_normalisation(teacher_file):
    teacher = common.load_teacher(teacher_file, mean_std=(0.5, 0.5))
    images, width = torch.randn(2, 3, 16, 16), teacher.dim
    features = teacher.features(images)
    assert torch.equal(teacher.without_head()(images), features) and teacher.dim == 64 != width
    assert not torch.equal(teacher.backbone(images), features)
    common.check_input_size(teacher.backbone, "teacher", 16)
    assert not teacher.backbone.training


@pytest.mark.parametrize("name", ["", "model.safetensors"])
def test_other_numbers_beside_the_teacher_are_another_run(name, folders, tmp_path, capfd):
    """The weights are the same, their images are not."""
    shutil.copytree(folders["hf_vit_google"], tmp_path / "teacher")
    line = LINE.replace("cifar10", "shapes:32") + f" --queue-size 32 --teacher {tmp_path}/teacher/{name}"
    run(f"disco.py {line} --out {tmp_path}/run")
    (tmp_path / "teacher" / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}')
    assert "another run (teacher" in refused(f"disco.py {line} --out {tmp_path}/run", capfd)
    shutil.copy(folders["hf_vit_google"] / "preprocessor_config.json", tmp_path / "teacher")
    config = tmp_path / "teacher" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"layer_norm_eps": 0.1}))  # or the number of heads
    assert "another run (teacher" in refused(f"disco.py {line} --out {tmp_path}/run", capfd)


@pytest.mark.parametrize("data", ["cifar10", "stl10"])
def test_each_of_the_weights_of_an_evaluation_gets_images_its_own_way(data, folders, tmp_path, monkeypatch):
    """The features of a teacher are the same as for images that were normalised with its own numbers."""
    images, seen = common.draw_shapes(40, 64, 0), {}
    monkeypatch.setattr(common, "load_small_set", lambda *_: (*images, "0123456789"))
    extract = common.extract_features

    def record(encoder, *args):
        seen.setdefault(encoder.backbone.feature_dim, extract(encoder, *args)[0])
        return extract(encoder, *args)

    monkeypatch.setattr(common, "extract_features", record)
    torch.save(common.build_backbone("resnet18", 64).state_dict(), tmp_path / "resnet18.pth")
    line = f"linear_eval.py --data {data} --image-size 64 --batch-size 20 --knn 5 --epochs 1 --cached"
    run(f"{line} --weights {folders['hf_vit_google']} {tmp_path}/resnet18.pth --out {tmp_path}/eval")
    for path, dim in ((folders["hf_vit_google"], 192), (tmp_path / "resnet18.pth", 512)):
        teacher = common.load_teacher(path)
        teacher.convert_from(teacher.mean_std)
        expected = teacher.features(common.normalize(images[0] / 255, teacher.mean_std))
        torch.testing.assert_close(seen[dim], expected, rtol=1e-3, atol=1e-3)
    assert len(json.loads((tmp_path / "eval" / "config.json").read_text())["loaded"]) == 2
