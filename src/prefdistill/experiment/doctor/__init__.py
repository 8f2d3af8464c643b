"""Check data, chat template, vocabularies, models and machine before a run.

    checkup = examine(data="pairs.jsonl", student="my/student", teacher="my/teacher")
    for finding in checkup.findings: print(finding.severity, finding.message, finding.fix)

Adding a check: a function that yields `Finding`s, in its list (`DATA_CHECKS`, `TOKEN_CHECKS`, or `examine.py`), and a
row in the table of tests/experiment/test_doctor_*.py.
"""

from prefdistill.experiment.doctor.examine import Checkup, examine
from prefdistill.experiment.doctor.findings import Finding
from prefdistill.experiment.doctor.show import as_text

__all__ = ["Checkup", "Finding", "as_text", "examine"]
