"""The weights that a run starts from: of another run, of a file, of torchvision.

Arrays have names: `params/` or `state/` (BatchNorm's running statistics) and the path
of the leaf, as `params/conv1/kernel`. All of them must be there with the shapes of the
network, and no others: but for the classifier, `params/head/...`, which is drawn anew
where the number of classes differs.
"""

import contextlib
import dataclasses
import hashlib
import pathlib
import pickle
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from otmdr_jax import models, parallel
from otmdr_jax.baselines import dst
from otmdr_jax.core import tree
from otmdr_jax.data import Dataset
from otmdr_jax.experiments import building, members, patterns, run_folder
from otmdr_jax.experiments import own as own_lib
from otmdr_jax.experiments.config import TrainConfig
from otmdr_jax.experiments.methods import weights_of, with_weights
from otmdr_jax.experiments.own import NOTHING, Own
from otmdr_jax.experiments.programs import DataInfo, Programs, compile_programs
from otmdr_jax.io import extras, files
from otmdr_jax.models.own import GIVEN
from otmdr_jax.models.torchvision import classes_of

PyTree = Any
# Arrays by their names.
Arrays = Mapping[str, Any]

HEAD = "params/head/"
SUFFIXES = (".safetensors", ".npz", ".pth", ".pt")
# The last parts of names that PyTorch's modules have, and ours have not.
_TORCHS = re.compile(r".*\.(weight|running_mean|running_var|num_batches_tracked)")


class Start(NamedTuple):
    """Weights to start from.

    Attributes:
      weights: (params, statistics) of each member, with None where a leaf is drawn
        anew.
      record: What the run's folder keeps: `init_from`, its `step` where it is a run,
        the `checksum` of its arrays, how many are `taken` and which are `drawn`.
      line: The same in one line, for people.
    """

    weights: list[tuple[PyTree, PyTree]]
    record: dict[str, Any]
    line: str


def read(
    config: TrainConfig,
    dataset: Dataset,
    mesh: Mesh | None = None,
    own: Own = NOTHING,
) -> Start | None:
    """Reads the weights that a configuration starts from, and fits them to its network.

    Args:
      config: Its `init_from` is a run's folder, a file, or None.
      dataset: The data, for their number of classes and the shape of their images.
      mesh: The devices of the new run, which may be those of several hosts.
      own: What the run was given in Python.

    Returns:
      None where a run starts from random weights.

    Raises:
      FileNotFoundError: There is no such folder or file, or no checkpoint in it.
      ValueError: The weights are of another network, or not finite; a run is an
        ensemble of another size.
      ImportError: PyTorch, or safetensors, which reads the file, is not installed.
    """
    if config.model.init_from is None:
        return None
    path = pathlib.Path(config.model.init_from)
    networks = _networks(config, dataset.num_classes, own)
    shapes = [building.shapes_of(one, dataset.image_shape) for one in networks]
    step = None
    if path.is_dir():
        found, step = _of_run(path, mesh, own)
    else:
        arrays = _of_file(path)
        pairs = list(zip(networks, shapes, strict=True))
        found = [
            _named(arrays, network, shape)
            for network, shape in (pairs[:1] if config.model.stacked else pairs)
        ]
    if len(found) not in (1, len(networks)):
        raise ValueError(
            f"init_from={str(path)!r} is an ensemble of {len(found)} members, whose "
            f"weights are for as many, and this run has {len(networks)}: train with "
            f"--members {len(found)}, or start from a run of one model."
        )
    each = found if len(found) == len(networks) else found * len(networks)
    fitted, drawn = [], []
    for arrays, shape in zip(each, shapes, strict=True):
        weights, anew = _fitted(arrays, shape, path, config.model.new_head)
        fitted.append(weights)
        drawn.append(anew)
    count = len(jax.tree.leaves(shapes[0]))
    checksum = _checksum(found)
    parallel.check_agreement(checksum, f"the weights of {path}")
    record = {
        "init_from": str(path),
        "step": step,
        "checksum": checksum,
        "taken": count - len(drawn[0]),
        "drawn": drawn[0],
    }
    line = _line(path, each[0], dataset.num_classes, count, drawn[0])
    return Start(fitted, record, line)


def put(config: TrainConfig, programs: Programs, state: PyTree, start: Start) -> PyTree:
    """Puts the weights into the state of a run that is about to start.

    Args:
      config: The configuration.
      programs: Its compiled functions.
      state: The state that they give for the run's seed.
      start: From :func:`read`.
    """

    def placed(state, weights):
        params, statistics = weights
        params = with_weights(state.params, params)
        if config.method.is_sparse:
            params = dst.apply(state.opt_state.masks, params)
        statistics = with_weights(state.model_state, statistics)
        return state._replace(params=params, model_state=statistics)

    def all_placed(state, each):
        if config.model.members is None:
            return placed(state, each[0])
        if not config.model.stacked:
            if config.model.joint:
                return placed(state, tuple(zip(*each, strict=True)))
            return tuple(map(placed, state, each))
        joined = tree.stack(each)
        return (placed if config.model.joint else jax.vmap(placed))(state, joined)

    homes = jax.tree.map(lambda x: x.sharding, state)
    weights = parallel.place(start.weights, programs.mesh)
    return jax.jit(all_placed, out_shardings=homes)(state, weights)


