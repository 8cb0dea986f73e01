"""Time and memory of every metric on a large set.

    python benchmarks/metrics.py                     # 1,000,000 examples, 100 classes
    python benchmarks/metrics.py --scikit-learn      # its one-vs-rest AUROC too
    python benchmarks/metrics.py --smoke             # a small set

Each function is called on its own, as a user would, so that it checks its input too;
`summary` checks once, sorts each class once, and gives them all. Memory is what NumPy
allocates beyond the input, by tracemalloc, in a run that is not timed.
Expected: 4 minutes on 2 CPU cores and 2 GB of memory.
"""

import statistics
import time
import tracemalloc

import numpy as np
from _common import environment
from _record import markdown, options_of, write_json

from otmdr_jax import metrics

FUNCTIONS = """
    accuracy top_k_accuracy nll brier brier_parts ece mce sce ace tace debiased_ece
    smooth_ece aac aurc misclassification_auroc misclassification_aupr
    misclassification_fpr95 ovr_auroc
""".split()


def make_set(count, classes, dtype):
    """Probabilities, made a block at a time, and labels drawn from softer ones."""
    rng = np.random.default_rng(0)
    probs = np.empty((count, classes), dtype)
    labels = np.empty(count, int)
    for start in range(0, count, 10_000):
        block = probs[start : start + 10_000]
        logits = 3.0 * rng.normal(size=block.shape)
        noisy = logits / 1.5 + rng.gumbel(size=block.shape)
        labels[start : start + 10_000] = noisy.argmax(axis=1)
        unnormalised = np.exp(logits - logits.max(axis=1, keepdims=True))
        block[:] = unnormalised / unnormalised.sum(axis=1, keepdims=True)
    return probs, labels


def seconds(function, rounds):
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return {"seconds": statistics.median(times), "n": rounds}


def measure(probs, labels, rounds):
    """Times by name, and memory beyond the input over the input."""
    times = {}
    for name in FUNCTIONS:
        function = getattr(metrics, name)
        times[name] = seconds(lambda f=function: f(probs, labels), rounds)
    times["entropy"] = seconds(lambda: metrics.entropy(probs), rounds)
    times["summary"] = seconds(lambda: metrics.summary(probs, labels), rounds)
    tracemalloc.start()
    metrics.summary(probs, labels)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {"times": times, "extra_memory": peak / probs.nbytes}


def table(results):
    """Seconds by function and dtype."""
    rows = [
        [f"`{name}`", *(f"{x['times'][name]['seconds']:.2f}" for x in results.values())]
        for name in next(iter(results.values()))["times"]
    ]
    extra = [f"{x['extra_memory']:.2f}" for x in results.values()]
    rows.append(["memory of `summary` beyond the input, over the input", *extra])
    return markdown(["function", *(f"{dtype}, s" for dtype in results)], rows)


def main():
    parser = options_of(__doc__, "2,000 examples, 10 classes, one round")
    add = parser.add_argument
    add("--examples", type=int, default=1_000_000)
    add("--classes", type=int, default=100)
    add("--rounds", type=int, default=3)
    add("--scikit-learn", action="store_true", help="time its one-vs-rest AUROC, once")
    options = parser.parse_args()
    if options.smoke:
        options.examples, options.classes, options.rounds = 2_000, 10, 1

    record = {
        "examples": options.examples,
        "classes": options.classes,
        **environment(),
        "results": {},
    }
    for dtype in ("float32", "float64"):
        probs, labels = make_set(options.examples, options.classes, dtype)
        record["results"][dtype] = measure(probs, labels, options.rounds)
        write_json(options.json, record)
    if options.scikit_learn:
        from sklearn.metrics import roc_auc_score

        start = time.perf_counter()
        theirs = roc_auc_score(labels, probs, multi_class="ovr")
        record["scikit_learn_seconds"] = time.perf_counter() - start
        record["scikit_learn_difference"] = theirs - metrics.ovr_auroc(probs, labels)
        write_json(options.json, record)
        print(f"scikit-learn's AUROC: {record['scikit_learn_seconds']:.1f} s\n")
    print(f"{options.examples:,} examples, {options.classes} classes\n")
    print(table(record["results"]))


if __name__ == "__main__":
    main()
