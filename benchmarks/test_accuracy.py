"""The error of every implementation's sequence log-ratios, against fp64 on the same operands."""

import torch

from benchmarks import accuracy, harness, report
from benchmarks.harness import OURS


def test_log_ratios(device, accuracy_case, rows, verdict):
    operands = accuracy.make(accuracy_case, device)
    true = accuracy.truth(operands)
    implementations, absent = accuracy.implementations(accuracy_case)
    new_rows = []
    for name, log_ratios in implementations.items():
        try:
            new_rows.append(accuracy.row(accuracy_case, name, true, log_ratios(operands)))
        except Exception as error:  # as in harness.first_results
            if name.startswith(OURS):
                raise
            absent[name] = harness.describe(error)
        if device == "cuda":
            torch.cuda.empty_cache()
    new_rows += [accuracy.row(accuracy_case, name, true, None, reason) for name, reason in absent.items()]
    targets = accuracy.targets(accuracy_case, new_rows, device)
    rows.extend(report.with_targets(new_rows, targets))
    verdict(targets)
