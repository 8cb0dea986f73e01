"""Tables and plots of finished training runs.

A run folder holds config.json, metrics.jsonl, result.json and predictions.npz:

    runs = [read_run(folder) for folder in folders]
    print_table(summarise(runs))                # mean ± std over the seeds of a method
    write("report", runs, title="CIFAR-10")     # report.md, pictures, exact numbers

A label names a method: the runs that share it form one row of a table, one line or one
panel of a figure. Figures mark their axes and lines with matplotlib's gid, such as
"mean:LABEL", so that programs can find them. Rich and matplotlib are imported only when
a table is printed or a figure is drawn.
"""

from otmdr_jax.experiments.report.labels import (
    cautions,
    label_of,
    member_runs,
    with_distinct_labels,
)
from otmdr_jax.experiments.report.landscape import (
    contour_figure,
    line_figure,
    plot_landscape,
    surface_figure,
)
from otmdr_jax.experiments.report.learning_curves import (
    learning_curves_figure,
    plot_learning_curves,
)
from otmdr_jax.experiments.report.page import (
    check_distinct,
    check_folder,
    check_replaced,
    write,
)
from otmdr_jax.experiments.report.posterior import (
    plot_signal_to_noise,
    signal_to_noise_figure,
)
from otmdr_jax.experiments.report.predictions import (
    plot_reliability,
    reliability_figure,
)
from otmdr_jax.experiments.report.reading import Run, read_run
from otmdr_jax.experiments.report.shift import plot_shift, print_shift, shift_figure
from otmdr_jax.experiments.report.summary import (
    Cell,
    Row,
    known_columns,
    markdown_table,
    print_summary,
    print_table,
    summarise,
)
from otmdr_jax.experiments.report.tables import DEFAULT_COLUMNS, Column

__all__ = [
    "DEFAULT_COLUMNS",
    "Cell",
    "Column",
    "Row",
    "Run",
    "cautions",
    "check_distinct",
    "check_folder",
    "check_replaced",
    "contour_figure",
    "known_columns",
    "label_of",
    "learning_curves_figure",
    "line_figure",
    "markdown_table",
    "member_runs",
    "plot_landscape",
    "plot_learning_curves",
    "plot_reliability",
    "plot_shift",
    "plot_signal_to_noise",
    "print_shift",
    "print_summary",
    "print_table",
    "read_run",
    "reliability_figure",
    "shift_figure",
    "signal_to_noise_figure",
    "summarise",
    "surface_figure",
    "with_distinct_labels",
    "write",
]