# --- reading ------------------------------------------------------------------------


def _networks(config: TrainConfig, num_classes: int, own: Own) -> list[Any]:
    """The network of each member."""
    found = building.networks(config, num_classes, drops=False, own=own)
    if isinstance(found[0], members.JointModel):
        found = found[0].models
    count = len(config.model.member_names)
    return list(found) * count if len(found) < count else list(found)


def _of_run(
    folder: pathlib.Path, mesh: Mesh | None, own: Own
) -> tuple[list[Arrays], int]:
    """The arrays of each member of a run at its latest checkpoint, and the step."""
    from otmdr_jax.experiments import checkpoint, restore  # need Orbax

    config = run_folder.read_config(folder).replace(mesh=None)
    known = run_folder.read_data(folder)
    if known is None:
        raise ValueError(
            f"init_from={str(folder)!r} is a run of a version that did not record its "
            "data, which say of what shape its weights are: train it anew."
        )
    channels = known["image_shape"][-1]
    unknown = {"mean": [0.0] * channels, "std": [1.0] * channels, "augment": []}
    info = DataInfo.of_record({**unknown, **known})  # older versions kept no mean
    assert info is not None
    mine = NOTHING
    if own.model is not None and config.model.name.startswith(GIVEN):
        own_lib.check_name(config, own)
        mine = own._replace(loss=None)
    programs = compile_programs(config, info, own=mine)
    shapes = restore.template(config, programs)
    if mesh is not None:  # each host needs all of it
        whole = parallel.replicated(mesh)
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes
        )
    with checkpoint.Checkpoints(folder / "checkpoints", read_only=True) as saved:
        state = saved.restore(shapes).state
    step = members.steps_taken(state)
    # BatchNorm statistics of averaged weights. Where the run has not come to compute
    # them, those of its last weights must do.
    finished = None
    if not config.method.is_fitted:  # a fitted Gaussian keeps the trained weights
        finished = restore.finished_by_record(folder, step, state, programs)
    each = members.weights(config, state if finished is None else finished)
    return [_flat(weights_of(params), kept) for params, kept in each], step


def _of_file(path: pathlib.Path) -> Arrays:
    """The arrays of a file by the names that it gives them."""
    if path.suffix not in SUFFIXES or not path.is_file():
        raise FileNotFoundError(
            "init_from must be the folder of a run, or a file of arrays that ends in "
            f"{', '.join(SUFFIXES)}; got {str(path)!r}, "
            + ("of another kind." if path.exists() else "where there is none.")
        )
    if path.suffix == ".npz":
        # np.load of a path leaves the file open where it is torn.
        with (
            _reading(path),
            path.open("rb") as raw,
            np.load(raw, allow_pickle=False) as file,
        ):
            names = [name for name in file.files if name != "metadata"]
            return {name: file[name] for name in names}
    if path.suffix == ".safetensors":
        try:
            from safetensors import SafetensorError
            from safetensors.flax import load_file
        except ImportError as error:
            raise ImportError(
                f"{path} is read by safetensors, which is not installed. "
                + extras.command("train")
            ) from error
        with _reading(path, SafetensorError):
            return load_file(path)
    return _of_pytorch(path)


@contextlib.contextmanager
def _reading(path, *errors):
    try:
        yield
    except (*files.UNREADABLE, *errors) as error:
        raise ValueError(
            f"init_from {str(path)!r} cannot be read as arrays ({error}): copy the "
            "file again."
        ) from error


def _of_pytorch(path: pathlib.Path) -> Arrays:
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{path} is read by PyTorch, which is not installed: pip install torch. Or "
            "make a .safetensors file of it where PyTorch is: "
            "safetensors.torch.save_file(torch.load(path), 'weights.safetensors')."
        ) from error
    with _reading(path, RuntimeError, pickle.UnpicklingError):
        found = torch.load(path, map_location="cpu", weights_only=True)
    tensors = isinstance(found, Mapping) and found.values()
    if not tensors or not all(isinstance(x, torch.Tensor) for x in tensors):
        raise ValueError(
            f"{path} must hold a state dict, names of tensors, as torchvision's files "
            f"do; got a {type(found).__name__}"
            + (f" of {', '.join(list(map(str, found))[:5])}" if tensors else "")
            + ". Save what is meant: torch.save(module.state_dict(), path)."
        )
    return {  # NumPy has no bfloat16
        name: (x.float() if x.is_floating_point() else x).numpy()
        for name, x in found.items()
    }


