"""A trained run as a file for others: its weights by name, or its prediction.

Neither needs this library to be read. Weights are arrays by their paths, as
"params/conv1/kernel", in a safetensors or an .npz file; the prediction is a program
that `jax.export` made for CPUs, CUDA GPUs and TPUs.
"""

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from otmdr_jax import bnn
from otmdr_jax._version import __version__
from otmdr_jax.experiments import members
from otmdr_jax.experiments.methods import weights_of
from otmdr_jax.experiments.trained_run import TrainedRun
from otmdr_jax.io import extras, files

PyTree = Any

# A format -> the ending of its files.
FORMATS = {"safetensors": ".safetensors", "npz": ".npz", "stablehlo": ".stablehlo"}
PLATFORMS = ("cpu", "cuda", "tpu")


def export(
    run: TrainedRun,
    path: str | os.PathLike,
    format: str | None = None,
    *,
    platforms: Sequence[str] = PLATFORMS,
    batch_size: int | None = None,
    overwrite: bool = False,
) -> pathlib.Path:
    """Writes a run's weights, or its prediction, into a file.

    Args:
      run: The run, from :func:`otmdr_jax.open_run`.
      path: The file.
      format: "safetensors" or "npz", for :func:`arrays` and :func:`metadata`;
        "stablehlo", for :func:`program`, with the metadata in a .json beside it. None
        goes by the ending of the path.
      platforms: What a program is for: some of "cpu", "cuda", "rocm", "tpu".
      batch_size: How many images a program takes; None for any number.
      overwrite: Whether to replace a file.

    Returns:
      The path.

    Raises:
      ValueError: The format is unknown, or options are of another one.
      FileExistsError: The file is there.
      ImportError: A package that writes the format is missing.
    """
    path = pathlib.Path(path)
    if format is None:
        format = {end: name for name, end in FORMATS.items()}.get(path.suffix)
    if format not in FORMATS:
        raise ValueError(
            f"format must be one of {', '.join(FORMATS)}, or follow from the ending of "
            f"the file, got {format!r} and {path.name!r}."
        )
    if format != "stablehlo":
        for name, value, default in (
            ("platforms", tuple(platforms), PLATFORMS),
            ("batch_size", batch_size, None),
        ):
            if value != default:
                raise ValueError(
                    f"{name}={value!r} is of the format stablehlo: leave it out, since "
                    f"{format} holds weights and no program."
                )
    beside = path.with_suffix(".json") if format == "stablehlo" else None
    if path == beside:
        raise ValueError(
            f"{path} must have another ending than .json: the program's description "
            "goes beside it, into that file."
        )
    files.check_writable(path.parent)
    for file in filter(None, (path, beside)):
        if file.exists() and not overwrite:
            raise FileExistsError(
                f"{file} is there: name another file with --output, or replace it with "
                "--overwrite."
            )
    if beside is not None and beside.exists() and not _is_description(beside):
        raise FileExistsError(
            f"{beside} is there and describes no exported program, whose description "
            "would go there: name another file with --output."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    known = metadata(run)
    if format == "stablehlo":
        assert beside is not None
        files.write_bytes(path, program(run, platforms, batch_size))
        files.write_json(beside, {**known, "platforms": list(platforms)})
    elif format == "npz":
        found = {**arrays(run), "metadata": np.asarray(json.dumps(known))}
        files.write_arrays(path, found)
    else:
        save = _safetensors()
        text = {name: json.dumps(value) for name, value in known.items()}
        files.write_bytes(path, save(arrays(run), text))
    return path


def _is_description(path: pathlib.Path) -> bool:
    """Whether a file is what an earlier export wrote beside its program."""
    try:
        return {"platforms", "image_shape", "classes"} <= set(files.read_json(path))
    except files.UNREADABLE:
        return False


def arrays(run: TrainedRun) -> dict[str, np.ndarray]:
    """A run's weights by their paths.

    Args:
      run: The run.

    Returns:
      "params/conv1/kernel" and so on, and BatchNorm's running statistics,
      "state/norm1/mean". A posterior has its mean there, and its standard deviations
      under "std/". An ensemble has these of each member under "members/0/" and so on;
      one of runs that collect copies has those of its first run first.

    Example:
      >>> import tempfile, otmdr_jax
      >>> from otmdr_jax import training
      >>> from otmdr_jax.experiments import export
      >>> folder = tempfile.mkdtemp() + "/run"
      >>> config = otmdr_jax.config.TrainConfig(method="sam", steps=2)
      >>> _ = training.train(config, output=folder, show_progress=False)
      >>> found = export.arrays(otmdr_jax.open_run(folder))
      >>> sorted(found)[:2], found["params/conv1/kernel"].shape
      (['params/conv1/kernel', 'params/conv2/kernel'], (3, 3, 1, 16))
    """
    each = members.predictors(run.config, run.state)
    found: dict[str, np.ndarray] = {}
    for number, (params, model_state) in enumerate(each):
        own = {"params": weights_of(params), "state": model_state}
        if isinstance(params, bnn.MeanField):
            own["std"] = bnn.std(params)
        prefix = f"members/{number}/" if len(each) > 1 else ""
        for keys, leaf in jax.tree_util.tree_leaves_with_path(own):
            name = jax.tree_util.keystr(keys, simple=True, separator="/")
            found[prefix + name] = np.asarray(leaf)
    return found


def metadata(run: TrainedRun) -> dict[str, Any]:
    """What a file says beside its arrays or its program: how to use it, and whence."""
    info, model = run.info, run.config.model
    return {
        "otmdr_jax": __version__,
        "model": list(model.member_names) if model.members else model.name,
        "method": run.config.method.name,
        "step": run.step,
        "image_shape": list(info.image_shape),
        "dtype": str(info.dtype),
        # An image is (image / scale - mean) / std to the network.
        "scale": 255 if info.dtype == np.uint8 else 1,
        "mean": list(info.mean),
        "std": list(info.std),
        "classes": list(run.class_names),
        "temperature": run.temperature,
        "diverged": list(run.diverged),
    }


def program(
    run: TrainedRun,
    platforms: Sequence[str] = PLATFORMS,
    batch_size: int | None = None,
) -> bytes:
    """The prediction of a run, compiled as far as it can be without a device.

    It takes images as the run was trained on, (N, H, W, C) of their dtype, and gives
    (N, C) float32 probabilities: :meth:`TrainedRun.predict` in float32. The weights are
    in it. `jax.export.deserialize(program).call(images)` runs it where JAX is
    installed, without this library; samples of a posterior are the same ones each time.

    Args:
      run: The run.
      platforms: What it is for.
      batch_size: N; None for any.

    Raises:
      ValueError: An unknown platform; a network that cannot be traced without N.
      ImportError: `flatbuffers` is missing.
    """
    known = ("cpu", "cuda", "rocm", "tpu")
    if not platforms or set(platforms) - set(known):
        raise ValueError(
            f"platforms must be some of {', '.join(known)}, got {', '.join(platforms)}."
        )
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    if extras.version_of("flatbuffers") is None:
        raise ImportError(
            f"programs are written with flatbuffers. {extras.command('train')}"
        )
    from jax import export as jax_export

    size: Any = batch_size
    if batch_size is None:
        (size,) = jax_export.symbolic_shape("n")
    shape = jax.ShapeDtypeStruct((size, *run.info.image_shape), run.info.dtype)
    try:
        exported = jax_export.export(
            jax.jit(_prediction(run)), platforms=tuple(platforms)
        )(shape)
    except Exception as error:  # what a symbol in its place runs into, is the network's
        if batch_size is not None:
            raise
        raise ValueError(
            "the network cannot be traced without the number of images; give it, as "
            f"--batch-size 64. JAX says: {str(error).splitlines()[0]}"
        ) from error
    return bytes(exported.serialize())


def _prediction(run):
    """Images -> probabilities, as a function of JAX alone."""
    collected = members.num_collected(run.config, run.state)
    count = members.num_predicting(run.config, collected)
    kept = [m for m in range(count) if m not in run.diverged] or list(range(count))

    def predict(images):
        log_probs = run.programs.predict(run.state, images)  # (M S, B, C)
        log_probs = members.without_empty(run.config, log_probs, collected)
        each = log_probs.reshape(count, -1, *log_probs.shape[1:])[np.asarray(kept)]
        if not run.info.num_classes:
            return each.mean(axis=(0, 1))
        samples = each.shape[0] * each.shape[1]
        total = jax.nn.logsumexp(each, axis=(0, 1)) - np.log(samples)
        scale = 1.0 if run.temperature is None else 1 / run.temperature
        return jax.nn.softmax(scale * total.astype(jnp.float32))

    return predict


def _safetensors():
    try:
        from safetensors.numpy import save
    except ImportError as error:
        raise ImportError(
            f"importing safetensors failed with: {error}. {extras.command('train')}"
        ) from error
    return save
