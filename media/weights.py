"""Weights to share: one .safetensors file with the half-precision weights of one or more models.

The config of each model stands as JSON in its metadata; the caller tells which classes the models have. Files
of the older format semo-1 are converted at load.
"""
import functools
import json
import os
import re
import threading
from contextlib import contextmanager, suppress
from dataclasses import asdict

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.modules.module import register_module_parameter_registration_hook

from media.files import InputError, atomic_write

HUB_FILE = "semo.safetensors"            # name of the weights in a repository of the model hub
HUB_SECONDS = 8                          # in which the hub has to answer
# What format semo-1 called otherwise, {kind: {old: new}}: parts of the weights' names; fields of the configs.
SEMO_1_NAMES = {
    "encoder": {"thumb": "token_init.patch_summary", "sketch": "token_init.project",
                "standardise": "running_norm"},
    "decoder": {"under": "ref_patch_embed", "change": "motion_delta.project", "spread": "motion_delta.mix",
                "slot": "motion_pos_embed", "role": "segment_embed", "still": "ref_condition",
                "pose": "affine_head"},
    "generator": {"hear": "cross_attn_audio", "silence": "null_audio", "role": "segment_embed"},
}
SEMO_1_FIELDS = {"encoder": {"thumb": "token_init"}, "decoder": {"expand": "tokens_per_motion"},
                 "generator": {"ahead": "lookahead"}}


def convert_semo_1(weights, configs):
    """Rename weights {"kind.name": tensor} and configs {kind: {field: value}} of format semo-1."""
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


def save_weights(path, models, meta):
    """Write models {"encoder": ..., "decoder": ..., ...}, each with a `config`, and meta, plain JSON values.

    Vectors, such as biases, stay in fp32.
    """
    weights = {}
    for kind, model in models.items():
        for name, value in model.state_dict().items():
            value = value.detach().cpu().to(torch.float16 if value.ndim > 1 else torch.float32)
            weights[f"{kind}.{name}"] = value.contiguous()
    configs = {kind: asdict(model.config) for kind, model in models.items()}
    meta = {**meta, "format": "semo-2", "configs": configs}
    with atomic_write(path, make_folder=True) as temporary:
        save_file(weights, temporary, metadata={"semo": json.dumps(meta)})


def check_config(path, kind, config, weights):
    """Refuse numbers that no network of these weights {name: tensor} can have. Raises InputError."""
    largest = {"image_size": 4096, "depth": len(weights)}
    for field, value in config.items():
        number = isinstance(value, (int, float)) and 0 <= value <= largest.get(field, 2**16)
        if not (number or isinstance(value, (bool, str))):
            raise InputError(f"{path}: the {kind}'s {field} is {value!r}, which cannot be; it is damaged")


@contextmanager
def limit_size(count):
    """Raise MemoryError when the networks built within have more than `count` parameters, before the memory
    is used: a damaged config may ask for any size. (To build on the meta device imports torch._dynamo: 2 s.)
    """
    def check(module, name, parameter):
        nonlocal count
        count -= 0 if parameter is None else parameter.numel()
        if count < 0:
            raise MemoryError

    hook = register_module_parameter_registration_hook(check)
    try:
        yield
    finally:
        hook.remove()


def load_weights(path, classes, device="cpu"):
    """Read a file -> ({kind: model in eval mode}, meta). Raises InputError if it does not hold sound weights.

    classes: {kind: (class of the model, class of its config)} of all kinds that may be in it.
    """
    try:
        with safe_open(path, framework="pt") as f:
            meta = json.loads((f.metadata() or {}).get("semo", "null"))
            weights = {name: f.get_tensor(name) for name in f.keys()} if meta else {}
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({str(error).splitlines()[0]}); "
                         "give SeMo weights such as weights/semo-tiny.safetensors") from error
    if not isinstance(meta, dict) or meta.get("format") not in ("semo-1", "semo-2"):
        raise InputError(f"{path}: a safetensors file, but not SeMo weights; train_ae.py and train_gen.py "
                         "write those")
    configs = meta.pop("configs", {})
    if not isinstance(configs, dict) or not all(isinstance(config, dict) for config in configs.values()):
        raise InputError(f"{path}: its configs are damaged; copy the file again")
    if meta["format"] == "semo-1":
        weights, configs = convert_semo_1(weights, configs)
        meta["format"] = "semo-2"
    bad = [name for name, value in weights.items() if not value.float().isfinite().all()]
    if bad:
        raise InputError(f"{path}: {len(bad)} weights hold NaN or infinity, first {bad[0]}; the file is "
                         "damaged or badly trained")
    models = {}
    for kind, config in configs.items():
        state = {name.removeprefix(f"{kind}."): value.float() for name, value in weights.items()
                 if name.startswith(f"{kind}.")}
        check_config(path, kind, config, state)
        try:
            model_class, config_class = classes[kind]
            with limit_size(sum(value.numel() for value in state.values())):
                model = model_class(config_class(**config))
        except MemoryError:
            raise InputError(f"{path}: the {kind}'s weights do not fit its config; the file is "
                             "damaged") from None
        except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            raise InputError(f"{path}: its {kind} was made by another version of SeMo ({error})") from error
        held, needed = ({name: x.shape for name, x in part.items()} for part in (state, model.state_dict()))
        if differing := held.items() ^ needed.items():
            raise InputError(f"{path}: the {kind}'s weights do not fit its config (first "
                             f"{min(name for name, _ in differing)}); the file is damaged")
        model.load_state_dict(state)
        models[kind] = model.to(device).eval()
    return models, meta


@functools.cache
def hub_answers():
    """Ask whether the model hub answers anything at all, by the proxy or mirror that is set.

    Without this its library tries each file six times, which takes minutes where packets are lost.
    """
    from huggingface_hub import constants, get_session
    answers = []

    def ask():
        with suppress(Exception):                          # of the network, in the words of several libraries
            answers.append(get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS))

    thread = threading.Thread(target=ask, daemon=True)     # the look-up of a name has no limit of its own
    thread.start()
    thread.join(HUB_SECONDS)
    return bool(answers)


def is_local(model):
    """Whether a model, a folder or hub id, is only to be looked for on this machine."""
    return os.path.isdir(model) or not hub_answers()


def resolve(name):
    """A path, or owner/name[@revision] on the model hub -> path of the file. Raises InputError."""
    of_hub = re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", os.fspath(name))
    if os.path.exists(name) or not of_hub or os.fspath(name).endswith(".safetensors"):
        return name
    from huggingface_hub import errors, hf_hub_download
    repository, _, revision = name.partition("@")
    try:
        return hf_hub_download(repository, HUB_FILE, revision=revision or None,
                               local_files_only=not hub_answers())
    except errors.LocalEntryNotFoundError:                        # before its parent class EntryNotFoundError
        raise InputError(f"{name} is no file, is not in the cache of the model hub, and the hub cannot be "
                         "reached; give the path of a .safetensors file") from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError):
        raise InputError(f"{name} is no file, and the model hub has no {HUB_FILE} under this name; give a "
                         "path or owner/name[@revision]") from None
    except Exception as error:                             # of the network, in the words of several libraries
        cause = str(error).splitlines()[0][:120]
        raise InputError(f"{name} cannot be loaded from the model hub ({cause})") from None
