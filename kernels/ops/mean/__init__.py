"""Sum and mean. The order is in order.py, the schedules in schedule.py; op.py has the three names."""
from .op import mean, sum
from .schedule import Schedule

__all__ = ["Schedule", "mean", "sum"]
