"""What a run prints at its end."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from viditq.report.table import MetricRow, metrics_table
from viditq.run_dir import RunDir


def metric_rows(metrics: Mapping[str, Any]) -> list[MetricRow]:
    """metrics.json's numbers as table rows."""
    return [
        MetricRow(
            name=metrics["labels"][name]["label"],
            value=value,
            standard_error=metrics["standard_errors"][name],
            reference_value=metrics["float_metrics"].get(name),
            higher_is_better=metrics["labels"][name]["higher_is_better"],
            unit=metrics["labels"][name]["unit"],
        )
        for name, value in metrics["metrics"].items()
    ]


def print_summary(console: Console, metrics: Mapping[str, Any], run_dir: RunDir) -> None:
    """The table, bits and bytes, seconds, and where the picture and the artifact are."""
    title = f"{metrics['experiment']} on {metrics['model']}: {metrics['prompts']} pairs, mean ± standard error"
    console.print(metrics_table(metric_rows(metrics), title))
    bits = f"W{metrics['average_weight_bits']:.2f} A{metrics['average_activation_bits']:.2f} bits on average"
    size, full = metrics["size_bytes"] / 1e6, metrics["float_size_bytes"] / 1e6
    console.print(f"{bits}; denoiser {size:.2f} MB on disk, {full:.2f} MB in fp16 ({full / size:.2f}x smaller)")
    console.print("seconds: " + ", ".join(f"{stage} {s:.1f}" for stage, s in metrics["seconds"].items()))
    for what, path in (
        ("picture", run_dir.picture),
        ("metrics", run_dir.metrics),
        ("artifact", run_dir.artifact),
    ):
        if path.exists():
            console.print(f"{what}: {path}", markup=False)
