"""The models of ``coverage.py``: torchvision's families and small transformers, with random weights.

Weights are random (the caller seeds), inputs are small, and nothing is downloaded. torchvision gives the smallest
member of each family; transformers models are built from their Config classes with two or three narrow layers, which
changes the sizes and not the code that is traced. ``CASES`` lists them all; each is built when its builder is called,
and only then its library is imported.
"""

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

#: Positional or keyword arguments of a model.
Inputs = tuple[Any, ...] | dict[str, Any]

#: What a contender is compared on: all float leaves of the output, or the scores that a detector ranks.
OUTPUTS, SCORES = "outputs", "scores"


@dataclass(frozen=True)
class Case:
    """A model and what to feed it.

    Attributes:
        name: as in the table.
        family: the group that it belongs to; a choice of ``--families``.
        build: gives the model in evaluation mode, with random weights.
        inputs: gives random inputs; every call gives others.
        compared: ``OUTPUTS``, or ``SCORES`` where the order of the outputs is that of a ranking: one swap of two
            detections makes an SQNR of the outputs meaningless, so the inputs of all top-k's are compared.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    compared: str = OUTPUTS


# ------------------------------------------------------------------------------
# torchvision
# ------------------------------------------------------------------------------


def _vision_model(path: str, **arguments: Any) -> nn.Module:
    module, name = path.rsplit(".", 1)
    builder = getattr(importlib.import_module(f"torchvision.models{'.' + module if module else ''}"), name)
    model: nn.Module = builder(weights=None, **arguments)
    return model.eval()


def _picture(*shape: int) -> Tensor:
    """Noise at several scales, as photos have it: noise of single pixels averages out on the way to the logits."""
    height, width = shape[-2:]
    flat = torch.zeros(math.prod(shape[:-3]), *shape[-3:])
    for scale in (1, 4, 16, 64):
        coarse = torch.randn(*flat.shape[:2], max(1, height // scale), max(1, width // scale))
        flat += nn.functional.interpolate(coarse, (height, width), mode="bilinear") / 2.0
    return flat.reshape(shape)


def _images(*shape: int) -> Inputs:
    return (_picture(*shape),)


def _clip(frames: int, size: int) -> Inputs:
    return (_picture(1, frames, 3, size, size).transpose(1, 2),)


def _classification() -> list[Case]:
    # The sizes are the smallest that are multiples of the networks' strides and windows, or what they insist on.
    members: dict[str, tuple[int, dict[str, Any]]] = {
        "alexnet": (96, {}),
        "convnext_tiny": (96, {}),
        "densenet121": (96, {}),
        "efficientnet_b0": (96, {}),
        "efficientnet_v2_s": (96, {}),
        "googlenet": (96, {"aux_logits": False, "init_weights": False}),
        "inception_v3": (128, {"aux_logits": False, "init_weights": False}),
        "maxvit_t": (224, {}),
        "mnasnet0_5": (96, {}),
        "mobilenet_v2": (96, {}),
        "mobilenet_v3_small": (96, {}),
        "regnet_x_400mf": (96, {}),
        "regnet_y_400mf": (96, {}),
        "resnet18": (96, {}),
        "resnext50_32x4d": (96, {}),
        "shufflenet_v2_x0_5": (96, {}),
        "squeezenet1_1": (96, {}),
        "swin_t": (96, {}),
        "swin_v2_t": (96, {}),
        "vgg11_bn": (96, {}),
        "vit_b_32": (64, {"image_size": 64}),
        "wide_resnet50_2": (96, {}),
    }
    return [
        Case(
            name, "classification", partial(_vision_model, f".{name}", **arguments), partial(_images, 2, 3, size, size)
        )
        for name, (size, arguments) in members.items()
    ]


def _segmentation() -> list[Case]:
    names = ("fcn_resnet50", "deeplabv3_resnet50", "lraspp_mobilenet_v3_large")
    return [
        Case(
            name,
            "segmentation",
            partial(_vision_model, f"segmentation.{name}", weights_backbone=None),
            partial(_images, 2, 3, 96, 96),
        )
        for name in names
    ]


def _detector(name: str, **arguments: Any) -> nn.Module:
    model = _vision_model(f"detection.{name}", weights_backbone=None, num_classes=11, **arguments)
    # torchvision starts the last layers of heads so that all scores are alike, about 0.01: signal is needed to compare.
    for path, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and not path.startswith("backbone"):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def _detection_inputs(size: int) -> Inputs:
    return ([_picture(3, size, size).sigmoid(), _picture(3, size, size).sigmoid()],)


def _detection() -> list[Case]:
    # Score thresholds of zero: every contender then ranks the same number of scores.
    small = {"min_size": 128, "max_size": 128}
    few = {**small, "box_score_thresh": 0.0, "box_detections_per_img": 8}
    members: dict[str, tuple[int, dict[str, Any]]] = {
        "fasterrcnn_resnet50_fpn": (128, {**small, "box_score_thresh": 0.0}),
        "fasterrcnn_mobilenet_v3_large_320_fpn": (128, {**small, "box_score_thresh": 0.0, "rpn_score_thresh": 0.0}),
        "maskrcnn_resnet50_fpn": (128, few),
        "keypointrcnn_resnet50_fpn": (128, few),
        "retinanet_resnet50_fpn": (128, {**small, "score_thresh": 0.0}),
        "fcos_resnet50_fpn": (128, {**small, "score_thresh": 0.0}),
        "ssd300_vgg16": (300, {"score_thresh": 0.0}),
        "ssdlite320_mobilenet_v3_large": (320, {"score_thresh": 0.0}),
    }
    return [
        Case(name, "detection", partial(_detector, name, **arguments), partial(_detection_inputs, size), SCORES)
        for name, (size, arguments) in members.items()
    ]


def _video() -> list[Case]:
    members: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
        "r3d_18": ((4, 64), {}),
        "mc3_18": ((4, 64), {}),
        "r2plus1d_18": ((4, 64), {}),
        "s3d": ((16, 224), {}),
        "mvit_v1_b": ((16, 224), {}),
        "mvit_v2_s": ((16, 224), {}),
        "swin3d_t": ((4, 64), {}),
    }
    return [
        Case(
            name,
            "video",
            partial(_vision_model, f"video.{name}", **arguments),
            partial(_clip, frames, size),
        )
        for name, ((frames, size), arguments) in members.items()
    ]


def _image_pair() -> Inputs:
    return (_picture(1, 3, 128, 128).tanh(), _picture(1, 3, 128, 128).tanh())


def _optical_flow() -> list[Case]:
    builder = partial(_vision_model, "optical_flow.raft_small")
    return [Case("raft_small", "optical_flow", builder, _image_pair)]


# ------------------------------------------------------------------------------
# transformers
# ------------------------------------------------------------------------------

_VOCABULARY = 500
_WIDE = 64


def _transformer(name: str, config: str, part: str, arguments: dict[str, Any]) -> nn.Module:
    transformers = importlib.import_module("transformers")
    model: nn.Module = getattr(transformers, name)(getattr(transformers, config)(**arguments))
    return model.get_submodule(part).eval()


def _tokens(sequence: int = 24) -> Inputs:
    mask = torch.ones(2, sequence, dtype=torch.int64)
    mask[1, -sequence // 4 :] = 0  # The second text is shorter.
    return {"input_ids": torch.randint(5, _VOCABULARY, (2, sequence)), "attention_mask": mask}


def _pixels(size: int = 64) -> Inputs:
    return {"pixel_values": _picture(2, 3, size, size)}


def _named(name: str, *shape: int) -> Inputs:
    values: Tensor = torch.randn(shape)
    return {name: values}


def _transformers() -> list[Case]:
    bert: dict[str, Any] = {
        "vocab_size": _VOCABULARY,
        "hidden_size": _WIDE,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 4 * _WIDE,
    }
    llama = {**bert, "num_key_value_heads": 2, "max_position_embeddings": 128, "use_cache": False}
    gpt = {"vocab_size": _VOCABULARY, "n_embd": _WIDE, "n_layer": 2, "n_head": 4, "use_cache": False}
    gpt |= {"bos_token_id": 1, "eos_token_id": 2}
    t5 = {"vocab_size": _VOCABULARY, "d_model": _WIDE, "d_kv": 16, "d_ff": 4 * _WIDE, "num_layers": 2, "num_heads": 4}
    vit = {key: value for key, value in bert.items() if key != "vocab_size"}
    vit |= {"image_size": 64, "patch_size": 8}
    opt = {
        "vocab_size": _VOCABULARY,
        "hidden_size": _WIDE,
        "word_embed_proj_dim": _WIDE,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 4 * _WIDE,
        "max_position_embeddings": 128,
        "use_cache": False,
    }
    wav2vec2 = {
        **bert,
        "conv_dim": (32, 32, 32),
        "conv_stride": (5, 2, 2),
        "conv_kernel": (10, 3, 2),
        "num_feat_extract_layers": 3,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
    }
    whisper = {
        "vocab_size": _VOCABULARY,
        "d_model": _WIDE,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 4 * _WIDE,
        "decoder_ffn_dim": 4 * _WIDE,
        "max_source_positions": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
    }
    resnet = {"embedding_size": 32, "hidden_sizes": [32, 64, 96, 128], "depths": [1, 1, 1, 1]}
    segformer = {"hidden_sizes": [16, 32, 64, 96], "depths": [1, 1, 1, 1], "decoder_hidden_size": 64}
    # (table name, model class, config class, submodule or "", config, inputs)
    members: list[tuple[str, str, str, str, dict[str, Any], Callable[[], Inputs]]] = [
        ("bert", "BertModel", "BertConfig", "", bert, _tokens),
        (
            "distilbert",
            "DistilBertModel",
            "DistilBertConfig",
            "",
            {"vocab_size": _VOCABULARY, "dim": _WIDE, "n_layers": 2, "n_heads": 4, "hidden_dim": 4 * _WIDE},
            _tokens,
        ),
        ("roberta", "RobertaModel", "RobertaConfig", "", bert, _tokens),
        ("gpt2", "GPT2LMHeadModel", "GPT2Config", "", gpt, _tokens),
        ("llama", "LlamaForCausalLM", "LlamaConfig", "", llama, _tokens),
        ("t5_encoder", "T5EncoderModel", "T5Config", "", t5, _tokens),
        ("vit", "ViTModel", "ViTConfig", "", vit, _pixels),
        ("wav2vec2", "Wav2Vec2Model", "Wav2Vec2Config", "", wav2vec2, partial(_named, "input_values", 2, 2000)),
        (
            "whisper_encoder",
            "WhisperModel",
            "WhisperConfig",
            "encoder",
            whisper,
            partial(_named, "input_features", 2, 80, 128),
        ),
        ("clip_vision", "CLIPVisionModel", "CLIPVisionConfig", "", vit, _pixels),
        ("resnet_hf", "ResNetForImageClassification", "ResNetConfig", "", resnet, _pixels),
        ("segformer", "SegformerForSemanticSegmentation", "SegformerConfig", "", segformer, _pixels),
    ]
    others: list[tuple[str, str, str, str, dict[str, Any], Callable[[], Inputs]]] = [
        ("albert", "AlbertModel", "AlbertConfig", "", {**bert, "embedding_size": 32}, _tokens),
        ("electra", "ElectraModel", "ElectraConfig", "", {**bert, "embedding_size": 32}, _tokens),
        ("mpnet", "MPNetModel", "MPNetConfig", "", bert, _tokens),
        ("deberta_v2", "DebertaV2Model", "DebertaV2Config", "", bert, _tokens),
        ("deit", "DeiTModel", "DeiTConfig", "", vit, _pixels),
        ("beit", "BeitModel", "BeitConfig", "", vit, _pixels),
        ("dinov2", "Dinov2Model", "Dinov2Config", "", vit, _pixels),
        (
            "swin_hf",
            "SwinModel",
            "SwinConfig",
            "",
            {"image_size": 64, "embed_dim": 32, "depths": [1, 1, 1], "num_heads": [2, 4, 8], "window_size": 4},
            _pixels,
        ),
        (
            "convnext_hf",
            "ConvNextModel",
            "ConvNextConfig",
            "",
            {"hidden_sizes": [16, 32, 64, 96], "depths": [1, 1, 1, 1]},
            _pixels,
        ),
        ("mobilenet_v2_hf", "MobileNetV2ForImageClassification", "MobileNetV2Config", "", {"image_size": 64}, _pixels),
        ("mistral", "MistralForCausalLM", "MistralConfig", "", {**llama, "head_dim": 16}, _tokens),
        ("qwen2", "Qwen2ForCausalLM", "Qwen2Config", "", llama, _tokens),
        ("gemma", "GemmaForCausalLM", "GemmaConfig", "", {**llama, "head_dim": 16}, _tokens),
        ("opt", "OPTForCausalLM", "OPTConfig", "", opt, _tokens),
        (
            "bloom",
            "BloomForCausalLM",
            "BloomConfig",
            "",
            {"vocab_size": _VOCABULARY, "hidden_size": _WIDE, "n_layer": 2, "n_head": 4, "use_cache": False},
            _tokens,
        ),
        ("gpt_neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", "", {**bert, "use_cache": False}, _tokens),
        ("hubert", "HubertModel", "HubertConfig", "", wav2vec2, partial(_named, "input_values", 2, 2000)),
    ]
    return [
        Case(name, family, partial(_transformer, model, config, part, arguments), inputs)
        for family, rows in (("transformers", members), ("other_transformers", others))
        for name, model, config, part, arguments, inputs in rows
    ]


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        *_classification(),
        *_segmentation(),
        *_detection(),
        *_video(),
        *_optical_flow(),
        *_transformers(),
    )
}

FAMILIES = tuple(dict.fromkeys(case.family for case in CASES.values()))