def _named(arrays: Arrays, network: Any, shapes: PyTree) -> Arrays:
    """The arrays of a file by our names."""
    ours = _flat(*shapes)

    def name_of(name):
        for candidate in (name, name.replace(".", "/")):
            for prefix in ("", "params/", "state/"):
                if prefix + candidate in ours:
                    return prefix + candidate
        return name

    named = {name_of(name): x for name, x in arrays.items()}
    if len(named) < len(arrays):
        raise ValueError(
            "the names of two arrays are one, but for '.', '/' or a prefix."
        )
    torchs = isinstance(network, models.Model) and any(map(_TORCHS.fullmatch, arrays))
    if not torchs or ours.keys() & named.keys():
        return named
    theirs = dataclasses.replace(network, num_classes=classes_of(network, arrays))
    return _flat(*models.from_torchvision(theirs, arrays))


def _flat(params: PyTree, statistics: PyTree) -> Arrays:
    """Both by name."""
    both = {"params": params, "state": statistics}
    return dict(zip(patterns.names(both), jax.tree.leaves(both), strict=True))


# --- fitting ------------------------------------------------------------------------


def _fitted(
    arrays: Arrays, shapes: PyTree, path: pathlib.Path, new_head: bool
) -> tuple[tuple[PyTree, PyTree], list[str]]:
    """The arrays in the place of the network's leaves, and the names of the others."""
    wanted = _flat(*shapes)
    head = [name for name in wanted if name.startswith(HEAD)]
    if new_head and not head:
        raise ValueError(
            "new_head draws the classifier anew, the layer `head`, and the network has "
            f"none: its parameters are {', '.join(wanted)}."
        )
    differs = any(
        name in arrays and _other_classes(np.shape(arrays[name]), wanted[name].shape)
        for name in head
    )
    drawn = head if new_head or differs else []
    problems = [
        f"{name} is missing"
        if name not in arrays
        else f"{name} is {tuple(np.shape(arrays[name]))} there, {leaf.shape} here"
        for name, leaf in wanted.items()
        if name not in drawn
        and (name not in arrays or np.shape(arrays[name]) != leaf.shape)
    ]
    problems += [f"{name} is of no use here" for name in arrays.keys() - wanted.keys()]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"the weights of init_from={str(path)!r} do not fit: "
            f"{'; '.join(problems[:5])}{more}. The model, its options, and the "
            "channels of the images must be those that they were trained with; only a "
            "classifier called `head` may have other classes."
        )
    taken = {name: arrays[name] for name in wanted if name not in drawn}
    for name, array in taken.items():
        floats = jnp.issubdtype(wanted[name].dtype, jnp.floating)
        if floats != jnp.issubdtype(array.dtype, jnp.floating):
            kind = "floating" if floats else "integers"
            raise ValueError(
                f"{name} of init_from={str(path)!r} must be {kind}, got {array.dtype}."
            )
        if not np.all(np.isfinite(np.asarray(array, np.float32))):
            raise ValueError(
                f"{name} of init_from={str(path)!r} is not finite: that training has "
                "diverged. Start from other weights."
            )
    leaves = [
        None if name in drawn else np.asarray(taken[name], leaf.dtype)
        for name, leaf in wanted.items()
    ]
    both = jax.tree.unflatten(
        jax.tree.structure({"params": shapes[0], "state": shapes[1]}), leaves
    )
    return (both["params"], both["state"]), drawn


def _other_classes(there: Sequence[int], here: Sequence[int]) -> bool:
    """Whether two shapes of a classifier's array differ in the number of classes."""
    same = len(there) == len(here) and tuple(there[:-1]) == tuple(here[:-1])
    return same and there[-1] != here[-1]


def _checksum(found: Sequence[Arrays]) -> str:
    """Of the names, shapes and values, in whatever file they are."""
    total = hashlib.sha256()
    for arrays in found:
        for name in sorted(arrays):
            array = np.asarray(arrays[name], np.float32)
            total.update(f"{name}{array.shape}".encode())
            total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def _line(
    path: pathlib.Path, arrays: Arrays, num_classes: int, count: int, drawn: list[str]
) -> str:
    taken = f"{count - len(drawn)} of {count} arrays are taken"
    if not drawn:
        return f"starts from {path}: all {count} arrays are taken"
    known = [np.shape(x)[-1] for name, x in arrays.items() if name.startswith(HEAD)]
    theirs = f"{known[0]} classes" if known else "none"
    return f"head: {theirs} in {path}, {num_classes} here: drawn anew; {taken}"
