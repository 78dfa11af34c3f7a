"""Black boxes of made histories, for everything that reads them."""

from dataclasses import replace

from nobs._blackbox import Header, Status, this_process
from nobs._blackbox._writer import BoxFile

GONE = replace(this_process(), started="0")
"""A process that no longer lives."""


def box_of(report, folder, process=GONE, rank=0, capacity=None, triggers=(), **status):
    """The path of a black box with the history of a report, and a status of these fields."""
    history = report.history
    capacity = capacity or max(1, len(history))
    header = Header("0.1.0", report.created, rank, 1, report.run, capacity, history.table, triggers, process)
    file = BoxFile(folder, header, False)
    for row in history.rows():
        file.write(row)
    file.tell(Status(**status))
    file.close()
    return file.path
