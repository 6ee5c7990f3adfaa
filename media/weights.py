"""Weights to share: one .safetensors file holds what a user needs: half-precision weights of one or more models, and as JSON
in its metadata the config of each. Which classes the models have is told by the caller."""
import json
from dataclasses import asdict

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from media.files import InputError, atomic_write


def save_release(path, models, meta, dtype=torch.float16):
    """models {"encoder": ..., "decoder": ..., maybe "generator": ...}, each with a `config`; meta: plain JSON values."""
    weights = {f"{kind}.{name}": value.detach().cpu().to(dtype if value.ndim > 1 else torch.float32).contiguous()
               for kind, model in models.items() for name, value in model.state_dict().items()}
    about = {"format": "semo-1", "configs": {kind: asdict(model.config) for kind, model in models.items()}, **meta}
    with atomic_write(path, make_folder=True) as temporary:
        save_file(weights, temporary, metadata={"semo": json.dumps(about)})


def load_release(path, classes, device="cpu"):
    """-> ({kind: model in eval mode}, meta). classes: {kind: (class of the model, class of its config)} of all kinds that there are.
    InputError with one clear sentence if the file is not a sound release."""
    try:
        with safe_open(path, framework="pt") as f:
            meta = json.loads((f.metadata() or {}).get("semo", "null"))
            weights = {name: f.get_tensor(name) for name in f.keys()} if meta else {}
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({str(error).splitlines()[0]}); "
                         "give a SeMo release such as weights/semo-tiny.safetensors") from error
    if not isinstance(meta, dict) or meta.get("format") != "semo-1":
        raise InputError(f"{path}: a safetensors file, but not a SeMo release; train_ae.py and train_gen.py write those")
    bad = [name for name, value in weights.items() if not value.isfinite().all()]
    if bad:
        raise InputError(f"{path}: {len(bad)} weights hold NaN or infinity, first {bad[0]}; the file is damaged or badly trained")
    models = {}
    for kind, config in meta.pop("configs", {}).items():
        try:
            make, make_config = classes[kind]
            model = make(make_config(**config))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: its {kind} was made by another version of SeMo ({error})") from error
        own = {name[len(kind) + 1:]: value.float() for name, value in weights.items() if name.startswith(kind + ".")}
        try:
            model.load_state_dict(own)
        except RuntimeError as error:
            raise InputError(f"{path}: the {kind}'s weights do not fit its config ({str(error).splitlines()[-1].strip()})") from error
        models[kind] = model.to(device).eval()
    return models, meta
