"""Methods x seeds x settings from one file: missing runs are trained, none twice.

A file in TOML names the options that all runs share, the seeds, and for each method its
own options:

    seeds = [0, 1, 2]

    [options]
    data = "digits"
    label_noise = 0.2
    epochs = 20

    [methods."SGD"]
    method = "sgd"

    [methods."OT-MDR"]
    method = "otmdr"
    num_particles = [1, 2]          # a list of values: each is run

A table [tuning] says how each method's settings are chosen before:

    [tuning]
    metric = "nll"                  # on the validation set
    seeds = [10, 11]

Epochs, augmentation and model are then equal by construction, and the schedule but for
methods that have one of their own (snapshot, FGE, SWA, SWAG, EDST). A run is a
folder like any other, `OUTPUT/<method>/seed<seed>`.

planning.py     what the file means
tuning.py       each method's best setting
running.py      runs that are missing, and their rows
"""

from otmdr_jax.experiments.sweep.planning import (
    METRICS,
    Plan,
    Planned,
    Setting,
    Tuning,
    plan,
)
from otmdr_jax.experiments.sweep.running import check, read_rows, run, state_of
from otmdr_jax.experiments.sweep.tuning import Tuned, check_tuning, chosen, scores, tune

__all__ = [
    "METRICS",
    "Plan",
    "Planned",
    "Setting",
    "Tuned",
    "Tuning",
    "check",
    "check_tuning",
    "chosen",
    "plan",
    "read_rows",
    "run",
    "scores",
    "state_of",
    "tune",
]
