"""Weights to share: one .safetensors file with the half-precision weights of one or more models, and as JSON
in its metadata the config of each. The caller tells which classes the models have. Files of the older format
semo-1 are converted at load."""
import json
import os
import re
from dataclasses import asdict

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from media.files import InputError, atomic_write

HUB_FILE = "semo.safetensors"            # name of the weights in a repository of the model hub
# What format semo-1 called otherwise, {kind: {old: new}}: parts of the weights' names, and fields of the
# configs.
SEMO_1_NAMES = {
    "encoder": {"thumb": "token_init.patch_summary", "sketch": "token_init.project",
                "standardise": "running_norm"},
    "decoder": {"under": "ref_patch_embed", "change": "motion_delta.project", "spread": "motion_delta.mix",
                "slot": "motion_pos_embed",
                "role": "segment_embed", "still": "ref_condition", "pose": "affine_head"},
    "generator": {"hear": "cross_attn_audio", "silence": "null_audio", "role": "segment_embed"},
}
SEMO_1_FIELDS = {"encoder": {"thumb": "token_init"}, "decoder": {"expand": "tokens_per_motion"},
                 "generator": {"ahead": "lookahead"}}


def convert_semo_1(weights, configs):
    """Rename the weights {"kind.name": tensor} and configs {kind: {field: value}} of format semo-1 to today's
    names."""
    def renamed(name):
        kind, *parts = name.split(".")
        names = SEMO_1_NAMES.get(kind, {})
        if kind == "generator":
            names = {**names, "recall": "cross_attn_ref" if parts[0] == "blocks" else "ref_embed"}
        return ".".join([kind, *(names.get(part, part) for part in parts)])

    weights = {renamed(name): value for name, value in weights.items()}
    configs = {kind: {SEMO_1_FIELDS.get(kind, {}).get(field, field): value for field, value in config.items()}
               for kind, config in configs.items()}
    if "decoder" in configs:                                   # one displacement for each 8 pixels of a patch
        configs["decoder"]["warp_grid"] = max(1, configs["decoder"].get("patch_size", 16) // 8)
    return weights, configs


def save_weights(path, models, meta, dtype=torch.float16):
    """models {"encoder": ..., "decoder": ..., maybe "generator": ...}, each with a `config`; meta: plain JSON
    values."""
    weights = {f"{kind}.{name}": value.detach().cpu().to(dtype if value.ndim > 1
                                                         else torch.float32).contiguous()
               for kind, model in models.items() for name, value in model.state_dict().items()}
    meta = {**meta, "format": "semo-2",
            "configs": {kind: asdict(model.config) for kind, model in models.items()}}
    with atomic_write(path, make_folder=True) as temporary:
        save_file(weights, temporary, metadata={"semo": json.dumps(meta)})


def check_config(path, kind, config, weights):
    """Refuse numbers that no network of these weights {name: tensor} can have, before one is built of them:
    InputError."""
    largest = {"image_size": 4096, "depth": len(weights)}
    for field, value in config.items():
        most = largest.get(field, 2**16)
        if not isinstance(value, (bool, str)) and not (isinstance(value, (int, float))
                                                       and 0 <= value <= most):
            raise InputError(f"{path}: the {kind}'s {field} is {value!r}, which cannot be; the file is "
                             f"damaged")


def load_weights(path, classes, device="cpu"):
    """-> ({kind: model in eval mode}, meta). classes: {kind: (class of the model, class of its config)} of
    all kinds. InputError with one clear sentence if the file does not hold sound weights."""
    try:
        with safe_open(path, framework="pt") as f:
            meta = json.loads((f.metadata() or {}).get("semo", "null"))
            weights = {name: f.get_tensor(name) for name in f.keys()} if meta else {}
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({str(error).splitlines()[0]}); "
                         "give SeMo weights such as weights/semo-tiny.safetensors") from error
    if not isinstance(meta, dict) or meta.get("format") not in ("semo-1", "semo-2"):
        raise InputError(f"{path}: a safetensors file, but not SeMo weights; train_ae.py and train_gen.py "
                         f"write those")
    configs = meta.pop("configs", {})
    if not isinstance(configs, dict) or not all(isinstance(config, dict) for config in configs.values()):
        raise InputError(f"{path}: its configs are damaged; copy the file again")
    if meta["format"] == "semo-1":
        weights, configs = convert_semo_1(weights, configs)
        meta["format"] = "semo-2"
    bad = [name for name, value in weights.items() if not value.isfinite().all()]
    if bad:
        raise InputError(f"{path}: {len(bad)} weights hold NaN or infinity, first {bad[0]}; the file is "
                         f"damaged or badly trained")
    models = {}
    for kind, config in configs.items():
        own = {name[len(kind) + 1:]: value for name, value in weights.items() if name.startswith(kind + ".")}
        check_config(path, kind, config, own)
        try:
            make, make_config = classes[kind]
            with torch.device("meta"):                            # sizes alone: they may be damaged
                sizes = {name: value.shape for name,
                         value in make(make_config(**config)).state_dict().items()}
            if sizes == {name: value.shape for name, value in own.items()}:
                model = make(make_config(**config))
            else:
                wrong = sorted(name for name in sizes.keys() | own.keys() if name not in own
                               or own[name].shape != sizes.get(name))
                raise InputError(f"{path}: the {kind}'s weights do not fit its config (first {wrong[0]}); "
                                 f"the file is damaged")
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            raise InputError(f"{path}: its {kind} was made by another version of SeMo ({error})") from error
        try:
            model.load_state_dict({name: value.float() for name, value in own.items()})
        except RuntimeError as error:
            raise InputError(f"{path}: the {kind}'s weights do not fit its config "
                             f"({str(error).splitlines()[-1].strip()})") from error
        models[kind] = model.to(device).eval()
    return models, meta


def resolve(name):
    """A path, or owner/name[@revision] on the model hub -> path of the file. Raises InputError in one
    sentence."""
    of_hub = re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", os.fspath(name))
    if os.path.exists(name) or not of_hub or os.fspath(name).endswith(".safetensors"):
        return name
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError:
        raise InputError(f"{name} is no file, and to load it from the model hub: pip install "
                         f"huggingface_hub") from None
    repository, _, revision = name.partition("@")
    try:
        return hf_hub_download(repository, HUB_FILE, revision=revision or None)
    except LocalEntryNotFoundError:                               # before its parent class EntryNotFoundError
        raise InputError(f"{name} is no file, is not in the cache of the model hub, and the hub cannot be "
                         f"reached; give the "
                         "path of a .safetensors file") from None
    except RepositoryNotFoundError:
        raise InputError(f"{name} is no file and the model hub has no {repository}; give a path "
                         f"or owner/name") from None
    except RevisionNotFoundError:
        raise InputError(f"{repository} on the model hub has no revision {revision}") from None
    except EntryNotFoundError:
        raise InputError(f"{repository} on the model hub holds no {HUB_FILE}") from None
    except Exception as error:                             # of the network, in the words of several libraries
        raise InputError(f"{name} cannot be loaded from the model hub "
                         f"({str(error).splitlines()[0][:120]})") from None
