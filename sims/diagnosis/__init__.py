"""What a log of preference training says about the chosen log-probability."""

from sims.diagnosis.files import read_log
from sims.diagnosis.logs import Log, Point
from sims.diagnosis.verdict import Diagnosis, diagnose

__all__ = ["Diagnosis", "Log", "Point", "diagnose", "read_log"]
