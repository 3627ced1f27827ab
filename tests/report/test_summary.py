"""The comparison of methods: what a row says, and how it is laid out."""

from permllm.report.summary import gap_closed, latency_table, markdown_table, records, summarize

METRICS = {
    "dense": {"evaluate": {"perplexity": 5.0, "zero_shot": {"rte": {"acc": 0.6}}, "bytes": 10, "seconds": 2.0}},
    "wanda": {
        "prune": {"retained_score": 0.8, "output_error": 0.1, "seconds": 1.0},
        "evaluate": {"perplexity": 12.0, "zero_shot": {"rte": {"acc": 0.5}}, "bytes": 10, "seconds": 2.0},
    },
    "permllm": {
        "learn": {"best_loss": 1.0, "seconds": 9.0},
        "reconstruct": {"retained_score": 0.7, "output_error": 0.05, "seconds": 1.0},
        "evaluate": {"perplexity": 8.5, "zero_shot": {"rte": {"acc": 0.55}}, "bytes": 10, "seconds": 2.0},
    },
}


def test_the_gap_is_what_wanda_loses():
    closed = [gap_closed({"dense": 5.0, "wanda": 12.0, "other": value}, "other") for value in (12.0, 8.5, 5.0, 15.5)]
    assert closed == [0.0, 0.5, 1.0, -0.5]


def test_without_wanda_or_dense_there_is_no_gap():
    assert gap_closed({"dense": 5.0, "ria": 7.0}, "ria") is None
    assert gap_closed({"dense": 5.0, "wanda": 5.0}, "wanda") is None


def test_a_row_gathers_its_stages():
    dense, wanda, permllm = records(summarize("m", "2:4", METRICS))
    assert (dense["gap_closed"], dense["output_error"], dense["seconds"]) == (1.0, None, 2.0)
    assert (wanda["gap_closed"], wanda["retained_score"], wanda["seconds"]) == (0.0, 0.8, 3.0)
    assert (permllm["gap_closed"], permllm["stage_seconds"]) == (0.5, {"learn": 9.0, "reconstruct": 1.0, "evaluate": 2.0})
    assert permllm["zero_shot"] == {"rte": 0.55}


def test_the_table_has_a_line_per_method_below_its_head():
    table = markdown_table(summarize("m", "2:4", METRICS, {"permllm": "alps"}))
    assert table.splitlines()[0] == "**m, 2:4**"
    assert table.splitlines()[2] == "| method | new weights | perplexity | gap closed | rte | output error | seconds |"
    assert table.splitlines()[-1] == "| permllm | alps | 8.50 | 50% | 55.0% | 0.050 | 12 |"


def test_what_folding_costs_follows_the_table():
    metrics = {**METRICS, "permllm-foldable": {**METRICS["permllm"], "evaluate": {**METRICS["permllm"]["evaluate"], "perplexity": 9.9}}}
    table = markdown_table(summarize("m", "2:4", metrics), {"permllm-foldable": "permllm"})
    assert table.splitlines()[-2:] == ["", "Foldable against free orders, permllm: +1.40 perplexity, 20 points of the gap less."]


def test_latencies_are_laid_out_with_dense_sparse_and_permutation():
    shared = {"out": 8, "in": 4, "tokens": 1, "device": "cpu", "dtype": "float32", "pattern": "2:4", "dense_ms": 2.0, "permutation_ms": None}
    rows = [
        {**shared, "kernel": "dense", "ms": 2.0, "speedup": 1.0},
        {**shared, "kernel": "dense_matvec", "ms": 1.5, "speedup": 1.33},
        {**shared, "kernel": "packed", "ms": 1.0, "speedup": 2.0},
        {**shared, "kernel": "packed+gather", "ms": 1.25, "speedup": 1.6, "permutation_ms": 0.2},
        {**shared, "kernel": "semi_structured", "ms": None, "speedup": None},
    ]
    assert latency_table(rows).splitlines()[-1] == "| 8 x 4 | 1 | 2.000 | 1.000 | 1.250 | 0.200 | 1.60x | 1.500 |"
    assert latency_table([row for row in rows if row["ms"] is None]) == "\n"
