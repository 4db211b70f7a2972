"""softmax and log_softmax. The order is in order.py, the schedules in schedule.py; op.py has the three names."""
from .op import log_softmax, softmax
from .schedule import Schedule

__all__ = ["Schedule", "log_softmax", "softmax"]
