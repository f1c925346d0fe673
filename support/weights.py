"""Weights that other programs wrote."""
import argparse
from pathlib import Path

import torch
import torchvision

from support.console import UserError, explained


def load_weights(net, source, trunk):
    """Copy into `net` all tensors of `source` that fit by name and shape.  Returns a summary.

    source    "imagenet": torchvision's weights of the network that is called `trunk` there (None:
              it has none).  Or a file by any program, or a run's folder.  A file may hold several
              dicts of tensors, and the names may begin with a prefix such as "module.".  We take
              the dict and the prefix with which most tensors fit; on a tie, the first of them.

    Raises UserError for what cannot be read or does not fit.
    """
    own = net.state_dict()

    def fitting(prefix, tensors):
        return {key: tensors[prefix + key] for key in own
                if prefix + key in tensors and tensors[prefix + key].shape == own[key].shape}

    # The name "a.b.weight" may begin with the prefix "", "a." or "a.b.".
    choices = [(place, prefix, tensors)
               for place, tensors in tensor_dicts(read_weights(source, trunk))
               for prefix in dict.fromkeys(key[:end] for key in tensors
                                           for end, last in enumerate("." + key) if last == ".")]
    place, prefix, tensors = max(choices, key=lambda choice: len(fitting(*choice[1:])),
                                 default=("", "", {}))
    if any(".se_module." in key for key in tensors):        # Cadene's, timm's legacy_seresnet50
        raise UserError(f"{source} holds another SE network, which strides in another convolution "
                        "and pools otherwise: shapes would fit, and answers be wrong; give weights "
                        "of timm's seresnet50 or of torchvision's resnet50")
    taken = fitting(prefix, tensors)
    if not any(tensor.dim() for tensor in taken.values()):      # a mere counter fits any network
        raise UserError(f"no tensor of {source} fits this network in name and shape; give the "
                        "weights of a similar network")
    net.load_state_dict(taken, strict=False)

    new = [key for key in own if key not in taken]
    unused = [key for key in (key.removeprefix(prefix) for key in tensors) if key not in taken]
    found = [f"{len(taken)} tensors taken from {source}", place]
    found += [f"names after {prefix}"] if prefix else []
    if lost := sum(".gate." in key for key in unused):
        found.insert(0, f"{lost} tensors of trained gates fit none of this network's")
    return (f"weights: {', '.join(filter(None, found))}; new: {len(new)} {new[:3]}; "
            f"unused: {len(unused)} {unused[:3]}")


def tensor_dicts(content, place=""):
    """Yield (place, dict) for each dict in a checkpoint that holds tensors by name.

    timm's gates have the names of ours in them, and are made of 1x1 convolutions (se.fc1, se.fc2).
    """
    if isinstance(content, dict):
        tensors = {key.replace("_orig_mod.", ""): value for key, value in content.items()
                   if isinstance(key, str) and torch.is_tensor(value)}      # of a compiled module
        if tensors:
            yield place, {
                key.replace(".se.fc1.", ".gate.reduce.").replace(".se.fc2.", ".gate.expand."):
                value.flatten(1) if ".se.fc" in key and value.dim() == 4 else value
                for key, value in tensors.items()}
            if any(".se.fc" in key for key in tensors):
                yield place, tensors        # a gate of one's own may hold an "se", too
        for key, value in content.items():
            yield from tensor_dicts(value, f"{place}[{key!r}]")


def read_weights(source, trunk):
    """What a file of weights holds, or torchvision's weights of a network."""
    path = Path(source, "last.pt") if Path(source).is_dir() else Path(source)
    problem = f"{path} holds no weights that can be read"
    advice = ("give a file made by torch.save(net.state_dict(), path): no whole pickled network, "
              "and no other objects beside the tensors")
    if source == "imagenet":
        if trunk is None:
            raise UserError("torchvision has no weights of this network in this size; leave "
                            "--weights out")
        problem = f"torchvision's weights of {trunk} are not on this disk and cannot be downloaded"
        with explained(problem, "leave --weights out, or give a file"):
            weights = torchvision.models.get_model_weights(trunk).DEFAULT
            return weights.get_state_dict(check_hash=True)
    if not path.exists():
        raise UserError(f"there is no file {path}; --weights takes imagenet, a file, or the folder "
                        "of a run")
    if path.suffix == ".safetensors":
        with explained(problem, "install the package safetensors, or, if it is there, fetch the "
                       "file again"):
            from safetensors.torch import load_file
            return load_file(path)

    # torchvision's own training script stores its command line beside the weights
    with explained(problem, advice), torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)          # cannot run code
